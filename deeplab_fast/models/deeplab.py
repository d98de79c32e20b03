"""What DeepLab-v3 and DeepLab-v3+ share: loading, saving and preparing for inference."""

from __future__ import annotations

import os
import textwrap
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from ..nn import ASPP
from .backbones import make_backbone
from .checkpoints import Checkpoint, read_pretrained, write_checkpoint
from .inference import InferenceModel, prepare
from .preprocessing import Preprocessing
from .segmentation import SegmentationModel

_ATROUS_RATES = {8: (12, 24, 36), 16: (6, 12, 18)}
_BACKBONE_OPTIONS = (
    "output_stride", "in_channels", "multi_grid", "dilate_first_block", "tf_padding", "norm_eps"
)  # fmt: skip
_POSITIVE = ("num_classes", "in_channels", "aspp_channels", "low_level_channels", "decoder_convs")
_ASPP_OPTIONS = ("separable", "depthwise_norm", "project_size", "dropout")


class DeepLab(SegmentationModel):
    """Base of :class:`DeepLabV3` and :class:`DeepLabV3Plus`.

    Attributes:
        config: the arguments of the constructor, in JSON types.
    """

    def __init__(
        self,
        config: Mapping[str, Any],
        backbone: nn.Module,
        classifier: nn.Module,
        aux_classifier: nn.Module | None,
    ) -> None:
        super().__init__(
            backbone, classifier, aux_classifier, config["align_corners"], Preprocessing(), None
        )
        self.in_channels = config["in_channels"]
        self.config: dict[str, Any] = {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in config.items()
        }

    @property
    def architecture(self) -> str:
        """ "DeepLabV3" or "DeepLabV3Plus", in classes derived from them too."""
        return next(kind.__name__ for kind in type(self).__mro__ if DeepLab in kind.__bases__)

    @classmethod
    def from_pretrained(cls, path_or_name: str | os.PathLike[str], **overrides: Any) -> DeepLab:
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
        cls = cls._class_of(checkpoint, path_or_name)
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

    @classmethod
    def _class_of(cls, checkpoint: Checkpoint, source: Any) -> type[DeepLab]:
        """The class to load a checkpoint with: ``cls`` unless that is the base of both."""
        classes = {kind.__name__: kind for kind in DeepLab.__subclasses__()}
        found = classes.get(checkpoint.architecture)
        if found is None:
            raise ValueError(
                f"{source}: expected a model of {' or '.join(classes)}, got one of "
                f"{checkpoint.architecture!r}"
            )
        if issubclass(cls, found):
            return cls
        if not issubclass(found, cls):
            raise ValueError(
                f"{source}: expected a {cls.__name__}, got a {found.__name__}: load it with "
                f"{found.__name__}.from_pretrained"
            )
        return found

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
            path,
            Checkpoint(
                self.architecture, config, self.state_dict(), self.preprocessing, categories
            ),
        )

    def prepare_for_inference(
        self, dtype: torch.dtype | None = None, cuda_graphs: bool = True
    ) -> InferenceModel:
        """A faster model for inference with the same weights. This model is not changed.

        Batch norms are folded into the convolutions, ASPP runs as :func:`deeplab_fast.aspp`, the
        weights are channels_last, and there is no auxiliary classifier. Modules that were replaced
        by ones that cannot be fused run as they are. The model has ``forward``,
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
            TypeError: ``dtype`` is no floating-point dtype.

        >>> labels = model.prepare_for_inference().predict(images)
        """
        return prepare(self, dtype, cuda_graphs)


def checked(config: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a constructor, from its ``locals()``.

    Raises:
        ValueError: a number is out of range; the message names it.
    """
    config = {name: config[name] for name in config if name not in ("self", "__class__")}
    for name in _POSITIVE:
        if not isinstance(config.get(name, 1), int) or config.get(name, 1) < 1:
            raise ValueError(f"{name}: expected a positive int, got {config[name]!r}")
    if config["output_stride"] not in _ATROUS_RATES:
        raise ValueError(f"output_stride: expected 8 or 16, got {config['output_stride']}")
    if not 0 <= config["dropout"] <= 1:
        raise ValueError(f"dropout: expected 0 to 1, got {config['dropout']}")
    rates = config["atrous_rates"]
    if rates is not None and any(rate < 1 for rate in rates):
        raise ValueError(f"atrous_rates: expected positive ints, got {rates}")
    for name in ("atrous_rates", "multi_grid"):
        config[name] = None if config[name] is None else tuple(config[name])
    config["aux_loss"] = bool(config["aux_loss"])
    return config


def backbone_of(config: Mapping[str, Any]) -> Any:
    """The backbone that the arguments of a constructor describe."""
    return make_backbone(config["backbone"], **{name: config[name] for name in _BACKBONE_OPTIONS})


def aspp_of(config: Mapping[str, Any], in_channels: int) -> ASPP:
    """The ASPP module that the arguments of a constructor describe."""
    rates = config["atrous_rates"]
    rates = _ATROUS_RATES[config["output_stride"]] if rates is None else rates
    options = {name: config[name] for name in _ASPP_OPTIONS}
    return ASPP(in_channels, rates, config["aspp_channels"], **options)


def aux_head_of(config: Mapping[str, Any], in_channels: int) -> nn.Sequential | None:
    """torchvision's auxiliary classifier, an FCN, or None without ``aux_loss``."""
    if not config["aux_loss"]:
        return None
    channels = in_channels // 4
    return nn.Sequential(
        nn.Conv2d(in_channels, channels, 3, padding=1, bias=False),
        nn.BatchNorm2d(channels),
        nn.ReLU(),
        nn.Dropout(0.1),
        nn.Conv2d(channels, config["num_classes"], 1),
    )
