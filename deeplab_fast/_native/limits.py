"""Limits that kernels of several backends share."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

# The search for the order of a work list takes time proportional to the square of the taps.
MAX_TAPS = 1024


def unsupported_geometry(
    weight: Tensor, stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]
) -> str | None:
    """Why a kernel of ``dilated_conv2d``, whose output is as large as its input, cannot run."""
    kernel = tuple(weight.shape[2:])
    if tuple(stride) != (1, 1):
        return f"the kernel has stride (1, 1), not {tuple(stride)}"
    if any(
        size % 2 == 0 or 2 * p != (size - 1) * d for size, p, d in zip(kernel, padding, dilation)
    ):
        return f"the kernel pads to the same size, not a {kernel} weight by {tuple(padding)}"
    return None
