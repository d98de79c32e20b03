"""MobileNetV3-Large backbone with atrous depthwise convolutions, in torchvision's keys."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from ...nn import Conv2d
from .interface import Backbone
from .resnet import initialize

# (kernel, expanded channels, channels, squeeze-and-excitation, hardswish, stride), table 1 of the
# paper
_BLOCKS = (
    (3, 16, 16, False, False, 1),
    (3, 64, 24, False, False, 2),
    (3, 72, 24, False, False, 1),
    (5, 72, 40, True, False, 2),
    (5, 120, 40, True, False, 1),
    (5, 120, 40, True, False, 1),
    (3, 240, 80, False, True, 2),
    (3, 200, 80, False, True, 1),
    (3, 184, 80, False, True, 1),
    (3, 184, 80, False, True, 1),
    (3, 480, 112, True, True, 1),
    (3, 672, 112, True, True, 1),
    (5, 672, 160, True, True, 2),
    (5, 960, 160, True, True, 1),
    (5, 960, 160, True, True, 1),
)
_LOW, _AUX = 3, 4  # the last layer of stride 4, and the first one of stride 8


class SqueezeExcitation(nn.Module):
    """Channels scaled by factors that depend on their means (Hu et al. 2017)."""

    def __init__(self, channels: int, squeeze_channels: int) -> None:
        super().__init__()
        self.fc1 = nn.Conv2d(channels, squeeze_channels, 1)
        self.fc2 = nn.Conv2d(squeeze_channels, channels, 1)

    def forward(self, input: Tensor) -> Tensor:
        scale = self.fc2(F.relu(self.fc1(F.adaptive_avg_pool2d(input, 1))))
        return F.hardsigmoid(scale) * input


class InvertedResidual(nn.Module):
    """1x1 expansion, depthwise convolution, squeeze-and-excitation and linear 1x1 projection.

    Source: Howard et al. 2019, "Searching for MobileNetV3", figure 4.
    """

    def __init__(
        self,
        in_channels: int,
        kernel: int,
        width: int,
        out_channels: int,
        squeeze: bool,
        hardswish: bool,
        stride: int,
        dilation: int,
    ) -> None:
        super().__init__()
        activation = nn.Hardswish if hardswish else nn.ReLU
        self.residual = stride == 1 and in_channels == out_channels
        layers: list[nn.Module] = []
        if width != in_channels:
            layers.append(_conv_norm(in_channels, width, 1, activation))
        layers.append(_conv_norm(width, width, kernel, activation, stride, dilation, width))
        if squeeze:
            layers.append(SqueezeExcitation(width, _multiple_of_8(width // 4)))
        layers.append(_conv_norm(width, out_channels, 1))
        self.block = nn.Sequential(*layers)

    def forward(self, input: Tensor) -> Tensor:
        return input + self.block(input) if self.residual else self.block(input)


class MobileNetV3Large(Backbone):
    """MobileNetV3-Large without its classifier (Howard et al. 2019).

    At output stride 16 this is the backbone of torchvision's ``deeplabv3_mobilenet_v3_large``: all
    blocks of a stage whose stride became a dilation have that dilation, the first one included.

    Args:
        output_stride: 8 or 16, the size of the input divided by the size of the features.
        in_channels: channels of the images.

    The features "aux", of stride 8, are those that torchvision takes.
    """

    low_channels, aux_channels, out_channels = 24, 40, 960

    def __init__(self, output_stride: int, in_channels: int = 3) -> None:
        super().__init__()
        channels, reached, dilation = 16, 2, 1
        layers: list[nn.Module] = [_conv_norm(in_channels, channels, 3, nn.Hardswish, stride=2)]
        for kernel, width, out_channels, squeeze, hardswish, stride in _BLOCKS:
            if reached == output_stride:
                dilation, stride = dilation * stride, 1
            reached *= stride
            shape = channels, kernel, width, out_channels
            layers.append(InvertedResidual(*shape, squeeze, hardswish, stride, dilation))
            channels = out_channels
        layers.append(_conv_norm(channels, self.out_channels, 1, nn.Hardswish))
        for i, layer in enumerate(layers):
            self.add_module(str(i), layer)
        # torchvision's constructor also creates and initialises its classifier. Doing the same
        # consumes the same random numbers, so that a seed gives the same weights.
        classifier = nn.Linear(self.out_channels, 1280), nn.Linear(1280, 1000)
        initialize(self)
        for linear in classifier:
            nn.init.normal_(linear.weight, 0, 0.01)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        features, x = {}, images
        for i, layer in enumerate(self.children()):
            x = layer(x)
            if i == _LOW:
                features["low"] = x
            elif i == _AUX:
                features["aux"] = x
        features["out"] = x
        return features


def _conv_norm(
    in_channels: int,
    out_channels: int,
    kernel_size: int,
    activation: type[nn.Hardswish] | type[nn.ReLU] | None = None,
    stride: int = 1,
    dilation: int = 1,
    groups: int = 1,
) -> nn.Sequential:
    padding = dilation * (kernel_size // 2)
    conv = Conv2d(
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias=False
    )
    norm = nn.BatchNorm2d(out_channels, eps=1e-3, momentum=0.01)
    return nn.Sequential(conv, norm, *([] if activation is None else [activation(inplace=True)]))


def _multiple_of_8(channels: int) -> int:
    """The nearest multiple of 8, or the next one if that is below 90 % of ``channels``."""
    rounded = max(8, (channels + 4) // 8 * 8)
    return rounded if rounded >= 0.9 * channels else rounded + 8
