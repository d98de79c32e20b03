"""Convolution fused with bias, residual and activation."""

from __future__ import annotations

import torch
from torch import Tensor

from ..._native.limits import unsupported_geometry
from ..._native.memory_format import channels_last, in_format_of
from ..arguments import FusedConv2d, FusedConv2dAdd
from ..registry import register_kernel
from . import depthwise_conv2d, dilated_conv2d
from .device import widened


def unsupported_reason(arguments: FusedConv2d) -> str | None:
    input, weight, _, stride, padding, dilation, groups, _ = arguments
    return unsupported_geometry(
        weight, stride, padding, dilation
    ) or dilated_conv2d.unsupported_convolution(input, [weight], groups)


def unsupported_add(arguments: FusedConv2dAdd) -> str | None:
    residual, input, weight, *_ = arguments
    if residual.shape != (input.size(0), weight.size(0), *input.shape[2:]):
        return "the residual does not have the shape of the output"
    return unsupported_reason(arguments.convolution())


def _convolve(arguments: FusedConv2d, residual: Tensor | None = None) -> Tensor:
    """The convolution in channels_last. A channels_last ``residual`` is overwritten."""
    input, weight, bias, _, _, dilation, groups, activation = widened(*arguments)
    with torch.cuda.device_of(input):
        if groups > 1:
            return depthwise_conv2d.forward(input, weight, bias, dilation, residual, activation)
        return dilated_conv2d.forward(input, [weight], [bias], [dilation], residual, activation)


@register_kernel("fused_conv2d", "triton", unsupported_reason=unsupported_reason)
def fused_conv2d(arguments: FusedConv2d) -> Tensor:
    input = arguments.input
    return in_format_of(_convolve(arguments).to(input.dtype), input)


@register_kernel("fused_conv2d_add_", "triton", unsupported_reason=unsupported_add)
def fused_conv2d_add_(arguments: FusedConv2dAdd) -> None:
    residual, input = arguments.residual, arguments.input
    (sums,) = widened(channels_last(residual))
    if input.untyped_storage().data_ptr() == sums.untyped_storage().data_ptr():
        input = input.clone()  # the kernel reads it while it writes the residual
    convolution = arguments.convolution(arguments.activation)._replace(input=input)
    output = _convolve(convolution, sums)
    if output is not residual:
        residual.copy_(output)
