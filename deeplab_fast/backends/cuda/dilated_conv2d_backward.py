"""Gradients of dilated convolutions: parallel dense branches, or a depthwise one."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor

from ..._native import _C
from ..._native.common import DTYPES, LaunchContext
from ..._native.limits import MAX_TAPS
from ..._native.memory_format import aligned_nhwc, empty_nhwc, in_format_of
from ..._native.pooling import grad_of_each_pixel
from ..._native.work_lists import (
    Branches,
    conv_branches,
    conv_kernel,
    conv_work_list,
    k_iters_per_tap,
    wgrad_kernel,
    wgrad_work_list,
)
from ..arguments import DilatedConv2dBackward, ParallelDilatedConv2dBackward
from ..registry import register_kernel
from . import depthwise_conv2d
from .device import CONVOLUTIONS
from .dilated_conv2d import ConvPlan, unsupported_dense


def unsupported_dense_backward(
    input: Tensor, weights: Sequence[Tensor], groups: int = 1
) -> str | None:
    """Why the kernels cannot compute the gradients of these branches; None if they can."""
    if reason := unsupported_dense(input, weights, groups):
        return reason
    if sum(weight.size(2) * weight.size(3) for weight in weights) > MAX_TAPS:
        return f"the kernel supports at most {MAX_TAPS} taps in all branches together"
    return None


def unsupported_reason(arguments: DilatedConv2dBackward) -> str | None:
    _, input, weight, _, groups, _ = arguments
    if depthwise_conv2d.is_depthwise(input, weight, groups):
        return depthwise_conv2d.unsupported_reason(input, weight)
    return unsupported_dense_backward(input, [weight], groups)


def unsupported_branches(arguments: ParallelDilatedConv2dBackward) -> str | None:
    return unsupported_dense_backward(arguments.input, arguments.weights)


@register_kernel("dilated_conv2d_backward", *CONVOLUTIONS, unsupported_reason=unsupported_reason)
def dilated_conv2d_backward(
    context: LaunchContext, arguments: DilatedConv2dBackward
) -> tuple[Tensor, Tensor, Tensor]:
    grad_output, input, weight, dilation, groups, output_mask = arguments
    if depthwise_conv2d.is_depthwise(input, weight, groups):
        return depthwise_conv2d.backward(context, grad_output, input, weight, dilation, output_mask)
    grad_input, grad_weights, grad_biases = backward(
        context, grad_output, input, [weight], [dilation], output_mask
    )
    empty = [input.new_empty(0)]
    return grad_input, (grad_weights or empty)[0], (grad_biases or empty)[0]


@register_kernel(
    "parallel_dilated_conv2d_backward", *CONVOLUTIONS, unsupported_reason=unsupported_branches
)
def parallel_dilated_conv2d_backward(
    context: LaunchContext, arguments: ParallelDilatedConv2dBackward
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    grad_output, input, weights, dilations, output_mask, grad_mean = arguments
    pairs = [(dilation, dilation) for dilation in dilations]
    return backward(context, grad_output, input, weights, pairs, output_mask, grad_mean)


def backward(
    context: LaunchContext,
    grad_output: Tensor,
    input: Tensor,
    weights: Sequence[Tensor],
    dilations: Sequence[Sequence[int]],
    output_mask: Sequence[bool],
    grad_mean: Tensor | None = None,
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Gradients of input, weights and biases; empty where ``output_mask`` is False.

    ``grad_mean`` [N, C] is the gradient of the input's mean over all pixels. Its contribution is
    added to the gradient of the input.
    """
    channels = [weight.size(0) for weight in weights]
    added = [-k % (16 // input.element_size()) for k in channels]  # a copy has 16 bytes
    if any(added):
        grad_parts = zip(grad_output.split(channels, dim=1), added)
        grad_output = torch.cat([F.pad(g, (0, 0, 0, 0, 0, more)) for g, more in grad_parts], dim=1)
        padded = [F.pad(w, (0, 0, 0, 0, 0, 0, 0, more)) for w, more in zip(weights, added)]
        grad_input, grad_weights, grad_biases = backward(
            context, grad_output, input, padded, dilations, output_mask, grad_mean
        )
        return (
            grad_input,
            [in_format_of(grad[: w.size(0)], w) for grad, w in zip(grad_weights, weights)],
            [grad[:k] for grad, k in zip(grad_biases, channels)],
        )

    branches = conv_branches((input.size(2), input.size(3)), weights, dilations)
    grad_output = aligned_nhwc(grad_output)
    needs_input, needs_weights, needs_biases = output_mask
    return (
        input_gradient(context, grad_output, input, weights, branches, grad_mean)
        if needs_input
        else input.new_empty(0),
        weight_gradients(context, grad_output, input, weights, branches) if needs_weights else [],
        bias_gradients(context, grad_output, weights) if needs_biases else [],
    )


def input_gradient(
    context: LaunchContext,
    grad_output: Tensor,
    input: Tensor,
    weights: Sequence[Tensor],
    branches: Branches,
    grad_mean: Tensor | None,
) -> Tensor:
    """A convolution of ``grad_output`` with the flipped taps of all branches, in a single pass.

    The gradient of the mean is the same for all pixels of an image, so it is a bias per image of
    that convolution.
    """
    N, C, H, W = input.shape
    channels = [weight.size(0) for weight in weights]
    sizes = [weight.numel() // C for weight in weights]
    # Row c of the weights holds [R, S, K] of each branch in turn.
    transposed = input.new_empty(C, sum(sizes))
    for part, weight in zip(transposed.split(sizes, dim=1), weights):
        K, _, R, S = weight.shape
        part.unflatten(1, (R, S, K)).copy_(weight.permute(1, 2, 3, 0))
    image_bias = None
    if grad_mean is not None:
        image_bias = grad_of_each_pixel(grad_mean, input).float().contiguous()
    kernel = conv_kernel(context, input.dtype, (H, W))
    work_list = conv_work_list(
        _C.schedule.input_grad_tiles,
        (N, H, W),
        branches,
        k_iters_per_tap(max(channels), input.dtype, kernel),
        (C,),
        input.device,
        context.num_ctas,
        kernel,
    )
    sources = [
        _C.ConvSource(*source)
        for source in zip(accumulate(channels, initial=0), channels, accumulate(sizes, initial=0))
    ]
    plan = ConvPlan(
        context,
        work_list,
        input.dtype,
        input.device,
        [(C, 0, transposed.size(1))],
        sources,
        _C.ConvShape(H, W, sum(channels), C),
    )
    grad_input = empty_nhwc(input, C)
    plan.launch(
        context.stream,
        grad_input.data_ptr(),
        grad_output.data_ptr(),
        (transposed.data_ptr(),),
        (0,),
        image_bias=0 if image_bias is None else image_bias.data_ptr(),
    )
    return in_format_of(grad_input, input)


def weight_gradients(
    context: LaunchContext,
    grad_output: Tensor,
    input: Tensor,
    weights: Sequence[Tensor],
    branches: Branches,
) -> list[Tensor]:
    """Weight gradients of all branches, in one launch, or two if output tiles are split."""
    N, C, H, W = input.shape
    channels = tuple(weight.size(0) for weight in weights)
    kernel = wgrad_kernel(context, input.dtype)
    work_list = wgrad_work_list(
        (N, H, W), branches, C, channels, input.dtype, input.device, context.num_ctas, kernel
    )
    nhwc = aligned_nhwc(input)
    grads = [torch.empty_like(w, memory_format=torch.channels_last) for w in weights]
    partial_sums = input.new_empty(work_list.num_slots * kernel.tile**2, dtype=torch.float32)
    getattr(context.module, kernel.launcher)(
        partial_sums.data_ptr(),
        grad_output.data_ptr(),
        nhwc.data_ptr(),
        [(grad.data_ptr(), grad.size(0), grad.size(2) * grad.size(3)) for grad in grads],
        work_list.work,
        _C.ConvWgradShape(N, H, W, C, sum(channels)),
        DTYPES[input.dtype],
        context.stream,
    )
    return [in_format_of(grad, weight) for grad, weight in zip(grads, weights)]


# Smallest number of pixels in a part of a bias gradient: eight times the rows of a CTA.
_PIXELS_PER_PART = 256


def bias_gradients(
    context: LaunchContext, grad_output: Tensor, weights: Sequence[Tensor]
) -> list[Tensor]:
    """Sums of ``grad_output`` over images and pixels."""
    N, K, H, W = grad_output.shape
    num_pixels = N * H * W
    num_parts = max(1, min(context.num_ctas, num_pixels // _PIXELS_PER_PART))
    sums = grad_output.new_empty(K)
    partial_sums = grad_output.new_empty(num_parts * K, dtype=torch.float32)
    context.module.dilated_conv2d_bias_grad(
        sums.data_ptr(),
        partial_sums.data_ptr(),
        grad_output.data_ptr(),
        num_pixels,
        K,
        num_parts,
        DTYPES[grad_output.dtype],
        context.stream,
    )
    if len(weights) == 1:
        return [sums]
    # The outputs of an op must not share memory.
    return [part.clone() for part in sums.split([weight.size(0) for weight in weights])]
