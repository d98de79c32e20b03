"""Parallel branches, and the means of their input over all pixels."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..._native import _C
from ..._native.common import DTYPES, LaunchContext
from ..._native.memory_format import aligned_nhwc, empty_nhwc, in_format_of
from ..arguments import ParallelDilatedConv2dAndMean
from ..registry import register_kernel
from .device import CONVOLUTIONS
from .dilated_conv2d import launch, parallel_branches, summing_branch, unsupported_branches

# Largest number of runs per image, and smallest number of pixels per run.
_MAX_RUNS, _RUN_PIXELS = 16, 64


@register_kernel(
    "parallel_dilated_conv2d_and_mean", *CONVOLUTIONS, unsupported_reason=unsupported_branches
)
def parallel_dilated_conv2d_and_mean(
    context: LaunchContext, arguments: ParallelDilatedConv2dAndMean
) -> tuple[Tensor, Tensor]:
    """The branches, in the memory format of the input, and its fp32 means [N, C]."""
    input, weights, dilations = arguments
    nhwc = aligned_nhwc(input)
    output = empty_nhwc(input, sum(weight.size(0) for weight in weights))
    pairs = [(dilation, dilation) for dilation in dilations]
    biases = [None] * len(weights)
    means = convolve_with_means(context, output, nhwc, weights, biases, pairs, "none")
    return in_format_of(output, input), means


def convolve_with_means(
    context: LaunchContext,
    output: Tensor,
    input: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    dilations: Sequence[Sequence[int]],
    activation: str,
) -> Tensor:
    """Write parallel branches to ``output``; return the fp32 means [N, C] of their input.

    ``input`` is aligned and channels_last. A separate kernel reads it once more if no branch can
    sum its pixels.
    """
    N, C, H, W = input.shape
    is_summed = summing_branch(context, input, weights) is not None
    if is_summed:
        run, parts = _C.CONV_SUM_RUN, _C.CONV_SUM_PARTS
    else:
        run, parts = max(_RUN_PIXELS, -(-H * W // _MAX_RUNS)), 1
    num_rows = (-(-N * H * W // run) + N - 1) * parts
    sums, means = (input.new_empty((n, C), dtype=torch.float32) for n in (num_rows, N))
    runs = _C.PixelRuns(N, H * W, C, run, parts)
    if not is_summed:
        context.module.pixel_sums_fwd(
            sums.data_ptr(), input.data_ptr(), runs, DTYPES[input.dtype], context.stream
        )
    convolution = parallel_branches(
        context, input, weights, biases, dilations, pixel_sums=sums if is_summed else None
    )
    launch(context, output, convolution, activation)
    context.module.pixel_means_fwd(
        means.data_ptr(), sums.data_ptr(), runs, context.is_sm90, context.stream
    )
    return means
