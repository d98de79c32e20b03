"""Parallel atrous convolutions and the mean of their input: the part of ASPP that reads the input.

One op computes the gradients of both. The gradient of the mean is constant per image and channel,
so it is a bias of the kernel that writes the gradient of the input. Autograd would add it to the
gradient of the convolutions in passes over tensors as large as the input.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .._native.pooling import grad_of_each_pixel
from ..backends import registry
from ..backends.arguments import ParallelDilatedConv2dAndMean
from ._register import define, differentiable
from .dilated_conv2d import (
    bucket_of_branches,
    check_branches,
    converted_branches,
    fake_branches,
    jvp_branches,
    parallel_dilated_conv2d_backward_op,
)


def parallel_dilated_conv2d_and_mean(
    input: Tensor, weights: Sequence[Tensor], dilations: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """:func:`parallel_dilated_conv2d` and ``F.adaptive_avg_pool2d(input, 1)``.

    Args:
        input: [N, C, H, W] in any memory format, which is kept; channels_last is the fastest.
        weights: one [K_i, C, R_i, S_i] per branch, odd R_i and S_i.
        dilations: one dilation per branch.

    Returns:
        [N, sum(K_i), H, W] in the memory format of ``input``, and the mean [N, C, 1, 1], summed in
        fp32 and in the dtype of ``input`` even under autocast. Differentiable once.

    Raises:
        ValueError, TypeError: as :func:`parallel_dilated_conv2d`.

    >>> x, w = torch.randn(2, 64, 65, 65), torch.randn(32, 64, 3, 3)
    >>> y, mean = parallel_dilated_conv2d_and_mean(x, [w, w], [12, 24])
    """
    converted, weights, _, dilations = converted_branches(input, weights, None, dilations)
    output, mean = parallel_dilated_conv2d_and_mean_op(
        converted, weights, dilations, backend=registry.current()
    )
    return output, mean.to(input.dtype)[:, :, None, None]


def _fake(arguments: ParallelDilatedConv2dAndMean) -> tuple[Tensor, Tensor]:
    input = arguments.input
    dtype = torch.promote_types(input.dtype, torch.float32)
    return fake_branches(arguments), input.new_empty(input.shape[:2], dtype=dtype)


def _bucket(arguments: ParallelDilatedConv2dAndMean) -> str:
    return bucket_of_branches(*arguments)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    input, weights, ctx.dilations = inputs
    ctx.save_for_backward(input, *weights)
    ctx.set_materialize_grads(False)  # otherwise zeros would be convolved for an unused output


def _backward(ctx: Any, grad_output: Tensor | None, grad_mean: Tensor | None) -> tuple[Any, ...]:
    input, *weights = ctx.saved_tensors
    needs_input, needs_weights, _ = ctx.needs_input_grad
    mask = [needs_input, any(needs_weights), False]
    grad_input, grad_weights = None, [None] * len(weights)
    if grad_output is not None:
        grad_input, grads, _ = parallel_dilated_conv2d_backward_op(
            grad_output, input, weights, ctx.dilations, mask, grad_mean, backend=ctx.backend
        )
        grad_weights = grads or grad_weights
    elif grad_mean is not None:
        share = grad_of_each_pixel(grad_mean, input).to(input.dtype)
        grad_input = share[:, :, None, None].expand_as(input)
    return grad_input if needs_input else None, grad_weights, None


def _jvp(
    arguments: Any, tangents: Any, outputs: tuple[Tensor, Tensor], backend: str
) -> tuple[Tensor, Tensor]:
    input, weights, dilations = arguments
    t_input, t_weights, _ = tangents
    output, mean = outputs
    t_output = jvp_branches(
        (input, weights, [], dilations), (t_input, t_weights, [], None), output, backend
    )
    if t_input is None:
        return t_output, torch.zeros_like(mean)
    return t_output, t_input.mean((2, 3), dtype=mean.dtype)


parallel_dilated_conv2d_and_mean_op = define(
    "parallel_dilated_conv2d_and_mean",
    ParallelDilatedConv2dAndMean,
    "(Tensor input, Tensor[] weights, int[] dilations) -> (Tensor, Tensor)",
    _fake,
    _bucket,
    lambda arguments: check_branches(*arguments.branches()),
)
differentiable("parallel_dilated_conv2d_and_mean", _backward, _setup, _jvp, lambda *args: (0,))
