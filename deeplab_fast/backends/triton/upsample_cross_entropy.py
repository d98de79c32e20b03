"""loss[n, y, x] = cross entropy of bilinear(logits[n])(y, x) and target[n, y, x]; its gradient.

logits [N, C, H, W] in any strides, per-pixel tensors [N, out_H, out_W]. The maximum over classes at
each source pixel is subtracted from the logits first ("centred"). As interpolation is linear, the
softmax stays the same. The output pixels between the same four source pixels form a cell. Backward
gathers: each cell sums the gradients of its pixels for each of its corners, then each source pixel
adds the sums of the cells around it, both in a fixed order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..._native.cross_entropy import bad_target
from ..._native.memory_format import empty_like_format, in_format_of
from ..._native.upsample_shape import source_scale
from ..arguments import UpsampleCrossEntropy, UpsampleCrossEntropyBackward
from ..registry import register_kernel
from .bilinear import interpolate, pixels_of_program, source_pair
from .block_sizes import block_for
from .device import DTYPES, widened
from .upsample_argmax import unsupported_logits

_MAX_CLASSES = 65535  # limit of the gradient: the second dimension of a CUDA grid is not larger

_LOWEST = tl.constexpr(-(2.0**126))


@triton.jit
def _centred(p_logit, b_centre, m_logit):
    """Logits less ``b_centre``. Finite ones stay finite: infinity times a weight of 0 is NaN."""
    b_logit = tl.load(p_logit, mask=m_logit, other=0.0).to(tl.float32)
    b_less = b_logit - b_centre
    return tl.where((b_less < _LOWEST) & (b_logit > float("-inf")), _LOWEST, b_less)


@triton.jit
def _interpolated(corners, centres, weights, o_offset, m_logit):
    """Interpolated centred logits of the classes at ``o_offset`` from the pointers ``corners``."""
    b_a = _centred(corners[0] + o_offset, centres[0], m_logit)
    b_b = _centred(corners[1] + o_offset, centres[1], m_logit)
    b_c = _centred(corners[2] + o_offset, centres[2], m_logit)
    b_d = _centred(corners[3] + o_offset, centres[3], m_logit)
    b_top = interpolate(b_a, b_b, weights[0], weights[1])
    b_bottom = interpolate(b_c, b_d, weights[0], weights[1])
    return interpolate(b_top, b_bottom, weights[2], weights[3])


@triton.jit
def upsample_cross_entropy_fwd_kernel(
    p_loss,  # [N, out_H, out_W]
    p_log_sum_exp,  # [N, out_H, out_W]
    p_sums,  # [blocks, 2]: sum of losses, sum of the weights of pixels that are not ignored
    p_logits,  # [N, C, H, W]
    p_centre,  # [N, H, W] maximum over classes
    p_target,  # [N, out_H, out_W]
    p_weight,  # [C]
    p_weight_sum,  # sum of p_weight
    C,
    H,
    W,
    stride_n,
    stride_c,
    stride_h,
    stride_w,
    out_H,
    out_W,
    scale_h,
    scale_w,
    ignore_index,
    label_smoothing,
    SMOOTH: tl.constexpr,
    STORE_LOSS: tl.constexpr,
    ALIGN_CORNERS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    num_pixels = out_H * out_W  # fewer than 2^31
    i_n, o_p, m_p = pixels_of_program(num_pixels, BLOCK_P)
    o_y_lo, o_y_hi, b_h0, b_h1 = source_pair(o_p // out_W, H, scale_h, ALIGN_CORNERS)
    o_x_lo, o_x_hi, b_w0, b_w1 = source_pair(o_p % out_W, W, scale_w, ALIGN_CORNERS)
    p_lo_centre = p_centre + (i_n * H + o_y_lo) * W
    p_hi_centre = p_centre + (i_n * H + o_y_hi) * W
    b_centre_a = tl.load(p_lo_centre + o_x_lo)[None, :]
    b_centre_b = tl.load(p_lo_centre + o_x_hi)[None, :]
    b_centre_c = tl.load(p_hi_centre + o_x_lo)[None, :]
    b_centre_d = tl.load(p_hi_centre + o_x_hi)[None, :]
    p_lo_row = p_logits + i_n * stride_n + o_y_lo.to(tl.int64) * stride_h
    p_hi_row = p_logits + i_n * stride_n + o_y_hi.to(tl.int64) * stride_h
    o_left, o_right = o_x_lo.to(tl.int64) * stride_w, o_x_hi.to(tl.int64) * stride_w
    p_a, p_b = (p_lo_row + o_left)[None, :], (p_lo_row + o_right)[None, :]
    p_c, p_d = (p_hi_row + o_left)[None, :], (p_hi_row + o_right)[None, :]
    corners, centres = (p_a, p_b, p_c, p_d), (b_centre_a, b_centre_b, b_centre_c, b_centre_d)
    weights = b_w0[None, :], b_w1[None, :], b_h0[None, :], b_h1[None, :]

    # Subtract the greatest logit so far before taking exponentials.
    b_max = tl.full([BLOCK_P], float("-inf"), tl.float32)
    b_sum = tl.zeros([BLOCK_P], tl.float32)
    b_smooth = tl.zeros([BLOCK_P], tl.float32)
    for i_c in range(0, C, BLOCK_C):
        o_c = i_c + tl.arange(0, BLOCK_C)[:, None]
        m_c = (o_c < C) & m_p[None, :]
        o_offset = o_c.to(tl.int64) * stride_c
        b_logit = _interpolated(corners, centres, weights, o_offset, m_c)
        b_logit = tl.where(o_c < C, b_logit, float("-inf"))
        b_new_max = tl.maximum(b_max, tl.max(b_logit, axis=0))
        b_shift = tl.where(b_new_max == float("-inf"), 0.0, b_new_max)
        b_exp = tl.exp(b_logit - b_shift[None, :])
        b_sum = b_sum * tl.exp(b_max - b_shift) + tl.sum(b_exp, axis=0)
        b_max = b_new_max
        if SMOOTH:
            b_weight = tl.load(p_weight + o_c, mask=o_c < C, other=0.0)
            b_smooth += tl.sum(tl.where(o_c < C, b_logit * b_weight, 0.0), axis=0)
    # NaN stays NaN through b_sum, even if the maximum ignores it.
    b_shift = tl.where(b_max == float("-inf"), 0.0, b_max)
    b_log_sum_exp = b_shift + tl.log(b_sum)

    o_pixel = i_n * num_pixels + o_p
    b_target = tl.load(p_target + o_pixel)
    m_counted = m_p & (b_target != ignore_index)
    m_known = (b_target >= 0) & (b_target < C)
    o_target = tl.where(m_known, b_target, 0)
    o_offset = o_target[None, :] * stride_c
    b_hit = tl.sum(_interpolated(corners, centres, weights, o_offset, m_p[None, :]), axis=0)
    b_weight = tl.load(p_weight + o_target)
    b_loss = (1.0 - label_smoothing) * b_weight * (b_log_sum_exp - b_hit)
    if SMOOTH:
        b_loss += label_smoothing / C * (tl.load(p_weight_sum) * b_log_sum_exp - b_smooth)
    b_loss = tl.where(m_known, b_loss, float("nan"))
    b_loss = tl.where(m_counted, b_loss, 0.0)
    tl.store(p_log_sum_exp + o_pixel, b_log_sum_exp, mask=m_p)
    if STORE_LOSS:
        tl.store(p_loss + o_pixel, b_loss, mask=m_p)
    p_sum = p_sums + tl.program_id(0).to(tl.int64) * 2
    tl.store(p_sum, tl.sum(b_loss, axis=0))
    tl.store(p_sum + 1, tl.sum(tl.where(m_counted, b_weight, 0.0), axis=0))


@triton.jit
def upsample_cross_entropy_cells_kernel(
    p_begin,  # [size + 1] the first output coordinate of each cell, and the end of the last cell
    size,
    out_size,
    scale,
    num_halvings,
    ALIGN_CORNERS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Find the first output coordinate of each cell by bisection: source coordinates ascend."""
    o_cell = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    o_low = tl.zeros_like(o_cell)
    o_high = o_low + out_size
    for _ in range(num_halvings):
        o_middle = o_low + (o_high - o_low) // 2
        o_lo, _, _, _ = source_pair(o_middle, size, scale, ALIGN_CORNERS)
        m_before = (o_lo < o_cell) & (o_low < o_high)
        o_low = tl.where(m_before, o_middle + 1, o_low)
        o_high = tl.where(m_before, o_high, o_middle)
    tl.store(p_begin + o_cell, o_low, mask=o_cell <= size)


@triton.jit
def upsample_cross_entropy_bwd_kernel(
    p_corners,  # [4, N, C, H, W] gradients of the corners of cells
    p_grad_loss,  # [N, out_H, out_W] in the given strides
    p_total_weight,  # divisor of "mean"
    p_log_sum_exp,  # [N, out_H, out_W]
    p_logits,  # [N, C, H, W]
    p_centre,  # [N, H, W]
    p_target,  # [N, out_H, out_W]
    p_weight,  # [C]
    p_weight_sum,  # sum of p_weight
    p_row_begin,  # [H + 1]
    p_col_begin,  # [W + 1]
    num_cells,
    C,
    H,
    W,
    stride_n,
    stride_c,
    stride_h,
    stride_w,
    out_H,
    out_W,
    stride_loss_n,
    stride_loss_h,
    stride_loss_w,
    scale_h,
    scale_w,
    ignore_index,
    label_smoothing,
    MEAN: tl.constexpr,
    SMOOTH: tl.constexpr,
    ALIGN_CORNERS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_X: tl.constexpr,
):
    # Each lane has one of BLOCK_X columns of one of BLOCK_S cells, and loops over its rows.
    o_lane = tl.arange(0, BLOCK_S * BLOCK_X)
    o_cell = tl.program_id(0).to(tl.int64) * BLOCK_S + o_lane // BLOCK_X
    m_cell = o_cell < num_cells
    o_cell = tl.where(m_cell, o_cell, 0)
    o_x_lo = (o_cell % W).to(tl.int32)
    o_y_lo = (o_cell // W % H).to(tl.int32)
    o_n = o_cell // W // H
    o_x_hi, o_y_hi = tl.minimum(o_x_lo + 1, W - 1), tl.minimum(o_y_lo + 1, H - 1)
    o_y_begin = tl.load(p_row_begin + o_y_lo)
    o_x_begin = tl.load(p_col_begin + o_x_lo)
    b_height = tl.where(m_cell, tl.load(p_row_begin + o_y_lo + 1) - o_y_begin, 0)
    b_width = tl.where(m_cell, tl.load(p_col_begin + o_x_lo + 1) - o_x_begin, 0)

    o_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)[:, None]
    m_c = (o_c < C) & m_cell[None, :]
    p_row = p_logits + o_n * stride_n + o_c.to(tl.int64) * stride_c
    p_top, p_bottom = p_row + o_y_lo.to(tl.int64) * stride_h, p_row + o_y_hi.to(tl.int64) * stride_h
    o_left, o_right = o_x_lo.to(tl.int64) * stride_w, o_x_hi.to(tl.int64) * stride_w
    p_centre_top = p_centre + (o_n * H + o_y_lo) * W
    p_centre_bottom = p_centre + (o_n * H + o_y_hi) * W
    b_a = _centred(p_top + o_left, tl.load(p_centre_top + o_x_lo)[None, :], m_c)
    b_b = _centred(p_top + o_right, tl.load(p_centre_top + o_x_hi)[None, :], m_c)
    b_c = _centred(p_bottom + o_left, tl.load(p_centre_bottom + o_x_lo)[None, :], m_c)
    b_d = _centred(p_bottom + o_right, tl.load(p_centre_bottom + o_x_hi)[None, :], m_c)
    if SMOOTH:  # otherwise the infinite weight of a class that no pixel has would give 0 * inf
        b_class_weight = tl.load(p_weight + o_c, mask=o_c < C, other=0.0)
        b_weight_sum = tl.load(p_weight_sum)
    if MEAN:
        b_total_weight = tl.load(p_total_weight)

    b_grad_a = tl.zeros([BLOCK_C, BLOCK_S * BLOCK_X], tl.float32)
    b_grad_b, b_grad_c, b_grad_d = b_grad_a, b_grad_a, b_grad_a
    for i_x in range(0, tl.max(b_width, axis=0), BLOCK_X):
        o_in_cell = i_x + o_lane % BLOCK_X
        o_x = tl.minimum(o_x_begin + o_in_cell, out_W - 1)
        _, _, b_w0, b_w1 = source_pair(o_x, W, scale_w, ALIGN_CORNERS)
        b_top = interpolate(b_a, b_b, b_w0[None, :], b_w1[None, :])
        b_bottom = interpolate(b_c, b_d, b_w0[None, :], b_w1[None, :])
        b_grad_top = tl.zeros([BLOCK_C, BLOCK_S * BLOCK_X], tl.float32)
        b_grad_bottom = b_grad_top
        for i_y in range(tl.max(b_height, axis=0)):
            m_pixel = (o_in_cell < b_width) & (i_y < b_height)
            o_y = tl.minimum(o_y_begin + i_y, out_H - 1)
            o_pixel = (o_n * out_H + o_y) * out_W + o_x
            b_target = tl.load(p_target + o_pixel, mask=m_pixel, other=0)
            b_log_sum_exp = tl.load(p_log_sum_exp + o_pixel, mask=m_pixel, other=0.0)
            o_loss = o_n * stride_loss_n + o_y.to(tl.int64) * stride_loss_h
            o_loss += o_x.to(tl.int64) * stride_loss_w
            m_counted = m_pixel & (b_target != ignore_index)
            b_grad = tl.load(p_grad_loss + o_loss, mask=m_counted, other=0.0)
            if MEAN:
                b_grad = tl.where(m_counted, b_grad / b_total_weight, 0.0)
            m_known = (b_target >= 0) & (b_target < C)
            o_target = tl.where(m_known, b_target, 0).to(tl.int32)
            b_weight = tl.load(p_weight + o_target, mask=m_counted, other=0.0)
            # The forward raised an error for an invalid target, or made the loss NaN.
            b_grad = tl.where(m_counted & (m_known == 0), float("nan"), b_grad)
            b_hit = (1.0 - label_smoothing) * b_weight * b_grad
            b_softmax_grad = b_hit
            if SMOOTH:
                b_smooth = label_smoothing / C * b_grad
                b_softmax_grad += tl.where(m_counted, b_smooth * b_weight_sum, 0.0)

            _, _, b_h0, b_h1 = source_pair(o_y, H, scale_h, ALIGN_CORNERS)
            b_logit = interpolate(b_top, b_bottom, b_h0[None, :], b_h1[None, :])
            b_softmax = tl.exp(b_logit - b_log_sum_exp[None, :])
            # An ignored pixel adds 0 times its softmax as in PyTorch: NaN where a logit is NaN.
            b_grad_logit = b_softmax * b_softmax_grad[None, :]
            b_grad_logit -= tl.where(o_c == o_target[None, :], b_hit[None, :], 0.0)
            if SMOOTH:
                b_grad_logit -= b_smooth[None, :] * b_class_weight
            b_grad_logit = tl.where(m_pixel[None, :], b_grad_logit, 0.0)
            b_grad_top += b_grad_logit * b_h0[None, :]
            b_grad_bottom += b_grad_logit * b_h1[None, :]
        b_grad_a += b_grad_top * b_w0[None, :]
        b_grad_b += b_grad_top * b_w1[None, :]
        b_grad_c += b_grad_bottom * b_w0[None, :]
        b_grad_d += b_grad_bottom * b_w1[None, :]

    # Add up the lanes of each cell.
    o_cell = tl.program_id(0).to(tl.int64) * BLOCK_S + tl.arange(0, BLOCK_S)
    m_output = (o_c < C) & (o_cell < num_cells)[None, :]
    o_n = o_cell // W // H
    p_corner = p_corners + ((o_n * C)[None, :] + o_c) * H * W + (o_cell - o_n * H * W)[None, :]
    stride_corner = num_cells * C
    b_sum_a = tl.sum(tl.reshape(b_grad_a, [BLOCK_C, BLOCK_S, BLOCK_X]), axis=2)
    b_sum_b = tl.sum(tl.reshape(b_grad_b, [BLOCK_C, BLOCK_S, BLOCK_X]), axis=2)
    b_sum_c = tl.sum(tl.reshape(b_grad_c, [BLOCK_C, BLOCK_S, BLOCK_X]), axis=2)
    b_sum_d = tl.sum(tl.reshape(b_grad_d, [BLOCK_C, BLOCK_S, BLOCK_X]), axis=2)
    tl.store(p_corner, b_sum_a, mask=m_output)
    tl.store(p_corner + stride_corner, b_sum_b, mask=m_output)
    tl.store(p_corner + 2 * stride_corner, b_sum_c, mask=m_output)
    tl.store(p_corner + 3 * stride_corner, b_sum_d, mask=m_output)


@triton.jit
def upsample_cross_entropy_gather_kernel(
    p_grad,  # [N, C, H, W] in the given strides
    p_corners,  # [4, N, C, H, W]
    num_logits,
    C,
    H,
    W,
    stride_n,
    stride_c,
    stride_h,
    stride_w,
    BLOCK: tl.constexpr,
):
    """Add the sums of the cells around each source pixel.

    A source pixel is corner a of its own cell, b of the cell on its left, c of the cell above. The
    cells of the last row and column have their own source pixel at both ends.
    """
    o = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    m = o < num_logits
    o_x = o % W
    o_y = o // W % H
    p_a = p_corners + o
    p_b, p_c, p_d = p_a + num_logits, p_a + 2 * num_logits, p_a + 3 * num_logits
    m_left, m_above = m & (o_x > 0), m & (o_y > 0)
    m_last_x, m_last_y = m & (o_x == W - 1), m & (o_y == H - 1)
    b_grad = tl.load(p_a, mask=m, other=0.0)
    b_grad += tl.load(p_b - 1, mask=m_left, other=0.0)
    b_grad += tl.load(p_b, mask=m_last_x, other=0.0)
    b_grad += tl.load(p_c - W, mask=m_above, other=0.0)
    b_grad += tl.load(p_c, mask=m_last_y, other=0.0)
    b_grad += tl.load(p_d - W - 1, mask=m_left & m_above, other=0.0)
    b_grad += tl.load(p_d - W, mask=m_last_x & m_above, other=0.0)
    b_grad += tl.load(p_d - 1, mask=m_left & m_last_y, other=0.0)
    b_grad += tl.load(p_d, mask=m_last_x & m_last_y, other=0.0)
    o_grad = o // W // H // C * stride_n + o // W // H % C * stride_c
    o_grad += o_y * stride_h + o_x * stride_w
    tl.store(p_grad + o_grad, b_grad.to(p_grad.dtype.element_ty), mask=m)


def _scales(logits: Tensor, target: Tensor, align_corners: bool) -> tuple[float, ...]:
    return tuple(
        source_scale(in_size, out_size, None, align_corners)
        for in_size, out_size in zip(logits.shape[2:], target.shape[1:])
    )


def _class_weights(logits: Tensor, weight: Tensor | None) -> tuple[Tensor, Tensor]:
    if weight is None:
        weight = logits.new_ones(logits.size(1), dtype=torch.float32)
    weight = weight.float().contiguous()
    return weight, weight.sum()


def forward(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    reduction: str,
    label_smoothing: float,
    align_corners: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, log-sum-exp of every pixel, and the sum of the weights of pixels not ignored."""
    N, C, H, W = logits.shape
    out_H, out_W = target.shape[1:]
    log_sum_exp = logits.new_empty(target.shape, dtype=torch.float32)
    losses = torch.empty_like(log_sum_exp) if reduction == "none" else None
    block_p, block_c = block_for(out_H * out_W, 256, 4096), block_for(C, 1, 64)
    num_blocks = N * triton.cdiv(out_H * out_W, block_p)
    sums = logits.new_empty((num_blocks, 2), dtype=torch.float32)
    if num_blocks:
        upsample_cross_entropy_fwd_kernel[(num_blocks,)](
            sums if losses is None else losses,
            log_sum_exp,
            sums,
            logits,
            logits.amax(1).float().contiguous(),
            target.contiguous(),
            *_class_weights(logits, weight),
            C,
            H,
            W,
            *logits.stride(),
            out_H,
            out_W,
            *_scales(logits, target, align_corners),
            ignore_index,
            label_smoothing,
            SMOOTH=label_smoothing > 0,
            STORE_LOSS=losses is not None,
            ALIGN_CORNERS=align_corners,
            BLOCK_C=block_c,
            BLOCK_P=block_p,
            num_warps=4,
            enable_fp_fusion=True,
        )
    loss, total_weight = sums.double().sum(0)
    if reduction == "mean":
        loss = loss / total_weight
    return loss.float() if losses is None else losses, log_sum_exp, total_weight.float()


def _begins(size: int, out_size: int, scale: float, align_corners: bool, like: Tensor) -> Tensor:
    begin = like.new_empty(size + 1, dtype=torch.int32)
    block = block_for(size + 1, 128, 1024)
    upsample_cross_entropy_cells_kernel[(triton.cdiv(size + 1, block),)](
        begin,
        size,
        out_size,
        scale,
        out_size.bit_length(),
        ALIGN_CORNERS=align_corners,
        BLOCK=block,
        num_warps=4,
        enable_fp_fusion=False,
    )
    return begin


def backward(
    grad_loss: Tensor,
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    log_sum_exp: Tensor,
    total_weight: Tensor,
    ignore_index: int,
    reduction: str,
    label_smoothing: float,
    align_corners: bool,
) -> Tensor:
    N, C, H, W = logits.shape
    out_H, out_W = target.shape[1:]
    grad_logits = empty_like_format(logits, tuple(logits.shape))
    if logits.numel() == 0:
        return grad_logits
    scale_h, scale_w = _scales(logits, target, align_corners)
    num_cells = N * H * W
    corners = logits.new_empty(4 * logits.numel(), dtype=torch.float32)
    widest = triton.next_power_of_2(triton.cdiv(out_W, W))
    block_x = block_for(widest, min(widest, 8), 16)
    block_s = block_for(num_cells, 32 // block_x, 1024 // block_x)
    block_c = block_for(C, min(triton.next_power_of_2(C), 32), 64)
    grid = triton.cdiv(num_cells, block_s), triton.cdiv(C, block_c)
    upsample_cross_entropy_bwd_kernel[grid](
        corners,
        grad_loss,
        total_weight,
        log_sum_exp.contiguous(),
        logits,
        logits.amax(1).float().contiguous(),
        target.contiguous(),
        *_class_weights(logits, weight),
        _begins(H, out_H, scale_h, align_corners, logits),
        _begins(W, out_W, scale_w, align_corners, logits),
        num_cells,
        C,
        H,
        W,
        *logits.stride(),
        out_H,
        out_W,
        *grad_loss.expand(target.shape).stride(),
        scale_h,
        scale_w,
        ignore_index,
        label_smoothing,
        MEAN=reduction == "mean",
        SMOOTH=label_smoothing > 0,
        ALIGN_CORNERS=align_corners,
        BLOCK_C=block_c,
        BLOCK_S=block_s,
        BLOCK_X=block_x,
        num_warps=4,
        enable_fp_fusion=True,
    )
    block = block_for(logits.numel(), 256, 65536)
    upsample_cross_entropy_gather_kernel[(triton.cdiv(logits.numel(), block),)](
        grad_logits,
        corners,
        logits.numel(),
        C,
        H,
        W,
        *grad_logits.stride(),
        BLOCK=block,
        num_warps=4,
        enable_fp_fusion=True,
    )
    return grad_logits


def unsupported_reason(arguments: UpsampleCrossEntropy) -> str | None:
    return unsupported_logits(arguments.logits, arguments.target.size(1) * arguments.target.size(2))


def unsupported_backward(arguments: UpsampleCrossEntropyBackward) -> str | None:
    logits = arguments.logits
    if logits.size(1) > _MAX_CLASSES:
        return f"the kernel supports at most {_MAX_CLASSES} classes"
    return unsupported_logits(logits, arguments.target.size(1) * arguments.target.size(2))


@register_kernel("upsample_cross_entropy", "triton", unsupported_reason=unsupported_reason)
def upsample_cross_entropy(arguments: UpsampleCrossEntropy) -> tuple[Tensor, Tensor, Tensor]:
    logits, target, weight, ignore_index, reduction, label_smoothing, align_corners = arguments
    classes = logits.size(1)
    if logits.device.type == "cpu":
        unknown = (target != ignore_index) & ((target < 0) | (target >= classes))
        if unknown.any():
            raise bad_target(int(target[unknown][0]), classes, ignore_index)
    if logits.dtype not in DTYPES:
        logits = logits.float()
    logits, target, weight = widened(logits, target, weight)
    with torch.cuda.device_of(logits):
        return forward(
            logits, target, weight, ignore_index, reduction, label_smoothing, align_corners
        )


@register_kernel(
    "upsample_cross_entropy_backward", "triton", unsupported_reason=unsupported_backward
)
def upsample_cross_entropy_backward(arguments: UpsampleCrossEntropyBackward) -> Tensor:
    logits = arguments.logits
    typed = logits if logits.dtype in DTYPES else logits.float()
    with torch.cuda.device_of(logits):
        grad = backward(*widened(*arguments._replace(logits=typed)))
    return in_format_of(grad.to(logits.dtype), logits)
