"""torchvision's DeepLab-v3: weights in its keys, or published by it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ..._io.files import replacing
from .. import torchvision_weights
from ..preprocessing import Preprocessing
from .checkpoint import Checkpoint
from .resnets import resnet_name, stem_key
from .state_dict import State

NAMES = ("deeplabv3_resnet50", "deeplabv3_resnet101", "deeplabv3_mobilenet_v3_large")
PROJECT = "torchvision"

# Options that the state dict implies, or that have no influence on the outputs
_FREE = ("num_classes", "aux_loss", "dropout")

_PREPROCESSING = Preprocessing(resize=520)  # the size at which references/segmentation evaluates


def options(backbone: str) -> dict[str, Any]:
    """Arguments of our ``DeepLabV3`` for torchvision's model with a backbone."""
    if backbone == "mobilenet_v3_large":  # the rates of output stride 8, although it has 16
        return {"backbone": backbone, "output_stride": 16, "atrous_rates": (12, 24, 36)}
    return {"backbone": backbone, "output_stride": 8}


def recognize(state: State) -> Checkpoint | None:
    """The checkpoint of a state dict of torchvision's keys, or None."""
    if not {"classifier.0.project.0.weight", "classifier.4.weight"} <= state.keys():
        return None
    is_mobilenet = "backbone.16.0.weight" in state
    backbone = "mobilenet_v3_large" if is_mobilenet else resnet_name(state)
    if backbone is None:
        raise ValueError(
            f"a {PROJECT} DeepLabV3 with an unsupported backbone (expected a resnet or "
            "mobilenet_v3_large)"
        )
    first_conv = "backbone.0.0.weight" if is_mobilenet else f"backbone.{stem_key(backbone)}"
    config = options(backbone) | {
        "num_classes": state["classifier.4.weight"].size(0),
        "in_channels": state[first_conv].size(1),
        "aspp_channels": state["classifier.0.project.0.weight"].size(0),
        "aux_loss": "aux_classifier.4.weight" in state,
    }
    return Checkpoint("DeepLabV3", config, state, _PREPROCESSING, None, PROJECT)


def download(name: str) -> tuple[State, tuple[str, ...]]:
    """State dict and categories that torchvision publishes under a name, cached by torch.hub."""
    state, description = torchvision_weights.download(name, "DEFAULT")
    return state, tuple(description["categories"])


def write_torchvision(path: Path, checkpoint: Checkpoint, usual: Mapping[str, Any]) -> None:
    """Write the state dict of torchvision's model, completely or not at all.

    Args:
        path: a name that ends in .pth or .pt.
        usual: configuration of the model of :func:`options` with the same backbone.

    Raises:
        ValueError: torchvision has no such model; the message says why.
    """
    if path.suffix not in (".pth", ".pt"):
        raise ValueError(f"{path}: expected a name that ends in .pth or .pt")
    name = f"deeplabv3_{checkpoint.config['backbone']}"
    if checkpoint.architecture != "DeepLabV3" or name not in NAMES:
        raise ValueError(
            f"torchvision has no {checkpoint.architecture} with {checkpoint.config['backbone']}, "
            f"only {', '.join(NAMES)}"
        )
    different = [
        f"{option}={value!r} (it has {usual[option]!r})"
        for option, value in checkpoint.config.items()
        if option not in _FREE and value != usual[option]
    ]
    if different:
        raise ValueError(f"torchvision's {name} cannot have {', '.join(different)}")
    with replacing(path) as partial:
        torch.save(checkpoint.state, partial)
