"""Dilated convolution: several dense branches in one launch, or a depthwise one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from ..._native import _C
from ..._native.common import ACTIVATION_RANGES, DTYPES, LaunchContext
from ..._native.limits import MAX_TAPS, unsupported_operands
from ..._native.memory_format import (
    aligned_nhwc,
    aligned_rows,
    empty_output,
    has_rows,
    in_format_of,
    is_nhwc,
    is_unaligned,
)
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
    FusedConv2d,
    ParallelDilatedConv2d,
    ParallelDilatedConv2dAndMean,
)
from ..registry import register_planned_kernel
from . import depthwise_conv2d
from .device import CONVOLUTIONS, Call


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


@register_planned_kernel("dilated_conv2d", *CONVOLUTIONS, unsupported_reason=unsupported_reason)
def dilated_conv2d(context: LaunchContext, arguments: DilatedConv2d) -> Call:
    return plan_convolution(context, arguments, arguments.dilation, arguments.groups)


def plan_convolution(
    context: LaunchContext,
    arguments: DilatedConv2d | FusedConv2d,
    dilation: Sequence[int],
    groups: int,
    activation: str = "none",
) -> Call:
    """Plan of a dense or depthwise convolution of ``arguments.input``."""
    launch, aligned, is_ready = convolution_launcher(
        context, arguments, dilation, groups, activation
    )
    empty = empty_output(arguments.input, arguments.weight.size(0))

    def convolve(stream: int, arguments: Any) -> Tensor:
        input, weight, bias = arguments[:3]
        x, w = input.data_ptr(), weight.data_ptr()
        if is_unaligned(x, w):
            return convolve(stream, aligned(arguments))
        output = empty()
        b = 0 if bias is None else bias.data_ptr()
        launch(stream, output.data_ptr(), x, (w,), (b,))
        return output

    if is_ready:
        return convolve
    return lambda stream, arguments: in_format_of(
        convolve(stream, aligned(arguments)), arguments.input
    )


def convolution_launcher(
    context: LaunchContext,
    arguments: Any,
    dilation: Sequence[int],
    groups: int,
    activation: str,
) -> tuple[Callable[..., None], Callable[[Any], Any], bool]:
    """What launches a dense or depthwise convolution, and what its operands have to be.

    Returns:
        A function with the parameters of :meth:`ConvPlan.launch`; a function that returns the
        arguments with operands that the kernel can read; True if it copies nothing but tensors
        whose memory is not aligned.
    """
    input, weight, bias = arguments.input, arguments.weight, arguments.bias
    is_ready = is_nhwc(input) and (bias is None or bias.is_contiguous())
    if depthwise_conv2d.is_depthwise(input, weight, groups):
        launch = depthwise_conv2d.launcher(context, input, weight, dilation, activation)
        return launch, depthwise_conv2d.aligned_operands, is_ready and weight.is_contiguous()
    plan = branches_plan(context, input.shape, [aligned_rows(weight)], [dilation], activation)
    return plan.launch, aligned_operands, is_ready and has_rows(weight)


def aligned_operands(arguments: Any) -> Any:
    """``arguments`` with an input, weight and bias that the kernel of dense branches can read."""
    bias = arguments.bias
    return arguments._replace(
        input=aligned_nhwc(arguments.input),
        weight=aligned_rows(arguments.weight),
        bias=None if bias is None else bias.contiguous(),
    )


@register_planned_kernel(
    "parallel_dilated_conv2d", *CONVOLUTIONS, unsupported_reason=unsupported_branches
)
def parallel_dilated_conv2d(context: LaunchContext, arguments: ParallelDilatedConv2d) -> Call:
    input, weights, biases, dilations = arguments
    pairs = [(dilation, dilation) for dilation in dilations]
    plan = branches_plan(context, input.shape, list(map(aligned_rows, weights)), pairs)
    empty = empty_output(input, sum(weight.size(0) for weight in weights))
    no_biases = (0,) * len(weights)

    def convolve(stream: int, arguments: ParallelDilatedConv2d) -> Tensor:
        input, weights, biases, _ = arguments
        x, w = input.data_ptr(), addresses(weights)
        if is_unaligned(x, *w):
            return convolve(stream, aligned_branches(arguments))
        output = empty()
        plan.launch(stream, output.data_ptr(), x, w, addresses(biases) or no_biases)
        return output

    if is_nhwc(input) and all(map(has_rows, weights)) and all(b.is_contiguous() for b in biases):
        return convolve
    return lambda stream, arguments: in_format_of(
        convolve(stream, aligned_branches(arguments)), arguments.input
    )


def aligned_branches(arguments: Any) -> Any:
    """``arguments`` with an input, weights and biases that the kernel can read."""
    return arguments._replace(
        input=aligned_nhwc(arguments.input),
        weights=list(map(aligned_rows, arguments.weights)),
        biases=[bias.contiguous() for bias in arguments.biases],
    )


def addresses(tensors: Sequence[Tensor]) -> tuple[int, ...]:
    return tuple([tensor.data_ptr() for tensor in tensors])


class ConvPlan:
    """A convolution of fixed shapes, ready to be launched on the addresses of its tensors."""

    def __init__(
        self,
        context: LaunchContext,
        work_list: ConvWorkList,
        dtype: torch.dtype,
        device: torch.device,
        outputs: Sequence[tuple[int, int, int]],
        sources: Sequence[_C.ConvSource],
        shape: _C.ConvShape,
        activation: str = "none",
        summing_branch: int | None = None,
    ) -> None:
        """``outputs`` are (K, first_channel, weight_stride) of each struct ConvOutput."""
        kernel = work_list.kernel
        self.summing_branch = summing_branch
        self._launcher = getattr(context.module, kernel.launcher)
        self._work_list, self._outputs = work_list, outputs
        self._others = (
            sources,
            work_list.work,
            ACTIVATION_RANGES[activation],
            shape,
            DTYPES[dtype],
            -1 if summing_branch is None else summing_branch,
        )
        self._partial_sums = partial(
            torch.empty, work_list.num_slots * kernel.tile**2, dtype=torch.float32, device=device
        )
        # Addresses of the last launch and its struct: weights seldom move.
        self._last: tuple[Any, Any] = (None, None)

    def launch(
        self,
        stream: int,
        output: int,
        input: int,
        weights: tuple[int, ...],
        biases: tuple[int, ...],
        residual: int = 0,
        image_bias: int = 0,
        pixel_sums: int = 0,
    ) -> None:
        """Launch on these addresses. All but those of biases are aligned; 0 stands for no tensor.

        Args:
            output, residual: channels_last.
            image_bias: fp32 [N, K], only if there is a single output.
            pixel_sums: receives sums over pixels of the input, from ``summing_branch``.
        """
        last, arguments = self._last
        if last != (weights, biases):
            outputs = [_C.ConvOutput(*o) for o in zip(weights, biases, *zip(*self._outputs))]
            arguments = _C.ConvArguments(outputs, *self._others)
            self._last = (weights, biases), arguments
        partial_sums = self._partial_sums() if self._work_list.num_slots else None
        self._launcher(
            output,
            0 if partial_sums is None else partial_sums.data_ptr(),
            input,
            residual,
            image_bias,
            pixel_sums,
            arguments,
            stream,
        )


def branches_plan(
    context: LaunchContext,
    shape: Sequence[int],
    weights: Sequence[Tensor],
    dilations: Sequence[Sequence[int]],
    activation: str = "none",
) -> ConvPlan:
    """Plan of dense branches, which write consecutive channels of one output.

    Args:
        shape: [N, C, H, W] of the input.
        weights: as :func:`aligned_rows` returns them.
    """
    N, C, H, W = shape
    dtype, device = weights[0].dtype, weights[0].device
    channels = tuple(weight.size(0) for weight in weights)
    kernel = conv_kernel(context, dtype, (H, W))
    work_list = conv_work_list(
        _C.schedule.forward_tiles,
        (N, H, W),
        conv_branches((H, W), weights, dilations),
        k_iters_per_tap(C, dtype, kernel),
        channels,
        device,
        context.num_ctas,
        kernel,
    )
    first_channels = accumulate(channels, initial=0)
    pointwise = (i for i, weight in enumerate(weights) if weight.shape[2:] == (1, 1))
    return ConvPlan(
        context,
        work_list,
        dtype,
        device,
        [(K, first, w.stride(0)) for K, first, w in zip(channels, first_channels, weights)],
        [_C.ConvSource(0, C, 0)] * len(weights),
        _C.ConvShape(H, W, C, sum(channels)),
        activation,
        # Only this kernel can sum the pixels of the input while it reads them, in a 1x1 branch.
        summing_branch=next(pointwise, None) if kernel is CONV_SM90 else None,
    )
