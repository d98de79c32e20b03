"""DeepLab-v3 for PyTorch with hand-written kernels for atrous convolution, ASPP and upsampling."""

from importlib.metadata import version

from .acceleration import accelerate, restore
from .backends import available_backends, backend
from .export import export_onnx
from .models import DeepLabV3, DeepLabV3Plus
from .nn import (
    ASPP,
    UpsampleCrossEntropyLoss,
    UpsampleDiceLoss,
    UpsampleFocalLoss,
    deferred_upsampling,
)
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
    "DeepLabV3Plus",
    "UpsampleCrossEntropyLoss",
    "UpsampleDiceLoss",
    "UpsampleFocalLoss",
    "accelerate",
    "aspp",
    "available_backends",
    "backend",
    "deferred_upsampling",
    "dilated_conv2d",
    "export_onnx",
    "parallel_dilated_conv2d",
    "restore",
    "upsample_argmax",
    "upsample_cross_entropy",
]
