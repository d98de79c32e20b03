"""Convolutions outside of pyramids."""

from __future__ import annotations

from torch import nn

from ..nn import Conv2d
from ..nn.conv import has_same_padding
from . import module as swapped


class Convolution(swapped.Accelerated, Conv2d):
    """The convolutions of :class:`deeplab_fast.nn.Conv2d`, in place of ``nn.Conv2d``."""


def kind_of(conv: nn.Conv2d) -> str | None:
    """A name for a dilated or depthwise convolution; None for another one."""
    words = ["dilated"] * (max(conv.dilation) > 1)
    words += ["depthwise"] * (1 < conv.groups == conv.in_channels)
    return " ".join([*words, "convolution"]) if words else None


def unsupported_reason(conv: nn.Conv2d) -> str | None:
    """Why a dilated or depthwise convolution stays as it is; None if it can be replaced."""
    if type(conv) is not nn.Conv2d or "forward" in vars(conv):
        return f"not a plain nn.Conv2d but {type(conv).__name__}"
    if max(conv.dilation) == 1:
        return "not dilated, so PyTorch's is as fast"
    is_valid = (conv.stride, conv.padding, conv.padding_mode) == ((1, 1), (0, 0), "zeros")
    if not (is_valid or has_same_padding(conv)):
        return f"stride {conv.stride}, padding {conv.padding} with {conv.padding_mode}"
    return None


def accelerate_convolution(conv: nn.Conv2d) -> str:
    """Replace the class of a convolution. Returns what runs instead."""
    swapped.replace(conv, Convolution)
    if conv.groups in (1, conv.in_channels) and has_same_padding(conv):
        return (
            "dilated_conv2d on a GPU, if measured to be faster than cuDNN, and in half-precision "
            "training on a CPU; otherwise PyTorch's"
        )
    return "dilated_conv2d in half-precision training on a CPU; otherwise PyTorch's"
