"""The backbone of a name."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import nn

from .interface import Backbone
from .mobilenet_v2 import MobileNetV2
from .resnet import RESNETS, ResNet

_NAMES = (*RESNETS, "mobilenet_v2")


def make_backbone(
    name: str,
    output_stride: int,
    in_channels: int = 3,
    multi_grid: Sequence[int] | None = None,
    dilate_first_block: bool = False,
    dilate_next_stage: bool = False,
    tf_padding: bool = False,
    pad_before_expansion: bool = False,
    pad_stem: bool = True,
    last_conv: bool = False,
    norm_eps: float = 1e-5,
) -> Backbone:
    """A backbone with random weights; the arguments are those of :class:`DeepLabV3`.

    Raises:
        ValueError: an argument has an unsupported value; the message names it.
    """
    if name not in _NAMES:
        expected = ", ".join(map(repr, _NAMES[:-1]))
        raise ValueError(f"backbone: expected {expected} or {_NAMES[-1]!r}, got {name!r}")
    if in_channels < 1:
        raise ValueError(f"in_channels: expected at least 1, got {in_channels}")
    if not 0 < norm_eps < math.inf:
        raise ValueError(f"norm_eps: expected a positive number, got {norm_eps!r}")
    if not pad_stem and name != "mobilenet_v2":
        raise ValueError(f"pad_stem: only mobilenet_v2 can leave the padding out, not {name}")
    for option in ("dilate_next_stage", "tf_padding", "pad_before_expansion", "last_conv"):
        if locals()[option] and name != "mobilenet_v2":
            raise ValueError(f"{option}: only mobilenet_v2 has it, not {name}")
    backbone: Backbone
    if name == "mobilenet_v2":
        if multi_grid is not None:
            raise ValueError(f"multi_grid: only resnets have one, not {name}")
        backbone = MobileNetV2(
            output_stride,
            in_channels,
            dilate_first_block,
            dilate_next_stage,
            tf_padding,
            pad_before_expansion,
            pad_stem,
            last_conv,
        )
    else:
        backbone = ResNet(name, output_stride, in_channels, multi_grid, dilate_first_block)
    for module in backbone.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eps = norm_eps
    return backbone
