"""torchvision's DeepLab-v3 weights, from checkpoint files or published by torchvision."""

from __future__ import annotations

import re
import textwrap
from pathlib import Path
from typing import Any

import torch

from ..preprocessing import Preprocessing
from .checkpoint import Checkpoint, well_formed

NAMES = ("deeplabv3_resnet50", "deeplabv3_resnet101")

_PREPROCESSING = Preprocessing(resize=520)  # the size at which references/segmentation evaluates


def read_file(path: Path) -> Checkpoint:
    """Read a checkpoint that torch.save wrote. Its keys and shapes determine the network."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # a damaged pickle raises nearly anything
        message = textwrap.shorten(str(error), 200, placeholder=" ...")
        raise ValueError(
            f"{path}: expected a checkpoint that torch.load reads with weights_only=True: {message}"
        ) from error
    if isinstance(state, dict) and "architecture" in state:
        raise ValueError(
            f"{path}: the state of a training run, expected one of its models, best.safetensors or "
            "last.safetensors beside it"
        )
    if isinstance(state, dict) and "model" in state:  # saved by its references/segmentation
        state = state["model"]
    return _checkpoint(state, str(path), None)


def download(name: str) -> Checkpoint:
    """The weights that torchvision publishes under a name, cached by torch.hub."""
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
    return _checkpoint(state, name, tuple(weights.meta["categories"]))


def _checkpoint(state: Any, source: str, categories: tuple[str, ...] | None) -> Checkpoint:
    """The checkpoint of a state dict. Keys and shapes determine the configuration."""
    keys = {str(key) for key in state} if isinstance(state, dict) else set()
    blocks = [key for key in keys if re.fullmatch(r"backbone\.layer3\.\d+\.conv1\.weight", key)]
    backbone = {6: "resnet50", 23: "resnet101"}.get(len(blocks))
    if backbone is None or not {"classifier.0.project.0.weight", "classifier.4.weight"} <= keys:
        raise ValueError(
            f"{source}: expected the state dict of torchvision's deeplabv3_resnet50 or "
            f"deeplabv3_resnet101, got {_summary(state)}"
        )
    with well_formed(source):
        num_classes = state["classifier.4.weight"].size(0)
    config = {
        "backbone": backbone,
        "num_classes": num_classes,
        "output_stride": 8,
        "aux_loss": any(key.startswith("aux_classifier.") for key in keys),
    }
    return Checkpoint("DeepLabV3", config, state, _PREPROCESSING, categories)


def _summary(state: Any) -> str:
    if not isinstance(state, dict):
        return f"a {type(state).__name__}"
    first = ", ".join(str(key) for key in list(state)[:3])
    return f"a dict of {len(state)} entries ({first}, ...)"
