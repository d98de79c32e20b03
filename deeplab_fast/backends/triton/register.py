"""The ``triton`` backend: kernels that Triton compiles on the machine, for NVIDIA and AMD GPUs.

Triton is imported when the first kernel runs. Under its interpreter (TRITON_INTERPRET=1 in the
environment before Python starts) the kernels take CPU tensors instead, very slowly: for tests.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from ...ops._register import in_format_of
from ...ops.fused_conv2d import geometry_refused
from .. import reference
from ..cuda.dilated_conv2d import MAX_TAPS
from ..registry import availability, implements

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_DISTRIBUTIONS = "triton", "pytorch-triton", "pytorch-triton-rocm"
_OLDEST_TRITON = (3, 6)
_OLDEST_CAPABILITY = (8, 0)
_INTERPRETED = os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")


@availability("triton")
def _unavailable(device_type: str) -> str | None:
    if reason := _installation_problem():
        return reason
    if device_type == "cpu":
        if not _INTERPRETED:
            return "the tensors are on cpu and Triton's interpreter is off"
        return _interpreter_problem()
    if device_type != "cuda":
        return f"the tensors are on {device_type}"
    return _problem()


def _installed(*names: str) -> str | None:
    """The version of the first of these distributions that is there."""
    for name in names:
        with contextlib.suppress(PackageNotFoundError):
            return version(name)
    return None


def _is_older(found: str | None, than: tuple[int, int]) -> bool:
    return found is not None and tuple(map(int, found.split(".")[:2])) < than


@functools.cache
def _installation_problem() -> str | None:
    """Without importing Triton, which takes long."""
    if find_spec("triton") is None:
        return "Triton is not installed"
    found = _installed(*_DISTRIBUTIONS)
    if _is_older(found, _OLDEST_TRITON):
        return "needs Triton {}.{}, {} is installed".format(*_OLDEST_TRITON, found)
    return None


@functools.cache
def _interpreter_problem() -> str | None:
    """NumPy 2.4 made an error of int(array of one element), which Triton 3.6 takes for a range."""
    triton, numpy = _installed(*_DISTRIBUTIONS), _installed("numpy")
    if _is_older(triton, (3, 7)) and not _is_older(numpy, (2, 4)):
        return f"the interpreter of Triton {triton} needs NumPy before 2.4, {numpy} is installed"
    return None


@functools.cache
def _problem() -> str | None:
    """Why Triton cannot compile for this machine's GPUs; None if it can."""
    if _INTERPRETED:
        return "TRITON_INTERPRET is set: Triton's interpreter takes CPU tensors"
    if not torch.cuda.is_available():
        return "there is no GPU that torch can use"
    if torch.version.hip:
        return None
    oldest = min(torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count()))
    if oldest < _OLDEST_CAPABILITY:
        return "needs compute capability {}.{}, a GPU here has {}.{}".format(
            *_OLDEST_CAPABILITY, *oldest
        )
    return None


def _widened(*args: Any) -> Any:
    """bf16 tensors in fp32 for the interpreter, which truncates where it should round to bf16."""
    if not _INTERPRETED:
        return args
    return tree_map_only(Tensor, lambda t: t.float() if t.dtype == torch.bfloat16 else t, args)


_MAX_CLASSES = 65535  # of a gradient; CUDA's limit of a grid's second dimension
_MAX_INDEX = 2**31 - 4096  # indices of pixels and classes are int32, and the last block runs over


def _refuses_upsampling(logits: Tensor, out_pixels: int) -> str | None:
    if max(*logits.shape[1:], out_pixels) > _MAX_INDEX:
        return "the kernel takes fewer than 2^31 classes, rows, columns and pixels of an image"
    return None


def _refuses_argmax(logits: Tensor, size: Sequence[int], *args: Any) -> str | None:
    return _refuses_upsampling(logits, size[0] * size[1])


@implements("upsample_argmax", "triton", _refuses_argmax)
def upsample_argmax(logits: Tensor, *args: Any) -> Tensor:
    from .upsample_argmax import upsample_argmax

    if logits.dtype not in _DTYPES:
        logits = logits.float()
    (logits,) = _widened(logits)
    with torch.cuda.device_of(logits):
        return upsample_argmax(logits, *args)


def _refuses_loss(logits: Tensor, target: Tensor, *args: Any) -> str | None:
    return _refuses_upsampling(logits, target.size(1) * target.size(2))


def _refuses_loss_gradient(grad_loss: Tensor, logits: Tensor, *args: Any) -> str | None:
    if logits.size(1) > _MAX_CLASSES:
        return f"the kernel takes at most {_MAX_CLASSES} classes"
    return _refuses_loss(logits, *args)


@implements("upsample_cross_entropy", "triton", _refuses_loss)
def upsample_cross_entropy(
    logits: Tensor, target: Tensor, weight: Tensor | None, ignore_index: int, *options: Any
) -> tuple[Tensor, Tensor, Tensor]:
    from .upsample_cross_entropy import upsample_cross_entropy

    classes = logits.size(1)
    if logits.device.type == "cpu":
        unknown = (target != ignore_index) & ((target < 0) | (target >= classes))
        if unknown.any():
            raise reference.bad_target(int(target[unknown][0]), classes, ignore_index)
    if logits.dtype not in _DTYPES:
        logits = logits.float()
    logits, target, weight = _widened(logits, target, weight)
    with torch.cuda.device_of(logits):
        return upsample_cross_entropy(logits, target, weight, ignore_index, *options)


@implements("upsample_cross_entropy_backward", "triton", _refuses_loss_gradient)
def upsample_cross_entropy_backward(grad_loss: Tensor, logits: Tensor, *args: Any) -> Tensor:
    from .upsample_cross_entropy import upsample_cross_entropy_backward

    narrow = logits if logits.dtype in _DTYPES else logits.float()
    with torch.cuda.device_of(logits):
        grad = upsample_cross_entropy_backward(*_widened(grad_loss, narrow, *args))
    return in_format_of(grad.to(logits.dtype), logits)


def _is_depthwise(input: Tensor, weight: Tensor, groups: int) -> bool:
    return groups == input.size(1) > 1 and weight.size(1) == 1


def _refuses_convolution(input: Tensor, weights: Sequence[Tensor], groups: int = 1) -> str | None:
    """Why the kernels cannot compute these branches, or None."""
    if input.dtype not in _DTYPES:
        return f"the kernel takes float32, float16 and bfloat16, not {input.dtype}"
    if groups != 1 and not _is_depthwise(input, weights[0], groups):
        return f"the kernels take one group or one for each input channel, got {groups}"
    if input.numel() == 0 or any(weight.numel() == 0 for weight in weights):
        return "the input or a weight is empty"
    if sum(weight.size(2) * weight.size(3) for weight in weights) > MAX_TAPS:
        return f"the kernel takes at most {MAX_TAPS} taps"
    if len(weights) * input.numel() // input.size(1) > _MAX_INDEX:
        return "the work list holds fewer than 2^31 pixels, those of all branches together"
    return None


def _refuses_one(
    input: Tensor, weight: Tensor, bias: Any, dilation: Any, groups: int
) -> str | None:
    return _refuses_convolution(input, [weight], groups)


def _refuses_one_backward(
    grad_output: Any, input: Tensor, weight: Tensor, dilation: Any, groups: int, mask: Any
) -> str | None:
    return _refuses_convolution(input, [weight], groups)


def _refuses_parallel(input: Tensor, weights: Sequence[Tensor], *args: Any) -> str | None:
    return _refuses_convolution(input, weights)


def _refuses_parallel_backward(
    grad_output: Any, input: Tensor, weights: Sequence[Tensor], *args: Any
) -> str | None:
    return _refuses_convolution(input, weights)


def _pairs(dilations: Sequence[int]) -> list[tuple[int, int]]:
    return [(rate, rate) for rate in dilations]


def _convolve(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    dilation: Sequence[int],
    groups: int,
    residual: Tensor | None = None,
    activation: str = "none",
) -> Tensor:
    """In channels_last; ``residual``, in channels_last, is written over and returned."""
    from . import depthwise_conv2d, dilated_conv2d

    if groups > 1:
        return depthwise_conv2d.depthwise_conv2d(
            input, weight, bias, dilation, residual, activation
        )
    return dilated_conv2d.dilated_conv2d(input, [weight], [bias], [dilation], residual, activation)


@implements("dilated_conv2d", "triton", _refuses_one)
def dilated_conv2d(input: Tensor, *args: Any) -> Tensor:
    with torch.cuda.device_of(input):
        output = _convolve(*_widened(input, *args))
    return in_format_of(output.to(input.dtype), input)


@implements("dilated_conv2d_backward", "triton", _refuses_one_backward)
def dilated_conv2d_backward(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor,
    dilation: Sequence[int],
    groups: int,
    output_mask: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    from . import depthwise_conv2d

    if groups == 1:
        grad_input, *grads = _parallel_backward(
            grad_output, input, [weight], [dilation], output_mask
        )
        grad_weight, grad_bias = (grad[0] if grad else input.new_empty(0) for grad in grads)
        return grad_input, grad_weight, grad_bias
    grad_input = grad_weight = grad_bias = input.new_empty(0)
    grad, x, w = _widened(grad_output, input, weight)
    with torch.cuda.device_of(input):
        if output_mask[0]:
            grad_input = depthwise_conv2d.depthwise_input_gradient(grad, w, dilation, x.size(1))
            grad_input = in_format_of(grad_input.to(input.dtype), input)
        if output_mask[1]:
            grad_weight = depthwise_conv2d.depthwise_weight_gradient(grad, x, w, dilation)
            grad_weight = in_format_of(grad_weight.to(weight.dtype), weight)
        if output_mask[2]:
            grad_bias = _bias_gradient(grad_output)
    return grad_input, grad_weight, grad_bias


@implements("parallel_dilated_conv2d", "triton", _refuses_parallel)
def parallel_dilated_conv2d(
    input: Tensor, weights: list[Tensor], biases: list[Tensor], dilations: list[int]
) -> Tensor:
    from .dilated_conv2d import dilated_conv2d

    args = _widened(input, list(weights), list(biases), _pairs(dilations))
    with torch.cuda.device_of(input):
        output = dilated_conv2d(*args)
    return in_format_of(output.to(input.dtype), input)


@implements("parallel_dilated_conv2d_and_mean", "triton", _refuses_parallel)
def parallel_dilated_conv2d_and_mean(
    input: Tensor, weights: list[Tensor], dilations: list[int]
) -> tuple[Tensor, Tensor]:
    output = parallel_dilated_conv2d(input, weights, [], dilations)
    return output, reference.mean_of_pixels(input)


@implements("parallel_dilated_conv2d_backward", "triton", _refuses_parallel_backward)
def parallel_dilated_conv2d_backward(
    grad_output: Tensor,
    input: Tensor,
    weights: list[Tensor],
    dilations: list[int],
    output_mask: list[bool],
    grad_mean: Tensor | None = None,
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    rates = _pairs(dilations)
    return _parallel_backward(grad_output, input, weights, rates, output_mask, grad_mean)


def _parallel_backward(
    grad_output: Tensor,
    input: Tensor,
    weights: Sequence[Tensor],
    dilations: Sequence[Sequence[int]],
    output_mask: Sequence[bool],
    grad_mean: Tensor | None = None,
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    from .dilated_conv2d import input_gradient, weight_gradients

    grad, x, ws = _widened(grad_output, input, list(weights))
    grad_input, grad_weights, grad_biases = input.new_empty(0), [], []
    with torch.cuda.device_of(input):
        if output_mask[0]:
            share = None if grad_mean is None else reference.share_of_pixel(grad_mean, input)
            grad_input = input_gradient(grad, ws, dilations, share).to(input.dtype)
            grad_input = in_format_of(grad_input, input)
        if output_mask[1]:
            grads = weight_gradients(grad, x, ws, dilations)
            grad_weights = [in_format_of(g.to(w.dtype), w) for g, w in zip(grads, weights)]
        if output_mask[2]:
            channels = [weight.size(0) for weight in weights]
            grad_biases = [g.clone() for g in _bias_gradient(grad_output).split(channels)]
    return grad_input, grad_weights, grad_biases


def _bias_gradient(grad_output: Tensor) -> Tensor:
    return grad_output.sum((0, 2, 3), dtype=torch.float32).to(grad_output.dtype)


def _refuses_fused(
    input: Tensor,
    weight: Tensor,
    bias: Any,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    activation: Any,
) -> str | None:
    return geometry_refused(weight, stride, padding, dilation) or _refuses_convolution(
        input, [weight], groups
    )


@implements("fused_conv2d", "triton", _refuses_fused)
def fused_conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor,
    stride: Any,
    padding: Any,
    dilation: Sequence[int],
    groups: int,
    activation: str,
) -> Tensor:
    args = _widened(input, weight, bias, dilation, groups, None, activation)
    with torch.cuda.device_of(input):
        output = _convolve(*args)
    return in_format_of(output.to(input.dtype), input)


def _refuses_fused_add(residual: Tensor, input: Tensor, weight: Tensor, *args: Any) -> str | None:
    if residual.shape != (input.size(0), weight.size(0), *input.shape[2:]):
        return "the residual has not the shape of the output"
    return _refuses_fused(input, weight, *args)


@implements("fused_conv2d_add_", "triton", _refuses_fused_add)
def fused_conv2d_add_(
    residual: Tensor,
    input: Tensor,
    weight: Tensor,
    bias: Tensor,
    stride: Any,
    padding: Any,
    dilation: Sequence[int],
    groups: int,
    activation: str,
) -> None:
    sums = residual.contiguous(memory_format=torch.channels_last)
    if input.untyped_storage().data_ptr() == sums.untyped_storage().data_ptr():
        input = input.clone()  # which is read while the residual is written
    args = _widened(input, weight, bias, dilation, groups, sums, activation)
    with torch.cuda.device_of(input):
        output = _convolve(*args)
    if output is not residual:
        residual.copy_(output)


def _refuses_aspp(
    input: Tensor, weights: Sequence[Tensor], biases: Any, dilations: Any, pool: Tensor, *args: Any
) -> str | None:
    return _refuses_convolution(input, [*weights, pool, args[1]])


@implements("aspp", "triton", _refuses_aspp)
def aspp(input: Tensor, *args: Any) -> Tensor:
    from .aspp import aspp

    with torch.cuda.device_of(input):
        output = aspp(*_widened(input, *args))
    return in_format_of(output.to(input.dtype), input)
