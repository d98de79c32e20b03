"""Checkpoint files: atomic writes, checks on reading, and the state of random generators."""

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
    """Write a file completely, or leave the previous file unchanged.

    Raises:
        TrainingError: the file cannot be written; the message names it.
    """
    try:
        with replacing(path) as partial, open(partial, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())  # a crash must not leave the new name without the data
    except OSError as error:
        raise cannot_write(path, error) from error


def cannot_write(path: Path, error: Exception) -> TrainingError:
    """The TrainingError for a file that cannot be written, with the reason from ``error``."""
    why = getattr(error, "strerror", None) or error
    return TrainingError(f"{path}: cannot write: {why}. Files written before are complete")


def save(path: Path, state: Mapping[str, Any]) -> None:
    """Write tensors, numbers, strings and containers of them to a file that :func:`load` reads."""
    buffer = io.BytesIO()  # torch.save to a file hides the reason of an OSError
    torch.save(dict(state), buffer)
    with buffer.getbuffer() as data:  # an exported buffer that an error kept crashes Python 3.12.1
        write(path, data)


_ENTRIES = {
    "step", "evaluated", "loss", "best_miou", "model", "average", "optimizer", "scaler", "random",
}  # fmt: skip


def load(path: Path, expected: Mapping[str, Any]) -> dict[str, Any]:
    """Load the state from a checkpoint of a run with the same settings.

    Args:
        path: a file written by :func:`save`.
        expected: settings that the checkpoint must have, with equal values.

    Raises:
        TrainingError: the file is missing or damaged, or comes from another run or version; the
            message names the file and the setting that differs.
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


def _difference(name: str, saved: Any, expected: Any) -> str:
    """Describe the first setting that differs."""
    if isinstance(saved, Mapping) and isinstance(expected, Mapping):
        for key in {**expected, **saved}:
            if key not in expected or key not in saved:
                how, has = ("without", "has") if key in expected else ("with", "does not have")
                return (
                    f"saved {how} the setting {key!r}, which this version {has} (expected a "
                    "checkpoint of this version, or a new run in another folder)"
                )
            if saved[key] != expected[key]:
                return _difference(key, saved[key], expected[key])
    return (
        f"saved with {name} {saved!r}, not {expected!r} (expected the same, or a new run in "
        "another folder)"
    )


def random_state(device: torch.device) -> dict[str, Any]:
    """State of this process's generators, in types that torch.load reads with weights_only."""
    _, words, *rest = np.random.get_state()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
        "numpy": (np.asarray(words).tolist(), *rest),
        "python": random.getstate(),
    }


def set_random_state(state: Mapping[str, Any], device: torch.device) -> None:
    """Restore what :func:`random_state` returned."""
    torch.set_rng_state(state["torch"])
    if device.type == "cuda" and state["cuda"] is not None:
        torch.cuda.set_rng_state(state["cuda"], device)
    words, *rest = state["numpy"]
    np.random.set_state(("MT19937", np.array(words, dtype=np.uint32), *rest))
    random.setstate(state["python"])
