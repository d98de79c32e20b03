"""Limits that kernels of several backends share."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

# The search for the order of a work list takes time proportional to the square of the taps.
MAX_TAPS = 1024

_OLDEST_CAPABILITY = (8, 0)


def unsupported_capability() -> str | None:
    """Why the kernels cannot run on all of this machine's NVIDIA GPUs; None if they can."""
    oldest = min(torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count()))
    if oldest < _OLDEST_CAPABILITY:
        return "needs compute capability {}.{}, a GPU here has {}.{}".format(
            *_OLDEST_CAPABILITY, *oldest
        )
    return None


def unsupported_operands(input: Tensor, weights: Sequence[Tensor]) -> str | None:
    """Why no convolution kernel can read these tensors; None if one can."""
    if input.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"the kernel supports float32, float16 and bfloat16, got {input.dtype}"
    if input.numel() == 0 or any(weight.numel() == 0 for weight in weights):
        return "the input or a weight is empty"
    return None


def unsupported_geometry(
    weight: Tensor, stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]
) -> str | None:
    """Why a kernel of ``dilated_conv2d``, which keeps the size of the map, cannot run."""
    kernel = tuple(weight.shape[2:])
    if tuple(stride) != (1, 1):
        return f"the kernel supports stride (1, 1), got {tuple(stride)}"
    if any(
        size % 2 == 0 or 2 * p != (size - 1) * d for size, p, d in zip(kernel, padding, dilation)
    ):
        return (
            "the kernel supports padding to the same size, got a "
            f"{kernel} weight padded by {tuple(padding)}"
        )
    return None
