"""Atomic writes of files."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path that is renamed to ``path`` at the end of the block.

    If the block raises an exception, ``path`` stays as it was.

    >>> with replacing(Path("labels.png")) as partial:
    ...     image.save(partial, format="PNG")
    """
    # The name is shortened, because that of ``path`` may be as long as the file system allows.
    partial = path.with_name(f".{path.name[:50]}.{os.getpid()}.partial")
    try:
        yield partial
        os.replace(partial, path)
    finally:
        with contextlib.suppress(OSError):  # the error of the write is the one to report
            partial.unlink(missing_ok=True)
