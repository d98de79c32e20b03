"""Work lists of dense convolutions: which CTA computes which k-iterations of which output tile.

The compiled module makes the lists (csrc/schedule). This file converts them to the structs that
kernels read, and caches them on the device.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from . import _C
from .common import LaunchContext
from .device_cache import cached_on_device

Branches = tuple[tuple[int, int, int, int], ...]  # kernel_H, kernel_W, dilation_H, dilation_W
ListTiles = Callable[..., tuple[bytearray, bytearray, bytearray]]

# Writing the fp32 sums of a split output tile to its workspace slot and reading them back moves as
# many bytes as eight k-iterations.
SPLIT_K_ITERS = 8


class ConvKernel(NamedTuple):
    """A CUDA kernel of dilated convolution and what its work lists depend on."""

    launcher: str
    tile: int  # pixels and output channels of a tile; weight gradient: output and input channels
    k_iter_bytes: int  # bytes of input channels in a k-iteration; weight gradient: of pixels
    sm80_ctas: int  # CTAs of CONV_SM80 that one CTA or cluster of this kernel replaces
    is_persistent: bool = False  # a CTA computes several work items, otherwise one
    item_k_iters: int = 0  # cost of beginning and storing a work item, in k-iterations
    box_pixels: int = 1  # weight gradient: pixels that one instruction copies


CONV_SM80 = ConvKernel("dilated_conv2d_fwd", _C.CONV_TILE, _C.CONV_K_ITER_BYTES, 1)
CONV_SM90 = ConvKernel(
    "dilated_conv2d_fwd_sm90",
    _C.CONV_TILE_SM90,
    _C.CONV_K_ITER_BYTES_SM90,
    4,
    is_persistent=True,
    item_k_iters=2,
)

WGRAD_SM80 = ConvKernel("dilated_conv2d_wgrad", _C.CONV_TILE, _C.CONV_K_ITER_BYTES, 1)
WGRAD_SM90 = ConvKernel(
    "dilated_conv2d_wgrad_sm90",
    _C.CONV_TILE_SM90,
    _C.CONV_K_ITER_BYTES_SM90,
    4,
    is_persistent=True,
    item_k_iters=2,
    box_pixels=_C.WGRAD_BOX_SM90,
)


def conv_kernel(context: LaunchContext, dtype: torch.dtype, size: tuple[int, int]) -> ConvKernel:
    """The kernel for convolutions of maps of ``size`` (H, W), or for gradients of that size.

    TF32 uses the sm_80 kernel, which rounds its operands; wgmma truncates them. The sm_90 kernel
    packs the two coordinates of a pixel into 16 bits each.
    """
    is_small = max(size) < 2**15
    if context.is_sm90 and dtype != torch.float32 and is_small:
        return CONV_SM90
    return CONV_SM80


def wgrad_kernel(context: LaunchContext, dtype: torch.dtype) -> ConvKernel:
    """The kernel for weight gradients: wgmma transposes 16-bit types only."""
    return WGRAD_SM90 if context.is_sm90 and dtype != torch.float32 else WGRAD_SM80


def k_iters_per_tap(channels: int, dtype: torch.dtype, kernel: ConvKernel = CONV_SM80) -> int:
    """Number of k-iterations for one tap with ``channels`` input channels."""
    return -(-channels * dtype.itemsize // kernel.k_iter_bytes)


def conv_branches(
    plane: tuple[int, int], weights: Sequence[Tensor], dilations: Sequence[Sequence[int]]
) -> Branches:
    """Kernel sizes and dilations of the branches over maps of ``plane`` (H, W).

    Dilations are clipped to the size of the map, so that they fit the int32 of a work list. The
    same taps fall outside the map.
    """
    H, W = plane
    return tuple(
        (weight.size(2), weight.size(3), min(vertical, H), min(horizontal, W))
        for weight, (vertical, horizontal) in zip(weights, dilations)
    )


class Schedule(NamedTuple):
    """Work items on the CPU. Each row is a struct of csrc/schedule/work_list.h, as int32."""

    work_items: Tensor  # [n, 5]
    ctas: Tensor  # [n], the CTA of each work item
    reductions: Tensor  # [m, 4], split output tiles
    num_slots: int  # workspace slots for fp32 sums


def _schedule(tiles: list[tuple[int, int]], num_ctas: int, item_k_iters: int) -> Schedule:
    """Distribute tiles of (k-iterations, channel blocks) over CTAs."""
    lists = _C.schedule.split_k(tiles, num_ctas, SPLIT_K_ITERS, item_k_iters)
    return Schedule(
        int32_rows(lists["work_items"], 5),
        int32_rows(lists["ctas"], 1).flatten(),
        int32_rows(lists["reductions"], 4),
        lists["num_slots"],
    )


class TileSchedule(NamedTuple):
    """Output tiles of a convolution and its schedule, on the CPU."""

    pixels: Tensor  # [p] indices into [N, H, W]
    taps: Tensor  # [t, 4]
    tiles: Tensor  # [n, 5]
    schedule: Schedule


def tile_schedule(
    list_tiles: ListTiles,
    plane: tuple[int, int, int],
    branches: Branches,
    tile: tuple[int, int],
    k_iters_per_tap: int,
    out_channels: Sequence[int],
    num_ctas: int,
    item_k_iters: int = 0,
) -> TileSchedule:
    """Work items of a convolution.

    Args:
        list_tiles: ``_C.schedule.forward_tiles`` or ``input_grad_tiles``.
        plane: (N, H, W).
        branches: from :func:`conv_branches`.
        tile: pixels and channels of an output tile.
        k_iters_per_tap: from :func:`k_iters_per_tap`.
        out_channels: channels of each output.
        num_ctas: CTAs that run at once.
        item_k_iters: as in :class:`ConvKernel`.
    """
    tile_pixels, tile_channels = tile
    pixels, taps, tiles = list_tiles(plane, branches, tile_pixels)
    rows = int32_rows(tiles, 5)
    costs = [
        (num_taps * k_iters_per_tap, -(-out_channels[output] // tile_channels))
        for output, _, _, _, num_taps in rows.tolist()
    ]
    schedule = _schedule(costs, num_ctas, item_k_iters)
    return TileSchedule(int32_rows(pixels, 1).flatten(), int32_rows(taps, 4), rows, schedule)


class ConvWorkList(NamedTuple):
    """Work list of a CUDA convolution; ``tensors`` own the memory that ``work`` points to."""

    kernel: ConvKernel
    work: _C.ConvWork
    tensors: tuple[Tensor, ...]
    num_slots: int


@cached_on_device
def conv_work_list(
    list_tiles: ListTiles,
    plane: tuple[int, int, int],
    branches: Branches,
    k_iters_per_tap: int,
    out_channels: tuple[int, ...],
    device: torch.device,
    num_ctas: int,
    kernel: ConvKernel = CONV_SM80,
) -> ConvWorkList:
    """The work list of a launch of ``kernel``, on ``device``.

    The arguments are those of :func:`tile_schedule`; ``num_ctas`` counts CTAs of ``CONV_SM80``.
    """
    pixels, taps, tiles, schedule = tile_schedule(
        list_tiles,
        plane,
        branches,
        (kernel.tile, kernel.tile),
        k_iters_per_tap,
        out_channels,
        max(1, num_ctas // kernel.sm80_ctas),
        kernel.item_k_iters,
    )
    work_items, first_items = items_by_cta(schedule, kernel)
    lists = [pixels, taps, tiles, work_items, schedule.reductions, first_items]
    if kernel.is_persistent:
        channels = kernel.k_iter_bytes // 2  # the kernel takes 16-bit types only
        lists += [
            listed_pixels(pixels, plane),
            tile_items(work_items, tiles, pixels, plane, channels),
        ]
    tensors = tuple(t.to(device) for t in lists)
    pixels_at, taps_at, tiles_at, items_at, reductions_at, first_items_at, *more = (
        t.data_ptr() for t in tensors
    )
    listed_pixels_at, tile_items_at = more or (0, 0)
    work = _C.ConvWork(
        pixels_at, taps_at, tiles_at, items_at, reductions_at, len(work_items),
        len(schedule.reductions), first_items_at, len(first_items) - 1, listed_pixels_at,
        tile_items_at,
    )  # fmt: skip
    return ConvWorkList(kernel, work, tensors, schedule.num_slots)


def rectangle_schedule(
    rectangles: Tensor,
    k_iters: Callable[[int, int], int],
    blocks: Sequence[int],
    num_ctas: int,
    item_k_iters: int = 0,
) -> Schedule:
    """Work items of the gradients of weights.

    Args:
        rectangles: rows of :func:`tap_rectangles`, the pixels that output tiles sum over.
        k_iters: function of (height, width) of a rectangle: its k-iterations in all images.
        blocks: number of blocks of output times input channels of each branch.
        num_ctas: CTAs that run at once.
        item_k_iters: as in :class:`ConvKernel`.
    """
    costs = [(k_iters(h, w), blocks[branch]) for _, _, branch, _, _, _, h, w in rectangles.tolist()]
    return _schedule(costs, num_ctas, item_k_iters)


def tap_rectangles(plane: tuple[int, int], branches: Branches) -> Tensor:
    """Rectangles [taps, 8] of the pixels at which each tap of each branch is inside the map."""
    return int32_rows(_C.schedule.tap_rectangles(plane, branches), 8)


class WgradWorkList(NamedTuple):
    """Work list of a CUDA weight gradient; ``tensors`` own the memory that ``work`` points to."""

    work: _C.ConvWgradWork
    tensors: tuple[Tensor, ...]  # rectangles, work items, reductions, first items
    num_slots: int


@cached_on_device
def wgrad_work_list(
    plane: tuple[int, int, int],
    branches: Branches,
    channels: int,
    out_channels: tuple[int, ...],
    dtype: torch.dtype,
    device: torch.device,
    num_ctas: int,
    kernel: ConvKernel = WGRAD_SM80,
) -> WgradWorkList:
    """The work list of the gradients of all branches' weights, on ``device``.

    ``plane`` is (N, H, W); ``num_ctas`` counts CTAs of ``WGRAD_SM80``.
    """
    N, H, W = plane
    rectangles = tap_rectangles((H, W), branches)
    box = best_box(N, [(h, w) for *_, h, w in rectangles.tolist()], kernel.box_pixels)
    pixels_per_k_iter = kernel.k_iter_bytes // dtype.itemsize

    def k_iters(h: int, w: int) -> int:
        return -(-num_boxes(box, N, h, w) * kernel.box_pixels // pixels_per_k_iter)

    schedule = rectangle_schedule(
        rectangles,
        k_iters,
        [-(-k // kernel.tile) * -(-channels // kernel.tile) for k in out_channels],
        max(1, num_ctas // kernel.sm80_ctas),
        kernel.item_k_iters,
    )
    work_items, first_items = items_by_cta(schedule, kernel)
    lists = [rectangles, work_items, schedule.reductions, first_items]
    if kernel.is_persistent:
        boxes = pixels_per_k_iter // kernel.box_pixels
        lists.append(box_items(work_items, rectangles, box, boxes, channels, kernel.tile))
    tensors = tuple(t.to(device) for t in lists)
    rectangles_at, items_at, reductions_at, first_items_at, *more = (t.data_ptr() for t in tensors)
    work = _C.ConvWgradWork(
        rectangles_at, items_at, reductions_at, len(work_items), len(schedule.reductions),
        first_items_at, len(first_items) - 1, box, more[0] if more else 0,
    )  # fmt: skip
    return WgradWorkList(work, tensors, schedule.num_slots)


def num_boxes(box: tuple[int, int, int], N: int, h: int, w: int) -> int:
    """Number of boxes of (x, y, n) pixels that cover ``h`` x ``w`` pixels of ``N`` images."""
    x, y, n = box
    return -(-w // x) * -(-h // y) * -(-N // n)


def best_box(N: int, sizes: Sequence[tuple[int, int]], pixels: int) -> tuple[int, int, int]:
    """The shape (x, y, n) of boxes of ``pixels``, a power of two, that needs the fewest boxes."""
    powers = [1 << i for i in range(pixels.bit_length())]
    boxes = [(x, y, pixels // x // y) for x in reversed(powers) for y in powers if x * y <= pixels]
    return min(boxes, key=lambda box: sum(num_boxes(box, N, h, w) for h, w in sizes))


def items_by_cta(schedule: Schedule, kernel: ConvKernel) -> tuple[Tensor, Tensor]:
    """Work items, sorted by CTA if a CTA has several, and the index of each CTA's first item.

    CTAs without work items are left out. They come last, because the first work items go to
    different CTAs.
    """
    work_items, ctas = schedule.work_items, schedule.ctas
    if kernel.is_persistent:
        work_items = work_items[ctas.argsort(stable=True)]
    first_items = ctas.bincount().cumsum(0)
    return work_items, torch.cat([first_items.new_zeros(1), first_items]).int()


def listed_pixels(pixels: Tensor, plane: tuple[int, int, int]) -> Tensor:
    """Rows of the struct ``ListedPixel``."""
    _, H, W = plane
    return torch.stack([pixels, pixels // W % H << 16 | pixels % W], dim=1)


def tile_items(
    work_items: Tensor,
    tiles: Tensor,
    pixels: Tensor,
    plane: tuple[int, int, int],
    channels: int,
) -> Tensor:
    """Rows of the struct ``TileItem``; ``channels`` are those of a k-iteration."""
    _, H, W = plane
    tile, block, first_k_iter, num_k_iters, slot = work_items.long().unbind(1)
    output, first_pixel, num_pixels, first_tap, num_taps = tiles[tile].long().unbind(1)
    first_index = pixels[first_pixel]
    # fmt: off
    return torch.stack([
        block, output, slot, num_k_iters,
        first_pixel, num_pixels, first_tap, num_taps,
        first_k_iter % num_taps, first_k_iter // num_taps * channels,
        first_index, first_index // (H * W),
    ], dim=1).int()  # fmt: on


def box_items(
    work_items: Tensor,
    rectangles: Tensor,
    box: tuple[int, int, int],
    boxes_per_k_iter: int,
    channels: int,
    tile: int,
) -> Tensor:
    """Rows of the struct ``BoxItem``, for ``channels`` input channels."""
    box_x, box_y, box_n = box
    rectangle, block, first_k_iter, num_k_iters, slot = work_items.long().unbind(1)
    dy, dx, branch, index, y, x, h, w = rectangles[rectangle].long().unbind(1)
    blocks_c = -(-channels // tile)
    # A rectangle without pixels counts as one box: its work items have no k-iterations.
    columns, rows = ((w + box_x - 1) // box_x).clamp(min=1), ((h + box_y - 1) // box_y).clamp(min=1)
    first_box = first_k_iter * boxes_per_k_iter
    # fmt: off
    return torch.stack([
        slot, num_k_iters, branch, index,
        block // blocks_c * tile, block % blocks_c * tile,
        dy, dx,
        y, x, rows, columns,
        first_box // columns % rows, first_box % columns, first_box // columns // rows * box_n,
        torch.zeros_like(rectangle),
    ], dim=1).int()  # fmt: on


def int32_rows(buffer: bytearray, columns: int) -> Tensor:
    """[n, columns] int32 tensor over the memory of ``buffer``."""
    rows = torch.frombuffer(buffer, dtype=torch.int32) if buffer else torch.empty(0).int()
    return rows.view(-1, columns)
