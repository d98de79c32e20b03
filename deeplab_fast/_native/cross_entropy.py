"""Parameters and targets of the cross entropy."""

from __future__ import annotations

from torch import Tensor

from . import _C


def bad_target(value: int, classes: int, ignore_index: int) -> IndexError:
    """The error for a target that is neither a class nor ``ignore_index``."""
    return IndexError(
        f"target: {value} is not a class: expected 0 to {classes - 1}, or ignore_index "
        f"({ignore_index})"
    )


def cross_entropy_params(
    weight: Tensor | None, ignore_index: int, label_smoothing: float
) -> _C.CrossEntropyParams:
    """Parameters of the compiled code. The caller keeps ``weight``, contiguous fp32, alive."""
    return _C.CrossEntropyParams(
        0 if weight is None else weight.data_ptr(), ignore_index, label_smoothing
    )
