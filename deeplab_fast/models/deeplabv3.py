"""DeepLab-v3, a drop-in replacement for torchvision's."""

from __future__ import annotations

import math
import os
import textwrap
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from ..nn import ASPP
from .checkpoint import Checkpoint, write_checkpoint
from .inference import InferenceModel, prepare
from .mobilenet_v2 import MobileNetV2
from .preprocessing import Preprocessing
from .pretrained import read_pretrained
from .resnet import ResNet
from .segmentation import SegmentationModel

_ATROUS_RATES = {8: (12, 24, 36), 16: (6, 12, 18)}
_RESNETS = ("resnet50", "resnet101")


class DeepLabV3(SegmentationModel):
    """DeepLab-v3 (Chen et al., "Rethinking Atrous Convolution for Semantic Image Segmentation").

    ``DeepLabV3("resnet50")`` is a drop-in replacement for torchvision's ``deeplabv3_resnet50``: the
    same state dict keys, inputs, outputs, gradients and, from the same seed, weights. It adds
    :meth:`predict`, :meth:`logits` and :meth:`prepare_for_inference`.

    The shapes of the weights do not depend on ``output_stride`` or ``atrous_rates``. torchvision's
    ImageNet weights can be loaded into the backbones:
    ``model.backbone.load_state_dict(torchvision_resnet.state_dict(), strict=False)``.

    Args:
        backbone: "resnet50", "resnet101" or "mobilenet_v2".
        num_classes: channels of the logits.
        output_stride: 8 or 16, the size of the input divided by the size of the features.
            torchvision's models have 8; 16 is cheaper and coarser.
        atrous_rates: rates of the 3x3 branches of ASPP; () for no such branch. By default
            (12, 24, 36) at output stride 8 and (6, 12, 18) at 16, with equal fields of view.
        multi_grid: factors of the dilations of a resnet's last three blocks, (1, 2, 4) in the paper
            (section 3.2.1). None keeps torchvision's dilations.
        aux_loss: add an FCN classifier on earlier features, returned as "aux".
        align_corners: convention of the final upsampling, as in F.interpolate; TensorFlow's models
            need True.
        head_conv: add torchvision's 3x3 convolution between ASPP and the last convolution; the
            paper's and TensorFlow's models have none.
        tf_padding: pad mobilenet_v2 as TensorFlow's "SAME" does, for weights trained there.
        norm_eps: epsilon of the backbone's batch norms; 1e-3 in TensorFlow's MobileNetV2.

    Attributes:
        preprocessing: the :class:`Preprocessing` that the model was trained with.
        categories: names of the classes, or None.

    Raises:
        ValueError: an argument has an unsupported value; the message names it.

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
        align_corners: bool = False,
        head_conv: bool = True,
        tf_padding: bool = False,
        norm_eps: float = 1e-5,
    ) -> None:
        if backbone not in (*_RESNETS, "mobilenet_v2"):
            raise ValueError(
                f"backbone: expected 'resnet50', 'resnet101' or 'mobilenet_v2', got {backbone!r}"
            )
        if num_classes < 1:
            raise ValueError(f"num_classes: expected at least 1, got {num_classes}")
        if output_stride not in _ATROUS_RATES:
            raise ValueError(f"output_stride: expected 8 or 16, got {output_stride}")
        if atrous_rates is not None and any(rate < 1 for rate in atrous_rates):
            raise ValueError(f"atrous_rates: expected positive ints, got {atrous_rates}")
        if multi_grid is not None:
            if backbone not in _RESNETS:
                raise ValueError(f"multi_grid: only resnets have one, not {backbone}")
            if len(multi_grid) != 3 or any(unit < 1 for unit in multi_grid):
                raise ValueError(f"multi_grid: expected 3 positive ints, got {multi_grid}")
        if not 0 < norm_eps < math.inf:
            raise ValueError(f"norm_eps: expected a positive number, got {norm_eps!r}")
        if tf_padding and backbone != "mobilenet_v2":
            raise ValueError(f"tf_padding: only mobilenet_v2 has it, not {backbone}")

        features: ResNet | MobileNetV2
        if backbone == "mobilenet_v2":
            features = MobileNetV2(output_stride, tf_padding)
        else:
            features = ResNet(backbone, output_stride, multi_grid)
        for module in features.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eps = norm_eps
        # The modules are made in torchvision's order, so that a seed gives the same weights.
        aux_classifier = _fcn_head(features.aux_channels, num_classes) if aux_loss else None
        classifier = _deeplab_head(
            features.out_channels,
            _ATROUS_RATES[output_stride] if atrous_rates is None else atrous_rates,
            num_classes,
            head_conv,
        )
        super().__init__(
            features, classifier, aux_classifier, align_corners, Preprocessing(), categories=None
        )
        self.config: dict[str, Any] = {
            "backbone": backbone,
            "num_classes": num_classes,
            "output_stride": output_stride,
            "atrous_rates": None if atrous_rates is None else list(atrous_rates),
            "multi_grid": None if multi_grid is None else list(multi_grid),
            "aux_loss": bool(aux_loss),
            "align_corners": align_corners,
            "head_conv": head_conv,
            "tf_padding": tf_padding,
            "norm_eps": norm_eps,
        }

    @classmethod
    def from_pretrained(cls, path_or_name: str | os.PathLike[str], **overrides: Any) -> DeepLabV3:
        """A model with trained weights, in float32 and evaluation mode.

        Args:
            path_or_name: one of
                - a torchvision checkpoint of deeplabv3_resnet50 or 101 (.pth or .pt), with or
                  without auxiliary classifier, alone or under the key "model";
                - a file written by :meth:`save_pretrained` (.safetensors);
                - a Hugging Face folder of a MobileNetV2ForSemanticSegmentation: config.json,
                  model.safetensors and, for the preprocessing, preprocessor_config.json. Its logits
                  are upsampled with ``align_corners=True``, as in TensorFlow, where these weights
                  were trained. ``align_corners=False`` gives the labels of transformers'
                  post_process_semantic_segmentation, and is right for weights that were fine-tuned
                  with transformers' own loss;
                - "deeplabv3_resnet50" or "deeplabv3_resnet101": torchvision's published weights
                  (COCO, the 21 classes of PASCAL VOC), downloaded and cached by torch.hub.
            overrides: constructor arguments that replace those of the checkpoint, such as
                ``output_stride=16``.

        Raises:
            FileNotFoundError: the path does not exist, or a folder lacks a file.
            ValueError: the file is damaged or has another format; the message names the path and
                what was expected.
            ConnectionError: the download failed.
            ImportError: a name was given and torchvision is not installed.

        >>> model = DeepLabV3.from_pretrained("deeplabv3_resnet50")
        """
        checkpoint = read_pretrained(path_or_name)
        try:
            with torch.device("meta"):
                model = cls(**checkpoint.config | overrides)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path_or_name}: {error}") from error
        try:
            model.load_state_dict(checkpoint.state, assign=True)
        except RuntimeError as error:
            message = textwrap.shorten(str(error), 400, placeholder=" ...")
            raise ValueError(
                f"{path_or_name}: the weights do not fit {model.config}: {message}"
            ) from error
        model.preprocessing = checkpoint.preprocessing
        model.categories = checkpoint.categories
        return model.float().eval()

    def save_pretrained(self, path: str | os.PathLike[str]) -> None:
        """Write weights, configuration, preprocessing and categories to one .safetensors file.

        The file is written completely or not at all. Categories are left out if the classifier was
        replaced by one with another number of classes.

        Raises:
            ValueError: ``path`` does not end in .safetensors.

        >>> model.save_pretrained("model.safetensors")
        """
        config = self.config | {  # attributes that may have been replaced
            "num_classes": self.classifier[-1].out_channels,
            "aux_loss": self.aux_classifier is not None,
            "align_corners": self.align_corners,
        }
        fit = self.categories is not None and len(self.categories) == config["num_classes"]
        categories = self.categories if fit else None
        write_checkpoint(
            path, Checkpoint(config, self.state_dict(), self.preprocessing, categories)
        )

    def prepare_for_inference(
        self, dtype: torch.dtype | None = None, cuda_graphs: bool = True
    ) -> InferenceModel:
        """A faster model for inference with the same weights. This model is not changed.

        Batch norms are folded into the convolutions, ASPP runs as :func:`deeplab_fast.aspp`, the
        weights are channels_last, and there is no auxiliary classifier. The model has ``forward``,
        ``predict`` and ``logits``, and takes images of any floating dtype and memory format.

        Args:
            dtype: dtype of weights and activations, such as torch.bfloat16; by default that of this
                model.
            cuda_graphs: on a GPU, capture a call of ``forward`` or ``predict`` in a CUDA graph when
                images of its shape come the third time, and replay it from then on. A replay
                launches all kernels at once. The results are the same tensors, and later calls do
                not overwrite them. The graphs of at most 8 shapes are kept. Their memory, about
                that of the largest call, is not available to other tensors. False: never do this.

        Raises:
            TypeError: ``dtype`` is no floating-point dtype, or a module was replaced by one that
                cannot be folded; the message names it.

        >>> labels = model.prepare_for_inference().predict(images)
        """
        return prepare(self, dtype, cuda_graphs)


def _deeplab_head(
    in_channels: int, atrous_rates: Sequence[int], num_classes: int, head_conv: bool
) -> nn.Sequential:
    head = nn.Sequential(ASPP(in_channels, atrous_rates))
    if head_conv:
        head.extend([nn.Conv2d(256, 256, 3, padding=1, bias=False), nn.BatchNorm2d(256), nn.ReLU()])
    return head.append(nn.Conv2d(256, num_classes, 1))


def _fcn_head(in_channels: int, num_classes: int) -> nn.Sequential:
    channels = in_channels // 4
    return nn.Sequential(
        nn.Conv2d(in_channels, channels, 3, padding=1, bias=False),
        nn.BatchNorm2d(channels),
        nn.ReLU(),
        nn.Dropout(0.1),
        nn.Conv2d(channels, num_classes, 1),
    )
