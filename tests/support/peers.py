"""DeepLabs with the keys and semantics of other projects, written for the parity tests.

Each class computes what the named project computes, with its state dict keys, from plain PyTorch
modules. Sources: VainF/DeepLabV3Plus-Pytorch at 4e1087d, jfzhang95/pytorch-deeplab-xception at
9135e10, open-mmlab/mmsegmentation's aspp_head.py, sep_aspp_head.py, fcn_head.py and resnet.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def resize(input: Tensor, like: Tensor, align_corners: bool) -> Tensor:
    return F.interpolate(input, like.shape[2:], mode="bilinear", align_corners=align_corners)


def conv(in_channels, out_channels, kernel=1, stride=1, dilation=1, groups=1) -> nn.Conv2d:
    padding = dilation * (kernel // 2)
    return nn.Conv2d(
        in_channels, out_channels, kernel, stride, padding, dilation, groups, bias=False
    )


# --- backbones


class Block(nn.Module):
    """Bottleneck of a resnet."""

    def __init__(self, in_channels: int, width: int, stride: int, dilation: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv(in_channels, width), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = conv(width, width, 3, stride, dilation), nn.BatchNorm2d(width)
        self.conv3, self.bn3 = conv(width, 4 * width), nn.BatchNorm2d(4 * width)
        self.downsample = None
        if stride > 1 or in_channels != 4 * width:
            shortcut = conv(in_channels, 4 * width, 1, stride), nn.BatchNorm2d(4 * width)
            self.downsample = nn.Sequential(*shortcut)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn1(self.conv1(x)).relu()
        y = self.bn2(self.conv2(y)).relu()
        y = self.bn3(self.conv3(y))
        return (y + (x if self.downsample is None else self.downsample(x))).relu()


class Resnet(nn.Module):
    """Resnet of bottlenecks with given dilations.

    Args:
        strides, dilations: for each stage, and for each stage and block.
        deep_stem: three 3x3 convolutions instead of a 7x7 one.
    """

    def __init__(
        self, strides: Sequence[int], dilations: Sequence[Sequence[int]], deep_stem: bool = False
    ) -> None:
        super().__init__()
        if deep_stem:
            layers: list[nn.Module] = []
            for shape in ((3, 32, 3, 2), (32, 32, 3), (32, 64, 3)):
                layers += [conv(*shape), nn.BatchNorm2d(shape[1]), nn.ReLU()]
            self.stem = nn.Sequential(*layers)
        else:
            self.conv1, self.bn1 = conv(3, 64, 7, 2), nn.BatchNorm2d(64)
        channels = 64
        for i, (stride, stage) in enumerate(zip(strides, dilations)):
            blocks = []
            for j, dilation in enumerate(stage):
                blocks.append(Block(channels, 64 << i, stride if j == 0 else 1, dilation))
                channels = 256 << i
            self.add_module(f"layer{i + 1}", nn.Sequential(*blocks))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = self.stem(x) if hasattr(self, "stem") else self.bn1(self.conv1(x)).relu()
        low = self.layer1(F.max_pool2d(x, 3, 2, 1))
        aux = self.layer3(self.layer2(low))
        return {"low": low, "aux": aux, "out": self.layer4(aux)}


def r50(output_stride: int, deep_stem: bool = False) -> Resnet:
    """ResNet-50 whose dilated stages begin with the dilation of the stage before."""
    if output_stride == 8:
        dilations = [[1] * 3, [1] * 4, [1] + [2] * 5, [2, 4, 4]]
        return Resnet((1, 2, 1, 1), dilations, deep_stem)
    return Resnet((1, 2, 2, 1), [[1] * 3, [1] * 4, [1] * 6, [1, 2, 2]], deep_stem)


def r101_multi_grid(output_stride: int) -> Resnet:
    """ResNet-101 of jfzhang95, with dilations times 1, 2 and 4 in the last stage."""
    if output_stride == 8:
        return Resnet((1, 2, 1, 1), [[1] * 3, [1] * 4, [2] * 23, [4, 8, 16]])
    return Resnet((1, 2, 2, 1), [[1] * 3, [1] * 4, [1] * 23, [2, 4, 8]])


# expansion, channels, blocks, stride
MOBILENET = (
    (1, 16, 1, 1),
    (6, 24, 2, 2),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)


class PaddedBlock(nn.Module):
    """Block of MobileNetV2 that pads its input, before the expansion.

    ``nested``: each convolution with activation is a sequence of its own (VainF); otherwise the
    block is one flat sequence (jfzhang95).
    """

    def __init__(self, in_channels, channels, stride, dilation, expansion, nested) -> None:
        super().__init__()
        width = in_channels * expansion
        self.residual = stride == 1 and in_channels == channels
        self.padding = dilation
        depthwise = nn.Conv2d(width, width, 3, stride, 0, dilation, width, bias=False)
        groups = [[depthwise, nn.BatchNorm2d(width), nn.ReLU6()]]
        if expansion > 1:
            groups.insert(0, [conv(in_channels, width), nn.BatchNorm2d(width), nn.ReLU6()])
        layers = [nn.Sequential(*group) for group in groups] if nested else sum(groups, [])
        self.conv = nn.Sequential(*layers, conv(width, channels), nn.BatchNorm2d(channels))

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(F.pad(x, [self.padding] * 4))
        return x + y if self.residual else y


def mobilenet_blocks(output_stride: int, lagging: bool, nested: bool) -> Iterator[PaddedBlock]:
    """The 17 blocks. ``lagging``: the whole stage keeps the dilation of the one before."""
    channels, reached, dilation = 32, 2, 1
    for expansion, out_channels, blocks, stride in MOBILENET:
        before = dilation
        if reached == output_stride:
            stride, dilation = 1, dilation * stride
        reached *= stride
        for i in range(blocks):
            current = before if i == 0 or lagging else dilation
            step = stride if i == 0 else 1
            yield PaddedBlock(channels, out_channels, step, current, expansion, nested)
            channels = out_channels


class CutMobilenet(nn.Module):
    """MobileNetV2 in two parts, whose blocks keep their numbers.

    ``whole``: the network is in the state dict once more, undivided (jfzhang95).
    """

    def __init__(self, stem: nn.Sequential, blocks: Sequence[nn.Module], whole: bool) -> None:
        super().__init__()
        features = nn.Sequential(stem, *blocks)
        if whole:
            self.features = features
        self.low_level_features, self.high_level_features = features[:4], features[4:]

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        low = self.low_level_features(x)
        return {"low": low, "out": self.high_level_features(low)}


# --- VainF/DeepLabV3Plus-Pytorch


def vainf_mobilenet(output_stride: int) -> CutMobilenet:
    stem = nn.Sequential(nn.Conv2d(3, 32, 3, 2, bias=False), nn.BatchNorm2d(32), nn.ReLU6())
    blocks = mobilenet_blocks(output_stride, lagging=False, nested=True)
    return CutMobilenet(stem, list(blocks), whole=False)


class Body(nn.Module):
    """Depthwise and 1x1 convolution, in a module "body"."""

    def __init__(self, in_channels: int, out_channels: int, dilation: int) -> None:
        super().__init__()
        depthwise = conv(in_channels, in_channels, 3, 1, dilation, in_channels)
        self.body = nn.Sequential(depthwise, conv(in_channels, out_channels))

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


class VainfASPP(nn.Module):
    def __init__(self, in_channels: int, rates: Sequence[int], separable: bool) -> None:
        super().__init__()
        branches = [[conv(in_channels, 256)]]
        for rate in rates:
            layer = Body if separable else lambda i, o, d: conv(i, o, 3, 1, d)
            branches.append([layer(in_channels, 256, rate)])
        branches.append([nn.AdaptiveAvgPool2d(1), conv(in_channels, 256)])
        self.convs = nn.ModuleList(
            nn.Sequential(*layers, nn.BatchNorm2d(256), nn.ReLU()) for layers in branches
        )
        norm = nn.BatchNorm2d(256), nn.ReLU(), nn.Dropout(0.1)
        self.project = nn.Sequential(conv(256 * len(branches), 256), *norm)

    def forward(self, x: Tensor) -> Tensor:
        *branches, pool = self.convs
        features = [branch(x) for branch in branches]
        return self.project(torch.cat([*features, resize(pool(x), x, False)], 1))


class VainfHead(nn.Module):
    def __init__(self, aspp: VainfASPP, num_classes: int) -> None:
        super().__init__()
        norm = nn.BatchNorm2d(256), nn.ReLU(), nn.Conv2d(256, num_classes, 1)
        self.classifier = nn.Sequential(aspp, conv(256, 256, 3), *norm)

    def forward(self, features: dict[str, Tensor]) -> Tensor:
        return self.classifier(features["out"])


class VainfPlusHead(nn.Module):
    def __init__(self, aspp: VainfASPP, low: int, num_classes: int, separable: bool) -> None:
        super().__init__()
        self.project = nn.Sequential(conv(low, 48), nn.BatchNorm2d(48), nn.ReLU())
        self.aspp = aspp
        fuse = Body(304, 256, 1) if separable else conv(304, 256, 3)
        norm = nn.BatchNorm2d(256), nn.ReLU(), nn.Conv2d(256, num_classes, 1)
        self.classifier = nn.Sequential(fuse, *norm)

    def forward(self, features: dict[str, Tensor]) -> Tensor:
        low = self.project(features["low"])
        out = resize(self.aspp(features["out"]), low, False)
        return self.classifier(torch.cat([low, out], 1))


class Vainf(nn.Module):
    """deeplabv3 or deeplabv3plus with "resnet50" or "mobilenet"."""

    def __init__(self, plus: bool, backbone: str, output_stride=16, separable=False) -> None:
        super().__init__()
        is_mobile = backbone == "mobilenet"
        self.backbone = vainf_mobilenet(output_stride) if is_mobile else r50(output_stride)
        rates = (6, 12, 18) if output_stride == 16 else (12, 24, 36)
        aspp = VainfASPP(320 if is_mobile else 2048, rates, separable)
        low = 24 if is_mobile else 256
        self.classifier = VainfPlusHead(aspp, low, 3, separable) if plus else VainfHead(aspp, 3)

    def forward(self, images: Tensor) -> Tensor:
        return resize(self.classifier(self.backbone(images)), images, False)


# --- jfzhang95/pytorch-deeplab-xception


class AtrousModule(nn.Module):
    def __init__(self, in_channels: int, kernel: int, dilation: int) -> None:
        super().__init__()
        self.atrous_conv = conv(in_channels, 256, kernel, 1, dilation)
        self.bn = nn.BatchNorm2d(256)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.atrous_conv(x)).relu()


class JfzhangASPP(nn.Module):
    def __init__(self, in_channels: int, rates: Sequence[int]) -> None:
        super().__init__()
        self.aspp1 = AtrousModule(in_channels, 1, 1)
        for i, rate in enumerate(rates):
            self.add_module(f"aspp{i + 2}", AtrousModule(in_channels, 3, rate))
        layers = nn.AdaptiveAvgPool2d(1), conv(in_channels, 256), nn.BatchNorm2d(256), nn.ReLU()
        self.global_avg_pool = nn.Sequential(*layers)
        self.conv1, self.bn1 = conv(1280, 256), nn.BatchNorm2d(256)
        self.dropout = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        branches = [branch(x) for branch in (self.aspp1, self.aspp2, self.aspp3, self.aspp4)]
        branches.append(resize(self.global_avg_pool(x), x, True))
        return self.dropout(self.bn1(self.conv1(torch.cat(branches, 1))).relu())


class JfzhangDecoder(nn.Module):
    def __init__(self, low: int, num_classes: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv(low, 48), nn.BatchNorm2d(48)
        layers: list[nn.Module] = []
        for in_channels, dropout in ((304, 0.5), (256, 0.1)):
            layers += [conv(in_channels, 256, 3), nn.BatchNorm2d(256), nn.ReLU()]
            layers.append(nn.Dropout(dropout))
        self.last_conv = nn.Sequential(*layers, nn.Conv2d(256, num_classes, 1))

    def forward(self, x: Tensor, low: Tensor) -> Tensor:
        low = self.bn1(self.conv1(low)).relu()
        return self.last_conv(torch.cat([resize(x, low, True), low], 1))


class Jfzhang(nn.Module):
    """DeepLab with the backbone "resnet" (101) or "mobilenet"."""

    def __init__(self, backbone: str, output_stride: int = 16) -> None:
        super().__init__()
        if backbone == "mobilenet":
            stem = nn.Sequential(conv(3, 32, 3, 2), nn.BatchNorm2d(32), nn.ReLU6())
            blocks = mobilenet_blocks(output_stride, lagging=True, nested=False)
            self.backbone: nn.Module = CutMobilenet(stem, list(blocks), whole=True)
        else:
            self.backbone = r101_multi_grid(output_stride)
        low, out = (24, 320) if backbone == "mobilenet" else (256, 2048)
        self.aspp = JfzhangASPP(out, (6, 12, 18) if output_stride == 16 else (12, 24, 36))
        self.decoder = JfzhangDecoder(low, 3)

    def forward(self, images: Tensor) -> Tensor:
        features = self.backbone(images)
        return resize(self.decoder(self.aspp(features["out"]), features["low"]), images, True)


# --- open-mmlab/mmsegmentation


class ConvModule(nn.Module):
    def __init__(self, in_channels, out_channels, kernel=1, dilation=1, groups=1) -> None:
        super().__init__()
        self.conv = conv(in_channels, out_channels, kernel, 1, dilation, groups)
        self.bn = nn.BatchNorm2d(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x)).relu()


class SeparableConvModule(nn.Module):
    def __init__(self, in_channels, out_channels, dilation=1) -> None:
        super().__init__()
        self.depthwise_conv = ConvModule(in_channels, in_channels, 3, dilation, in_channels)
        self.pointwise_conv = ConvModule(in_channels, out_channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.pointwise_conv(self.depthwise_conv(x))


class MmsegHead(nn.Module):
    """ASPPHead, or DepthwiseSeparableASPPHead with ``plus``; ``channels`` is 512 there."""

    def __init__(self, plus: bool, channels: int, num_classes: int) -> None:
        super().__init__()
        self.image_pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), ConvModule(2048, channels))
        self.aspp_modules = nn.ModuleList([ConvModule(2048, channels)])
        for rate in (12, 24, 36):
            self.aspp_modules.append(
                SeparableConvModule(2048, channels, rate)
                if plus
                else ConvModule(2048, channels, 3, rate)
            )
        self.bottleneck = ConvModule(5 * channels, channels, 3)
        if plus:
            self.c1_bottleneck = ConvModule(256, 48)
            fuse = SeparableConvModule(channels + 48, channels)
            self.sep_bottleneck = nn.Sequential(fuse, SeparableConvModule(channels, channels))
        self.conv_seg = nn.Conv2d(channels, num_classes, 1)

    def forward(self, features: dict[str, Tensor]) -> Tensor:
        x = features["out"]
        branches = [resize(self.image_pool(x), x, False), *(m(x) for m in self.aspp_modules)]
        x = self.bottleneck(torch.cat(branches, 1))
        if hasattr(self, "sep_bottleneck"):
            low = self.c1_bottleneck(features["low"])
            x = self.sep_bottleneck(torch.cat([resize(x, low, False), low], 1))
        return self.conv_seg(x)


class FcnHead(nn.Module):
    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.convs = nn.Sequential(ConvModule(1024, 256, 3))
        self.conv_seg = nn.Conv2d(256, num_classes, 1)

    def forward(self, features: dict[str, Tensor]) -> Tensor:
        return self.conv_seg(self.convs(features["aux"]))


class Mmseg(nn.Module):
    """EncoderDecoder with ResNet-50-D8; v1c if ``deep_stem``."""

    def __init__(self, plus: bool, deep_stem: bool, channels: int, aux: bool = True) -> None:
        super().__init__()
        self.backbone = r50(8, deep_stem)
        self.decode_head = MmsegHead(plus, channels, 3)
        if aux:
            self.auxiliary_head = FcnHead(3)

    def forward(self, images: Tensor) -> Tensor | dict[str, Tensor]:
        features = self.backbone(images)
        out = resize(self.decode_head(features), images, False)
        if not hasattr(self, "auxiliary_head"):
            return out
        return {"out": out, "aux": resize(self.auxiliary_head(features), images, False)}
