"""Geometry of bilinear upsampling, as a struct of the compiled code."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch import Tensor

from . import _C


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


def source_scale(
    in_size: int, out_size: int, scale_factor: float | None, align_corners: bool
) -> float:
    """Source pixels per output pixel in fp32, PyTorch's ``area_pixel_compute_scale<float>``."""
    if align_corners:
        return float(np.float32(in_size - 1) / np.float32(out_size - 1)) if out_size > 1 else 0.0
    if scale_factor is not None:
        return float(np.float32(1.0 / scale_factor))
    return float(np.float32(in_size) / np.float32(out_size))
