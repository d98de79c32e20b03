"""Backward of dilated convolution through the CUDA kernels, for ``cuda`` and ``emulated``."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _C, _native
from ._native import DTYPES, Kernels
from .ops._library import in_format_of

Branches = tuple[tuple[int, int, int, int], ...]  # of _native.conv_branches


def refuses(input: Tensor, weights: Sequence[Tensor], groups: int) -> str | None:
    """Why the kernels cannot compute the gradients of these branches, or None."""
    if refusal := _native.dilated_conv2d_refuses(input, weights, groups):
        return refusal
    if sum(weight.size(2) * weight.size(3) for weight in weights) > _native.MAX_TAPS:
        return f"the kernel takes at most {_native.MAX_TAPS} taps, those of all branches together"
    return None


def gradients(
    kernels: Kernels,
    grad_output: Tensor,
    input: Tensor,
    weights: Sequence[Tensor],
    dilations: Sequence[Sequence[int]],
    output_mask: Sequence[bool],
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Gradients of input, weights and biases of parallel branches; empty where not asked for."""
    channels = [weight.size(0) for weight in weights]
    added = [-k % (16 // input.element_size()) for k in channels]  # copies are of 16 bytes
    if any(added):
        grad_parts = zip(grad_output.split(channels, dim=1), added)
        grad_output = torch.cat([F.pad(g, (0, 0, 0, 0, 0, more)) for g, more in grad_parts], dim=1)
        padded = [F.pad(w, (0, 0, 0, 0, 0, 0, 0, more)) for w, more in zip(weights, added)]
        grad_input, grad_weights, grad_biases = gradients(
            kernels, grad_output, input, padded, dilations, output_mask
        )
        return (
            grad_input,
            [in_format_of(grad[: w.size(0)], w) for grad, w in zip(grad_weights, weights)],
            [grad[:k] for grad, k in zip(grad_biases, channels)],
        )

    branches = _native.conv_branches(input, weights, dilations)
    grad_output = _native.aligned_nhwc(grad_output)
    needs_input, needs_weights, needs_biases = output_mask
    return (
        input_gradient(kernels, grad_output, input, weights, branches)
        if needs_input
        else input.new_empty(0),
        weight_gradients(kernels, grad_output, input, weights, branches) if needs_weights else [],
        bias_gradients(kernels, grad_output, weights) if needs_biases else [],
    )


def input_gradient(
    kernels: Kernels,
    grad_output: Tensor,
    input: Tensor,
    weights: Sequence[Tensor],
    branches: Branches,
) -> Tensor:
    """A convolution of ``grad_output`` with the mirrored taps of all branches, written once."""
    N, C, H, W = input.shape
    channels = [weight.size(0) for weight in weights]
    sizes = [weight.numel() // C for weight in weights]
    # Row c: [R, S, K] of each branch in turn.
    transposed = input.new_empty(C, sum(sizes))
    for part, weight in zip(transposed.split(sizes, dim=1), weights):
        K, _, R, S = weight.shape
        part.unflatten(1, (R, S, K)).copy_(weight.permute(1, 2, 3, 0))
    sources = zip(accumulate(channels, initial=0), channels, accumulate(sizes, initial=0))
    grad_input = _native.nhwc_output(input, C)
    kernel = _native.conv_kernel(kernels, input.dtype)
    _native.launch(
        kernels,
        grad_input,
        grad_output,
        [_C.ConvOutput(transposed.data_ptr(), 0, 0, C, 0, transposed.size(1))],
        [_C.ConvSource(*source) for source in sources],
        _native.conv_work_list(
            _C.zones.input_grad_tiles,
            (N, H, W),
            branches,
            _native.steps_per_tap(max(channels), input.dtype, kernel),
            (C,),
            input.device,
            kernels.num_workers,
            kernel,
        ),
        _C.ConvEpilogue(0, -math.inf, math.inf),
    )
    return in_format_of(grad_input, input)


class WgradWorkList(NamedTuple):
    """What the kernel of the weight gradient is to do; ``tensors`` hold what ``work`` points to."""

    work: _C.ConvWgradWork
    tensors: tuple[Tensor, ...]  # rectangles, items, reductions: rows of csrc/common/zones.h
    num_slots: int


# Never dropped: a captured CUDA graph holds the addresses.
@functools.cache
def wgrad_work_list(
    plane: tuple[int, int, int],
    branches: Branches,
    channels: int,
    out_channels: tuple[int, ...],
    dtype: torch.dtype,
    device: torch.device,
    num_workers: int,
) -> WgradWorkList:
    """The work list of the gradients of all branches' weights, on ``device``.

    ``plane`` is (N, H, W), and ``num_workers`` is how many thread blocks run at once.
    """
    N, H, W = plane
    rectangles = _native.int32_tensor(_C.zones.tap_rectangles((H, W), branches))
    step = _C.CONV_STEP_BYTES // dtype.itemsize
    blocks = [-(-k // _C.CONV_TILE) * -(-channels // _C.CONV_TILE) for k in out_channels]
    jobs = [
        (-(-N * h * w // step), blocks[branch])
        for _, _, branch, _, _, _, h, w in rectangles.view(-1, 8).tolist()
    ]
    schedule = _C.zones.schedule(jobs, num_workers, _native.SPLIT_STEPS)
    items, reductions = (_native.int32_tensor(schedule[name]) for name in ("items", "reductions"))
    tensors = tuple(t.to(device) for t in (rectangles, items, reductions))
    addresses = [t.data_ptr() for t in tensors]
    work = _C.ConvWgradWork(*addresses, items.numel() // 6, reductions.numel() // 4)
    return WgradWorkList(work, tensors, schedule["num_slots"])


def weight_gradients(
    kernels: Kernels,
    grad_output: Tensor,
    input: Tensor,
    weights: Sequence[Tensor],
    branches: Branches,
) -> list[Tensor]:
    """Those of all branches in one launch, and one that adds the sums it split."""
    N, C, H, W = input.shape
    channels = tuple(weight.size(0) for weight in weights)
    work_list = wgrad_work_list(
        (N, H, W), branches, C, channels, input.dtype, input.device, kernels.num_workers
    )
    nhwc = _native.aligned_nhwc(input)
    grads = [torch.empty_like(w, memory_format=torch.channels_last) for w in weights]
    partial_sums = input.new_empty(
        work_list.num_slots * _C.CONV_TILE * _C.CONV_TILE, dtype=torch.float32
    )
    kernels.module.dilated_conv2d_wgrad(
        partial_sums.data_ptr(),
        grad_output.data_ptr(),
        nhwc.data_ptr(),
        [(grad.data_ptr(), grad.size(0), grad.size(2) * grad.size(3)) for grad in grads],
        work_list.work,
        _C.ConvWgradShape(N, H, W, C, sum(channels)),
        DTYPES[input.dtype],
        kernels.stream,
    )
    return [in_format_of(grad, weight) for grad, weight in zip(grads, weights)]


_PIXELS_PER_PART = 256  # of a bias gradient, at least: eight rounds of the rows of a block


def bias_gradients(
    kernels: Kernels, grad_output: Tensor, weights: Sequence[Tensor]
) -> list[Tensor]:
    """Sums of ``grad_output`` over images and pixels."""
    N, K, H, W = grad_output.shape
    num_pixels = N * H * W
    num_parts = max(1, min(kernels.num_workers, num_pixels // _PIXELS_PER_PART))
    sums = grad_output.new_empty(K)
    partial_sums = grad_output.new_empty(num_parts * K, dtype=torch.float32)
    kernels.module.dilated_conv2d_bias_grad(
        sums.data_ptr(),
        partial_sums.data_ptr(),
        grad_output.data_ptr(),
        num_pixels,
        K,
        num_parts,
        DTYPES[grad_output.dtype],
        kernels.stream,
    )
    if len(weights) == 1:
        return [sums]
    # Results of an op must not share memory.
    return [part.clone() for part in sums.split([weight.size(0) for weight in weights])]
