"""ResNet backbones with atrous convolutions, in torchvision's keys."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor, nn

from ...nn import Conv2d
from .interface import Backbone


class BasicBlock(nn.Module):
    """Residual block of two 3x3 convolutions; the first one has the stride."""

    expansion = 1

    def __init__(self, in_channels: int, width: int, stride: int, dilation: int) -> None:
        super().__init__()
        self.conv1 = Conv2d(in_channels, width, 3, stride, dilation, dilation, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = Conv2d(width, width, 3, 1, dilation, dilation, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.downsample = _downsample(in_channels, width, stride)

    def forward(self, input: Tensor) -> Tensor:
        output = self.relu(self.bn1(self.conv1(input)))
        output = self.bn2(self.conv2(output))
        output += input if self.downsample is None else self.downsample(input)
        return self.relu(output)


class Bottleneck(nn.Module):
    """Residual block of 1x1, 3x3 and 1x1 convolutions; the 3x3 convolution has the stride."""

    expansion = 4

    def __init__(self, in_channels: int, width: int, stride: int, dilation: int) -> None:
        super().__init__()
        out_channels = self.expansion * width
        self.conv1 = nn.Conv2d(in_channels, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = Conv2d(width, width, 3, stride, dilation, dilation, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, out_channels, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(out_channels)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = _downsample(in_channels, out_channels, stride)

    def forward(self, input: Tensor) -> Tensor:
        output = self.relu(self.bn1(self.conv1(input)))
        output = self.relu(self.bn2(self.conv2(output)))
        output = self.bn3(self.conv3(output))
        output += input if self.downsample is None else self.downsample(input)
        return self.relu(output)


class Architecture(NamedTuple):
    """The choices in which the ResNets differ."""

    block: type[BasicBlock] | type[Bottleneck]
    blocks: tuple[int, int, int, int]
    deep_stem: bool = False


RESNETS = {
    "resnet18": Architecture(BasicBlock, (2, 2, 2, 2)),
    "resnet34": Architecture(BasicBlock, (3, 4, 6, 3)),
    "resnet50": Architecture(Bottleneck, (3, 4, 6, 3)),
    "resnet101": Architecture(Bottleneck, (3, 4, 23, 3)),
    "resnet152": Architecture(Bottleneck, (3, 8, 36, 3)),
    "resnet50c": Architecture(Bottleneck, (3, 4, 6, 3), deep_stem=True),
    "resnet101c": Architecture(Bottleneck, (3, 4, 23, 3), deep_stem=True),
}


# Values of backbone_variant; True if the first block of a dilated stage has the stage's dilation.
# False: it keeps that of the stage before, as with torchvision's replace_stride_with_dilation.
VARIANTS = {
    "torchvision": False,
    "segmentation_models_pytorch": True,
    "VainF": False,
    "jfzhang95": True,
}


class ResNet(Backbone):
    """ResNet without its classifier (He et al. 2015; torchvision's ``resnet50`` and others).

    Strides beyond ``output_stride`` become dilations of the 3x3 convolutions. The "c" of a name is
    for a stem of three 3x3 convolutions instead of one 7x7 (He et al. 2018, "Bag of Tricks", figure
    2b; mmsegmentation's ResNetV1c, whose keys ``stem.*`` it has).

    Args:
        name: a key of ``RESNETS``.
        output_stride: 8 or 16, the size of the input divided by the size of the features.
        in_channels: channels of the images.
        multi_grid: factors of layer4's dilation for each of its blocks (Chen et al. 2017, section
            3.2.1: (1, 2, 4) gives dilations 2, 4, 8 at output stride 16), or None.
        variant: a key of ``VARIANTS``.

    Raises:
        ValueError: ``multi_grid`` does not fit the blocks of layer4.

    The features "low", "aux" and "out" are those of layer1, layer3 and layer4.
    """

    def __init__(
        self,
        name: str,
        output_stride: int,
        in_channels: int = 3,
        multi_grid: Sequence[int] | None = None,
        variant: str = "torchvision",
    ) -> None:
        super().__init__()
        block, blocks, deep_stem = RESNETS[name]
        if multi_grid is not None and (
            len(multi_grid) != blocks[3] or any(unit < 1 for unit in multi_grid)
        ):
            raise ValueError(
                f"multi_grid: expected {blocks[3]} positive ints, one for each block of {name}'s "
                f"layer4, got {multi_grid}"
            )
        if deep_stem:
            self.stem = nn.Sequential(
                *_conv_norm_relu(in_channels, 32, stride=2),
                *_conv_norm_relu(32, 32, stride=1),
                *_conv_norm_relu(32, 64, stride=1),
            )
        else:
            self.conv1 = nn.Conv2d(in_channels, 64, 7, 2, padding=3, bias=False)
            self.bn1 = nn.BatchNorm2d(64)
            self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, padding=1)
        strides = (1, 2, 1, 1) if output_stride == 8 else (1, 2, 2, 1)
        stage_dilations = (1, 1, 2, 4) if output_stride == 8 else (1, 1, 1, 2)
        channels, stages = 64, []
        for i, (stride, dilation) in enumerate(zip(strides, stage_dilations)):
            dilations = [dilation] * blocks[i]
            if not VARIANTS[variant]:
                dilations[0] = stage_dilations[max(0, i - 1)]
            if i == 3 and multi_grid is not None:
                dilations = [dilation * unit for unit in multi_grid]
            width = 64 << i
            stage = nn.Sequential(block(channels, width, stride, dilations[0]))
            channels = block.expansion * width
            stage.extend(block(channels, width, 1, dilation) for dilation in dilations[1:])
            stages.append(stage)
        self.layer1, self.layer2, self.layer3, self.layer4 = stages
        self.low_channels, self.aux_channels, self.out_channels = (
            block.expansion * width for width in (64, 256, 512)
        )
        # torchvision's constructor creates its classifier here. Creating one too consumes the same
        # random numbers, so that a seed gives the same weights.
        nn.Linear(channels, 1000)
        initialize(self)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        low = self.layer1(self.maxpool(self._stem(images)))
        aux = self.layer3(self.layer2(low))
        return {"low": low, "aux": aux, "out": self.layer4(aux)}

    def _stem(self, images: Tensor) -> Tensor:
        if hasattr(self, "stem"):
            return self.stem(images)
        return self.relu(self.bn1(self.conv1(images)))


def _conv_norm_relu(in_channels: int, out_channels: int, stride: int) -> list[nn.Module]:
    return [
        nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False),
        nn.BatchNorm2d(out_channels),
        nn.ReLU(inplace=True),
    ]


def _downsample(in_channels: int, out_channels: int, stride: int) -> nn.Sequential | None:
    """The shortcut of a block that changes the shape, else None."""
    if stride == 1 and in_channels == out_channels:
        return None
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, 1, stride, bias=False),
        nn.BatchNorm2d(out_channels),
    )


def initialize(backbone: nn.Module) -> None:
    """Initialise convolutions as He et al. do, in torchvision's order."""
    for module in backbone.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
