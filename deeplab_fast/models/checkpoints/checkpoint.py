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

    The auxiliary classifier is left out if the model has none.

    Raises:
        ValueError: tensors are missing, unexpected or of another shape; the message is one line.
    """
    state = checkpoint.state
    if not any(key.startswith("aux_classifier.") for key in expected):
        state = {key: state[key] for key in state if not key.startswith("aux_classifier.")}
    try:
        return fitted(state, expected)
    except ValueError as error:
        raise ValueError(f"recognised a {checkpoint}, but {error}") from error


def fitted(state: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """``state`` with the counters of batch norm, which files of PyTorch 0.4.0 and earlier lack.

    Raises:
        ValueError: tensors are missing, unexpected or of another shape than in ``expected``.
    """
    result = dict(state)
    for key in expected.keys() - result.keys():
        if key.endswith(".num_batches_tracked"):
            result[key] = torch.tensor(0)
    problems = {
        "missing": [key for key in expected if key not in result],
        "unexpected": [key for key in result if key not in expected],
        "of another shape": [
            f"{key} {list(result[key].shape)} instead of {list(expected[key].shape)}"
            for key in expected
            if key in result and result[key].shape != expected[key].shape
        ],
    }
    found = [f"{len(keys)} {kind} ({first(keys)})" for kind, keys in problems.items() if keys]
    if found:
        raise ValueError(f"tensors do not fit: {', '.join(found)}")
    return result


def first(names: list[str]) -> str:
    """The first three of some names."""
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
