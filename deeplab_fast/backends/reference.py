"""Every op in plain PyTorch: the specification that all other backends must agree with.

These functions run on any device and dtype that PyTorch's own operators support. On a GPU the
convolutions run on cuDNN.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .._native.cross_entropy import bad_target
from .._native.memory_format import in_format_of
from .._native.pooling import grad_of_each_pixel, mean_of_pixels
from .arguments import (
    Aspp,
    DilatedConv2d,
    DilatedConv2dBackward,
    FusedConv2d,
    FusedConv2dAdd,
    ParallelDilatedConv2d,
    ParallelDilatedConv2dAndMean,
    ParallelDilatedConv2dBackward,
    UpsampleArgmax,
    UpsampleCrossEntropy,
    UpsampleCrossEntropyBackward,
)
from .registry import register_backend, register_kernel

register_backend("reference", lambda device_type: None)


def same_padding(weight: Tensor, dilation: Sequence[int]) -> tuple[int, int]:
    kernel_h, kernel_w = weight.shape[2:]
    return dilation[0] * (kernel_h // 2), dilation[1] * (kernel_w // 2)


@register_kernel("dilated_conv2d", "reference")
def dilated_conv2d(arguments: DilatedConv2d) -> Tensor:
    input, weight, bias, dilation, groups = arguments
    padding = same_padding(weight, dilation)
    output = F.conv2d(input, weight, bias, 1, padding, tuple(dilation), groups)
    return in_format_of(output, input)


def needs_fp32_weight_gradient(input: Tensor, dilation: Sequence[int]) -> bool:
    """True if PyTorch's own half-precision weight gradient must not be used.

    On x86 CPUs oneDNN's bf16 kernel gives wrong numbers or crashes for many dilated convolutions of
    channels_last tensors (docs/onednn_bf16_weight_gradient.md). Its fp32 kernels are correct on all
    CPUs, and on a CPU without fp16 arithmetic they are faster than its fp16 kernels.
    """
    is_half = input.dtype in (torch.bfloat16, torch.float16)
    return input.device.type == "cpu" and is_half and max(dilation) > 1


@register_kernel("dilated_conv2d_backward", "reference")
def dilated_conv2d_backward(arguments: DilatedConv2dBackward) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of input, weight and bias; empty where ``output_mask`` is False."""
    grad_output, input, weight, dilation, groups, output_mask = arguments
    # The dilation of a kernel of size 1 has no effect.
    dilation = [1 if size == 1 else d for size, d in zip(weight.shape[2:], dilation)]
    padding = same_padding(weight, dilation)

    def backward(operands: Sequence[Tensor], mask: list[bool]) -> tuple[Tensor, Tensor, Tensor]:
        grads: tuple[Tensor, Tensor, Tensor] = torch.ops.aten.convolution_backward(
            *operands, [weight.size(0)], [1, 1], padding, dilation, False, [0, 0], groups, mask
        )
        return grads

    operands, mask = (grad_output, input, weight), list(output_mask)
    in_fp32 = mask[1] and needs_fp32_weight_gradient(input, dilation)
    grad_input, grad_weight, grad_bias = backward(
        operands, [mask[0], mask[1] and not in_fp32, mask[2]]
    )
    if in_fp32:
        _, grad_weight, _ = backward([t.float() for t in operands], [False, True, False])
        grad_weight = grad_weight.to(weight.dtype)
    return (
        in_format_of(grad_input, input) if output_mask[0] else input.new_empty(0),
        in_format_of(grad_weight, weight) if output_mask[1] else input.new_empty(0),
        grad_bias if output_mask[2] else input.new_empty(0),
    )


@register_kernel("parallel_dilated_conv2d", "reference")
def parallel_dilated_conv2d(arguments: ParallelDilatedConv2d) -> Tensor:
    input, weights, biases, dilations = arguments
    optional: Sequence[Tensor | None] = biases or [None] * len(weights)
    outputs = [
        dilated_conv2d(DilatedConv2d(input, weight, bias, (dilation, dilation), 1))
        for weight, bias, dilation in zip(weights, optional, dilations)
    ]
    return in_format_of(torch.cat(outputs, dim=1), input)


@register_kernel("parallel_dilated_conv2d_and_mean", "reference")
def parallel_dilated_conv2d_and_mean(
    arguments: ParallelDilatedConv2dAndMean,
) -> tuple[Tensor, Tensor]:
    return parallel_dilated_conv2d(arguments.branches()), mean_of_pixels(arguments.input)


@register_kernel("parallel_dilated_conv2d_backward", "reference")
def parallel_dilated_conv2d_backward(
    arguments: ParallelDilatedConv2dBackward,
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Gradients of input, weights and biases; empty where ``output_mask`` is False."""
    grad_output, input, weights, dilations, output_mask, grad_mean = arguments
    grad_outputs = grad_output.split([weight.size(0) for weight in weights], dim=1)
    grads = [
        dilated_conv2d_backward(
            DilatedConv2dBackward(grad, input, weight, (dilation, dilation), 1, output_mask)
        )
        for grad, weight, dilation in zip(grad_outputs, weights, dilations)
    ]
    grad_inputs, grad_weights, grad_biases = zip(*grads)
    grad_input = sum(grad_inputs[1:], grad_inputs[0]) if output_mask[0] else input.new_empty(0)
    if output_mask[0] and grad_mean is not None:
        grad_input += grad_of_each_pixel(grad_mean, input)[:, :, None, None]
    return (
        grad_input,
        list(grad_weights) if output_mask[1] else [],
        list(grad_biases) if output_mask[2] else [],
    )


_ACTIVATIONS = {"none": torch.positive, "relu": F.relu, "relu6": F.relu6}


@register_kernel("fused_conv2d", "reference")
def fused_conv2d(arguments: FusedConv2d) -> Tensor:
    input, weight, bias, stride, padding, dilation, groups, activation = arguments
    output = F.conv2d(input, weight, bias, tuple(stride), tuple(padding), tuple(dilation), groups)
    return in_format_of(_ACTIVATIONS[activation](output), input)


@register_kernel("fused_conv2d_add_", "reference")
def fused_conv2d_add_(arguments: FusedConv2dAdd) -> None:
    residual = arguments.residual
    residual += fused_conv2d(arguments.convolution())
    residual.copy_(_ACTIVATIONS[arguments.activation](residual))


@register_kernel("aspp", "reference")
def aspp(arguments: Aspp) -> Tensor:
    input, weights, biases, dilations, pool_weight, pool_bias, project_weight, project_bias = (
        arguments
    )
    branches = [
        dilated_conv2d(DilatedConv2d(input, weight, bias, (dilation, dilation), 1)).relu()
        for weight, bias, dilation in zip(weights, biases, dilations)
    ]
    pooled = F.conv2d(input.mean((2, 3), keepdim=True), pool_weight, pool_bias).relu()
    branches.append(pooled.expand(-1, -1, *input.shape[2:]))
    output = F.conv2d(torch.cat(branches, dim=1), project_weight, project_bias).relu()
    return in_format_of(output, input)


def upsample(
    logits: Tensor,
    size: Sequence[int],
    scale_factors: Sequence[float] | None,
    align_corners: bool,
) -> Tensor:
    """Bilinear interpolation of [N, C, H, W] logits in fp32.

    The logits are made contiguous, because PyTorch's arithmetic depends on the memory format.
    """
    scale_h, scale_w = scale_factors or (None, None)
    upsampled: Tensor = torch.ops.aten.upsample_bilinear2d(
        logits.float().contiguous(), size, align_corners, scale_h, scale_w
    )
    return upsampled


@register_kernel("upsample_argmax", "reference")
def upsample_argmax(arguments: UpsampleArgmax) -> Tensor:
    logits, size, scale_factors, align_corners, dtype = arguments
    return upsample(logits, size, scale_factors, align_corners).argmax(1).to(dtype)


def _cross_entropy(arguments: UpsampleCrossEntropy) -> Tensor:
    logits, target, weight, ignore_index, reduction, label_smoothing, align_corners = arguments
    classes = logits.size(1)
    known = (target == ignore_index) | ((target >= 0) & (target < classes))
    on_cpu = target.device.type == "cpu"
    if on_cpu and not known.all():
        raise bad_target(int(target[~known][0]), classes, ignore_index)
    loss = F.cross_entropy(
        upsample(logits, target.shape[1:], None, align_corners),
        target if on_cpu else torch.where(known, target, ignore_index),
        None if weight is None else weight.float(),
        ignore_index=ignore_index,
        reduction=reduction,
        label_smoothing=label_smoothing,
    )
    if on_cpu:
        return loss
    # NaN instead of an exception, which would have to wait for the device. PyTorch's own assertion
    # on the device would end the process.
    return loss * torch.where(known if reduction == "none" else known.all(), 1.0, torch.nan)


@register_kernel("upsample_cross_entropy", "reference")
def upsample_cross_entropy(arguments: UpsampleCrossEntropy) -> tuple[Tensor, Tensor, Tensor]:
    logits, target, weight, ignore_index, _, _, align_corners = arguments
    loss = _cross_entropy(arguments)
    centred = logits.float() - logits.float().amax(1, keepdim=True)
    log_sum_exp = upsample(centred, target.shape[1:], None, align_corners).logsumexp(1)
    counted = target != ignore_index
    if weight is None:
        return loss, log_sum_exp, counted.sum().float()
    classes = target.clamp(0, logits.size(1) - 1)
    return loss, log_sum_exp, (weight.float()[classes] * counted).sum()


@register_kernel("upsample_cross_entropy_backward", "reference")
def upsample_cross_entropy_backward(arguments: UpsampleCrossEntropyBackward) -> Tensor:
    """Gradient through the softmax of the upsampled logits, in closed form.

    An op is opaque to autograd, which therefore cannot derive it.
    """
    (
        grad_loss, logits, target, weight, _, total_weight,
        ignore_index, reduction, label_smoothing, align_corners,
    ) = arguments  # fmt: skip
    size, classes = target.shape[1:], logits.size(1)
    weight = logits.new_ones(classes).float() if weight is None else weight.float()
    grad = grad_loss / total_weight if reduction == "mean" else grad_loss
    grad = torch.where(target == ignore_index, 0.0, grad).unsqueeze(1)
    index = target.clamp(0, classes - 1).unsqueeze(1)
    hit = (1 - label_smoothing) * weight[index] * grad

    softmax = upsample(logits, size, None, align_corners).softmax(1)
    grad_upsampled = softmax * hit
    if label_smoothing > 0:  # otherwise the infinite weight of an absent class would give 0 * inf
        smooth = label_smoothing / classes * grad
        grad_upsampled = softmax * (hit + smooth * weight.sum()) - smooth * weight[:, None, None]
    grad_upsampled.scatter_(1, index, grad_upsampled.gather(1, index) - hit)
    grad_logits = torch.ops.aten.upsample_bilinear2d_backward(
        grad_upsampled, size, logits.shape, align_corners, None, None
    )
    return in_format_of(grad_logits.to(logits.dtype), logits)
