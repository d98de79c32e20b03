"""labels[n, y, x] = argmax_c bilinear(logits[n, c])(y, x), interpolated in fp32.

logits [N, C, H, W] in any strides, labels [N, out_H, out_W] contiguous. The output pixels between
the same four source pixels form a cell. If cells are large, a first kernel lists the classes that
can win in each cell (csrc/common/bilinear.h), and each pixel compares only the listed classes. If
there is only one, nothing is interpolated. If cells are small, every pixel compares all classes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..._native.upsample_shape import source_scale
from ..arguments import UpsampleArgmax
from ..registry import register_kernel
from .bilinear import block_for, interpolate, source_pair
from .device import DTYPES, MAX_INDEX, widened

MAX_CANDIDATES = 32  # length of a cell's list; with more candidates, its pixels compare all classes
MAX_CELL_SCALE = 0.3  # source pixels per output pixel above which lists cost more than they save

# The order is that of torch.argmax: the first NaN, else the greatest value, then the lowest class.
_NAN_KEY = tl.constexpr(0x7FFFFFFF)
_NO_KEY = tl.constexpr(-(2**63))
_MAX_CANDIDATES = tl.constexpr(MAX_CANDIDATES)


@triton.jit
def _key(b_value, o_class):
    """int64 key that orders by value, and equal values by class: the lowest class is greatest."""
    b_bits = tl.where(b_value == 0, 0.0, b_value).to(tl.int32, bitcast=True)
    b_ordered = b_bits ^ ((b_bits >> 31) & 0x7FFFFFFF)
    b_ordered = tl.where(b_value != b_value, _NAN_KEY, b_ordered)
    return (b_ordered.to(tl.int64) << 32) | (0x7FFFFFFF - o_class).to(tl.int64)


@triton.jit
def _class_of(b_key):
    return (0x7FFFFFFF - (b_key & 0x7FFFFFFF)).to(tl.int32)


@triton.jit
def _can_win(b_a, b_b, b_c, b_d, p_a, p_b, p_c, p_d, o_winner, m_cell):
    """True for classes whose logits a, b, c, d at a cell's corners can beat class o_winner."""
    b_can_win = b_a > _losing_bound(p_a + o_winner, m_cell)[None, :]
    b_can_win |= b_b > _losing_bound(p_b + o_winner, m_cell)[None, :]
    b_can_win |= b_c > _losing_bound(p_c + o_winner, m_cell)[None, :]
    b_can_win |= b_d > _losing_bound(p_d + o_winner, m_cell)[None, :]
    return b_can_win


@triton.jit
def _losing_bound(p_logit, m_cell):
    """losing_bound of bilinear.h: a class at or below it loses to the class with this logit."""
    b_logit = tl.load(p_logit, mask=m_cell, other=0.0).to(tl.float32)
    return b_logit - (tl.abs(b_logit) * 2.0**-18 + 2.0**-118)


@triton.jit
def _winner(b_key, b_logit, o_class):
    return tl.maximum(b_key, tl.max(_key(b_logit, o_class), axis=0))


@triton.jit
def _is_finite(b_logit):
    """1 if all classes are small enough that no interpolated value overflows, else 0."""
    return tl.min((tl.abs(b_logit) < 2.0**126).to(tl.int32), axis=0)


@triton.jit
def upsample_argmax_candidates_kernel(
    p_candidates,  # [N, H, W, MAX_CANDIDATES] classes, the lowest first
    p_counts,  # [N, H, W] number of candidates; above MAX_CANDIDATES any class can win
    p_logits,  # [N, C, H, W]
    num_cells,
    C,
    H,
    W,
    stride_n,
    stride_c,
    stride_h,
    stride_w,
    BLOCK_C: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    o_cell = tl.program_id(0).to(tl.int64) * BLOCK_S + tl.arange(0, BLOCK_S)
    m_cell = o_cell < num_cells
    o_lo_x = o_cell % W
    o_lo_y = o_cell // W % H
    p_row = p_logits + (o_cell // W // H) * stride_n + o_lo_y * stride_h
    p_next_row = p_row + (tl.minimum(o_lo_y + 1, H - 1) - o_lo_y) * stride_h
    o_hi_x = tl.minimum(o_lo_x + 1, W - 1)
    p_a, p_b = p_row + o_lo_x * stride_w, p_row + o_hi_x * stride_w
    p_c, p_d = p_next_row + o_lo_x * stride_w, p_next_row + o_hi_x * stride_w

    # The winners at the corners.
    b_key_a = tl.full([BLOCK_S], _NO_KEY, tl.int64)
    b_key_b, b_key_c, b_key_d = b_key_a, b_key_a, b_key_a
    b_finite = tl.full([BLOCK_S], 1, tl.int32)
    for i_c in range(0, C, BLOCK_C):
        # Past the end the last class is repeated, which cannot change the winner.
        o_c = tl.minimum(i_c + tl.arange(0, BLOCK_C), C - 1)[:, None]
        o_offset = o_c.to(tl.int64) * stride_c
        b_a = tl.load(p_a[None, :] + o_offset, mask=m_cell[None, :], other=0.0).to(tl.float32)
        b_b = tl.load(p_b[None, :] + o_offset, mask=m_cell[None, :], other=0.0).to(tl.float32)
        b_c = tl.load(p_c[None, :] + o_offset, mask=m_cell[None, :], other=0.0).to(tl.float32)
        b_d = tl.load(p_d[None, :] + o_offset, mask=m_cell[None, :], other=0.0).to(tl.float32)
        b_key_a, b_key_b = _winner(b_key_a, b_a, o_c), _winner(b_key_b, b_b, o_c)
        b_key_c, b_key_d = _winner(b_key_c, b_c, o_c), _winner(b_key_d, b_d, o_c)
        b_finite &= _is_finite(b_a) & _is_finite(b_b) & _is_finite(b_c) & _is_finite(b_d)
    o_winner_a = _class_of(b_key_a).to(tl.int64) * stride_c
    o_winner_b = _class_of(b_key_b).to(tl.int64) * stride_c
    o_winner_c = _class_of(b_key_c).to(tl.int64) * stride_c
    o_winner_d = _class_of(b_key_d).to(tl.int64) * stride_c

    # The candidates: classes that no corner's winner beats at all four corners.
    b_count = tl.full([BLOCK_S], 0, tl.int32)
    for i_c in range(0, C, BLOCK_C):
        o_c = i_c + tl.arange(0, BLOCK_C)[:, None]
        m_class = (o_c < C) & m_cell[None, :]
        o_offset = o_c.to(tl.int64) * stride_c
        b_a = tl.load(p_a[None, :] + o_offset, mask=m_class, other=0.0).to(tl.float32)
        b_b = tl.load(p_b[None, :] + o_offset, mask=m_class, other=0.0).to(tl.float32)
        b_c = tl.load(p_c[None, :] + o_offset, mask=m_class, other=0.0).to(tl.float32)
        b_d = tl.load(p_d[None, :] + o_offset, mask=m_class, other=0.0).to(tl.float32)
        m_win = m_class & _can_win(b_a, b_b, b_c, b_d, p_a, p_b, p_c, p_d, o_winner_a, m_cell)
        m_win &= _can_win(b_a, b_b, b_c, b_d, p_a, p_b, p_c, p_d, o_winner_b, m_cell)
        m_win &= _can_win(b_a, b_b, b_c, b_d, p_a, p_b, p_c, p_d, o_winner_c, m_cell)
        m_win &= _can_win(b_a, b_b, b_c, b_d, p_a, p_b, p_c, p_d, o_winner_d, m_cell)
        b_win = m_win.to(tl.int32)
        o_slot = b_count[None, :] + tl.cumsum(b_win, axis=0) - 1
        p_slot = p_candidates + o_cell[None, :] * _MAX_CANDIDATES + o_slot
        tl.store(p_slot, o_c + tl.zeros_like(b_win), mask=m_win & (o_slot < _MAX_CANDIDATES))
        b_count += tl.sum(b_win, axis=0)
    b_count = tl.where(b_finite != 0, b_count, _MAX_CANDIDATES + 1)
    tl.store(p_counts + o_cell, b_count, mask=m_cell)


@triton.jit
def upsample_argmax_fwd_kernel(
    p_labels,  # [N, out_H, out_W]
    p_logits,  # [N, C, H, W]
    p_candidates,  # [N, H, W, MAX_CANDIDATES]
    p_counts,  # [N, H, W]
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
    PRUNED: tl.constexpr,
    ALIGN_CORNERS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    num_pixels = out_H * out_W  # per image, below 2^31
    num_blocks = tl.cdiv(num_pixels, BLOCK_P)
    i_n = (tl.program_id(0) // num_blocks).to(tl.int64)
    o_p = tl.program_id(0) % num_blocks * BLOCK_P + tl.arange(0, BLOCK_P)
    m_p = o_p < num_pixels
    o_p = tl.where(m_p, o_p, 0)
    o_y_lo, o_y_hi, b_h0, b_h1 = source_pair(o_p // out_W, H, scale_h, ALIGN_CORNERS)
    o_x_lo, o_x_hi, b_w0, b_w1 = source_pair(o_p % out_W, W, scale_w, ALIGN_CORNERS)

    if PRUNED:
        o_cell = (i_n * H + o_y_lo) * W + o_x_lo
        b_count = tl.load(p_counts + o_cell)
        m_listed = b_count <= _MAX_CANDIDATES
        b_num = tl.where(m_listed, b_count, C)
        m_open = b_count > 1
        p_listed = p_candidates + o_cell * _MAX_CANDIDATES
        b_label = tl.load(p_listed, mask=m_listed, other=0)
        num_steps = tl.max(tl.where(m_open, b_num, 0), axis=0)
    else:
        num_steps = C

    p_image = p_logits + i_n * stride_n
    p_lo_row = p_image + o_y_lo.to(tl.int64) * stride_h
    p_hi_row = p_image + o_y_hi.to(tl.int64) * stride_h
    p_a, p_b = p_lo_row + o_x_lo.to(tl.int64) * stride_w, p_lo_row + o_x_hi.to(tl.int64) * stride_w
    p_c, p_d = p_hi_row + o_x_lo.to(tl.int64) * stride_w, p_hi_row + o_x_hi.to(tl.int64) * stride_w
    b_best = tl.full([BLOCK_P], _NO_KEY, tl.int64)
    for i_k in range(0, num_steps, BLOCK_C):
        o_c = i_k + tl.arange(0, BLOCK_C)[:, None] + tl.zeros_like(o_p)[None, :]
        if PRUNED:
            m_c = (o_c < b_num[None, :]) & m_open[None, :]
            m_list = m_c & m_listed[None, :]
            o_c = tl.where(m_list, tl.load(p_listed[None, :] + o_c, mask=m_list, other=0), o_c)
        else:
            m_c = o_c < C
        o_offset = o_c.to(tl.int64) * stride_c
        b_a = tl.load(p_a[None, :] + o_offset, mask=m_c, other=0.0).to(tl.float32)
        b_b = tl.load(p_b[None, :] + o_offset, mask=m_c, other=0.0).to(tl.float32)
        b_c = tl.load(p_c[None, :] + o_offset, mask=m_c, other=0.0).to(tl.float32)
        b_d = tl.load(p_d[None, :] + o_offset, mask=m_c, other=0.0).to(tl.float32)
        b_top = interpolate(b_a, b_b, b_w0[None, :], b_w1[None, :])
        b_bottom = interpolate(b_c, b_d, b_w0[None, :], b_w1[None, :])
        b_value = interpolate(b_top, b_bottom, b_h0[None, :], b_h1[None, :])
        b_key = tl.where(m_c, _key(b_value, o_c), _NO_KEY)
        b_best = tl.maximum(b_best, tl.max(b_key, axis=0))
    if PRUNED:
        b_label = tl.where(m_open, _class_of(b_best), b_label)
    else:
        b_label = _class_of(b_best)
    p_label = p_labels + i_n * num_pixels + o_p
    tl.store(p_label, b_label.to(p_labels.dtype.element_ty), mask=m_p)


def forward(
    logits: Tensor,
    size: Sequence[int],
    scale_factors: Sequence[float] | None,
    align_corners: bool,
    dtype: torch.dtype,
) -> Tensor:
    N, C, H, W = logits.shape
    out_H, out_W = size
    scale_h, scale_w = (
        source_scale(in_size, out_size, factor, align_corners)
        for in_size, out_size, factor in zip((H, W), size, scale_factors or (None, None))
    )
    labels = logits.new_empty((N, *size), dtype=dtype)
    if labels.numel() == 0:
        return labels
    geometry = C, H, W, *logits.stride()
    block_c = block_for(C, 1, 32)

    pruned = C > 1 and scale_h <= MAX_CELL_SCALE and scale_w <= MAX_CELL_SCALE
    num_cells = N * H * W if pruned else 0
    counts = logits.new_empty(num_cells, dtype=torch.int32)
    candidates = logits.new_empty(num_cells * MAX_CANDIDATES, dtype=torch.int32)
    if pruned:
        block_s = block_for(num_cells, 8, 1024)
        upsample_argmax_candidates_kernel[(triton.cdiv(num_cells, block_s),)](
            candidates,
            counts,
            logits,
            num_cells,
            *geometry,
            BLOCK_C=block_for(C, 32, 32),
            BLOCK_S=block_s,
            num_warps=4,
            enable_fp_fusion=False,
        )
    block_p = block_for(out_H * out_W, 256, 4096)
    upsample_argmax_fwd_kernel[(N * triton.cdiv(out_H * out_W, block_p),)](
        labels,
        logits,
        candidates,
        counts,
        *geometry,
        out_H,
        out_W,
        scale_h,
        scale_w,
        PRUNED=pruned,
        ALIGN_CORNERS=align_corners,
        BLOCK_C=block_c,
        BLOCK_P=block_p,
        num_warps=4,
        enable_fp_fusion=False,
    )
    return labels


def unsupported_logits(logits: Tensor, out_pixels: int) -> str | None:
    """Why an upsampling kernel cannot index these logits; None if it can."""
    if max(*logits.shape[1:], out_pixels) > MAX_INDEX:
        return "the kernel takes fewer than 2^31 classes, rows, columns and pixels of an image"
    return None


def unsupported_reason(arguments: UpsampleArgmax) -> str | None:
    height, width = arguments.size
    return unsupported_logits(arguments.logits, height * width)


@register_kernel("upsample_argmax", "triton", unsupported_reason=unsupported_reason)
def upsample_argmax(arguments: UpsampleArgmax) -> Tensor:
    logits, size, scale_factors, align_corners, dtype = arguments
    if logits.dtype not in DTYPES:
        logits = logits.float()
    (logits,) = widened(logits)
    with torch.cuda.device_of(logits):
        return forward(logits, size, scale_factors, align_corners, dtype)
