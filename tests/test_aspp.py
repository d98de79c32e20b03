"""The aspp op (inference form) against its definition in plain PyTorch, and its gradient."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

import deeplab_fast
from deeplab_fast import aspp

from .cases import DTYPES, LAYOUTS, assert_as_accurate_as, with_layout

OP = "aspp"
SHAPES = (
    (1, 1, 1, 1),  # N, C, H, W
    (0, 4, 3, 3),
    (2, 6, 5, 7),  # every 3x3 branch wider than the map
    (2, 16, 33, 33),
    (1, 8, 65, 65),
)


def operands(shape: tuple[int, ...], dtype=torch.float32, device="cpu", rates=(6, 12, 18)):
    """Arguments of ``aspp`` with 5 channels in each 3x3 branch and others elsewhere."""
    channels = shape[1]
    weights = [torch.randn(3, channels, 1, 1) / channels**0.5]
    weights += [torch.randn(5, channels, 3, 3) / (9 * channels) ** 0.5 for _ in rates]
    biases = [torch.randn(w.size(0)) for w in weights]
    pool = [torch.randn(4, channels, 1, 1) / channels**0.5, torch.randn(4)]
    concat = 3 + 5 * len(rates) + 4
    project = [torch.randn(7, concat, 1, 1) / concat**0.5, torch.randn(7)]

    def to(tensors):
        return [t.to(device, dtype) for t in tensors]

    input = torch.randn(shape).to(device, dtype)
    return [input, to(weights), to(biases), [1, *rates], *to(pool), *to(project)]


def definition(input, weights, biases, dilations, pool_weight, pool_bias, project_weight, bias):
    branches = [
        F.relu(F.conv2d(input, w, b, padding="same", dilation=d))
        for w, b, d in zip(weights, biases, dilations, strict=True)
    ]
    pooled = F.relu(F.conv2d(F.adaptive_avg_pool2d(input, 1), pool_weight, pool_bias))
    pooled = F.interpolate(pooled, size=input.shape[-2:], mode="bilinear")
    return F.relu(F.conv2d(torch.cat([*branches, pooled], 1), project_weight, bias))


def convert(arguments: list, function) -> list:
    """``function`` applied to every tensor in ``arguments``."""
    return tree_map_only(Tensor, function, arguments)


def tensors_of(arguments: list) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(arguments) if isinstance(leaf, Tensor)]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_forward(backend, device, ran, shape, dtype, layout):
    arguments = operands(shape, dtype, device)
    arguments[0] = with_layout(arguments[0], layout)
    if why := deeplab_fast.backends.why_not(OP, backend, device, *arguments):
        pytest.skip(why)
    with deeplab_fast.backend(backend):
        output = aspp(*arguments)
    assert ran == [(OP, backend)]
    exact = definition(*convert(arguments, Tensor.double))
    assert_as_accurate_as(output, definition(*arguments), exact)
    if layout == "channels_last" and shape[1] > 1:
        assert output.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("rates", [(), (2,), (1, 2, 3, 4)], ids=str)
def test_any_number_of_branches(backend, device, rates):
    arguments = operands((2, 6, 9, 11), device=device, rates=rates)
    with deeplab_fast.backend(backend):
        torch.testing.assert_close(aspp(*arguments), definition(*arguments))


def test_backward(backend, device, ran):
    arguments = convert(operands((2, 6, 9, 11), device=device), Tensor.requires_grad_)
    grad_output = torch.randn(2, 7, 9, 11, device=device)
    with deeplab_fast.backend(backend):
        actual = torch.autograd.grad(aspp(*arguments), tensors_of(arguments), grad_output)
    assert ran[0] == (OP, backend) and {name for _, name in ran} == {backend}
    peer = torch.autograd.grad(definition(*arguments), tensors_of(arguments), grad_output)
    doubles = convert(arguments, lambda t: t.detach().double().requires_grad_())
    exact = torch.autograd.grad(definition(*doubles), tensors_of(doubles), grad_output.double())
    for a, p, e in zip(actual, peer, exact, strict=True):
        assert_as_accurate_as(a, p, e)


def test_double_backward_is_an_error():
    arguments = convert(operands((1, 3, 5, 5)), Tensor.requires_grad_)
    (grad,) = torch.autograd.grad(aspp(*arguments).sum(), arguments[0], create_graph=True)
    with pytest.raises(NotImplementedError, match="no double backward"):
        grad.sum().backward()


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_opcheck(backend, device, layout):
    arguments = operands((2, 6, 9, 11), device=device)
    arguments[0] = with_layout(arguments[0], layout)
    arguments = convert(arguments, lambda t: t.detach().requires_grad_())
    torch.library.opcheck(torch.ops.deeplab_fast.aspp, tuple(arguments), {"backend": backend})


def test_compile_and_export(backend, device, ran):
    arguments = operands((2, 6, 9, 11), device=device)

    class Head(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return aspp(x, *arguments[1:]) + 1

    expected = definition(*arguments) + 1
    torch._dynamo.reset()
    with deeplab_fast.backend(backend):
        compiled = torch.compile(Head(), fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(arguments[0]), expected)
        program = torch.export.export(Head(), (arguments[0],), strict=False)
    torch.testing.assert_close(program.module()(arguments[0]), expected)
    assert ran == [(OP, backend)] * 2


def test_autocast(backend, device):
    arguments = operands((2, 6, 9, 11), device=device)
    with deeplab_fast.backend(backend), torch.autocast(device, torch.bfloat16):
        output = aspp(*arguments)
    peer = definition(*convert(arguments, Tensor.bfloat16))
    assert_as_accurate_as(output, peer, definition(*convert(arguments, Tensor.double)))


@pytest.mark.parametrize(
    ("position", "value", "error", "message"),
    [
        (0, torch.zeros(6, 9, 9), ValueError, r"input: expected \[N, C, H, W\]"),
        (1, [], ValueError, "at least one"),
        (2, [torch.zeros(3)], ValueError, "4 weights, 1 biases, 4 dilations"),
        (3, [1, 2, 3, 0], ValueError, "dilation: expected a positive int"),
        (4, torch.zeros(4, 5, 1, 1), ValueError, r"pool_weight: expected \[K, 6, 1, 1\]"),
        (5, torch.zeros(3), ValueError, r"pool_bias: expected \(4,\)"),
        (6, torch.zeros(7, 18, 1, 1), ValueError, r"project_weight: expected \[K, 22, 1, 1\]"),
        (7, torch.zeros(8), ValueError, r"project_bias: expected \(7,\)"),
        (7, torch.zeros(7).double(), TypeError, "expected weights and biases in torch.float32"),
    ],
)
def test_bad_input(position, value, error, message):
    arguments = operands((2, 6, 9, 11))
    arguments[position] = value
    with pytest.raises(error, match=message):
        aspp(*arguments)
