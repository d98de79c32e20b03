"""Bilinear upsampling and argmax."""

from __future__ import annotations

from torch import Tensor

from ..._native.common import DTYPES, LaunchContext
from ..._native.upsample_shape import upsample_shape
from ..arguments import UpsampleArgmax
from ..registry import register_planned_kernel
from .device import Call


@register_planned_kernel("upsample_argmax", "cuda")
def upsample_argmax(context: LaunchContext, arguments: UpsampleArgmax) -> Call:
    logits, size, scale_factors, align_corners, dtype = arguments
    is_supported = logits.dtype in DTYPES
    if not is_supported:
        logits = logits.float()
    launch = context.module.upsample_argmax_fwd
    shape = upsample_shape(logits, size, scale_factors, align_corners)
    dtypes = DTYPES[dtype], DTYPES[logits.dtype]
    labels_shape = (logits.size(0), *size)

    def label(stream: int, arguments: UpsampleArgmax) -> Tensor:
        logits = arguments.logits if is_supported else arguments.logits.float()
        labels = logits.new_empty(labels_shape, dtype=dtype)
        launch(labels.data_ptr(), logits.data_ptr(), shape, *dtypes, stream)
        return labels

    return label
