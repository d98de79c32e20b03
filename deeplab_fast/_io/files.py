"""Atomic writes of files."""

from __future__ import annotations

import contextlib
import os
import tempfile
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


@contextlib.contextmanager
def replacing_files(path: Path) -> Iterator[Path]:
    """A path of the same name in a temporary folder, from which all files are moved at the end.

    For formats of several files that refer to each other by name, and for writers that ask for a
    certain suffix. The files are moved beside ``path``, that file last. If the block raises an
    exception, nothing is moved.
    """
    with tempfile.TemporaryDirectory(prefix=".partial-", dir=path.parent) as folder:
        partial = Path(folder, path.name)
        yield partial
        for written in sorted(Path(folder).iterdir(), key=lambda file: file == partial):
            os.replace(written, path.with_name(written.name))
