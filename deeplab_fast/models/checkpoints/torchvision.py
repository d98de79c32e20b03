"""torchvision's DeepLab-v3: weights in its keys, or published by it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ..._io.files import replacing
from ..preprocessing import Preprocessing
from .checkpoint import Checkpoint
from .resnets import resnet_name, stem_key
from .state_dict import State

NAMES = ("deeplabv3_resnet50", "deeplabv3_resnet101")
PROJECT = "torchvision"

# What the state dict tells, and what has no influence on the outputs
_FREE = ("num_classes", "aux_loss", "dropout", "atrous_rates")

_PREPROCESSING = Preprocessing(resize=520)  # the size at which references/segmentation evaluates


def recognize(state: State) -> Checkpoint | None:
    """The checkpoint of a state dict of torchvision's keys, or None."""
    if not {"classifier.0.project.0.weight", "classifier.4.weight"} <= state.keys():
        return None
    backbone = resnet_name(state)
    if backbone is None:
        raise ValueError("a torchvision DeepLabV3 with an unsupported backbone (expected a resnet)")
    config = {
        "backbone": backbone,
        "num_classes": state["classifier.4.weight"].size(0),
        "in_channels": state[f"backbone.{stem_key(backbone)}"].size(1),
        "output_stride": 8,
        "aspp_channels": state["classifier.0.project.0.weight"].size(0),
        "aux_loss": "aux_classifier.4.weight" in state,
    }
    return Checkpoint("DeepLabV3", config, state, _PREPROCESSING, None, PROJECT)


def download(name: str) -> tuple[State, tuple[str, ...]]:
    """State dict and categories that torchvision publishes under a name, cached by torch.hub."""
    try:
        from torchvision.models import get_model_weights
    except ImportError as error:
        raise ImportError(
            f"{name}: torchvision knows where these weights are: pip install torchvision"
        ) from error
    weights = get_model_weights(name).DEFAULT
    try:
        state = torch.hub.load_state_dict_from_url(
            weights.url, map_location="cpu", check_hash=True, weights_only=True
        )
    except OSError as error:
        raise ConnectionError(
            f"{name}: cannot download {weights.url}: {error}. Offline, fetch that file elsewhere "
            f"and give its path, or put it into {torch.hub.get_dir()}/checkpoints"
        ) from error
    return dict(state), tuple(weights.meta["categories"])


def write_torchvision(path: Path, checkpoint: Checkpoint, usual: Mapping[str, Any]) -> None:
    """Write the state dict of torchvision's model, completely or not at all.

    Args:
        path: a name that ends in .pth or .pt.
        usual: configuration of the same backbone with the default arguments.

    Raises:
        ValueError: torchvision has no such model; the message says why.
    """
    if path.suffix not in (".pth", ".pt"):
        raise ValueError(f"{path}: expected a name that ends in .pth or .pt")
    backbone = checkpoint.config["backbone"]
    if checkpoint.architecture != "DeepLabV3":
        raise ValueError(f"torchvision has no {checkpoint.architecture}")
    if f"deeplabv3_{backbone}" not in NAMES:
        raise ValueError(f"torchvision has no DeepLabV3 with {backbone} (expected {', '.join(NAMES)})")
    different = [
        f"{name} {value!r} instead of {usual[name]!r}"
        for name, value in checkpoint.config.items()
        if name not in _FREE and value != usual[name]
    ]
    if different:
        raise ValueError(f"torchvision's deeplabv3_{backbone} cannot have {', '.join(different)}")
    with replacing(path) as partial:
        torch.save(checkpoint.state, partial)
