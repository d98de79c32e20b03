"""Every op in plain PyTorch: the truth that all other implementations must agree with.

These run on any device and dtype that PyTorch's own operators take. On a GPU the convolutions
here are cuDNN's.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ops._register import in_format_of
from .registry import implements


def same_padding(weight: Tensor, dilation: Sequence[int]) -> tuple[int, int]:
    kernel_h, kernel_w = weight.shape[2:]
    return dilation[0] * (kernel_h // 2), dilation[1] * (kernel_w // 2)


@implements("dilated_conv2d", "reference")
def dilated_conv2d(
    input: Tensor, weight: Tensor, bias: Tensor | None, dilation: Sequence[int], groups: int
) -> Tensor:
    padding = same_padding(weight, dilation)
    output = F.conv2d(input, weight, bias, 1, padding, tuple(dilation), groups)
    return in_format_of(output, input)


def needs_fp32_weight_gradient(input: Tensor, dilation: Sequence[int]) -> bool:
    """True where PyTorch's own half-precision weight gradient must not be used.

    On x86 CPUs oneDNN's bf16 kernel gives wrong numbers or crashes for many dilated convolutions of
    channels_last tensors: docs/onednn_bf16_weight_gradient.md. Its fp32 kernels are right on all
    CPUs, and faster than its fp16 ones on a CPU without fp16 arithmetic.
    """
    is_half = input.dtype in (torch.bfloat16, torch.float16)
    return input.device.type == "cpu" and is_half and max(dilation) > 1


@implements("dilated_conv2d_backward", "reference")
def dilated_conv2d_backward(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor,
    dilation: Sequence[int],
    groups: int,
    output_mask: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of input, weight and bias; empty where ``output_mask`` is False."""
    # A kernel of size 1 has no dilation.
    dilation = [1 if size == 1 else d for size, d in zip(weight.shape[2:], dilation)]
    padding = same_padding(weight, dilation)

    def backward(operands: Sequence[Tensor], mask: list[bool]) -> tuple[Tensor, Tensor, Tensor]:
        return torch.ops.aten.convolution_backward(
            *operands, [weight.size(0)], [1, 1], padding, dilation, False, [0, 0], groups, mask
        )

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


@implements("parallel_dilated_conv2d", "reference")
def parallel_dilated_conv2d(
    input: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor], dilations: Sequence[int]
) -> Tensor:
    optional: Sequence[Tensor | None] = biases or [None] * len(weights)
    outputs = [
        dilated_conv2d(input, weight, bias, (dilation, dilation), 1)
        for weight, bias, dilation in zip(weights, optional, dilations)
    ]
    return in_format_of(torch.cat(outputs, dim=1), input)


def mean_of_pixels(input: Tensor) -> Tensor:
    """[N, C], in fp32 or float64."""
    dtype = torch.promote_types(input.dtype, torch.float32)
    return input.mean((2, 3), dtype=dtype).contiguous()


@implements("parallel_dilated_conv2d_and_mean", "reference")
def parallel_dilated_conv2d_and_mean(
    input: Tensor, weights: Sequence[Tensor], dilations: Sequence[int]
) -> tuple[Tensor, Tensor]:
    return parallel_dilated_conv2d(input, weights, [], dilations), mean_of_pixels(input)


def share_of_pixel(grad_mean: Tensor, input: Tensor) -> Tensor:
    """Gradient [N, C] of each pixel from that of the mean over all, in fp32 or float64."""
    N, C, H, W = input.shape
    dtype = torch.promote_types(grad_mean.dtype, torch.float32)
    return (grad_mean.to(dtype) / (H * W)).expand(N, C)


@implements("parallel_dilated_conv2d_backward", "reference")
def parallel_dilated_conv2d_backward(
    grad_output: Tensor,
    input: Tensor,
    weights: Sequence[Tensor],
    dilations: Sequence[int],
    output_mask: Sequence[bool],
    grad_mean: Tensor | None = None,
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Gradients of input, weights and biases; empty where ``output_mask`` is False.

    ``grad_mean`` [N, C] is that of the input's mean over space, of which each pixel has its share.
    """
    grads = [
        dilated_conv2d_backward(grad, input, weight, (dilation, dilation), 1, output_mask)
        for grad, weight, dilation in zip(
            grad_output.split([weight.size(0) for weight in weights], dim=1), weights, dilations
        )
    ]
    grad_inputs, grad_weights, grad_biases = zip(*grads)
    grad_input = sum(grad_inputs[1:], grad_inputs[0]) if output_mask[0] else input.new_empty(0)
    if output_mask[0] and grad_mean is not None:
        grad_input += share_of_pixel(grad_mean, input)[:, :, None, None]
    return (
        grad_input,
        list(grad_weights) if output_mask[1] else [],
        list(grad_biases) if output_mask[2] else [],
    )


_ACTIVATIONS = {"none": torch.positive, "relu": F.relu, "relu6": F.relu6}


@implements("fused_conv2d", "reference")
def fused_conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    activation: str,
) -> Tensor:
    output = F.conv2d(input, weight, bias, tuple(stride), tuple(padding), tuple(dilation), groups)
    return in_format_of(_ACTIVATIONS[activation](output), input)


@implements("fused_conv2d_add_", "reference")
def fused_conv2d_add_(
    residual: Tensor,
    input: Tensor,
    weight: Tensor,
    bias: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    activation: str,
) -> None:
    geometry = stride, padding, dilation, groups
    residual += fused_conv2d(input, weight, bias, *geometry, "none")
    residual.copy_(_ACTIVATIONS[activation](residual))


@implements("aspp", "reference")
def aspp(
    input: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    dilations: Sequence[int],
    pool_weight: Tensor,
    pool_bias: Tensor,
    project_weight: Tensor,
    project_bias: Tensor,
) -> Tensor:
    branches = [
        dilated_conv2d(input, weight, bias, (dilation, dilation), 1).relu()
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

    Contiguous NCHW, because PyTorch's arithmetic depends on the memory format.
    """
    scale_h, scale_w = scale_factors or (None, None)
    return torch.ops.aten.upsample_bilinear2d(
        logits.float().contiguous(), size, align_corners, scale_h, scale_w
    )


@implements("upsample_argmax", "reference")
def upsample_argmax(
    logits: Tensor,
    size: Sequence[int],
    scale_factors: Sequence[float] | None,
    align_corners: bool,
    dtype: torch.dtype,
) -> Tensor:
    return upsample(logits, size, scale_factors, align_corners).argmax(1).to(dtype)


def bad_target(value: int, classes: int, ignore_index: int) -> IndexError:
    return IndexError(
        f"target: {value} is not a class: expected 0 to {classes - 1}, or ignore_index "
        f"({ignore_index})"
    )


def _cross_entropy(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    reduction: str,
    label_smoothing: float,
    align_corners: bool,
) -> Tensor:
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
    # An exception would need to wait for the device, and PyTorch's own assertion ends the process.
    return loss * torch.where(known if reduction == "none" else known.all(), 1.0, torch.nan)


@implements("upsample_cross_entropy", "reference")
def upsample_cross_entropy(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    reduction: str,
    label_smoothing: float,
    align_corners: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    loss = _cross_entropy(
        logits, target, weight, ignore_index, reduction, label_smoothing, align_corners
    )
    centred = logits.float() - logits.float().amax(1, keepdim=True)
    log_sum_exp = upsample(centred, target.shape[1:], None, align_corners).logsumexp(1)
    counted = target != ignore_index
    if weight is None:
        return loss, log_sum_exp, counted.sum().float()
    classes = target.clamp(0, logits.size(1) - 1)
    return loss, log_sum_exp, (weight.float()[classes] * counted).sum()


@implements("upsample_cross_entropy_backward", "reference")
def upsample_cross_entropy_backward(
    grad_loss: Tensor,
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    log_sum_exp: Tensor,
    total_weight: Tensor,
    ignore_index: int,
    reduction: str,
    label_smoothing: float,
    align_corners: bool,
) -> Tensor:
    """Through the softmax of the upsampled logits: autograd does not reach into an op."""
    size, classes = target.shape[1:], logits.size(1)
    weight = logits.new_ones(classes).float() if weight is None else weight.float()
    grad = grad_loss / total_weight if reduction == "mean" else grad_loss
    grad = torch.where(target == ignore_index, 0.0, grad).unsqueeze(1)
    index = target.clamp(0, classes - 1).unsqueeze(1)
    hit = (1 - label_smoothing) * weight[index] * grad

    softmax = upsample(logits, size, None, align_corners).softmax(1)
    grad_upsampled = softmax * hit
    if label_smoothing > 0:  # else an infinite weight of a class that no pixel has makes 0 * inf
        smooth = label_smoothing / classes * grad
        grad_upsampled = softmax * (hit + smooth * weight.sum()) - smooth * weight[:, None, None]
    grad_upsampled.scatter_(1, index, grad_upsampled.gather(1, index) - hit)
    grad_logits = torch.ops.aten.upsample_bilinear2d_backward(
        grad_upsampled, size, logits.shape, align_corners, None, None
    )
    return in_format_of(grad_logits.to(logits.dtype), logits)
