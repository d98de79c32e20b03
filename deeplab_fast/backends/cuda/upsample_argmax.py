"""Bilinear upsampling and argmax."""

from __future__ import annotations

from torch import Tensor

from ..._native.common import DTYPES, LaunchContext
from ..._native.upsample_shape import upsample_shape
from ..arguments import UpsampleArgmax
from ..registry import register_kernel


@register_kernel("upsample_argmax", "cuda")
def upsample_argmax(context: LaunchContext, arguments: UpsampleArgmax) -> Tensor:
    logits, size, scale_factors, align_corners, dtype = arguments
    if logits.dtype not in DTYPES:
        logits = logits.float()
    labels = logits.new_empty((logits.size(0), *size), dtype=dtype)
    context.module.upsample_argmax_fwd(
        labels.data_ptr(),
        logits.data_ptr(),
        upsample_shape(logits, size, scale_factors, align_corners),
        DTYPES[dtype],
        DTYPES[logits.dtype],
        context.stream,
    )
    return labels
