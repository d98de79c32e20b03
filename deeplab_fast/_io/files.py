"""Files that appear whole or not at all."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Where to write what takes the place of ``path`` at the end of the block.

    Whatever the block raises, ``path`` stays as it was.

    >>> with replacing(Path("labels.png")) as partial:
    ...     image.save(partial, format="PNG")
    """
    # Of a name as long as the file system allows only the beginning.
    partial = path.with_name(f".{path.name[:50]}.{os.getpid()}.partial")
    try:
        yield partial
        os.replace(partial, path)
    finally:
        with contextlib.suppress(OSError):  # of a disk that is gone; the failure to write says so
            partial.unlink(missing_ok=True)
