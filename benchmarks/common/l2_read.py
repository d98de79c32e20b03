"""A Triton kernel that reads a buffer that fits in the L2 cache, several times over."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 4096  # int32 elements: four 16-byte vectors for each of 256 threads


@triton.jit
def _l2_read_kernel(p_sums, p_buffer, num_blocks, blocks_each, BLOCK: tl.constexpr):
    i_program, num_programs = tl.program_id(0), tl.num_programs(0)
    b_sum = tl.zeros([BLOCK], tl.int32)
    for i in range(blocks_each):
        i_block = (i_program + i * num_programs) % num_blocks
        # .cg caches in L2 only, so that no pass is served by L1.
        p_block = p_buffer + i_block * BLOCK + tl.arange(0, BLOCK)
        b_sum += tl.load(p_block, cache_modifier=".cg")
    tl.store(p_sums + i_program, tl.sum(b_sum))


def l2_read(buffer: Tensor, passes: int, num_programs: int) -> Tensor:
    """Read ``buffer`` (int32) ``passes`` times and return a partial sum (int32) per program.

    Raises:
        ValueError: the work cannot be divided evenly among the programs; see ``buffer_size``.
    """
    num_blocks, remainder = divmod(buffer.numel(), _BLOCK)
    if remainder or num_blocks * passes % num_programs:
        raise ValueError(
            f"passes over the buffer: expected a multiple of {num_programs} blocks of {_BLOCK}, "
            f"got {buffer.numel()} elements x {passes}"
        )
    sums = torch.empty(num_programs, dtype=torch.int32, device=buffer.device)
    blocks_each = num_blocks * passes // num_programs
    _l2_read_kernel[(num_programs,)](sums, buffer, num_blocks, blocks_each, _BLOCK, num_warps=8)
    return sums


def buffer_size(num_bytes: int, num_programs: int) -> int:
    """The most int32 elements in ``num_bytes`` that the programs can read in equal parts."""
    return max(1, num_bytes // (4 * _BLOCK * num_programs)) * _BLOCK * num_programs
