"""Checkpoints of models, and the .safetensors format that save_pretrained writes."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .._io.files import replacing
from .preprocessing import Preprocessing

_KEY = "deeplab_fast"  # metadata entry with the JSON description


class Checkpoint(NamedTuple):
    """Configuration (the constructor's arguments), weights and description of a model."""

    config: dict[str, Any]
    state: dict[str, Tensor]
    preprocessing: Preprocessing
    categories: tuple[str, ...] | None


def write_checkpoint(path: str | os.PathLike[str], checkpoint: Checkpoint) -> None:
    """Write the state dict as safetensors, and everything else as JSON in its metadata."""
    path = Path(path)
    if path.suffix != ".safetensors":
        raise ValueError(f"{path}: expected a name that ends in .safetensors")
    description = {
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


def read_checkpoint(path: Path) -> Checkpoint:
    """Read a file of :func:`write_checkpoint`."""
    state, metadata = read_safetensors(path)
    if _KEY not in metadata:
        raise ValueError(
            f"{path}: expected a file written by save_pretrained, got one without {_KEY!r} in its "
            "metadata. To load a Hugging Face model, give its folder"
        )
    with well_formed(path):
        description = json.loads(metadata[_KEY])
        preprocessing: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value
            for name, value in description["preprocessing"].items()
        }
        categories = description["categories"]
        config = dict(description["config"])
        if "rates" in config:  # written by version 0.1.0
            config["atrous_rates"] = config.pop("rates")
        return Checkpoint(
            config,
            state,
            Preprocessing(**preprocessing),
            None if categories is None else tuple(map(str, categories)),
        )


@contextlib.contextmanager
def well_formed(source: str | os.PathLike[str]) -> Iterator[None]:
    """Turn errors that JSON of unexpected types causes into a ValueError that names the source."""
    try:
        yield
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{source}: malformed: {type(error).__name__}: {error}") from error


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a file. The tensors are copies: safetensors maps them to the file."""
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {key: file.get_tensor(key).clone() for key in file.keys()}
            return tensors, file.metadata() or {}
    except SafetensorError as error:
        raise ValueError(f"{path}: not a readable safetensors file: {error}") from error
