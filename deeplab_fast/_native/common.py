"""Types that all calls into the compiled module share."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch

from . import _C

DTYPES = {
    torch.float32: _C.DType.float32,
    torch.float16: _C.DType.float16,
    torch.bfloat16: _C.DType.bfloat16,
    torch.int64: _C.DType.int64,
    torch.int32: _C.DType.int32,
    torch.uint8: _C.DType.uint8,
}
ACTIVATION_RANGES = {
    "none": (-math.inf, math.inf),
    "relu": (0.0, math.inf),
    "relu6": (0.0, 6.0),
}


class LaunchContext(NamedTuple):
    """Compiled CUDA kernels and the device and stream that they are launched on."""

    module: Any  # _C.cuda, or the same functions compiled for the emulator
    stream: int
    num_ctas: int  # CTAs of dilated_conv2d's sm_80 kernel that are resident at once
    is_sm90: bool = False  # the device runs the kernels for compute capability 9.0
