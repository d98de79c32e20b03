"""Parallel convolutions and the mean of their input, whose gradients come from one op."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import deeplab_fast
from deeplab_fast.backends import registry
from deeplab_fast.ops.dilated_conv2d_and_mean import parallel_dilated_conv2d_and_mean

from ..support import emulator
from ..support.cases import DTYPES, LAYOUTS, assert_as_accurate_as, oracle_input, with_layout
from ..support.emulator import machine
from ..support.unsupported import skip_if_unsupported

OP = "parallel_dilated_conv2d_backward"
DILATIONS = [1, 2, 7]


def operands(
    dtype: torch.dtype, device: str = "cpu", shape: tuple[int, ...] = (3, 24, 6, 5)
) -> tuple[list[Tensor], list[Tensor]]:
    """[input, *weights] and gradients of both outputs. The mean's is of order one per pixel."""
    N, C, H, W = shape
    kernels = [(8, C, 1, 1), (16, C, 3, 3), (5, C, 3, 3)]
    weights = [torch.randn(kernel) / (9 * C) ** 0.5 for kernel in kernels]
    grads = [torch.randn(N, 29, H, W), H * W * torch.randn(N, C, 1, 1)]
    tensors = [torch.randn(shape), *weights], grads
    return tuple([t.to(device, dtype) for t in each] for each in tensors)  # type: ignore[return-value]


def ours(input: Tensor, *weights: Tensor) -> tuple[Tensor, Tensor]:
    return parallel_dilated_conv2d_and_mean(input, weights, DILATIONS)


def theirs(input: Tensor, *weights: Tensor) -> tuple[Tensor, Tensor]:
    input = oracle_input(input)
    branches = [F.conv2d(input, w, padding="same", dilation=r) for w, r in zip(weights, DILATIONS)]
    return torch.cat(branches, dim=1), F.adaptive_avg_pool2d(input, 1)


def gradients(function, tensors: list[Tensor], grads: list[Tensor]) -> list[Tensor]:
    leaves = [t.detach().requires_grad_() for t in tensors]
    return list(torch.autograd.grad(function(*leaves), leaves, grads))


def doubles(tensors: list[Tensor]) -> list[Tensor]:
    return [t.double() for t in tensors]


@pytest.fixture
def dtype(backend: str, device: str) -> torch.dtype:
    """float32, or the first dtype that the backend supports."""
    for dtype in DTYPES:
        (input, *weights), (grad, _) = operands(dtype, device)
        if (
            registry.unsupported_reason(
                OP, backend, registry.arguments(OP, grad, input, weights, DILATIONS, [True] * 3)
            )
            is None
        ):
            return dtype
    raise AssertionError(f"{backend} takes none of {DTYPES}")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_outputs_and_gradients(backend, device, ran, dtype, layout):
    tensors, grads = operands(dtype, device)
    tensors[0] = with_layout(tensors[0], layout)
    skip_if_unsupported(backend, OP, grads[0], tensors[0], tensors[1:], DILATIONS, [True] * 3)
    with deeplab_fast.backend(backend):
        outputs = ours(*tensors)
        actual = gradients(ours, tensors, grads)
    assert ran == [("parallel_dilated_conv2d_and_mean", backend)] * 2 + [(OP, backend)]
    for a, p, e in zip(outputs, theirs(*tensors), theirs(*doubles(tensors)), strict=True):
        assert_as_accurate_as(a, p, e)
    exact = gradients(theirs, doubles(tensors), doubles(grads))
    for a, p, e in zip(actual, gradients(theirs, tensors, grads), exact, strict=True):
        assert_as_accurate_as(a, p, e)


@pytest.mark.parametrize("shape", [(0, 8, 3, 3), (1, 8, 1, 1), (2, 1, 4, 1)], ids=str)
def test_small_inputs(shape):
    tensors, grads = operands(torch.float64, shape=shape)
    torch.testing.assert_close(ours(*tensors), theirs(*tensors))
    expected = gradients(theirs, tensors, grads)
    torch.testing.assert_close(gradients(ours, tensors, grads), expected)


@pytest.mark.parametrize("mean_dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_rounded_once(backend, device, mean_dtype):
    """The branches' gradient 257 is between two bf16 numbers; the mean's decides which results."""
    if backend in ("cpu", "reference"):
        pytest.skip("the library's convolution rounds too")
    weight = torch.zeros(8, 8, 1, 1)
    weight[0], weight[1] = 256, 1
    tensors = torch.ones(2, 8, 4, 4), torch.zeros(2, 8, 4, 4), weight
    grad, input, weight = (t.to(device, torch.bfloat16) for t in tensors)
    share = torch.tensor([[0.25], [-0.25]], device=device, dtype=mean_dtype)
    grad_mean = 16 * share.expand(2, 8)
    arguments = grad, input, [weight], [1], [True, False, False], grad_mean
    grad_input, _, _ = getattr(torch.ops.deeplab_fast, OP)(*arguments, backend=backend)
    assert (grad_input[0] == 258).all() and (grad_input[1] == 256).all()


@pytest.mark.parametrize("layout", ["expanded", "transposed", "sliced", "empty"])
def test_layouts_of_the_incoming_gradient_of_the_mean(backend, device, dtype, layout):
    shape = (0, 8, 3, 2) if layout == "empty" else (3, 24, 6, 5)
    tensors, (grad, grad_mean) = operands(dtype, device, shape)
    skip_if_unsupported(backend, OP, grad, tensors[0], tensors[1:], DILATIONS, [True] * 3)
    if layout == "expanded":
        grad_mean = grad_mean[:1, :1].expand_as(grad_mean)
    elif layout == "transposed":
        grad_mean = grad_mean.transpose(0, 1).contiguous().transpose(0, 1)
    elif layout == "sliced":
        grad_mean = grad_mean.repeat(1, 2, 1, 1)[:, ::2]
    with deeplab_fast.backend(backend):
        actual = gradients(ours, tensors, [grad, grad_mean])
        expected = gradients(ours, tensors, [grad, grad_mean.clone().contiguous()])
    assert all(map(torch.equal, actual, expected))


def test_one_of_the_outputs_alone(backend, device, dtype, ran):
    """An unused output has no gradient and causes no convolution."""
    tensors, grads = operands(dtype, device)
    leaves = [t.requires_grad_() for t in tensors]
    with deeplab_fast.backend(backend):
        only_features = torch.autograd.grad(ours(*leaves)[0], leaves, grads[0])
        expected = gradients(
            lambda x, *w: deeplab_fast.parallel_dilated_conv2d(x, w, None, DILATIONS),
            tensors,
            grads[0],
        )
        ran.clear()
        only_mean = torch.autograd.grad(ours(*leaves)[1], leaves, grads[1], allow_unused=True)
    assert all(map(torch.equal, only_features, expected))
    assert (OP, backend) not in ran
    share = (grads[1].float() / 30).to(dtype).expand_as(tensors[0])
    assert torch.equal(only_mean[0], share) and only_mean[1:] == (None, None, None)


@pytest.mark.parametrize("needed", [(1, 0, 0, 0), (0, 1, 1, 1), (0, 0, 1, 0), (1, 0, 0, 1)])
def test_only_needed_gradients_are_computed(backend, device, dtype, needed, monkeypatch):
    tensors, grads = operands(dtype, device)
    masks = []

    def spy(*arguments):
        masks.append(arguments[-1].output_mask)  # after a launch context, if there is one
        return right.run(*arguments)

    right = registry._kernels[OP][backend]
    monkeypatch.setitem(registry._kernels[OP], backend, right._replace(run=spy))
    leaves = [t.detach().requires_grad_(bool(n)) for t, n in zip(tensors, needed)]
    with deeplab_fast.backend(backend):
        torch.autograd.backward(ours(*leaves), grads)
        expected = gradients(ours, tensors, grads)
    assert masks[0] == [bool(needed[0]), any(needed[1:]), False]
    for leaf, e, n in zip(leaves, expected, needed):
        assert torch.equal(leaf.grad, e) if n else leaf.grad is None


def test_double_backward_is_an_error(backend, device, dtype):
    tensors, _ = operands(dtype, device)
    leaves = [t.requires_grad_() for t in tensors]
    with deeplab_fast.backend(backend):
        loss = sum(output.square().sum() for output in ours(*leaves))
        (grad,) = torch.autograd.grad(loss, leaves[0], create_graph=True)
        with pytest.raises(NotImplementedError, match="no double backward"):
            grad.sum().backward()


def test_gradcheck():
    tensors, _ = operands(torch.float64, shape=(2, 2, 3, 2))
    assert torch.autograd.gradcheck(ours, [t.requires_grad_() for t in tensors], fast_mode=True)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides_in_compiled_graphs(backend, device, dtype, layout):
    (input, *weights), (grad, grad_mean) = operands(dtype, device)
    input = with_layout(input, layout)
    ops = torch.ops.deeplab_fast
    gradient = grad, input, weights, DILATIONS, [True] * 3, grad_mean.flatten(1).float()
    for op, arguments in (
        (ops.parallel_dilated_conv2d_and_mean, (input, weights, DILATIONS)),
        (ops.parallel_dilated_conv2d_backward, gradient),
    ):
        actual = tree_leaves(op(*arguments, backend=backend))
        with FakeTensorMode(allow_non_fake_inputs=True):
            promised = tree_leaves(op(*arguments, backend=backend))
        described = [[(t.shape, t.stride(), t.dtype) for t in ts] for ts in (actual, promised)]
        assert described[0] == described[1]


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_opcheck(opcheck, backend, device, dtype, layout):
    (input, *weights), (grad, grad_mean) = operands(dtype, device)
    input, ops = with_layout(input, layout), torch.ops.deeplab_fast
    on = {"backend": backend}
    # A gradient is not differentiable, so that the tests of autograd do not apply.
    arguments = grad, input, weights, DILATIONS, [True] * 3, grad_mean.flatten(1).float()
    opcheck(ops.parallel_dilated_conv2d_backward, arguments, on)
    input, *weights = (t.detach().requires_grad_() for t in (input, *weights))
    opcheck(ops.parallel_dilated_conv2d_and_mean, (input, weights, DILATIONS), on)


def test_compile_and_export(backend, device, dtype):
    tensors, grads = operands(dtype, device)

    class Sum(torch.nn.Module):
        def forward(self, *tensors: Tensor) -> Tensor:
            output, mean = ours(*tensors)
            return (output * grads[0]).sum() + (mean * grads[1]).sum()

    def compute(function) -> list[Tensor]:
        leaves = [t.detach().requires_grad_() for t in tensors]
        loss = function(*leaves)
        return [loss.detach(), *torch.autograd.grad(loss, leaves)]

    torch._dynamo.reset()
    with deeplab_fast.backend(backend):
        expected = compute(Sum())
        actual = compute(torch.compile(Sum(), fullgraph=True, backend="aot_eager"))
        program = torch.export.export(Sum(), tuple(tensors), strict=False)
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(program.module()(*tensors), expected[0])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_autocast(dtype):
    """Dtypes of outputs and gradients are those of F.conv2d and nn.AdaptiveAvgPool2d."""
    for input_dtype in (torch.float32, dtype):
        (input, *weights), _ = operands(torch.float32)
        leaves = [t.requires_grad_() for t in (input.to(input_dtype), *weights)]
        with torch.autocast("cpu", dtype):
            outputs, peers = ours(*leaves), theirs(*leaves)
        assert [t.dtype for t in outputs] == [t.dtype for t in peers]
        torch.testing.assert_close(outputs, peers, rtol=2e-2, atol=2e-2)
        doubles = [t.detach().double().requires_grad_() for t in leaves]
        actual, peer, exact = (
            torch.autograd.grad([y.to(sum_dtype).square().sum() for y in ys], xs)
            for ys, xs, sum_dtype in (
                (outputs, leaves, torch.float32),
                (peers, leaves, torch.float32),
                (theirs(*doubles), doubles, torch.float64),
            )
        )
        for a, p, e in zip(actual, peer, exact):
            assert_as_accurate_as(a, p, e)


def test_bad_input():
    input, weights = torch.zeros(2, 4, 5, 5), [torch.zeros(3, 4, k, k) for k in (1, 3, 3)]
    with pytest.raises(ValueError, match="at least one branch"):
        parallel_dilated_conv2d_and_mean(input, [], [])
    with pytest.raises(TypeError, match="weights and biases: expected torch.float32"):
        parallel_dilated_conv2d_and_mean(input, [w.double() for w in weights], DILATIONS)
    backward = torch.ops.deeplab_fast.parallel_dilated_conv2d_backward
    arguments = torch.zeros(2, 9, 5, 5), input, weights, DILATIONS, [True] * 3
    for backend in ("cpu", "reference"):
        with pytest.raises(ValueError, match=r"^grad_mean: expected \(2, 4\), got \(2, 3\)$"):
            backward(*arguments, torch.zeros(2, 3), backend=backend)


# CUDA kernels, in the emulator.


@pytest.mark.parametrize("device_name", ["sm_86", "sm_90"])
@pytest.mark.parametrize("num_ctas", [1, 24])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_emulated_on_seeds(monkeypatch, dtype, num_ctas, device_name):
    """Split and whole sums, tiles of several images, more channels than a tile."""
    monkeypatch.setattr(emulator, "num_ctas", num_ctas)
    tensors, grads = operands(dtype, shape=(3, 136, 7, 5))
    tensors[0] = with_layout(tensors[0], "channels_last")
    results = []
    for seed in range(3):
        with deeplab_fast.backend("emulated"), machine(seed, device_name):
            results.append([*ours(*tensors), *gradients(ours, tensors, grads)])
    exact = *theirs(*doubles(tensors)), *gradients(theirs, doubles(tensors), doubles(grads))
    peers = *theirs(*tensors), *gradients(theirs, tensors, grads)
    for a, p, e in zip(results[0], peers, exact, strict=True):
        assert_as_accurate_as(a, p, e)
    for result in results[1:]:
        assert all(map(torch.equal, result, results[0]))


def test_emulated_tf32(tf32):
    tensors, grads = operands(torch.float32)
    with deeplab_fast.backend("emulated"):
        actual = gradients(ours, tensors, grads)
    exact = gradients(theirs, doubles(tensors), doubles(grads))
    peer = gradients(theirs, [t.half() for t in tensors], [t.half() for t in grads])
    for a, p, e in zip(actual, peer, exact, strict=True):  # both round to 11 bits
        assert_as_accurate_as(a, p.float(), e)


@pytest.mark.parametrize("device_name", ["sm_86", "sm_90"])
def test_emulated_input_gradient_is_one_launch_and_one_write(monkeypatch, device_name):
    """The gradient of the input is the only new tensor of its size."""
    monkeypatch.setattr(emulator, "num_ctas", 1)  # no sums to add
    (input, weight, *_), (grad, grad_mean) = operands(torch.bfloat16)
    input = with_layout(input, "channels_last")
    like_input, made = (input.shape, input.device), []

    class Made(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **kwargs or {})
            if isinstance(result, Tensor) and (result.shape, result.device) == like_input:
                made.append(str(function))
            return result

    mask, grad_mean = [True, False, False], grad_mean.flatten(1)
    arguments = grad[:, :16], input, [weight, weight], [1, 1], mask, grad_mean
    before = emulator.load().launch_counts()
    with Made(), machine(0, device_name):
        registry.run(OP, *arguments, backend="emulated")  # not as an opaque op
    after = emulator.load().launch_counts()
    launched = {name: n - before.get(name, 0) for name, n in after.items()}
    suffix = "_sm90" if device_name == "sm_90" else ""
    assert {k: n for k, n in launched.items() if n} == {f"dilated_conv2d_fwd{suffix}_kernel": 1}
    assert made == ["aten.empty_strided.default"]
