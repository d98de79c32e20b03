"""Convolution fused with bias, residual and activation."""

from __future__ import annotations

from ..._native.common import LaunchContext
from ..._native.limits import unsupported_geometry
from ..._native.memory_format import aligned_nhwc, is_nhwc, is_unaligned
from ..arguments import DilatedConv2d, FusedConv2d, FusedConv2dAdd
from ..registry import register_planned_kernel
from .device import CONVOLUTIONS, Call
from .dilated_conv2d import convolution_launcher, plan_convolution
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


@register_planned_kernel("fused_conv2d", *CONVOLUTIONS, unsupported_reason=unsupported_reason)
def fused_conv2d(context: LaunchContext, arguments: FusedConv2d) -> Call:
    *_, dilation, groups, activation = arguments
    return plan_convolution(context, arguments, dilation, groups, activation)


@register_planned_kernel("fused_conv2d_add_", *CONVOLUTIONS, unsupported_reason=unsupported_add)
def fused_conv2d_add_(context: LaunchContext, arguments: FusedConv2dAdd) -> Call:
    residual, input, *_, dilation, groups, activation = arguments
    launch, aligned, is_ready = convolution_launcher(
        context, arguments, dilation, groups, activation
    )
    input_bytes, output_bytes = (t.numel() * t.element_size() for t in (input, residual))

    def add(stream: int, arguments: FusedConv2dAdd) -> None:
        residual, input, weight, bias = arguments[:4]
        output, x, w = residual.data_ptr(), input.data_ptr(), weight.data_ptr()
        if is_unaligned(output, x, w):
            add_to_copy(stream, arguments)
        elif x < output + output_bytes and output < x + input_bytes:
            # The kernel reads the input while it writes the output.
            add(stream, arguments._replace(input=input.clone()))
        else:
            launch(stream, output, x, (w,), (bias.data_ptr(),), output)

    def add_to_copy(stream: int, arguments: FusedConv2dAdd) -> None:
        residual = aligned_nhwc(arguments.residual)
        add(stream, aligned(arguments)._replace(residual=residual))
        if residual is not arguments.residual:
            arguments.residual.copy_(residual)

    return add if is_ready and is_nhwc(residual) else add_to_copy
