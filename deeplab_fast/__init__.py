"""DeepLab-v3 for PyTorch with hand-written kernels for atrous convolution, ASPP and upsampling."""

from importlib.metadata import version

from . import cpu, cuda, reference  # noqa: F401, they enter themselves into the backends table
from .backends import available_backends, backend
from .ops import aspp, dilated_conv2d, parallel_dilated_conv2d, upsample_argmax

__version__ = version("deeplab-fast")

__all__ = [
    "aspp",
    "available_backends",
    "backend",
    "dilated_conv2d",
    "parallel_dilated_conv2d",
    "upsample_argmax",
]
