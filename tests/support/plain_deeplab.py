"""DeepLab-v3+ in plain PyTorch, from figure 2 of the paper, with the keys of our modules."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def layer(
    in_channels: int,
    out_channels: int,
    size: int = 1,
    dilation: int = 1,
    separable: bool = False,
    depthwise_norm: bool = False,
) -> nn.Sequential:
    """Convolution, batch norm and ReLU; the 3x3 convolutions may be depthwise separable."""
    conv: nn.Module
    if size == 3 and separable:
        middle = [nn.BatchNorm2d(in_channels), nn.ReLU()] if depthwise_norm else []
        shape = (in_channels, in_channels, 3, 1, dilation, dilation, in_channels)
        conv = nn.Sequential(
            nn.Conv2d(*shape, bias=False),
            *middle,
            nn.Conv2d(in_channels, out_channels, 1, bias=False),
        )
    else:
        padding = dilation if size == 3 else 0
        conv = nn.Conv2d(in_channels, out_channels, size, 1, padding, dilation, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(out_channels), nn.ReLU())


class PlainASPP(nn.Module):
    """Parallel branches whose outputs are concatenated and projected."""

    def __init__(
        self, in_channels, rates, channels=256, separable=False, depthwise_norm=False,
        project_size=1, dropout=0.5,
    ) -> None:  # fmt: skip
        super().__init__()
        options = separable, depthwise_norm
        branches = [layer(in_channels, channels, 3, rate, *options) for rate in rates]
        pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), *layer(in_channels, channels))
        self.convs = nn.ModuleList([layer(in_channels, channels), *branches, pool])
        width = len(self.convs) * channels
        self.project = nn.Sequential(*layer(width, channels, project_size), nn.Dropout(dropout))

    def forward(self, x: Tensor) -> Tensor:
        *outputs, pooled = [branch(x) for branch in self.convs]
        pooled = F.interpolate(pooled, x.shape[2:], mode="bilinear")
        return self.project(torch.cat([*outputs, pooled], dim=1))


class PlainDecoder(nn.Module):
    """Encoder features, upsampled, with reduced low-level features, refined by 3x3 convolutions."""

    def __init__(
        self, in_channels, low_channels, rates, channels=256, low_level_channels=48,
        decoder_convs=2, separable=False, separable_decoder=None, depthwise_norm=False,
        aspp_conv=False, align_corners=False, project_size=1, dropout=0.5,
    ) -> None:  # fmt: skip
        super().__init__()
        decoder = separable if separable_decoder is None else separable_decoder
        self.align_corners = align_corners
        self.aspp: nn.Module = PlainASPP(
            in_channels, rates, channels, separable, depthwise_norm, project_size, dropout
        )
        if aspp_conv:
            self.aspp = nn.Sequential(
                self.aspp, layer(channels, channels, 3, 1, decoder, depthwise_norm)
            )
        self.low_level = layer(low_channels, low_level_channels)
        self.convs = nn.Sequential()
        width = channels + low_level_channels
        for _ in range(decoder_convs):
            self.convs.append(layer(width, channels, 3, 1, decoder, depthwise_norm))
            width = channels

    def forward(self, features: dict[str, Tensor]) -> Tensor:
        low = self.low_level(features["low"])
        x = F.interpolate(
            self.aspp(features["out"]),
            low.shape[2:],
            mode="bilinear",
            align_corners=self.align_corners,
        )
        return self.convs(torch.cat([x, low], dim=1))


class PlainDeepLabV3Plus(nn.Module):
    """DeepLab-v3+ with auxiliary classifier.

    ``backbone`` maps images to features "low", "aux" and "out" with these numbers of channels.
    """

    def __init__(
        self, backbone: nn.Module, channels: tuple[int, int, int], num_classes, output_stride,
        aspp_channels=256,
    ) -> None:  # fmt: skip
        super().__init__()
        low, aux, out = channels
        rates = {8: (12, 24, 36), 16: (6, 12, 18)}[output_stride]
        self.backbone = backbone
        self.classifier = nn.Sequential(
            PlainDecoder(out, low, rates, aspp_channels), nn.Conv2d(aspp_channels, num_classes, 1)
        )
        self.aux_classifier = nn.Sequential(
            nn.Conv2d(aux, aux // 4, 3, padding=1, bias=False),
            nn.BatchNorm2d(aux // 4),
            nn.ReLU(),
            nn.Dropout(0.1),
            nn.Conv2d(aux // 4, num_classes, 1),
        )

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        features = self.backbone(images)
        logits = {
            "out": self.classifier(features),
            "aux": self.aux_classifier(features["aux"]),
        }
        return {
            name: F.interpolate(x, images.shape[2:], mode="bilinear") for name, x in logits.items()
        }


def plain_resnet50(output_stride: int) -> nn.Module:
    """torchvision's ResNet-50 as a backbone; its channels are 256, 1024 and 2048."""
    from torchvision.models import resnet50
    from torchvision.models._utils import IntermediateLayerGetter

    layers = resnet50(replace_stride_with_dilation=[False, output_stride == 8, True])
    return IntermediateLayerGetter(layers, {"layer1": "low", "layer3": "aux", "layer4": "out"})
