"""What the Python sides of the compiled backends share: dtypes, shapes, calls of launchers."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from . import _C
from .ops._bilinear import source_scale

DTYPES = {
    torch.float32: _C.DType.float32,
    torch.float16: _C.DType.float16,
    torch.bfloat16: _C.DType.bfloat16,
    torch.int64: _C.DType.int64,
    torch.int32: _C.DType.int32,
    torch.uint8: _C.DType.uint8,
}


def upsample_shape(
    logits: Tensor,
    size: Sequence[int],
    scale_factors: Sequence[float] | None,
    align_corners: bool,
) -> _C.UpsampleShape:
    scales = [
        source_scale(in_size, out_size, factor, align_corners)
        for in_size, out_size, factor in zip(logits.shape[2:], size, scale_factors or (None, None))
    ]
    return _C.UpsampleShape(logits.shape, logits.stride(), size, scales, align_corners)


def upsample_argmax(
    launcher: Callable[..., None],
    stream: int,
    logits: Tensor,
    size: Sequence[int],
    scale_factors: Sequence[float] | None,
    align_corners: bool,
    dtype: torch.dtype,
) -> Tensor:
    """The op through ``upsample_argmax_fwd`` of a module compiled from the CUDA kernels."""
    if logits.dtype not in DTYPES:
        logits = logits.float()
    labels = logits.new_empty((logits.size(0), *size), dtype=dtype)
    launcher(
        labels.data_ptr(),
        logits.data_ptr(),
        upsample_shape(logits, size, scale_factors, align_corners),
        DTYPES[dtype],
        DTYPES[logits.dtype],
        stream,
    )
    return labels
