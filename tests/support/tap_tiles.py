"""Rows of work lists (csrc/schedule/work_list.h) as arrays, and branches to list tiles of."""

from __future__ import annotations

import numpy as np

Branch = tuple[int, int, int, int]  # kernel_H, kernel_W, dilation_H, dilation_W


def rows(buffer: bytearray, fields: int) -> np.ndarray:
    return np.frombuffer(buffer, np.int32).reshape(-1, fields).astype(np.int64)


def square(*kernels_and_dilations: tuple[int, int]) -> list[Branch]:
    return [(k, k, d, d) for k, d in kernels_and_dilations]


ASPP_OS16 = square((1, 1), (3, 6), (3, 12), (3, 18))
ASPP_OS8 = square((1, 1), (3, 12), (3, 24), (3, 36))
