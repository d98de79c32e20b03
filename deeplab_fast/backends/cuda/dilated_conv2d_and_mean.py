"""Parallel branches, and the means of their input over all pixels."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..._native import _C
from ..._native.common import DTYPES, LaunchContext
from ..._native.memory_format import aligned_nhwc, aligned_rows, empty_nhwc, in_format_of
from ..arguments import ParallelDilatedConv2dAndMean
from ..registry import register_kernel
from .device import CONVOLUTIONS
from .dilated_conv2d import addresses, branches_plan, unsupported_branches

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
    nhwc, weights = aligned_nhwc(input), list(map(aligned_rows, weights))
    pairs = [(dilation, dilation) for dilation in dilations]
    plan = BranchesAndMeansPlan(context, nhwc, weights, pairs)
    output = empty_nhwc(input, sum(weight.size(0) for weight in weights))
    means = input.new_empty((input.size(0), input.size(1)), dtype=torch.float32)
    sums = means.new_empty(plan.num_sums)
    plan.launch(
        context.stream,
        output.data_ptr(),
        means.data_ptr(),
        sums.data_ptr(),
        nhwc.data_ptr(),
        addresses(weights),
        (0,) * len(weights),
    )
    return in_format_of(output, input), means


class BranchesAndMeansPlan:
    """Dense branches of one input and the fp32 means [N, C] of its pixels, ready to be launched.

    A separate kernel reads the input once more if no branch can sum its pixels.
    """

    def __init__(
        self,
        context: LaunchContext,
        input: Tensor,
        weights: Sequence[Tensor],
        dilations: Sequence[Sequence[int]],
        activation: str = "none",
    ) -> None:
        """``weights`` are as :func:`aligned_rows` returns them."""
        N, C, H, W = input.shape
        self._branches = branches_plan(context, input.shape, weights, dilations, activation)
        if self._branches.summing_branch is None:
            run, parts = max(_RUN_PIXELS, -(-H * W // _MAX_RUNS)), 1
        else:
            run, parts = _C.CONV_SUM_RUN, _C.CONV_SUM_PARTS
        self.num_sums = (-(-N * H * W // run) + N - 1) * parts * C
        self._runs = _C.PixelRuns(N, H * W, C, run, parts)
        self._dtype, self._is_sm90 = DTYPES[input.dtype], context.is_sm90
        self._sum_pixels = context.module.pixel_sums_fwd
        self._compute_means = context.module.pixel_means_fwd

    def launch(
        self,
        stream: int,
        output: int,
        means: int,
        sums: int,
        input: int,
        weights: tuple[int, ...],
        biases: tuple[int, ...],
    ) -> None:
        """Launch on these addresses; ``sums`` are ``num_sums`` fp32 numbers of workspace."""
        if self._branches.summing_branch is None:
            self._sum_pixels(sums, input, self._runs, self._dtype, stream)
            self._branches.launch(stream, output, input, weights, biases)
        else:
            self._branches.launch(stream, output, input, weights, biases, pixel_sums=sums)
        self._compute_means(means, sums, self._runs, self._is_sm90, stream)
