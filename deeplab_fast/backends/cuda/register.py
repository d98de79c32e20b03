"""The ops that the CUDA kernels implement, for each module compiled from them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

from torch import Tensor

from ..._native.common import Kernels, aligned_nhwc
from ...ops.fused_conv2d import geometry_refused
from ..registry import implements
from . import (
    aspp,
    depthwise_conv2d,
    dilated_conv2d,
    dilated_conv2d_and_mean,
    dilated_conv2d_backward,
    upsample_argmax,
    upsample_cross_entropy,
)

KernelsOf = Callable[[Tensor], AbstractContextManager[Kernels]]


def implement(name: str, kernels_of: KernelsOf) -> None:
    """Enter all ops into the table as backend ``name``, on what ``kernels_of`` a tensor gives."""
    implement_convolutions(name, kernels_of)
    for op, run in _UPSAMPLING.items():
        implements(op, name)(_bound(run, kernels_of))


def implement_convolutions(name: str, kernels_of: KernelsOf) -> None:
    """The ops whose kernels for compute capabilities 8.0 and 9.0 differ."""
    for op, (run, refuses) in _CONVOLUTIONS.items():
        implements(op, name, refuses)(_bound(run, kernels_of))


def _bound(run: Callable[..., Any], kernels_of: KernelsOf) -> Callable[..., Any]:
    def bound(first: Tensor, *args: Any) -> Any:
        with kernels_of(first) as kernels:
            return run(kernels, first, *args)

    return bound


def _dilated_conv2d_refuses(
    input: Tensor, weight: Tensor, bias: Any, dilation: Any, groups: int
) -> str | None:
    if depthwise_conv2d.is_depthwise(input, weight, groups):
        return depthwise_conv2d.refuses(input, weight)
    return dilated_conv2d.refuses(input, [weight], groups)


def _dilated_conv2d(
    kernels: Kernels,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    if depthwise_conv2d.is_depthwise(input, weight, groups):
        return depthwise_conv2d.forward(kernels, input, weight, bias, dilation)
    return dilated_conv2d.forward(kernels, input, [weight], [bias], [dilation])


def _dilated_conv2d_backward_refuses(
    grad_output: Tensor, input: Tensor, weight: Tensor, dilation: Any, groups: int, mask: Any
) -> str | None:
    if depthwise_conv2d.is_depthwise(input, weight, groups):
        return depthwise_conv2d.refuses(input, weight)
    return dilated_conv2d_backward.refuses(input, [weight], groups)


def _dilated_conv2d_backward(
    kernels: Kernels,
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor,
    dilation: Sequence[int],
    groups: int,
    output_mask: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    if depthwise_conv2d.is_depthwise(input, weight, groups):
        return depthwise_conv2d.backward(kernels, grad_output, input, weight, dilation, output_mask)
    grad_input, grad_weights, grad_biases = dilated_conv2d_backward.backward(
        kernels, grad_output, input, [weight], [dilation], output_mask
    )
    empty = [input.new_empty(0)]
    return grad_input, (grad_weights or empty)[0], (grad_biases or empty)[0]


def _parallel_refuses(input: Tensor, weights: Sequence[Tensor], *args: Any) -> str | None:
    return dilated_conv2d.refuses(input, weights, groups=1)


def _parallel_dilated_conv2d(
    kernels: Kernels,
    input: Tensor,
    weights: list[Tensor],
    biases: list[Tensor],
    dilations: list[int],
) -> Tensor:
    rates = [(rate, rate) for rate in dilations]
    return dilated_conv2d.forward(kernels, input, weights, biases or [None] * len(weights), rates)


def _parallel_backward_refuses(
    grad_output: Tensor, input: Tensor, weights: Sequence[Tensor], *args: Any
) -> str | None:
    return dilated_conv2d_backward.refuses(input, weights, groups=1)


def _parallel_dilated_conv2d_backward(
    kernels: Kernels,
    grad_output: Tensor,
    input: Tensor,
    weights: Sequence[Tensor],
    dilations: Sequence[int],
    output_mask: Sequence[bool],
    grad_mean: Tensor | None = None,
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    rates = [(rate, rate) for rate in dilations]
    return dilated_conv2d_backward.backward(
        kernels, grad_output, input, weights, rates, output_mask, grad_mean
    )


def _fused_conv2d_refuses(
    input: Tensor,
    weight: Tensor,
    bias: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    activation: str,
) -> str | None:
    if refusal := geometry_refused(weight, stride, padding, dilation):
        return refusal
    if refusal := _dilated_conv2d_refuses(input, weight, bias, dilation, groups):
        return refusal
    if weight.size(1) * groups != input.size(1) or bias.shape != weight.shape[:1]:
        return "the shapes of weight and bias do not fit"
    if bias.dtype != input.dtype or bias.device != input.device:
        return "the input and the bias differ in dtype or device"
    return None


def _fused_conv2d(
    kernels: Kernels,
    input: Tensor,
    weight: Tensor,
    bias: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    activation: str,
) -> Tensor:
    if depthwise_conv2d.is_depthwise(input, weight, groups):
        return depthwise_conv2d.forward(kernels, input, weight, bias, dilation, None, activation)
    return dilated_conv2d.forward(kernels, input, [weight], [bias], [dilation], activation)


def _fused_conv2d_add_refuses(
    residual: Tensor, input: Tensor, weight: Tensor, *args: Any
) -> str | None:
    if refusal := _fused_conv2d_refuses(input, weight, *args):
        return refusal
    if residual.shape != (input.size(0), weight.size(0), *input.shape[2:]):
        return "the residual has not the shape of the output"
    if residual.dtype != input.dtype or residual.device != input.device:
        return "the input and the residual differ in dtype or device"
    return None


def _fused_conv2d_add_(
    kernels: Kernels,
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
    output = aligned_nhwc(residual)
    if input.untyped_storage().data_ptr() == output.untyped_storage().data_ptr():
        input = input.clone()
    if depthwise_conv2d.is_depthwise(input, weight, groups):
        depthwise_conv2d.forward(kernels, input, weight, bias, dilation, output, activation)
    else:
        dilated_conv2d.convolve(
            kernels, output, input, [weight], [bias], [dilation], activation=activation,
            residual=output,
        )  # fmt: skip
    if output is not residual:
        residual.copy_(output)


_CONVOLUTIONS: dict[str, tuple[Callable[..., Any], Callable[..., str | None]]] = {
    "dilated_conv2d": (_dilated_conv2d, _dilated_conv2d_refuses),
    "dilated_conv2d_backward": (_dilated_conv2d_backward, _dilated_conv2d_backward_refuses),
    "parallel_dilated_conv2d": (_parallel_dilated_conv2d, _parallel_refuses),
    "parallel_dilated_conv2d_backward": (
        _parallel_dilated_conv2d_backward,
        _parallel_backward_refuses,
    ),
    "parallel_dilated_conv2d_and_mean": (dilated_conv2d_and_mean.forward, _parallel_refuses),
    "fused_conv2d": (_fused_conv2d, _fused_conv2d_refuses),
    "fused_conv2d_add_": (_fused_conv2d_add_, _fused_conv2d_add_refuses),
    "aspp": (aspp.forward, aspp.refuses),
}
_UPSAMPLING: dict[str, Callable[..., Any]] = {
    "upsample_argmax": upsample_argmax.forward,
    "upsample_cross_entropy": upsample_cross_entropy.forward,
    "upsample_cross_entropy_backward": upsample_cross_entropy.backward,
}
