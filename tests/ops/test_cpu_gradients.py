"""Half-precision gradients on a CPU, where some of PyTorch's own are wrong."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import deeplab_fast
from deeplab_fast import ASPP, DeepLabV3, dilated_conv2d, parallel_dilated_conv2d
from deeplab_fast.nn import Conv2d

HALVES = (torch.bfloat16, torch.float16)
GRID = Path(__file__).parents[1] / "support" / "cpu_gradients.py"


def failures(script: Path, step: int = 1, **environment: str) -> list[str]:
    """Failures of every ``step``-th case of a script like cpu_gradients.py, crashes included."""
    found, start = [], 0
    while True:
        done = subprocess.run(
            [sys.executable, "-I", script, str(start), str(step)],
            env=os.environ | environment,
            capture_output=True,
            text=True,
        )
        lines = [line.split(" ", 2) for line in done.stdout.splitlines()]
        described = {number: what for kind, number, what in lines if kind == "case"}
        found += [f"{described[n]}: {what}" for kind, n, what in lines if kind == "wrong"]
        if done.returncode == 0:
            return found
        assert lines, done.stderr
        number = lines[-1][1]
        reason = done.stderr.strip().splitlines()[-1:] or [f"exit status {done.returncode}"]
        found.append(f"{described[number]}: {reason[0]}")
        start = int(number) + step


@pytest.mark.slow
def test_gradients_over_a_grid_of_shapes():
    found = failures(GRID)
    assert not found, "\n".join([f"{len(found)} wrong", *found[:20]])


# Instruction sets of other CPUs: without AMX, and without AVX-512. A step of 5 takes cases of all
# channels, widths, dilations, kernels and dtypes.
@pytest.mark.parametrize("isa", ["AVX512_CORE_BF16", "AVX2"])
def test_gradients_of_other_cpus(isa):
    found = failures(GRID, step=5, ONEDNN_MAX_CPU_ISA=isa)
    assert not found, "\n".join([f"{len(found)} wrong", *found[:20]])


def test_crash_fails_one_case_only(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "import os, sys\n"
        "for number in range(int(sys.argv[1]), 5):\n"
        "    print('case', number, f'shape {number}', flush=True)\n"
        "    if number == 1: os.abort()\n"
        "    if number in (2, 4): print('wrong', number, 'off by 3', flush=True)\n"
        "    if number == 3: raise ValueError('no such thing')\n"
    )
    assert failures(script) == [
        "shape 1: exit status -6",
        "shape 2: off by 3",
        "shape 3: ValueError: no such thing",
        "shape 4: off by 3",
    ]


class WeightGradients(TorchDispatchMode):
    """Dtype and dilation of each convolution whose weight gradient PyTorch computes."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[torch.dtype, int]] = []

    def note(self, *args) -> None:
        _, _, weight, _, _, _, dilation, _, _, _, output_mask = args
        if output_mask[1]:
            self.seen.append((weight.dtype, max(dilation)))

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.convolution_backward.default:
            self.note(*args)
        return func(*args, **(kwargs or {}))


@pytest.fixture
def weight_gradients(monkeypatch) -> Iterator[list[tuple[torch.dtype, int]]]:
    """Gradients of autograd, and those that our backends request from PyTorch."""
    mode = WeightGradients()
    original = torch.ops.aten.convolution_backward

    def convolution_backward(*args):
        mode.note(*args)
        return original(*args)

    monkeypatch.setattr(torch.ops.aten, "convolution_backward", convolution_backward)
    # The dispatch mode compares with the operator itself.
    monkeypatch.setattr(convolution_backward, "default", original.default, raising=False)
    with mode:
        yield mode.seen


def in_format(tensor: Tensor, channels_last: bool) -> Tensor:
    return tensor.to(memory_format=torch.channels_last) if channels_last else tensor


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("forced", ["cpu", "reference"])
def test_weight_gradients_of_dilated_ops_are_computed_in_fp32(
    weight_gradients, forced, dtype, channels_last
):
    x = in_format(torch.randn(1, 8, 9, 33, dtype=dtype), channels_last)
    dense = torch.randn(4, 8, 3, 3, dtype=dtype, requires_grad=True)
    depthwise = torch.randn(8, 1, 3, 3, dtype=dtype, requires_grad=True)
    with deeplab_fast.backend(forced):
        dilated_conv2d(x, dense, dilation=(1, 2)).sum().backward()
        dilated_conv2d(x, depthwise, dilation=3, groups=8).sum().backward()
        parallel_dilated_conv2d(x, [dense, dense], None, [4, 5]).sum().backward()
    assert weight_gradients == [(torch.float32, dilation) for dilation in (2, 3, 4, 5)]
    assert dense.grad.dtype == depthwise.grad.dtype == dtype


def test_weight_gradients_without_dilation_stay_in_half_precision(weight_gradients):
    x = torch.randn(1, 8, 9, 33, dtype=torch.bfloat16)
    weights = [torch.randn(8, 8, k, k, dtype=x.dtype, requires_grad=True) for k in (3, 1)]
    dilated_conv2d(x, weights[0]).sum().backward()
    dilated_conv2d(x, weights[1], dilation=6).sum().backward()  # a single tap is not dilated
    assert weight_gradients == [(torch.bfloat16, 1)] * 2


def replace_relu(aspp: ASPP) -> ASPP:
    aspp.convs[1][2] = nn.Identity()  # all modules are called one by one then
    return aspp


NETWORKS = {
    "mobilenet_v2": lambda: DeepLabV3("mobilenet_v2", 3, 8, (2, 3), aux_loss=True),
    "resnet50": lambda: DeepLabV3("resnet50", 3, 8, (2, 3), multi_grid=(1, 2, 4)).backbone,
    "ASPP": lambda: ASPP(8, (1, 2, 3), 8),
    "ASPP, replaced module": lambda: replace_relu(ASPP(8, (1, 2, 3), 8)),
}


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("network", NETWORKS)
def test_no_network_computes_a_dilated_weight_gradient_in_half_precision(
    weight_gradients, network, channels_last, autocast
):
    model = in_format(NETWORKS[network](), channels_last).train()
    model = model if autocast else model.bfloat16()
    channels = 8 if isinstance(model, ASPP) else 3
    x = in_format(torch.randn(2, channels, 17, 17), channels_last)
    with torch.autocast("cpu", torch.bfloat16) if autocast else contextlib.nullcontext():
        outputs = model(x if autocast else x.bfloat16())
        values = [outputs] if isinstance(outputs, Tensor) else list(outputs.values())
        sum(value.float().sum() for value in values).backward()
    seen = set(weight_gradients)
    assert {dilation for dtype, dilation in seen if dtype == torch.float32} - {1}
    assert {dilation for dtype, dilation in seen if dtype == torch.bfloat16} == {1}
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("options", [{"groups": 40}, {}], ids=str)
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_a_layer_has_the_gradients_of_float64(dtype, options):
    """Train with and without autocast. At 33 columns PyTorch's gradient can be wrong."""
    layer = Conv2d(40, 40, 3, padding=6, dilation=6, bias=False, **options)
    layer.to(memory_format=torch.channels_last)
    layer.weight.data = layer.weight.data.to(dtype).float()
    x = in_format(torch.randn(1, 40, 33, 33).to(dtype), True)
    grad = in_format(torch.randn(1, 40, 33, 33).to(dtype), True)
    with torch.autocast("cpu", dtype):
        (autocast,) = torch.autograd.grad(layer(x.float()), layer.weight, grad)
    plain = Conv2d(40, 40, 3, padding=6, dilation=6, bias=False, dtype=dtype, **options)
    plain.load_state_dict(layer.state_dict())
    (half,) = torch.autograd.grad(plain(x), plain.weight, grad)
    exact_layer = layer.double()
    (exact,) = torch.autograd.grad(exact_layer(x.double()), exact_layer.weight, grad.double())
    for actual in (autocast, half):
        assert (actual.double() - exact).norm() <= torch.finfo(dtype).eps * exact.norm()


def test_layer_matches_torch_in_fp32_without_gradients(ran):
    layer = Conv2d(4, 4, 3, padding=2, dilation=2)
    strided = Conv2d(4, 4, 3, stride=2, padding=2, dilation=2)
    x = torch.randn(1, 4, 9, 9)
    assert torch.equal(layer(x), nn.Conv2d.forward(layer, x))
    with torch.autocast("cpu", torch.bfloat16):
        strided(x)
        with torch.no_grad():
            layer(x)
        layer.weight.requires_grad_(False)
        layer(x)
        assert ran == []
        layer.weight.requires_grad_()
        assert layer(x).dtype == torch.bfloat16
    layer.double()(x.double())
    assert ran == [("dilated_conv2d", "cpu")]


def test_a_layer_can_be_traced():
    class IntoLayers(torch.fx.Tracer):
        def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
            return False

    network = nn.Sequential(Conv2d(4, 4, 3, padding=2, dilation=2))
    assert [node.target for node in IntoLayers().trace(network).nodes][-2] is torch.conv2d
    layer = [*torch.fx.symbolic_trace(network).graph.nodes][1]
    assert (layer.op, layer.target) == ("call_module", "0")  # as an nn.Conv2d
