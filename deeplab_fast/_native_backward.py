"""Backward of dilated convolution through the CUDA kernels, for ``cuda`` and ``emulated``."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from . import _C
from ._native import _SPLIT_STEPS, DTYPES, _int32
from .ops._library import in_format_of


class WgradWorkList(NamedTuple):
    """What the kernel of the weight gradient is to do; ``tensors`` hold what ``work`` points to."""

    work: _C.ConvWgradWork
    tensors: tuple[Tensor, ...]  # rectangles, items, reductions: rows of csrc/common/zones.h
    num_slots: int


# Never dropped: a captured CUDA graph holds the addresses.
@functools.cache
def wgrad_work_list(
    plane: tuple[int, int, int],
    branches: tuple[tuple[int, int, int, int], ...],
    channels: int,
    out_channels: tuple[int, ...],
    dtype: torch.dtype,
    device: torch.device,
    num_workers: int,
) -> WgradWorkList:
    """The work list of the gradients of all branches' weights, on ``device``.

    ``plane`` is (N, H, W), ``branches`` are (kernel_H, kernel_W, dilation_H, dilation_W), and
    ``num_workers`` is how many thread blocks run at once.
    """
    N, H, W = plane
    rectangles = _int32(_C.zones.tap_rectangles((H, W), branches))
    step = _C.CONV_STEP_BYTES // dtype.itemsize
    blocks = [-(-k // _C.CONV_TILE) * -(-channels // _C.CONV_TILE) for k in out_channels]
    jobs = [
        (-(-N * h * w // step), blocks[branch])
        for _, _, branch, _, _, _, h, w in rectangles.view(-1, 8).tolist()
    ]
    schedule = _C.zones.schedule(jobs, num_workers, _SPLIT_STEPS)
    items, reductions = (_int32(schedule[name]) for name in ("items", "reductions"))
    tensors = tuple(t.to(device) for t in (rectangles, items, reductions))
    addresses = [t.data_ptr() for t in tensors]
    work = _C.ConvWgradWork(*addresses, items.numel() // 6, reductions.numel() // 4)
    return WgradWorkList(work, tensors, schedule["num_slots"])


def weight_gradients(
    launcher: Callable[..., None],
    stream: int,
    num_workers: int,
    grad_output: Tensor,
    input: Tensor,
    weights: Sequence[Tensor],
    branches: tuple[tuple[int, int, int, int], ...],
) -> list[Tensor]:
    """Those of parallel branches, all in one launch, from aligned channels_last tensors."""
    N, C, H, W = input.shape
    channels = tuple(weight.size(0) for weight in weights)
    work_list = wgrad_work_list(
        (N, H, W), branches, C, channels, input.dtype, input.device, num_workers
    )
    grads = [torch.empty_like(w, memory_format=torch.channels_last) for w in weights]
    partial_sums = input.new_empty(
        work_list.num_slots * _C.CONV_TILE * _C.CONV_TILE, dtype=torch.float32
    )
    launcher(
        partial_sums.data_ptr(),
        grad_output.data_ptr(),
        input.data_ptr(),
        [(grad.data_ptr(), grad.size(0), grad.size(2) * grad.size(3)) for grad in grads],
        work_list.work,
        _C.ConvWgradShape(N, H, W, C, sum(channels)),
        DTYPES[input.dtype],
        stream,
    )
    return [in_format_of(grad, weight) for grad, weight in zip(grads, weights)]


_PIXELS_PER_PART = 256  # of a bias gradient, at least: eight rounds of the rows of a block


def bias_gradient(
    launcher: Callable[..., None], stream: int, num_workers: int, grad_output: Tensor
) -> Tensor:
    """[K] sums over images and pixels of an aligned channels_last tensor."""
    N, K, H, W = grad_output.shape
    num_pixels = N * H * W
    num_parts = max(1, min(num_workers, num_pixels // _PIXELS_PER_PART))
    grad_bias = grad_output.new_empty(K)
    partial_sums = grad_output.new_empty(num_parts * K, dtype=torch.float32)
    launcher(
        grad_bias.data_ptr(),
        partial_sums.data_ptr(),
        grad_output.data_ptr(),
        num_pixels,
        K,
        num_parts,
        DTYPES[grad_output.dtype],
        stream,
    )
    return grad_bias
