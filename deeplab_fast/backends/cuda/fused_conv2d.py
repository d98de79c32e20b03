"""Convolution fused with bias, residual and activation."""

from __future__ import annotations

from torch import Tensor

from ..._native.common import LaunchContext
from ..._native.limits import unsupported_geometry
from ..._native.memory_format import aligned_nhwc, empty_nhwc, in_format_of
from ..arguments import DilatedConv2d, FusedConv2d, FusedConv2dAdd
from ..registry import register_kernel
from . import depthwise_conv2d
from .device import CONVOLUTIONS
from .dilated_conv2d import launch, parallel_branches
from .dilated_conv2d import unsupported_reason as unsupported_convolution


def unsupported_reason(arguments: FusedConv2d) -> str | None:
    input, weight, bias, stride, padding, dilation, groups, _ = arguments
    if reason := unsupported_geometry(weight, stride, padding, dilation):
        return reason
    if reason := unsupported_convolution(DilatedConv2d(input, weight, bias, dilation, groups)):
        return reason
    if weight.size(1) * groups != input.size(1) or bias.shape != weight.shape[:1]:
        return "the shapes of weight and bias do not fit"
    if bias.dtype != input.dtype or bias.device != input.device:
        return "the input and the bias differ in dtype or device"
    return None


def unsupported_add(arguments: FusedConv2dAdd) -> str | None:
    residual, input, weight, *_ = arguments
    if reason := unsupported_reason(arguments.convolution()):
        return reason
    if residual.shape != (input.size(0), weight.size(0), *input.shape[2:]):
        return "the residual does not have the shape of the output"
    if residual.dtype != input.dtype or residual.device != input.device:
        return "the input and the residual differ in dtype or device"
    return None


@register_kernel("fused_conv2d", *CONVOLUTIONS, unsupported_reason=unsupported_reason)
def fused_conv2d(context: LaunchContext, arguments: FusedConv2d) -> Tensor:
    input, weight, bias, _, _, dilation, groups, activation = arguments
    if depthwise_conv2d.is_depthwise(input, weight, groups):
        return depthwise_conv2d.forward(context, input, weight, bias, dilation, None, activation)
    output = empty_nhwc(input, weight.size(0))
    convolution = parallel_branches(context, input, [weight], [bias], [dilation])
    launch(context, output, convolution, activation)
    return in_format_of(output, input)


@register_kernel("fused_conv2d_add_", *CONVOLUTIONS, unsupported_reason=unsupported_add)
def fused_conv2d_add_(context: LaunchContext, arguments: FusedConv2dAdd) -> None:
    residual, input, weight, bias, _, _, dilation, groups, activation = arguments
    output = aligned_nhwc(residual)
    if input.untyped_storage().data_ptr() == output.untyped_storage().data_ptr():
        input = input.clone()  # the kernel reads it while it writes the output
    if depthwise_conv2d.is_depthwise(input, weight, groups):
        depthwise_conv2d.forward(context, input, weight, bias, dilation, output, activation)
    else:
        convolution = parallel_branches(context, input, [weight], [bias], [dilation])
        launch(context, output, convolution, activation, residual=output)
    if output is not residual:
        residual.copy_(output)
