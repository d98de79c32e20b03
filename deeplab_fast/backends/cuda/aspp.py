"""Atrous spatial pyramid pooling in inference."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ... import _C
from ..._native.common import DTYPES, Kernels, aligned_nhwc, nhwc_output
from ...ops._register import in_format_of
from .dilated_conv2d import aligned_rows, channels_refused, convolve
from .dilated_conv2d import refuses as convolution_refuses
from .dilated_conv2d_and_mean import convolve_with_means

_MAX_POOL_CHANNELS = 16384  # their means are in shared memory


def refuses(
    input: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    dilations: Sequence[int],
    pool_weight: Tensor,
    pool_bias: Tensor,
    project_weight: Tensor,
    project_bias: Tensor,
) -> str | None:
    channels = sum(weight.size(0) for weight in weights)
    if max(input.size(1), pool_weight.size(0)) > _MAX_POOL_CHANNELS:
        return f"the kernel takes at most {_MAX_POOL_CHANNELS} channels to the pooled branch"
    return (
        convolution_refuses(input, [*weights, pool_weight, project_weight], groups=1)
        or channels_refused(input, channels, "channels of all convolutions together")
        or channels_refused(input, pool_weight.size(0), "pooled channels")
    )


def forward(
    kernels: Kernels,
    input: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    dilations: Sequence[int],
    pool_weight: Tensor,
    pool_bias: Tensor,
    project_weight: Tensor,
    project_bias: Tensor,
) -> Tensor:
    """The op in six launches, or five where the branches sum the pixels on their way.

    There is one more for each of the two convolutions that splits its sums.

    The pooled branch is never as large as the map: what it adds to the projection is the same at
    every pixel of an image, a bias.
    """
    nhwc = aligned_nhwc(input)
    pairs = [(rate, rate) for rate in dilations]
    branches = nhwc_output(input, sum(weight.size(0) for weight in weights))
    output = nhwc_output(input, project_weight.size(0))
    project_weight = aligned_rows(project_weight)
    project, project_pooled = project_weight.tensor_split([branches.size(1)], dim=1)
    means = convolve_with_means(kernels, branches, nhwc, weights, biases, pairs, "relu")
    pooled_bias = image_bias(kernels, means, pool_weight, pool_bias, project_pooled, project_bias)
    convolve(
        kernels, output, branches, [project], [None], [(1, 1)], activation="relu",
        image_bias=pooled_bias,
    )  # fmt: skip
    return in_format_of(output, input)


def image_bias(
    kernels: Kernels,
    means: Tensor,
    pool_weight: Tensor,
    pool_bias: Tensor,
    project_weight: Tensor,
    project_bias: Tensor,
) -> Tensor:
    """fp32 [N, K] that the pooled channels and the bias add to the projection, in two launches.

    ``means`` are fp32 [N, C], ``project_weight`` has the columns of the pooled channels.
    """
    (N, C), P, K = means.shape, pool_weight.size(0), project_weight.size(0)
    image_bias, pooled = means.new_empty(N, K), means.new_empty(N, P)
    pool_weight = aligned_nhwc(pool_weight)
    pool_bias, project_bias = pool_bias.contiguous(), project_bias.contiguous()
    tensors = pool_weight, pool_bias, project_weight, project_bias
    kernels.module.aspp_image_bias_fwd(
        image_bias.data_ptr(),
        pooled.data_ptr(),
        means.data_ptr(),
        _C.AsppWeights(*(t.data_ptr() for t in tensors)),
        _C.AsppShape(N, C, P, K, project_weight.stride(0)),
        DTYPES[pool_weight.dtype],
        kernels.is_sm90,
        kernels.stream,
    )
    return image_bias
