"""The arithmetic of csrc/common/bilinear.h in Triton: the same bits, compiled and interpreted."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

INTERPRETED = bool(triton.knobs.runtime.interpret)


def block_for(size: int, compiled: int, interpreted: int) -> int:
    """Block size: ``compiled``, or larger in the interpreter, whose cost is per operation."""
    return min(triton.next_power_of_2(size), interpreted) if INTERPRETED else compiled


@triton.jit
def _emulated_fma(a, b, c):
    """a * b + c, rounded once: in float64 the product is exact, and the sum is rounded to odd.

    Boldo and Melquiond, "Emulation of a FMA and correctly rounded sums", 2008.
    """
    product = a.to(tl.float64) * b.to(tl.float64)
    addend = c.to(tl.float64)
    total = product + addend
    virtual = total - product
    error = (product - (total - virtual)) + (addend - virtual)
    bits = total.to(tl.int64, bitcast=True)
    towards_error = tl.where((error > 0) == (total > 0), 1, -1)
    inexact = (error != 0) & (bits % 2 == 0) & (tl.abs(total) < float("inf"))
    odd = (bits + towards_error).to(tl.float64, bitcast=True)
    return tl.where(inexact, odd, total).to(tl.float32)


@triton.jit
def fma_kernel(p_out, p_a, p_b, p_c, EMULATE: tl.constexpr, BLOCK: tl.constexpr):
    o = tl.arange(0, BLOCK)
    b_a, b_b, b_c = tl.load(p_a + o), tl.load(p_b + o), tl.load(p_c + o)
    if EMULATE:
        b_out = _emulated_fma(b_a, b_b, b_c)
    else:
        b_out = tl.fma(b_a, b_b, b_c)
    tl.store(p_out + o, b_out)


def fma_rounds_twice() -> bool:
    """True if tl.fma rounds the product and the sum, as older interpreters do."""
    a, c, out = torch.tensor([1 + 2**-12]), torch.tensor([-1 - 2**-11]), torch.empty(1)
    fma_kernel[(1,)](out, a, a, c, EMULATE=False, BLOCK=1)
    return out.item() != 2**-24


_EMULATE_FMA = tl.constexpr(INTERPRETED and fma_rounds_twice())


@triton.jit
def source_pair(o_dst, size, scale, ALIGN_CORNERS: tl.constexpr):
    """The two source pixels of output coordinates and their weights: lo, hi, w0, w1."""
    b_dst = o_dst.to(tl.float32)
    if ALIGN_CORNERS:
        b_src = b_dst * scale
    else:
        b_half = tl.full(b_dst.shape, 0.5, tl.float32)
        b_scale = b_half * 0 + scale
        if _EMULATE_FMA:
            b_src = _emulated_fma(b_scale, b_dst + b_half, -b_half)
        else:
            b_src = tl.fma(b_scale, b_dst + b_half, -b_half)
        b_src = tl.where(b_src < 0, 0.0, b_src)
    o_lo = tl.minimum(b_src.to(tl.int32), size - 1)
    b_w1 = b_src - o_lo.to(tl.float32)
    return o_lo, tl.minimum(o_lo + 1, size - 1), 1.0 - b_w1, b_w1


@triton.jit
def interpolate(b_a, b_b, b_w0, b_w1):
    """a * w0 + b * w1; the first product is not rounded."""
    if _EMULATE_FMA:
        return _emulated_fma(b_a, b_w0, b_b * b_w1)
    else:
        return tl.fma(b_a, b_w0, b_b * b_w1)
