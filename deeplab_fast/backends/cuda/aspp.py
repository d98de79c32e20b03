"""Atrous spatial pyramid pooling in inference."""

from __future__ import annotations

from functools import partial
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from ..._native import _C
from ..._native.common import DTYPES, LaunchContext
from ..._native.memory_format import (
    aligned_nhwc,
    aligned_rows,
    empty_output,
    has_rows,
    in_format_of,
    is_nhwc,
    is_unaligned,
)
from ..arguments import Aspp
from ..registry import register_planned_kernel
from .device import CONVOLUTIONS, Call
from .dilated_conv2d import (
    addresses,
    branches_plan,
    unsupported_channels,
    unsupported_dense,
)
from .dilated_conv2d_and_mean import BranchesAndMeansPlan

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


@register_planned_kernel("aspp", *CONVOLUTIONS, unsupported_reason=unsupported_reason)
def aspp(context: LaunchContext, arguments: Aspp) -> Call:
    """The op in six launches, or five if a branch sums the pixels while it reads them.

    Each of the two convolutions takes one more launch if it has split output tiles. The pooled
    branch is never broadcast: its contribution to the projection is the same at every pixel of an
    image, a bias.
    """
    input, weights, _, dilations, pool_weight, _, project_weight, _ = aligned_operands(arguments)
    (N, C, H, W), P, K = input.shape, pool_weight.size(0), project_weight.size(0)
    channels = sum(weight.size(0) for weight in weights)
    pairs = [(dilation, dilation) for dilation in dilations]
    project, project_pooled = project_weight.tensor_split([channels], dim=1)
    branches_and_means = BranchesAndMeansPlan(context, input, weights, pairs, "relu")
    image_bias_plan = ImageBiasPlan(context, N, pool_weight, project_pooled)
    projection = branches_plan(context, (N, channels, H, W), [project], [(1, 1)], "relu")

    empty_branches, empty_result = empty_output(input, channels), empty_output(input, K)
    # One fp32 workspace for the sums of pixels, means [N, C], pooled [N, P] and image bias [N, K].
    sizes = branches_and_means.num_sums, N * C, N * P, N * K
    means_at, pooled_at, image_bias_at, end = accumulate(4 * size for size in sizes)
    empty_workspace = partial(torch.empty, end // 4, dtype=torch.float32, device=input.device)
    pooled_columns_at = channels * project_weight.element_size()

    def pool_and_convolve(stream: int, arguments: Aspp) -> Tensor:
        input, weights, biases, _, pool_weight, pool_bias, project_weight, project_bias = arguments
        x, w = input.data_ptr(), addresses(weights)
        pool, project = pool_weight.data_ptr(), project_weight.data_ptr()
        if is_unaligned(x, pool, project, *w):
            return pool_and_convolve(stream, aligned_operands(arguments))
        branches, output, workspace = empty_branches(), empty_result(), empty_workspace()
        joined, sums = branches.data_ptr(), workspace.data_ptr()
        means, pooled, image_bias = sums + means_at, sums + pooled_at, sums + image_bias_at
        branches_and_means.launch(stream, joined, means, sums, x, w, addresses(biases))
        image_bias_plan.launch(
            stream,
            image_bias,
            pooled,
            means,
            (pool, pool_bias.data_ptr(), project + pooled_columns_at, project_bias.data_ptr()),
        )
        projection.launch(
            stream, output.data_ptr(), joined, (project,), (0,), image_bias=image_bias
        )
        return output

    if _is_ready(arguments):
        return pool_and_convolve
    return lambda stream, arguments: in_format_of(
        pool_and_convolve(stream, aligned_operands(arguments)), arguments.input
    )


def aligned_operands(arguments: Aspp) -> Aspp:
    """``arguments`` with tensors that the kernels can read."""
    input, weights, biases, dilations, pool_weight, pool_bias, project_weight, project_bias = (
        arguments
    )
    return Aspp(
        aligned_nhwc(input),
        list(map(aligned_rows, weights)),
        [bias.contiguous() for bias in biases],
        dilations,
        aligned_nhwc(pool_weight),
        pool_bias.contiguous(),
        aligned_rows(project_weight),
        project_bias.contiguous(),
    )


def _is_ready(arguments: Aspp) -> bool:
    """True if :func:`aligned_operands` copies nothing but tensors whose memory is not aligned."""
    input, weights, biases, _, pool_weight, pool_bias, project_weight, project_bias = arguments
    return (
        is_nhwc(input)
        and all(map(has_rows, (*weights, project_weight)))
        and pool_weight.is_contiguous(memory_format=torch.channels_last)
        and all(bias.is_contiguous() for bias in (*biases, pool_bias, project_bias))
    )


class ImageBiasPlan:
    """Bias [N, K] of the projection in fp32, from pooled channels and bias, in two launches."""

    def __init__(
        self, context: LaunchContext, N: int, pool_weight: Tensor, project_weight: Tensor
    ) -> None:
        """``project_weight`` consists of the columns for the pooled channels."""
        P, C = pool_weight.shape[:2]
        K, stride = project_weight.size(0), project_weight.stride(0)
        self._launcher = context.module.aspp_image_bias_fwd
        self._shape = _C.AsppShape(N, C, P, K, stride)
        self._dtype, self._is_sm90 = DTYPES[pool_weight.dtype], context.is_sm90
        # Addresses of the last launch and their struct: weights seldom move.
        self._last: tuple[Any, Any] = (None, None)

    def launch(
        self,
        stream: int,
        image_bias: int,
        pooled: int,
        means: int,
        weights: tuple[int, int, int, int],
    ) -> None:
        """Launch on addresses; ``weights`` are those of struct AsppWeights, ``means`` [N, C]."""
        last, struct = self._last
        if last != weights:
            struct = _C.AsppWeights(*weights)
            self._last = weights, struct
        self._launcher(
            image_bias, pooled, means, struct, self._shape, self._dtype, self._is_sm90, stream
        )
