"""Atrous spatial pyramid pooling in inference."""

from __future__ import annotations

from torch import Tensor

from ..._native import _C
from ..._native.common import DTYPES, LaunchContext
from ..._native.memory_format import aligned_nhwc, aligned_rows, empty_nhwc, in_format_of
from ..arguments import Aspp
from ..registry import register_kernel
from .device import CONVOLUTIONS
from .dilated_conv2d import (
    launch,
    parallel_branches,
    unsupported_channels,
    unsupported_dense,
)
from .dilated_conv2d_and_mean import convolve_with_means

_MAX_POOL_CHANNELS = 16384  # limited by shared memory, which holds their means


def unsupported_reason(arguments: Aspp) -> str | None:
    input, weights, _, _, pool_weight, _, project_weight, _ = arguments
    channels = sum(weight.size(0) for weight in weights)
    if max(input.size(1), pool_weight.size(0)) > _MAX_POOL_CHANNELS:
        return f"the kernel supports at most {_MAX_POOL_CHANNELS} channels in the pooled branch"
    return (
        unsupported_dense(input, [*weights, pool_weight, project_weight])
        or unsupported_channels(input, channels, "channels of all convolutions together")
        or unsupported_channels(input, pool_weight.size(0), "pooled channels")
    )


@register_kernel("aspp", *CONVOLUTIONS, unsupported_reason=unsupported_reason)
def aspp(context: LaunchContext, arguments: Aspp) -> Tensor:
    """The op in six launches, or five if a branch sums the pixels while it reads them.

    Each of the two convolutions takes one more launch if it has split output tiles. The pooled
    branch is never broadcast: its contribution to the projection is the same at every pixel of an
    image, a bias.
    """
    input, weights, biases, dilations, pool_weight, pool_bias, project_weight, project_bias = (
        arguments
    )
    nhwc = aligned_nhwc(input)
    pairs = [(dilation, dilation) for dilation in dilations]
    branches = empty_nhwc(input, sum(weight.size(0) for weight in weights))
    output = empty_nhwc(input, project_weight.size(0))
    project_weight = aligned_rows(project_weight)
    project, project_pooled = project_weight.tensor_split([branches.size(1)], dim=1)
    means = convolve_with_means(context, branches, nhwc, weights, biases, pairs, "relu")
    pooled_bias = image_bias(context, means, pool_weight, pool_bias, project_pooled, project_bias)
    projection = parallel_branches(context, branches, [project], [None], [(1, 1)], pooled_bias)
    launch(context, output, projection, "relu")
    return in_format_of(output, input)


def image_bias(
    context: LaunchContext,
    means: Tensor,
    pool_weight: Tensor,
    pool_bias: Tensor,
    project_weight: Tensor,
    project_bias: Tensor,
) -> Tensor:
    """Bias [N, K] of the projection in fp32, from pooled channels and bias, in two launches.

    ``means`` are fp32 [N, C]; ``project_weight`` consists of the columns for the pooled channels.
    """
    (N, C), P, K = means.shape, pool_weight.size(0), project_weight.size(0)
    image_bias, pooled = means.new_empty(N, K), means.new_empty(N, P)
    pool_weight = aligned_nhwc(pool_weight)
    pool_bias, project_bias = pool_bias.contiguous(), project_bias.contiguous()
    tensors = pool_weight, pool_bias, project_weight, project_bias
    context.module.aspp_image_bias_fwd(
        image_bias.data_ptr(),
        pooled.data_ptr(),
        means.data_ptr(),
        _C.AsppWeights(*(t.data_ptr() for t in tensors)),
        _C.AsppShape(N, C, P, K, project_weight.stride(0)),
        DTYPES[pool_weight.dtype],
        context.is_sm90,
        context.stream,
    )
    return image_bias
