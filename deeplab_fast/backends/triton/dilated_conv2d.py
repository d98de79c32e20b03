"""output[n, y, x, k] = sum over taps and c of input[n, y + dy, x + dx, c] weight[k, tap, c].

Branches read one input [N, H, W, C] with weights [K, R, S, C] and write the channels of one output
side by side. Implicit GEMM over a work list (csrc/schedule): BLOCK_M listed pixels times
BLOCK_N channels, summed in steps of one tap and BLOCK_K channels. The gradient of the input is the
same sum over the mirrored taps of all branches, that of a weight one over the pixels at which its
tap is inside. A program per work item; the pieces of a split sum are added by a second kernel in a
fixed order.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ... import _C
from ..._native.common import nhwc_output
from ..._native.device_cache import resident
from ...ops.shape_bucket import tf32_is_allowed
from .bilinear import INTERPRETED, block_for


@triton.jit
def _pointer_of(pointers, i_branch):
    """That of one of several branches."""
    p_chosen = pointers[0]
    for i in tl.static_range(1, len(pointers)):
        p_chosen = tl.where(i_branch == i, pointers[i], p_chosen)
    return p_chosen


@triton.jit
def _tap(p_tap):
    """dy, dx, branch and index."""
    return tl.load(p_tap), tl.load(p_tap + 1), tl.load(p_tap + 2), tl.load(p_tap + 3)


@triton.jit
def _branch(p_branches, i_branch, ALIGNMENT: tl.constexpr):
    """K, the first of these channels and the number of taps."""
    p_branch = p_branches + i_branch * 3
    num_channels = tl.multiple_of(tl.load(p_branch), ALIGNMENT)
    i_first_channel = tl.multiple_of(tl.load(p_branch + 1), ALIGNMENT)
    return num_channels, i_first_channel, tl.load(p_branch + 2)


@triton.jit
def store_output(
    b_sum, p_output, p_bias, p_residual, o_pixel, m_pixel, o_channel, m_channel, out_channels,
    pixels_per_image, stride_bias, HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
    ACTIVATION: tl.constexpr,
):  # fmt: skip
    m_output = m_pixel[:, None] & m_channel[None, :]
    o_output = o_pixel.to(tl.int64)[:, None] * out_channels + o_channel[None, :]
    if HAS_BIAS:
        o_image = (o_pixel // pixels_per_image).to(tl.int64)
        o_bias = (o_image * stride_bias)[:, None] + o_channel[None, :]
        b_sum += tl.load(p_bias + o_bias, mask=m_output, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        b_sum += tl.load(p_residual + o_output, mask=m_output, other=0.0).to(tl.float32)
    if ACTIVATION != "none":
        b_sum = tl.where(b_sum < 0, 0.0, b_sum)  # NaN stays NaN
    if ACTIVATION == "relu6":
        b_sum = tl.where(b_sum > 6, 6.0, b_sum)
    tl.store(p_output + o_output, b_sum.to(p_output.dtype.element_ty), mask=m_output)


@triton.jit
def dilated_conv2d_kernel(
    p_output,  # [N, H, W, out_channels]
    p_partial,  # [slots, BLOCK_M, BLOCK_N] fp32
    p_input,  # [N, H, W, in_channels]
    weights,  # of each branch [K, R, S, C]
    p_bias,  # [N or 1, out_channels]
    p_residual,  # [N, H, W, out_channels]
    p_pixels,  # rows of csrc/schedule/work_list.h
    p_taps,
    p_tiles,
    p_items,
    p_branches,  # [branches, 3]: K, the first of these channels, R * S
    H,
    W,
    C,
    in_channels,
    out_channels,
    stride_bias,
    MIRRORED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    ACTIVATION: tl.constexpr,
    PRECISION: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    p_item = p_items + tl.program_id(0) * 5
    p_tile = p_tiles + tl.load(p_item) * 5
    i_block = tl.load(p_item + 1)
    i_first_step = tl.load(p_item + 2)
    num_steps = tl.load(p_item + 3)
    p_tile_taps = p_taps + tl.load(p_tile + 3) * 4
    num_tile_taps = tl.load(p_tile + 4)

    o_m = tl.arange(0, BLOCK_M)
    m_pixel = o_m < tl.load(p_tile + 2)
    o_pixel = tl.load(p_pixels + tl.load(p_tile + 1) + o_m, mask=m_pixel, other=0)
    o_x = o_pixel % W
    o_y = o_pixel // W % H
    o_n = i_block * BLOCK_N + tl.arange(0, BLOCK_N)
    o_k = tl.arange(0, BLOCK_K)
    i_dy, i_dx, i_branch, i_tap = _tap(p_tile_taps + i_first_step % num_tile_taps * 4)
    num_channels, i_first_channel, num_taps = _branch(p_branches, i_branch, ALIGNMENT)
    p_weight = _pointer_of(weights, i_branch)
    m_n = o_n < (C if MIRRORED else num_channels)

    # The next step's tap is loaded here: copies whose addresses wait for a load of the same step
    # would use up the stages of the pipeline.
    b_sum = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for i_step in range(i_first_step, i_first_step + num_steps):
        o_c = i_step // num_tile_taps * BLOCK_K + o_k
        if MIRRORED:
            m_k = o_c < num_channels
            o_weight = (o_c.to(tl.int64) * num_taps + i_tap)[:, None] * C + o_n[None, :]
            p_source = p_input + i_first_channel
        else:
            m_k = o_c < C
            o_weight = (o_n.to(tl.int64) * num_taps + i_tap)[None, :] * C + o_c[:, None]
            p_source = p_input
        m_inside = (o_y + i_dy >= 0) & (o_y + i_dy < H) & (o_x + i_dx >= 0) & (o_x + i_dx < W)
        o_input = (o_pixel + i_dy * W + i_dx).to(tl.int64)[:, None] * in_channels
        b_input = tl.load(
            p_source + o_input + o_c[None, :],
            mask=(m_inside & m_pixel)[:, None] & m_k[None, :],
            other=0.0,
        )
        b_weight = tl.load(p_weight + o_weight, mask=m_k[:, None] & m_n[None, :], other=0.0)
        i_dy, i_dx, i_branch, i_tap = _tap(p_tile_taps + (i_step + 1) % num_tile_taps * 4)
        if MIRRORED:
            num_channels, i_first_channel, num_taps = _branch(p_branches, i_branch, ALIGNMENT)
            p_weight = _pointer_of(weights, i_branch)
        b_sum = tl.dot(b_input, b_weight, b_sum, input_precision=PRECISION)

    i_slot = tl.load(p_item + 4)
    if i_slot < 0:
        store_output(
            b_sum, p_output, p_bias, p_residual, o_pixel, m_pixel,
            o_n if MIRRORED else i_first_channel + o_n, m_n, out_channels, H * W,
            stride_bias, HAS_BIAS, HAS_RESIDUAL, ACTIVATION,
        )  # fmt: skip
    else:
        o_partial = (i_slot.to(tl.int64) * BLOCK_M + o_m)[:, None] * BLOCK_N
        tl.store(p_partial + o_partial + tl.arange(0, BLOCK_N)[None, :], b_sum)


@triton.jit
def _add_slots(p_partial, i_first_slot, num_slots, o_m, BLOCK_M, BLOCK_N: tl.constexpr):
    o_n = tl.arange(0, BLOCK_N)
    b_sum = tl.zeros([o_m.shape[0], BLOCK_N], tl.float32)
    for i in range(num_slots):
        o_row = ((i_first_slot + i).to(tl.int64) * BLOCK_M + o_m) * BLOCK_N
        b_sum += tl.load(p_partial + o_row[:, None] + o_n[None, :])
    return b_sum


@triton.jit
def dilated_conv2d_reduce_kernel(
    p_output,
    p_partial,
    p_bias,
    p_residual,
    p_pixels,
    p_tiles,
    p_reductions,
    p_branches,
    H,
    W,
    C,
    out_channels,
    stride_bias,
    MIRRORED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    ACTIVATION: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    p_reduction = p_reductions + tl.program_id(0) // (BLOCK_M // BLOCK_R) * 4
    o_m = tl.program_id(0) % (BLOCK_M // BLOCK_R) * BLOCK_R + tl.arange(0, BLOCK_R)
    p_tile = p_tiles + tl.load(p_reduction) * 5
    i_branch = tl.load(p_tile)
    m_pixel = o_m < tl.load(p_tile + 2)
    o_pixel = tl.load(p_pixels + tl.load(p_tile + 1) + o_m, mask=m_pixel, other=0)
    o_n = tl.load(p_reduction + 1) * BLOCK_N + tl.arange(0, BLOCK_N)
    num_channels, i_first_channel, _ = _branch(p_branches, i_branch, ALIGNMENT)
    b_sum = _add_slots(
        p_partial, tl.load(p_reduction + 2), tl.load(p_reduction + 3), o_m, BLOCK_M, BLOCK_N
    )
    store_output(
        b_sum, p_output, p_bias, p_residual, o_pixel, m_pixel,
        o_n if MIRRORED else i_first_channel + o_n, o_n < (C if MIRRORED else num_channels),
        out_channels, H * W, stride_bias, HAS_BIAS, HAS_RESIDUAL, ACTIVATION,
    )  # fmt: skip


@triton.jit
def dilated_conv2d_wgrad_kernel(
    grad_weights,  # of each branch [K, R, S, C]
    p_partial,  # [slots, BLOCK_M, BLOCK_N] fp32
    p_grad_output,  # [N, H, W, out_channels]
    p_input,  # [N, H, W, C]
    p_rectangles,  # rows of csrc/schedule/work_list.h
    p_items,
    p_branches,
    H,
    W,
    N,
    C,
    out_channels,
    PRECISION: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """BLOCK_M output channels times BLOCK_N input channels, in steps of BLOCK_K pixels."""
    p_item = p_items + tl.program_id(0) * 5
    p_rectangle = p_rectangles + tl.load(p_item) * 8
    i_block = tl.load(p_item + 1)
    i_first_step = tl.load(p_item + 2)
    num_steps = tl.load(p_item + 3)
    i_dy, i_dx, i_branch, i_tap = _tap(p_rectangle)
    i_y, i_x = tl.load(p_rectangle + 4), tl.load(p_rectangle + 5)
    height, width = tl.load(p_rectangle + 6), tl.load(p_rectangle + 7)
    K, i_first_channel, _ = _branch(p_branches, i_branch, ALIGNMENT)

    num_column_blocks = tl.cdiv(C, BLOCK_N)
    o_m = i_block // num_column_blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    o_n = i_block % num_column_blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    m_m, m_n = o_m < K, o_n < C
    b_sum = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for i_step in range(i_first_step, i_first_step + num_steps):
        o_listed = i_step * BLOCK_K + tl.arange(0, BLOCK_K)
        m_pixel = o_listed < N * height * width
        o_row = o_listed // width
        o_pixel = (o_row // height * H + i_y + o_row % height) * W + i_x + o_listed % width
        o_grad = o_pixel.to(tl.int64)[None, :] * out_channels + (i_first_channel + o_m)[:, None]
        o_input = (o_pixel + i_dy * W + i_dx).to(tl.int64)[:, None] * C + o_n[None, :]
        b_grad = tl.load(p_grad_output + o_grad, mask=m_m[:, None] & m_pixel[None, :], other=0.0)
        b_input = tl.load(p_input + o_input, mask=m_pixel[:, None] & m_n[None, :], other=0.0)
        b_sum = tl.dot(b_grad, b_input, b_sum, input_precision=PRECISION)

    i_slot = tl.load(p_item + 4)
    if i_slot < 0:
        _store_weight(b_sum, grad_weights, p_branches, i_branch, i_tap, o_m, o_n, C, ALIGNMENT)
    else:
        o_partial = (i_slot.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M))[:, None] * BLOCK_N
        tl.store(p_partial + o_partial + tl.arange(0, BLOCK_N)[None, :], b_sum)


@triton.jit
def _store_weight(
    b_sum, weights, p_branches, i_branch, i_tap, o_m, o_n, C, ALIGNMENT: tl.constexpr
):
    p_weight = _pointer_of(weights, i_branch)
    K, _, num_taps = _branch(p_branches, i_branch, ALIGNMENT)
    o_weight = (o_m.to(tl.int64) * num_taps + i_tap)[:, None] * C + o_n[None, :]
    b_weight = b_sum.to(p_weight.dtype.element_ty)
    tl.store(p_weight + o_weight, b_weight, mask=(o_m < K)[:, None] & (o_n < C)[None, :])


@triton.jit
def dilated_conv2d_wgrad_reduce_kernel(
    grad_weights,
    p_partial,
    p_rectangles,
    p_reductions,
    p_branches,
    C,
    ALIGNMENT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    p_reduction = p_reductions + tl.program_id(0) // (BLOCK_M // BLOCK_R) * 4
    o_row = tl.program_id(0) % (BLOCK_M // BLOCK_R) * BLOCK_R + tl.arange(0, BLOCK_R)
    _, _, i_branch, i_tap = _tap(p_rectangles + tl.load(p_reduction) * 8)
    i_block = tl.load(p_reduction + 1)
    num_column_blocks = tl.cdiv(C, BLOCK_N)
    o_m = i_block // num_column_blocks * BLOCK_M + o_row
    o_n = i_block % num_column_blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    b_sum = _add_slots(
        p_partial, tl.load(p_reduction + 2), tl.load(p_reduction + 3), o_row, BLOCK_M, BLOCK_N
    )
    _store_weight(b_sum, grad_weights, p_branches, i_branch, i_tap, o_m, o_n, C, ALIGNMENT)


@triton.jit
def round_to_tf32_kernel(p_output, p_input, num_elements, BLOCK: tl.constexpr):
    """To nearest, ties away from zero, like cvt.rna.tf32."""
    o = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    b_exact = tl.load(p_input + o, mask=o < num_elements, other=0.0)
    b_bits = (b_exact.to(tl.int32, bitcast=True) + 0x1000) & -0x2000
    b_rounded = b_bits.to(tl.float32, bitcast=True)
    b_rounded = tl.where(tl.abs(b_exact) < float("inf"), b_rounded, b_exact)  # NaN stays NaN
    tl.store(p_output + o, b_rounded, mask=o < num_elements)


class Blocks(NamedTuple):
    """Sizes of a program's blocks and how it runs, pinned for a class of shapes and a dtype."""

    m: int
    n: int
    k: int
    num_warps: int
    num_stages: int


_SMALLEST = 16  # that tensor cores multiply


def precision_of(dtype: torch.dtype) -> str:
    """What tl.dot multiplies fp32 in; it rounds no other dtype. On AMD there is no tf32."""
    is_tf32 = dtype == torch.float32 and tf32_is_allowed() and not torch.version.hip
    return "tf32" if is_tf32 else "ieee"


def blocks_for(dtype: torch.dtype, precision: str, rows: int, columns: int, depth: int) -> Blocks:
    """For matrix products of [rows, depth] and [depth, columns]."""
    largest = Blocks(128, 128, 64, 8, 4)
    if dtype == torch.float32:
        largest = Blocks(128, 128, 32, 8, 4) if precision == "tf32" else Blocks(64, 64, 16, 4, 2)
    if INTERPRETED:
        largest = Blocks(block_for(max(rows, _SMALLEST), 0, 512), 128, 256, 1, 1)
    if torch.version.hip:
        largest = largest._replace(num_stages=2)  # 64 KiB of shared memory

    def fitting(size: int, limit: int) -> int:
        return max(_SMALLEST, min(triton.next_power_of_2(size), limit))

    return largest._replace(n=fitting(columns, largest.n), k=fitting(depth, largest.k))


def _reduced_rows(blocks: Blocks) -> int:
    """Rows of a block whose pieces one program adds up."""
    return block_for(blocks.m, 16, 512)


class WorkList(NamedTuple):
    """Rows of work_list.h on the device, and [branches, 3]: K, first channel, taps."""

    pixels: Tensor
    taps: Tensor
    tiles: Tensor
    items: Tensor
    reductions: Tensor
    branches: Tensor
    num_slots: int


_SPLIT_STEPS = 8  # a partial sum written and read back takes about as long as these


def _int32(buffer: bytearray, device: torch.device) -> Tensor:
    rows = torch.frombuffer(buffer, dtype=torch.int32) if buffer else torch.empty(0).int()
    return rows.to(device)


def _scheduled(
    jobs: list[tuple[int, int]], device: torch.device, num_workers: int
) -> tuple[Tensor, Tensor, int]:
    schedule = _C.schedule.split_k(jobs, num_workers, _SPLIT_STEPS)
    items, reductions = (_int32(schedule[name], device) for name in ("work_items", "reductions"))
    return items, reductions, schedule["num_slots"]


def _branch_rows(
    branches: tuple[tuple[int, ...], ...], channels: tuple[int, ...], device: torch.device
) -> Tensor:
    rows, first = [], 0
    for (kernel_h, kernel_w, _, _), count in zip(branches, channels):
        rows.append([count, first, kernel_h * kernel_w])
        first += count
    return torch.tensor(rows, dtype=torch.int32, device=device)


@resident
def work_list(
    plane: tuple[int, int, int],
    branches: tuple[tuple[int, int, int, int], ...],
    in_channels: int,
    out_channels: tuple[int, ...],
    mirrored: bool,
    blocks: Blocks,
    device: torch.device,
    num_workers: int,
) -> WorkList:
    """Of a forward pass or, ``mirrored``, of the gradient of its input.

    ``plane`` is (N, H, W), ``branches`` are (kernel_H, kernel_W, dilation_H, dilation_W), and
    ``num_workers`` is how many programs run at once.
    """
    list_tiles = _C.schedule.input_grad_tiles if mirrored else _C.schedule.forward_tiles
    pixels, taps, tiles = (
        _int32(rows, torch.device("cpu")) for rows in list_tiles(plane, branches, blocks.m)
    )
    depth = max(out_channels) if mirrored else in_channels
    jobs = [
        (
            num_taps * triton.cdiv(depth, blocks.k),
            triton.cdiv(in_channels if mirrored else out_channels[output], blocks.n),
        )
        for output, _, _, _, num_taps in tiles.view(-1, 5).tolist()
    ]
    items, reductions, num_slots = _scheduled(jobs, device, num_workers)
    rows = _branch_rows(branches, out_channels, device)
    return WorkList(
        pixels.to(device), taps.to(device), tiles.to(device), items, reductions, rows, num_slots
    )


class WeightWorkList(NamedTuple):
    """As WorkList, for the gradients of weights."""

    rectangles: Tensor
    items: Tensor
    reductions: Tensor
    branches: Tensor
    num_slots: int


@resident
def weight_work_list(
    plane: tuple[int, int, int],
    branches: tuple[tuple[int, int, int, int], ...],
    in_channels: int,
    out_channels: tuple[int, ...],
    blocks: Blocks,
    device: torch.device,
    num_workers: int,
) -> WeightWorkList:
    N, H, W = plane
    rectangles = _int32(_C.schedule.tap_rectangles((H, W), branches), torch.device("cpu"))
    jobs = [
        (
            triton.cdiv(N * height * width, blocks.k),
            triton.cdiv(out_channels[branch], blocks.m) * triton.cdiv(in_channels, blocks.n),
        )
        for _, _, branch, _, _, _, height, width in rectangles.view(-1, 8).tolist()
    ]
    items, reductions, num_slots = _scheduled(jobs, device, num_workers)
    rows = _branch_rows(branches, out_channels, device)
    return WeightWorkList(rectangles.to(device), items, reductions, rows, num_slots)


def _alignment(channels: tuple[int, ...]) -> int:
    """What the branches' numbers of channels, and so where they begin, are multiples of."""
    return math.gcd(16, *channels)


def _num_workers(device: torch.device) -> int:
    if device.type == "cpu":
        return 8  # makes sums of test size both split and not
    return torch.cuda.get_device_properties(device).multi_processor_count


def _geometry(
    plane: tuple[int, int, int], weights: Sequence[Tensor], dilations: Sequence[Sequence[int]]
) -> tuple[tuple[int, int, int, int], ...]:
    # A rate beyond the map does what the map's size does, and that fits the work list's int32.
    _, H, W = plane
    return tuple(
        (weight.size(2), weight.size(3), min(vertical, H), min(horizontal, W))
        for weight, (vertical, horizontal) in zip(weights, dilations)
    )


def _operand(tensor: Tensor, precision: str) -> Tensor:
    """In channels_last and, of tf32, rounded to it: tensor cores would cut the last bits off."""
    tensor = tensor.contiguous(memory_format=torch.channels_last)
    if precision != "tf32":
        return tensor
    rounded = torch.empty_like(tensor, memory_format=torch.channels_last)
    block = block_for(tensor.numel(), 1024, 65536)
    round_to_tf32_kernel[(triton.cdiv(tensor.numel(), block),)](
        rounded, tensor, tensor.numel(), BLOCK=block, num_warps=4, enable_fp_fusion=True
    )
    return rounded


def _sum_taps(
    output: Tensor,
    input: Tensor,
    weights: Sequence[Tensor],
    dilations: Sequence[Sequence[int]],
    mirrored: bool,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    activation: str = "none",
) -> None:
    N, _, H, W = input.shape
    C, channels = weights[0].size(1), tuple(weight.size(0) for weight in weights)
    branches = _geometry((N, H, W), weights, dilations)
    precision = precision_of(input.dtype)
    columns, depth = (C, max(channels)) if mirrored else (max(channels), C)
    blocks = blocks_for(input.dtype, precision, N * H * W, columns, depth)
    work = work_list(
        (N, H, W), branches, C, channels, mirrored, blocks, input.device, _num_workers(input.device)
    )
    partial = input.new_empty(work.num_slots * blocks.m * blocks.n, dtype=torch.float32)
    epilogue: dict[str, Any] = dict(
        MIRRORED=mirrored,
        HAS_BIAS=bias is not None,
        HAS_RESIDUAL=residual is not None,
        ACTIVATION=activation,
        ALIGNMENT=_alignment(channels),
        BLOCK_M=blocks.m,
        BLOCK_N=blocks.n,
        enable_fp_fusion=True,
    )
    stride_bias = 0 if bias is None or bias.dim() == 1 else bias.stride(0)
    bias = output if bias is None else bias
    residual = output if residual is None else residual
    dilated_conv2d_kernel[(work.items.numel() // 6,)](
        output,
        partial,
        _operand(input, precision),
        tuple(_operand(weight, precision) for weight in weights),
        bias,
        residual,
        work.pixels,
        work.taps,
        work.tiles,
        work.items,
        work.branches,
        H,
        W,
        C,
        input.size(1),
        output.size(1),
        stride_bias,
        PRECISION=precision,
        BLOCK_K=blocks.k,
        num_warps=blocks.num_warps,
        num_stages=blocks.num_stages,
        **epilogue,
    )
    if work.reductions.numel():
        rows = _reduced_rows(blocks)
        dilated_conv2d_reduce_kernel[(work.reductions.numel() // 4 * (blocks.m // rows),)](
            output,
            partial,
            bias,
            residual,
            work.pixels,
            work.tiles,
            work.reductions,
            work.branches,
            H,
            W,
            C,
            output.size(1),
            stride_bias,
            BLOCK_R=rows,
            num_warps=4,
            **epilogue,
        )


def dilated_conv2d(
    input: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    dilations: Sequence[Sequence[int]],
    residual: Tensor | None = None,
    activation: str = "none",
) -> Tensor:
    """The branches' outputs, channels_last. ``residual`` is written over and returned.

    Biases are [K] each, or one [N, K] of images and channels.
    """
    output = residual
    if output is None:
        output = nhwc_output(input, sum(weight.size(0) for weight in weights))
    given = [bias for bias in biases if bias is not None]
    bias = given[0].contiguous() if len(given) == 1 else torch.cat(given) if given else None
    _sum_taps(output, input, weights, dilations, False, bias, residual, activation)
    return output


def input_gradient(
    grad_output: Tensor,
    weights: Sequence[Tensor],
    dilations: Sequence[Sequence[int]],
    image_bias: Tensor | None = None,
) -> Tensor:
    """Of all branches in one launch, channels_last, with ``image_bias`` [N, C] added."""
    grad_input = nhwc_output(grad_output, weights[0].size(1))
    bias = None if image_bias is None else image_bias.contiguous()
    _sum_taps(grad_input, grad_output, weights, dilations, True, bias)
    return grad_input


def weight_gradients(
    grad_output: Tensor,
    input: Tensor,
    weights: Sequence[Tensor],
    dilations: Sequence[Sequence[int]],
) -> list[Tensor]:
    """Of all branches in one launch, channels_last."""
    N, C, H, W = input.shape
    channels = tuple(weight.size(0) for weight in weights)
    precision = precision_of(input.dtype)
    blocks = blocks_for(input.dtype, precision, max(channels), C, N * H * W)
    num_workers = _num_workers(input.device)
    branches = _geometry((N, H, W), weights, dilations)
    work = weight_work_list((N, H, W), branches, C, channels, blocks, input.device, num_workers)
    grads = [torch.empty_like(w, memory_format=torch.channels_last) for w in weights]
    partial = input.new_empty(work.num_slots * blocks.m * blocks.n, dtype=torch.float32)
    dilated_conv2d_wgrad_kernel[(work.items.numel() // 6,)](
        tuple(grads),
        partial,
        _operand(grad_output, precision),
        _operand(input, precision),
        work.rectangles,
        work.items,
        work.branches,
        H,
        W,
        N,
        C,
        sum(channels),
        PRECISION=precision,
        ALIGNMENT=_alignment(channels),
        BLOCK_M=blocks.m,
        BLOCK_N=blocks.n,
        BLOCK_K=blocks.k,
        num_warps=blocks.num_warps,
        num_stages=blocks.num_stages,
        enable_fp_fusion=True,
    )
    if work.reductions.numel():
        rows = _reduced_rows(blocks)
        dilated_conv2d_wgrad_reduce_kernel[(work.reductions.numel() // 4 * (blocks.m // rows),)](
            tuple(grads),
            partial,
            work.rectangles,
            work.reductions,
            work.branches,
            C,
            ALIGNMENT=_alignment(channels),
            BLOCK_M=blocks.m,
            BLOCK_N=blocks.n,
            BLOCK_R=rows,
            num_warps=4,
            enable_fp_fusion=True,
        )
    return grads
