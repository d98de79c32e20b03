"""Depthwise dilated convolution, for the ops dilated_conv2d and fused_conv2d."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..._native import _C
from ..._native.common import ACTIVATION_RANGES, DTYPES, LaunchContext
from ..._native.limits import unsupported_operands
from ..._native.memory_format import (
    aligned,
    aligned_nhwc,
    empty_like_format,
    in_format_of,
)

_MAX_PIXELS = 2**28
# Rows of a strip of the weight gradient, the first with enough elements per row. Taller strips read
# fewer rows twice, but small inputs would then give too few CTAs.
_STRIP_ROWS = (16, 8)
_ELEMENTS_PER_ROW = 2**18
_MAX_STRIPS = 4096  # largest number of strips per image that is tried: enough to fill a GPU
_STARTUP_ROWS = 4  # cost of starting a thread and loading its weights and first row, in rows
_CTAS_PER_SM = {(3, 3): 3, (5, 5): 2}  # kernel size -> resident CTAs, limited by registers
_OTHER_CTAS_PER_SM = 4
_ELEMENTS_PER_PART = 2**15  # smallest part of a sum over pixels
_MAX_PARTIAL_SUMS = 2**16  # per tap, over all channels


def is_depthwise(input: Tensor, weight: Tensor, groups: int) -> bool:
    """True if this file computes the convolution, which includes that of a single channel."""
    return groups == input.size(1) and (groups > 1 or weight.size(0) == 1)


def unsupported_reason(input: Tensor, weight: Tensor) -> str | None:
    """Why the kernel cannot compute this depthwise convolution; None if it can."""
    if reason := unsupported_operands(input, [weight]):
        return reason
    if weight.size(0) != input.size(1):
        return (
            f"the depthwise kernel supports as many output as input channels, got {weight.size(0)} "
            f"and {input.size(1)}"
        )
    if weight.size(2) * weight.size(3) > _C.MAX_DEPTHWISE_TAPS:
        return f"the depthwise kernel supports at most {_C.MAX_DEPTHWISE_TAPS} taps"
    if input.numel() // input.size(1) >= _MAX_PIXELS:
        return f"the depthwise kernel supports fewer than {_MAX_PIXELS} pixels"
    return None


def _shape(
    input: Tensor, weight: Tensor, dilation: Sequence[int], strip_rows: int, flipped: bool = False
) -> _C.DepthwiseShape:
    if min(dilation) < 1:
        raise ValueError(f"dilation: expected at least 1, got {dilation[0]} and {dilation[1]}")
    N, C, H, W = input.shape
    # A dilation beyond the map leaves out the same taps as one of the map's size.
    clipped = min(dilation[0], H), min(dilation[1], W)
    return _C.DepthwiseShape((N, H, W, C), weight.shape[2:], clipped, strip_rows, flipped)


def _strip_rows(context: LaunchContext, input: Tensor, weight: Tensor) -> int:
    """Height of the strips with which a convolution ends soonest. It does not affect results."""
    kernel = weight.size(2), weight.size(3)
    # num_ctas is two CTAs per SM. On some GPUs it is one, and this is half of what would fit.
    per_sm = _CTAS_PER_SM.get(kernel, _OTHER_CTAS_PER_SM)
    resident_ctas = per_sm * context.num_ctas // 2
    return _rows_by_rounds(tuple(input.shape), input.element_size(), kernel, resident_ctas)


@functools.lru_cache(maxsize=4096)
def _rows_by_rounds(
    shape: tuple[int, int, int, int], itemsize: int, kernel: tuple[int, int], resident_ctas: int
) -> int:
    """The height of strips that minimises (rounds of resident CTAs) x (rows per CTA)."""
    N, C, H, W = shape
    # The blocks of channels and columns are those of split_of in csrc/cuda/depthwise/depthwise.cuh.
    vector = 16 // itemsize if C % (16 // itemsize) == 0 else 1
    if kernel == (5, 5) and vector > 1:
        vector = 4
    vectors = C // vector
    chunks = -(-vectors // (128 // (vector * itemsize)))
    columns = 128 // -(-vectors // chunks)

    def cost(strips: int) -> int:
        rows = -(-H // strips)
        ctas = chunks * -(-N * -(-H // rows) * W // columns)
        return -(-ctas // resident_ctas) * (rows + kernel[0] - 1 + _STARTUP_ROWS)

    return -(-H // min(range(1, min(H, _MAX_STRIPS) + 1), key=cost))


def _fixed_strip_rows(input: Tensor) -> int:
    """Height of the strips for sums over pixels. It is the same on all devices, as is the order."""
    rows = next((rows for rows in _STRIP_ROWS if input.numel() >= rows * _ELEMENTS_PER_ROW), 4)
    H = input.size(2)
    return -(-H // -(-H // rows))  # equal strips: otherwise the last could have only one row


def launcher(
    context: LaunchContext,
    input: Tensor,
    weight: Tensor,
    dilation: Sequence[int],
    activation: str = "none",
    flipped: bool = False,
) -> Callable[..., None]:
    """Function that launches convolutions of these shapes, with the parameters of ConvPlan.launch.

    With flipped taps this computes the gradient of the input from the gradient of the output.
    """
    launch = context.module.depthwise_conv2d_fwd
    shape = _shape(input, weight, dilation, _strip_rows(context, input, weight), flipped)
    range, dtype = ACTIVATION_RANGES[activation], DTYPES[input.dtype]

    def launch_on(
        stream: int,
        output: int,
        input: int,
        weights: tuple[int],
        biases: tuple[int],
        residual: int = 0,
    ) -> None:
        launch(output, input, *weights, *biases, residual, range, shape, dtype, stream)

    return launch_on


def aligned_operands(arguments: Any) -> Any:
    """``arguments`` with an input, weight and bias that the kernel can read."""
    bias = arguments.bias
    return arguments._replace(
        input=aligned_nhwc(arguments.input),
        weight=aligned(arguments.weight, torch.contiguous_format),
        bias=None if bias is None else bias.contiguous(),
    )


def backward(
    context: LaunchContext,
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
        weight_rows = aligned(weight, torch.contiguous_format)
        grad_input = torch.empty_like(nhwc_grad, memory_format=torch.channels_last)
        launch = launcher(context, nhwc_grad, weight_rows, dilation, flipped=True)
        launch(
            context.stream,
            grad_input.data_ptr(),
            nhwc_grad.data_ptr(),
            (weight_rows.data_ptr(),),
            (0,),
        )
        grad_input = in_format_of(grad_input, input)
    if output_mask[1]:
        grad_weight = empty_like_format(weight, tuple(weight.shape))
    if output_mask[2]:
        grad_bias = input.new_empty(weight.size(0))
    if output_mask[1] or output_mask[2]:
        channels, taps = weight.size(0), weight.size(2) * weight.size(3)
        # The number of parts depends on the shape only, so that all devices add in the same order.
        num_parts = min(input.numel() // _ELEMENTS_PER_PART, -(-_MAX_PARTIAL_SUMS // channels))
        num_parts = max(num_parts, 1)
        partial_sums = input.new_empty(num_parts * (taps + 1) * channels, dtype=torch.float32)
        nhwc = aligned_nhwc(input)
        context.module.depthwise_conv2d_wgrad(
            grad_weight.data_ptr(),
            grad_bias.data_ptr(),
            partial_sums.data_ptr(),
            nhwc_grad.data_ptr(),
            nhwc.data_ptr(),
            _shape(input, weight, dilation, _fixed_strip_rows(input)),
            num_parts,
            DTYPES[input.dtype],
            context.stream,
        )
    return grad_input, grad_weight, grad_bias
