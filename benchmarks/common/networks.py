"""Segmentation networks of other projects, with random weights: nothing is downloaded."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CLASSES = 21
ENCODERS = ("mobilenet_v2", "resnet18", "efficientnet-b0")


def _torchvision(name: str) -> nn.Module:
    from torchvision.models import segmentation

    return getattr(segmentation, name)(weights=None, weights_backbone=None, num_classes=CLASSES)


def _smp(name: str, encoder: str) -> nn.Module:
    import segmentation_models_pytorch as smp

    return getattr(smp, name)(encoder, encoder_weights=None, classes=CLASSES)


def _transformers() -> nn.Module:
    from transformers import MobileNetV2Config, MobileNetV2ForSemanticSegmentation

    return MobileNetV2ForSemanticSegmentation(
        MobileNetV2Config(num_labels=CLASSES, output_stride=16, finegrained_output=True)
    )


BUILD: dict[str, Callable[[], nn.Module]] = {
    **{
        f"torchvision {name}": functools.partial(_torchvision, name)
        for name in (
            "deeplabv3_resnet50",
            "deeplabv3_mobilenet_v3_large",
            "fcn_resnet50",
            "lraspp_mobilenet_v3_large",
        )
    },
    **{
        f"smp {name} {encoder}": functools.partial(_smp, name, encoder)
        for encoder in ENCODERS
        for name in ("DeepLabV3", "DeepLabV3Plus", "Unet", "FPN", "PAN", "PSPNet")
    },
    "transformers MobileNetV2": _transformers,
}
DEFAULT = [name for name in BUILD if name.split()[-1] not in ENCODERS[1:]]
TINY = ["torchvision lraspp_mobilenet_v3_large"]


def is_deeplab(name: str) -> bool:
    return "deeplab" in name.lower() or name == "transformers MobileNetV2"


@torch.no_grad()
def network(name: str) -> nn.Module:
    """A model with random weights and, as after training, batch norm statistics of data.

    Dropout is off, because its random numbers depend on the memory format.
    """
    torch.manual_seed(0)
    model = BUILD[name]()
    momenta = {m: m.momentum for m in model.modules() if isinstance(m, nn.BatchNorm2d)}
    for module in momenta:
        module.momentum = 1.0
    model.train()(torch.randn(2, 3, 128, 128))  # a PAN takes no smaller images
    for module, momentum in momenta.items():
        module.momentum = momentum
    for module in model.modules():
        if isinstance(module, (nn.Dropout, nn.Dropout2d)):
            module.p = 0.0
    return model.eval()


def logits_of(output: Any) -> Tensor:
    """The logits in the output of a model of any of the projects."""
    if isinstance(output, Tensor):
        return output
    return output["out"] if "out" in output else output["logits"]


def resized(logits: Tensor, size: Any) -> Tensor:
    """The logits at the size of the images, as users of transformers resize them."""
    if logits.shape[2:] == tuple(size):
        return logits
    return F.interpolate(logits, tuple(size), mode="bilinear", align_corners=False)


def flops(model: nn.Module, images: Tensor) -> int:
    """Operations of the convolutions of one call, without those on padding.

    A multiply-add counts as two.
    """
    total = 0

    def count(conv: nn.Conv2d, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        nonlocal total
        taps = [
            _taps(*sizes)
            for sizes in zip(
                inputs[0].shape[2:], output.shape[2:], conv.kernel_size, conv.stride,
                conv.padding, conv.dilation,
            )
        ]  # fmt: skip
        channels = conv.out_channels * conv.in_channels // conv.groups
        total += 2 * len(output) * channels * taps[0] * taps[1]

    hooks = [
        module.register_forward_hook(count)
        for module in model.modules()
        if isinstance(module, nn.Conv2d)
    ]
    with torch.no_grad():
        model(images)
    for hook in hooks:
        hook.remove()
    return total


def _taps(input: int, output: int, kernel: int, stride: int, padding: int, dilation: int) -> int:
    """Taps inside the image, over all outputs of a 1-D convolution."""
    first = [stride * pixel - padding for pixel in range(output)]
    return sum(0 <= f + dilation * k < input for f in first for k in range(kernel))
