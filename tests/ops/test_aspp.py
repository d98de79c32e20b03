"""The aspp op (inference form) against its definition in plain PyTorch, and its gradient."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

import deeplab_fast
from deeplab_fast import aspp
from deeplab_fast._native.common import LaunchContext
from deeplab_fast._native.memory_format import empty_nhwc
from deeplab_fast.backends import registry

from ..support import emulator
from ..support.cases import DTYPES, LAYOUTS, assert_as_accurate_as, upsampled, with_layout
from ..support.convolution import convolve_with_means, image_bias
from ..support.unsupported import skip_if_unsupported, skip_without

OP = "aspp"
SHAPES = (
    (1, 1, 1, 1),  # N, C, H, W
    (0, 4, 3, 3),
    (2, 6, 5, 7),  # every 3x3 branch wider than the map
    (2, 16, 33, 33),
    (1, 8, 65, 65),
    (3, 264, 9, 5),  # channels that fill no block of a kernel
)


def operands(shape: tuple[int, ...], dtype=torch.float32, device="cpu", dilations=(6, 12, 18)):
    """Arguments of ``aspp``, each branch with another number of channels.

    All odd, or all multiples of 8, as kernels like them, where those of the input are.
    """
    channels, unit = shape[1], 8 if shape[1] % 8 == 0 else 1
    weights = [torch.randn(3 * unit, channels, 1, 1) / channels**0.5]
    weights += [torch.randn(5 * unit, channels, 3, 3) / (9 * channels) ** 0.5 for _ in dilations]
    biases = [torch.randn(w.size(0)) for w in weights]
    pool = [torch.randn(4 * unit, channels, 1, 1) / channels**0.5, torch.randn(4 * unit)]
    concat = (3 + 5 * len(dilations) + 4) * unit
    project = [torch.randn(7, concat, 1, 1) / concat**0.5, torch.randn(7)]

    def to(tensors):
        return [t.to(device, dtype) for t in tensors]

    input = torch.randn(shape).to(device, dtype)
    return [input, to(weights), to(biases), [1, *dilations], *to(pool), *to(project)]


@pytest.fixture
def dtype(backend: str, device: str) -> torch.dtype:
    """float32, or the first dtype that the backend supports."""
    for dtype in DTYPES:
        arguments = operands((1, 8, 3, 3), dtype, device)
        if (
            deeplab_fast.backends.registry.unsupported_reason(
                OP, backend, registry.arguments(OP, *arguments)
            )
            is None
        ):
            return dtype
    raise AssertionError(f"{backend} takes none of {DTYPES}")


CLOSE = {torch.float32: {}, torch.bfloat16: {"rtol": 2e-2, "atol": 5e-2}}


def definition(input, weights, biases, dilations, pool_weight, pool_bias, project_weight, bias):
    branches = [
        F.relu(F.conv2d(input, w, b, padding="same", dilation=d))
        for w, b, d in zip(weights, biases, dilations, strict=True)
    ]
    pooled = F.relu(F.conv2d(F.adaptive_avg_pool2d(input, 1), pool_weight, pool_bias))
    pooled = upsampled(pooled, input.shape[-2:])
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
    skip_if_unsupported(backend, OP, *arguments)
    with deeplab_fast.backend(backend):
        output = aspp(*arguments)
    assert ran == [(OP, backend)]
    exact = definition(*convert(arguments, Tensor.double))
    assert_as_accurate_as(output, definition(*arguments), exact)
    if layout == "channels_last" and shape[1] > 1:
        assert output.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("dilations", [(), (2,), (1, 2, 3, 4)], ids=str)
def test_any_number_of_branches(backend, device, dtype, dilations):
    arguments = operands((2, 8, 9, 11), dtype, device, dilations)
    with deeplab_fast.backend(backend):
        torch.testing.assert_close(aspp(*arguments), definition(*arguments), **CLOSE[dtype])


def test_bitwise_repeatable(backend, device, dtype):
    arguments = operands((2, 72, 17, 13), dtype, device)
    with deeplab_fast.backend(backend):
        first = aspp(*arguments)
        assert all(torch.equal(aspp(*arguments), first) for _ in range(2))


@pytest.mark.parametrize("num_ctas", [1, 24])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_emulated_agrees_on_seeds(monkeypatch, tf32, dtype, num_ctas):
    """Three images with different biases, with split and whole sums."""
    monkeypatch.setattr(emulator, "num_ctas", num_ctas)
    arguments = operands((3, 40, 11, 7), dtype, dilations=(2, 5))
    arguments[0][1] *= 3
    outputs = []
    for seed in (0, 1, 2):
        with deeplab_fast.backend("emulated"), emulator.machine(seed, "sm_86"):
            outputs.append(aspp(*arguments))
    assert all(torch.equal(output, outputs[0]) for output in outputs)
    exact = definition(*convert(arguments, Tensor.double))
    peer = definition(*arguments)
    if dtype == torch.float32:  # rounded to 11 bits before they are multiplied, fp16's
        peer = definition(*convert(arguments, Tensor.half)).float()
    assert_as_accurate_as(outputs[0], peer, exact)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("H", "W"), [(1, 1), (11, 7), (20, 10), (33, 35)])
def test_emulated_image_bias(dtype, H, W):
    """Each pixel counts once. Runs cross images, and channels do not fill a warp."""
    N, C, P, K = 3, 264, 136, 21
    x = torch.randn(N, C, H, W) + 1
    weights = torch.randn(P, C, 1, 1) / C**0.5, torch.randn(P), torch.randn(K, 24 + P, 1, 1) / 12
    tensors = [t.to(dtype) for t in (x, *weights, torch.randn(K))]
    tensors[0] = with_layout(tensors[0], "channels_last")
    tensors[3] = tensors[3][:, 24:]  # the columns of the pooled channels

    def definition(x, pool_weight, pool_bias, project_weight, project_bias):
        pooled = F.relu(F.conv2d(x.mean((2, 3), keepdim=True), pool_weight, pool_bias))
        return F.conv2d(pooled, project_weight, project_bias)[:, :, 0, 0]

    kernels = LaunchContext(emulator.load().cuda, 0, 8)
    x, *rest = tensors
    one = x.new_ones(8, C, 1, 1)
    output = empty_nhwc(x, 8)
    means = convolve_with_means(kernels, output, x, [one], [(1, 1)])
    bias = image_bias(kernels, means, *rest)
    exact = definition(*(t.double() for t in tensors))
    assert_as_accurate_as(bias, definition(*(t.float() for t in tensors)), exact)


def test_emulated_pooled_branch_is_not_broadcast():
    """The branches and the output are the only tensors of the size of a map."""
    arguments = operands((2, 8, 9, 11), torch.bfloat16)
    arguments[0] = with_layout(arguments[0], "channels_last")
    maps: list[int] = []

    class Maps(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **kwargs or {})
            if isinstance(result, Tensor) and result.shape[2:] == (9, 11):
                maps.append(result.size(1))
            return result

    with Maps():
        registry.run(OP, *arguments, backend="emulated")  # not as an opaque op
    assert set(maps) == {7, 8 * (3 + 3 * 5)}


@pytest.mark.parametrize(
    ("position", "value", "reason"),
    [
        (0, torch.zeros(1, 8, 3, 3), "computes float32 as tf32"),
        (1, [torch.zeros(9, 8, 1, 1)], "a multiple of 8 channels of all convolutions together"),
        (4, torch.zeros(4, 8, 1, 1), "a multiple of 8 pooled channels, got 4"),
    ],
)
def test_emulated_unsupported(position, value, reason):
    arguments = operands((1, 8, 3, 3), torch.bfloat16, dilations=())
    arguments[position] = value if position == 0 else convert([value], Tensor.bfloat16)[0]
    assert reason in deeplab_fast.backends.registry.unsupported_reason(
        OP, "emulated", registry.arguments(OP, *arguments)
    )


def test_backward(backend, device, ran):
    skip_without(backend, "dilated_conv2d_backward")
    skip_if_unsupported(backend, OP, *operands((2, 6, 9, 11), device=device))
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
def test_opcheck(opcheck, backend, device, dtype, layout):
    arguments = operands((2, 8, 9, 11), dtype, device)
    arguments[0] = with_layout(arguments[0], layout)
    has_backward = backend in deeplab_fast.backends.registry.backends_of("dilated_conv2d_backward")
    arguments = convert(arguments, lambda t: t.detach().requires_grad_(has_backward))
    opcheck(torch.ops.deeplab_fast.aspp, tuple(arguments), {"backend": backend})


def test_compile_and_export(backend, device, dtype, ran):
    arguments = operands((2, 8, 9, 11), dtype, device)

    class Head(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return aspp(x, *arguments[1:]) + 1

    expected = definition(*arguments) + 1
    torch._dynamo.reset()
    with deeplab_fast.backend(backend):
        compiled = torch.compile(Head(), fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(arguments[0]), expected, **CLOSE[dtype])
        program = torch.export.export(Head(), (arguments[0],), strict=False)
    torch.testing.assert_close(program.module()(arguments[0]), expected, **CLOSE[dtype])
    assert ran == [(OP, backend)] * 2


def test_autocast(backend, device):
    arguments = operands((2, 8, 9, 11), device=device)
    skip_if_unsupported(backend, OP, *convert(arguments, Tensor.bfloat16))
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
        (3, [1, 2, 3, 0], ValueError, "dilations: expected positive ints"),
        (4, torch.zeros(4, 5, 1, 1), ValueError, r"pool_weight: expected \[K, 6, 1, 1\]"),
        (5, torch.zeros(3), ValueError, r"pool_bias: expected \(4,\)"),
        (6, torch.zeros(7, 18, 1, 1), ValueError, r"project_weight: expected \[K, 22, 1, 1\]"),
        (7, torch.zeros(8), ValueError, r"project_bias: expected \(7,\)"),
        (7, torch.zeros(7).double(), TypeError, "weights and biases: expected torch.float32"),
    ],
)
def test_bad_input(position, value, error, message):
    arguments = operands((2, 6, 9, 11))
    arguments[position] = value
    with pytest.raises(error, match=message):
        aspp(*arguments)
