"""The backbone of a name."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import nn

from .interface import Backbone
from .mobilenet_v2 import MobileNetV2
from .mobilenet_v3 import MobileNetV3Large
from .resnet import RESNETS, ResNet
from .timm_features import PREFIX, TimmBackbone

_NAMES = (*RESNETS, "mobilenet_v2", "mobilenet_v3_large")
# The backbones that have an option, and what an error calls them.
_HAVE = {
    "multi_grid": ("resnets have", RESNETS),
    "dilate_first_block": ("resnets and mobilenet_v2 have", (*RESNETS, "mobilenet_v2")),
    "dilate_next_stage": ("mobilenet_v2 has", ("mobilenet_v2",)),
    "tf_padding": ("mobilenet_v2 has", ("mobilenet_v2",)),
    "pad_before_expansion": ("mobilenet_v2 has", ("mobilenet_v2",)),
    "pad_stem": ("mobilenet_v2 has", ("mobilenet_v2",)),
    "last_conv": ("mobilenet_v2 has", ("mobilenet_v2",)),
}


def make_backbone(
    name: str,
    output_stride: int,
    in_channels: int = 3,
    multi_grid: Sequence[int] | None = None,
    dilate_first_block: bool = False,
    dilate_next_stage: bool = False,
    tf_padding: bool = False,
    pad_before_expansion: bool = False,
    pad_stem: bool = True,
    last_conv: bool = False,
    norm_eps: float | None = None,
) -> Backbone:
    """A backbone with random weights; the arguments are those of :class:`DeepLabV3`.

    Raises:
        ValueError: an argument has an unsupported value; the message names it.
        ImportError: the backbone is one of timm, which is not installed.
    """
    if name not in _NAMES and not str(name).startswith(PREFIX):
        expected = ", ".join(map(repr, _NAMES))
        raise ValueError(
            f"backbone: expected {expected} or '{PREFIX}' and the name of a model of timm, "
            f"got {name!r}"
        )
    if in_channels < 1:
        raise ValueError(f"in_channels: expected at least 1, got {in_channels}")
    if norm_eps is not None and not 0 < norm_eps < math.inf:
        raise ValueError(f"norm_eps: expected a positive number, got {norm_eps!r}")
    options = {
        "multi_grid": multi_grid is not None,
        "dilate_first_block": dilate_first_block,
        "dilate_next_stage": dilate_next_stage,
        "tf_padding": tf_padding,
        "pad_before_expansion": pad_before_expansion,
        "pad_stem": not pad_stem,
        "last_conv": last_conv,
    }
    for option, (owners, names) in _HAVE.items():
        if options[option] and name not in names:
            raise ValueError(f"{option}: only {owners} it, not {name}")
    backbone: Backbone
    if name in RESNETS:
        backbone = ResNet(name, output_stride, in_channels, multi_grid, dilate_first_block)
    elif name == "mobilenet_v2":
        backbone = MobileNetV2(
            output_stride,
            in_channels,
            dilate_first_block,
            dilate_next_stage,
            tf_padding,
            pad_before_expansion,
            pad_stem,
            last_conv,
        )
    elif name == "mobilenet_v3_large":
        backbone = MobileNetV3Large(output_stride, in_channels)
    else:
        backbone = TimmBackbone(name.removeprefix(PREFIX), output_stride, in_channels)
    if norm_eps is not None:
        _set_norm_eps(backbone, name, norm_eps)
    return backbone


def _set_norm_eps(backbone: Backbone, name: str, norm_eps: float) -> None:
    norms = [module for module in backbone.modules() if isinstance(module, nn.BatchNorm2d)]
    if not norms:
        raise ValueError(f"norm_eps: expected None, since {name} has no batch norms")
    for norm in norms:
        norm.eps = norm_eps
