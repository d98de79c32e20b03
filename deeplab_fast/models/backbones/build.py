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
    tf_padding: bool = False,
    norm_eps: float = 1e-5,
) -> Backbone:
    """A backbone with random weights; the arguments are those of :class:`DeepLabV3`.

    Raises:
        ValueError: an argument has an unsupported value; the message names it.
    """
    if name not in _NAMES:
        expected = ", ".join(map(repr, _NAMES[:-1]))
        raise ValueError(f"backbone: expected {expected} or {_NAMES[-1]!r}, got {name!r}")
    if multi_grid is not None:
        if name not in RESNETS:
            raise ValueError(f"multi_grid: only resnets have one, not {name}")
        if len(multi_grid) != 3 or any(unit < 1 for unit in multi_grid):
            raise ValueError(f"multi_grid: expected 3 positive ints, got {multi_grid}")
    if not 0 < norm_eps < math.inf:
        raise ValueError(f"norm_eps: expected a positive number, got {norm_eps!r}")
    if tf_padding and name != "mobilenet_v2":
        raise ValueError(f"tf_padding: only mobilenet_v2 has it, not {name}")
    backbone: Backbone
    if name == "mobilenet_v2":
        backbone = MobileNetV2(output_stride, tf_padding)
    else:
        backbone = ResNet(name, output_stride, multi_grid)
    for module in backbone.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eps = norm_eps
    return backbone
