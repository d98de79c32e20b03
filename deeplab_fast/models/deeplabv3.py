"""DeepLab-v3, a drop-in replacement for torchvision's."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from ..nn import ASPP, conv_norm_relu
from .deeplab import DeepLab, aspp_of, aux_head_of, backbone_of, checked


class DeepLabV3(DeepLab):
    """DeepLab-v3 (Chen et al., "Rethinking Atrous Convolution for Semantic Image Segmentation").

    ``DeepLabV3("resnet50")`` is a drop-in replacement for torchvision's ``deeplabv3_resnet50``: the
    same state dict keys, inputs, outputs, gradients and, from the same seed, weights. It adds
    :meth:`predict`, :meth:`logits` and :meth:`prepare_for_inference`. The shapes of the weights do
    not depend on ``output_stride``, nor on the values of ``atrous_rates``.

    Args:
        backbone: "resnet18", "resnet34", "resnet50", "resnet101", "resnet152", "resnet50c",
            "resnet101c", "mobilenet_v2", "mobilenet_v3_large", or "timm/" and the name of a model
            of timm. A "c" is for mmsegmentation's stem of three 3x3 convolutions.
        num_classes: channels of the logits.
        output_stride: 8 or 16, the size of the input divided by the size of the features.
            torchvision's models have 8; 16 is cheaper and coarser.
        atrous_rates: rates of the 3x3 branches of ASPP; () for no such branch. By default
            (12, 24, 36) at output stride 8 and (6, 12, 18) at 16, with equal fields of view.
        multi_grid: factors of the dilations of the blocks of a resnet's last stage, (1, 2, 4) in
            the paper (section 3.2.1). None keeps torchvision's dilations.
        aux_loss: add an FCN classifier on earlier features, returned as "aux".
        in_channels: channels of the images: 3 for RGB, 1 for grey, or any other number.
        separable: depthwise separable atrous convolutions in ASPP, as in DeepLab-v3+.
        align_corners: convention of the final upsampling, as in F.interpolate; TensorFlow's models
            need True.
        head_conv: add torchvision's 3x3 convolution between ASPP and the last convolution; the
            paper's and TensorFlow's models have none.
        dropout: probability of dropout after ASPP.
        aspp_channels, project_size, depthwise_norm: ``out_channels``, ``project_size`` and
            ``depthwise_norm`` of :class:`ASPP`.
        backbone_variant: the project whose rules of dilation and padding the backbone follows, for
            weights from there: "torchvision"; "segmentation_models_pytorch", "VainF" or "jfzhang95"
            for a resnet or mobilenet_v2; "tensorflow" for mobilenet_v2. The guide "Choose a
            backbone" lists the rules.
        norm_eps: epsilon of the backbone's batch norms, 1e-3 in TensorFlow's MobileNetV2; by
            default that of torchvision or timm.
        pretrained_backbone: download ImageNet weights for the backbone, published by torchvision
            or timm, which must be installed.

    Attributes:
        preprocessing: the :class:`Preprocessing` that the model was trained with.
        categories: names of the classes, or None.
        config: the arguments of the constructor, in JSON types.

    Raises:
        ValueError, TypeError: an argument has an unsupported value or type; the message names it.
        ImportError: ``backbone`` or ``pretrained_backbone`` needs a package that is not installed.
        ConnectionError: the ImageNet weights cannot be downloaded; the message says what to do.

    >>> model = DeepLabV3("resnet50", num_classes=11, aux_loss=True)
    >>> logits = model(torch.randn(2, 3, 360, 480))["out"]
    """

    def __init__(
        self,
        backbone: str = "resnet50",
        num_classes: int = 21,
        output_stride: int = 8,
        atrous_rates: Sequence[int] | None = None,
        multi_grid: Sequence[int] | None = None,
        aux_loss: bool | None = None,
        *,
        in_channels: int = 3,
        separable: bool = False,
        align_corners: bool = False,
        head_conv: bool = True,
        dropout: float = 0.5,
        aspp_channels: int = 256,
        project_size: int = 1,
        depthwise_norm: bool = False,
        backbone_variant: str = "torchvision",
        norm_eps: float | None = None,
        pretrained_backbone: bool = False,
    ) -> None:
        config = checked(locals())
        # The modules are made in torchvision's order, so that a seed gives the same weights.
        features = backbone_of(config)
        aux_classifier = aux_head_of(config, features.aux_channels)
        aspp = aspp_of(config, features.out_channels)
        classifier = _classifier(aspp, config["num_classes"], head_conv)
        super().__init__(config, features, classifier, aux_classifier, pretrained_backbone)


def _classifier(aspp: ASPP, num_classes: int, head_conv: bool) -> nn.Sequential:
    channels = aspp.project[0].out_channels
    classifier = nn.Sequential(aspp)
    if head_conv:
        classifier.extend(conv_norm_relu(channels, channels, 3))
    return classifier.append(nn.Conv2d(channels, num_classes, 1))
