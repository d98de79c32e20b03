"""output[n, y, x, k] = sum over taps and c of input[n, y + dy, x + dx, c] weight[k, tap, c].

Branches read one input [N, H, W, C] with weights [K, R, S, C] and write the channels of one output
side by side. Implicit GEMM over a work list: an output tile has BLOCK_M listed pixels times BLOCK_N
channels, a k-iteration one tap and BLOCK_K channels, and a program computes one work item. A second
kernel adds the partial sums of split tiles in a fixed order. The gradient of the input is the same
sum over the flipped taps of all branches.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..._native.limits import MAX_TAPS, unsupported_operands
from ..._native.memory_format import empty_nhwc, in_format_of
from ..._native.pooling import mean_of_pixels
from ..._native.work_lists import conv_branches
from ..arguments import (
    DilatedConv2d,
    DilatedConv2dBackward,
    ParallelDilatedConv2d,
    ParallelDilatedConv2dAndMean,
    ParallelDilatedConv2dBackward,
)
from ..registry import register_kernel
from . import block_sizes, depthwise_conv2d, work_lists
from .device import MAX_INDEX, widened
from .epilogue import store_output
from .tf32 import operand, precision_of
from .work_lists import load_branch, load_tap, pointer_of


@triton.jit
def dilated_conv2d_kernel(
    p_output,  # [N, H, W, out_channels]
    p_partial,  # [workspace slots, BLOCK_M, BLOCK_N] fp32
    p_input,  # [N, H, W, in_channels]
    weights,  # [K, R, S, C] for each branch
    p_bias,  # [N or 1, out_channels]
    p_residual,  # [N, H, W, out_channels]
    p_pixels,  # the members of WorkList
    p_taps,
    p_tiles,
    p_work_items,
    p_branches,
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
    p_item = p_work_items + tl.program_id(0) * 5
    p_tile = p_tiles + tl.load(p_item) * 5
    i_block = tl.load(p_item + 1)
    i_first_k_iter = tl.load(p_item + 2)
    num_k_iters = tl.load(p_item + 3)
    p_tile_taps = p_taps + tl.load(p_tile + 3) * 4
    num_tile_taps = tl.load(p_tile + 4)

    o_m = tl.arange(0, BLOCK_M)
    m_pixel = o_m < tl.load(p_tile + 2)
    o_pixel = tl.load(p_pixels + tl.load(p_tile + 1) + o_m, mask=m_pixel, other=0)
    o_x = o_pixel % W
    o_y = o_pixel // W % H
    o_n = i_block * BLOCK_N + tl.arange(0, BLOCK_N)
    o_k = tl.arange(0, BLOCK_K)
    i_dy, i_dx, i_branch, i_tap = load_tap(p_tile_taps + i_first_k_iter % num_tile_taps * 4)
    num_channels, i_first_channel, num_taps = load_branch(p_branches, i_branch, ALIGNMENT)
    p_weight = pointer_of(weights, i_branch)
    m_n = o_n < (C if FLIPPED else num_channels)

    # Each k-iteration loads the tap of the next one: copies whose addresses wait for a load of the
    # same k-iteration would use up the stages of the pipeline.
    b_sum = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for i_k_iter in range(i_first_k_iter, i_first_k_iter + num_k_iters):
        o_c = i_k_iter // num_tile_taps * BLOCK_K + o_k
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
        i_dy, i_dx, i_branch, i_tap = load_tap(p_tile_taps + (i_k_iter + 1) % num_tile_taps * 4)
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
    """Sum of the rows ``o_m`` of consecutive workspace slots."""
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
    """Write the convolution of all branches, or its transpose if ``flipped``, to ``output``."""
    N, _, H, W = input.shape
    C, channels = weights[0].size(1), tuple(weight.size(0) for weight in weights)
    branches = conv_branches((H, W), weights, dilations)
    precision = precision_of(input.dtype)
    columns, depth = (C, max(channels)) if flipped else (max(channels), C)
    blocks = block_sizes.blocks_for(input.dtype, precision, N * H * W, columns, depth)
    num_programs = work_lists.num_programs(input.device)
    work = work_lists.work_list(
        (N, H, W), branches, C, channels, flipped, blocks, input.device, num_programs
    )
    partial = input.new_empty(work.num_slots * blocks.m * blocks.n, dtype=torch.float32)
    epilogue: dict[str, Any] = dict(
        FLIPPED=flipped,
        HAS_BIAS=bias is not None,
        HAS_RESIDUAL=residual is not None,
        ACTIVATION=activation,
        ALIGNMENT=work_lists.alignment(channels),
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
        rows = block_sizes.reduced_rows(blocks)
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
    """The branches' outputs, channels_last; written over ``residual`` if that is given.

    Biases are [K] each, or there is one [N, K] that differs between images.
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
    if reason := unsupported_operands(input, weights):
        return reason
    if groups != 1 and not _is_depthwise(input, weights[0], groups):
        return f"the kernels support one group or one group per input channel, got {groups}"
    if sum(weight.size(2) * weight.size(3) for weight in weights) > MAX_TAPS:
        return f"the kernel supports at most {MAX_TAPS} taps"
    if len(weights) * input.numel() // input.size(1) > MAX_INDEX:
        return "the work list supports fewer than 2^31 pixels in all branches together"
    return None


def _is_depthwise(input: Tensor, weight: Tensor, groups: int) -> bool:
    return groups == input.size(1) > 1 and weight.size(1) == 1


def unsupported_reason(arguments: DilatedConv2d | DilatedConv2dBackward) -> str | None:
    return unsupported_convolution(arguments.input, [arguments.weight], arguments.groups)


def unsupported_branches(
    arguments: ParallelDilatedConv2d | ParallelDilatedConv2dAndMean | ParallelDilatedConv2dBackward,
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
    return parallel_dilated_conv2d(arguments.branches()), mean_of_pixels(arguments.input)
