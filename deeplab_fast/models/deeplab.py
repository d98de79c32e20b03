"""Base of DeepLab-v3 and DeepLab-v3+: loading, saving and preparing for inference."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..nn import ASPP
from ..ops._arguments import boolean, int_list, integer, real, wrong_type
from . import hub
from .backbones import adapt_input_channels, load_imagenet, make_backbone
from .checkpoints import (
    Checkpoint,
    read_pretrained,
    state_for,
    write_checkpoint,
    write_folder,
)
from .inference import InferenceModel, prepare
from .preprocessing import Preprocessing
from .segmentation import SegmentationModel

if TYPE_CHECKING:
    from typing_extensions import Self  # in typing from Python 3.11

_ATROUS_RATES = {8: (12, 24, 36), 16: (6, 12, 18)}
_BACKBONE_OPTIONS = (
    "output_stride", "in_channels", "multi_grid", "backbone_variant", "norm_eps",
)  # fmt: skip
_POSITIVE = ("num_classes", "in_channels", "aspp_channels", "low_level_channels", "decoder_convs")
_BOOLEANS = (
    "separable", "align_corners", "head_conv", "depthwise_norm", "separable_decoder", "aspp_conv",
)  # fmt: skip
_CONVERSIONS: dict[str, Callable[[Any, str], Any]] = {
    **dict.fromkeys((*_POSITIVE, "output_stride", "project_size"), integer),
    **dict.fromkeys(("atrous_rates", "multi_grid"), int_list),
    **dict.fromkeys(("dropout", "norm_eps"), real),
    **dict.fromkeys(_BOOLEANS, boolean),
}
_MAY_BE_NONE = ("atrous_rates", "multi_grid", "norm_eps")
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
        pretrained_backbone: bool,
    ) -> None:
        in_channels = config["in_channels"]
        preprocessing = Preprocessing().for_channels(in_channels)
        super().__init__(
            backbone, classifier, aux_classifier, config["align_corners"], preprocessing, None
        )
        self.in_channels = in_channels
        self.config: dict[str, Any] = dict(config)
        if pretrained_backbone:
            load_imagenet(self)

    @property
    def num_labels(self) -> int:
        """Number of labels that :meth:`predict` can give: 2 for a model with one output channel."""
        return max(2, self.config["num_classes"])

    @property
    def architecture(self) -> str:
        """ "DeepLabV3" or "DeepLabV3Plus", in classes derived from them too."""
        return next(kind.__name__ for kind in type(self).__mro__ if DeepLab in kind.__bases__)

    @classmethod
    def from_pretrained(
        cls,
        path_or_name: str | os.PathLike[str],
        *,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        local_files_only: bool = False,
        **overrides: Any,
    ) -> Self:
        """A model with trained weights, in float32 and evaluation mode.

        Args:
            path_or_name: one of the following. Paths that exist come first.
                - a file or folder written by :meth:`save_pretrained`;
                - a file with the state dict of a DeepLab of torchvision,
                  segmentation_models_pytorch, VainF/DeepLabV3Plus-Pytorch,
                  jfzhang95/pytorch-deeplab-xception or mmsegmentation (.pth, .pt, .tar, .bin, .ckpt
                  or .safetensors), alone or inside the checkpoint of a training script. Keys and
                  shapes determine the network, except for output stride, atrous rates and the
                  convention of the upsampling, which are the defaults of the project (listed in the
                  guide "Swap it in");
                - a folder of segmentation_models_pytorch's save_pretrained;
                - a Hugging Face folder of a MobileNetV2ForSemanticSegmentation: config.json,
                  model.safetensors and, for the preprocessing, preprocessor_config.json. Its logits
                  are upsampled with ``align_corners=True``, as in TensorFlow, where these weights
                  were trained. ``align_corners=False`` gives the labels of transformers'
                  post_process_semantic_segmentation, and is right for weights that were fine-tuned
                  with transformers' own loss;
                - "deeplabv3_resnet50", "deeplabv3_resnet101" or "deeplabv3_mobilenet_v3_large":
                  torchvision's published weights (COCO, the 21 classes of PASCAL VOC), downloaded
                  and cached by torch.hub;
                - "owner/name": a repository of the Hugging Face Hub that holds the files of one of
                  the folders above, downloaded and cached by huggingface_hub. Only these files are
                  downloaded.
            revision, token, cache_dir, local_files_only: branch, tag or commit of a repository,
                access token, folder of the cache, and whether to use only the cache; as in
                huggingface_hub.
            overrides: constructor arguments that replace those of the checkpoint, such as
                ``output_stride=16``. With other ``in_channels`` the weights for RGB images are
                adapted as timm does: added up for one channel, else repeated and scaled.

        Raises:
            FileNotFoundError: the path or repository does not exist, or lacks a file.
            ValueError: the file is damaged or has another format; the message names the path and
                what was expected.
            ConnectionError: the download failed.
            PermissionError: the repository is gated.
            ImportError: the name of torchvision's weights or of a repository was given, and
                torchvision or huggingface_hub is not installed.

        >>> model = DeepLabV3.from_pretrained("deeplabv3_resnet50")
        """
        path = path_or_name
        if hub.is_repo_id(path_or_name):
            path = hub.download(
                str(path_or_name),
                revision=revision,
                token=token,
                cache_dir=cache_dir,
                local_files_only=local_files_only,
            )
        checkpoint = read_pretrained(path)
        cls = cls._class_of(checkpoint, path_or_name)
        try:
            with torch.device("meta"):
                model = cls(**checkpoint.config | overrides)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path_or_name}: {error}") from error
        try:
            expected = model.state_dict()
            state = adapt_input_channels(checkpoint.state, expected)
            state = state_for(checkpoint._replace(state=state), expected)
            model.load_state_dict(state, assign=True)
        except ValueError as error:
            raise ValueError(f"{path_or_name}: {error}") from error
        model.preprocessing = checkpoint.preprocessing.for_channels(model.in_channels)
        model.categories = checkpoint.categories
        return model.float().eval()

    @classmethod
    def _class_of(cls, checkpoint: Checkpoint, source: Any) -> type[Self]:
        """The class to load a checkpoint with: ``cls`` unless that is the base of both."""
        classes: dict[str, type[Any]] = {kind.__name__: kind for kind in DeepLab.__subclasses__()}
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

    def save_pretrained(self, path: str | os.PathLike[str], *, license: str | None = None) -> None:
        """Write weights, configuration, preprocessing and categories, for :meth:`from_pretrained`.

        A path that ends in .safetensors is a single file. Any other is a folder, in the format of
        the Hugging Face Hub:

        - config.json: the class, the arguments of the constructor, preprocessing and categories;
        - model.safetensors: the same as the single file, so that it also works alone;
        - README.md, the model card, which is kept if there is one already.

        Each file is written completely or not at all. Categories are left out if the classifier was
        replaced by one with another number of classes.

        Args:
            path: file or folder, which is created.
            license: identifier of the license for the model card, such as "apache-2.0".

        Raises:
            ValueError: ``path`` ends in a suffix of torch.save, such as .pth, or a single file was
                given a license.
            FileExistsError: the folder holds a config.json of another kind of model, which is not
                overwritten, or ``path`` is another file.

        >>> model.save_pretrained("model.safetensors")
        >>> model.save_pretrained("model")
        """
        path = Path(path)
        if path.suffix in hub.PICKLE_SUFFIXES:
            raise ValueError(
                f"{path}: expected a folder or a name that ends in .safetensors, got "
                f"{path.suffix}, a suffix of torch.save"
            )
        if path.suffix != ".safetensors":
            checkpoint = self._checkpoint()
            write_folder(path, checkpoint, hub.model_card(checkpoint, path.name, license))
        elif license is not None:
            raise ValueError(f"license: {path} has no model card: save to a folder")
        else:
            write_checkpoint(path, self._checkpoint())

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        token: str | bool | None = None,
        commit_message: str = "Upload a model of deeplab-fast",
        branch: str | None = None,
        create_pr: bool | None = None,
        license: str | None = None,
    ) -> str:
        """Upload the files of :meth:`save_pretrained` to a repository of the Hugging Face Hub.

        The repository is created if need be. A README.md that it has already is kept. This needs
        huggingface_hub, ``pip install "deeplab-fast[hub]"``, whose PyTorchModelHubMixin has the
        same arguments.

        Args:
            repo_id: "owner/name", or "name" for a repository of your own.
            private: whether a new repository is private; by default as the Hub decides.
            token: access token; by default that of ``hf auth login``.
            commit_message: first line of the commit message.
            branch: an existing branch; by default "main".
            create_pr: open a pull request instead of a commit to the branch.
            license: as for :meth:`save_pretrained`.

        Returns:
            The URL of the commit or pull request.

        Raises:
            PermissionError: you are not logged in, or may not write to the repository.
            FileNotFoundError: there is no such branch.
            ConnectionError: the Hub cannot be reached.
            ImportError: huggingface_hub is not installed.

        >>> model.push_to_hub("owner/name")
        """
        return hub.push(
            self._checkpoint(),
            repo_id,
            private=private,
            token=token,
            commit_message=commit_message,
            branch=branch,
            create_pr=create_pr,
            license=license,
        )

    def _checkpoint(self) -> Checkpoint:
        config = self.config | {  # attributes that may have been replaced
            "num_classes": self.classifier[-1].out_channels,
            "aux_loss": self.aux_classifier is not None,
            "align_corners": self.align_corners,
        }
        fit = self.categories is not None and len(self.categories) == config["num_classes"]
        categories = self.categories if fit else None
        return Checkpoint(
            self.architecture, config, self.state_dict(), self.preprocessing, categories
        )

    def prepare_for_inference(
        self, dtype: torch.dtype | None = None, cuda_graphs: bool = True
    ) -> InferenceModel:
        """A faster model for inference with the same weights. This model is not changed.

        Batch norms are folded into the convolutions, ASPP runs as :func:`deeplab_fast.aspp`, the
        weights are channels_last, and there is no auxiliary classifier. Modules that were replaced
        by ones that cannot be fused run as they are. The model has ``forward``, ``predict`` and
        ``logits``, and takes images of any floating dtype and memory format.

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
    """The arguments of a constructor, from its ``locals()``, in JSON types.

    Raises:
        TypeError, ValueError: an argument has a wrong type or value; the message names it.
    """
    no_config = "self", "__class__", "pretrained_backbone"
    config = {name: config[name] for name in config if name not in no_config}
    config["aux_loss"] = bool(config["aux_loss"])
    if not isinstance(config["backbone"], str):
        raise wrong_type("backbone", 'a name such as "resnet50"', config["backbone"])
    for name, convert in _CONVERSIONS.items():
        if name in config and not (config[name] is None and name in _MAY_BE_NONE):
            config[name] = convert(config[name], name)
    for name in _POSITIVE:
        if config.get(name, 1) < 1:
            raise ValueError(f"{name}: expected a positive int, got {config[name]}")
    if config["output_stride"] not in _ATROUS_RATES:
        raise ValueError(f"output_stride: expected 8 or 16, got {config['output_stride']}")
    if not 0 <= config["dropout"] <= 1:
        raise ValueError(f"dropout: expected 0 to 1, got {config['dropout']}")
    if any(rate < 1 for rate in config["atrous_rates"] or ()):
        raise ValueError(f"atrous_rates: expected positive ints, got {config['atrous_rates']}")
    return config


def backbone_of(config: Mapping[str, Any]) -> Any:
    """The backbone that the arguments of a constructor describe."""
    return make_backbone(config["backbone"], **{name: config[name] for name in _BACKBONE_OPTIONS})


def aspp_of(config: Mapping[str, Any], in_channels: int) -> ASPP:
    """The ASPP module that the arguments of a constructor describe."""
    options = {name: config[name] for name in _ASPP_OPTIONS}
    return ASPP(in_channels, atrous_rates_of(config), config["aspp_channels"], **options)


def atrous_rates_of(config: Mapping[str, Any]) -> Sequence[int]:
    """The rates of a configuration, by default those of its output stride."""
    rates = config["atrous_rates"]
    return _ATROUS_RATES[config["output_stride"]] if rates is None else rates


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
