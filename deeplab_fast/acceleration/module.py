"""Modules whose class was replaced by a subclass, so that everything but ``forward`` stays."""

from __future__ import annotations

import functools
from typing import Any

from torch import nn


class Accelerated(nn.Module):
    """First base class of a replaced class. The second one is the original class."""

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        replacement, original = type(self).__bases__
        return _new, (replacement, original), vars(self)


@functools.cache
def _accelerated_class(replacement: type[Accelerated], original: type) -> type[Accelerated]:
    return type(f"Accelerated{original.__name__}", (replacement, original), {})


def _new(replacement: type[Accelerated], original: type) -> Accelerated:
    cls = _accelerated_class(replacement, original)  # type: ignore[arg-type]
    return cls.__new__(cls)


def replace(module: nn.Module, replacement: type[Accelerated]) -> None:
    """Run ``forward`` of ``replacement`` in ``module``, in place."""
    module.__class__ = _accelerated_class(replacement, type(module))  # type: ignore[arg-type]


def restore(module: nn.Module) -> None:
    """Undo :func:`replace`."""
    if isinstance(module, Accelerated):
        module.__class__ = type(module).__bases__[1]
