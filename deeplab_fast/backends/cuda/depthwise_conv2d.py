"""Depthwise convolution through ``depthwise_conv2d`` of a module compiled from the CUDA kernels."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ... import _C
from ..._native.common import CLAMPS, DTYPES, Kernels, aligned, aligned_nhwc
from ...ops._register import empty_like_format, in_format_of

_MAX_PIXELS = 2**28
_STRIP_ROWS = (16, 8)  # of the weight gradient: longer ones read fewer rows twice
_ELEMENTS_PER_ROW = 2**18  # with fewer for a strip's row, few blocks are left: shorter strips
_MAX_STRIPS = 4096  # of an image that are tried: as many fill a GPU, and trying takes time
_ROWS_TO_START = 4  # as long as they take, a thread takes to load its weights and its first row
_BLOCKS_PER_PROCESSOR = {(3, 3): 3, (5, 5): 2}  # of the kernels for these sizes, by registers
_OTHER_BLOCKS_PER_PROCESSOR = 4
_ELEMENTS_PER_PART = 2**15  # or more, of a sum over pixels
_MAX_PARTIAL_SUMS = 2**16  # of one tap, in all channels


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


def _shape(
    input: Tensor, weight: Tensor, dilation: Sequence[int], strip_rows: int, mirrored: bool = False
) -> Any:
    N, C, H, W = input.shape
    # A rate beyond the map does what the map's size does.
    rates = min(dilation[0], H), min(dilation[1], W)
    return _C.DepthwiseShape((N, H, W, C), weight.shape[2:], rates, strip_rows, mirrored)


def _strip_rows(kernels: Kernels, input: Tensor, weight: Tensor) -> int:
    """Rows of a strip that let a convolution's blocks end soonest. Its sums do not depend on it."""
    kernel = weight.size(2), weight.size(3)
    # num_workers counts two blocks a processor, or one on some, where this is half of what fits.
    per_processor = _BLOCKS_PER_PROCESSOR.get(kernel, _OTHER_BLOCKS_PER_PROCESSOR)
    blocks_at_once = per_processor * kernels.num_workers // 2
    return _rows_by_rounds(tuple(input.shape), input.element_size(), kernel, blocks_at_once)


@functools.lru_cache(maxsize=4096)
def _rows_by_rounds(
    shape: tuple[int, int, int, int], itemsize: int, kernel: tuple[int, int], blocks_at_once: int
) -> int:
    """As `_strip_rows`: the rounds of blocks that run at once, times the rows of each."""
    N, C, H, W = shape
    # As split_of in csrc/cuda/depthwise/depthwise.cuh cuts channels and columns into blocks.
    vector = 16 // itemsize if C % (16 // itemsize) == 0 else 1
    if kernel == (5, 5) and vector > 1:
        vector = 4
    vectors = C // vector
    chunks = -(-vectors // (128 // (vector * itemsize)))
    columns = 128 // -(-vectors // chunks)

    def cost(strips: int) -> int:
        rows = -(-H // strips)
        blocks = chunks * -(-N * -(-H // rows) * W // columns)
        return -(-blocks // blocks_at_once) * (rows + kernel[0] - 1 + _ROWS_TO_START)

    return -(-H // min(range(1, min(H, _MAX_STRIPS) + 1), key=cost))


def _fixed_strip_rows(input: Tensor) -> int:
    """Rows of a strip for sums over pixels: from the shape alone, so that every device adds in the
    same order."""
    rows = next((rows for rows in _STRIP_ROWS if input.numel() >= rows * _ELEMENTS_PER_ROW), 4)
    H = input.size(2)
    return -(-H // -(-H // rows))  # else the last strip may have one row


def forward(
    kernels: Kernels,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    dilation: Sequence[int],
    residual: Tensor | None = None,
    activation: str = "none",
) -> Tensor:
    """``activation(conv2d(input, weight, bias) + residual)``, over ``residual`` where it can be."""
    shape = _shape(input, weight, dilation, _strip_rows(kernels, input, weight))
    output = _convolve(kernels, input, weight, bias, shape, residual, activation)
    return output if residual is not None else in_format_of(output, input)


def backward(
    kernels: Kernels,
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor,
    dilation: Sequence[int],
    output_mask: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of input, weight and bias; empty where ``output_mask`` is False."""
    nhwc_grad = aligned_nhwc(grad_output)
    grad_input = grad_weight = grad_bias = input.new_empty(0)
    if output_mask[0]:
        strip_rows = _strip_rows(kernels, input, weight)
        mirrored = _shape(input, weight, dilation, strip_rows, mirrored=True)
        grad_input = _convolve(kernels, nhwc_grad, weight, None, mirrored, None, "none")
        grad_input = in_format_of(grad_input, input)
    if output_mask[1]:
        grad_weight = empty_like_format(weight, tuple(weight.shape))
    if output_mask[2]:
        grad_bias = input.new_empty(weight.size(0))
    if output_mask[1] or output_mask[2]:
        channels, taps = weight.size(0), weight.size(2) * weight.size(3)
        # From the shape alone, as in _fixed_strip_rows.
        num_parts = min(input.numel() // _ELEMENTS_PER_PART, -(-_MAX_PARTIAL_SUMS // channels))
        num_parts = max(num_parts, 1)
        partial_sums = input.new_empty(num_parts * (taps + 1) * channels, dtype=torch.float32)
        nhwc = aligned_nhwc(input)
        kernels.module.depthwise_conv2d_wgrad(
            grad_weight.data_ptr(),
            grad_bias.data_ptr(),
            partial_sums.data_ptr(),
            nhwc_grad.data_ptr(),
            nhwc.data_ptr(),
            _shape(input, weight, dilation, _fixed_strip_rows(input)),
            num_parts,
            DTYPES[input.dtype],
            kernels.stream,
        )
    return grad_input, grad_weight, grad_bias


def _convolve(
    kernels: Kernels,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    shape: Any,
    residual: Tensor | None,
    activation: str,
) -> Tensor:
    """In channels_last memory."""
    nhwc, weight = aligned_nhwc(input), aligned(weight, torch.contiguous_format)
    bias = None if bias is None else bias.contiguous()
    if residual is None:
        output = torch.empty_like(nhwc, memory_format=torch.channels_last)
    else:
        output = aligned_nhwc(residual)
    kernels.module.depthwise_conv2d_fwd(
        output.data_ptr(),
        nhwc.data_ptr(),
        weight.data_ptr(),
        0 if bias is None else bias.data_ptr(),
        0 if residual is None else output.data_ptr(),
        CLAMPS[activation],
        shape,
        DTYPES[input.dtype],
        kernels.stream,
    )
    return output
