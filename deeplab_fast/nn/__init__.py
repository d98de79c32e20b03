"""Modules built on the ops."""

from .aspp import ASPP
from .conv import Conv2d, SeparableConv2d, conv_norm_relu
from .deferred import deferred_upsampling
from .dice import UpsampleDiceLoss
from .loss import UpsampleCrossEntropyLoss, UpsampleFocalLoss

__all__ = [
    "ASPP",
    "Conv2d",
    "SeparableConv2d",
    "UpsampleCrossEntropyLoss",
    "UpsampleDiceLoss",
    "UpsampleFocalLoss",
    "conv_norm_relu",
    "deferred_upsampling",
]
