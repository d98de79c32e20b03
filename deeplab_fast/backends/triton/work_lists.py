"""Work lists of the dense convolutions: made for a shape, and read by the kernels.

Rows are structs of csrc/schedule as int32. A program computes one work item, a range of
k-iterations of one output tile.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..._native import _C
from ..._native.device_cache import cached_on_device
from ..._native.work_lists import Branches, rectangle_schedule, tap_rectangles, tile_schedule
from .block_sizes import Blocks


@triton.jit
def pointer_of(pointers, i_branch):
    """The pointer of one of several branches."""
    p_chosen = pointers[0]
    for i in tl.static_range(1, len(pointers)):
        p_chosen = tl.where(i_branch == i, pointers[i], p_chosen)
    return p_chosen


@triton.jit
def load_tap(p_tap):
    """dy, dx, branch and index of a tap."""
    return tl.load(p_tap), tl.load(p_tap + 1), tl.load(p_tap + 2), tl.load(p_tap + 3)


@triton.jit
def load_branch(p_branches, i_branch, ALIGNMENT: tl.constexpr):
    """Number of output channels of a branch, the first of them, and its number of taps."""
    p_branch = p_branches + i_branch * 3
    num_channels = tl.multiple_of(tl.load(p_branch), ALIGNMENT)
    i_first_channel = tl.multiple_of(tl.load(p_branch + 1), ALIGNMENT)
    return num_channels, i_first_channel, tl.load(p_branch + 2)


def alignment(channels: tuple[int, ...]) -> int:
    """Common divisor of the branches' numbers of channels, and so of their first channels."""
    return math.gcd(16, *channels)


def _branch_rows(branches: Branches, channels: tuple[int, ...], device: torch.device) -> Tensor:
    rows, first = [], 0
    for (kernel_h, kernel_w, _, _), count in zip(branches, channels):
        rows.append([count, first, kernel_h * kernel_w])
        first += count
    return torch.tensor(rows, dtype=torch.int32, device=device)


def num_programs(device: torch.device) -> int:
    """Number of programs that run at once, among which the work is divided."""
    if device.type == "cpu":
        return 8  # splits some of the sums that tests compute, and leaves others whole
    return torch.cuda.get_device_properties(device).multi_processor_count


class WorkList(NamedTuple):
    """Work list of a convolution, on the device."""

    pixels: Tensor  # [p] indices into [N, H, W]
    taps: Tensor  # [t, 4]: dy, dx, branch, index
    tiles: Tensor  # [n, 5]: output, first pixel, number of pixels, first tap, number of taps
    work_items: Tensor  # [i, 5]: tile, channel block, first k-iteration, their number, slot
    reductions: Tensor  # [r, 4]: tile, channel block, first slot, number of slots
    branches: Tensor  # [branches, 3]: output channels, the first of them, taps
    num_slots: int  # workspace slots


@cached_on_device
def work_list(
    plane: tuple[int, int, int],
    branches: Branches,
    in_channels: int,
    out_channels: tuple[int, ...],
    flipped: bool,
    blocks: Blocks,
    device: torch.device,
    num_programs: int,
) -> WorkList:
    """Work list of a forward pass or, with flipped taps, of the gradient of its input.

    ``plane`` is (N, H, W).
    """
    depth = max(out_channels) if flipped else in_channels
    pixels, taps, tiles, schedule = tile_schedule(
        _C.schedule.input_grad_tiles if flipped else _C.schedule.forward_tiles,
        plane,
        branches,
        (blocks.m, blocks.n),
        triton.cdiv(depth, blocks.k),
        (in_channels,) if flipped else out_channels,
        num_programs,
    )
    return WorkList(
        pixels.to(device),
        taps.to(device),
        tiles.to(device),
        schedule.work_items.to(device),
        schedule.reductions.to(device),
        _branch_rows(branches, out_channels, device),
        schedule.num_slots,
    )


class WeightWorkList(NamedTuple):
    """Work list of the gradients of weights, on the device, like :class:`WorkList`."""

    rectangles: Tensor  # [taps, 8]: the four columns of a tap, then y, x, height, width
    work_items: Tensor
    reductions: Tensor
    branches: Tensor
    num_slots: int


@cached_on_device
def weight_work_list(
    plane: tuple[int, int, int],
    branches: Branches,
    in_channels: int,
    out_channels: tuple[int, ...],
    blocks: Blocks,
    device: torch.device,
    num_programs: int,
) -> WeightWorkList:
    """Work list of the gradients of all branches' weights. ``plane`` is (N, H, W)."""
    N, H, W = plane
    rectangles = tap_rectangles((H, W), branches)
    schedule = rectangle_schedule(
        rectangles,
        lambda height, width: triton.cdiv(N * height * width, blocks.k),
        [triton.cdiv(k, blocks.m) * triton.cdiv(in_channels, blocks.n) for k in out_channels],
        num_programs,
    )
    return WeightWorkList(
        rectangles.to(device),
        schedule.work_items.to(device),
        schedule.reductions.to(device),
        _branch_rows(branches, out_channels, device),
        schedule.num_slots,
    )
