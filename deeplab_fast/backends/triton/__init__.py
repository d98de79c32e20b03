"""The ``triton`` backend: kernels that Triton compiles at run time, for NVIDIA and AMD GPUs.

Each op has one file with its kernels and their launches. Triton is imported when the first kernel
is looked up, so that importing the package stays fast.
"""

from . import device

__all__ = ["device"]
