"""DeepLab-v3 for PyTorch with hand-written kernels for atrous convolution, ASPP and upsampling."""

from importlib.metadata import version

from . import cpu, reference
from .backends import available_backends, backend
from .ops import aspp, dilated_conv2d, parallel_dilated_conv2d, upsample_argmax

__version__ = version("deeplab-fast")

__all__ = [
    "aspp",
    "available_backends",
    "backend",
    "cpu",
    "dilated_conv2d",
    "parallel_dilated_conv2d",
    "reference",
    "upsample_argmax",
]
