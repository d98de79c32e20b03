"""The backbone of a name."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import nn

from . import mobilenet_v2, resnet
from .interface import Backbone
from .mobilenet_v2 import MobileNetV2
from .mobilenet_v3 import MobileNetV3Large
from .resnet import RESNETS, ResNet
from .timm_features import PREFIX, TimmBackbone

_NAMES = (*RESNETS, "mobilenet_v2", "mobilenet_v3_large")


def make_backbone(
    name: str,
    output_stride: int,
    in_channels: int = 3,
    multi_grid: Sequence[int] | None = None,
    backbone_variant: str = "torchvision",
    norm_eps: float | None = None,
) -> Backbone:
    """A backbone with random weights; the arguments are those of :class:`DeepLabV3`.

    Raises:
        ValueError: an argument has an unsupported value; the message names it.
        ImportError: the backbone is one of timm, which is not installed.
    """
    if name not in _NAMES and not str(name).startswith(PREFIX):
        expected = ", ".join(map(repr, _NAMES))
        raise ValueError(
            f"backbone: expected {expected} or '{PREFIX}' and the name of a model of timm, "
            f"got {name!r}"
        )
    if in_channels < 1:
        raise ValueError(f"in_channels: expected at least 1, got {in_channels}")
    if norm_eps is not None and not 0 < norm_eps < math.inf:
        raise ValueError(f"norm_eps: expected a positive number, got {norm_eps!r}")
    if multi_grid is not None and name not in RESNETS:
        raise ValueError(f"multi_grid: only resnets have it, not {name}")
    variants = _variants(name)
    if backbone_variant not in variants:
        raise ValueError(
            f"backbone_variant: expected {', '.join(map(repr, variants))} for {name}, "
            f"got {backbone_variant!r}"
        )
    backbone: Backbone
    if name in RESNETS:
        backbone = ResNet(name, output_stride, in_channels, multi_grid, backbone_variant)
    elif name == "mobilenet_v2":
        backbone = MobileNetV2(output_stride, in_channels, backbone_variant)
    elif name == "mobilenet_v3_large":
        backbone = MobileNetV3Large(output_stride, in_channels)
    else:
        backbone = TimmBackbone(name.removeprefix(PREFIX), output_stride, in_channels)
    if norm_eps is not None:
        _set_norm_eps(backbone, name, norm_eps)
    return backbone


def _variants(name: str) -> tuple[str, ...]:
    if name in RESNETS:
        return tuple(resnet.VARIANTS)
    return tuple(mobilenet_v2.RULES) if name == "mobilenet_v2" else ("torchvision",)


def _set_norm_eps(backbone: Backbone, name: str, norm_eps: float) -> None:
    norms = [module for module in backbone.modules() if isinstance(module, nn.BatchNorm2d)]
    if not norms:
        raise ValueError(f"norm_eps: expected None, since {name} has no batch norms")
    for norm in norms:
        norm.eps = norm_eps
