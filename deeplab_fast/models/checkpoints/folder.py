"""The folder that save_pretrained writes: config.json, model.safetensors and README.md."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from ..._io.files import replacing
from .checkpoint import Checkpoint, well_formed
from .safetensors_file import (
    categories_of,
    preprocessing_of,
    read_safetensors,
    write_checkpoint,
)

CONFIG, WEIGHTS, CARD = "config.json", "model.safetensors", "README.md"
LIBRARY = "deeplab-fast"  # entry "library_name" of our config.json

_FORMAT_VERSION = 1


def write_folder(folder: Path, checkpoint: Checkpoint, card: str) -> None:
    """Write a checkpoint and its model card; see ``DeepLabV3.save_pretrained``.

    The constructor's arguments are entries of config.json itself, as in the folders of
    huggingface_hub's ModelHubMixin.
    """
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(
            f"{folder}: expected a folder or a name that ends in .safetensors, got another file"
        )
    _check_overwritten(folder, checkpoint.architecture)
    config = {
        "library_name": LIBRARY,
        "format_version": _FORMAT_VERSION,
        "architecture": checkpoint.architecture,
        **checkpoint.config,
        "preprocessing": dataclasses.asdict(checkpoint.preprocessing),
        "categories": checkpoint.categories,
    }
    folder.mkdir(parents=True, exist_ok=True)
    write_checkpoint(folder / WEIGHTS, checkpoint)
    _write_text(folder / CONFIG, json.dumps(config, indent=2) + "\n")
    if not (folder / CARD).exists():  # its author may have edited it
        _write_text(folder / CARD, card)


def read_own_folder(folder: Path) -> Checkpoint | None:
    """Read a folder of :func:`write_folder`; None for any other.

    config.json describes the model. The metadata of model.safetensors is ignored.
    """
    path = folder / CONFIG
    config = _own_config(folder)
    if config is None:
        return None
    del config["library_name"]
    version = config.pop("format_version", None)
    if version != _FORMAT_VERSION:
        raise ValueError(
            f"{path}: expected format_version {_FORMAT_VERSION}, got {version!r}: a newer version "
            f"of {LIBRARY} may have written it"
        )
    if not (folder / WEIGHTS).exists():
        raise FileNotFoundError(f"{folder / WEIGHTS}: not found. Expected it beside {CONFIG}")
    state, _ = read_safetensors(folder / WEIGHTS)
    with well_formed(path):
        description = {name: config.pop(name) for name in ("preprocessing", "categories")}
        return Checkpoint(
            config.pop("architecture"),
            config,
            state,
            preprocessing_of(description),
            categories_of(description),
        )


def _own_config(folder: Path) -> dict[str, Any] | None:
    """The content of config.json if this project wrote it."""
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None
    own = isinstance(config, dict) and config.get("library_name") == LIBRARY
    return config if own else None


def _check_overwritten(folder: Path, architecture: str) -> None:
    """Raise FileExistsError if a folder holds a model of another kind."""
    if not (folder / CONFIG).exists():
        return
    config = _own_config(folder)
    found = f"that of another project than {LIBRARY}"
    if config is not None:
        found = f"a {config.get('architecture')}"
    if config is None or config.get("architecture") != architecture:
        raise FileExistsError(
            f"{folder / CONFIG}: expected none or that of a {architecture}, got {found}: save the "
            "model to another folder, or delete this file"
        )


def _write_text(path: Path, text: str) -> None:
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8")
