"""Backends on this machine: where their tensors live, and how their kernels run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from deeplab_fast.backends import registry

GPU_BACKENDS = ("cuda", "cuda/sm90", "cuda/sm80", "triton")


class GpuTensor:
    """Stand-in for a tensor on a GPU. The choice of a kernel reads nothing else of it."""

    device = torch.device("cuda", 0)
    dtype = torch.float16


def with_outputs(kernel: registry.Kernel, function: Callable[[Any], Any]) -> registry.Kernel:
    """The kernel with its outputs passed through ``function``."""
    if not kernel.makes_plan:
        return kernel._replace(run=lambda *arguments: function(kernel.run(*arguments)))

    def run(context: Any, arguments: Any) -> Callable[..., Any]:
        call = kernel.run(context, arguments)
        return lambda stream, arguments: function(call(stream, arguments))

    return kernel._replace(run=run)


def device_of(backend: str) -> str:
    """The device on which tests of a backend keep their tensors."""
    return "cuda" if backend in GPU_BACKENDS and torch.cuda.is_available() else "cpu"


def is_interpreted(backend: str) -> bool:
    """True if kernels of this backend run in Triton's interpreter, for which tests do less."""
    return backend == "triton" and registry.is_available("triton", "cpu")


def needs_triton() -> pytest.MarkDecorator:
    """A skip, with the reason, if Triton's kernels can be neither compiled nor interpreted."""
    reason = registry.unavailable_reason("triton", device_of("triton"))
    return pytest.mark.skipif(reason is not None, reason=f"triton: {reason}")


def triton_examples(interpreted: int) -> int:
    """Number of hypothesis examples that a test of Triton's kernels affords.

    On a GPU nearly every example is a kernel to compile: its code depends on sizes and strides.
    """
    return interpreted if is_interpreted("triton") else 20


def set_tf32(allowed: bool) -> bool:
    """Set what torch.backends.cudnn.allow_tf32 shows, and return its former value.

    The attribute itself cannot be set once opcheck of torch 2.6 was imported.
    """
    before = torch._C._get_cudnn_allow_tf32()
    torch._C._set_cudnn_allow_tf32(allowed)
    return before
