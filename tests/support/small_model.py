"""A small DeepLab-v3, which torch.export traces in about a second."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deeplab_fast import ASPP
from deeplab_fast.models.preprocessing import Preprocessing
from deeplab_fast.models.segmentation import SegmentationModel

from .batch_norm import with_statistics

CATEGORIES = ("background", "road", "sky", "fußweg", "car")


class Backbone(nn.Module):
    """Features of output stride 8."""

    def __init__(self, in_channels: int, channels: int) -> None:
        super().__init__()
        widths = [in_channels, channels, channels, channels]
        layers = [
            nn.Sequential(nn.Conv2d(*pair, 3, 2, 1, bias=False), nn.BatchNorm2d(pair[1]), nn.ReLU())
            for pair in zip(widths, widths[1:])
        ]
        self.layers = nn.Sequential(*layers)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        return {"out": self.layers(images)}


class OtherModel(nn.Module):
    """A model of another project: a pyramid of its own, and logits as the only output."""

    def __init__(self, num_classes: int, channels: int = 16) -> None:
        super().__init__()
        self.backbone = Backbone(3, channels)
        self.branches = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(channels, channels, 3, padding=rate, dilation=rate, bias=False),
                nn.BatchNorm2d(channels),
                nn.ReLU(),
            )
            for rate in (1, 2, 3)
        )
        self.head = nn.Conv2d(3 * channels, num_classes, 1)

    def forward(self, images: Tensor) -> Tensor:
        features = self.backbone(images)["out"]
        logits = self.head(torch.cat([branch(features) for branch in self.branches], 1))
        return F.interpolate(logits, images.shape[2:], mode="bilinear", align_corners=False)


def small_model(
    align_corners: bool = False, in_channels: int = 3, num_classes: int = 5
) -> SegmentationModel:
    """A model in evaluation mode whose labels are of several classes."""
    torch.manual_seed(0)
    channels = 16
    model = SegmentationModel(
        Backbone(in_channels, channels),
        nn.Sequential(ASPP(channels, (1, 2, 3), channels), nn.Conv2d(channels, num_classes, 1)),
        None,
        align_corners,
        Preprocessing(resize=520).for_channels(in_channels),
        CATEGORIES[:num_classes],
    )
    model.in_channels = in_channels
    return varied(model)


def other_model(num_classes: int = 5) -> nn.Module:
    torch.manual_seed(0)
    return varied(OtherModel(num_classes))


@torch.no_grad()
def varied(model: nn.Module) -> nn.Module:
    """The model in evaluation mode, changed so that all classes get labels."""
    with_statistics(model).eval()
    last = [module for module in model.modules() if isinstance(module, nn.Conv2d)][-1]
    last.weight.normal_()
    last.bias.zero_()
    channels = next(model.parameters()).size(1)
    output = model(torch.randn(2, channels, 64, 64))
    logits = output["out"] if isinstance(output, dict) else output
    last.bias -= logits.mean((0, 2, 3))
    return model
