"""A checkpoint in memory, whatever format it was read from."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..preprocessing import Preprocessing


class Checkpoint(NamedTuple):
    """A model's class, its constructor's arguments, its weights and its description."""

    architecture: str  # "DeepLabV3" or "DeepLabV3Plus"
    config: dict[str, Any]
    state: dict[str, Tensor]
    preprocessing: Preprocessing
    categories: tuple[str, ...] | None
    project: str = "deeplab_fast"  # where the file comes from

    def __str__(self) -> str:
        backbone, classes = self.config.get("backbone"), self.config.get("num_classes")
        return f"{self.project} {self.architecture} with {backbone} and {classes} classes"


@contextlib.contextmanager
def well_formed(source: str | os.PathLike[str]) -> Iterator[None]:
    """Turn errors that JSON of unexpected types causes into a ValueError that names the source."""
    try:
        yield
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{source}: malformed: {type(error).__name__}: {error}") from error


def state_for(checkpoint: Checkpoint, expected: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The checkpoint's tensors for a model whose state dict is ``expected``.

    The auxiliary classifier is left out if the model has none. Counters of batch norm, which files
    of PyTorch 0.4.0 and earlier lack, are added.

    Raises:
        ValueError: tensors are missing, unexpected or of another shape; the message is one line.
    """
    state = dict(checkpoint.state)
    if not any(key.startswith("aux_classifier.") for key in expected):
        state = {key: state[key] for key in state if not key.startswith("aux_classifier.")}
    for key in expected.keys() - state.keys():
        if key.endswith(".num_batches_tracked"):
            state[key] = torch.tensor(0)
    problems = {
        "missing": [key for key in expected if key not in state],
        "unexpected": [key for key in state if key not in expected],
        "of another shape": [
            f"{key} {list(state[key].shape)} instead of {list(expected[key].shape)}"
            for key in expected
            if key in state and state[key].shape != expected[key].shape
        ],
    }
    found = [f"{len(keys)} {kind} ({first(keys)})" for kind, keys in problems.items() if keys]
    if found:
        raise ValueError(f"recognised a {checkpoint}, but tensors do not fit: {'; '.join(found)}")
    return state


def first(names: list[str]) -> str:
    """The first three of some names."""
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
