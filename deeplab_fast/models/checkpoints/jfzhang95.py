"""jfzhang95/pytorch-deeplab-xception: DeepLab-v3+ with ResNet-101 and MobileNetV2.

Source of keys and semantics: modeling/ at 9135e10.
"""

from __future__ import annotations

from typing import Any

from ..preprocessing import Preprocessing
from .checkpoint import Checkpoint
from .resnets import resnet_name
from .state_dict import State, renamed

PROJECT = "jfzhang95/pytorch-deeplab-xception"

_PREPROCESSING = Preprocessing(resize=513)  # --crop-size, to which it scales images

_TABLE = {
    # MobileNetV2 is in the state dict twice: as a whole and cut into two parts.
    "backbone.low_level_features.": "backbone.features.",
    "backbone.high_level_features.": "backbone.features.",
    **{
        f"aspp.aspp{i + 1}.{theirs}.": f"classifier.0.aspp.convs.{i}.{ours}."
        for i in range(4)
        for theirs, ours in (("atrous_conv", 0), ("bn", 1))
    },
    "aspp.global_avg_pool.": "classifier.0.aspp.convs.4.",
    "aspp.conv1.": "classifier.0.aspp.project.0.",
    "aspp.bn1.": "classifier.0.aspp.project.1.",
    "decoder.conv1.": "classifier.0.low_level.0.",
    "decoder.bn1.": "classifier.0.low_level.1.",
    "decoder.last_conv.0.": "classifier.0.convs.0.0.",
    "decoder.last_conv.1.": "classifier.0.convs.0.1.",
    "decoder.last_conv.4.": "classifier.0.convs.1.0.",
    "decoder.last_conv.5.": "classifier.0.convs.1.1.",
    "decoder.last_conv.8.": "classifier.1.",
}


def recognize(state: State) -> Checkpoint | None:
    """The checkpoint of a state dict of the project's keys, or None."""
    if not {"aspp.aspp1.atrous_conv.weight", "decoder.last_conv.8.weight"} <= state.keys():
        return None
    config: dict[str, Any] = {
        "num_classes": state["decoder.last_conv.8.weight"].size(0),
        "output_stride": 16,
        "align_corners": True,
        "backbone_variant": "jfzhang95",
    }
    state = renamed(state, _TABLE)
    first_conv = "backbone.features.0.0.weight"
    if first_conv in state:
        config["backbone"] = "mobilenet_v2"
        state = _with_nested_blocks(state)
    else:
        config |= {"backbone": resnet_name(state), "multi_grid": (1, 2, 4)}
        first_conv = "backbone.conv1.weight"
    if config["backbone"] is None:
        raise ValueError(
            f"a {PROJECT} model with an unsupported backbone (expected resnet or mobilenet; its "
            "xception and drn are not supported)"
        )
    config["in_channels"] = state[first_conv].size(1)
    return Checkpoint("DeepLabV3Plus", config, state, _PREPROCESSING, None, PROJECT)


def _with_nested_blocks(state: State) -> State:
    """The keys of MobileNetV2's blocks, whose layers are in one flat sequence here."""
    table: dict[str, str | None] = {}
    for block in range(1, 18):
        prefix = f"backbone.features.{block}.conv."
        # Convolutions and batch norms with their activations; the last two have none.
        names = ("0.0", "0.1", "", "1", "2") if block == 1 else _EXPANDED
        table |= {f"{prefix}{i}.": f"{prefix}{name}." for i, name in enumerate(names) if name}
    return renamed(state, table)


_EXPANDED = ("0.0", "0.1", "", "1.0", "1.1", "", "2", "3")
