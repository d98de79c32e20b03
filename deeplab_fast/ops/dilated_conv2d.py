"""Atrous (dilated) convolution with 'same' padding: a single one, or several over one input."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .._native.memory_format import empty_like_format
from ..backends import registry
from ..backends.arguments import (
    DilatedConv2d,
    DilatedConv2dBackward,
    ParallelDilatedConv2d,
    ParallelDilatedConv2dAndMean,
    ParallelDilatedConv2dBackward,
)
from ._arguments import INT64_MAX, check_tensor, int_list, integer, positive_pair, tensor_list
from ._register import autocast, define, differentiable, not_differentiable
from .shape_bucket import shape_bucket

_NO_DOUBLE_BACKWARD = "there is no double backward; F.conv2d has one"


def dilated_conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    dilation: int | tuple[int, int] = 1,
    groups: int = 1,
) -> Tensor:
    """Atrous convolution with stride 1 and zero padding that keeps the size ("same").

    Equals ``F.conv2d(input, weight, bias, padding="same", dilation=dilation, groups=groups)``
    (Chen et al., "Rethinking Atrous Convolution for Semantic Image Segmentation", 2017, section
    3.1), with one exception: if weights are Inf or NaN, F.conv2d gives NaN at the border, from
    ``0 * inf``; kernels that skip the taps on padding do not. On a GPU fp32 operands are rounded to
    TF32 if ``torch.backends.cudnn`` allows it, as in F.conv2d.

    Args:
        input: [N, C, H, W] in any memory format, which is kept; channels_last is the fastest.
        weight: [K, C / groups, R, S] with odd R and S, in the dtype of ``input``.
        bias: [K] or None.
        dilation: distance of the taps in pixels, one int or (vertical, horizontal).
        groups: number of channel blocks convolved separately; ``groups == C`` is depthwise.

    Returns:
        [N, K, H, W] in the dtype and memory format of ``input``. Differentiable once.

    Raises:
        ValueError: a shape, dilation or groups does not fit; the message names the argument.
        TypeError: dtypes differ (outside autocast), or an argument is of a wrong type.

    >>> x = torch.randn(1, 64, 65, 65)
    >>> y = dilated_conv2d(x, torch.randn(32, 64, 3, 3), dilation=12)
    """
    pair = positive_pair(dilation, "dilation", integer, "int")
    groups = integer(groups, "groups")
    check_tensor(input, "input")
    check_tensor(weight, "weight")
    if bias is not None:
        check_tensor(bias, "bias")
    input, weight, bias = autocast(input, weight, bias)
    return dilated_conv2d_op(input, weight, bias, pair, groups, backend=registry.current())


def parallel_dilated_conv2d(
    input: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor] | None,
    dilations: Sequence[int],
) -> Tensor:
    """Several atrous convolutions of one input, with their outputs concatenated along channels.

    Equals ``torch.cat([dilated_conv2d(input, w, b, d) for w, b, d in ...], dim=1)``: the parallel
    branches of ASPP (Chen et al. 2017, section 3.3).

    Args:
        input: [N, C, H, W] in any memory format, which is kept; channels_last is the fastest.
        weights: one [K_i, C, R_i, S_i] per branch, odd R_i and S_i.
        biases: one [K_i] per branch, or None.
        dilations: one dilation per branch.

    Returns:
        [N, sum(K_i), H, W] in the dtype and memory format of ``input``. Differentiable once.

    Raises:
        ValueError: lengths or shapes do not fit; the message names the argument.
        TypeError: dtypes differ (outside autocast), or an argument is of a wrong type.

    >>> x = torch.randn(1, 64, 65, 65)
    >>> w1, w3 = torch.randn(32, 64, 1, 1), torch.randn(32, 64, 3, 3)
    >>> y = parallel_dilated_conv2d(x, [w1, w3, w3], None, [1, 12, 24])
    """
    arguments = converted_branches(input, weights, biases, dilations)
    return parallel_dilated_conv2d_op(*arguments, backend=registry.current())


def converted_branches(
    input: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor] | None,
    dilations: Sequence[int],
) -> tuple[Tensor, list[Tensor], list[Tensor], list[int]]:
    """Arguments of the op, cast to the dtype of autocast if it is on."""
    check_tensor(input, "input")
    weights, dilations = tensor_list(weights, "weights"), dilation_list(dilations)
    biases = [] if biases is None else tensor_list(biases, "biases")
    input, *rest = autocast(input, *weights, *biases)
    return input, rest[: len(weights)], rest[len(weights) :], dilations


def _check(arguments: DilatedConv2d) -> None:
    input, weight, bias, _, groups = arguments
    check_convolution(input, weight, bias, groups)
    check_dtypes(input, weight, bias)


def _check_backward(arguments: DilatedConv2dBackward) -> None:
    grad_output, input, weight, _, groups, _ = arguments
    check_convolution(input, weight, None, groups)
    _check_grad_output(grad_output, input, weight.size(0))
    check_dtypes(input, grad_output, weight)


def _check_backward_of_branches(arguments: ParallelDilatedConv2dBackward) -> None:
    grad_output, input, weights, dilations, _, grad_mean = arguments
    check_branches(input, weights, [], dilations)
    _check_grad_output(grad_output, input, sum(weight.size(0) for weight in weights))
    check_dtypes(input, grad_output)
    if grad_mean is not None and grad_mean.shape != input.shape[:2]:
        raise ValueError(
            f"grad_mean: expected {tuple(input.shape[:2])}, got {tuple(grad_mean.shape)}"
        )


def _check_grad_output(grad_output: Tensor, input: Tensor, channels: int) -> None:
    expected = input.size(0), channels, *input.shape[2:]
    if grad_output.shape != expected:
        raise ValueError(f"grad_output: expected {expected}, got {tuple(grad_output.shape)}")


def check_branches(
    input: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor], dilations: Sequence[int]
) -> None:
    if not weights:
        raise ValueError("weights: expected at least one branch, got none")
    if len(dilations) != len(weights) or len(biases) not in (0, len(weights)):
        raise ValueError(
            "weights, dilations, biases: expected one dilation (and one bias) per weight, got "
            f"{len(weights)} weights, {len(dilations)} dilations, {len(biases)} biases"
        )
    optional: Sequence[Tensor | None] = biases or [None] * len(weights)
    for weight, bias in zip(weights, optional):
        check_convolution(input, weight, bias, 1)
    check_dtypes(input, *weights, *biases)


def dilation_list(dilations: Any) -> list[int]:
    checked = int_list(dilations, "dilations")
    if checked and not (0 < min(checked) and max(checked) <= INT64_MAX):
        raise ValueError(f"dilations: expected positive ints, got {checked}")
    return checked


def check_convolution(input: Tensor, weight: Tensor, bias: Tensor | None, groups: int) -> None:
    if input.dim() != 4:
        raise ValueError(f"input: expected [N, C, H, W], got shape {tuple(input.shape)}")
    shape = weight.shape
    if len(shape) != 4 or shape[2] % 2 == 0 or shape[3] % 2 == 0:
        raise ValueError(
            f"weight: expected [K, C / groups, R, S] with odd R and S, got {tuple(weight.shape)}"
        )
    if groups < 1 or shape[0] % groups or shape[1] * groups != input.size(1):
        raise ValueError(
            f"weight: expected [K, C / groups, R, S] with K divisible by groups for an input of "
            f"{input.size(1)} channels and groups={groups}, got {tuple(weight.shape)}"
        )
    if bias is not None and bias.shape != shape[:1]:
        raise ValueError(f"bias: expected shape ({weight.size(0)},), got {tuple(bias.shape)}")


def check_dtypes(input: Tensor, *others: Tensor | None) -> None:
    dtype, device = input.dtype, input.device
    for other in others:
        if other is None:
            continue
        if other.dtype != dtype:
            raise TypeError(f"weights and biases: expected {dtype}, got {other.dtype}")
        if other.device != device:
            raise ValueError(f"weights and biases: expected on {device}, got {other.device}")


def fake_output(input: Tensor, channels: int) -> Tensor:
    return empty_like_format(input, (input.size(0), channels, *input.shape[2:]))


def _fake(arguments: DilatedConv2d) -> Tensor:
    return fake_output(arguments.input, arguments.weight.size(0))


def _fake_backward(arguments: DilatedConv2dBackward) -> tuple[Tensor, ...]:
    input, weight, mask = arguments.input, arguments.weight, arguments.output_mask
    return (
        empty_like_format(input, tuple(input.shape)) if mask[0] else input.new_empty(0),
        empty_like_format(weight, tuple(weight.shape)) if mask[1] else input.new_empty(0),
        input.new_empty(weight.size(0) if mask[2] else 0),
    )


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    input, weight, bias, ctx.dilation, ctx.groups = inputs
    ctx.save_for_backward(input, weight)


def _backward(ctx: Any, grad_output: Tensor) -> tuple[Any, ...]:
    input, weight = ctx.saved_tensors
    mask = list(ctx.needs_input_grad[:3])
    grads = dilated_conv2d_backward_op(
        grad_output, input, weight, ctx.dilation, ctx.groups, mask, backend=ctx.backend
    )
    return *(grad if needed else None for grad, needed in zip(grads, mask)), None, None


def _jvp(arguments: Any, tangents: Any, output: Tensor, backend: str) -> Tensor:
    input, weight, _, dilation, groups = arguments
    t_input, t_weight, t_bias, *_ = tangents
    parts = []
    if t_input is not None:
        parts.append(dilated_conv2d_op(t_input, weight, None, dilation, groups, backend=backend))
    if t_weight is not None:
        parts.append(dilated_conv2d_op(input, t_weight, None, dilation, groups, backend=backend))
    if t_bias is not None:
        parts.append(t_bias[:, None, None].expand_as(output))
    return sum(parts[1:], parts[0])


def _image_arguments_backward(
    grad_output: Tensor, input: Tensor, weight: Tensor, dilation: Any, groups: Any, mask: Any
) -> tuple[int, ...]:
    return () if any(mask[1:]) else (0, 1)  # gradients of weights are sums over images


def _bucket(arguments: DilatedConv2d) -> str:
    input, weight, _, dilation, groups = arguments
    return shape_bucket(input, [weight], [dilation], groups)


def _bucket_backward(arguments: DilatedConv2dBackward) -> str:
    _, input, weight, dilation, groups, output_mask = arguments
    return shape_bucket(input, [weight], [dilation], groups, output_mask)


dilated_conv2d_op = define(
    "dilated_conv2d",
    DilatedConv2d,
    "(Tensor input, Tensor weight, Tensor? bias, int[] dilation, int groups) -> Tensor",
    _fake,
    _bucket,
    _check,
)
dilated_conv2d_backward_op = define(
    "dilated_conv2d_backward",
    DilatedConv2dBackward,
    "(Tensor grad_output, Tensor input, Tensor weight, int[] dilation, int groups, "
    "bool[] output_mask) -> (Tensor, Tensor, Tensor)",
    _fake_backward,
    _bucket_backward,
    _check_backward,
)
differentiable("dilated_conv2d", _backward, _setup, _jvp, lambda *args: (0,))
not_differentiable("dilated_conv2d_backward", _NO_DOUBLE_BACKWARD, _image_arguments_backward)


def bucket_of_branches(
    input: Tensor,
    weights: Sequence[Tensor],
    dilations: Sequence[int],
    output_mask: Sequence[bool] = (),
) -> str:
    pairs = [(dilation, dilation) for dilation in dilations]
    return shape_bucket(input, weights, pairs, output_mask=output_mask)


def _bucket_parallel(arguments: ParallelDilatedConv2d) -> str:
    return bucket_of_branches(arguments.input, arguments.weights, arguments.dilations)


def _bucket_parallel_backward(arguments: ParallelDilatedConv2dBackward) -> str:
    _, input, weights, dilations, output_mask, _ = arguments
    return bucket_of_branches(input, weights, dilations, output_mask)


def fake_branches(arguments: ParallelDilatedConv2d | ParallelDilatedConv2dAndMean) -> Tensor:
    return fake_output(arguments.input, sum(weight.size(0) for weight in arguments.weights))


def _fake_parallel_backward(arguments: ParallelDilatedConv2dBackward) -> tuple[Any, ...]:
    input, weights, mask = arguments.input, arguments.weights, arguments.output_mask
    return (
        empty_like_format(input, tuple(input.shape)) if mask[0] else input.new_empty(0),
        [empty_like_format(weight, tuple(weight.shape)) for weight in weights] if mask[1] else [],
        [input.new_empty(weight.size(0)) for weight in weights] if mask[2] else [],
    )


def _setup_parallel(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    input, weights, biases, ctx.dilations = inputs
    ctx.num_biases = len(biases)
    ctx.save_for_backward(input, *weights)


def _backward_parallel(ctx: Any, grad_output: Tensor) -> tuple[Any, ...]:
    input, *weights = ctx.saved_tensors
    needs_input, needs_weights, needs_biases, _ = ctx.needs_input_grad
    mask = [needs_input, any(needs_weights), any(needs_biases)]
    grad_input, grad_weights, grad_biases = parallel_dilated_conv2d_backward_op(
        grad_output, input, weights, ctx.dilations, mask, backend=ctx.backend
    )
    return (
        grad_input if mask[0] else None,
        grad_weights if mask[1] else [None] * len(weights),
        grad_biases if mask[2] else [None] * ctx.num_biases,
        None,
    )


def jvp_branches(arguments: Any, tangents: Any, output: Tensor, backend: str) -> Tensor:
    input, weights, biases, dilations = arguments
    t_input, t_weights, t_biases, _ = tangents
    parts = []
    if t_input is not None:
        parts.append(parallel_dilated_conv2d_op(t_input, weights, [], dilations, backend=backend))
    if any(t is not None for t in (*t_weights, *t_biases)):
        t_branches = or_zeros(t_weights, weights), or_zeros(t_biases, biases)
        parts.append(parallel_dilated_conv2d_op(input, *t_branches, dilations, backend=backend))
    return sum(parts[1:], parts[0])


def or_zeros(tangents: Sequence[Tensor | None], tensors: Sequence[Tensor]) -> list[Tensor]:
    return [torch.zeros_like(x) if t is None else t for t, x in zip(tangents, tensors)]


def _image_arguments_parallel_backward(
    grad_output: Tensor, input: Tensor, weights: Any, dilations: Any, mask: Any, *grad_mean: Any
) -> tuple[int, ...]:
    return () if any(mask[1:]) else (0, 1, 5)[: 2 + len(grad_mean)]


parallel_dilated_conv2d_op = define(
    "parallel_dilated_conv2d",
    ParallelDilatedConv2d,
    "(Tensor input, Tensor[] weights, Tensor[] biases, int[] dilations) -> Tensor",
    fake_branches,
    _bucket_parallel,
    lambda arguments: check_branches(*arguments),
)
parallel_dilated_conv2d_backward_op = define(
    "parallel_dilated_conv2d_backward",
    ParallelDilatedConv2dBackward,
    "(Tensor grad_output, Tensor input, Tensor[] weights, int[] dilations, bool[] output_mask, "
    "Tensor? grad_mean=None) -> (Tensor, Tensor[], Tensor[])",
    _fake_parallel_backward,
    _bucket_parallel_backward,
    _check_backward_of_branches,
)
differentiable(
    "parallel_dilated_conv2d",
    _backward_parallel,
    _setup_parallel,
    jvp_branches,
    lambda *args: (0,),
)
not_differentiable(
    "parallel_dilated_conv2d_backward", _NO_DOUBLE_BACKWARD, _image_arguments_parallel_backward
)
