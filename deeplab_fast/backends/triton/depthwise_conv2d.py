"""output[n, y, x, k] = sum over taps of input[n, y + dy, x + dx, k // multiplier] weight[k, tap].

input [N, H, W, C], weight [K, R * S] with K = multiplier * C. A program computes BLOCK_P pixels
times BLOCK_C channels and loops over the taps. The gradient of the input is the same sum with
flipped taps. For the gradient of the weight each program sums over a run of pixels, and torch adds
the sums of the runs.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..._native.memory_format import channels_last, empty_nhwc
from .bilinear import block_for
from .epilogue import store_output


@triton.jit
def depthwise_conv2d_kernel(
    p_output,  # [N, H, W, out_channels]
    p_input,  # [N, H, W, in_channels]
    p_weight,  # [max(in_channels, out_channels), R * S]
    p_bias,  # [out_channels]
    p_residual,  # [N, H, W, out_channels]
    num_pixels,
    H,
    W,
    in_channels,
    out_channels,
    rate_h,
    rate_w,
    R: tl.constexpr,
    S: tl.constexpr,
    MULTIPLIER: tl.constexpr,
    FLIPPED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    o_pixel = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    o_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    m_pixel, m_c = o_pixel < num_pixels, o_c < out_channels
    o_x = o_pixel % W
    o_y = o_pixel // W % H
    b_sum = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    for i_tap in range(R * S):
        i_dy = (i_tap // S - R // 2) * rate_h
        i_dx = (i_tap % S - S // 2) * rate_w
        if FLIPPED:
            i_dy, i_dx = -i_dy, -i_dx
        m_inside = (o_y + i_dy >= 0) & (o_y + i_dy < H) & (o_x + i_dx >= 0) & (o_x + i_dx < W)
        m_input = (m_inside & m_pixel)[:, None] & m_c[None, :]
        o_input = (o_pixel + i_dy * W + i_dx).to(tl.int64)[:, None] * in_channels
        for i in tl.static_range(MULTIPLIER if FLIPPED else 1):
            o_in = o_c * MULTIPLIER + i if FLIPPED else o_c // MULTIPLIER
            o_weight = (o_in if FLIPPED else o_c) * (R * S) + i_tap
            b_input = tl.load(p_input + o_input + o_in[None, :], mask=m_input, other=0.0)
            b_weight = tl.load(p_weight + o_weight, mask=m_c, other=0.0)
            b_sum += b_input.to(tl.float32) * b_weight.to(tl.float32)[None, :]
    store_output(
        b_sum, p_output, p_bias, p_residual, o_pixel, m_pixel, o_c, m_c, out_channels, H * W, 0,
        HAS_BIAS, HAS_RESIDUAL, ACTIVATION,
    )  # fmt: skip


@triton.jit
def depthwise_conv2d_wgrad_kernel(
    p_partial,  # [runs, R * S, K] fp32
    p_grad_output,  # [N, H, W, K]
    p_input,  # [N, H, W, C]
    num_pixels,
    H,
    W,
    K,
    rate_h,
    rate_w,
    R: tl.constexpr,
    S: tl.constexpr,
    MULTIPLIER: tl.constexpr,
    RUN: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    i_tap = tl.program_id(0) % (R * S)
    i_run = tl.program_id(0) // (R * S)
    i_dy = (i_tap // S - R // 2) * rate_h
    i_dx = (i_tap % S - S // 2) * rate_w
    o_k = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    b_sum = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    for i_p in range(0, RUN, BLOCK_P):
        o_pixel = i_run * RUN + i_p + tl.arange(0, BLOCK_P)
        o_x = o_pixel % W + i_dx
        o_y = o_pixel // W % H + i_dy
        m_pixel = (o_pixel < num_pixels) & (o_y >= 0) & (o_y < H) & (o_x >= 0) & (o_x < W)
        m = m_pixel[:, None] & (o_k < K)[None, :]
        o_grad = o_pixel.to(tl.int64)[:, None] * K + o_k[None, :]
        o_input = (o_pixel + i_dy * W + i_dx).to(tl.int64)[:, None] * (K // MULTIPLIER)
        b_grad = tl.load(p_grad_output + o_grad, mask=m, other=0.0).to(tl.float32)
        b_input = tl.load(p_input + o_input + (o_k // MULTIPLIER)[None, :], mask=m, other=0.0)
        b_sum += b_grad * b_input.to(tl.float32)
    p_sum = p_partial + tl.program_id(0).to(tl.int64) * K + o_k
    tl.store(p_sum, tl.sum(b_sum, axis=0), mask=o_k < K)


_RUN = 2048  # pixels that one program sums


def _blocks(pixels: int, channels: int) -> tuple[int, int]:
    """Sizes of a program's block: pixels and channels."""
    block_c = min(triton.next_power_of_2(channels), 64)
    return block_for(pixels, 2048 // block_c, 2048), block_c


def _clipped(input: Tensor, dilation: Sequence[int]) -> tuple[int, int]:
    """``dilation``, clipped to the size of the map. The same taps fall outside the map."""
    return min(dilation[0], input.size(2)), min(dilation[1], input.size(3))


def _launch(
    output: Tensor,
    input: Tensor,
    weight: Tensor,
    dilation: Sequence[int],
    flipped: bool,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    activation: str = "none",
) -> None:
    N, channels, H, W = output.shape
    K, _, R, S = weight.shape
    block_p, block_c = _blocks(N * H * W, channels)
    grid = triton.cdiv(N * H * W, block_p), triton.cdiv(channels, block_c)
    depthwise_conv2d_kernel[grid](
        output,
        channels_last(input),
        weight.contiguous(),
        output if bias is None else bias.contiguous(),
        output if residual is None else residual,
        N * H * W,
        H,
        W,
        input.size(1),
        channels,
        *_clipped(input, dilation),
        R=R,
        S=S,
        MULTIPLIER=K // min(channels, input.size(1)),
        FLIPPED=flipped,
        HAS_BIAS=bias is not None,
        HAS_RESIDUAL=residual is not None,
        ACTIVATION=activation,
        BLOCK_P=block_p,
        BLOCK_C=block_c,
        num_warps=4,
        enable_fp_fusion=True,
    )


def forward(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    dilation: Sequence[int],
    residual: Tensor | None = None,
    activation: str = "none",
) -> Tensor:
    """The output, channels_last. If there is a ``residual``, it is overwritten and returned."""
    output = empty_nhwc(input, weight.size(0)) if residual is None else residual
    _launch(output, input, weight, dilation, False, bias, residual, activation)
    return output


def input_gradient(
    grad_output: Tensor, weight: Tensor, dilation: Sequence[int], channels: int
) -> Tensor:
    grad_input = empty_nhwc(grad_output, channels)
    _launch(grad_input, grad_output, weight, dilation, True)
    return grad_input


def weight_gradient(
    grad_output: Tensor, input: Tensor, weight: Tensor, dilation: Sequence[int]
) -> Tensor:
    N, C, H, W = input.shape
    K, _, R, S = weight.shape
    block_p, block_c = _blocks(_RUN, K)
    runs = triton.cdiv(N * H * W, _RUN)
    partial = input.new_empty((runs, R, S, K), dtype=torch.float32)
    depthwise_conv2d_wgrad_kernel[(runs * R * S, triton.cdiv(K, block_c))](
        partial,
        channels_last(grad_output),
        channels_last(input),
        N * H * W,
        H,
        W,
        K,
        *_clipped(input, dilation),
        R=R,
        S=S,
        MULTIPLIER=K // C,
        RUN=_RUN,
        BLOCK_P=block_p,
        BLOCK_C=block_c,
        num_warps=4,
        enable_fp_fusion=True,
    )
    return partial.sum(0).permute(2, 0, 1)[:, None].to(weight.dtype)
