"""Device and dtype to compute in, and out-of-memory errors."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

from .errors import UserError, reason


def add_device(parser: Any) -> None:
    parser.add_argument("--device", help="cpu, cuda, cuda:1 ... (default: cuda if there is one)")


_DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


def add_dtype(parser: Any, default: str | None, default_help: str) -> None:
    parser.add_argument(
        "--dtype",
        type=lambda name: _DTYPES.get(name, name),
        choices=tuple(_DTYPES.values()),
        default=default,
        help="dtype that the network computes in, or its short name fp32, bf16 or fp16 (default: "
        f"{default_help})",
    )


def find_device(name: str | None) -> torch.device:
    """The device with this name, or by default a GPU if there is one.

    Raises:
        UserError: there is no such device.
    """
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:  # whose message lists all kinds of devices
        raise _no_device(name, "no such device") from error
    try:
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError) as error:
        raise _no_device(name, reason(error).split(". ")[0]) from error
    return device


def _no_device(name: str, why: str) -> UserError:
    gpus = [f"cuda:{index}" for index in range(torch.cuda.device_count())]
    return UserError(f"--device {name}: {why} (expected one of {', '.join(['cpu', *gpus])})")


@contextlib.contextmanager
def out_of_memory(expected: str) -> Iterator[None]:
    """Turn an out-of-memory error in the block into a UserError with a suggestion."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        # PyTorch's CPU allocator raises a plain RuntimeError.
        kinds = (MemoryError, torch.OutOfMemoryError)
        if isinstance(error, kinds) or "can't allocate memory" in str(error):
            raise UserError(f"not enough memory (expected {expected})") from error
        raise
