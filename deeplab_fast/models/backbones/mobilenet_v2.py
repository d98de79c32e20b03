"""MobileNetV2 backbone with atrous depthwise convolutions, in torchvision's keys."""

from __future__ import annotations

from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from ...nn import Conv2d
from .interface import Backbone
from .resnet import initialize

# (expansion, channels, blocks, stride of the first block), table 2 of the paper
_STAGES = (
    (1, 16, 1, 1),
    (6, 24, 2, 2),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)
_LOW, _AUX = (sum(blocks for _, _, blocks, _ in _STAGES[:stages]) for stages in (2, 5))


class Rules(NamedTuple):
    """The choices in which the projects' MobileNetV2s differ."""

    # Blocks at the start of a stage whose stride became a dilation that keep the dilation before
    undilated_blocks: int = 1
    same_padding: bool = False  # TensorFlow's, see pad_same
    pad_before_expansion: bool = False  # see InvertedResidual
    pad_stem: bool = True
    last_conv: bool = False  # keep the last 1x1 convolution, to 1280 channels


RULES = {
    "torchvision": Rules(),
    "tensorflow": Rules(same_padding=True),
    "segmentation_models_pytorch": Rules(undilated_blocks=0, last_conv=True),
    "VainF": Rules(pad_before_expansion=True, pad_stem=False),
    "jfzhang95": Rules(undilated_blocks=4, pad_before_expansion=True),  # all blocks of a stage
}


def pad_same(
    input: Tensor,
    kernel_size: tuple[int, int] = (3, 3),
    stride: tuple[int, int] = (2, 2),
    dilation: tuple[int, int] = (1, 1),
) -> Tensor:
    """Pad for a convolution as TensorFlow's "SAME" does.

    TensorFlow pads ``max(kernel - (size % stride or stride), 0)`` pixels in total, with the smaller
    half at the start (tf.nn, notes on padding). For 3x3 kernels of stride 2 and odd sizes this
    equals PyTorch's padding=1. For even sizes it adds one pixel at the end only, which shifts the
    convolution by one pixel.
    """
    padding: list[int] = []
    sizes = input.size(-2), input.size(-1)  # torch.fx cannot iterate over a shape
    for size, k, s, d in zip(sizes, kernel_size, stride, dilation):
        extent = d * (k - 1) + 1
        # A size may be symbolic, and max() would compare it.
        total = extent - s + -size % s if extent >= s else max(extent - s + -size % s, 0)
        padding = [total // 2, total - total // 2, *padding]
    return F.pad(input, padding)


class SameConv2d(nn.Conv2d):
    """3x3 convolution of stride 2 with TensorFlow's "SAME" padding."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(pad_same(input))


class InvertedResidual(nn.Module):
    """1x1 expansion, 3x3 depthwise convolution and linear 1x1 projection (Sandler et al. 2018).

    Args:
        pad_before_expansion: pad the input of the block instead of that of the depthwise
            convolution, which then sees relu6(bias of the batch norm) beyond the border, not 0.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        expansion: int,
        stride: int,
        dilation: int,
        same_padding: bool = False,
        pad_before_expansion: bool = False,
    ) -> None:
        super().__init__()
        width = in_channels * expansion
        self.residual = stride == 1 and in_channels == out_channels
        self.input_padding = dilation if pad_before_expansion else 0
        expand = [_conv_norm_relu6(in_channels, width, kernel_size=1)] if expansion != 1 else []
        padding = 0 if pad_before_expansion else dilation
        self.conv = nn.Sequential(
            *expand,
            _conv_norm_relu6(width, width, 3, stride, padding, dilation, width, same_padding),
            nn.Conv2d(width, out_channels, 1, bias=False),
            nn.BatchNorm2d(out_channels),
        )

    def forward(self, input: Tensor) -> Tensor:
        output = self.conv(F.pad(input, [self.input_padding] * 4) if self.input_padding else input)
        return input + output if self.residual else output


class MobileNetV2(Backbone):
    """MobileNetV2 of width 1 without its classifier (Sandler et al. 2018).

    Strides beyond ``output_stride`` become dilations of the depthwise convolutions in the blocks
    that follow.

    Args:
        output_stride: 8 or 16, the size of the input divided by the size of the features.
        in_channels: channels of the images.
        variant: a key of ``RULES``.
    """

    low_channels, aux_channels, out_channels = 24, 96, 320

    def __init__(
        self, output_stride: int, in_channels: int = 3, variant: str = "torchvision"
    ) -> None:
        super().__init__()
        rules = RULES[variant]
        channels, reached, dilation = 32, 2, 1
        stem = in_channels, channels, 3, 2, int(rules.pad_stem)
        self.features = nn.Sequential(_conv_norm_relu6(*stem, same_padding=rules.same_padding))
        for expansion, out_channels, blocks, stride in _STAGES:
            before = dilation
            if reached == output_stride:
                dilation, stride = dilation * stride, 1
            reached *= stride
            for i in range(blocks):
                self.features.append(
                    InvertedResidual(
                        channels,
                        out_channels,
                        expansion,
                        stride if i == 0 else 1,
                        before if i < rules.undilated_blocks else dilation,
                        rules.same_padding,
                        rules.pad_before_expansion,
                    )
                )
                channels = out_channels
        if rules.last_conv:
            self.features.append(_conv_norm_relu6(channels, 1280, kernel_size=1))
            self.out_channels = 1280
        initialize(self)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        features, x = {}, images
        for i, layer in enumerate(self.features):
            x = layer(x)
            if i == _LOW:
                features["low"] = x
            elif i == _AUX:
                features["aux"] = x
        features["out"] = x
        return features


def _conv_norm_relu6(
    in_channels: int,
    out_channels: int,
    kernel_size: int,
    stride: int = 1,
    padding: int = 0,
    dilation: int = 1,
    groups: int = 1,
    same_padding: bool = False,
) -> nn.Sequential:
    shape = (in_channels, out_channels, kernel_size, stride)
    conv: nn.Conv2d
    if same_padding and stride == 2:
        conv = SameConv2d(*shape, groups=groups, bias=False)
    else:
        conv = Conv2d(*shape, padding, dilation, groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(out_channels), nn.ReLU6(inplace=True))
