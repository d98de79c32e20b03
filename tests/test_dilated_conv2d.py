"""dilated_conv2d and parallel_dilated_conv2d against F.conv2d and a float64 reference."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.utils._pytree import tree_leaves

import deeplab_fast
from deeplab_fast import dilated_conv2d, parallel_dilated_conv2d

from .cases import CONVS, DTYPES, LAYOUTS, Conv, assert_as_accurate_as, operands, with_layout

OP = "dilated_conv2d"
PARALLEL = ([(1, 1), (3, 3), (3, 3), (5, 3)], [1, 2, 7, 3])


def same_conv2d(input: Tensor, weight: Tensor, bias: Tensor | None, dilation, groups: int = 1):
    return F.conv2d(input, weight, bias, padding="same", dilation=dilation, groups=groups)


def gradients(function, tensors: list[Tensor], grad_output: Tensor) -> list[Tensor]:
    leaves = [t.detach().requires_grad_() for t in tensors]
    return list(torch.autograd.grad(function(*leaves), leaves, grad_output))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CONVS, ids=str)
def test_forward(backend, device, ran, case: Conv, dtype, layout):
    input, weight, bias = operands(case, dtype, device)
    input = with_layout(input, layout)
    with deeplab_fast.backend(backend):
        output = dilated_conv2d(input, weight, bias, case.dilation, case.groups)
    assert ran == [(OP, backend)]
    exact = same_conv2d(input.double(), weight.double(), bias.double(), case.dilation, case.groups)
    peer = same_conv2d(input, weight, bias, case.dilation, case.groups)
    assert_as_accurate_as(output, peer, exact)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CONVS, ids=str)
def test_backward(backend, device, ran, case: Conv, dtype, layout):
    input, weight, bias = operands(case, dtype, device)
    input = with_layout(input, layout)
    grad_output = torch.randn(case.N, case.K, case.H, case.W).to(device, dtype)

    def ours(input, weight, bias):
        return dilated_conv2d(input, weight, bias, case.dilation, case.groups)

    def theirs(input, weight, bias):
        return same_conv2d(input, weight, bias, case.dilation, case.groups)

    with deeplab_fast.backend(backend):
        actual = gradients(ours, [input, weight, bias], grad_output)
    assert ran == [(OP, backend), (OP + "_backward", backend)]
    exact = gradients(theirs, [t.double() for t in (input, weight, bias)], grad_output.double())
    nchw, nhwc = (
        gradients(theirs, [with_layout(input, f), weight, bias], with_layout(grad_output, f))
        for f in ("contiguous", "channels_last")
    )
    for a, p, e, q in zip(actual, nchw, exact, nhwc, strict=True):
        assert_as_accurate_as(a, p, e, q)


def parallel_operands(
    device: str, dtype=torch.float32
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    input = torch.randn(2, 6, 9, 13).to(device, dtype)
    kernels, _ = PARALLEL
    weights = [
        torch.randn(3 + i, 6, *kernel).to(device, dtype) / 6 for i, kernel in enumerate(kernels)
    ]
    return input, weights, [torch.randn(w.size(0)).to(device, dtype) for w in weights]


def parallel_conv2d(input: Tensor, weights, biases) -> Tensor:
    outputs = [
        same_conv2d(input, w, b, d) for w, b, d in zip(weights, biases, PARALLEL[1], strict=True)
    ]
    return torch.cat(outputs, dim=1)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_parallel(backend, device, ran, dtype, layout):
    input, weights, biases = parallel_operands(device, dtype)
    input = with_layout(input, layout)
    grad_output = torch.randn(2, sum(w.size(0) for w in weights), 9, 13).to(device, dtype)
    tensors = [input, *weights, *biases]

    def ours(input, *rest):
        return parallel_dilated_conv2d(input, rest[:4], PARALLEL[1], rest[4:])

    def theirs(input, *rest):
        return parallel_conv2d(input, rest[:4], rest[4:])

    with deeplab_fast.backend(backend):
        output = ours(*tensors)
        actual = gradients(ours, tensors, grad_output)
    assert {pair[1] for pair in ran} == {backend}
    exact_tensors = [t.double() for t in tensors]
    assert_as_accurate_as(output, theirs(*tensors), theirs(*exact_tensors))
    exact = gradients(theirs, exact_tensors, grad_output.double())
    for a, p, e in zip(actual, gradients(theirs, tensors, grad_output), exact, strict=True):
        assert_as_accurate_as(a, p, e)


def test_parallel_without_biases(backend, device):
    input, weights, _ = parallel_operands(device)
    zeros = [torch.zeros(w.size(0), device=device) for w in weights]
    with deeplab_fast.backend(backend):
        output = parallel_dilated_conv2d(input, weights, PARALLEL[1])
    torch.testing.assert_close(output, parallel_conv2d(input, weights, zeros))


def test_memory_format_is_kept(backend, device):
    input, weight, _ = operands(Conv(2, 8, 6, 9, 7), torch.float32, device)
    with deeplab_fast.backend(backend):
        for layout in ("contiguous", "channels_last"):
            x = with_layout(input, layout).detach().requires_grad_()
            y = dilated_conv2d(x, weight)
            p = parallel_dilated_conv2d(x, [weight, weight], [1, 2])
            (y.sum() + p.sum()).backward()
            for t in (y, p, x.grad):
                torch_format = getattr(torch, layout + "_format", torch.channels_last)
                assert t.is_contiguous(memory_format=torch_format)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("grad_layout", LAYOUTS)
def test_strides_are_those_that_compiled_graphs_rely_on(backend, device, layout, grad_layout):
    """Every output of every op has the strides that the fake promised."""
    input, weight, bias = operands(Conv(2, 4, 6, 7, 5), torch.float32, device)
    input, grad = with_layout(input, layout), with_layout(torch.randn(2, 6, 7, 5), grad_layout)
    ops, mask = torch.ops.deeplab_fast, [True, True, True]
    grad = grad.to(device)
    calls = [
        (ops.dilated_conv2d, (input, weight, bias, [2, 2], 1)),
        (ops.dilated_conv2d_backward, (grad, input, weight, [2, 2], 1, mask)),
        (ops.parallel_dilated_conv2d, (input, [weight], [bias], [2])),
        (ops.parallel_dilated_conv2d_backward, (grad, input, [weight], [2], mask)),
    ]
    for op, arguments in calls:
        actual = tree_leaves(op(*arguments, backend=backend))
        with FakeTensorMode(allow_non_fake_inputs=True):
            promised = tree_leaves(op(*arguments, backend=backend))
        assert [t.stride() for t in actual] == [t.stride() for t in promised]


def test_only_needed_gradients_are_computed(backend, device):
    input, weight, bias = operands(Conv(1, 4, 4, 6, 6), torch.float32, device)
    with deeplab_fast.backend(backend):
        weight.requires_grad_()
        dilated_conv2d(input, weight, bias).sum().backward()
        assert weight.grad is not None and input.grad is None and bias.grad is None
        biases = [bias.clone().requires_grad_(), bias.clone()]
        parallel_dilated_conv2d(input, [weight, weight], [1, 2], biases).sum().backward()
        assert biases[0].grad is not None and biases[1].grad is None and input.grad is None


def test_bitwise_repeatable(backend, device):
    input, weight, bias = operands(Conv(2, 16, 16, 17, 19, (3, 3), 4), torch.float32, device)
    grad_output = torch.randn(2, 16, 17, 19, device=device)

    def ours(input, weight, bias):
        return dilated_conv2d(input, weight, bias, 4)

    with deeplab_fast.backend(backend):
        first = gradients(ours, [input, weight, bias], grad_output)
        for _ in range(3):
            for a, b in zip(
                gradients(ours, [input, weight, bias], grad_output), first, strict=True
            ):
                assert torch.equal(a, b)


def test_double_backward_is_an_error(backend, device):
    input, weight, bias = operands(Conv(1, 4, 4, 6, 6), torch.float32, device)
    input.requires_grad_()
    with deeplab_fast.backend(backend):
        for y in (dilated_conv2d(input, weight), parallel_dilated_conv2d(input, [weight], [1])):
            (grad,) = torch.autograd.grad((y * y).sum(), input, create_graph=True)
            with pytest.raises(NotImplementedError, match="no double backward"):
                grad.sum().backward()


def test_gradcheck():
    """float64 reaches no kernel: this checks the registration of the gradient."""
    input = torch.randn(1, 2, 5, 6, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(4, 1, 3, 3, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda *t: dilated_conv2d(*t, (2, 1), 2), (input, weight, bias))
    weights = [torch.randn(2, 2, k, k, dtype=torch.float64, requires_grad=True) for k in (1, 3)]
    biases = [torch.randn(2, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    assert torch.autograd.gradcheck(
        lambda x, *rest: parallel_dilated_conv2d(x, rest[:2], [1, 2], rest[2:]),
        (input, *weights, *biases),
    )


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_opcheck(backend, device, layout):
    input, weight, bias = operands(Conv(2, 4, 6, 7, 5), torch.float32, device)
    input = with_layout(input, layout)
    for t in (input, weight, bias):
        t.requires_grad_()
    ops = torch.ops.deeplab_fast
    torch.library.opcheck(
        ops.dilated_conv2d, (input, weight, bias, [2, 2], 1), {"backend": backend}
    )
    torch.library.opcheck(
        ops.parallel_dilated_conv2d,
        (input, [weight, weight], [bias, bias], [1, 2]),
        {"backend": backend},
    )


def test_compile_fullgraph(backend, device, ran):
    input, weight, bias = operands(Conv(2, 4, 6, 7, 5), torch.float32, device)
    input.requires_grad_()

    def inside(input):
        with deeplab_fast.backend(backend):
            return dilated_conv2d(input, weight, bias, 2) * 2

    def outside(input):
        return dilated_conv2d(input, weight, bias, 2) * 2

    expected = same_conv2d(input, weight, bias, 2) * 2
    for function in (inside, outside):
        ran.clear()
        torch._dynamo.reset()
        compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
        with deeplab_fast.backend(backend):
            output = compiled(input)
        (grad,) = torch.autograd.grad(output.sum(), input)
        assert ran == [(OP, backend), (OP + "_backward", backend)]
        torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-5)
        (expected_grad,) = torch.autograd.grad(expected.sum(), input, retain_graph=True)
        torch.testing.assert_close(grad, expected_grad, rtol=1e-4, atol=1e-5)


def test_export(backend, device):
    input, weight, bias = operands(Conv(2, 4, 6, 7, 5), torch.float32, device)

    second = torch.randn(3, 6, 3, 3, device=device)

    class Branches(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            y = dilated_conv2d(x, weight, bias)
            return parallel_dilated_conv2d(y, [second, second], [1, 2])

    with deeplab_fast.backend(backend):
        module = Branches()
        program = torch.export.export(module, (input,), strict=False)
        torch.testing.assert_close(program.module()(input), module(input))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(backend, device, dtype):
    input, weight, bias = operands(Conv(2, 4, 6, 7, 5), torch.float32, device)
    weight.requires_grad_()
    with deeplab_fast.backend(backend), torch.autocast(device, dtype):
        output = dilated_conv2d(input, weight, bias, 2)
        parallel = parallel_dilated_conv2d(input, [weight], [2], [bias])
        loss = output.float().sum()
    assert output.dtype == parallel.dtype == dtype
    loss.backward()
    assert weight.grad.dtype == torch.float32
    peer = same_conv2d(input.to(dtype), weight.to(dtype), bias.to(dtype), 2)
    exact = same_conv2d(input.double(), weight.double(), bias.double(), 2)
    assert_as_accurate_as(output, peer, exact)


def test_automatic_choice(ran):
    dilated_conv2d(torch.randn(1, 4, 5, 5), torch.randn(4, 4, 3, 3))
    assert ran == [(OP, "cpu")]


X, W = torch.zeros(1, 4, 5, 5), torch.zeros(6, 4, 3, 3)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((X[0], W), ValueError, r"input: expected \[N, C, H, W\]"),
        ((X, W[0]), ValueError, "weight: expected"),
        ((X, torch.zeros(6, 4, 2, 2)), ValueError, "odd R and S"),
        ((X, torch.zeros(6, 3, 3, 3)), ValueError, "input of 4 channels"),
        ((X, W, None, 1, 4), ValueError, "groups=4"),
        ((X, W, None, 1, 0), ValueError, "groups=0"),
        ((X, W, torch.zeros(5)), ValueError, r"bias: expected shape \(6,\)"),
        ((X, W, None, 0), ValueError, "dilation: expected a positive int"),
        ((X, W, None, (1, 2, 3)), ValueError, "dilation"),
        ((X, W.double()), TypeError, "expected weights and biases in torch.float32"),
        ((X, W.to("meta")), ValueError, "expected weights and biases on cpu"),
    ],
)
def test_bad_input(arguments, error, message):
    with pytest.raises(error, match=message):
        dilated_conv2d(*arguments)


def test_bad_parallel_input():
    with pytest.raises(ValueError, match="at least one branch"):
        parallel_dilated_conv2d(X, [], [])
    with pytest.raises(ValueError, match="2 weights, 1 dilations, 0 biases"):
        parallel_dilated_conv2d(X, [W, W], [1])
    with pytest.raises(ValueError, match="1 biases"):
        parallel_dilated_conv2d(X, [W, W], [1, 2], [torch.zeros(6)])
