"""Gradients of dilated convolution through the CUDA kernels, in the emulator."""

from __future__ import annotations

import math
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import deeplab_fast
from deeplab_fast import (
    ASPP,
    dilated_conv2d,
    parallel_dilated_conv2d,
    upsample_cross_entropy,
)
from deeplab_fast._native import work_lists
from deeplab_fast._native.common import LaunchContext
from deeplab_fast.backends.cuda import dilated_conv2d_backward
from deeplab_fast.ops.dilated_conv2d_and_mean import parallel_dilated_conv2d_and_mean

from ..support import emulator
from ..support.cases import (
    Conv,
    assert_as_accurate_as,
    operands,
    oracle_input,
    to_tf32,
    with_layout,
)
from ..support.emulator import machine

# (input, [(K, R, S)], dilations). Channels and pixels fill blocks and part of one more, taps
# are outside the map, k-iterations cross rows and images, and 24 CTAs split a sum over channels and
# one over pixels.
CASES = [
    ((1, 136, 9, 9), [(133, 3, 3)], [2]),
    ((2, 40, 11, 13), [(24, 3, 3), (8, 1, 1), (72, 3, 5)], [3, 1, 20]),
    ((3, 8, 7, 19), [(8, 5, 5)], [2]),
    ((5, 8, 1, 3), [(8, 3, 3), (16, 1, 1)], [2, 1]),
    ((2, 8, 17, 19), [(8, 3, 3)], [4]),
]


def tensors_of(shape, kernels, dtype) -> tuple[Tensor, list[Tensor], Tensor]:
    input = torch.randn(shape).to(dtype).contiguous(memory_format=torch.channels_last)
    scale = (9 * shape[1]) ** -0.5
    weights = [(torch.randn(k, shape[1], r, s) * scale).to(dtype) for k, r, s in kernels]
    channels = sum(k for k, _, _ in kernels)
    return input, weights, torch.randn(shape[0], channels, *shape[2:]).to(dtype)


def reference(input: Tensor, weights: list[Tensor], biases: list[Tensor], dilations) -> Tensor:
    outputs = [
        F.conv2d(oracle_input(input), *args, padding="same", dilation=dilation)
        for *args, dilation in zip(weights, biases, dilations, strict=True)
    ]
    return torch.cat(outputs, dim=1)


def gradients(function, input, weights, grad_output, dilations) -> list[Tensor]:
    """Gradients of the input, the weights and the biases, which are zeros."""
    biases = [torch.zeros(w.size(0), dtype=w.dtype) for w in weights]
    leaves = [t.detach().requires_grad_() for t in (input, *weights, *biases)]
    n = len(weights)
    output = function(leaves[0], leaves[1 : 1 + n], leaves[1 + n :], dilations)
    return list(torch.autograd.grad(output, leaves, grad_output))


def ours(input, weights, biases, dilations) -> Tensor:
    return parallel_dilated_conv2d(input, weights, biases, dilations)


def emulated_gradients(*args, seed=0, device="sm_80") -> list[Tensor]:
    with deeplab_fast.backend("emulated"), machine(seed, device):
        return gradients(ours, *args)


@pytest.mark.parametrize("num_ctas", [1, 24])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("shape", "kernels", "dilations"), CASES)
def test_emulated_gradients_on_seeds(monkeypatch, shape, kernels, dilations, dtype, num_ctas):
    monkeypatch.setattr(emulator, "num_ctas", num_ctas)
    input, weights, grad_output = tensors_of(shape, kernels, dtype)
    results = [
        emulated_gradients(input, weights, grad_output, dilations, seed=seed, device="sm_86")
        for seed in range(4)
    ]
    doubles = input.double(), [w.double() for w in weights], grad_output.double(), dilations
    exact = gradients(reference, *doubles)
    peer = gradients(reference, input, weights, grad_output, dilations)
    for a, p, e in zip(results[0], peer, exact, strict=True):
        assert_as_accurate_as(a, p, e)
    for result in results[1:]:
        assert all(map(torch.equal, result, results[0]))


@pytest.mark.parametrize("num_ctas", [1, 24])
@pytest.mark.parametrize(("shape", "kernels", "dilations"), CASES)
def test_emulated_tf32_gradients_on_seeds(monkeypatch, tf32, shape, kernels, dilations, num_ctas):
    monkeypatch.setattr(emulator, "num_ctas", num_ctas)
    input, weights, grad_output = tensors_of(shape, kernels, torch.float32)
    results = [
        emulated_gradients(input, weights, grad_output, dilations, seed=seed) for seed in range(3)
    ]
    rounded = to_tf32(input), [to_tf32(w) for w in weights], to_tf32(grad_output)
    doubles = rounded[0].double(), [w.double() for w in rounded[1]], rounded[2].double(), dilations
    exact = gradients(reference, *doubles)
    peer = gradients(reference, *rounded, dilations)
    n = 1 + len(weights)  # the bias's gradient is a plain sum, which rounds nothing
    exact[n:] = gradients(reference, *doubles[:2], grad_output.double(), dilations)[n:]
    peer[n:] = gradients(reference, *rounded[:2], grad_output, dilations)[n:]
    for a, p, e in zip(results[0], peer, exact, strict=True):
        assert_as_accurate_as(a, p, e)
    for result in results[1:]:
        assert all(map(torch.equal, result, results[0]))


def test_sums_are_split():
    """The tests above run the kernels that add partial sums."""
    (N, C, H, W), [(K, R, S)], [dilation] = CASES[-1]
    arguments = (
        (N, H, W),
        ((R, S, dilation, dilation),),
        C,
        (K,),
        torch.bfloat16,
        torch.device("cpu"),
    )
    slots = [work_lists.wgrad_work_list(*arguments, n).num_slots for n in (1, 24)]
    assert slots[0] == 0 and slots[1] > 2 * 9


def test_emulated_pipeline_of_gradients_on_more_seeds():
    """CTAs run several rounds of their pipeline."""
    arguments = tensors_of((2, 8, 12, 13), [(8, 3, 3)], torch.bfloat16)
    results = [emulated_gradients(*arguments, [1], seed=seed) for seed in range(6)]
    assert all(all(map(torch.equal, result, results[0])) for result in results[1:])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_emulated_weight_gradient_sums_every_pixel_of_a_rectangle_once(tf32, dtype):
    """Rectangles with less than a row, a row or an image in the pixels of a k-iteration.

    Sums of small integers are exact.
    """
    for H, W, dilation in product((1, 2, 5, 8), (1, 3, 8), (1, 2, 4)):
        input, grad_output = (torch.randint(-3, 4, (3, 8, H, W)).to(dtype) for _ in range(2))
        weight = torch.zeros(8, 8, 3, 3, dtype=dtype, requires_grad=True)
        with deeplab_fast.backend("emulated"):
            dilated_conv2d(input, weight, None, dilation).backward(grad_output)
        exact = torch.nn.grad.conv2d_weight(
            input.double(), weight.shape, grad_output.double(), padding=dilation, dilation=dilation
        )
        assert torch.equal(weight.grad, exact.to(dtype))


def test_emulated_bias_gradient_in_several_parts():
    """There are 300 pixels more than in two parts. Sums of small integers are exact."""
    kernels = LaunchContext(emulator.load().cuda, 0, num_ctas=5)
    grad_output = torch.randint(-3, 4, (2, 72, 29, 31)).bfloat16()
    grad_output = grad_output.contiguous(memory_format=torch.channels_last)
    (actual,) = dilated_conv2d_backward.bias_gradients(kernels, grad_output, [torch.empty(72)])
    assert torch.equal(actual, grad_output.double().sum((0, 2, 3)).bfloat16())


def test_taps_outside_the_map_have_zero_gradient():
    input, weight, _ = operands(Conv(2, 8, 16, 5, 6, (3, 3), 9), torch.bfloat16, "cpu")
    weight.requires_grad_()
    with deeplab_fast.backend("emulated"):
        dilated_conv2d(input, weight, None, 9).sum().backward()
    outer = torch.ones(3, 3, dtype=torch.bool)
    outer[1, 1] = False
    assert (weight.grad[:, :, outer] == 0).all()
    assert (weight.grad[:, :, 1, 1] != 0).any()


def test_emulated_padding_is_not_read():
    """Inf reaches exactly the weights that multiply it."""
    input, weight, _ = operands(Conv(1, 8, 8, 9, 10, (3, 3), 4), torch.bfloat16, "cpu")
    input[0, 3, 0, 0] = math.inf
    weight.requires_grad_()
    with deeplab_fast.backend("emulated"):
        dilated_conv2d(input, weight, None, 4).sum().backward()
    seen = torch.zeros(8, 8, 3, 3, dtype=torch.bool)
    seen[:, 3, :2, :2] = True
    assert torch.equal(weight.grad.isfinite(), ~seen)


@pytest.mark.parametrize("layout", ["expanded", "sliced", "contiguous", "channels_last", "offset"])
def test_emulated_layouts_of_the_incoming_gradient(layout):
    input, weights, grad_output = tensors_of((2, 16, 6, 5), [(16, 3, 3), (8, 1, 1)], torch.bfloat16)
    if layout == "expanded":
        grad_output = torch.tensor(0.5).bfloat16().expand(grad_output.shape)
        dense = grad_output.contiguous()
    elif layout == "offset":
        dense = grad_output.contiguous(memory_format=torch.channels_last)
        buffer = torch.empty(dense.numel() + 1, dtype=torch.bfloat16)
        grad_output = buffer[1:].as_strided(dense.shape, dense.stride()).copy_(dense)
    else:
        dense, grad_output = grad_output, with_layout(grad_output, layout)
    expected = emulated_gradients(input, weights, dense, [2, 1])
    actual = emulated_gradients(input, weights, grad_output, [2, 1])
    assert all(map(torch.equal, actual, expected))


class Recorder:
    """A module that records the names of the launchers that it runs."""

    def __init__(self) -> None:
        self.names: list[str] = []

    def __getattr__(self, name: str):
        self.names.append(name)
        return getattr(emulator.load().cuda, name)


@pytest.mark.parametrize("mask", [(1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 1)])
def test_only_needed_gradients_are_launched(mask):
    input, weights, grad_output = tensors_of((1, 8, 4, 5), [(8, 3, 3), (8, 1, 1)], torch.float16)
    recorder = Recorder()
    grad_input, grad_weights, grad_biases = dilated_conv2d_backward.backward(
        LaunchContext(recorder, 0, 8), grad_output, input, weights, [(1, 1), (1, 1)], mask
    )
    launchers = ("dilated_conv2d_fwd", "dilated_conv2d_wgrad", "dilated_conv2d_bias_grad")
    assert recorder.names == [name for name, needed in zip(launchers, mask) if needed]
    assert (grad_input.numel() > 0, bool(grad_weights), bool(grad_biases)) == tuple(map(bool, mask))


def test_strictly_deterministic_algorithms():
    arguments = tensors_of((2, 16, 6, 5), [(16, 3, 3), (8, 1, 1)], torch.bfloat16)
    expected = emulated_gradients(*arguments, [2, 1])
    torch.use_deterministic_algorithms(True)
    assert all(map(torch.equal, emulated_gradients(*arguments, [2, 1]), expected))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_weights_keep_their_memory_format(tf32, dtype):
    input, weights, grad_output = tensors_of((1, 8, 6, 5), [(16, 3, 3), (7, 3, 3)], dtype)
    weights[1] = weights[1].contiguous(memory_format=torch.channels_last)
    _, *grads, _, _ = emulated_gradients(input, weights, grad_output, [1, 2])
    assert [g.stride() for g in grads] == [w.stride() for w in weights]


@pytest.mark.parametrize(
    ("case", "dtype", "reason"),
    [
        (Conv(1, 8, 8, 5, 5), torch.float32, "as tf32, which torch.backends.cudnn does not allow"),
        (Conv(1, 8, 8, 5, 5), torch.float64, "got torch.float64"),
        (Conv(1, 16, 16, 5, 5, groups=2), torch.bfloat16, "one group, got 2"),
        (Conv(1, 12, 8, 5, 5), torch.bfloat16, "a multiple of 8 input channels, got 12"),
    ],
    ids=str,
)
def test_unsupported_convolutions(case: Conv, dtype, reason):
    input, weight, _ = operands(case, dtype, "cpu")
    grad_output = torch.randn(case.N, case.K, case.H, case.W).to(dtype)
    backward = torch.ops.deeplab_fast.dilated_conv2d_backward
    message = f"backend 'emulated' cannot run dilated_conv2d_backward on this input: .*{reason}"
    with pytest.raises(RuntimeError, match=message):
        backward(grad_output, input, weight, [1, 1], case.groups, [True] * 3, backend="emulated")


def test_unsupported_number_of_taps():
    input, weights, grad_output = tensors_of((1, 8, 2, 2), [(8, 31, 31)] * 2, torch.bfloat16)
    backward = torch.ops.deeplab_fast.parallel_dilated_conv2d_backward
    with pytest.raises(RuntimeError, match="at most 1024 taps in all branches together"):
        backward(grad_output, input, weights, [1, 1], [True] * 3, backend="emulated")


class Head(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.aspp = ASPP(16, (2, 3), 8)
        self.aspp.project[3].p = 0.0  # no dropout
        self.classifier = nn.Conv2d(8, 5, 1)

    def forward(self, features: Tensor, target: Tensor) -> Tensor:
        logits = self.classifier(self.aspp(features))
        return upsample_cross_entropy(logits.float(), target)


def head_and_batch() -> tuple[Head, Tensor, Tensor]:
    head = Head().to(memory_format=torch.channels_last)
    return head, torch.randn(2, 16, 9, 7), torch.randint(0, 5, (2, 33, 25))


@pytest.mark.parametrize("kernels", ["emulated", "cpu"])
def test_a_compiled_training_step(kernels, ran):
    """Forward, loss and backward in one graph each, through the kernels."""
    head, features, target = head_and_batch()
    name = "parallel_dilated_conv2d"

    def step(function) -> list[Tensor]:
        head.zero_grad()
        x = features.bfloat16().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            loss = function(x, target)
        loss.backward()
        return [loss.detach(), x.grad, *(p.grad for p in head.parameters())]

    def convolve(function):
        def forced(*args):
            with deeplab_fast.backend(kernels):
                return function(*args)

        return forced

    only = parallel_dilated_conv2d_and_mean
    try:
        deeplab_fast.nn.pyramid.parallel_dilated_conv2d_and_mean = convolve(only)
        expected = step(head)
        ran.clear()
        torch._dynamo.reset()
        actual = step(torch.compile(head, fullgraph=True, backend="aot_eager"))
    finally:
        deeplab_fast.nn.pyramid.parallel_dilated_conv2d_and_mean = only
    assert (name + "_and_mean", kernels) in ran and (name + "_backward", kernels) in ran
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=2e-2, atol=2e-2)


def test_training_with_a_gradient_scaler(monkeypatch):
    """fp16 under autocast takes the reference's steps and skips an overflow."""
    head, features, target = head_and_batch()
    start = {key: value.clone() for key, value in head.state_dict().items()}
    only = parallel_dilated_conv2d_and_mean

    def train(kernels: str, scale: float) -> list[Tensor]:
        def forced(*args):
            with deeplab_fast.backend(kernels):
                return only(*args)

        monkeypatch.setattr(deeplab_fast.nn.pyramid, "parallel_dilated_conv2d_and_mean", forced)
        head.load_state_dict(start)
        optimizer = torch.optim.SGD(head.parameters(), lr=0.1)
        scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        losses = []
        for _ in range(3):
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.float16):
                loss = head(features, target)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            losses.append(loss.detach())
        return [torch.stack(losses), torch.tensor(scaler.get_scale())]

    losses, _ = train("emulated", 256.0)
    expected, _ = train("reference", 256.0)
    torch.testing.assert_close(losses, expected, rtol=5e-3, atol=5e-3)
    assert losses[2] < losses[0]

    losses, scale = train("emulated", 2.0**40)
    assert scale == 2.0**37 and losses[0] == losses[2]
