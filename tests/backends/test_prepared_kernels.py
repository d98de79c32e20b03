"""Networks prepared for inference, run on the emulated CUDA convolution."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch import Tensor, nn

import deeplab_fast
from deeplab_fast.backends import registry
from deeplab_fast.models import DeepLabV3
from deeplab_fast.models.backbones.resnet import Bottleneck
from deeplab_fast.models.deeplabv3 import _classifier
from deeplab_fast.models.fusion import fuse
from deeplab_fast.nn import ASPP

from ..support.cases import assert_as_accurate_as

NHWC = {"memory_format": torch.channels_last}


def with_statistics(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.7, 1.5)
            nn.init.normal_(module.bias, 0, 0.1)
    return model.eval()


def check(model: nn.Module, prepared: nn.Module, x: Tensor) -> None:
    """The bfloat16 error of the kernels is at most that of plain PyTorch."""
    prepared = prepared.to(torch.bfloat16, **NHWC).eval()
    x = x.bfloat16().contiguous(**NHWC)
    with torch.no_grad():
        exact = model.double()(x.double())
        with deeplab_fast.backend("reference"):
            peer = prepared(x.clone(**NHWC))
        with deeplab_fast.backend("emulated"):
            assert_as_accurate_as(prepared(x.clone(**NHWC)), peer, exact)


@pytest.mark.parametrize("in_channels", [32, 24], ids=["identity", "downsample"])
@torch.no_grad()
def test_dilated_bottleneck(ran, in_channels):
    block = with_statistics(Bottleneck(in_channels, 8, 1, 2))
    check(block, fuse(block), torch.randn(2, in_channels, 5, 6))
    on_kernel = Counter(op for op, backend in ran if backend == "emulated")
    assert on_kernel == {"fused_conv2d": 3 if in_channels == 24 else 2, "fused_conv2d_add_": 1}


def test_head(ran):
    """ASPP, the 3x3 convolution, and the last convolution with 5 output channels."""
    head = with_statistics(_classifier(ASPP(16, (2, 7)), 5, True))
    check(head, fuse(head), torch.randn(1, 16, 5, 4))
    assert [op for op, backend in ran if backend == "emulated"] == [
        "aspp", "fused_conv2d", "fused_conv2d"
    ]  # fmt: skip


def test_whole_model(monkeypatch, ran):
    """Strided and grouped convolutions and the 3-channel input use the reference backend."""
    model = with_statistics(DeepLabV3("mobilenet_v2", 5, output_stride=16))
    prepared, images = model.prepare_for_inference(torch.bfloat16), torch.randn(2, 3, 33, 33)
    monkeypatch.setitem(registry._AUTOMATIC, "cpu", ("emulated", "reference"))
    with torch.no_grad():
        actual = prepared(images)["out"]
        chosen = {pair for pair in ran if pair[0] != "upsample_argmax"}
        with deeplab_fast.backend("reference"):
            expected = model(images)["out"]
    assert chosen == {
        ("fused_conv2d", "emulated"),
        ("fused_conv2d", "reference"),
        ("fused_conv2d_add_", "emulated"),
        ("aspp", "emulated"),
    }
    assert (actual - expected).abs().max() < 0.05 * expected.abs().max()
