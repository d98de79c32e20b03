"""Atrous spatial pyramid pooling in its inference form, without the branch concatenation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..backends import registry
from ..backends.arguments import Aspp
from ._arguments import check_tensor, tensor_list
from ._register import autocast, autocast_dtype, define, differentiable
from .dilated_conv2d import (
    bucket_of_branches,
    check_convolution,
    check_dtypes,
    dilated_conv2d_backward_op,
    dilated_conv2d_op,
    dilation_list,
    fake_output,
    jvp_branches,
    or_zeros,
    parallel_dilated_conv2d_backward_op,
    parallel_dilated_conv2d_op,
)


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
    """Atrous spatial pyramid pooling with batch norm folded into weights and biases.

    Parallel atrous convolutions and one image-pooling branch, each followed by ReLU, are
    concatenated and projected by a 1x1 convolution with ReLU (Chen et al. 2017, section 3.3;
    torchvision's ``ASPP`` in eval mode). For training use :class:`deeplab_fast.ASPP`.

    Args:
        input: [N, C, H, W] in any memory format, which is kept; channels_last is the fastest.
        weights: one [K_i, C, R_i, S_i] per branch, odd R_i and S_i (usually a 1x1 and three 3x3).
        biases: one [K_i] per branch.
        dilations: one dilation per branch (1 for the 1x1).
        pool_weight, pool_bias: [P, C, 1, 1] and [P] of the image-pooling branch.
        project_weight, project_bias: [O, sum(K_i) + P, 1, 1] and [O]; the pooled channels are last.

    Returns:
        [N, O, H, W] in the dtype and memory format of ``input``.

    Raises:
        ValueError: lengths or shapes do not fit; the message names the argument.
        TypeError: dtypes differ (outside autocast), or an argument is of a wrong type.

    >>> x, k = torch.randn(1, 64, 33, 33), 32
    >>> w = [torch.randn(k, 64, 1, 1), torch.randn(k, 64, 3, 3)]
    >>> b = torch.zeros(k)
    >>> y = aspp(x, w, [b, b], [1, 6], torch.randn(k, 64, 1, 1), b, torch.randn(k, 3 * k, 1, 1), b)
    """
    weights, biases = tensor_list(weights, "weights"), tensor_list(biases, "biases")
    dilations = dilation_list(dilations)
    for name, tensor in (
        ("input", input),
        ("pool_weight", pool_weight),
        ("pool_bias", pool_bias),
        ("project_weight", project_weight),
        ("project_bias", project_bias),
    ):
        check_tensor(tensor, name)
    others = pool_weight, pool_bias, project_weight, project_bias
    if autocast_dtype(input):
        input, *cast = autocast(input, *weights, *biases, *others)
        count = len(weights)
        weights, biases, others = cast[:count], cast[count:-4], tuple(cast[-4:])
    return aspp_op(input, weights, biases, dilations, *others, backend=registry.current())


def _check(arguments: Aspp) -> None:
    input, weights, biases, dilations, pool_weight, pool_bias, project_weight, project_bias = (
        arguments
    )
    if not len(weights) == len(biases) == len(dilations) or not weights:
        raise ValueError(
            "weights, biases, dilations: expected one bias and one dilation per weight, at least "
            f"one, got {len(weights)} weights, {len(biases)} biases, {len(dilations)} dilations"
        )
    for weight, bias in zip(weights, biases):
        check_convolution(input, weight, bias, 1)
    channels = sum(weight.size(0) for weight in weights) + pool_weight.size(0)
    _check_pointwise("pool", pool_weight, pool_bias, input.size(1))
    _check_pointwise("project", project_weight, project_bias, channels)
    tensors = *weights, *biases, pool_weight, pool_bias, project_weight, project_bias
    check_dtypes(input, *tensors)


def _check_pointwise(name: str, weight: Tensor, bias: Tensor, channels: int) -> None:
    if weight.dim() != 4 or tuple(weight.shape[1:]) != (channels, 1, 1):
        raise ValueError(
            f"{name}_weight: expected [K, {channels}, 1, 1], got {tuple(weight.shape)}"
        )
    if tuple(bias.shape) != (weight.size(0),):
        raise ValueError(f"{name}_bias: expected ({weight.size(0)},), got {tuple(bias.shape)}")


def _fake(arguments: Aspp) -> Tensor:
    return fake_output(arguments.input, arguments.project_weight.size(0))


def _bucket(arguments: Aspp) -> str:
    return bucket_of_branches(arguments.input, arguments.weights, arguments.dilations)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    input, weights, biases, ctx.dilations, *others = inputs
    ctx.num_branches = len(weights)
    ctx.save_for_backward(output, input, *weights, *biases, *others)


def _backward(ctx: Any, grad_output: Tensor) -> tuple[Any, ...]:
    """Gradients from the saved inputs. The branches are recomputed instead of saved."""
    output, input, *rest = ctx.saved_tensors
    weights, biases = rest[: ctx.num_branches], rest[ctx.num_branches : -4]
    pool_weight, pool_bias, project_weight, _ = rest[-4:]
    on = {"backend": ctx.backend}

    branches = parallel_dilated_conv2d_op(input, weights, biases, ctx.dilations, **on).relu_()
    mean = input.mean((2, 3), keepdim=True)
    pooled = dilated_conv2d_op(mean, pool_weight, pool_bias, [1, 1], 1, **on).relu_()
    joined = torch.cat([branches, pooled.expand(-1, -1, *input.shape[2:])], dim=1)

    everything = ([1, 1], 1, [True, True, True])
    grad_joined, grad_project_weight, grad_project_bias = dilated_conv2d_backward_op(
        grad_output * ~(output <= 0), joined, project_weight, *everything, **on
    )
    grad_joined = grad_joined * ~(joined <= 0)  # NaN has a gradient as in F.relu
    grad_branches, grad_pooled = grad_joined.split([branches.size(1), pooled.size(1)], dim=1)
    grad_mean, grad_pool_weight, grad_pool_bias = dilated_conv2d_backward_op(
        grad_pooled.sum((2, 3), keepdim=True), mean, pool_weight, *everything, **on
    )
    grad_input, grad_weights, grad_biases = parallel_dilated_conv2d_backward_op(
        grad_branches, input, weights, ctx.dilations, [True] * 3, grad_mean.flatten(1), **on
    )
    return (
        grad_input,
        grad_weights,
        grad_biases,
        None,
        grad_pool_weight,
        grad_pool_bias,
        grad_project_weight,
        grad_project_bias,
    )


def _jvp(arguments: Any, tangents: Any, output: Tensor, backend: str) -> Tensor:
    input, weights, biases, dilations, pool_weight, pool_bias, project_weight, _ = arguments
    t_input, t_weights, t_biases, _, *t_others = tangents
    t_input, t_pool_weight, t_pool_bias, t_project_weight, t_project_bias = or_zeros(
        (t_input, *t_others), (input, *arguments[4:])
    )
    branches = parallel_dilated_conv2d_op(input, weights, biases, dilations, backend=backend)
    t_branches = jvp_branches(
        (input, weights, biases, dilations), (t_input, t_weights, t_biases, None), branches, backend
    )
    mean, t_mean = (x.mean((2, 3), keepdim=True) for x in (input, t_input))
    pooled = F.conv2d(mean, pool_weight, pool_bias)
    t_pooled = F.conv2d(t_mean, pool_weight) + F.conv2d(mean, t_pool_weight, t_pool_bias)
    t_branches, t_pooled = t_branches * (branches > 0), t_pooled * (pooled > 0)

    def joined(branches: Tensor, pooled: Tensor) -> Tensor:
        return torch.cat([branches, pooled.expand(-1, -1, *input.shape[2:])], dim=1)

    t_output = F.conv2d(joined(t_branches, t_pooled), project_weight)
    t_output = t_output + F.conv2d(
        joined(branches.relu(), pooled.relu()), t_project_weight, t_project_bias
    )
    return t_output * (output > 0)


aspp_op = define(
    "aspp",
    Aspp,
    "(Tensor input, Tensor[] weights, Tensor[] biases, int[] dilations, Tensor pool_weight, "
    "Tensor pool_bias, Tensor project_weight, Tensor project_bias) -> Tensor",
    _fake,
    _bucket,
    _check,
)
differentiable("aspp", _backward, _setup, _jvp, lambda *args: (0,))
