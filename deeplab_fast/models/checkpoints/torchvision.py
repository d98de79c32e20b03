"""torchvision's DeepLab-v3: weights in its keys, or published by it."""

from __future__ import annotations

import torch

from ..preprocessing import Preprocessing
from .checkpoint import Checkpoint
from .resnets import resnet_name, stem_key
from .state_dict import State

NAMES = ("deeplabv3_resnet50", "deeplabv3_resnet101")
PROJECT = "torchvision"

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
