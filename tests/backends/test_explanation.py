"""Which kernel each layer uses, and the evidence for it."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn

import deeplab_fast
from deeplab_fast import ASPP, DeepLabV3, dilated_conv2d, upsample_argmax
from deeplab_fast.backends import dispatch_table, explain, race, registry

LAST = {"memory_format": torch.channels_last}


class Convolution(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(channels, channels, 3, 3).to(**LAST))

    def forward(self, x):
        return dilated_conv2d(x, self.weight, dilation=2)


class Network(nn.Module):
    def __init__(self, channels: int = 8) -> None:
        super().__init__()
        self.first = Convolution(channels)
        self.rest = nn.Sequential(nn.ReLU(), Convolution(channels))
        self.dropout = nn.Dropout()
        self.dropout.eval()

    def forward(self, x):
        assert not self.training and not torch.is_grad_enabled()
        return upsample_argmax(self.rest(self.first(x)), scale_factor=2)


def images(channels: int = 8, dtype=torch.float32):
    return torch.randn(1, channels, 6, 5).to(dtype, **LAST)


def test_layers_of_a_network():
    model = Network()
    explanation = explain(model, images())
    assert [line[:4] for line in explanation] == [
        ("first", "dilated_conv2d", "1x8x6x5, 8x8x3x3, float32", "cpu"),
        ("rest.1", "dilated_conv2d", "1x8x6x5, 8x8x3x3, float32", "cpu"),
        ("", "upsample_argmax", "1x8x6x5, float32", "cpu"),
    ]
    assert {line.evidence for line in explanation} == {"fixed order: cpu, reference"}
    assert str(explanation).splitlines() == [
        "layer    op               shapes                     backend  evidence",
        "first    dilated_conv2d   1x8x6x5, 8x8x3x3, float32  cpu      fixed order: cpu, reference",
        "rest.1   dilated_conv2d   1x8x6x5, 8x8x3x3, float32  cpu      fixed order: cpu, reference",
        "(model)  upsample_argmax  1x8x6x5, float32           cpu      fixed order: cpu, reference",
    ]
    assert model.training and model.rest.training and not model.dropout.training
    assert str(explain(nn.ReLU(), images())) == "the model calls no op of deeplab_fast"


def test_modules_run_as_they_do_without_explanation():
    """ASPP runs branch by branch if its modules are hooked."""
    (line,) = explain(nn.Sequential(ASPP(8, (2,), 8)), images())
    assert line[:2] == ("0", "parallel_dilated_conv2d_and_mean")


def test_model_that_raises_an_error():
    model = Network().train()
    with pytest.raises(ValueError, match="3 channels"):
        explain(model, images(channels=3))
    assert model.training
    assert len(explain(model, images())) == 3


@pytest.mark.parametrize(
    "model, x, message",
    [
        (Network().forward, images(), "model: expected an nn.Module, got method"),
        ("photo.jpg", images(), "model: expected an nn.Module, got str"),
        (Network(), "photo.jpg", "images: expected a tensor, got str"),
    ],
)
def test_wrong_types(model, x, message):
    with pytest.raises(TypeError, match=f"^{message}$"):
        explain(model, x)


def test_prepared_and_compiled_models():
    model = DeepLabV3("mobilenet_v2", 3, 8, (2, 4)).eval().prepare_for_inference()
    explanation = explain(model, torch.randn(1, 3, 33, 33))
    names = dict(model.named_modules())
    assert all(line.layer in names for line in explanation)
    assert [line.op for line in explanation][-4:] == [
        "aspp", "fused_conv2d", "fused_conv2d", "upsample_argmax"
    ]  # fmt: skip
    network, x = Network().eval(), images()
    compiled = torch.compile(network, backend="eager")
    network.first.compile(backend="eager")
    with torch.no_grad():
        network.first(x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert explain(compiled, x) == explain(network, x) == explain(Network(), x)


def test_skipped_and_forced_backends():
    x = images().double()
    (first, *_) = explain(Network().double(), x)
    with deeplab_fast.backend("reference"):
        (forced, *_) = explain(Network(), images())
    assert (first.backend, forced.backend, forced.evidence) == ("cpu", "reference", "forced")
    with deeplab_fast.backend("cuda"):
        (forced, *_) = explain(Network(), images())
    assert forced.backend == "cuda"
    assert forced.evidence.startswith("forced, but it cannot run: ")


def test_kernels_that_the_reference_replaces(monkeypatch):
    kernel = registry._kernels["dilated_conv2d"]["cpu"]
    unsupported = kernel._replace(unsupported_reason=lambda arguments: "odd channels")
    monkeypatch.setitem(registry._kernels["dilated_conv2d"], "cpu", unsupported)
    monkeypatch.delitem(registry._kernels["upsample_argmax"], "cpu")
    first, _, last = explain(Network(), images())
    evidence = "fixed order: cpu, reference; not supported by cpu: odd channels"
    assert first[3:] == ("reference", evidence)
    assert last[3] == "reference" and last[4].startswith("the only kernel of this op")


def half_images(channels: int = 8):
    return images(channels, torch.bfloat16)


def first_line(model=None, x=None):
    explanation = explain(model or Network().bfloat16(), half_images() if x is None else x)
    return tuple(explanation[0][3:])


def row(**values) -> dispatch_table.Row:
    arguments = half_images(), torch.empty(8, 8, 3, 3), None, (2, 2), 1
    bucket = registry.shape_buckets["dilated_conv2d"](
        registry.arguments("dilated_conv2d", *arguments)
    )
    return dispatch_table.Row(
        "an emulator", "dilated_conv2d", bucket, "emulated", 0.0414, 0.063, "a shape", "GPU",
        dispatch_table.versions(), "-", "-",
    )._replace(**values)  # fmt: skip


def test_evidence_of_measurements(pretend_gpu, monkeypatch):
    assert first_line() == ("reference", "not measured, so cuDNN")
    dispatch_table.add([row()])
    assert first_line() == ("emulated", "dispatch table: 0.0414 ms, cuDNN 0.063 ms")
    dispatch_table.add([row(shape="another", median_ms=0.05)])  # the worst ratio of the bucket
    assert first_line() == ("emulated", "dispatch table: 0.05 ms, cuDNN 0.063 ms")
    dispatch_table.add([row(shape="another", median_ms=0.071)])
    slower = "dispatch table: cuDNN 0.063 ms, emulated 0.071 ms"
    assert first_line() == ("reference", slower)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    assert first_line() == ("reference", slower)
    dispatch_table.add([row(shape="another", median_ms=float("inf"))])
    assert first_line() == ("reference", "dispatch table: cuDNN 0.063 ms, emulated failed")
    torch.use_deterministic_algorithms(True)
    assert first_line() == ("emulated", "deterministic mode")


def test_table_that_is_gone_but_was_read(pretend_gpu):
    dispatch_table.add([row()])
    assert first_line()[0] == "emulated"
    dispatch_table.user_path().unlink()
    assert first_line() == ("emulated", "dispatch table, which has changed since it was read")


def test_evidence_of_races(pretend_gpu, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    monkeypatch.setattr(
        race, "milliseconds", lambda *args: {"emulated": 0.041, "reference": 0.0632}
    )
    model, x = Network().bfloat16(), images(dtype=torch.bfloat16)
    no_race_yet = ("reference", "not measured yet: the first call will be a race")
    assert [first_line(model, x) for _ in range(2)] == [no_race_yet] * 2
    model.first(x)
    assert first_line(model, x) == ("emulated", "race: emulated 0.041 ms, cuDNN 0.0632 ms")


def test_unsupported_calls(pretend_gpu, monkeypatch):
    model, x = Network(6).bfloat16(), half_images(6)
    reason = "not supported by emulated: the kernel supports a multiple of 8 input channels, got 6"
    assert first_line(model, x) == ("reference", reason)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    assert first_line(model, x) == ("reference", reason)
    torch.use_deterministic_algorithms(True)
    assert first_line(model, x) == ("reference", f"deterministic mode; {reason}")
