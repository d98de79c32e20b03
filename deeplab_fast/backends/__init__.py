"""Backends: implementations of the ops, and the choice among them.

A backend is one file or folder, which registers its kernels. ``registry`` picks the kernel for each
call.
"""

from . import cuda, triton, cpu, reference  # noqa: I001  the order of preference
from .explanation import explain
from .registry import available_backends, backend
from .tuning import tune

__all__ = [
    "available_backends",
    "backend",
    "cpu",
    "cuda",
    "explain",
    "reference",
    "triton",
    "tune",
]
