"""Sizes of bilinear upsampling, shared by upsample_argmax and upsample_cross_entropy."""

from __future__ import annotations

import math

from torch import Tensor

from ._arguments import check_tensor


def check_logits(logits: Tensor) -> None:
    check_tensor(logits, "logits")
    if logits.dim() != 4 or 0 in logits.shape[1:]:
        raise ValueError(
            f"logits: expected [N, C, H, W] with C, H, W >= 1, got shape {tuple(logits.shape)}"
        )
    if not logits.is_floating_point():
        raise TypeError(f"logits: expected a floating dtype, got {logits.dtype}")


def output_size(logits: Tensor, scale_factors: tuple[float, float]) -> tuple[int, int]:
    """Size of the output: floor(in * scale), as F.interpolate computes it.

    Raises:
        ValueError: a side would be 0 pixels.
    """
    height, width = (math.floor(n * s) for n, s in zip(logits.shape[2:], scale_factors))
    if height < 1 or width < 1:
        raise ValueError(
            f"scale_factor {scale_factors} makes the output {height}x{width} from "
            f"{tuple(logits.shape[2:])}: expected at least 1x1"
        )
    return height, width
