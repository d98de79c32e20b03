"""output[n, y, x, k] = sum over taps and c of input[n, y + dy, x + dx, c] weight[k, tap, c].

The branches read one input [N, H, W, C] with weights [K, R, S, C] and write consecutive channels of
one output. The kernel is an implicit GEMM over a work list (csrc/schedule/work_list.h): an output
tile is BLOCK_M listed pixels times BLOCK_N channels, and a k-iteration multiplies one tap and
BLOCK_K channels. The gradient of the input is the same sum over the flipped taps of all branches.
Each program computes one work item. A second kernel adds the partial sums of split output tiles in
a fixed order.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..._native import _C
from ..._native.device_cache import cached_on_device
from ..._native.limits import MAX_TAPS
from ..._native.memory_format import channels_last, empty_nhwc, in_format_of
from ..._native.pooling import mean_of_pixels
from ..._native.precision import tf32_is_allowed
from ..._native.work_lists import (
    Branches,
    conv_branches,
    tile_schedule,
)
from ..arguments import DilatedConv2d, ParallelDilatedConv2d, ParallelDilatedConv2dAndMean
from ..registry import register_kernel
from . import depthwise_conv2d
from .bilinear import INTERPRETED, block_for
from .device import DTYPES, MAX_INDEX, widened
from .epilogue import store_output


@triton.jit
def pointer_of(pointers, i_branch):
    """The pointer of branch ``i_branch``."""
    p_chosen = pointers[0]
    for i in tl.static_range(1, len(pointers)):
        p_chosen = tl.where(i_branch == i, pointers[i], p_chosen)
    return p_chosen


@triton.jit
def load_tap(p_tap):
    """The fields of a tap: dy, dx, branch and index."""
    return tl.load(p_tap), tl.load(p_tap + 1), tl.load(p_tap + 2), tl.load(p_tap + 3)


@triton.jit
def load_branch(p_branches, i_branch, ALIGNMENT: tl.constexpr):
    """K, the first output channel and the number of taps of a branch."""
    p_branch = p_branches + i_branch * 3
    num_channels = tl.multiple_of(tl.load(p_branch), ALIGNMENT)
    i_first_channel = tl.multiple_of(tl.load(p_branch + 1), ALIGNMENT)
    return num_channels, i_first_channel, tl.load(p_branch + 2)


@triton.jit
def dilated_conv2d_kernel(
    p_output,  # [N, H, W, out_channels]
    p_partial,  # [slots, BLOCK_M, BLOCK_N] fp32
    p_input,  # [N, H, W, in_channels]
    weights,  # one [K, R, S, C] per branch
    p_bias,  # [N or 1, out_channels]
    p_residual,  # [N, H, W, out_channels]
    p_pixels,  # this and the next three: rows of csrc/schedule/work_list.h
    p_taps,
    p_tiles,
    p_items,
    p_branches,  # [branches, 3]: K, first output channel, R * S
    H,
    W,
    C,
    in_channels,
    out_channels,
    stride_bias,
    FLIPPED: tl.constexpr,
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
    i_dy, i_dx, i_branch, i_tap = load_tap(p_tile_taps + i_first_step % num_tile_taps * 4)
    num_channels, i_first_channel, num_taps = load_branch(p_branches, i_branch, ALIGNMENT)
    p_weight = pointer_of(weights, i_branch)
    m_n = o_n < (C if FLIPPED else num_channels)

    # Each step loads the tap of the next step. If the addresses of its copies depended on a load
    # of the same step, that load would use up stages of the pipeline.
    b_sum = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for i_step in range(i_first_step, i_first_step + num_steps):
        o_c = i_step // num_tile_taps * BLOCK_K + o_k
        if FLIPPED:
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
        i_dy, i_dx, i_branch, i_tap = load_tap(p_tile_taps + (i_step + 1) % num_tile_taps * 4)
        if FLIPPED:
            num_channels, i_first_channel, num_taps = load_branch(p_branches, i_branch, ALIGNMENT)
            p_weight = pointer_of(weights, i_branch)
        b_sum = tl.dot(b_input, b_weight, b_sum, input_precision=PRECISION)

    i_slot = tl.load(p_item + 4)
    if i_slot < 0:
        store_output(
            b_sum, p_output, p_bias, p_residual, o_pixel, m_pixel,
            o_n if FLIPPED else i_first_channel + o_n, m_n, out_channels, H * W,
            stride_bias, HAS_BIAS, HAS_RESIDUAL, ACTIVATION,
        )  # fmt: skip
    else:
        o_partial = (i_slot.to(tl.int64) * BLOCK_M + o_m)[:, None] * BLOCK_N
        tl.store(p_partial + o_partial + tl.arange(0, BLOCK_N)[None, :], b_sum)


@triton.jit
def add_slots(p_partial, i_first_slot, num_slots, o_m, BLOCK_M, BLOCK_N: tl.constexpr):
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
    FLIPPED: tl.constexpr,
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
    num_channels, i_first_channel, _ = load_branch(p_branches, i_branch, ALIGNMENT)
    b_sum = add_slots(
        p_partial, tl.load(p_reduction + 2), tl.load(p_reduction + 3), o_m, BLOCK_M, BLOCK_N
    )
    store_output(
        b_sum, p_output, p_bias, p_residual, o_pixel, m_pixel,
        o_n if FLIPPED else i_first_channel + o_n, o_n < (C if FLIPPED else num_channels),
        out_channels, H * W, stride_bias, HAS_BIAS, HAS_RESIDUAL, ACTIVATION,
    )  # fmt: skip


@triton.jit
def round_to_tf32_kernel(p_output, p_input, num_elements, BLOCK: tl.constexpr):
    """Round to TF32: to nearest, ties away from zero, like cvt.rna.tf32."""
    o = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    b_exact = tl.load(p_input + o, mask=o < num_elements, other=0.0)
    b_bits = (b_exact.to(tl.int32, bitcast=True) + 0x1000) & -0x2000
    b_rounded = b_bits.to(tl.float32, bitcast=True)
    b_rounded = tl.where(tl.abs(b_exact) < float("inf"), b_rounded, b_exact)  # NaN stays NaN
    tl.store(p_output + o, b_rounded, mask=o < num_elements)


class Blocks(NamedTuple):
    """Block sizes, warps and pipeline stages of a program."""

    m: int
    n: int
    k: int
    num_warps: int
    num_stages: int


_SMALLEST = 16  # smallest block that tensor cores multiply


def precision_of(dtype: torch.dtype) -> str:
    """``input_precision`` of tl.dot, which affects fp32 only. AMD GPUs have no TF32."""
    is_tf32 = dtype == torch.float32 and tf32_is_allowed() and not torch.version.hip
    return "tf32" if is_tf32 else "ieee"


def blocks_for(dtype: torch.dtype, precision: str, rows: int, columns: int, depth: int) -> Blocks:
    """Blocks for the matrix product of [rows, depth] and [depth, columns]."""
    largest = Blocks(128, 128, 64, 8, 4)
    if dtype == torch.float32:
        largest = Blocks(128, 128, 32, 8, 4) if precision == "tf32" else Blocks(64, 64, 16, 4, 2)
    if INTERPRETED:
        largest = Blocks(block_for(max(rows, _SMALLEST), 0, 512), 128, 256, 1, 1)
    if torch.version.hip:
        largest = largest._replace(num_stages=2)  # AMD GPUs have 64 KiB of shared memory

    def fitting(size: int, limit: int) -> int:
        return max(_SMALLEST, min(int(triton.next_power_of_2(size)), limit))

    return largest._replace(n=fitting(columns, largest.n), k=fitting(depth, largest.k))


def reduced_rows(blocks: Blocks) -> int:
    """Rows of a split output tile for which one program adds the partial sums."""
    return block_for(blocks.m, 16, 512)


class WorkList(NamedTuple):
    """Work list on the device: rows of csrc/schedule; branches [n, 3]: K, first channel, taps."""

    pixels: Tensor
    taps: Tensor
    tiles: Tensor
    work_items: Tensor
    reductions: Tensor
    branches: Tensor
    num_slots: int


def branch_rows(branches: Branches, channels: tuple[int, ...], device: torch.device) -> Tensor:
    rows, first = [], 0
    for (kernel_h, kernel_w, _, _), count in zip(branches, channels):
        rows.append([count, first, kernel_h * kernel_w])
        first += count
    return torch.tensor(rows, dtype=torch.int32, device=device)


@cached_on_device
def work_list(
    plane: tuple[int, int, int],
    branches: Branches,
    in_channels: int,
    out_channels: tuple[int, ...],
    flipped: bool,
    blocks: Blocks,
    device: torch.device,
    num_ctas: int,
) -> WorkList:
    """Work list of a forward pass or, with flipped taps, of the gradient of its input.

    ``plane`` is (N, H, W) and ``num_ctas`` the number of programs that run at once.
    """
    depth = max(out_channels) if flipped else in_channels
    pixels, taps, tiles, schedule = tile_schedule(
        _C.schedule.input_grad_tiles if flipped else _C.schedule.forward_tiles,
        plane,
        branches,
        (blocks.m, blocks.n),
        triton.cdiv(depth, blocks.k),
        (in_channels,) if flipped else out_channels,
        num_ctas,
    )
    return WorkList(
        pixels.to(device),
        taps.to(device),
        tiles.to(device),
        schedule.work_items.to(device),
        schedule.reductions.to(device),
        branch_rows(branches, out_channels, device),
        schedule.num_slots,
    )


def alignment(channels: tuple[int, ...]) -> int:
    """Common divisor, at most 16, of the branches' numbers of channels and first channels."""
    return math.gcd(16, *channels)


def num_programs(device: torch.device) -> int:
    if device.type == "cpu":
        return 8  # splits some output tiles of the tests' sizes, but not all
    return torch.cuda.get_device_properties(device).multi_processor_count


def operand(tensor: Tensor, precision: str) -> Tensor:
    """``tensor`` in channels_last; for TF32 rounded, because tensor cores would truncate it."""
    tensor = channels_last(tensor)
    if precision != "tf32":
        return tensor
    rounded = torch.empty_like(tensor, memory_format=torch.channels_last)
    block = block_for(tensor.numel(), 1024, 65536)
    round_to_tf32_kernel[(triton.cdiv(tensor.numel(), block),)](
        rounded, tensor, tensor.numel(), BLOCK=block, num_warps=4, enable_fp_fusion=True
    )
    return rounded


def sum_taps(
    output: Tensor,
    input: Tensor,
    weights: Sequence[Tensor],
    dilations: Sequence[Sequence[int]],
    flipped: bool,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    activation: str = "none",
) -> None:
    N, _, H, W = input.shape
    C, channels = weights[0].size(1), tuple(weight.size(0) for weight in weights)
    branches = conv_branches((H, W), weights, dilations)
    precision = precision_of(input.dtype)
    columns, depth = (C, max(channels)) if flipped else (max(channels), C)
    blocks = blocks_for(input.dtype, precision, N * H * W, columns, depth)
    work = work_list(
        (N, H, W), branches, C, channels, flipped, blocks, input.device, num_programs(input.device)
    )
    partial = input.new_empty(work.num_slots * blocks.m * blocks.n, dtype=torch.float32)
    epilogue: dict[str, Any] = dict(
        FLIPPED=flipped,
        HAS_BIAS=bias is not None,
        HAS_RESIDUAL=residual is not None,
        ACTIVATION=activation,
        ALIGNMENT=alignment(channels),
        BLOCK_M=blocks.m,
        BLOCK_N=blocks.n,
        enable_fp_fusion=True,
    )
    stride_bias = 0 if bias is None or bias.dim() == 1 else bias.stride(0)
    bias = output if bias is None else bias
    residual = output if residual is None else residual
    dilated_conv2d_kernel[(len(work.work_items),)](
        output,
        partial,
        operand(input, precision),
        tuple(operand(weight, precision) for weight in weights),
        bias,
        residual,
        work.pixels,
        work.taps,
        work.tiles,
        work.work_items,
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
    if len(work.reductions):
        rows = reduced_rows(blocks)
        dilated_conv2d_reduce_kernel[(len(work.reductions) * (blocks.m // rows),)](
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


def forward(
    input: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    dilations: Sequence[Sequence[int]],
    residual: Tensor | None = None,
    activation: str = "none",
) -> Tensor:
    """The branches' outputs, channels_last. If there is a ``residual``, it is overwritten.

    There is one bias [K] per branch, or a single bias [N, K] per image and channel.
    """
    output = residual
    if output is None:
        output = empty_nhwc(input, sum(weight.size(0) for weight in weights))
    given = [bias for bias in biases if bias is not None]
    bias = given[0].contiguous() if len(given) == 1 else torch.cat(given) if given else None
    sum_taps(output, input, weights, dilations, False, bias, residual, activation)
    return output


def unsupported_convolution(
    input: Tensor, weights: Sequence[Tensor], groups: int = 1
) -> str | None:
    """Why the kernels cannot compute these branches; None if they can."""
    if input.dtype not in DTYPES:
        return f"the kernel takes float32, float16 and bfloat16, not {input.dtype}"
    if groups != 1 and not _is_depthwise(input, weights[0], groups):
        return f"the kernels take one group or one group per input channel, got {groups}"
    if input.numel() == 0 or any(weight.numel() == 0 for weight in weights):
        return "the input or a weight is empty"
    if sum(weight.size(2) * weight.size(3) for weight in weights) > MAX_TAPS:
        return f"the kernel takes at most {MAX_TAPS} taps"
    if len(weights) * input.numel() // input.size(1) > MAX_INDEX:
        return "the work list holds fewer than 2^31 pixels, counted over all branches"
    return None


def _is_depthwise(input: Tensor, weight: Tensor, groups: int) -> bool:
    return groups == input.size(1) > 1 and weight.size(1) == 1


def unsupported_reason(arguments: DilatedConv2d) -> str | None:
    return unsupported_convolution(arguments.input, [arguments.weight], arguments.groups)


def unsupported_branches(
    arguments: ParallelDilatedConv2d | ParallelDilatedConv2dAndMean,
) -> str | None:
    return unsupported_convolution(arguments.input, arguments.weights)


@register_kernel("dilated_conv2d", "triton", unsupported_reason=unsupported_reason)
def dilated_conv2d(arguments: DilatedConv2d) -> Tensor:
    input, weight, bias, dilation, groups = widened(*arguments)
    with torch.cuda.device_of(input):
        if groups > 1:
            output = depthwise_conv2d.forward(input, weight, bias, dilation)
        else:
            output = forward(input, [weight], [bias], [dilation])
    return in_format_of(output.to(arguments.input.dtype), arguments.input)


@register_kernel("parallel_dilated_conv2d", "triton", unsupported_reason=unsupported_branches)
def parallel_dilated_conv2d(arguments: ParallelDilatedConv2d) -> Tensor:
    input, weights, biases, dilations = widened(*arguments)
    pairs = [(dilation, dilation) for dilation in dilations]
    with torch.cuda.device_of(input):
        output = forward(input, weights, biases, pairs)
    return in_format_of(output.to(arguments.input.dtype), arguments.input)


@register_kernel(
    "parallel_dilated_conv2d_and_mean", "triton", unsupported_reason=unsupported_branches
)
def parallel_dilated_conv2d_and_mean(
    arguments: ParallelDilatedConv2dAndMean,
) -> tuple[Tensor, Tensor]:
    input, weights, dilations = arguments
    output = parallel_dilated_conv2d(ParallelDilatedConv2d(input, weights, [], dilations))
    return output, mean_of_pixels(input)
