"""Modules built on the ops."""

from .aspp import ASPP, Conv2d

__all__ = ["ASPP", "Conv2d"]
