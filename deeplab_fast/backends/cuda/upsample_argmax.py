"""Bilinear upsampling and argmax over the classes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..._native.common import DTYPES, Kernels
from ..._native.upsample_shape import upsample_shape


def forward(
    kernels: Kernels,
    logits: Tensor,
    size: Sequence[int],
    scale_factors: Sequence[float] | None,
    align_corners: bool,
    dtype: torch.dtype,
) -> Tensor:
    if logits.dtype not in DTYPES:
        logits = logits.float()
    labels = logits.new_empty((logits.size(0), *size), dtype=dtype)
    kernels.module.upsample_argmax_fwd(
        labels.data_ptr(),
        logits.data_ptr(),
        upsample_shape(logits, size, scale_factors, align_corners),
        DTYPES[dtype],
        DTYPES[logits.dtype],
        kernels.stream,
    )
    return labels
