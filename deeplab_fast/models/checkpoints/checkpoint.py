"""A checkpoint in memory, whatever format it was read from."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any, NamedTuple

from torch import Tensor

from ..preprocessing import Preprocessing


class Checkpoint(NamedTuple):
    """A model's class, its constructor's arguments, its weights and its description."""

    architecture: str  # "DeepLabV3" or "DeepLabV3Plus"
    config: dict[str, Any]
    state: dict[str, Tensor]
    preprocessing: Preprocessing
    categories: tuple[str, ...] | None


@contextlib.contextmanager
def well_formed(source: str | os.PathLike[str]) -> Iterator[None]:
    """Turn errors that JSON of unexpected types causes into a ValueError that names the source."""
    try:
        yield
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{source}: malformed: {type(error).__name__}: {error}") from error
