"""DeepLab-v3 for PyTorch with hand-written kernels for atrous convolution, ASPP and upsampling."""

from importlib.metadata import version

try:
    from . import _C  # noqa: F401
except ImportError as error:
    raise ImportError(
        f"{__path__[0]} has no compiled kernels for this Python ({error}). If it is a checkout, "
        "start Python in another folder to get the installed package, or install the checkout "
        "itself: pip install --editable ."
    ) from error

# These enter themselves into the backends table.
from .backends import cpu, reference  # noqa: F401
from .backends.cuda import device  # noqa: F401
from .backends.registry import available_backends, backend
from .backends.triton import register  # noqa: F401
from .models import DeepLabV3
from .nn import ASPP
from .ops import (
    aspp,
    dilated_conv2d,
    parallel_dilated_conv2d,
    upsample_argmax,
    upsample_cross_entropy,
)

__version__ = version("deeplab-fast")

__all__ = [
    "ASPP",
    "DeepLabV3",
    "aspp",
    "available_backends",
    "backend",
    "dilated_conv2d",
    "parallel_dilated_conv2d",
    "upsample_argmax",
    "upsample_cross_entropy",
]
