"""The ``cuda`` backend: hand-written kernels in ``_C.cuda``, on torch's current stream."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from . import _C, _native
from .backends import availability, implements

_OLDEST_CAPABILITY = (8, 0)
# Elsewhere than in code for sm_90a, the kernels for compute capability 9.0 are empty.
_HAS_SM90 = any(name.startswith("90a") for name in _C.build_info()["architectures"])
_BLOCKS_PER_PROCESSOR = 2  # of dilated_conv2d, by its registers and shared memory on sm_80


@availability("cuda")
def _unavailable(device_type: str) -> str | None:
    return _problem() if device_type == "cuda" else f"the tensors are on {device_type}"


@functools.cache
def _problem() -> str | None:
    """Why the compiled kernels cannot run on this machine's GPUs; None if they can."""
    if not hasattr(_C, "cuda"):
        return "this installation was built without a CUDA compiler"
    if not torch.cuda.is_available():
        return "there is no GPU that torch can use"
    info = _C.cuda.device_info()
    if info["driver_version"] < info["runtime_version"]:
        return (
            f"built with CUDA {_version(info['runtime_version'])}, which this machine's driver "
            f"(for CUDA {_version(info['driver_version'])}) is too old for"
        )
    oldest = min(torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count()))
    if oldest < _OLDEST_CAPABILITY:
        return "needs compute capability {}.{}, a GPU here has {}.{}".format(
            *_OLDEST_CAPABILITY, *oldest
        )
    return None


def _version(number: int) -> str:
    return f"{number // 1000}.{number % 1000 // 10}"


@implements("upsample_argmax", "cuda")
def upsample_argmax(logits: Tensor, *args: Any) -> Tensor:
    with torch.cuda.device(logits.device):
        stream = torch.cuda.current_stream().cuda_stream
        return _native.upsample_argmax(_C.cuda.upsample_argmax_fwd, stream, logits, *args)


def _refuses(input: Tensor, weight: Tensor, bias: Any, dilation: Any, groups: int) -> str | None:
    return _native.dilated_conv2d_refuses(input, [weight], groups)


def _refuses_parallel(input: Tensor, weights: Sequence[Tensor], *args: Any) -> str | None:
    return _native.dilated_conv2d_refuses(input, weights, groups=1)


@contextlib.contextmanager
def _kernels(input: Tensor) -> Iterator[_native.Kernels]:
    with torch.cuda.device(input.device):
        stream = torch.cuda.current_stream().cuda_stream
        properties = torch.cuda.get_device_properties(input.device)
        num_workers = _BLOCKS_PER_PROCESSOR * properties.multi_processor_count
        is_sm90 = _HAS_SM90 and (properties.major, properties.minor) == (9, 0)
        yield _native.Kernels(_C.cuda, stream, num_workers, is_sm90)


def _convolve(input: Tensor, *args: Any) -> Tensor:
    with _kernels(input) as kernels:
        return _native.dilated_conv2d(kernels, input, *args)


# Not automatic: it has to be measured against cuDNN first.
@implements("dilated_conv2d", "cuda", _refuses, automatic=False)
def dilated_conv2d(
    input: Tensor, weight: Tensor, bias: Tensor | None, dilation: Sequence[int], groups: int
) -> Tensor:
    return _convolve(input, [weight], [bias], [dilation])


@implements("parallel_dilated_conv2d", "cuda", _refuses_parallel, automatic=False)
def parallel_dilated_conv2d(
    input: Tensor, weights: list[Tensor], biases: list[Tensor], dilations: list[int]
) -> Tensor:
    return _convolve(
        input, weights, biases or [None] * len(weights), [(rate, rate) for rate in dilations]
    )


@implements("aspp", "cuda", _native.aspp_refuses, automatic=False)
def aspp(input: Tensor, *args: Any) -> Tensor:
    with _kernels(input) as kernels:
        return _native.aspp(kernels, input, *args)


@implements("fused_conv2d", "cuda", _native.fused_conv2d_refuses, automatic=False)
def fused_conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    activation: str,
) -> Tensor:
    return _convolve(input, [weight], [bias], [dilation], activation)


@implements("fused_conv2d_add_", "cuda", _native.fused_conv2d_add_refuses, automatic=False)
def fused_conv2d_add_(
    residual: Tensor,
    input: Tensor,
    weight: Tensor,
    bias: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    activation: str,
) -> None:
    with _kernels(input) as kernels:
        _native.dilated_conv2d_add_(kernels, residual, input, weight, bias, dilation, activation)
