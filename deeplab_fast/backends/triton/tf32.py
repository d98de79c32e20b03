"""Operands rounded to TF32: tensor cores truncate fp32 operands instead.

``torch.backends.cudnn`` decides at every call whether fp32 convolutions may use TF32.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..._native.memory_format import channels_last
from ..._native.precision import tf32_is_allowed
from .block_sizes import block_for


@triton.jit
def round_to_tf32_kernel(p_output, p_input, num_elements, BLOCK: tl.constexpr):
    """Round to nearest, ties away from zero, like cvt.rna.tf32."""
    o = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    b_exact = tl.load(p_input + o, mask=o < num_elements, other=0.0)
    b_bits = (b_exact.to(tl.int32, bitcast=True) + 0x1000) & -0x2000
    b_rounded = b_bits.to(tl.float32, bitcast=True)
    b_rounded = tl.where(tl.abs(b_exact) < float("inf"), b_rounded, b_exact)  # NaN stays NaN
    tl.store(p_output + o, b_rounded, mask=o < num_elements)


def precision_of(dtype: torch.dtype) -> str:
    """``input_precision`` of tl.dot, which concerns fp32 only. AMD GPUs have no TF32."""
    is_tf32 = dtype == torch.float32 and tf32_is_allowed() and not torch.version.hip
    return "tf32" if is_tf32 else "ieee"


def operand(tensor: Tensor, precision: str) -> Tensor:
    """``tensor`` in channels_last, rounded to TF32 if products are computed in it."""
    tensor = channels_last(tensor)
    if precision != "tf32":
        return tensor
    rounded = torch.empty_like(tensor, memory_format=torch.channels_last)
    block = block_for(tensor.numel(), 1024, 65536)
    round_to_tf32_kernel[(triton.cdiv(tensor.numel(), block),)](
        rounded, tensor, tensor.numel(), BLOCK=block, num_warps=4, enable_fp_fusion=True
    )
    return rounded
