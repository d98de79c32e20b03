"""Loading of pretrained models from a path or name of any supported format."""

from __future__ import annotations

import os
from pathlib import Path

from .checkpoint import Checkpoint
from .folder import read_own_folder
from .huggingface import read_folder
from .safetensors_file import read_checkpoint
from .torchvision import NAMES, download, read_file

_EXPECTED = (
    "a torchvision checkpoint of deeplabv3_resnet50 or 101 (.pth), a file (.safetensors) or folder "
    "of save_pretrained, a Hugging Face folder of a MobileNetV2ForSemanticSegmentation, one of the "
    f"names {', '.join(NAMES)}, or a repository owner/name of the Hugging Face Hub"
)


def read_pretrained(path_or_name: str | os.PathLike[str]) -> Checkpoint:
    """Read a checkpoint of any format; see ``DeepLabV3.from_pretrained``."""
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
        return read_own_folder(path) or read_folder(path)
    if str(path_or_name) in NAMES and not path.exists():
        return download(str(path_or_name))
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file or folder. Expected {_EXPECTED}")
    if path.suffix == ".safetensors":
        return read_checkpoint(path)
    if path.suffix in (".pth", ".pt"):
        return read_file(path)
    raise ValueError(f"{path}: expected {_EXPECTED}")
