"""VainF/DeepLabV3Plus-Pytorch: DeepLab-v3 and -v3+ with resnets and MobileNetV2.

Source of keys and semantics: network/{modeling,_deeplab}.py and network/backbone/ at 4e1087d.
"""

from __future__ import annotations

from typing import Any

from ..preprocessing import Preprocessing
from .checkpoint import Checkpoint
from .resnets import resnet_name
from .state_dict import State, renamed, rotate_channels

PROJECT = "VainF/DeepLabV3Plus-Pytorch"

_LOW_CHANNELS = 48

# Their MobileNetV2 is cut into two parts, which keep the numbers of the blocks.
_BACKBONE = {
    "backbone.low_level_features.": "backbone.features.",
    "backbone.high_level_features.": "backbone.features.",
}
_V3 = _BACKBONE | {"classifier.classifier.": "classifier."}
_V3_PLUS = _BACKBONE | {
    "classifier.project.": "classifier.0.low_level.",
    "classifier.classifier.0.body.": "classifier.0.convs.0.0.",
    "classifier.classifier.0.": "classifier.0.convs.0.0.",
    "classifier.classifier.1.": "classifier.0.convs.0.1.",
    "classifier.classifier.3.": "classifier.1.",
}


def recognize(state: State) -> Checkpoint | None:
    """The checkpoint of a state dict of the project's keys, or None."""
    is_plus = "classifier.aspp.project.0.weight" in state and "classifier.project.0.weight" in state
    if not (is_plus or "classifier.classifier.0.project.0.weight" in state):
        return None
    config: dict[str, Any] = {"output_stride": 16, "dropout": 0.1}
    first_conv = "backbone.low_level_features.0.0.weight"
    if first_conv in state:
        config |= {"backbone": "mobilenet_v2", "backbone_variant": "VainF"}
    else:
        config["backbone"], first_conv = resnet_name(state), "backbone.conv1.weight"
    if config["backbone"] is None:
        raise ValueError(
            f"a {PROJECT} model with an unsupported backbone (expected a resnet or mobilenet; its "
            "xception and hrnetv2 are not supported)"
        )
    config["in_channels"] = state[first_conv].size(1)
    if is_plus:
        separable = "classifier.classifier.0.body.0.weight" in state
        config |= {"separable": separable, "decoder_convs": 1, "low_level_channels": _LOW_CHANNELS}
        # --separable_conv wraps the two convolutions of a separable one in a module "body".
        table = {
            f"classifier.aspp.convs.{i}.0.body.": f"classifier.0.aspp.convs.{i}.0."
            for i in range(1, 4)
        }
        state = renamed(state, table | {"classifier.aspp.": "classifier.0.aspp."} | _V3_PLUS)
        # Their decoder concatenates the low-level features first.
        if separable:
            rotate_channels(state, "classifier.0.convs.0.0.0.weight", _LOW_CHANNELS, dim=0)
            rotate_channels(state, "classifier.0.convs.0.0.1.weight", _LOW_CHANNELS)
        else:
            rotate_channels(state, "classifier.0.convs.0.0.weight", _LOW_CHANNELS)
        config["num_classes"] = state["classifier.1.weight"].size(0)
        return Checkpoint("DeepLabV3Plus", config, state, Preprocessing(), None, PROJECT)
    state = renamed(state, _V3)
    config["num_classes"] = state["classifier.4.weight"].size(0)
    return Checkpoint("DeepLabV3", config, state, Preprocessing(), None, PROJECT)
