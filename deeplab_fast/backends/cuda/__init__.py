"""The ``cuda`` backend: compiled CUDA kernels, called with tensors, one file per op.

``device`` registers the backend; each other file registers its kernels. Kernels take a
``LaunchContext``, so that the tests can run the same functions on the emulator.
"""

from . import (
    aspp,
    device,
    dilated_conv2d,
    dilated_conv2d_and_mean,
    dilated_conv2d_backward,
    fused_conv2d,
    upsample_argmax,
    upsample_cross_entropy,
)

__all__ = [
    "aspp",
    "device",
    "dilated_conv2d",
    "dilated_conv2d_and_mean",
    "dilated_conv2d_backward",
    "fused_conv2d",
    "upsample_argmax",
    "upsample_cross_entropy",
]
