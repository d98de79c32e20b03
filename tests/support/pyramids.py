"""Small atrous spatial pyramids of several projects, and a comparison of modules in training."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.testing import assert_close

from . import peers

RATES = (2, 4, 6)


def torchvisions() -> nn.Module:
    deeplabv3 = pytest.importorskip("torchvision.models.segmentation.deeplabv3")
    return deeplabv3.ASPP(8, RATES, 4)


def smps(separable: bool) -> nn.Module:
    decoder = pytest.importorskip("segmentation_models_pytorch.decoders.deeplabv3.decoder")
    return decoder.ASPP(8, 4, RATES, separable=separable, dropout=0.5)


def mobilenets(tf_padding: bool) -> nn.Module:
    """Head of MobileNetV2, for 32 channels."""
    transformers = pytest.importorskip("transformers")
    config = transformers.MobileNetV2Config(
        depth_multiplier=0.1, min_depth=8, num_labels=3, tf_padding=tf_padding
    )
    module = pytest.importorskip("transformers.models.mobilenet_v2.modeling_mobilenet_v2")
    return module.MobileNetV2DeepLabV3Plus(config)


def mobilevits() -> nn.Module:
    module = pytest.importorskip("transformers.models.mobilevit.modeling_mobilevit")
    config = module.MobileViTConfig(
        neck_hidden_sizes=[8] * 7, aspp_out_channels=4, atrous_rates=list(RATES)
    )
    return module.MobileViTASPP(config)


def vainfs(separable: bool) -> nn.Module:
    return peers.VainfASPP(8, RATES, separable)


def jfzhangs() -> nn.Module:
    return peers.JfzhangASPP(8, RATES)


class MmsegHead(peers.MmsegHead):
    """The head for one map of features, of 8 channels, without a decoder."""

    def __init__(self, separable: bool) -> None:
        nn.Module.__init__(self)
        self.image_pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), peers.ConvModule(8, 4))
        self.aspp_modules = nn.ModuleList([peers.ConvModule(8, 4)])
        for rate in RATES:
            atrous: Any = peers.SeparableConvModule if separable else peers.ConvModule
            options = {"dilation": rate} | ({} if separable else {"kernel": 3})
            self.aspp_modules.append(atrous(8, 4, **options))
        self.bottleneck = peers.ConvModule(20, 4, 3)
        self.conv_seg = nn.Conv2d(4, 3, 1)

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward({"out": x})


# Each module and the parts that are expected in the report.
DENSE = "4 branches as one convolution, pooled branch as a bias"
POOL = "pooled branch as a bias"
PYRAMIDS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "torchvision": (torchvisions, DENSE),
    "smp": (lambda: smps(False), DENSE),
    "smp separable": (lambda: smps(True), POOL),
    "transformers MobileNetV2": (lambda: mobilenets(True), POOL),
    "transformers MobileNetV2 without TensorFlow's padding": (lambda: mobilenets(False), POOL),
    "transformers MobileViT": (mobilevits, DENSE),
    "VainF": (lambda: vainfs(False), DENSE),
    "VainF separable": (lambda: vainfs(True), POOL),
    "jfzhang95": (jfzhangs, DENSE),
    "mmsegmentation": (lambda: MmsegHead(False), DENSE),
    "mmsegmentation separable": (lambda: MmsegHead(True), POOL),
}


def channels_of(module: nn.Module) -> int:
    return next(m for m in module.modules() if isinstance(m, nn.Conv2d)).in_channels


def trained(module: nn.Module) -> nn.Module:
    """The module in float64 with random running statistics and parameters of batch norms."""
    for norm in module.modules():
        if isinstance(norm, _BatchNorm):
            norm.running_mean.normal_(0, 0.1)
            norm.running_var.uniform_(0.7, 1.5)
            nn.init.uniform_(norm.weight, 0.5, 1.2)
            nn.init.normal_(norm.bias, 0, 0.1)
    return module.double()


def run(module: nn.Module, input: Tensor) -> tuple[Tensor, dict[str, Tensor | None]]:
    """The output, and the gradients of input and parameters, with a fixed dropout seed."""
    module.zero_grad()
    input = input.detach().clone().requires_grad_()
    torch.manual_seed(2)
    output = module(input)
    output.square().sum().backward()
    return output.detach(), {"input": input.grad} | {
        name: None if parameter.grad is None else parameter.grad.clone()
        for name, parameter in module.named_parameters()
    }


def assert_same_training(actual: nn.Module, expected: nn.Module, input: Tensor) -> None:
    """Compare a step: output, gradients, running statistics."""
    assert_close(run(actual, input), run(expected, input), rtol=1e-9, atol=1e-10)
    assert_close(dict(actual.named_buffers()), dict(expected.named_buffers()))
