"""ResNet backbones with atrous convolutions, in torchvision's keys."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from ...nn import Conv2d
from .interface import Backbone

RESNETS = {"resnet50": (3, 4, 6, 3), "resnet101": (3, 4, 23, 3)}


class Bottleneck(nn.Module):
    """Residual block of 1x1, 3x3 and 1x1 convolutions; the 3x3 convolution has the stride."""

    def __init__(self, in_channels: int, width: int, stride: int, dilation: int) -> None:
        super().__init__()
        out_channels = 4 * width
        self.conv1 = nn.Conv2d(in_channels, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = Conv2d(width, width, 3, stride, dilation, dilation, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, out_channels, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(out_channels)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = None
        if stride != 1 or in_channels != out_channels:
            self.downsample = nn.Sequential(
                nn.Conv2d(in_channels, out_channels, 1, stride, bias=False),
                nn.BatchNorm2d(out_channels),
            )

    def forward(self, input: Tensor) -> Tensor:
        output = self.relu(self.bn1(self.conv1(input)))
        output = self.relu(self.bn2(self.conv2(output)))
        output = self.bn3(self.conv3(output))
        output += input if self.downsample is None else self.downsample(input)
        return self.relu(output)


class ResNet(Backbone):
    """ResNet-50 or -101 without its classifier (He et al. 2015; torchvision's ``resnet50``).

    Strides beyond ``output_stride`` become dilations. The first block of a dilated stage keeps the
    dilation of the stage before, as torchvision's ``replace_stride_with_dilation`` does.

    Args:
        name: "resnet50" or "resnet101".
        output_stride: 8 or 16, the size of the input divided by the size of the features.
        multi_grid: factors of layer4's dilation for its three blocks (Chen et al. 2017, section
            3.2.1: (1, 2, 4) gives dilations 2, 4, 8 at output stride 16), or None.

    The features "low", "aux" and "out" are those of layer1, layer3 and layer4.
    """

    low_channels, aux_channels, out_channels = 256, 1024, 2048

    def __init__(self, name: str, output_stride: int, multi_grid: Sequence[int] | None) -> None:
        super().__init__()
        blocks = RESNETS[name]
        stride3, stride4 = (1, 1) if output_stride == 8 else (2, 1)
        dilation3, dilation4 = (2, 4) if output_stride == 8 else (1, 2)
        dilations3 = [1] + [dilation3] * (blocks[2] - 1)
        dilations4 = [dilation3] + [dilation4] * (blocks[3] - 1)
        if multi_grid is not None:
            dilations4 = [dilation4 * unit for unit in multi_grid]
        self.conv1 = nn.Conv2d(3, 64, 7, 2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, padding=1)
        self.layer1 = _stage(64, 64, 1, [1] * blocks[0])
        self.layer2 = _stage(256, 128, 2, [1] * blocks[1])
        self.layer3 = _stage(512, 256, stride3, dilations3)
        self.layer4 = _stage(1024, 512, stride4, dilations4)
        # torchvision's constructor creates its classifier here. Creating one too consumes the same
        # random numbers, so that a seed gives the same weights.
        nn.Linear(2048, 1000)
        initialize(self)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        features = self.maxpool(self.relu(self.bn1(self.conv1(images))))
        low = self.layer1(features)
        aux = self.layer3(self.layer2(low))
        return {"low": low, "aux": aux, "out": self.layer4(aux)}


def _stage(in_channels: int, width: int, stride: int, dilations: Sequence[int]) -> nn.Sequential:
    first = Bottleneck(in_channels, width, stride, dilations[0])
    return nn.Sequential(first, *(Bottleneck(4 * width, width, 1, d) for d in dilations[1:]))


def initialize(backbone: nn.Module) -> None:
    """Initialise convolutions as He et al. do, in torchvision's order."""
    for module in backbone.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
