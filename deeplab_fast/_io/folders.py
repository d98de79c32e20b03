"""Walking through folders."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path


def files_below(folder: str | os.PathLike[str]) -> Iterator[Path]:
    """The files in a folder and its subfolders, in no order, except for hidden names.

    Symbolic links are followed; a link to a folder that contains it is left out.

    Raises:
        OSError: a folder cannot be read.
    """
    parents = Path(os.path.realpath(folder)).parents
    yield from _walk(os.fspath(folder), tuple(map(str, parents)))


def _walk(folder: str, outer: tuple[str, ...]) -> Iterator[Path]:
    real = os.path.realpath(folder)
    if real in outer:
        return
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if os.path.isdir(entry.path):  # entry.is_dir() fails if a link refers to itself
                yield from _walk(entry.path, (*outer, real))
            else:
                yield Path(entry.path)
