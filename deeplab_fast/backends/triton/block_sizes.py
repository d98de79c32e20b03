"""Sizes of the blocks that a program computes, compiled and interpreted."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton

INTERPRETED = bool(triton.knobs.runtime.interpret)
_SMALLEST = 16  # tensor cores multiply blocks of at least 16 x 16


def block_for(size: int, compiled: int, interpreted: int) -> int:
    """Block size along a dimension of ``size`` elements.

    The interpreter's time depends on the number of operations, not of elements, so its blocks are
    as large as ``interpreted`` allows.
    """
    return min(triton.next_power_of_2(size), interpreted) if INTERPRETED else compiled


class Blocks(NamedTuple):
    """Blocks of a matrix product, and the number of warps and pipeline stages of a program."""

    m: int
    n: int
    k: int
    num_warps: int
    num_stages: int


def blocks_for(dtype: torch.dtype, precision: str, rows: int, columns: int, depth: int) -> Blocks:
    """Blocks of the product of matrices [rows, depth] and [depth, columns]."""
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
    """Rows of an output tile whose partial sums one program adds up."""
    return block_for(blocks.m, 16, 512)
