"""The ``triton`` backend: kernels that Triton compiles on the machine, for NVIDIA and AMD GPUs.

One file per op holds its kernels and their launches. Triton is imported with the first kernel that
runs, so that importing the package stays fast.
"""

from . import device

__all__ = ["device"]
