"""Depthwise convolution through ``depthwise_conv2d`` of a module compiled from the CUDA kernels."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import _C, reference
from ._native import DTYPES
from .ops._library import in_format_of

RANGES = {"none": (-math.inf, math.inf), "relu": (0.0, math.inf), "relu6": (0.0, 6.0)}
"""What the activations of ``fused_conv2d`` clamp to."""

_MAX_PIXELS = 2**28
_STRIP_ROWS = (16, 8)  # longer ones read fewer rows twice and load weights less often
_ELEMENTS_PER_ROW = 2**18  # with fewer for a strip's row, few blocks are left: shorter strips


def is_depthwise(input: Tensor, weight: Tensor, groups: int) -> bool:
    """Whether a convolution is this file's, of one that is dense as well if it has one channel."""
    return groups == input.size(1) and (groups > 1 or weight.size(0) == 1)


def refuses(input: Tensor, weight: Tensor) -> str | None:
    """Why the kernel cannot compute a depthwise convolution, or None."""
    if input.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"the kernel takes float32, float16 and bfloat16, not {input.dtype}"
    if weight.size(0) != input.size(1):
        return (
            f"the depthwise kernel has one output channel for each of input, got {weight.size(0)} "
            f"for {input.size(1)}"
        )
    if input.numel() == 0 or weight.numel() == 0:
        return "the input or a weight is empty"
    if weight.size(2) * weight.size(3) > _C.MAX_DEPTHWISE_TAPS:
        return f"the depthwise kernel takes at most {_C.MAX_DEPTHWISE_TAPS} taps"
    if input.numel() // input.size(1) >= _MAX_PIXELS:
        return f"the depthwise kernel takes fewer than {_MAX_PIXELS} pixels"
    return None


def fused_refuses(
    input: Tensor,
    weight: Tensor,
    bias: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    activation: str,
) -> str | None:
    """Why the kernel cannot compute this ``fused_conv2d``, or None."""
    if not is_depthwise(input, weight, groups):
        return f"the kernel is for depthwise convolution, got {groups} groups"
    if tuple(stride) != (1, 1):
        return f"the kernel has stride 1, got {tuple(stride)}"
    odd = weight.size(2) % 2 == weight.size(3) % 2 == 1
    if not odd or tuple(padding) != reference.same_padding(weight, dilation):
        return "the kernel has an odd size and the padding that keeps the size"
    return refuses(input, weight)


def add_refuses(residual: Tensor, input: Tensor, *args: Any) -> str | None:
    """Why the kernel cannot compute this ``fused_conv2d_add_``, or None."""
    if residual.untyped_storage().data_ptr() == input.untyped_storage().data_ptr():
        return "the kernel cannot write over its input"
    return fused_refuses(input, *args)


def _shape(input: Tensor, weight: Tensor, dilation: Sequence[int], mirrored: bool) -> Any:
    N, C, H, W = input.shape
    # A rate beyond the map does what the map's size does.
    rates = min(dilation[0], H), min(dilation[1], W)
    strip_rows = next(
        (rows for rows in _STRIP_ROWS if input.numel() >= rows * _ELEMENTS_PER_ROW), 4
    )
    return _C.DepthwiseShape((N, H, W, C), weight.shape[2:], rates, strip_rows, mirrored)


def forward(
    launcher: Callable[..., None],
    stream: int,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    dilation: Sequence[int],
    residual: Tensor | None = None,
    activation: str = "none",
    mirrored: bool = False,
) -> Tensor:
    """``activation(conv2d(input, weight, bias) + residual)``, over ``residual`` where it can be.

    With mirrored taps it is the gradient of the input, from that of the output.
    """
    nhwc, weight = _aligned(input, torch.channels_last), _aligned(weight, torch.contiguous_format)
    bias = None if bias is None else bias.contiguous()
    if residual is None:
        output = torch.empty_like(nhwc, memory_format=torch.channels_last)
    else:
        output = _aligned(residual, torch.channels_last)
    launcher(
        output.data_ptr(),
        nhwc.data_ptr(),
        weight.data_ptr(),
        0 if bias is None else bias.data_ptr(),
        0 if residual is None else output.data_ptr(),
        RANGES[activation],
        _shape(input, weight, dilation, mirrored),
        DTYPES[input.dtype],
        stream,
    )
    return output if residual is not None else in_format_of(output, input)


def _aligned(tensor: Tensor, memory_format: torch.memory_format) -> Tensor:
    """In memory that vectors of 16 bytes can be read from."""
    tensor = tensor.contiguous(memory_format=memory_format)
    return tensor if tensor.data_ptr() % 16 == 0 else tensor.clone()
