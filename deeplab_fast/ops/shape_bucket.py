"""Shape buckets: groups of shapes that share their measurements in the dispatch table."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from .._native.precision import tf32_is_allowed

_GRADIENTS = ("input", "weight", "bias")


def shape_bucket(
    input: Tensor,
    weights: Sequence[Tensor],
    dilations: Sequence[Sequence[int]],
    groups: int = 1,
    output_mask: Sequence[bool] = (),
) -> str:
    """The shape bucket of parallel convolutions over one input, or of their backward.

    All shapes of a bucket have the same precision, memory format of the input, numbers of input and
    output channels, kernel sizes and groups. Two numbers are rounded: the fraction of a dense
    library's multiplications that lies inside the map, which depends on the dilations relative to
    the map, up to eighths; and the number of pixels in all images, down to a power of two. A
    backward op has a bucket for each set of gradients. Channels are exact because networks have
    them in common; pixels are rounded because the sizes of images vary.

    >>> shape_bucket(x, weights, [(1, 1), (12, 12), (24, 24), (36, 36)])
    'bf16 channels_last 2048->1024 1x1,3x3,3x3,3x3 inside 5/8 pixels 2^15'
    """
    kernels = tuple(weight.shape for weight in weights)
    pairs = tuple((vertical, horizontal) for vertical, horizontal in dilations)
    in_format = "channels_last" if input.stride(1) == 1 else "NCHW"
    shapes = _bucket_of_shapes(in_format, input.shape, kernels, pairs, groups, tuple(output_mask))
    return f"{_precision(input.dtype)} {shapes}"


@functools.lru_cache(maxsize=4096)  # every call needs it
def _bucket_of_shapes(
    in_format: str,
    input: tuple[int, ...],
    kernels: tuple[tuple[int, ...], ...],
    dilations: tuple[tuple[int, int], ...],
    groups: int,
    output_mask: tuple[bool, ...],
) -> str:
    N, C, H, W = input
    dense = inside = 0
    for (K, _, R, S), (vertical, horizontal) in zip(kernels, dilations):
        dense += K * R * H * S * W
        inside += K * _taps_inside(H, R, vertical) * _taps_inside(W, S, horizontal)
    return " ".join([
        in_format,
        f"{C}->{sum(K for K, _, _, _ in kernels)}",
        ",".join(f"{R}x{S}" for _, _, R, S in kernels),
        *([f"groups {groups}"] if groups > 1 else []),
        f"inside {-(-8 * inside // max(1, dense))}/8",
        f"pixels 2^{max(1, N * H * W).bit_length() - 1}",
        *(f"d{name}" for name, wanted in zip(_GRADIENTS, output_mask) if wanted),
    ])  # fmt: skip


def _taps_inside(size: int, kernel: int, dilation: int) -> int:
    """Number of (pixel, tap) pairs that lie inside the map, along one dimension."""
    return sum(max(0, size - abs(tap - kernel // 2) * dilation) for tap in range(kernel))


def _precision(dtype: torch.dtype) -> str:
    if dtype == torch.float32:
        return "tf32" if tf32_is_allowed() else "fp32"
    return {torch.bfloat16: "bf16", torch.float16: "fp16"}.get(dtype, str(dtype))
