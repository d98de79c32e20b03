"""What all calls of the compiled kernels share: dtypes, memory, where to launch."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import _C

DTYPES = {
    torch.float32: _C.DType.float32,
    torch.float16: _C.DType.float16,
    torch.bfloat16: _C.DType.bfloat16,
    torch.int64: _C.DType.int64,
    torch.int32: _C.DType.int32,
    torch.uint8: _C.DType.uint8,
}
CLAMPS = {"none": (-math.inf, math.inf), "relu": (0.0, math.inf), "relu6": (0.0, 6.0)}


class Kernels(NamedTuple):
    """Compiled CUDA kernels and where they are to run."""

    module: Any  # _C.cuda or _emulated.cuda
    stream: int
    num_workers: int  # blocks of dilated_conv2d that run at once, were they CONV_SM80's
    is_sm90: bool = False  # the kernels for compute capability 9.0 can run too


def nhwc_output(input: Tensor, channels: int) -> Tensor:
    """Uninitialised channels_last [N, channels, H, W]."""
    return torch.empty(
        (input.size(0), channels, *input.shape[2:]),
        dtype=input.dtype,
        device=input.device,
        memory_format=torch.channels_last,
    )


def aligned(tensor: Tensor, memory_format: torch.memory_format) -> Tensor:
    """In memory of this format that vectors of 16 bytes can be read from."""
    tensor = tensor.contiguous(memory_format=memory_format)
    return tensor if tensor.data_ptr() % 16 == 0 else tensor.clone()


def aligned_nhwc(tensor: Tensor) -> Tensor:
    return aligned(tensor, torch.channels_last)
