"""Work lists of the dense convolution kernels (csrc/schedule)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import _C
from .common import Kernels
from .device_cache import resident


class ConvKernel(NamedTuple):
    """A kernel of dilated convolution and the work list that it is made for."""

    launcher: str
    tile: int  # pixels, and output channels, of an item; of a weight gradient: channels
    step_bytes: int  # of input channels of one tap; of a weight gradient: pixels of one channel
    blocks_per_worker: int  # of CONV_SM80 in the place that a worker takes
    is_persistent: bool = False  # a worker has several items; else a block has one
    item_steps: int = 0  # that beginning an item and storing its sums take the time of
    box_pixels: int = 1  # of a weight gradient, that are copied together


CONV_SM80 = ConvKernel("dilated_conv2d_fwd", _C.CONV_TILE, _C.CONV_K_ITER_BYTES, 1)
CONV_SM90 = ConvKernel(
    "dilated_conv2d_fwd_sm90",
    _C.CONV_TILE_SM90,
    _C.CONV_K_ITER_BYTES_SM90,
    4,
    is_persistent=True,
    item_steps=2,
)

WGRAD_SM80 = ConvKernel("dilated_conv2d_wgrad", _C.CONV_TILE, _C.CONV_K_ITER_BYTES, 1)
WGRAD_SM90 = ConvKernel(
    "dilated_conv2d_wgrad_sm90",
    _C.CONV_TILE_SM90,
    _C.CONV_K_ITER_BYTES_SM90,
    4,
    is_persistent=True,
    item_steps=2,
    box_pixels=_C.WGRAD_BOX_SM90,
)


def conv_kernel(kernels: Kernels, input: Tensor) -> ConvKernel:
    """The kernel for convolutions of ``input``, or of gradients of its size.

    TF32 uses the sm_80 kernel, which rounds its operands: wgmma would truncate them. The sm_90
    kernel reads the coordinates of a pixel as two times 16 bits.
    """
    is_small = max(input.shape[2:]) < 2**15
    if kernels.is_sm90 and input.dtype != torch.float32 and is_small:
        return CONV_SM90
    return CONV_SM80


def wgrad_kernel(kernels: Kernels, dtype: torch.dtype) -> ConvKernel:
    """wgmma transposes 16-bit types only."""
    return WGRAD_SM90 if kernels.is_sm90 and dtype != torch.float32 else WGRAD_SM80


def steps_per_tap(channels: int, dtype: torch.dtype, kernel: ConvKernel = CONV_SM80) -> int:
    """Steps that the kernel takes for ``channels`` input channels of one tap."""
    return -(-channels * dtype.itemsize // kernel.step_bytes)


Branches = tuple[tuple[int, int, int, int], ...]  # of conv_branches


def conv_branches(
    input: Tensor, weights: Sequence[Tensor], dilations: Sequence[Sequence[int]]
) -> Branches:
    """(kernel_H, kernel_W, dilation_H, dilation_W) of each branch of a work list.

    A rate beyond the map does what the map's size does, and that fits the work list's int32.
    """
    H, W = input.shape[2:]
    return tuple(
        (weight.size(2), weight.size(3), min(vertical, H), min(horizontal, W))
        for weight, (vertical, horizontal) in zip(weights, dilations)
    )


# A partial sum, out and in, moves as many bytes as eight steps of its kernel.
SPLIT_STEPS = 8


class ConvWorkList(NamedTuple):
    """What a kernel of dilated convolution is to do; ``tensors`` hold what ``work`` points to."""

    kernel: ConvKernel
    work: _C.ConvWork
    tensors: tuple[Tensor, ...]
    num_slots: int
    makespan: int  # steps of the worker that has most, with what its items cost besides


@resident
def conv_work_list(
    list_tiles: Callable[..., tuple[bytearray, bytearray, bytearray]],
    plane: tuple[int, int, int],
    branches: Branches,
    steps_per_tap: int,
    out_channels: tuple[int, ...],
    device: torch.device,
    num_workers: int,
    kernel: ConvKernel = CONV_SM80,
) -> ConvWorkList:
    """The work list (csrc/schedule/work_list.h) of a launch, on ``device``.

    ``list_tiles`` is ``_C.schedule.forward_tiles`` or ``input_grad_tiles``, ``plane`` is (N, H, W),
    ``branches`` are (kernel_H, kernel_W, dilation_H, dilation_W), ``out_channels`` are those of
    each output, and ``num_workers`` is how many thread blocks of ``CONV_SM80`` run at once.
    """
    num_workers = max(1, num_workers // kernel.blocks_per_worker)
    rows = list_tiles(plane, branches, kernel.tile)
    pixels, taps, tiles = (int32_tensor(buffer) for buffer in rows)
    jobs = [
        (num_taps * steps_per_tap, -(-out_channels[output] // kernel.tile))
        for output, _, _, _, num_taps in tiles.view(-1, 5).tolist()
    ]
    schedule = _C.schedule.split_k(jobs, num_workers, SPLIT_STEPS, kernel.item_steps)
    items, first_items = items_of_workers(schedule, kernel)
    reductions = int32_tensor(schedule["reductions"])
    lists = [pixels, taps, tiles, items, reductions, first_items]
    if kernel.is_persistent:
        channels = kernel.step_bytes // 2  # the kernel takes 16-bit types only
        lists += [
            listed_pixels(pixels, plane),
            tile_items(items, tiles, pixels, plane, channels),
        ]
    tensors = tuple(t.to(device) for t in lists)
    pixels_at, taps_at, tiles_at, items_at, reductions_at, first_items_at, *more = (
        t.data_ptr() for t in tensors
    )
    listed_pixels_at, tile_items_at = more or (0, 0)
    work = _C.ConvWork(
        pixels_at, taps_at, tiles_at, items_at, reductions_at, items.numel() // 5,
        reductions.numel() // 4, first_items_at, first_items.numel() - 1, listed_pixels_at,
        tile_items_at,
    )  # fmt: skip
    return ConvWorkList(kernel, work, tensors, schedule["num_slots"], makespan(schedule, kernel))


class WgradWorkList(NamedTuple):
    """What the kernel of the weight gradient is to do; ``tensors`` hold what ``work`` points to."""

    work: _C.ConvWgradWork
    tensors: tuple[Tensor, ...]  # rectangles, items, reductions: rows of work_list.h; first items
    num_slots: int
    makespan: int  # as in ConvWorkList


@resident
def wgrad_work_list(
    plane: tuple[int, int, int],
    branches: Branches,
    channels: int,
    out_channels: tuple[int, ...],
    dtype: torch.dtype,
    device: torch.device,
    num_workers: int,
    kernel: ConvKernel = WGRAD_SM80,
) -> WgradWorkList:
    """The work list of the gradients of all branches' weights, on ``device``.

    ``plane`` is (N, H, W), and ``num_workers`` is how many thread blocks of ``WGRAD_SM80`` run at
    once.
    """
    num_workers = max(1, num_workers // kernel.blocks_per_worker)
    N, H, W = plane
    rectangles = int32_tensor(_C.schedule.tap_rectangles((H, W), branches))
    rows = rectangles.view(-1, 8).tolist()
    box = best_box(N, [(h, w) for *_, h, w in rows], kernel.box_pixels)
    step = kernel.step_bytes // dtype.itemsize
    blocks = [-(-k // kernel.tile) * -(-channels // kernel.tile) for k in out_channels]
    jobs = [
        (-(-num_boxes(box, N, h, w) * kernel.box_pixels // step), blocks[branch])
        for _, _, branch, _, _, _, h, w in rows
    ]
    schedule = _C.schedule.split_k(jobs, num_workers, SPLIT_STEPS, kernel.item_steps)
    items, first_items = items_of_workers(schedule, kernel)
    reductions = int32_tensor(schedule["reductions"])
    lists = [rectangles, items, reductions, first_items]
    if kernel.is_persistent:
        boxes = step // kernel.box_pixels
        lists.append(box_items(items, rectangles, box, boxes, channels, kernel.tile))
    tensors = tuple(t.to(device) for t in lists)
    rectangles_at, items_at, reductions_at, first_items_at, *more = (t.data_ptr() for t in tensors)
    work = _C.ConvWgradWork(
        rectangles_at, items_at, reductions_at, items.numel() // 5, reductions.numel() // 4,
        first_items_at, first_items.numel() - 1, box, more[0] if more else 0,
    )  # fmt: skip
    return WgradWorkList(work, tensors, schedule["num_slots"], makespan(schedule, kernel))


def num_boxes(box: tuple[int, int, int], N: int, h: int, w: int) -> int:
    """Of (x, y, n) pixels, that cover ``h`` x ``w`` pixels of ``N`` images."""
    x, y, n = box
    return -(-w // x) * -(-h // y) * -(-N // n)


def best_box(N: int, sizes: Sequence[tuple[int, int]], pixels: int) -> tuple[int, int, int]:
    """The (x, y, n) with that many pixels, a power of two, of which the sizes need the fewest."""
    powers = [1 << i for i in range(pixels.bit_length())]
    boxes = [(x, y, pixels // x // y) for x in reversed(powers) for y in powers if x * y <= pixels]
    return min(boxes, key=lambda box: sum(num_boxes(box, N, h, w) for h, w in sizes))


def items_of_workers(schedule: Mapping[str, Any], kernel: ConvKernel) -> tuple[Tensor, Tensor]:
    """Items, one worker's after another's where it has several, and where they begin.

    Workers without items are left out. They are the last: each of the first items is another's.
    """
    items, workers = int32_tensor(schedule["work_items"]), int32_tensor(schedule["ctas"])
    if kernel.is_persistent:
        items = items.view(-1, 5)[workers.argsort(stable=True)].flatten()
    first_items = workers.bincount().cumsum(0)
    return items, torch.cat([first_items.new_zeros(1), first_items]).int()


def makespan(schedule: Mapping[str, Any], kernel: ConvKernel) -> int:
    """K-iterations of the CTA that has most, with what its items cost besides."""
    items, ctas = int32_tensor(schedule["work_items"]).view(-1, 5), int32_tensor(schedule["ctas"])
    costs = items[:, 3] + kernel.item_steps + SPLIT_STEPS * (items[:, 4] >= 0)
    return int(ctas.bincount(weights=costs, minlength=1).max())


def listed_pixels(pixels: Tensor, plane: tuple[int, int, int]) -> Tensor:
    """Rows of work_list.h's ``ListedPixel``."""
    _, H, W = plane
    return torch.stack([pixels, pixels // W % H << 16 | pixels % W], dim=1)


def tile_items(
    items: Tensor,
    tiles: Tensor,
    pixels: Tensor,
    plane: tuple[int, int, int],
    channels: int,
) -> Tensor:
    """Rows of work_list.h's ``TileItem``; ``channels`` are those of a step."""
    _, H, W = plane
    job, block, first_step, num_steps, slot = items.view(-1, 5).long().unbind(1)
    output, first_pixel, num_pixels, first_tap, num_taps = tiles.view(-1, 5)[job].long().unbind(1)
    first_index = pixels[first_pixel]
    # fmt: off
    return torch.stack([
        block, output, slot, num_steps,
        first_pixel, num_pixels, first_tap, num_taps,
        first_step % num_taps, first_step // num_taps * channels,
        first_index, first_index // (H * W),
    ], dim=1).int()  # fmt: on


def box_items(
    items: Tensor,
    rectangles: Tensor,
    box: tuple[int, int, int],
    boxes_per_step: int,
    channels: int,
    tile: int,
) -> Tensor:
    """Rows of work_list.h's ``BoxItem``, of ``channels`` input channels."""
    box_x, box_y, box_n = box
    job, block, first_step, num_steps, slot = items.view(-1, 5).long().unbind(1)
    dy, dx, branch, index, y, x, h, w = rectangles.view(-1, 8)[job].long().unbind(1)
    blocks_c = -(-channels // tile)
    # One box for a rectangle of no pixels: its items have no steps.
    columns, rows = ((w + box_x - 1) // box_x).clamp(min=1), ((h + box_y - 1) // box_y).clamp(min=1)
    first_box = first_step * boxes_per_step
    # fmt: off
    return torch.stack([
        slot, num_steps, branch, index,
        block // blocks_c * tile, block % blocks_c * tile,
        dy, dx,
        y, x, rows, columns,
        first_box // columns % rows, first_box % columns, first_box // columns // rows * box_n,
        torch.zeros_like(job),
    ], dim=1).int()  # fmt: on


def int32_tensor(buffer: bytearray) -> Tensor:
    return torch.frombuffer(buffer, dtype=torch.int32) if buffer else torch.empty(0).int()
