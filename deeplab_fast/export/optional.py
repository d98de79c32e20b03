"""Imports of optional packages."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator


@contextlib.contextmanager
def needs(extra: str, name: str) -> Iterator[None]:
    """Turn an ImportError into one that says which extra to install.

    Raises:
        ImportError: the block raised one.
    """
    try:
        yield
    except ImportError as error:
        raise ImportError(
            f'{name} is not installed (pip install "deeplab-fast[{extra}]")'
        ) from error


@contextlib.contextmanager
def not_installed(*names: str) -> Iterator[None]:
    """Let imports of these modules fail in the block, as if they were not installed.

    A module that is already imported stays: it is the caller's.
    """
    hidden = [name for name in names if name not in sys.modules]
    sys.modules.update(dict.fromkeys(hidden))  # type: ignore[arg-type]
    try:
        yield
    finally:
        for name in hidden:
            if sys.modules.get(name, name) is None:
                del sys.modules[name]
