"""Dilated convolution: several dense branches in one launch, or a depthwise one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..._native import _C
from ..._native.common import ACTIVATION_RANGES, DTYPES, LaunchContext
from ..._native.limits import MAX_TAPS, unsupported_operands
from ..._native.memory_format import aligned_nhwc, aligned_rows, empty_nhwc, in_format_of
from ..._native.precision import tf32_is_allowed
from ..._native.work_lists import (
    CONV_SM90,
    ConvWorkList,
    conv_branches,
    conv_kernel,
    conv_work_list,
    k_iters_per_tap,
)
from ..arguments import (
    DilatedConv2d,
    ParallelDilatedConv2d,
    ParallelDilatedConv2dAndMean,
)
from ..registry import register_kernel
from . import depthwise_conv2d
from .device import CONVOLUTIONS


def unsupported_dense(input: Tensor, weights: Sequence[Tensor], groups: int = 1) -> str | None:
    """Why the kernel of dense branches cannot compute these; None if it can."""
    if reason := unsupported_operands(input, weights):
        return reason
    if input.dtype == torch.float32 and not tf32_is_allowed():
        return "the kernel computes float32 as tf32, which torch.backends.cudnn does not allow"
    if groups != 1:
        return f"the kernel supports one group, got {groups}"
    if reason := unsupported_channels(input, input.size(1), "input channels"):
        return reason
    if any(weight.dtype != input.dtype or weight.device != input.device for weight in weights):
        return "the input and a weight differ in dtype or device"
    if len(weights) > _C.MAX_CONV_BRANCHES:
        return f"the kernel supports at most {_C.MAX_CONV_BRANCHES} branches, got {len(weights)}"
    if any(weight.size(2) * weight.size(3) > MAX_TAPS for weight in weights):
        return f"the kernel supports at most {MAX_TAPS} taps"
    if len(weights) * input.numel() // input.size(1) >= 2**31:
        return "the work list supports fewer than 2^31 pixels in all branches together"
    return None


def unsupported_channels(input: Tensor, channels: int, name: str) -> str | None:
    """Why asynchronous copies of 16 bytes cannot copy this number of channels; None if they can."""
    multiple = 16 // input.element_size()
    if channels % multiple:
        return f"the kernel supports a multiple of {multiple} {name}, got {channels}"
    return None


def unsupported_reason(arguments: DilatedConv2d) -> str | None:
    input, weight, _, _, groups = arguments
    if depthwise_conv2d.is_depthwise(input, weight, groups):
        return depthwise_conv2d.unsupported_reason(input, weight)
    return unsupported_dense(input, [weight], groups)


def unsupported_branches(
    arguments: ParallelDilatedConv2d | ParallelDilatedConv2dAndMean,
) -> str | None:
    return unsupported_dense(arguments.input, arguments.weights)


@register_kernel("dilated_conv2d", *CONVOLUTIONS, unsupported_reason=unsupported_reason)
def dilated_conv2d(context: LaunchContext, arguments: DilatedConv2d) -> Tensor:
    input, weight, bias, dilation, groups = arguments
    if depthwise_conv2d.is_depthwise(input, weight, groups):
        return depthwise_conv2d.forward(context, input, weight, bias, dilation)
    output = empty_nhwc(input, weight.size(0))
    launch(context, output, parallel_branches(context, input, [weight], [bias], [dilation]))
    return in_format_of(output, input)


@register_kernel("parallel_dilated_conv2d", *CONVOLUTIONS, unsupported_reason=unsupported_branches)
def parallel_dilated_conv2d(context: LaunchContext, arguments: ParallelDilatedConv2d) -> Tensor:
    input, weights, biases, dilations = arguments
    output = empty_nhwc(input, sum(weight.size(0) for weight in weights))
    pairs = [(dilation, dilation) for dilation in dilations]
    optional: Sequence[Tensor | None] = biases or [None] * len(weights)
    launch(context, output, parallel_branches(context, input, weights, optional, pairs))
    return in_format_of(output, input)


class Convolution(NamedTuple):
    """A convolution that is ready to be launched."""

    input: Tensor  # aligned and channels_last, as the output has to be
    outputs: list[_C.ConvOutput]
    sources: list[_C.ConvSource]
    work_list: ConvWorkList
    tensors: tuple[Tensor | None, ...]  # own the memory that ``outputs`` point to


def parallel_branches(
    context: LaunchContext,
    input: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    dilations: Sequence[Sequence[int]],
    image_bias: Tensor | None = None,
    pixel_sums: Tensor | None = None,
) -> Convolution:
    """Prepare dense branches of one input, which write consecutive channels of one output.

    Args:
        image_bias: fp32 [N, K], only if there is a single branch.
        pixel_sums: receives sums over pixels of ``input``, from the branch that
            :func:`summing_branch` returns.
    """
    N, C, H, W = input.shape
    channels = tuple(weight.size(0) for weight in weights)
    input, *weights = aligned_nhwc(input), *map(aligned_rows, weights)
    biases = [None if bias is None else bias.contiguous() for bias in biases]
    summing = None if pixel_sums is None else summing_branch(context, input, weights)
    outputs = [
        _C.ConvOutput(
            weight.data_ptr(),
            0 if bias is None else bias.data_ptr(),
            0 if image_bias is None else image_bias.data_ptr(),
            weight.size(0),
            sum(channels[:i]),
            weight.stride(0),
            pixel_sums.data_ptr() if pixel_sums is not None and i == summing else 0,
        )
        for i, (weight, bias) in enumerate(zip(weights, biases))
    ]
    kernel = conv_kernel(context, input)
    work_list = conv_work_list(
        _C.schedule.forward_tiles,
        (N, H, W),
        conv_branches((H, W), weights, dilations),
        k_iters_per_tap(C, input.dtype, kernel),
        channels,
        input.device,
        context.num_ctas,
        kernel,
    )
    sources = [_C.ConvSource(0, C, 0)] * len(weights)
    tensors = *weights, *biases, image_bias, pixel_sums
    return Convolution(input, outputs, sources, work_list, tensors)


def launch(
    context: LaunchContext,
    output: Tensor,
    convolution: Convolution,
    activation: str = "none",
    residual: Tensor | None = None,
) -> None:
    """Write a convolution to ``output``, which is aligned and channels_last, as is ``residual``."""
    input, outputs, sources, work_list, _ = convolution
    kernel = work_list.kernel
    partial_sums = input.new_empty(work_list.num_slots * kernel.tile**2, dtype=torch.float32)
    getattr(context.module, kernel.launcher)(
        output.data_ptr(),
        partial_sums.data_ptr(),
        input.data_ptr(),
        outputs,
        sources,
        work_list.work,
        _C.ConvEpilogue(
            0 if residual is None else residual.data_ptr(), *ACTIVATION_RANGES[activation]
        ),
        _C.ConvShape(input.size(2), input.size(3), input.size(1), output.size(1)),
        DTYPES[input.dtype],
        context.stream,
    )


def summing_branch(context: LaunchContext, input: Tensor, weights: Sequence[Tensor]) -> int | None:
    """The branch that can sum the pixels of ``input`` while it reads them: a 1x1 on sm_90."""
    if conv_kernel(context, input) is not CONV_SM90:
        return None
    return next((i for i, w in enumerate(weights) if w.shape[2:] == (1, 1)), None)
