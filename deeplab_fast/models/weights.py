"""Where trained weights come from: which of the formats a path or name is, and torchvision's."""

from __future__ import annotations

import os
import re
import textwrap
from pathlib import Path
from typing import Any

import torch

from .checkpoint import Checkpoint, read_own, well_formed
from .huggingface import read_folder
from .preprocessing import Preprocessing

NAMES = ("deeplabv3_resnet50", "deeplabv3_resnet101")

_EXPECTED = (
    "a torchvision checkpoint of deeplabv3_resnet50 or 101 (.pth), a file of save_pretrained "
    "(.safetensors), a Hugging Face folder of a MobileNetV2ForSemanticSegmentation, or one of the "
    f"names {', '.join(NAMES)}"
)
_TORCHVISION = Preprocessing(resize=520)  # its references/segmentation evaluate at this size


def read_checkpoint(path_or_name: str | os.PathLike[str]) -> Checkpoint:
    """See ``DeepLabV3.from_pretrained``."""
    checkpoint = _read(path_or_name)
    classes, categories = checkpoint.config.get("num_classes"), checkpoint.categories
    if categories is not None and len(categories) != classes:
        raise ValueError(
            f"{path_or_name}: expected as many categories as classes, got {len(categories)} for "
            f"{classes} classes"
        )
    return checkpoint


def _read(path_or_name: str | os.PathLike[str]) -> Checkpoint:
    path = Path(path_or_name)
    if path.is_dir():
        return read_folder(path)
    if str(path_or_name) in NAMES and not path.exists():
        return _download(str(path_or_name))
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file or folder. Expected {_EXPECTED}")
    if path.suffix == ".safetensors":
        return read_own(path)
    if path.suffix in (".pth", ".pt"):
        return _read_torchvision(path)
    raise ValueError(f"{path}: expected {_EXPECTED}")


def _read_torchvision(path: Path) -> Checkpoint:
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
    if isinstance(state, dict) and "model" in state:  # as its references/segmentation save it
        state = state["model"]
    return _torchvision_checkpoint(state, str(path), None)


def _download(name: str) -> Checkpoint:
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
    return _torchvision_checkpoint(state, name, tuple(weights.meta["categories"]))


def _torchvision_checkpoint(
    state: Any, source: str, categories: tuple[str, ...] | None
) -> Checkpoint:
    """What the keys and shapes of a state dict say about the network it belongs to."""
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
    return Checkpoint(config, state, _TORCHVISION, categories)


def _summary(state: Any) -> str:
    if not isinstance(state, dict):
        return f"a {type(state).__name__}"
    first = ", ".join(str(key) for key in list(state)[:3])
    return f"a dict of {len(state)} entries ({first}, ...)"
