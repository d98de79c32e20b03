"""GPUs that run the compiled kernels, and the target of launches.

Convolutions have kernels for compute capability 8.0, which also run on later GPUs, and for 9.0.
Backend ``cuda`` uses the newest kernels that the GPU runs; ``cuda/sm80`` and ``cuda/sm90`` use
those for 8.0 and 9.0.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from ..._native import _C
from ..._native.common import LaunchContext
from ..._native.limits import unsupported_capability
from ..registry import FixableReason, Target, register_backend

Call = Callable[[int, Any], Any]
"""Function of the stream and the arguments of an op, which a planned kernel returns."""

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
def target(device: torch.device, sm90: bool = True) -> Target:
    """Target of launches: ``device``, and torch's current stream there."""
    index = torch.cuda.current_device() if device.index is None else device.index
    properties = torch.cuda.get_device_properties(device)
    ctas = 1 if (properties.major, properties.minor) in _ONE_CTA_PER_SM else 2
    num_ctas = ctas * properties.multi_processor_count
    context = LaunchContext(_C.cuda, 0, num_ctas, sm90 and _runs_sm90(properties))
    # torch.cuda.current_stream() makes a Stream object, which takes longer than a launch plan.
    stream = functools.partial(torch._C._cuda_getCurrentRawStream, index)
    return Target(context, stream, functools.partial(_guard, index))


def _guard(index: int) -> torch.cuda.device | None:
    """Make a GPU the current one, because launches on a stream need its device to be current."""
    return None if torch.cuda.current_device() == index else torch.cuda.device(index)


register_backend("cuda", _unavailable_reason, target)
register_backend("cuda/sm90", _sm90_unavailable_reason, target)
register_backend("cuda/sm80", _unavailable_reason, functools.partial(target, sm90=False))
