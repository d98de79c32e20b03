"""The ``cpu`` backend: hand-written kernels in ``_C.cpu``, and oneDNN through torch.

oneDNN runs a convolution near the peak of the machine and skips padded taps itself. The
convolutions here only convert their operands to its fastest layout, channels_last, and split the
channels into blocks where oneDNN is slow with many channels at once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .._native import _C
from .._native.common import DTYPES
from .._native.cross_entropy import bad_target, cross_entropy_params
from .._native.memory_format import channels_last, empty_like_format, in_format_of
from .._native.pooling import mean_of_pixels
from .._native.upsample_shape import upsample_shape
from . import reference
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


def _unavailable_reason(device_type: str) -> str | None:
    return None if device_type == "cpu" else f"does not run on {device_type} tensors"


register_backend("cpu", _unavailable_reason)

# oneDNN 3 on AMX is far slower with 2048 half-precision channels at once, so split them.
_MAX_CHANNELS = 512


def _needs_channel_blocks(input: Tensor, weight: Tensor, groups: int) -> bool:
    is_pointwise = tuple(weight.shape[2:]) == (1, 1)
    is_half = input.dtype in (torch.bfloat16, torch.float16)
    return is_half and not is_pointwise and groups == 1 and input.size(1) > _MAX_CHANNELS


def _sum_of_blocks(
    convolve: Callable[..., Tensor], input: Tensor, weight: Tensor, bias: Tensor | None
) -> Tensor:
    """``convolve(input, weight, bias)`` in float32 as a sum over blocks of input channels."""
    (input, weight), *blocks = (
        (channels_last(x), channels_last(w))
        for x, w in zip(input.split(_MAX_CHANNELS, dim=1), weight.split(_MAX_CHANNELS, dim=1))
    )
    total = convolve(input, weight, bias).float()
    for input, weight in blocks:
        total += convolve(input, weight, None)
    return total


@register_kernel("dilated_conv2d", "cpu")
def dilated_conv2d(arguments: DilatedConv2d) -> Tensor:
    input, weight, bias, dilation, groups = arguments

    def convolve(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return reference.dilated_conv2d(DilatedConv2d(input, weight, bias, dilation, groups))

    if _needs_channel_blocks(input, weight, groups):
        output = _sum_of_blocks(convolve, input, weight, bias).to(input.dtype)
    else:
        output = convolve(channels_last(input), weight, bias)
    return in_format_of(output, input)


@register_kernel("dilated_conv2d_backward", "cpu")
def dilated_conv2d_backward(arguments: DilatedConv2dBackward) -> tuple[Tensor, Tensor, Tensor]:
    grad_output, input, *_ = arguments
    grad_input, grad_weight, grad_bias = reference.dilated_conv2d_backward(
        arguments._replace(grad_output=channels_last(grad_output), input=channels_last(input))
    )
    if arguments.output_mask[0]:
        grad_input = in_format_of(grad_input, input)
    return grad_input, grad_weight, grad_bias


@register_kernel("parallel_dilated_conv2d", "cpu")
def parallel_dilated_conv2d(arguments: ParallelDilatedConv2d) -> Tensor:
    input, weights, biases, dilations = arguments
    channels = [weight.size(0) for weight in weights]
    output = empty_like_format(input, (input.size(0), sum(channels), *input.shape[2:]))
    input = channels_last(input)
    optional: Sequence[Tensor | None] = biases or [None] * len(weights)
    for slice, weight, bias, dilation in zip(
        output.split(channels, dim=1), weights, optional, dilations
    ):
        slice.copy_(dilated_conv2d(DilatedConv2d(input, weight, bias, (dilation, dilation), 1)))
    return output


@register_kernel("parallel_dilated_conv2d_and_mean", "cpu")
def parallel_dilated_conv2d_and_mean(
    arguments: ParallelDilatedConv2dAndMean,
) -> tuple[Tensor, Tensor]:
    return parallel_dilated_conv2d(arguments.branches()), mean_of_pixels(arguments.input)


@register_kernel("parallel_dilated_conv2d_backward", "cpu")
def parallel_dilated_conv2d_backward(
    arguments: ParallelDilatedConv2dBackward,
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    grad_output, input, *_ = arguments
    grad_input, grad_weights, grad_biases = reference.parallel_dilated_conv2d_backward(
        arguments._replace(grad_output=channels_last(grad_output), input=channels_last(input))
    )
    if arguments.output_mask[0]:
        grad_input = in_format_of(grad_input, input)
    return grad_input, grad_weights, grad_biases


def _unsupported_by_onednn(arguments: FusedConv2d | FusedConv2dAdd | Aspp) -> str | None:
    input = arguments.input
    if not torch.backends.mkldnn.is_available():
        return "this torch was built without oneDNN"
    supported = (
        input.dtype == torch.float32
        or (input.dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())
        or (input.dtype == torch.float16 and torch.ops.mkldnn._is_mkldnn_fp16_supported())
    )
    if not supported:
        return f"oneDNN has no {input.dtype} convolution on this CPU"
    return "the input is empty" if input.numel() == 0 else None


# oneDNN's names and scalar arguments of the activations, which it applies while a tile is in cache.
# The activations may turn NaN into 0, as in models that torch.compile fuses; InferenceModel
# compensates for this.
_ACTIVATIONS = {"none": ("none", []), "relu": ("relu", []), "relu6": ("hardtanh", [0.0, 6.0])}


@register_kernel("fused_conv2d", "cpu", unsupported_reason=_unsupported_by_onednn)
def fused_conv2d(arguments: FusedConv2d) -> Tensor:
    input, weight, bias, stride, padding, dilation, groups, activation = arguments
    bias = bias.contiguous()  # oneDNN gets its address, without strides
    if _is_faster_unfused(arguments):
        x, w = channels_last(input), channels_last(weight)
        output = torch.conv2d(x, w, bias, stride, padding, dilation, groups)
        return in_format_of(_activate_(output, activation), input)

    def convolve(*operands: Any, activation: str = "none") -> Tensor:
        output: Tensor = torch.ops.mkldnn._convolution_pointwise(
            *operands, padding, stride, dilation, groups, *_ACTIVATIONS[activation], ""
        )
        return output

    if _needs_channel_blocks(input, weight, groups):
        output = _activate_(_sum_of_blocks(convolve, input, weight, bias), activation)
    else:
        operands = channels_last(input), channels_last(weight), bias
        output = convolve(*operands, activation=activation)
    return in_format_of(output.to(input.dtype), input)


# Torch takes 40 to 140 us longer to call the fused dense convolution than the plain one (AMD EPYC,
# fp32). In this time it applies an activation to as many values.
_MAX_SMALL_OUTPUT = 2**17


def _is_faster_unfused(arguments: FusedConv2d) -> bool:
    input, weight, _, (vertical, horizontal), *_, groups, activation = arguments
    if groups > 1 or _needs_channel_blocks(input, weight, groups):
        return False
    N, _, H, W = input.shape
    size = N * weight.size(0) * H * W // (vertical * horizontal)
    return activation == "none" or size <= _MAX_SMALL_OUTPUT


def _activate_(tensor: Tensor, activation: str) -> Tensor:
    if activation == "none":
        return tensor
    return tensor.relu_() if activation == "relu" else F.relu6(tensor, inplace=True)


@register_kernel("fused_conv2d_add_", "cpu", unsupported_reason=_unsupported_by_onednn)
def fused_conv2d_add_(arguments: FusedConv2dAdd) -> None:
    residual, input, weight, bias, stride, padding, dilation, groups, activation = arguments
    is_channels_last = residual.is_contiguous(memory_format=torch.channels_last)
    is_small = _is_faster_unfused(arguments.convolution()._replace(activation=activation))
    is_fusable = activation == "relu" and residual.dtype == torch.float32 and not is_small
    if is_fusable and is_channels_last:
        operands = channels_last(input), channels_last(weight), bias.contiguous()
        torch.ops.mkldnn._convolution_pointwise_.binary(
            residual, *operands, padding, stride, dilation, groups, "add", 1.0, "relu", [], None
        )
        return
    # For other cases torch has no fused sum that supports every dtype and number of groups.
    residual += fused_conv2d(arguments.convolution())
    _activate_(residual, activation)


@register_kernel("aspp", "cpu", unsupported_reason=_unsupported_by_onednn)
def aspp(arguments: Aspp) -> Tensor:
    input, weights, biases, dilations, pool_weight, pool_bias, project_weight, project_bias = (
        arguments
    )
    x = channels_last(input)
    channels = [weight.size(0) for weight in weights]
    branches = empty_like_format(x, (x.size(0), sum(channels), *x.shape[2:]))
    for slice, weight, bias, dilation in zip(
        branches.split(channels, dim=1), weights, biases, dilations
    ):
        pair = dilation, dilation
        padding = reference.same_padding(weight, pair)
        output = fused_conv2d(FusedConv2d(x, weight, bias, (1, 1), padding, pair, 1, "none"))
        torch.clamp(output, min=0, out=slice)  # keeps NaN; a copy is needed anyway
    # The pooled branch is constant over an image, so it adds a bias per image to the projection.
    pooled = F.linear(x.mean((2, 3)), pool_weight.flatten(1), pool_bias).relu_()
    branch_weight, pooled_weight = project_weight.split([sum(channels), pooled.size(1)], dim=1)
    image_bias = F.linear(pooled, pooled_weight.flatten(1), project_bias)
    output = F.conv2d(branches, branch_weight).add_(image_bias[:, :, None, None]).relu_()
    return in_format_of(output, input)


@register_kernel("upsample_argmax", "cpu")
def upsample_argmax(arguments: UpsampleArgmax) -> Tensor:
    logits, size, scale_factors, align_corners, dtype = arguments
    if logits.dtype not in DTYPES:
        logits = logits.float()
    labels = logits.new_empty((logits.size(0), *size), dtype=dtype)
    _C.cpu.upsample_argmax_fwd(
        labels.data_ptr(),
        logits.data_ptr(),
        upsample_shape(logits, size, scale_factors, align_corners),
        DTYPES[dtype],
        DTYPES[logits.dtype],
        torch.get_num_threads(),
    )
    return labels


@register_kernel("upsample_cross_entropy", "cpu")
def upsample_cross_entropy(arguments: UpsampleCrossEntropy) -> tuple[Tensor, Tensor, Tensor]:
    logits, target, weight, ignore_index, reduction, label_smoothing, align_corners = arguments
    logits, target = logits.float(), target.contiguous()
    weight = None if weight is None else weight.float().contiguous()
    log_sum_exp = torch.empty(target.shape)
    pixel_losses = torch.empty(target.shape) if reduction == "none" else None
    loss_sum, weight_sum, bad_pixel = _C.cpu.upsample_cross_entropy_fwd(
        0 if pixel_losses is None else pixel_losses.data_ptr(),
        log_sum_exp.data_ptr(),
        logits.data_ptr(),
        target.data_ptr(),
        upsample_shape(logits, target.shape[1:], None, align_corners),
        cross_entropy_params(weight, ignore_index, label_smoothing),
        torch.get_num_threads(),
    )
    if bad_pixel >= 0:
        value = int(target.view(-1)[bad_pixel])
        raise bad_target(value, logits.size(1), ignore_index)
    loss, total_weight = torch.tensor([loss_sum, weight_sum], dtype=torch.float64)
    if reduction == "mean":
        loss = loss / total_weight
    return (
        loss.float() if pixel_losses is None else pixel_losses, log_sum_exp, total_weight.float()
    )  # fmt: skip


@register_kernel("upsample_cross_entropy_backward", "cpu")
def upsample_cross_entropy_backward(arguments: UpsampleCrossEntropyBackward) -> Tensor:
    (
        grad_loss, logits, target, weight, log_sum_exp, total_weight,
        ignore_index, reduction, label_smoothing, align_corners,
    ) = arguments  # fmt: skip
    if reduction == "mean":
        grad_loss = grad_loss / total_weight
    grad_loss = grad_loss.expand(target.shape)
    grad_logits = torch.empty(logits.shape)
    logits32, target = logits.float(), target.contiguous()
    weight = None if weight is None else weight.float().contiguous()
    log_sum_exp = log_sum_exp.contiguous()
    _C.cpu.upsample_cross_entropy_bwd(
        grad_logits.data_ptr(),
        grad_loss.data_ptr(),
        grad_loss.stride(),
        log_sum_exp.data_ptr(),
        logits32.data_ptr(),
        target.data_ptr(),
        upsample_shape(logits32, target.shape[1:], None, align_corners),
        cross_entropy_params(weight, ignore_index, label_smoothing),
        torch.get_num_threads(),
    )
    return in_format_of(grad_logits.to(logits.dtype), logits)
