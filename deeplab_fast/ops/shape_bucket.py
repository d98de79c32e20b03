"""What decides how fast a convolution is, for the table of measured kernels."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

_GRADIENTS = ("input", "weight", "bias")


def tf32_is_allowed() -> bool:
    """Torch's switch for convolutions. ``allow_tf32`` raises once the newer one was used."""
    conv = getattr(torch.backends.cudnn, "conv", None)
    return torch.backends.cudnn.allow_tf32 if conv is None else conv.fp32_precision == "tf32"


def shape_class(
    input: Tensor,
    weights: Sequence[Tensor],
    dilations: Sequence[Sequence[int]],
    groups: int = 1,
    output_mask: Sequence[bool] = (),
) -> str:
    """The class of shapes in which one measured shape speaks for the others.

    Precision; memory format of the input; channels, kernels and groups; how much of what a dense
    library multiplies lies inside the map, in eighths, rounded up: the rates relative to the map;
    pixels of all images, as the power of two below; for a backward op the gradients asked for.
    Channels are exact because networks share them, pixels are not because images differ.

    >>> shape_class(x, weights, [(1, 1), (12, 12), (24, 24), (36, 36)])
    'bf16 channels_last 2048->1024 1x1,3x3,3x3,3x3 inside 5/8 pixels 2^15'
    """
    kernels = tuple(weight.shape for weight in weights)
    rates = tuple((vertical, horizontal) for vertical, horizontal in dilations)
    in_format = "channels_last" if input.stride(1) == 1 else "NCHW"
    shapes = _class_of_shapes(in_format, input.shape, kernels, rates, groups, tuple(output_mask))
    return f"{_precision(input.dtype)} {shapes}"


@functools.lru_cache(maxsize=4096)  # each call of an op asks
def _class_of_shapes(
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
        *(f"d{name}" for name, asked in zip(_GRADIENTS, output_mask) if asked),
    ])  # fmt: skip


def _taps_inside(size: int, kernel: int, rate: int) -> int:
    """In one dimension, over all pixels."""
    return sum(max(0, size - abs(tap - kernel // 2) * rate) for tap in range(kernel))


def _precision(dtype: torch.dtype) -> str:
    if dtype == torch.float32:
        return "tf32" if tf32_is_allowed() else "fp32"
    return {torch.bfloat16: "bf16", torch.float16: "fp16"}.get(dtype, str(dtype))
