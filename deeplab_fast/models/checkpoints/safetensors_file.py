"""The .safetensors format that save_pretrained writes."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..._io.files import replacing
from ..preprocessing import Preprocessing
from .checkpoint import Checkpoint, well_formed

Result = TypeVar("Result")

_KEY = "deeplab_fast"  # metadata entry with the JSON description


def write_checkpoint(path: str | os.PathLike[str], checkpoint: Checkpoint) -> None:
    """Write the state dict as safetensors, and everything else as JSON in its metadata."""
    path = Path(path)
    if path.suffix != ".safetensors":
        raise ValueError(f"{path}: expected a name that ends in .safetensors")
    description = {
        "architecture": checkpoint.architecture,
        "config": checkpoint.config,
        "preprocessing": dataclasses.asdict(checkpoint.preprocessing),
        "categories": checkpoint.categories,
    }
    state = {key: tensor.contiguous() for key, tensor in checkpoint.state.items()}
    with replacing(path) as partial:
        partial.touch()
        mode = partial.stat().st_mode  # follows the umask; safetensors writes for the user only
        save_file(state, partial, metadata={_KEY: json.dumps(description)})
        partial.chmod(mode)


def is_own(path: Path) -> bool:
    """True if :func:`write_checkpoint` wrote the file."""
    return _KEY in _read(path, lambda file: file.metadata() or {})


def read_checkpoint(path: Path) -> Checkpoint:
    """Read a file of :func:`write_checkpoint`."""
    state, metadata = read_safetensors(path)
    with well_formed(path):
        description = json.loads(metadata[_KEY])
        config = dict(description["config"])
        if "rates" in config:  # written by version 0.1.0
            config["atrous_rates"] = config.pop("rates")
        if "tf_padding" in config:  # written by version 0.2.0
            same = config.pop("tf_padding")
            config["backbone_variant"] = "tensorflow" if same else "torchvision"
        return Checkpoint(
            description.get("architecture", "DeepLabV3"),  # not in files of version 0.2.0
            config,
            state,
            preprocessing_of(description),
            categories_of(description),
        )


def preprocessing_of(description: dict[str, Any]) -> Preprocessing:
    """The preprocessing of a description in JSON types."""
    preprocessing: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in description["preprocessing"].items()
    }
    return Preprocessing(**preprocessing)


def categories_of(description: dict[str, Any]) -> tuple[str, ...] | None:
    """The names of the classes in a description in JSON types, or None."""
    categories = description["categories"]
    return None if categories is None else tuple(map(str, categories))


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a file. The tensors are copies: safetensors maps them to the file."""
    return _read(
        path,
        lambda file: (
            {key: file.get_tensor(key).clone() for key in file.keys()},
            file.metadata() or {},
        ),
    )


def _read(path: Path, read: Callable[[Any], Result]) -> Result:
    try:
        with safe_open(path, framework="pt") as file:
            return read(file)
    except SafetensorError as error:
        raise ValueError(f"{path}: not a readable safetensors file: {error}") from error
