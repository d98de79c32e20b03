"""open-mmlab/mmsegmentation: ASPPHead and DepthwiseSeparableASPPHead on ResNet-D8.

Source of keys and semantics: mmseg/models/decode_heads/{aspp_head,sep_aspp_head,fcn_head}.py,
mmseg/models/backbones/resnet.py and configs/_base_/models/deeplabv3{,plus}_r50-d8.py.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from ..backbones.resnet import RESNETS, Bottleneck
from ..preprocessing import Preprocessing
from .checkpoint import Checkpoint
from .resnets import resnet_name, stem_key
from .state_dict import State, renamed, rotate_channels

PROJECT = "mmsegmentation"

_HEAD = "decode_head."


def recognize(state: State, description: Mapping[str, Any]) -> Checkpoint | None:
    """The checkpoint of a state dict of the project's keys, or None.

    Args:
        description: the dict around the state dict, whose metadata names the classes.
    """
    if not {f"{_HEAD}image_pool.1.conv.weight", f"{_HEAD}conv_seg.weight"} <= state.keys():
        return None
    backbone = resnet_name(state)
    if backbone is None or RESNETS[backbone].block is not Bottleneck:
        raise ValueError(
            f"a {PROJECT} DeepLab with an unsupported backbone (expected ResNet-50, 101 or 152, or "
            "ResNetV1c-50 or 101)"
        )
    is_plus = f"{_HEAD}c1_bottleneck.conv.weight" in state
    pattern = re.compile(rf"{_HEAD}aspp_modules\.(\d+)\.")
    branches = len({match[1] for match in map(pattern.match, state) if match})
    num_classes, channels = state[f"{_HEAD}conv_seg.weight"].shape[:2]
    config: dict[str, Any] = {
        "backbone": backbone,
        "num_classes": num_classes,
        "in_channels": state[f"backbone.{stem_key(backbone)}"].size(1),
        "output_stride": 8,
        "aux_loss": "auxiliary_head.conv_seg.weight" in state,
        "separable": f"{_HEAD}aspp_modules.1.depthwise_conv.conv.weight" in state,
        "depthwise_norm": True,
        "project_size": state[f"{_HEAD}bottleneck.conv.weight"].size(-1),
        "aspp_channels": channels,
        "dropout": 0.1,
    }
    aspp = "classifier.0."
    if is_plus:
        aspp = "classifier.0.aspp."
        config |= {
            "separable_decoder": True,
            "low_level_channels": state[f"{_HEAD}c1_bottleneck.conv.weight"].size(0),
        }
    else:
        config["head_conv"] = False
    state = renamed(state, _table(branches, aspp))
    # Their ASPP concatenates the pooled features first.
    rotate_channels(state, f"{aspp}project.0.weight", channels)
    architecture = "DeepLabV3Plus" if is_plus else "DeepLabV3"
    categories = _categories(description)
    return Checkpoint(architecture, config, state, Preprocessing(), categories, PROJECT)


def _table(branches: int, aspp: str) -> dict[str, str]:
    """Prefixes of a model with a number of ASPP branches without the pooled one -> ours."""
    table = _module("image_pool.1", f"{aspp}convs.{branches}", 1)
    for i in range(branches):
        table |= _module(f"aspp_modules.{i}", f"{aspp}convs.{i}")
    for i in range(2):
        table |= _module(f"sep_bottleneck.{i}", f"classifier.0.convs.{i}")
    table |= _module("bottleneck", f"{aspp}project")
    table |= _module("c1_bottleneck", "classifier.0.low_level")
    return table | {
        f"{_HEAD}conv_seg.": "classifier.1.",
        "auxiliary_head.convs.0.conv.": "aux_classifier.0.",
        "auxiliary_head.convs.0.bn.": "aux_classifier.1.",
        "auxiliary_head.conv_seg.": "aux_classifier.4.",
    }


def _module(theirs: str, ours: str, first: int = 0) -> dict[str, str]:
    """Prefixes of mmcv's ConvModule and DepthwiseSeparableConvModule -> of conv_norm_relu."""
    return {
        f"{_HEAD}{theirs}.conv.": f"{ours}.{first}.",
        f"{_HEAD}{theirs}.bn.": f"{ours}.{first + 1}.",
        f"{_HEAD}{theirs}.depthwise_conv.conv.": f"{ours}.0.0.",
        f"{_HEAD}{theirs}.depthwise_conv.bn.": f"{ours}.0.1.",
        f"{_HEAD}{theirs}.pointwise_conv.conv.": f"{ours}.0.3.",
        f"{_HEAD}{theirs}.pointwise_conv.bn.": f"{ours}.1.",
    }


def _categories(description: Mapping[str, Any]) -> tuple[str, ...] | None:
    """Names of the classes: ``CLASSES`` in ``meta``, or ``classes`` in mmengine's dataset_meta."""
    meta = description.get("meta")
    for place in (meta, description.get("dataset_meta"), _get(meta, "dataset_meta")):
        for key in ("classes", "CLASSES"):
            names = _get(place, key)
            if isinstance(names, (list, tuple)):
                return tuple(map(str, names))
    return None


def _get(mapping: Any, key: str) -> Any:
    return mapping.get(key) if isinstance(mapping, Mapping) else None
