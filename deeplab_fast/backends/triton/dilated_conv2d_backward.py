"""grad_weight[k, tap, c] = sum over pixels of grad_output[n, y, x, k] input[n, y + dy, x + dx, c].

The gradient of a weight is a sum over the pixels at which its tap is inside the map. The gradient
of the input is a convolution with the flipped taps of all branches, by the kernel of
dilated_conv2d.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..._native.device_cache import cached_on_device
from ..._native.memory_format import empty_nhwc, in_format_of
from ..._native.pooling import grad_of_each_pixel
from ..._native.work_lists import Branches, conv_branches, rectangle_schedule, tap_rectangles
from ..arguments import DilatedConv2dBackward, ParallelDilatedConv2dBackward
from ..registry import register_kernel
from . import depthwise_conv2d, dilated_conv2d
from .device import widened
from .dilated_conv2d import (
    Blocks,
    add_slots,
    alignment,
    branch_rows,
    load_branch,
    load_tap,
    operand,
    pointer_of,
    precision_of,
    reduced_rows,
    sum_taps,
    unsupported_convolution,
)


@triton.jit
def dilated_conv2d_wgrad_kernel(
    grad_weights,  # one [K, R, S, C] per branch
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
    i_dy, i_dx, i_branch, i_tap = load_tap(p_rectangle)
    i_y, i_x = tl.load(p_rectangle + 4), tl.load(p_rectangle + 5)
    height, width = tl.load(p_rectangle + 6), tl.load(p_rectangle + 7)
    K, i_first_channel, _ = load_branch(p_branches, i_branch, ALIGNMENT)

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
    p_weight = pointer_of(weights, i_branch)
    K, _, num_taps = load_branch(p_branches, i_branch, ALIGNMENT)
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
    _, _, i_branch, i_tap = load_tap(p_rectangles + tl.load(p_reduction) * 8)
    i_block = tl.load(p_reduction + 1)
    num_column_blocks = tl.cdiv(C, BLOCK_N)
    o_m = i_block // num_column_blocks * BLOCK_M + o_row
    o_n = i_block % num_column_blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    b_sum = add_slots(
        p_partial, tl.load(p_reduction + 2), tl.load(p_reduction + 3), o_row, BLOCK_M, BLOCK_N
    )
    _store_weight(b_sum, grad_weights, p_branches, i_branch, i_tap, o_m, o_n, C, ALIGNMENT)


class WeightWorkList(NamedTuple):
    """Work list of the gradients of weights on the device; see :class:`WorkList`."""

    rectangles: Tensor
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
    num_ctas: int,
) -> WeightWorkList:
    N, H, W = plane
    rectangles = tap_rectangles((H, W), branches)
    schedule = rectangle_schedule(
        rectangles,
        lambda height, width: triton.cdiv(N * height * width, blocks.k),
        [triton.cdiv(k, blocks.m) * triton.cdiv(in_channels, blocks.n) for k in out_channels],
        num_ctas,
    )
    return WeightWorkList(
        rectangles.to(device),
        schedule.work_items.to(device),
        schedule.reductions.to(device),
        branch_rows(branches, out_channels, device),
        schedule.num_slots,
    )


def input_gradient(
    grad_output: Tensor,
    weights: Sequence[Tensor],
    dilations: Sequence[Sequence[int]],
    image_bias: Tensor | None = None,
) -> Tensor:
    """Input gradient of all branches in one launch, channels_last, plus ``image_bias`` [N, C]."""
    grad_input = empty_nhwc(grad_output, weights[0].size(1))
    bias = None if image_bias is None else image_bias.contiguous()
    sum_taps(grad_input, grad_output, weights, dilations, True, bias)
    return grad_input


def weight_gradients(
    grad_output: Tensor,
    input: Tensor,
    weights: Sequence[Tensor],
    dilations: Sequence[Sequence[int]],
) -> list[Tensor]:
    """Weight gradients of all branches in one launch, channels_last."""
    N, C, H, W = input.shape
    channels = tuple(weight.size(0) for weight in weights)
    precision = precision_of(input.dtype)
    blocks = dilated_conv2d.blocks_for(input.dtype, precision, max(channels), C, N * H * W)
    num_ctas = dilated_conv2d.num_programs(input.device)
    branches = conv_branches((H, W), weights, dilations)
    work = weight_work_list((N, H, W), branches, C, channels, blocks, input.device, num_ctas)
    grads = [torch.empty_like(w, memory_format=torch.channels_last) for w in weights]
    partial = input.new_empty(work.num_slots * blocks.m * blocks.n, dtype=torch.float32)
    dilated_conv2d_wgrad_kernel[(len(work.work_items),)](
        tuple(grads),
        partial,
        operand(grad_output, precision),
        operand(input, precision),
        work.rectangles,
        work.work_items,
        work.branches,
        H,
        W,
        N,
        C,
        sum(channels),
        PRECISION=precision,
        ALIGNMENT=alignment(channels),
        BLOCK_M=blocks.m,
        BLOCK_N=blocks.n,
        BLOCK_K=blocks.k,
        num_warps=blocks.num_warps,
        num_stages=blocks.num_stages,
        enable_fp_fusion=True,
    )
    if len(work.reductions):
        rows = reduced_rows(blocks)
        dilated_conv2d_wgrad_reduce_kernel[(len(work.reductions) * (blocks.m // rows),)](
            tuple(grads),
            partial,
            work.rectangles,
            work.reductions,
            work.branches,
            C,
            ALIGNMENT=alignment(channels),
            BLOCK_M=blocks.m,
            BLOCK_N=blocks.n,
            BLOCK_R=rows,
            num_warps=4,
            enable_fp_fusion=True,
        )
    return grads


def unsupported_reason(arguments: DilatedConv2dBackward) -> str | None:
    return unsupported_convolution(arguments.input, [arguments.weight], arguments.groups)


def unsupported_branches(arguments: ParallelDilatedConv2dBackward) -> str | None:
    return unsupported_convolution(arguments.input, arguments.weights)


@register_kernel("dilated_conv2d_backward", "triton", unsupported_reason=unsupported_reason)
def dilated_conv2d_backward(arguments: DilatedConv2dBackward) -> tuple[Tensor, Tensor, Tensor]:
    grad_output, input, weight, dilation, groups, output_mask = arguments
    if groups == 1:
        grad_input, *grads = backward(grad_output, input, [weight], [dilation], output_mask)
        grad_weight, grad_bias = (grad[0] if grad else input.new_empty(0) for grad in grads)
        return grad_input, grad_weight, grad_bias
    grad_input = grad_weight = grad_bias = input.new_empty(0)
    grad, x, w = widened(grad_output, input, weight)
    with torch.cuda.device_of(input):
        if output_mask[0]:
            grad_input = depthwise_conv2d.input_gradient(grad, w, dilation, x.size(1))
            grad_input = in_format_of(grad_input.to(input.dtype), input)
        if output_mask[1]:
            grad_weight = depthwise_conv2d.weight_gradient(grad, x, w, dilation)
            grad_weight = in_format_of(grad_weight.to(weight.dtype), weight)
        if output_mask[2]:
            grad_bias = _bias_gradient(grad_output)
    return grad_input, grad_weight, grad_bias


@register_kernel(
    "parallel_dilated_conv2d_backward", "triton", unsupported_reason=unsupported_branches
)
def parallel_dilated_conv2d_backward(
    arguments: ParallelDilatedConv2dBackward,
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    grad_output, input, weights, dilations, output_mask, grad_mean = arguments
    pairs = [(dilation, dilation) for dilation in dilations]
    return backward(grad_output, input, weights, pairs, output_mask, grad_mean)


def backward(
    grad_output: Tensor,
    input: Tensor,
    weights: Sequence[Tensor],
    dilations: Sequence[Sequence[int]],
    output_mask: Sequence[bool],
    grad_mean: Tensor | None = None,
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Gradients of input, weights and biases of parallel branches; empty unless in output_mask.

    ``grad_mean`` [N, C] is the gradient of the input's mean over all pixels. Its contribution is
    added to the gradient of the input.
    """
    grad, x, ws = widened(grad_output, input, list(weights))
    grad_input, grad_weights, grad_biases = input.new_empty(0), [], []
    with torch.cuda.device_of(input):
        if output_mask[0]:
            image_bias = None if grad_mean is None else grad_of_each_pixel(grad_mean, input)
            grad_input = input_gradient(grad, ws, dilations, image_bias).to(input.dtype)
            grad_input = in_format_of(grad_input, input)
        if output_mask[1]:
            grads = weight_gradients(grad, x, ws, dilations)
            grad_weights = [in_format_of(g.to(w.dtype), w) for g, w in zip(grads, weights)]
        if output_mask[2]:
            channels = [weight.size(0) for weight in weights]
            grad_biases = [g.clone() for g in _bias_gradient(grad_output).split(channels)]
    return grad_input, grad_weights, grad_biases


def _bias_gradient(grad_output: Tensor) -> Tensor:
    return grad_output.sum((0, 2, 3), dtype=torch.float32).to(grad_output.dtype)
