"""Limits that kernels of several backends share."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

# The search for the order of a work list takes time proportional to the square of the taps.
MAX_TAPS = 1024


def unsupported_geometry(
    weight: Tensor, stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]
) -> str | None:
    """Why the kernels of ``dilated_conv2d`` cannot compute a convolution; None if they can.

    They have stride 1 and an output of the size of the input.
    """
    kernel = tuple(weight.shape[2:])
    if tuple(stride) != (1, 1):
        return f"the kernel takes stride (1, 1) only, got {tuple(stride)}"
    if any(
        size % 2 == 0 or 2 * p != (size - 1) * d for size, p, d in zip(kernel, padding, dilation)
    ):
        return (
            f'the kernel takes odd sizes and "same" padding only, got a {kernel} weight with '
            f"padding {tuple(padding)}"
        )
    return None
