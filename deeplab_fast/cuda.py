"""The ``cuda`` backend: hand-written kernels in ``_C.cuda``, on torch's current stream."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from . import _C
from ._native import DTYPES, upsample_shape
from .backends import availability, implements

_OLDEST_CAPABILITY = (8, 0)


@availability("cuda")
def _unavailable(device_type: str) -> str | None:
    return _problem() if device_type == "cuda" else f"the tensors are on {device_type}"


@functools.cache
def _problem() -> str | None:
    """Why the compiled kernels cannot run on this machine's GPUs; None if they can."""
    if not hasattr(_C, "cuda"):
        return "this installation was built without a CUDA compiler"
    if not torch.cuda.is_available():
        return "there is no GPU that torch can use"
    info = _C.cuda.device_info()
    if info["driver_version"] < info["runtime_version"]:
        return (
            f"built with CUDA {_version(info['runtime_version'])}, which this machine's driver "
            f"(for CUDA {_version(info['driver_version'])}) is too old for"
        )
    oldest = min(torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count()))
    if oldest < _OLDEST_CAPABILITY:
        return "needs compute capability {}.{}, a GPU here has {}.{}".format(
            *_OLDEST_CAPABILITY, *oldest
        )
    return None


def _version(number: int) -> str:
    return f"{number // 1000}.{number % 1000 // 10}"


@implements("upsample_argmax", "cuda")
def upsample_argmax(
    logits: Tensor,
    size: Sequence[int],
    scale_factors: Sequence[float] | None,
    align_corners: bool,
    dtype: torch.dtype,
) -> Tensor:
    if logits.dtype not in DTYPES:
        logits = logits.float()
    labels = logits.new_empty((logits.size(0), *size), dtype=dtype)
    with torch.cuda.device(logits.device):
        _C.cuda.upsample_argmax_fwd(
            labels.data_ptr(),
            logits.data_ptr(),
            upsample_shape(logits, size, scale_factors, align_corners),
            DTYPES[dtype],
            DTYPES[logits.dtype],
            torch.cuda.current_stream().cuda_stream,
        )
    return labels
