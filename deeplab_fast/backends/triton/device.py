"""Devices that run the Triton kernels, and the requirements of Triton's interpreter.

With TRITON_INTERPRET=1 in the environment when Python starts, Triton's interpreter runs the kernels
on CPU tensors instead. It is very slow, and meant for tests.
"""

from __future__ import annotations

import contextlib
import functools
import os
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from ..._native.limits import unsupported_capability
from ..registry import register_backend

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_DISTRIBUTIONS = "triton", "pytorch-triton", "pytorch-triton-rocm"
_OLDEST_TRITON = (3, 6)
_INTERPRETED = os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")


def _unavailable_reason(device_type: str) -> str | None:
    if reason := _installation_problem():
        return reason
    if device_type == "cpu":
        if not _INTERPRETED:
            return "does not run on cpu tensors: Triton's interpreter is off"
        return _interpreter_problem()
    if device_type != "cuda":
        return f"does not run on {device_type} tensors"
    return _problem()


def _installed(*names: str) -> str | None:
    """Version of the first of these distributions that is installed."""
    for name in names:
        with contextlib.suppress(PackageNotFoundError):
            return version(name)
    return None


def _is_older(found: str | None, than: tuple[int, int]) -> bool:
    return found is not None and tuple(map(int, found.split(".")[:2])) < than


@functools.cache
def _installation_problem() -> str | None:
    """Why the installed Triton cannot be used, found without importing it, which takes long."""
    if find_spec("triton") is None:
        return "Triton is not installed"
    found = _installed(*_DISTRIBUTIONS)
    if _is_older(found, _OLDEST_TRITON):
        return "needs Triton {}.{}, {} is installed".format(*_OLDEST_TRITON, found)
    return None


@functools.cache
def _interpreter_problem() -> str | None:
    """Why the interpreter cannot run; None if it can.

    The interpreter of Triton 3.6 converts arrays of one element to int, which NumPy 2.4 forbids.
    """
    triton, numpy = _installed(*_DISTRIBUTIONS), _installed("numpy")
    if _is_older(triton, (3, 7)) and not _is_older(numpy, (2, 4)):
        return f"the interpreter of Triton {triton} needs NumPy before 2.4, {numpy} is installed"
    return None


@functools.cache
def _problem() -> str | None:
    """Why Triton cannot compile for this machine's GPUs; None if it can."""
    if _INTERPRETED:
        return "TRITON_INTERPRET is set: Triton's interpreter supports CPU tensors only"
    if not torch.cuda.is_available():
        return "there is no GPU that torch can use"
    if torch.version.hip:
        return None
    return unsupported_capability()


def widened(*args: Any) -> Any:
    """``args``, with bf16 tensors in fp32 under the interpreter, which truncates to bf16."""
    if not _INTERPRETED:
        return args
    return tree_map_only(Tensor, lambda t: t.float() if t.dtype == torch.bfloat16 else t, args)


MAX_INDEX = 2**31 - 4096
"""Largest number of pixels or classes: int32 indices of the last block may run past it."""

_MODULES = (
    "aspp",
    "dilated_conv2d",
    "dilated_conv2d_backward",
    "fused_conv2d",
    "upsample_argmax",
    "upsample_cross_entropy",
)


def _load() -> None:
    """Import the kernels and therefore Triton, which takes long."""
    if _installation_problem() is None:
        for name in _MODULES:
            import_module(f"{__package__}.{name}")


register_backend("triton", _unavailable_reason, load=_load)
