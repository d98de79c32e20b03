"""grad_weight[k, tap, c] = sum over pixels of grad_output[n, y, x, k] input[n, y + dy, x + dx, c].

The gradient of a weight is a sum over the pixels at which its tap is inside the map: an output tile
has BLOCK_M output channels times BLOCK_N input channels, a k-iteration BLOCK_K pixels. The gradient
of the input is a convolution with the flipped taps of all branches, by the kernel of
dilated_conv2d.py.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..._native.memory_format import empty_nhwc, in_format_of
from ..._native.pooling import grad_of_each_pixel
from ..._native.work_lists import conv_branches
from ..arguments import DilatedConv2dBackward, ParallelDilatedConv2dBackward
from ..registry import register_kernel
from . import block_sizes, depthwise_conv2d, work_lists
from .device import widened
from .dilated_conv2d import add_slots, sum_taps, unsupported_branches, unsupported_reason
from .tf32 import operand, precision_of
from .work_lists import load_branch, load_tap, pointer_of


@triton.jit
def dilated_conv2d_wgrad_kernel(
    grad_weights,  # [K, R, S, C] for each branch
    p_partial,  # [workspace slots, BLOCK_M, BLOCK_N] fp32
    p_grad_output,  # [N, H, W, out_channels]
    p_input,  # [N, H, W, C]
    p_rectangles,  # the members of WeightWorkList
    p_work_items,
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
    p_item = p_work_items + tl.program_id(0) * 5
    p_rectangle = p_rectangles + tl.load(p_item) * 8
    i_block = tl.load(p_item + 1)
    i_first_k_iter = tl.load(p_item + 2)
    num_k_iters = tl.load(p_item + 3)
    i_dy, i_dx, i_branch, i_tap = load_tap(p_rectangle)
    i_y, i_x = tl.load(p_rectangle + 4), tl.load(p_rectangle + 5)
    height, width = tl.load(p_rectangle + 6), tl.load(p_rectangle + 7)
    K, i_first_channel, _ = load_branch(p_branches, i_branch, ALIGNMENT)

    num_column_blocks = tl.cdiv(C, BLOCK_N)
    o_m = i_block // num_column_blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    o_n = i_block % num_column_blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    m_m, m_n = o_m < K, o_n < C
    b_sum = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for i_k_iter in range(i_first_k_iter, i_first_k_iter + num_k_iters):
        o_listed = i_k_iter * BLOCK_K + tl.arange(0, BLOCK_K)
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


def input_gradient(
    grad_output: Tensor,
    weights: Sequence[Tensor],
    dilations: Sequence[Sequence[int]],
    image_bias: Tensor | None = None,
) -> Tensor:
    """Gradient of the input of all branches, channels_last, with ``image_bias`` [N, C] added."""
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
    """Gradients of all branches' weights, channels_last, in one launch."""
    N, C, H, W = input.shape
    channels = tuple(weight.size(0) for weight in weights)
    precision = precision_of(input.dtype)
    blocks = block_sizes.blocks_for(input.dtype, precision, max(channels), C, N * H * W)
    num_programs = work_lists.num_programs(input.device)
    branches = conv_branches((H, W), weights, dilations)
    work = work_lists.weight_work_list(
        (N, H, W), branches, C, channels, blocks, input.device, num_programs
    )
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
        ALIGNMENT=work_lists.alignment(channels),
        BLOCK_M=blocks.m,
        BLOCK_N=blocks.n,
        BLOCK_K=blocks.k,
        num_warps=blocks.num_warps,
        num_stages=blocks.num_stages,
        enable_fp_fusion=True,
    )
    if len(work.reductions):
        rows = block_sizes.reduced_rows(blocks)
        dilated_conv2d_wgrad_reduce_kernel[(len(work.reductions) * (blocks.m // rows),)](
            tuple(grads),
            partial,
            work.rectangles,
            work.reductions,
            work.branches,
            C,
            ALIGNMENT=work_lists.alignment(channels),
            BLOCK_M=blocks.m,
            BLOCK_N=blocks.n,
            BLOCK_R=rows,
            num_warps=4,
            enable_fp_fusion=True,
        )
    return grads


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
    """Gradients of input, weights and biases; empty where ``output_mask`` is False.

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
