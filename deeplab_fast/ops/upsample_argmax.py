"""Bilinear upsampling fused with argmax: labels without full-resolution logits."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..backends import registry
from ..backends.arguments import UpsampleArgmax
from ._arguments import boolean, check_logits, integer, positive_pair, real, wrong_type
from ._register import define, without_gradient

_MAX_CLASSES = {torch.uint8: 256, torch.int32: 2**31, torch.int64: 2**63}


def upsample_argmax(
    logits: Tensor,
    size: int | tuple[int, int] | None = None,
    scale_factor: float | tuple[float, float] | None = None,
    align_corners: bool = False,
    dtype: torch.dtype = torch.int64,
) -> Tensor:
    """The class of every pixel after bilinear upsampling, without the upsampled logits.

    Equals ``F.interpolate(logits.float(), size, scale_factor, mode="bilinear",
    align_corners=align_corners).argmax(1)``. Half dtypes are interpolated in fp32 too, ties go to
    the lowest class, and the first NaN wins. All backends of this library agree bit for bit, except
    ``reference``, which rounds as PyTorch's interpolation does on that device. Its label can differ
    where the logits of two classes differ by only a few ulp.

    Args:
        logits: [N, C, H, W], floating, any memory format.
        size: output (height, width), or one int for both. Exactly one of ``size`` and
            ``scale_factor`` is given.
        scale_factor: sets the output size to ``floor(input * scale_factor)``; the interpolation
            uses the factor itself, as F.interpolate does.
        align_corners: as in F.interpolate.
        dtype: dtype of the labels, torch.int64, torch.int32 or torch.uint8 (at most 256 classes).

    Returns:
        [N, height, width] labels, contiguous. Not differentiable.

    Raises:
        ValueError: logits are not [N, C, H, W], the size is not positive, or dtype cannot hold C.
        TypeError: logits are not floating, or another argument is of a wrong type.

    >>> logits = torch.randn(1, 21, 65, 65)
    >>> labels = upsample_argmax(logits, size=(513, 513), dtype=torch.uint8)
    """
    check_logits(logits)
    if (size is None) == (scale_factor is None):
        given = "neither" if size is None else "both"
        raise ValueError(f"size and scale_factor: expected exactly one, got {given}")
    if not isinstance(dtype, torch.dtype):
        raise wrong_type("dtype", "a torch.dtype", dtype)
    if dtype not in _MAX_CLASSES:
        raise ValueError(f"dtype: expected torch.int64, torch.int32 or torch.uint8, got {dtype}")
    if logits.size(1) > _MAX_CLASSES[dtype]:
        raise ValueError(f"dtype: expected one that holds {logits.size(1)} classes, got {dtype}")
    align_corners = boolean(align_corners, "align_corners")
    factors = None
    if scale_factor is None:
        out = positive_pair(size, "size", integer)
    else:
        factors = positive_pair(scale_factor, "scale_factor", real)
        out = _output_size(logits, factors)
    return upsample_argmax_op(
        logits, out, factors, align_corners, dtype, backend=registry.current()
    )


def _output_size(logits: Tensor, scale_factors: tuple[float, float]) -> tuple[int, int]:
    """floor(in * scale), like F.interpolate."""
    height, width = (math.floor(n * s) for n, s in zip(logits.shape[2:], scale_factors))
    if height < 1 or width < 1:
        raise ValueError(
            f"scale_factor: expected an output of at least 1x1, got {height}x{width} for logits of "
            f"{logits.size(2)}x{logits.size(3)} and {scale_factors}"
        )
    return height, width


def _fake(arguments: UpsampleArgmax) -> Tensor:
    logits = arguments.logits
    return logits.new_empty((logits.size(0), *arguments.size), dtype=arguments.dtype)


upsample_argmax_op = define(
    "upsample_argmax",
    UpsampleArgmax,
    "(Tensor logits, SymInt[] size, float[]? scale_factors, bool align_corners, ScalarType dtype) "
    "-> Tensor",
    _fake,
)
without_gradient("upsample_argmax", lambda *args: (0,))
