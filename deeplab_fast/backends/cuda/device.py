"""GPUs that run the compiled kernels, and the context of a launch.

Convolutions have kernels for compute capability 8.0, which also run on later GPUs, and for 9.0.
Backend ``cuda`` uses the newest kernels that the GPU runs; ``cuda/sm80`` and ``cuda/sm90`` use
those for 8.0 and 9.0.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ..._native import _C
from ..._native.common import LaunchContext
from ..._native.limits import unsupported_capability
from ..registry import FixableReason, register_backend

CONVOLUTIONS = ("cuda", "cuda/sm90", "cuda/sm80")
"""Backends of the ops that have separate kernels for compute capability 8.0 and 9.0."""

# Code for other architectures than sm_90a has empty kernels for compute capability 9.0.
_HAS_SM90 = any(name.startswith("90a") for name in _C.build_info()["architectures"])
# The shared memory of an SM holds two CTAs of dilated_conv2d, but only one at these compute
# capabilities, where an SM has 100 KB (CUDA C++ Programming Guide, technical specifications).
_ONE_CTA_PER_SM = {(8, 6), (8, 9), (12, 0)}


def _unavailable_reason(device_type: str) -> str | None:
    return _problem() if device_type == "cuda" else f"does not run on {device_type} tensors"


def _sm90_unavailable_reason(device_type: str) -> str | None:
    if reason := _unavailable_reason(device_type):
        return reason
    devices = range(torch.cuda.device_count())
    if not all(_runs_sm90(torch.cuda.get_device_properties(i)) for i in devices):
        return "needs compute capability 9.0 and kernels compiled for sm_90a"
    return None


def _runs_sm90(properties: Any) -> bool:
    return _HAS_SM90 and (properties.major, properties.minor) == (9, 0)


@functools.cache
def _problem() -> str | None:
    """Why the compiled kernels cannot run on this machine's GPUs; None if they can."""
    if not hasattr(_C, "cuda"):
        return "this installation was built without a CUDA compiler"
    if not torch.cuda.is_available():
        return "there is no GPU that torch can use"
    info = _C.cuda.device_info()
    if info["driver_version"] < info["runtime_version"]:
        return FixableReason(
            f"built with CUDA {_version(info['runtime_version'])}, but this machine's driver "
            f"supports CUDA {_version(info['driver_version'])} at most"
        )
    return unsupported_capability()


def _version(number: int) -> str:
    return f"{number // 1000}.{number % 1000 // 10}"


@functools.cache
def _capacity(device: torch.device) -> tuple[int, bool]:
    """Resident CTAs of dilated_conv2d, and True if the kernels for 9.0 can run.

    The result is cached, because torch.cuda.get_device_properties takes too long for a small call.
    """
    properties = torch.cuda.get_device_properties(device)
    capability = properties.major, properties.minor
    ctas = 1 if capability in _ONE_CTA_PER_SM else 2
    return ctas * properties.multi_processor_count, _runs_sm90(properties)


@contextlib.contextmanager
def launch_context(tensor: Tensor, sm90: bool = True) -> Iterator[LaunchContext]:
    """Context of launches on the device of ``tensor``, on torch's current stream there."""
    num_ctas, runs_sm90 = _capacity(tensor.device)
    # A stream can be used only while its device is the current one.
    with torch.cuda.device(tensor.device):
        stream = torch.cuda.current_stream().cuda_stream
        yield LaunchContext(_C.cuda, stream, num_ctas, sm90 and runs_sm90)


register_backend("cuda", _unavailable_reason, launch_context)
register_backend("cuda/sm90", _sm90_unavailable_reason, launch_context)
register_backend("cuda/sm80", _unavailable_reason, functools.partial(launch_context, sm90=False))
