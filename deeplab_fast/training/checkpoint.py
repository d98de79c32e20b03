"""The state of a run on disk: written whole or not at all, and enough to go on exactly."""

from __future__ import annotations

import io
import os
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .._io.files import replacing
from .errors import TrainingError


def write(path: Path, data: bytes | memoryview) -> None:
    """Write a whole file or, whatever happens, leave what was there.

    Raises:
        TrainingError: it cannot be written, naming it.
    """
    try:
        with replacing(path) as partial, open(partial, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())  # or a machine that stops could keep the name without the data
    except OSError as error:
        raise cannot_write(path, error) from error


def cannot_write(path: Path, error: Exception) -> TrainingError:
    why = getattr(error, "strerror", None) or error
    return TrainingError(f"{path}: cannot write: {why}. What was written before is whole")


def save(path: Path, state: Mapping[str, Any]) -> None:
    """Write what :func:`load` reads: tensors, numbers, strings, and containers of them."""
    buffer = io.BytesIO()  # torch.save itself hides the reason why a disk refuses
    torch.save(dict(state), buffer)
    with buffer.getbuffer() as data:  # or Python 3.12.1 may crash as it collects what an error kept
        write(path, data)


_ENTRIES = {
    "step", "evaluated", "loss", "best_miou", "model", "average", "optimizer", "scaler", "random",
}  # fmt: skip


def load(path: Path, expected: Mapping[str, Any]) -> dict[str, Any]:
    """The state in ``path``, of a run with the same settings.

    Args:
        path: written by :func:`save`.
        expected: entries of the state that must be equal.

    Raises:
        TrainingError: the file is missing or damaged, or was written by another run, naming the
            file and what differs.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise TrainingError(f"{path}: {error.strerror or error} (expected a checkpoint)") from error
    except Exception as error:  # a damaged pickle raises nearly anything
        raise TrainingError(f"{path}: damaged, or not a checkpoint of this program") from error
    if not isinstance(state, dict) or not _ENTRIES | expected.keys() <= state.keys():
        raise TrainingError(f"{path}: not a checkpoint of deeplab-fast train")
    for name, value in expected.items():
        if state[name] != value:
            raise TrainingError(f"{path}: {_difference(name, state[name], value)}")
    return state


def _difference(name: str, there: Any, here: Any) -> str:
    if isinstance(there, Mapping) and isinstance(here, Mapping):
        for key in {**here, **there}:
            if there.get(key) != here.get(key):
                return _difference(key, there.get(key), here.get(key))
    return (
        f"saved with {name} {there!r}, not {here!r} (expected the same, or a new run in another "
        "folder)"
    )


def random_state(device: torch.device) -> dict[str, Any]:
    """Of all generators of this process, in types that torch.load takes with weights_only."""
    _, words, *rest = np.random.get_state()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
        "numpy": (np.asarray(words).tolist(), *rest),
        "python": random.getstate(),
    }


def set_random_state(state: Mapping[str, Any], device: torch.device) -> None:
    torch.set_rng_state(state["torch"])
    if device.type == "cuda" and state["cuda"] is not None:
        torch.cuda.set_rng_state(state["cuda"], device)
    words, *rest = state["numpy"]
    np.random.set_state(("MT19937", np.array(words, dtype=np.uint32), *rest))
    random.setstate(state["python"])
