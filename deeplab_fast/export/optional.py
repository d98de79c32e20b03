"""Imports of optional packages."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator


@contextlib.contextmanager
def needs(package: str, *, extra: str) -> Iterator[None]:
    """Add to an ImportError of the block which extra to install.

    Raises:
        ImportError: the block raised one.
    """
    try:
        yield
    except ImportError as error:
        raise ImportError(
            f'{package} cannot be imported: {error} (expected pip install "deeplab-fast[{extra}]")'
        ) from error


@contextlib.contextmanager
def not_installed(module: str) -> Iterator[None]:
    """Let the import of ``module`` fail in the block, as if it were not installed.

    If it is imported already, nothing changes.
    """
    if module in sys.modules:
        yield
        return
    sys.modules[module] = None  # type: ignore[assignment]  # import statements then fail
    try:
        yield
    finally:
        del sys.modules[module]
