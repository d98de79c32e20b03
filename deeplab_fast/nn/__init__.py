"""Modules built on the ops."""

from .aspp import ASPP
from .conv import Conv2d
from .loss import UpsampleCrossEntropyLoss

__all__ = ["ASPP", "Conv2d", "UpsampleCrossEntropyLoss"]
