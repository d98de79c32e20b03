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
        dilate_first_block: in a dilated stage, dilate the first block like the others, as in
            segmentation_models_pytorch. torchvision's keeps the dilation of the stage before.
        dilate_next_stage: mobilenet_v2 as in jfzhang95/pytorch-deeplab-xception: all blocks of the
            stage whose stride was removed keep the dilation of the stage before.
        tf_padding: pad mobilenet_v2 as TensorFlow's "SAME" does, for weights trained there.
        pad_before_expansion: pad the input of mobilenet_v2's blocks instead of that of their
            depthwise convolutions, as in VainF/DeepLabV3Plus-Pytorch and jfzhang95's.
        pad_stem: pad the first convolution of mobilenet_v2; VainF's does not.
        last_conv: keep the last 1x1 convolution of mobilenet_v2, to 1280 channels, as
            segmentation_models_pytorch does.
        norm_eps: epsilon of the backbone's batch norms, 1e-3 in TensorFlow's MobileNetV2; by
            default that of torchvision or timm.
        pretrained_backbone: download ImageNet weights for the backbone, published by torchvision
            or timm, which must be installed.

    Attributes:
        preprocessing: the :class:`Preprocessing` that the model was trained with.
        categories: names of the classes, or None.
        config: the arguments of the constructor, in JSON types.

    Raises:
        ValueError: an argument has an unsupported value; the message names it.
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
        dilate_first_block: bool = False,
        dilate_next_stage: bool = False,
        tf_padding: bool = False,
        pad_before_expansion: bool = False,
        pad_stem: bool = True,
        last_conv: bool = False,
        norm_eps: float | None = None,
        pretrained_backbone: bool = False,
    ) -> None:
        config = checked(locals())
        # The modules are made in torchvision's order, so that a seed gives the same weights.
        features = backbone_of(config)
        aux_classifier = aux_head_of(config, features.aux_channels)
        classifier = _classifier(aspp_of(config, features.out_channels), num_classes, head_conv)
        super().__init__(config, features, classifier, aux_classifier, pretrained_backbone)


def _classifier(aspp: ASPP, num_classes: int, head_conv: bool) -> nn.Sequential:
    channels = aspp.project[0].out_channels
    classifier = nn.Sequential(aspp)
    if head_conv:
        classifier.extend(conv_norm_relu(channels, channels, 3))
    return classifier.append(nn.Conv2d(channels, num_classes, 1))
