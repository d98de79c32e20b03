"""Parallel dense branches of dilated convolution in one launch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ... import _C
from ..._native.common import CLAMPS, DTYPES, Kernels, aligned_nhwc, nhwc_output
from ..._native.work_lists import (
    CONV_SM90,
    ConvWorkList,
    conv_branches,
    conv_kernel,
    conv_work_list,
    steps_per_tap,
)
from ...ops._register import in_format_of
from ...ops.shape_bucket import tf32_is_allowed

MAX_TAPS = 1024  # the search of a work list's order slows down with their square


def refuses(input: Tensor, weights: Sequence[Tensor], groups: int) -> str | None:
    """Why the kernel cannot compute these branches, or None."""
    if input.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"the kernel takes float32, float16 and bfloat16, not {input.dtype}"
    if input.dtype == torch.float32 and not tf32_is_allowed():
        return "the kernel computes float32 as tf32, which torch.backends.cudnn does not allow"
    if groups != 1:
        return f"the kernel has no groups, got {groups}"
    if refusal := channels_refused(input, input.size(1), "input channels"):
        return refusal
    if any(weight.dtype != input.dtype or weight.device != input.device for weight in weights):
        return "the input and a weight differ in dtype or device"
    if input.numel() == 0 or any(weight.numel() == 0 for weight in weights):
        return "the input or a weight is empty"
    if len(weights) > _C.MAX_CONV_BRANCHES:
        return f"the kernel takes at most {_C.MAX_CONV_BRANCHES} branches, got {len(weights)}"
    if any(weight.size(2) * weight.size(3) > MAX_TAPS for weight in weights):
        return f"the kernel takes at most {MAX_TAPS} taps"
    if len(weights) * input.numel() // input.size(1) >= 2**31:
        return "the work list holds fewer than 2^31 pixels, those of all branches together"
    return None


def channels_refused(input: Tensor, channels: int, what: str) -> str | None:
    """Asynchronous copies are of 16 bytes."""
    multiple = 16 // input.element_size()
    if channels % multiple:
        return f"the kernel takes a multiple of {multiple} {what}, got {channels}"
    return None


def forward(
    kernels: Kernels,
    input: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    dilations: Sequence[Sequence[int]],
    activation: str = "none",
) -> Tensor:
    """Parallel branches over ``input``, in its memory format."""
    output = nhwc_output(input, sum(weight.size(0) for weight in weights))
    convolve(kernels, output, input, weights, biases, dilations, activation=activation)
    return in_format_of(output, input)


def convolve(
    kernels: Kernels,
    output: Tensor,
    input: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    dilations: Sequence[Sequence[int]],
    *,
    activation: str,
    residual: Tensor | None = None,
    image_bias: Tensor | None = None,
    pixel_sums: Tensor | None = None,
) -> None:
    """Parallel branches over ``input`` into consecutive channels of ``output``.

    ``output``, and ``residual`` if there is one, are aligned and channels_last. ``image_bias`` is
    fp32 [N, K], for a single branch. ``pixel_sums`` are rows of sums of pixels of ``input``,
    written by ``summing_branch``.
    """
    N, C, H, W = input.shape
    channels = tuple(weight.size(0) for weight in weights)
    branches = conv_branches(input, weights, dilations)
    input, *weights = aligned_nhwc(input), *map(aligned_rows, weights)
    biases = [None if bias is None else bias.contiguous() for bias in biases]
    summing = summing_branch(kernels, input, weights)
    outputs = [
        _C.ConvOutput(
            weight.data_ptr(),
            0 if bias is None else bias.data_ptr(),
            0 if image_bias is None else image_bias.data_ptr(),
            weight.size(0),
            sum(channels[:i]),
            weight.stride(0),
            pixel_sums.data_ptr() if pixel_sums is not None and i == summing else 0,
        )
        for i, (weight, bias) in enumerate(zip(weights, biases))
    ]
    kernel = conv_kernel(kernels, input)
    launch(
        kernels,
        output,
        input,
        outputs,
        [_C.ConvSource(0, C, 0)] * len(weights),
        conv_work_list(
            _C.schedule.forward_tiles,
            (N, H, W),
            branches,
            steps_per_tap(C, input.dtype, kernel),
            channels,
            input.device,
            kernels.num_workers,
            kernel,
        ),
        _C.ConvEpilogue(0 if residual is None else residual.data_ptr(), *CLAMPS[activation]),
    )


def summing_branch(kernels: Kernels, input: Tensor, weights: Sequence[Tensor]) -> int | None:
    """The branch during which ``convolve`` can sum the pixels of ``input``: a 1x1 on sm_90."""
    if conv_kernel(kernels, input) is not CONV_SM90:
        return None
    return next((i for i, w in enumerate(weights) if w.shape[2:] == (1, 1)), None)


def launch(
    kernels: Kernels,
    output: Tensor,
    input: Tensor,
    outputs: Sequence[_C.ConvOutput],
    sources: Sequence[_C.ConvSource],
    work_list: ConvWorkList,
    epilogue: _C.ConvEpilogue,
) -> None:
    """The kernel of ``work_list`` from ``input`` to ``output``, both aligned and channels_last."""
    partial_sums = input.new_empty(
        work_list.num_slots * work_list.kernel.tile**2, dtype=torch.float32
    )
    getattr(kernels.module, work_list.kernel.launcher)(
        output.data_ptr(),
        partial_sums.data_ptr(),
        input.data_ptr(),
        outputs,
        sources,
        work_list.work,
        epilogue,
        _C.ConvShape(input.size(2), input.size(3), input.size(1), output.size(1)),
        DTYPES[input.dtype],
        kernels.stream,
    )


def aligned_rows(weight: Tensor) -> Tensor:
    """The same, but the rows of a 1x1 weight [K, C, 1, 1] may be parts of longer ones."""
    row_bytes = weight.stride(0) * weight.element_size()
    is_aligned = weight.data_ptr() % 16 == 0 and row_bytes % 16 == 0
    is_row = weight.shape[2:] == (1, 1) and weight.stride(1) == 1
    return weight if is_row and is_aligned else aligned_nhwc(weight)
