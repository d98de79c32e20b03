"""Bilinear interpolation in the canonical arithmetic of csrc/common/bilinear.h, in numpy.

An independent restatement: fp32 multiply-adds rounded once, here from float64 rounded to odd.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Floats = NDArray[np.float32]


def fma(a: Floats, b: Floats, c: Floats) -> Floats:
    """a * b + c in fp32 with a single rounding.

    The product is exact in float64. The sum is rounded there to odd: if inexact, the last bit is
    set. With so many spare bits the rounding to fp32 then gives the correctly rounded result
    (Boldo and Melquiond, "Emulation of a FMA and correctly rounded sums", 2008).
    """
    with np.errstate(invalid="ignore", over="ignore"):
        product, addend = np.asarray(a, np.float64) * b, np.asarray(c, np.float64)
        total = product + addend
        virtual = total - product  # Knuth's two-sum
        error = (product - (total - virtual)) + (addend - virtual)
        even = np.asarray(total).view(np.int64) % 2 == 0
        inexact = np.isfinite(total) & (error != 0) & even
        odd = np.nextafter(total, np.where(error > 0, np.inf, -np.inf))
        return np.where(inexact, odd, total).astype(np.float32)


def source_pairs(
    out_size: int, size: int, scale: float, align_corners: bool
) -> tuple[NDArray[np.int64], NDArray[np.int64], Floats, Floats]:
    """lo, hi, w0, w1 of every output coordinate."""
    dst, scales = np.arange(out_size, dtype=np.float32), np.float32(scale)
    if align_corners:
        source = scales * dst
    else:
        source = np.maximum(fma(scales, dst + np.float32(0.5), np.float32(-0.5)), np.float32(0))
    lo = np.minimum(source.astype(np.int64), size - 1)
    w1 = source - lo.astype(np.float32)
    return lo, np.minimum(lo + 1, size - 1), np.float32(1) - w1, w1


def upsample(
    logits: Tensor, size: tuple[int, int], scales: tuple[float, float], align_corners: bool
) -> Tensor:
    """[N, C, *size] in fp32. ``scales``: source pixels per output pixel."""
    image = logits.detach().cpu().float().numpy()
    y0, y1, h0, h1 = source_pairs(size[0], image.shape[2], scales[0], align_corners)
    x0, x1, w0, w1 = source_pairs(size[1], image.shape[3], scales[1], align_corners)
    with np.errstate(invalid="ignore", over="ignore"):
        columns = fma(image[..., x0], w0, image[..., x1] * w1)
        rows = fma(columns[:, :, y0], h0[:, None], columns[:, :, y1] * h1[:, None])
    return torch.from_numpy(rows)
