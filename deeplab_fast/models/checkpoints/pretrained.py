"""Loading of pretrained models from a path or name of any supported format."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from . import huggingface, segmentation_models_pytorch
from .checkpoint import Checkpoint
from .folder import read_own_folder
from .recognition import recognize
from .safetensors_file import is_own, read_checkpoint, read_safetensors
from .state_dict import State, state_dict_of
from .torch_file import read_torch_file
from .torchvision import NAMES, download

_EXPECTED = (
    "a checkpoint of a DeepLab (.pth, .pt, .tar, .bin, .ckpt or .safetensors), a file "
    "(.safetensors) or folder of save_pretrained, a folder of Hugging Face's "
    "MobileNetV2ForSemanticSegmentation or of segmentation_models_pytorch, one of the names "
    f"{', '.join(NAMES)}, or a repository owner/name of the Hugging Face Hub"
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
        _check_is_no_run(path)
        return (
            read_own_folder(path)
            or segmentation_models_pytorch.read_folder(path)
            or huggingface.read_folder(path)
        )
    if str(path_or_name) in NAMES and not path.exists():
        state, categories = download(str(path_or_name))
        return _recognized(state, {}, path)._replace(categories=categories)
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file or folder. Expected {_EXPECTED}")
    if path.suffix == ".safetensors" and is_own(path):
        return read_checkpoint(path)
    state, description = read_state_dict(path)
    if huggingface.has_keys(state):
        return huggingface.read_model(path.parent, path, state)
    return _recognized(state, description, path)


def _check_is_no_run(folder: Path) -> None:
    """Raise ValueError for the output folder of a training run, which has several models."""
    models = [folder / f"{name}.safetensors" for name in ("best", "last")]
    models = [path for path in models if path.exists()]
    if models and not (folder / "model.safetensors").exists():
        raise ValueError(
            f"{folder}: the folder of a training run, expected one of its models, "
            f"{' or '.join(map(str, models))}"
        )


def read_state_dict(path: Path) -> tuple[State, Mapping[str, Any]]:
    """The tensors in a file of torch.save or safetensors, and the dict around them.

    Raises:
        ValueError: the file is damaged or has no state dict; the message is one line.
    """
    if path.suffix == ".safetensors":
        content: Any = read_safetensors(path)[0]
    else:
        content = read_torch_file(path)
    if isinstance(content, Mapping) and "architecture" in content:
        raise ValueError(
            f"{path}: the state of a training run, expected one of its models, best.safetensors or "
            "last.safetensors beside it"
        )
    try:
        return state_dict_of(content)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _recognized(state: State, description: Mapping[str, Any], path: Path) -> Checkpoint:
    try:
        return recognize(state, description)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    except (KeyError, IndexError) as error:  # a tensor that a project's models have is missing
        raise ValueError(f"{path}: malformed: {type(error).__name__}: {error}") from error
