"""The shapes that the benchmarks measure, and the number of operations they need.

A shape is an image size, an output stride and a number of classes: VOC 2012 at 513x513,
ADE20K at 512x512 and Cityscapes at 1024x2048 (Chen et al. 2017, sections 4 and 4.2).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from deeplab_fast.acceleration.flops import conv_flops


class Shape(NamedTuple):
    name: str
    image: tuple[int, int]  # height, width
    classes: int
    output_stride: int
    atrous_rates: tuple[int, ...]
    in_channels: int = 2048  # channels of the ASPP input, the last stage of a ResNet
    channels: int = 256  # output channels of every ASPP branch

    @property
    def feature(self) -> tuple[int, int]:
        """Height and width of the low-resolution map: 513 -> 33 at stride 16, 65 at stride 8."""
        height, width = self.image
        return (height - 1) // self.output_stride + 1, (width - 1) // self.output_stride + 1


VOC_OS16 = Shape("VOC 513 OS16", (513, 513), 21, 16, (6, 12, 18))
VOC_OS8 = Shape("VOC 513 OS8", (513, 513), 21, 8, (12, 24, 36))
ADE_OS8 = Shape("ADE 512 OS8", (512, 512), 150, 8, (12, 24, 36))
CITYSCAPES_OS16 = Shape("Cityscapes OS16", (1024, 2048), 19, 16, (6, 12, 18))
CITYSCAPES_OS8 = Shape("Cityscapes OS8", (1024, 2048), 19, 8, (12, 24, 36))
ALL = (VOC_OS16, VOC_OS8, ADE_OS8, CITYSCAPES_OS16, CITYSCAPES_OS8)

# --tiny: takes a moment, for the tests.
TINY = Shape("tiny", (33, 33), 5, 8, (2, 6), in_channels=16, channels=8)


def aspp_flops(shape: Shape, batch: int) -> int:
    """Operations of an ASPP in inference, without products with padding.

    The pooled branch is projected once per image, not per pixel.
    """
    c_in, c, size = shape.in_channels, shape.channels, shape.feature
    branches = sum(conv_flops(batch, c_in, c, size, rate) for rate in shape.atrous_rates)
    branches += conv_flops(batch, c_in, c, size, kernel=1)
    pooled = conv_flops(batch, c_in + c, c, (1, 1), kernel=1)  # its 1x1 convolution and projection
    project = conv_flops(batch, (1 + len(shape.atrous_rates)) * c, c, size, kernel=1)
    return branches + pooled + project


def features(shape: Shape, batch: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """An ASPP input as after the backbone's last ReLU: half of the values are zero."""
    x = torch.randn(batch, shape.in_channels, *shape.feature, device=device)
    return x.relu_().to(dtype)


def select(args: object, default: Sequence[Shape]) -> Sequence[Shape]:
    """The shapes to run: TINY with --tiny, all with --full, else ``default``."""
    if args.tiny:  # type: ignore[attr-defined]
        return (TINY,)
    return ALL if args.full else default  # type: ignore[attr-defined]
