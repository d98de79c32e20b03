"""The means of all pixels, taken along with the branches that read them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ... import _C
from ..._native.common import DTYPES, Kernels, aligned_nhwc, nhwc_output
from ...ops._register import in_format_of
from .dilated_conv2d import convolve, summing_branch

_MAX_RUNS, _RUN_PIXELS = 16, 64  # of an image, of a run; enough blocks for small images


def forward(
    kernels: Kernels, input: Tensor, weights: Sequence[Tensor], dilations: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """Parallel branches over ``input``, in its memory format, and its fp32 means [N, C]."""
    nhwc = aligned_nhwc(input)
    output = nhwc_output(input, sum(weight.size(0) for weight in weights))
    pairs = [(rate, rate) for rate in dilations]
    biases = [None] * len(weights)
    means = convolve_with_means(kernels, output, nhwc, weights, biases, pairs, "none")
    return in_format_of(output, input), means


def convolve_with_means(
    kernels: Kernels,
    output: Tensor,
    input: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    dilations: Sequence[Sequence[int]],
    activation: str,
) -> Tensor:
    """``convolve``, and the fp32 means [N, C] of the pixels of ``input``.

    Where no branch can sum them on its way, ``input`` is read once more. It is aligned and
    channels_last.
    """
    N, C, H, W = input.shape
    is_summed = summing_branch(kernels, input, weights) is not None
    if is_summed:
        run, parts = _C.CONV_SUM_RUN, _C.CONV_SUM_PARTS
    else:
        run, parts = max(_RUN_PIXELS, -(-H * W // _MAX_RUNS)), 1
    num_rows = (-(-N * H * W // run) + N - 1) * parts
    sums, means = (input.new_empty((n, C), dtype=torch.float32) for n in (num_rows, N))
    runs = _C.PixelRuns(N, H * W, C, run, parts)
    if not is_summed:
        kernels.module.pixel_sums_fwd(
            sums.data_ptr(), input.data_ptr(), runs, DTYPES[input.dtype], kernels.stream
        )
    convolve(
        kernels, output, input, weights, biases, dilations, activation=activation,
        pixel_sums=sums if is_summed else None,
    )  # fmt: skip
    kernels.module.pixel_means_fwd(
        means.data_ptr(), sums.data_ptr(), runs, kernels.is_sm90, kernels.stream
    )
    return means
