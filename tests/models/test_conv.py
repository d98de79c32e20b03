"""Conv2d and SeparableConv2d: values, gradients, tracing, and the kernels of depthwise layers."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses import FakeTensorMode
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from deeplab_fast import DeepLabV3Plus
from deeplab_fast.backends import explain, registry
from deeplab_fast.nn import Conv2d, SeparableConv2d

from ..support.pretend_gpu import PretendGPU

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("dilation", [1, 3])
def test_separable_convolution(dilation):
    """A depthwise atrous convolution, optional batch norm and ReLU, and a 1x1 convolution."""
    conv = SeparableConv2d(6, 4, dilation).double()
    normed = SeparableConv2d(6, 4, dilation, depthwise_norm=True).double()
    x = torch.randn(2, 6, 7, 5, dtype=torch.float64)
    assert [tuple(weight.shape) for weight in conv.parameters()] == [(6, 1, 3, 3), (4, 6, 1, 1)]
    for module in (conv, normed):
        middle = F.conv2d(x, module[0].weight, None, 1, dilation, dilation, groups=6)
        if module is normed:
            middle = F.batch_norm(middle, None, None, training=True).relu()
        assert_close(module(x), F.conv2d(middle, module[-1].weight))


def test_tracing_and_second_derivatives_on_a_cpu():
    """torch.fx traces the layers, and without half precision PyTorch's own convolution runs."""
    conv = SeparableConv2d(3, 2, dilation=2).double()
    x = torch.randn(1, 3, 4, 3, dtype=torch.float64, requires_grad=True)
    traced = torch.fx.symbolic_trace(conv)
    assert_close(traced(x), conv(x))
    assert torch.autograd.gradgradcheck(conv, (x,))


def convolutions_on(device: str, **options) -> list[str]:
    """The convolutions that a layer calls on a device that need not be present."""

    class Names(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            names.append(function._schema.name)
            return function(*args, **(kwargs or {}))

    names: list[str] = []
    with FakeTensorMode(), torch.device(device), Names():
        output = Conv2d(8, 16, 3, **options)(torch.randn(2, 8, 9, 9))
    assert output.shape == (2, 16, 9, 9)
    return [name for name in names if "conv" in name]


@pytest.mark.parametrize(
    "options, ours",
    [
        ({"groups": 8, "padding": 2, "dilation": 2}, True),
        ({"groups": 8, "padding": (2, 3), "dilation": (2, 3)}, True),
        ({"groups": 8, "padding": 1}, False),  # not dilated
        ({"groups": 4, "padding": 2, "dilation": 2}, False),  # not depthwise
        ({"padding": 2, "dilation": 2}, True),
        ({"groups": 8, "padding": 2, "dilation": 2, "padding_mode": "reflect"}, False),
    ],
    ids=str,
)
def test_dilated_layers_of_a_gpu_run_our_op(options, ours):
    expected = ["deeplab_fast::dilated_conv2d"] if ours else ["aten::convolution"]
    assert convolutions_on("cuda:0", **options) == expected
    assert convolutions_on("cpu", **options) == ["aten::convolution"]


def test_measured_kernels_run_the_depthwise_layers(monkeypatch, tmp_path):
    """tune measures these layers, explain names them, and the fastest kernel runs them."""
    gpu = PretendGPU(monkeypatch, tmp_path)
    times = {"cuda/sm90": 0.4, "triton": 0.5, "cuDNN": 1.0, "cuDNN, benchmark": 0.8}
    gpu.times = lambda name, output: times[name]
    monkeypatch.setattr(
        Conv2d, "_has_gpu_kernels", lambda conv, input: 1 < conv.groups == conv.in_channels
    )
    torch.manual_seed(0)
    model = DeepLabV3Plus(
        "mobilenet_v2", 3, atrous_rates=(2,), separable=True, aspp_channels=8, low_level_channels=4
    ).eval()
    images = torch.randn(1, 3, 33, 33)
    before = model.predict(images)
    layers = {f"backbone.features.{i}.conv.1.0" for i in (15, 16, 17)} | {
        "classifier.0.aspp.convs.1.0.0"
    }
    assert {line.layer for line in explain(model, images) if line.op == "dilated_conv2d"} == layers
    tuned = model.tune(images)
    assert "dilated_conv2d" in {row.op for row in gpu.rows()} and not tuned.failures
    with registry.trace() as ran:
        assert torch.equal(model.predict(images), before)
    assert ran.count(("dilated_conv2d", "cuda/sm90")) == len(layers)
