"""DeepLab-v3+: DeepLab-v3 with a decoder that adds features of stride 4."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..nn import conv_norm_relu
from ..ops.upsample import upsample
from .deeplab import DeepLab, aspp_of, aux_head_of, backbone_of, checked


class Decoder(nn.Module):
    """Decoder of DeepLab-v3+ without its last convolution (Chen et al. 2018, figure 2).

    The features of ASPP are upsampled to the size of the low-level ones, whose channels a 1x1
    convolution reduces, and 3x3 convolutions refine the concatenation of both.

    Args:
        config: arguments of :class:`DeepLabV3Plus`.
        out_channels, low_channels: channels of the backbone's features "out" and "low".

    Input {"out": [N, out_channels, h, w], "low": [N, low_channels, H, W]}; output
    [N, aspp_channels, H, W].
    """

    def __init__(self, config: Mapping[str, Any], out_channels: int, low_channels: int) -> None:
        super().__init__()
        separable = config["separable_decoder"], config["depthwise_norm"]
        channels = config["aspp_channels"]
        low_level_channels = config["low_level_channels"]
        self.align_corners = config["align_corners"]
        self.aspp: nn.Module = aspp_of(config, out_channels)
        if config["aspp_conv"]:
            self.aspp = nn.Sequential(
                self.aspp, conv_norm_relu(channels, channels, 3, 1, *separable)
            )
        self.low_level = conv_norm_relu(low_channels, low_level_channels)
        widths = [channels + low_level_channels] + [channels] * config["decoder_convs"]
        self.convs = nn.Sequential(
            *(conv_norm_relu(*shape, 3, 1, *separable) for shape in zip(widths, widths[1:]))
        )

    def forward(self, features: Mapping[str, Tensor]) -> Tensor:
        low = self.low_level(features["low"])
        out = upsample(self.aspp(features["out"]), (low.size(2), low.size(3)), self.align_corners)
        return self.convs(torch.cat([out, low], dim=1))


class DeepLabV3Plus(DeepLab):
    """DeepLab-v3+ (Chen et al. 2018, "Encoder-Decoder with Atrous Separable Convolution ...").

    The features of ASPP are upsampled to stride 4, concatenated with features of the backbone of
    that stride, and refined by 3x3 convolutions: sharper borders than :class:`DeepLabV3`'s. The
    methods are the same.

    Args:
        backbone, num_classes, output_stride, atrous_rates, multi_grid, aux_loss, in_channels,
            dropout, aspp_channels, project_size, depthwise_norm, backbone_variant, norm_eps,
            pretrained_backbone: see :class:`DeepLabV3`.
        low_level_channels: channels to which the features of stride 4 are reduced.
        separable: depthwise separable convolutions in ASPP and in the decoder.
        align_corners: convention of both upsamplings, as in F.interpolate.
        separable_decoder: whether the decoder has separable convolutions, if that differs from
            ``separable``.
        decoder_convs: number of 3x3 convolutions of the decoder.
        aspp_conv: one more 3x3 convolution between ASPP and the upsampling, as in
            segmentation_models_pytorch.

    Raises:
        ValueError, TypeError: an argument has an unsupported value or type; the message names it.
        ImportError: ``backbone`` or ``pretrained_backbone`` needs a package that is not installed.
        ConnectionError: the ImageNet weights cannot be downloaded; the message says what to do.

    >>> model = DeepLabV3Plus("resnet50", num_classes=11)
    >>> logits = model(torch.randn(2, 3, 360, 480))["out"]
    """

    head_inputs = ("low", "out")

    def __init__(
        self,
        backbone: str = "resnet50",
        num_classes: int = 21,
        output_stride: int = 16,
        atrous_rates: Sequence[int] | None = None,
        multi_grid: Sequence[int] | None = None,
        aux_loss: bool | None = None,
        *,
        low_level_channels: int = 48,
        in_channels: int = 3,
        separable: bool = False,
        align_corners: bool = False,
        dropout: float = 0.5,
        separable_decoder: bool | None = None,
        decoder_convs: int = 2,
        aspp_conv: bool = False,
        aspp_channels: int = 256,
        project_size: int = 1,
        depthwise_norm: bool = False,
        backbone_variant: str = "torchvision",
        norm_eps: float | None = None,
        pretrained_backbone: bool = False,
    ) -> None:
        separable_decoder = separable if separable_decoder is None else separable_decoder
        config = checked(locals())
        features = backbone_of(config)
        aux_classifier = aux_head_of(config, features.aux_channels)
        decoder = Decoder(config, features.out_channels, features.low_channels)
        classifier = nn.Sequential(
            decoder, nn.Conv2d(config["aspp_channels"], config["num_classes"], 1)
        )
        super().__init__(config, features, classifier, aux_classifier, pretrained_backbone)

    @property
    def align_corners(self) -> bool:
        """Convention of both upsamplings, in the decoder and of the logits."""
        return self.classifier[0].align_corners

    @align_corners.setter
    def align_corners(self, value: bool) -> None:
        self.classifier[0].align_corners = value
