"""Backbones of timm (pip install timm), a library of image classifiers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ...nn.conv import run_dilated
from .interface import Backbone

PREFIX = "timm/"
# Side of the image on which the sizes of features are checked: a multiple of both output strides.
_SIZE = 64


class TimmBackbone(Backbone):
    """Features of a model of timm, such as "convnext_tiny" or "efficientnet_b0".

    "low" is the last feature map of stride 4, "aux" the one before the last, "out" the last.
    Most families round sizes up; ConvNeXt rounds them down, because its convolutions do not pad.

    Args:
        name: name in timm, with or without the tag of its weights.
        output_stride: 8 or 16, the size of the input divided by the size of the features.
        in_channels: channels of the images.

    Raises:
        ValueError: timm does not know the name, or has no dilated version of the model.
        ImportError: timm is not installed.
    """

    def __init__(self, name: str, output_stride: int, in_channels: int = 3) -> None:
        super().__init__()
        if torch.empty(0).is_meta:
            # Some models have buffers outside of the state dict, which would stay on "meta".
            with torch.device("cpu"):
                model = create_timm(name, output_stride=output_stride, in_chans=in_channels)
        else:
            model = create_timm(name, output_stride=output_stride, in_chans=in_channels)
        shapes = _shapes(model, name, in_channels)
        strides = [_SIZE // shape[-1] for shape in shapes]
        if strides != model.feature_info.reduction() or strides[-1] != output_stride:
            raise ValueError(
                f"backbone: timm's {name} has features of stride {strides[-1]}, expected "
                f"{output_stride}: it cannot be dilated"
            )
        if 4 not in strides or len(strides) < 2:
            raise ValueError(
                f"backbone: expected features of stride 4, timm's {name} has {strides}"
            )
        for module in model.modules():
            is_dilated = type(module) is nn.Conv2d and max(module.dilation) > 1
            if is_dilated and all(size % 2 for size in module.kernel_size):
                run_dilated(module)
        self.model = model
        self.low_index = max(i for i, stride in enumerate(strides) if stride == 4)
        self.low_channels = shapes[self.low_index][1]
        self.aux_channels, self.out_channels = shapes[-2][1], shapes[-1][1]

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        features = self.model(images)
        return {"low": features[self.low_index], "aux": features[-2], "out": features[-1]}


def create_timm(name: str, **options: Any) -> Any:
    """timm's model of some features.

    Raises:
        ValueError, ImportError: see :class:`TimmBackbone`.
    """
    timm = import_timm(name)
    if not timm.is_model(name):
        raise ValueError(
            f"backbone: timm {timm.__version__} has no model {name!r}; timm.list_models() names "
            "those it has"
        )
    try:
        return timm.create_model(name, features_only=True, **options)
    except Exception as error:  # models without dilation fail in many ways
        if options.get("pretrained"):
            raise
        stride = options["output_stride"]
        raise ValueError(
            f"backbone: timm's {name} cannot be made with output stride {stride}: "
            f"{type(error).__name__}: {error}"
        ) from error


def import_timm(name: str) -> Any:
    try:
        import timm
    except ImportError as error:
        raise ImportError(f"{PREFIX}{name}: needs timm: pip install timm") from error
    return timm


def _shapes(model: nn.Module, name: str, in_channels: int) -> list[torch.Size]:
    """Shapes of the features of an image, computed without arithmetic."""
    state = dict(model.named_parameters()) | dict(model.named_buffers())
    state = {key: tensor.to("meta") for key, tensor in state.items()}
    images = torch.empty(1, in_channels, _SIZE, _SIZE, device="meta")
    was_training = model.training
    try:
        features = torch.func.functional_call(model.eval(), state, images)
    except Exception as error:
        raise ValueError(
            f"backbone: timm's {name} cannot segment an image of {_SIZE} x {_SIZE} pixels: "
            f"{type(error).__name__}: {error}"
        ) from error
    model.train(was_training)
    return [feature.shape for feature in features]
