"""The ``cpu`` backend: hand-written kernels in ``_C.cpu``, and oneDNN through torch.

oneDNN runs a convolution near the peak of the machine and skips padded taps itself, so the
convolutions here only bring their operands into its best layout, channels_last, and into as many
channels at a time as it does well.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import _C
from .._native.common import DTYPES
from .._native.upsample_shape import upsample_shape
from ..ops._register import empty_like_format, in_format_of
from . import reference
from .registry import availability, implements


@availability("cpu")
def _unavailable(device_type: str) -> str | None:
    return None if device_type == "cpu" else f"the tensors are on {device_type}"


def _channels_last(tensor: Tensor) -> Tensor:
    return tensor.contiguous(memory_format=torch.channels_last)


# Of half precision: with the 2048 of ASPP's input at once oneDNN 3 takes far longer on AMX.
_MAX_CHANNELS = 512


def _wants_blocks(input: Tensor, weight: Tensor, groups: int) -> bool:
    is_pointwise = tuple(weight.shape[2:]) == (1, 1)
    is_half = input.dtype in (torch.bfloat16, torch.float16)
    return is_half and not is_pointwise and groups == 1 and input.size(1) > _MAX_CHANNELS


def _sum_of_blocks(
    convolve: Callable[..., Tensor], input: Tensor, weight: Tensor, bias: Tensor | None
) -> Tensor:
    """``convolve(input, weight, bias)`` in float32 as a sum over blocks of input channels."""
    (input, weight), *blocks = (
        (_channels_last(x), _channels_last(w))
        for x, w in zip(input.split(_MAX_CHANNELS, dim=1), weight.split(_MAX_CHANNELS, dim=1))
    )
    total = convolve(input, weight, bias).float()
    for input, weight in blocks:
        total += convolve(input, weight, None)
    return total


@implements("dilated_conv2d", "cpu")
def dilated_conv2d(
    input: Tensor, weight: Tensor, bias: Tensor | None, dilation: Sequence[int], groups: int
) -> Tensor:
    def convolve(*operands: Any) -> Tensor:
        return reference.dilated_conv2d(*operands, dilation, groups)

    if _wants_blocks(input, weight, groups):
        output = _sum_of_blocks(convolve, input, weight, bias).to(input.dtype)
    else:
        output = convolve(_channels_last(input), weight, bias)
    return in_format_of(output, input)


@implements("dilated_conv2d_backward", "cpu")
def dilated_conv2d_backward(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor,
    dilation: Sequence[int],
    groups: int,
    output_mask: Sequence[bool],
) -> tuple[Any, ...]:
    grad_input, *others = reference.dilated_conv2d_backward(
        _channels_last(grad_output), _channels_last(input), weight, dilation, groups, output_mask
    )
    return in_format_of(grad_input, input) if output_mask[0] else grad_input, *others


@implements("parallel_dilated_conv2d", "cpu")
def parallel_dilated_conv2d(
    input: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor], dilations: Sequence[int]
) -> Tensor:
    channels = [weight.size(0) for weight in weights]
    output = empty_like_format(input, (input.size(0), sum(channels), *input.shape[2:]))
    input = _channels_last(input)
    optional: Sequence[Tensor | None] = biases or [None] * len(weights)
    for slice, weight, bias, dilation in zip(
        output.split(channels, dim=1), weights, optional, dilations
    ):
        slice.copy_(dilated_conv2d(input, weight, bias, (dilation, dilation), 1))
    return output


@implements("parallel_dilated_conv2d_and_mean", "cpu")
def parallel_dilated_conv2d_and_mean(
    input: Tensor, weights: Sequence[Tensor], dilations: Sequence[int]
) -> tuple[Tensor, Tensor]:
    output = parallel_dilated_conv2d(input, weights, [], dilations)
    return output, reference.mean_of_pixels(input)


@implements("parallel_dilated_conv2d_backward", "cpu")
def parallel_dilated_conv2d_backward(
    grad_output: Tensor,
    input: Tensor,
    weights: Sequence[Tensor],
    dilations: Sequence[int],
    output_mask: Sequence[bool],
    grad_mean: Tensor | None = None,
) -> tuple[Any, ...]:
    grad_input, *others = reference.parallel_dilated_conv2d_backward(
        _channels_last(grad_output), _channels_last(input), weights, dilations, output_mask,
        grad_mean,
    )  # fmt: skip
    return in_format_of(grad_input, input) if output_mask[0] else grad_input, *others


def _onednn_refuses(input: Tensor, *args: Any) -> str | None:
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


# oneDNN's names and scalar arguments of the activations it applies while a tile is in cache. They
# may make 0 of NaN, as in models that torch.compile fuses; InferenceModel makes up for it.
_ACTIVATIONS = {"none": ("none", []), "relu": ("relu", []), "relu6": ("hardtanh", [0.0, 6.0])}


@implements("fused_conv2d", "cpu", refuses=_onednn_refuses)
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
    bias = bias.contiguous()  # oneDNN is given its address alone

    def convolve(*operands: Any, activation: str = "none") -> Tensor:
        return torch.ops.mkldnn._convolution_pointwise(
            *operands, padding, stride, dilation, groups, *_ACTIVATIONS[activation], ""
        )

    if _wants_blocks(input, weight, groups):
        output = _activate_(_sum_of_blocks(convolve, input, weight, bias), activation)
    else:
        operands = _channels_last(input), _channels_last(weight), bias
        output = convolve(*operands, activation=activation)
    return in_format_of(output.to(input.dtype), input)


def _activate_(tensor: Tensor, activation: str) -> Tensor:
    if activation == "none":
        return tensor
    return tensor.relu_() if activation == "relu" else F.relu6(tensor, inplace=True)


@implements("fused_conv2d_add_", "cpu", refuses=lambda residual, *args: _onednn_refuses(*args))
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
    channels_last = residual.is_contiguous(memory_format=torch.channels_last)
    if activation == "relu" and residual.dtype == torch.float32 and channels_last:
        operands = _channels_last(input), _channels_last(weight), bias.contiguous()
        torch.ops.mkldnn._convolution_pointwise_.binary(
            residual, *operands, padding, stride, dilation, groups, "add", 1.0, "relu", [], None
        )
        return
    # torch fuses no other sum for every dtype and number of groups.
    residual += fused_conv2d(input, weight, bias, stride, padding, dilation, groups, "none")
    _activate_(residual, activation)


@implements("aspp", "cpu", refuses=_onednn_refuses)
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
    x = _channels_last(input)
    channels = [weight.size(0) for weight in weights]
    branches = empty_like_format(x, (x.size(0), sum(channels), *x.shape[2:]))
    for slice, weight, bias, dilation in zip(
        branches.split(channels, dim=1), weights, biases, dilations
    ):
        rate = dilation, dilation
        padding = reference.same_padding(weight, rate)
        output = fused_conv2d(x, weight, bias, (1, 1), padding, rate, 1, "none")
        torch.clamp(output, min=0, out=slice)  # keeps NaN, and has to be copied anyway
    # The pooled branch is constant over space, so its share of the projection is a bias per image.
    pooled = F.linear(x.mean((2, 3)), pool_weight.flatten(1), pool_bias).relu_()
    branch_weight, pooled_weight = project_weight.split([sum(channels), pooled.size(1)], dim=1)
    image_bias = F.linear(pooled, pooled_weight.flatten(1), project_bias)
    output = F.conv2d(branches, branch_weight).add_(image_bias[:, :, None, None]).relu_()
    return in_format_of(output, input)


@implements("upsample_argmax", "cpu")
def upsample_argmax(
    logits: Tensor,
    size: Sequence[int],
    scale_factors: Sequence[float] | None,
    align_corners: bool,
    dtype: torch.dtype,
) -> Tensor:
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


def _cross_entropy_arguments(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    align_corners: bool,
) -> tuple[Any, ...]:
    return (
        logits.data_ptr(),
        target.data_ptr(),
        upsample_shape(logits, target.shape[1:], None, align_corners),
        _C.CrossEntropyParams(
            0 if weight is None else weight.data_ptr(), ignore_index, label_smoothing
        ),
        torch.get_num_threads(),
    )


@implements("upsample_cross_entropy", "cpu")
def upsample_cross_entropy(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    reduction: str,
    label_smoothing: float,
    align_corners: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    logits, target = logits.float(), target.contiguous()
    weight = None if weight is None else weight.float().contiguous()
    log_sum_exp = torch.empty(target.shape)
    pixel_losses = torch.empty(target.shape) if reduction == "none" else None
    loss_sum, weight_sum, bad_pixel = _C.cpu.upsample_cross_entropy_fwd(
        0 if pixel_losses is None else pixel_losses.data_ptr(),
        log_sum_exp.data_ptr(),
        *_cross_entropy_arguments(
            logits, target, weight, ignore_index, label_smoothing, align_corners
        ),
    )
    if bad_pixel >= 0:
        value = int(target.view(-1)[bad_pixel])
        raise reference.bad_target(value, logits.size(1), ignore_index)
    loss, total_weight = torch.tensor([loss_sum, weight_sum], dtype=torch.float64)
    if reduction == "mean":
        loss = loss / total_weight
    return (
        loss.float() if pixel_losses is None else pixel_losses, log_sum_exp, total_weight.float()
    )  # fmt: skip


@implements("upsample_cross_entropy_backward", "cpu")
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
        *_cross_entropy_arguments(
            logits32, target, weight, ignore_index, label_smoothing, align_corners
        ),
    )
    return in_format_of(grad_logits.to(logits.dtype), logits)
