"""Direct calls of the CUDA kernels of convolution and pooling, below the ops."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from deeplab_fast import _C
from deeplab_fast._native.common import LaunchContext
from deeplab_fast._native.memory_format import (
    aligned_nhwc,
    aligned_rows,
    empty_nhwc,
    in_format_of,
)
from deeplab_fast._native.work_lists import ConvWorkList
from deeplab_fast.backends.arguments import DilatedConv2d
from deeplab_fast.backends.cuda.aspp import ImageBiasPlan
from deeplab_fast.backends.cuda.dilated_conv2d import (
    ConvPlan,
    branches_plan,
    plan_convolution,
)
from deeplab_fast.backends.cuda.dilated_conv2d_and_mean import BranchesAndMeansPlan


def address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def convolve(
    context: LaunchContext,
    output: Tensor,
    input: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    dilations: Sequence[Sequence[int]],
    activation: str = "none",
    residual: Tensor | None = None,
    image_bias: Tensor | None = None,
    pixel_sums: Tensor | None = None,
) -> None:
    """Parallel branches, written to ``output``."""
    input, weights = aligned_nhwc(input), list(map(aligned_rows, weights))
    biases = [None if bias is None else bias.contiguous() for bias in biases]
    branches_plan(context, input.shape, weights, dilations, activation).launch(
        context.stream,
        output.data_ptr(),
        input.data_ptr(),
        tuple(map(address, weights)),
        tuple(map(address, biases)),
        address(residual),
        address(image_bias),
        address(pixel_sums),
    )


def convolved(
    context: LaunchContext,
    input: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    dilations: Sequence[Sequence[int]],
) -> Tensor:
    """Parallel branches, in a new tensor of the memory format of ``input``."""
    output = empty_nhwc(input, sum(weight.size(0) for weight in weights))
    convolve(context, output, input, weights, biases, dilations)
    return in_format_of(output, input)


def convolve_slices(
    context: LaunchContext,
    output: Tensor,
    input: Tensor,
    weight: Tensor,
    sources: Sequence[_C.ConvSource],
    work_list: ConvWorkList,
    first_channel: int = 0,
) -> None:
    """Sum over slices of the channels of ``input``, written from ``first_channel`` on."""
    plan = ConvPlan(
        context,
        work_list,
        input.dtype,
        input.device,
        [(weight.size(0), first_channel, weight.stride(0))],
        sources,
        _C.ConvShape(*input.shape[2:], input.size(1), output.size(1)),
    )
    plan.launch(context.stream, output.data_ptr(), input.data_ptr(), (weight.data_ptr(),), (0,))


def convolve_with_means(
    context: LaunchContext,
    output: Tensor,
    input: Tensor,
    weights: Sequence[Tensor],
    dilations: Sequence[Sequence[int]],
) -> Tensor:
    """Parallel branches, written to ``output``, and the means of ``input``, which are returned."""
    weights = list(map(aligned_rows, weights))
    plan = BranchesAndMeansPlan(context, input, weights, dilations)
    means, sums = input.new_empty(input.shape[:2]).float(), torch.empty(plan.num_sums)
    biases = (0,) * len(weights)
    pointers = address(output), address(means), address(sums), address(input)
    plan.launch(context.stream, *pointers, tuple(map(address, weights)), biases)
    return means


def image_bias(context: LaunchContext, means: Tensor, *weights: Tensor) -> Tensor:
    """Bias [N, K] from means and the weights and biases of pooling and projection."""
    pool_weight, pool_bias, project_weight, project_bias = weights
    pool_weight = aligned_nhwc(pool_weight)
    result = means.new_empty(means.size(0), project_weight.size(0))
    pooled = means.new_empty(means.size(0), pool_weight.size(0))
    tensors = pool_weight, pool_bias.contiguous(), project_weight, project_bias.contiguous()
    ImageBiasPlan(context, means.size(0), pool_weight, project_weight).launch(
        context.stream,
        address(result),
        address(pooled),
        address(means),
        tuple(map(address, tensors)),
    )
    return result


def depthwise(
    context: LaunchContext,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    dilation: Sequence[int],
) -> Tensor:
    """A depthwise convolution, in a new tensor of the memory format of ``input``."""
    arguments = DilatedConv2d(input, weight, bias, dilation, input.size(1))
    plan = plan_convolution(context, arguments, dilation, input.size(1))
    return plan(context.stream, arguments)
