"""Bilinear upsampling fused with argmax: labels without full-resolution logits."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..backends import registry
from ..backends.arguments import UpsampleArgmax
from ._arguments import boolean, check_logits, integer, positive_pair, real, wrong_type
from ._register import define, lib, without_gradient

# While torch.jit.trace runs, these numbers are compared with tensors, which hold no 2**63.
_MAX_CLASSES = {torch.uint8: 256, torch.int32: 2**31, torch.int64: 2**63 - 1}


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
        out = positive_pair(size, "size", _side)
    else:
        factors = positive_pair(scale_factor, "scale_factor", real)
        out = _output_size(logits, factors)
    options = factors, align_corners, dtype
    if isinstance(out[0], Tensor) or isinstance(out[1], Tensor):
        sides = torch.stack([torch.as_tensor(side) for side in out])
        labels: Tensor = _traced_op(logits, sides, *options, backend=registry.current())
        return labels
    return upsample_argmax_op(logits, out, *options, backend=registry.current())


def _side(value: Any, name: str) -> Any:
    """An int; or a tensor of one, if torch.jit.trace has to see where it comes from."""
    is_traced = isinstance(value, Tensor) and torch.jit.is_tracing()
    return value if is_traced else integer(value, name)


def _output_size(logits: Tensor, scale_factors: tuple[float, float]) -> tuple[int, int]:
    """floor(in * scale), like F.interpolate."""
    height, width = (
        (n.double() * s).floor().long() if isinstance(n, Tensor) else math.floor(n * s)
        for n, s in zip(logits.shape[2:], scale_factors)
    )
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

# An int[] of a custom op is a constant of torch.jit.trace. The trace of this op has the size as a
# tensor, so that it runs with images of other sizes.
lib.define(
    "upsample_argmax_traced(Tensor logits, Tensor size, float[]? scale_factors, "
    "bool align_corners, ScalarType dtype, *, str backend='') -> Tensor"
)


def _traced(logits: Tensor, size: Tensor, *options: Any, backend: str = "") -> Tensor:
    return upsample_argmax_op(logits, size.tolist(), *options, backend=backend)


lib.impl("upsample_argmax_traced", _traced, "CompositeExplicitAutograd")
_traced_op = torch.ops.deeplab_fast.upsample_argmax_traced
