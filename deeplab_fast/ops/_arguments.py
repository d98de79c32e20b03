"""Conversion of the arguments of public functions. Types that PyTorch rejects raise TypeError.

Numbers of NumPy are accepted. A torch.SymInt, a size that torch.compile and torch.export leave
symbolic, is passed on: operator.index() would make a constant of it.
"""

from __future__ import annotations

import numbers
import operator
from collections.abc import Callable, Iterable, Sequence, Sized
from typing import Any

import numpy as np
import torch
from torch import Tensor

INT64_MAX = 2**63 - 1
INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


def wrong_type(name: str, expected: str, value: Any) -> TypeError:
    """The error for an argument. It quotes short values and names the type of others."""
    is_short = value is None or isinstance(value, (str, numbers.Number, torch.dtype))
    got = repr(value) if is_short else f"a {type(value).__name__}"
    return TypeError(f"{name}: expected {expected}, got {got}")


def check_tensor(value: Any, name: str) -> None:
    if not isinstance(value, Tensor):
        raise wrong_type(name, "a tensor", value)


def check_logits(logits: Tensor) -> None:
    check_tensor(logits, "logits")
    if logits.dim() != 4 or 0 in logits.shape[1:]:
        raise ValueError(
            f"logits: expected [N, C, H, W] with C, H, W >= 1, got shape {tuple(logits.shape)}"
        )
    if not logits.is_floating_point():
        raise TypeError(f"logits: expected a floating dtype, got {logits.dtype}")


def tensor_list(values: Any, name: str) -> list[Tensor]:
    tensors = _list(values, name, "tensors")
    for i, tensor in enumerate(tensors):
        if not isinstance(tensor, Tensor):
            raise wrong_type(f"{name}[{i}]", "a tensor", tensor)
    return tensors


def int_list(values: Any, name: str) -> list[int]:
    ints = _list(values, name, "ints")
    return [v if type(v) is int else integer(v, f"{name}[{i}]") for i, v in enumerate(ints)]


def _list(values: Any, name: str, elements: str) -> list[Any]:
    if isinstance(values, (list, tuple)):
        return list(values)
    # list() would split a tensor along its first dimension. nn.ParameterList is not a Sequence.
    is_list = isinstance(values, Iterable) and isinstance(values, Sized)
    if not is_list or isinstance(values, (Tensor, str)):
        raise wrong_type(name, f"a list of {elements}", values)
    return list(values)


def integer(value: Any, name: str) -> int:
    if isinstance(value, (int, torch.SymInt)) and not isinstance(value, bool):
        return value  # type: ignore[return-value]
    try:
        if isinstance(value, bool):
            raise TypeError
        return operator.index(value)
    except TypeError:
        raise wrong_type(name, "an int", value) from None


def real(value: Any, name: str) -> float:
    if isinstance(value, (float, int, torch.SymFloat, torch.SymInt)):
        return value  # type: ignore[return-value]
    is_scalar = isinstance(value, Tensor) and value.dim() == 0 and not value.is_complex()
    if isinstance(value, numbers.Real) or is_scalar:
        return float(value)
    raise wrong_type(name, "a number", value)


def boolean(value: Any, name: str) -> bool:
    if isinstance(value, bool):
        return value
    if isinstance(value, np.bool_):
        return bool(value)
    raise wrong_type(name, "True or False", value)


def positive_pair(
    value: Any, name: str, element: Callable[[Any, str], Any], kind: str = "number"
) -> tuple[Any, Any]:
    """Two positive numbers converted by ``element``: ``value`` holds both, or is both."""
    is_sequence = isinstance(value, (tuple, Sequence)) and not isinstance(value, str)
    values = [element(v, name) for v in (value if is_sequence else (value, value))]
    if len(values) != 2 or not 0 < values[0] <= INT64_MAX or not 0 < values[1] <= INT64_MAX:
        raise ValueError(f"{name}: expected a positive {kind} or two of them, got {value!r}")
    return values[0], values[1]
