"""The ``emulated`` backend: the CUDA kernels compiled for the CPU, to test them without a GPU.

Far slower than ``cpu`` and never chosen automatically. Every launch runs its threads in a random
order and lands asynchronous copies at random moments, repeatably for a seed; a kernel that
deadlocks, or that does what CUDA leaves undefined, raises a RuntimeError naming kernel, block and
where each warp waits.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch import Tensor

from . import _emulated
from ._native.common import LaunchContext
from .backends import registry

SHARED_MEMORY = {"sm_80": 163 * 1024, "sm_86": 99 * 1024, "sm_90": 227 * 1024}
"""Bytes of shared memory that a block can have, CUDA C++ Programming Guide, compute capabilities"""

_STREAM = 0  # launches return when they are done
_device = "sm_80"
_NUM_CTAS = 8  # so few that some convolutions of test size split sums and others do not


@contextlib.contextmanager
def machine(seed: int = 0, device: str = "sm_80") -> Iterator[None]:
    """Run the block's launches with another seed, or on another device.

    Args:
        seed: 0 lands every asynchronous copy when it is issued, 1 as late as its wait allows,
            the others at random moments between. Each seed has its own order of threads.
        device: "sm_80", "sm_86" (and 89) or "sm_90", which has kernels of its own.

    >>> with backend("emulated"), machine(seed=1):
    ...     labels = upsample_argmax(logits, size=(33, 33))
    """
    global _device
    outer_device, _device = _device, device
    outer_limit = _emulated.set_shared_memory_limit(SHARED_MEMORY[device])
    outer_seed = _emulated.set_seed(seed)
    try:
        yield
    finally:
        _emulated.set_seed(outer_seed)
        _emulated.set_shared_memory_limit(outer_limit)
        _device = outer_device


def _unavailable_reason(device_type: str) -> str | None:
    return None if device_type == "cpu" else f"the tensors are on {device_type}"


def _launch_context(tensor: Tensor) -> contextlib.AbstractContextManager[LaunchContext]:
    return contextlib.nullcontext(
        LaunchContext(_emulated.cuda, _STREAM, _NUM_CTAS, _device == "sm_90")
    )


registry.register_backend("emulated", _unavailable_reason, _launch_context)
for op, kernel in registry.kernels_of("cuda").items():
    registry.register_kernel(op, "emulated", unsupported_reason=kernel.unsupported_reason)(
        kernel.run
    )
