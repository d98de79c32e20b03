"""The geometry of bilinear upsampling as the compiled code takes it."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from .. import _C
from ..ops._bilinear import source_scale


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
