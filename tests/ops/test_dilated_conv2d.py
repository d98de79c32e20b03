"""dilated_conv2d and parallel_dilated_conv2d against F.conv2d and a float64 reference."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.utils._pytree import tree_leaves

import deeplab_fast
from deeplab_fast import (
    _C,
    dilated_conv2d,
    parallel_dilated_conv2d,
)
from deeplab_fast._native import work_lists
from deeplab_fast.backends import registry
from deeplab_fast.backends.cuda import depthwise_conv2d

from ..support import emulator
from ..support.backends import device_of
from ..support.cases import (
    CONVS,
    DTYPES,
    LAYOUTS,
    Conv,
    assert_as_accurate_as,
    operands,
    oracle_input,
    with_layout,
)
from ..support.emulator import machine
from ..support.unsupported import skip_if_unsupported, skip_without, unsupported_reason

OP = "dilated_conv2d"
BACKWARD = OP + "_backward"
PARALLEL = ([(1, 1), (3, 3), (3, 3), (5, 3)], [1, 2, 7, 3])


def same_conv2d(input: Tensor, weight: Tensor, bias: Tensor | None, dilation, groups: int = 1):
    input = oracle_input(input)
    return F.conv2d(input, weight, bias, padding="same", dilation=dilation, groups=groups)


def gradients(function, tensors: list[Tensor], grad_output: Tensor) -> list[Tensor]:
    leaves = [t.detach().requires_grad_() for t in tensors]
    return list(torch.autograd.grad(function(*leaves), leaves, grad_output))


@pytest.fixture
def dtype(backend: str) -> torch.dtype:
    """float32, or the first dtype that the backend's kernel takes."""
    X = torch.zeros(1, 8, 1, 1, device=device_of(backend))
    for dtype in DTYPES:
        x = X.to(dtype)
        if unsupported_reason(backend, OP, x, x, None, [1, 1], 1) is None:
            return dtype
    raise AssertionError(f"{backend} takes none of {DTYPES}")


def has_backward(backend: str) -> bool:
    return backend in registry.backends_of(BACKWARD)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CONVS, ids=str)
def test_forward(backend, device, ran, case: Conv, dtype, layout):
    input, weight, bias = operands(case, dtype, device)
    input = with_layout(input, layout)
    skip_if_unsupported(backend, OP, input, weight, bias, case.dilation, case.groups)
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
    skip_if_unsupported(backend, OP, input, weight, bias, case.dilation, case.groups)
    grad_output = torch.randn(case.N, case.K, case.H, case.W).to(device, dtype)
    arguments = case.dilation, case.groups, [True] * 3
    skip_if_unsupported(backend, BACKWARD, grad_output, input, weight, *arguments)

    def ours(input, weight, bias):
        return dilated_conv2d(input, weight, bias, case.dilation, case.groups)

    def theirs(input, weight, bias):
        return same_conv2d(input, weight, bias, case.dilation, case.groups)

    with deeplab_fast.backend(backend):
        actual = gradients(ours, [input, weight, bias], grad_output)
    assert ran == [(OP, backend), (BACKWARD, backend)]
    exact = gradients(theirs, [t.double() for t in (input, weight, bias)], grad_output.double())
    nchw, nhwc = (
        gradients(theirs, [with_layout(input, f), weight, bias], with_layout(grad_output, f))
        for f in ("contiguous", "channels_last")
    )
    for a, p, e, q in zip(actual, nchw, exact, nhwc, strict=True):
        assert_as_accurate_as(a, p, e, q)


def parallel_operands(
    device: str, dtype: torch.dtype, channels: int, out_channels: Sequence[int] = (3, 4, 5, 6)
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    input = torch.randn(2, channels, 9, 13).to(device, dtype)
    kernels, _ = PARALLEL
    weights = [
        torch.randn(k, channels, *kernel).to(device, dtype) / channels
        for k, kernel in zip(out_channels, kernels)
    ]
    return input, weights, [torch.randn(w.size(0)).to(device, dtype) for w in weights]


def parallel_conv2d(input: Tensor, weights, biases) -> Tensor:
    outputs = [
        same_conv2d(input, w, b, d) for w, b, d in zip(weights, biases, PARALLEL[1], strict=True)
    ]
    return torch.cat(outputs, dim=1)


@pytest.mark.parametrize("channels", [6, 40])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_parallel(backend, device, ran, dtype, layout, channels):
    input, weights, biases = parallel_operands(device, dtype, channels)
    input = with_layout(input, layout)
    skip_if_unsupported(backend, "parallel_" + OP, input, weights, biases, PARALLEL[1])
    with deeplab_fast.backend(backend):
        output = parallel_dilated_conv2d(input, weights, biases, PARALLEL[1])
    assert ran == [("parallel_" + OP, backend)]
    peer = parallel_conv2d(input, weights, biases)
    input, *rest = (t.double() for t in (input, *weights, *biases))
    assert_as_accurate_as(output, peer, parallel_conv2d(input, rest[:4], rest[4:]))


@pytest.mark.parametrize("channels", [(6, (3, 4, 5, 6)), (40, (24, 8, 16, 136))])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_parallel_backward(backend, device, ran, dtype, layout, channels):
    skip_without(backend, "parallel_" + BACKWARD)
    input, weights, biases = parallel_operands(device, dtype, *channels)
    input = with_layout(input, layout)
    grad_output = torch.randn(2, sum(channels[1]), 9, 13).to(device, dtype)
    arguments = PARALLEL[1], [True] * 3
    skip_if_unsupported(backend, "parallel_" + BACKWARD, grad_output, input, weights, *arguments)
    tensors = [input, *weights, *biases]

    def ours(input, *rest):
        return parallel_dilated_conv2d(input, rest[:4], rest[4:], PARALLEL[1])

    def theirs(input, *rest):
        return parallel_conv2d(input, rest[:4], rest[4:])

    with deeplab_fast.backend(backend):
        actual = gradients(ours, tensors, grad_output)
    assert {pair[1] for pair in ran} == {backend}
    exact = gradients(theirs, [t.double() for t in tensors], grad_output.double())
    for a, p, e in zip(actual, gradients(theirs, tensors, grad_output), exact, strict=True):
        assert_as_accurate_as(a, p, e)


def test_parallel_without_biases(backend, device, dtype):
    input, weights, _ = parallel_operands(device, dtype, 8)
    zeros = [torch.zeros(w.size(0), device=device, dtype=dtype) for w in weights]
    with deeplab_fast.backend(backend):
        output = parallel_dilated_conv2d(input, weights, None, PARALLEL[1])
    peer = parallel_conv2d(input, weights, zeros)
    input, *rest = (t.double() for t in (input, *weights, *zeros))
    assert_as_accurate_as(output, peer, parallel_conv2d(input, rest[:4], rest[4:]))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_memory_format_is_kept(backend, device, dtype, layout):
    input, weight, _ = operands(Conv(2, 8, 16, 9, 7), dtype, device)
    x = with_layout(input, layout).detach().requires_grad_()
    with deeplab_fast.backend(backend):
        y = dilated_conv2d(x, weight)
        p = parallel_dilated_conv2d(x, [weight, weight], None, [1, 2])
        tensors = [y, p]
        if has_backward(backend):
            (y.sum() + p.sum()).backward()
            tensors.append(x.grad)
    for t in tensors:
        torch_format = getattr(torch, layout + "_format", torch.channels_last)
        assert t.is_contiguous(memory_format=torch_format)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("grad_layout", LAYOUTS)
def test_strides_are_those_that_compiled_graphs_rely_on(
    backend, device, dtype, layout, grad_layout
):
    """Every output of every op has the strides that the fake promised."""
    input, weight, bias = operands(Conv(2, 8, 16, 7, 5), dtype, device)
    grad = with_layout(torch.randn(2, 16, 7, 5).to(device, dtype), grad_layout)
    input = with_layout(input, layout)
    ops, mask = torch.ops.deeplab_fast, [True, True, True]
    calls = [
        (ops.dilated_conv2d, (input, weight, bias, [2, 2], 1)),
        (ops.dilated_conv2d_backward, (grad, input, weight, [2, 2], 1, mask)),
        (ops.parallel_dilated_conv2d, (input, [weight], [bias], [2])),
        (ops.parallel_dilated_conv2d_backward, (grad, input, [weight], [2], mask)),
    ]
    for op, arguments in calls if has_backward(backend) else calls[::2]:
        actual = tree_leaves(op(*arguments, backend=backend))
        with FakeTensorMode(allow_non_fake_inputs=True):
            promised = tree_leaves(op(*arguments, backend=backend))
        assert [t.stride() for t in actual] == [t.stride() for t in promised]


def test_only_needed_gradients_are_computed(backend, device, dtype):
    skip_without(backend, BACKWARD)
    input, weight, bias = operands(Conv(1, 8, 8, 6, 6), dtype, device)
    with deeplab_fast.backend(backend):
        weight.requires_grad_()
        dilated_conv2d(input, weight, bias).sum().backward()
        assert weight.grad is not None and input.grad is None and bias.grad is None
        biases = [bias.clone().requires_grad_(), bias.clone()]
        parallel_dilated_conv2d(input, [weight, weight], biases, [1, 2]).sum().backward()
        assert biases[0].grad is not None and biases[1].grad is None and input.grad is None


def test_bitwise_repeatable(backend, device, dtype):
    input, weight, bias = operands(Conv(2, 16, 16, 17, 19, (3, 3), 4), dtype, device)
    grad_output = torch.randn(2, 16, 17, 19).to(device, dtype)

    def ours(input, weight, bias):
        return dilated_conv2d(input, weight, bias, 4)

    def run():
        output = ours(input, weight, bias)
        if not has_backward(backend):
            return [output]
        return [output, *gradients(ours, [input, weight, bias], grad_output)]

    with deeplab_fast.backend(backend):
        first = run()
        for _ in range(3):
            for a, b in zip(run(), first, strict=True):
                assert torch.equal(a, b)


def test_double_backward_is_an_error(backend, device, dtype):
    skip_without(backend, BACKWARD)
    input, weight, bias = operands(Conv(1, 8, 8, 6, 6), dtype, device)
    input.requires_grad_()
    with deeplab_fast.backend(backend):
        for y in (
            dilated_conv2d(input, weight),
            parallel_dilated_conv2d(input, [weight], None, [1]),
        ):
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
        lambda x, *rest: parallel_dilated_conv2d(x, rest[:2], rest[2:], [1, 2]),
        (input, *weights, *biases),
    )


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_opcheck(opcheck, backend, device, dtype, layout):
    input, weight, bias = operands(Conv(2, 8, 16, 7, 5), dtype, device)
    input = with_layout(input, layout)
    for t in (input, weight, bias):
        t.requires_grad_(has_backward(backend))
    ops = torch.ops.deeplab_fast
    opcheck(ops.dilated_conv2d, (input, weight, bias, [2, 2], 1), {"backend": backend})
    opcheck(
        ops.parallel_dilated_conv2d,
        (input, [weight, weight], [bias, bias], [1, 2]),
        {"backend": backend},
    )
    # A gradient is not differentiable, so that the tests of autograd do not apply.
    grad_output = torch.randn(2, 32, 7, 5).to(device, dtype)
    if has_backward(backend):
        opcheck(
            ops.parallel_dilated_conv2d_backward,
            (grad_output, input.detach(), [weight.detach()] * 2, [1, 2], [True] * 3),
            {"backend": backend},
        )


def test_compile_fullgraph(backend, device, dtype, ran):
    input, weight, bias = operands(Conv(2, 8, 16, 7, 5), dtype, device)
    input.requires_grad_(has_backward(backend))

    def inside(input):
        with deeplab_fast.backend(backend):
            return dilated_conv2d(input, weight, bias, 2) * 2

    def outside(input):
        return dilated_conv2d(input, weight, bias, 2) * 2

    # Not PyTorch's convolution, which may round to 16 bits before it adds the bias, as cuDNN does.
    expected = inside(input)
    for function in (inside, outside):
        ran.clear()
        torch._dynamo.reset()
        compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
        with deeplab_fast.backend(backend):
            output = compiled(input)
        torch.testing.assert_close(output, expected)
        if not has_backward(backend):
            assert ran == [(OP, backend)]
            continue
        (grad,) = torch.autograd.grad(output.sum(), input)
        assert ran == [(OP, backend), (BACKWARD, backend)]
        (expected_grad,) = torch.autograd.grad(expected.sum(), input, retain_graph=True)
        torch.testing.assert_close(grad, expected_grad)


def test_export(backend, device, dtype):
    input, weight, bias = operands(Conv(2, 8, 8, 7, 5), dtype, device)
    second = torch.randn(3, 8, 3, 3).to(device, dtype)

    class Branches(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            y = dilated_conv2d(x, weight, bias)
            return parallel_dilated_conv2d(y, [second, second], None, [1, 2])

    with deeplab_fast.backend(backend):
        module = Branches()
        program = torch.export.export(module, (input,), strict=False)
        torch.testing.assert_close(program.module()(input), module(input))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(backend, device, dtype):
    input, weight, bias = operands(Conv(2, 8, 16, 7, 5), torch.float32, device)
    weight.requires_grad_(has_backward(backend))
    with deeplab_fast.backend(backend), torch.autocast(device, dtype):
        output = dilated_conv2d(input, weight, bias, 2)
        parallel = parallel_dilated_conv2d(input, [weight], [bias], [2])
        loss = output.float().sum()
    assert output.dtype == parallel.dtype == dtype
    peer = same_conv2d(input.to(dtype), weight.to(dtype), bias.to(dtype), 2)
    exact = same_conv2d(input.double(), weight.double(), bias.double(), 2)
    assert_as_accurate_as(output, peer, exact)
    if has_backward(backend):
        loss.backward()
        assert weight.grad.dtype == torch.float32


def test_automatic_choice(ran):
    dilated_conv2d(torch.randn(1, 4, 5, 5), torch.randn(4, 4, 3, 3))
    assert ran == [(OP, "cpu")]


def test_an_automatic_backward_needs_no_kernel_of_the_forward(monkeypatch, ran):
    monkeypatch.setitem(registry._AUTOMATIC, "cpu", ("emulated", "cpu"))
    monkeypatch.delitem(registry._kernels[BACKWARD], "emulated")
    x = torch.randn(1, 8, 5, 5).bfloat16().requires_grad_()
    dilated_conv2d(x, torch.ones(4, 8, 3, 3).bfloat16()).sum().backward()
    assert ran == [(OP, "emulated"), (BACKWARD, "cpu")]


def test_a_forced_backward_without_a_kernel_says_so(monkeypatch):
    monkeypatch.delitem(registry._kernels[BACKWARD], "emulated")
    x = torch.randn(1, 8, 5, 5).bfloat16().requires_grad_()
    message = "backend 'emulated' cannot run dilated_conv2d_backward on this input: it has no"
    with deeplab_fast.backend("emulated"), pytest.raises(RuntimeError, match=message):
        dilated_conv2d(x, torch.ones(4, 8, 3, 3).bfloat16()).sum().backward()


# The CUDA kernel, in the emulator.

# Of four: a split sum, channels and pixels past several ends, branches at odd channels, one image
# across tiles.
SEEDED = [
    ((1, 136, 9, 9), [(133, 3, 3)], [2]),
    ((2, 40, 11, 13), [(21, 3, 3), (3, 1, 1), (70, 3, 5)], [3, 1, 20]),
    ((3, 8, 7, 19), [(4, 5, 5)], [2]),
]


@pytest.mark.parametrize("num_workers", [1, 24])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("shape", "kernels", "rates"), SEEDED)
def test_emulated_agrees_on_seeds(monkeypatch, shape, kernels, rates, dtype, num_workers):
    monkeypatch.setattr(emulator, "num_ctas", num_workers)
    input = torch.randn(shape).to(dtype).contiguous(memory_format=torch.channels_last)
    scale = (9 * shape[1]) ** -0.5
    weights = [(torch.randn(k, shape[1], r, s) * scale).to(dtype) for k, r, s in kernels]
    biases = [torch.randn(k).to(dtype) for k, _, _ in kernels]

    def reference(input, weights, biases):
        outputs = [same_conv2d(input, *args) for args in zip(weights, biases, rates, strict=True)]
        return torch.cat(outputs, dim=1)

    outputs = []
    for seed in (0, 1, 2, 3):
        with deeplab_fast.backend("emulated"), machine(seed, "sm_86"):
            outputs.append(parallel_dilated_conv2d(input, weights, biases, rates))
    exact = reference(input.double(), [w.double() for w in weights], [b.double() for b in biases])
    assert_as_accurate_as(outputs[0], reference(input, weights, biases), exact)
    for output in outputs[1:]:
        assert torch.equal(output, outputs[0])


def test_emulated_pipeline_on_more_seeds():
    """One thread block through several rounds of its pipeline."""
    input, weight, bias = operands(Conv(1, 40, 8, 5, 5, (3, 3), 2), torch.bfloat16, "cpu")
    outputs = []
    for seed in range(6):
        with deeplab_fast.backend("emulated"), machine(seed):
            outputs.append(dilated_conv2d(input, weight, bias, 2))
    assert all(torch.equal(output, outputs[0]) for output in outputs[1:])


@pytest.mark.parametrize("size", [(1, 1), (5, 13)], ids=str)
def test_emulated_last_row_of_a_warp(size):
    """The only pixel of the first warp of a tile, and of the second, which has the next 64."""
    input, weight, bias = operands(Conv(1, 8, 8, *size), torch.bfloat16, "cpu")
    with deeplab_fast.backend("emulated"):
        output = dilated_conv2d(input, weight, bias)
    exact = same_conv2d(input.double(), weight.double(), bias.double(), 1)
    assert_as_accurate_as(output, same_conv2d(input, weight, bias, 1), exact)


def test_emulated_splits_sums():
    """Else the tests above would leave out the kernel that adds partial sums."""
    (N, C, H, W), [(K, R, S)], [rate] = SEEDED[0]
    plan = [
        work_lists.conv_work_list(
            _C.schedule.forward_tiles,
            (N, H, W),
            ((R, S, rate, rate),),
            work_lists.k_iters_per_tap(C, torch.bfloat16),
            (K,),
            torch.device("cpu"),
            num_workers,
        ).num_slots
        for num_workers in (1, 24)
    ]
    assert plan[0] == 0 and plan[1] > 2


@pytest.mark.parametrize("offset", [1, 4, 8])
def test_emulated_takes_unaligned_storage(offset):
    def shifted(tensor: Tensor) -> Tensor:
        memory = tensor.permute(0, 2, 3, 1)
        buffer = torch.empty(memory.numel() + offset, dtype=tensor.dtype)[offset:]
        return buffer.view(memory.shape).copy_(memory).permute(0, 3, 1, 2)

    input, weight, bias = operands(Conv(2, 16, 6, 7, 5, (3, 3), 2), torch.bfloat16, "cpu")
    with deeplab_fast.backend("emulated"):
        expected = dilated_conv2d(input, weight, bias, 2)
        actual = dilated_conv2d(shifted(input), shifted(weight), bias, 2)
    assert torch.equal(actual, expected)


def test_emulated_sees_no_padding():
    """NaN and Inf reach the pixels whose taps read them, and no other."""
    input, weight, _ = operands(Conv(2, 8, 3, 15, 17, (3, 3), 6), torch.bfloat16, "cpu")
    input[0, 3, 0, 0] = float("nan")
    input[1, :, 14, 8] = float("inf")
    with deeplab_fast.backend("emulated"):
        output = dilated_conv2d(input, weight, dilation=6)
    expected = same_conv2d(input.float(), weight.float(), None, 6)
    assert torch.equal(output.isfinite(), expected.isfinite())


def test_emulated_takes_any_rate():
    input, weight, bias = operands(Conv(1, 8, 8, 6, 7), torch.bfloat16, "cpu")
    centre = weight[:, :, 1:2, 1:2]
    with deeplab_fast.backend("emulated"):
        expected = dilated_conv2d(input, centre, bias)
        assert torch.equal(dilated_conv2d(input, weight, bias, 2**40), expected)


@pytest.mark.parametrize(
    ("case", "dtype", "reason"),
    [
        (Conv(1, 8, 8, 5, 5), torch.float64, "float32, float16 and bfloat16, not torch.float64"),
        (
            Conv(1, 8, 8, 5, 5),
            torch.float32,
            "computes float32 as tf32, which torch.*does not allow",
        ),
        (Conv(1, 16, 16, 5, 5, groups=2), torch.bfloat16, "not support groups, got 2"),
        (Conv(1, 12, 8, 5, 5), torch.bfloat16, "a multiple of 8 input channels, got 12"),
        (Conv(0, 8, 8, 5, 5), torch.bfloat16, "the input or a weight is empty"),
        (Conv(1, 8, 1, 5, 5, (33, 33)), torch.bfloat16, "at most 1024 taps"),
        (Conv(1, 8, 16, 5, 5, groups=8), torch.float32, "as input channels, got 16 and 8"),
        (Conv(1, 8, 8, 5, 5, (19, 21), groups=8), torch.float32, "at most 361 taps"),
        (Conv(0, 8, 8, 5, 5, groups=8), torch.float32, "the input or a weight is empty"),
        (Conv(1, 8, 8, 5, 5, groups=8), torch.float64, "float16 and bfloat16, not torch.float64"),
    ],
    ids=str,
)
def test_emulated_refuses(case: Conv, dtype, reason):
    input, weight, bias = operands(case, dtype, "cpu")
    message = f"backend 'emulated' cannot run dilated_conv2d on this input: .*{reason}"
    with deeplab_fast.backend("emulated"), pytest.raises(RuntimeError, match=message):
        dilated_conv2d(input, weight, bias, case.dilation, case.groups)


def test_emulated_refuses_many_branches():
    x, w = torch.zeros(1, 8, 5, 5).bfloat16(), torch.zeros(8, 8, 1, 1).bfloat16()
    with deeplab_fast.backend("emulated"):
        assert parallel_dilated_conv2d(x, [w] * 8, None, [1] * 8).shape == (1, 64, 5, 5)
        with pytest.raises(RuntimeError, match="at most 8 branches, got 9"):
            parallel_dilated_conv2d(x, [w] * 9, None, [1] * 9)


# The depthwise CUDA kernels, in the emulator.

DEPTHWISE = [
    Conv(2, 16, 16, 35, 6, (3, 3), (2, 1), 16),
    Conv(1, 136, 136, 9, 5, (3, 3), (1, 2), 136),
    Conv(1, 8, 8, 37, 9, (5, 5), (7, 3), 8),
    Conv(1, 13, 13, 19, 7, (5, 5), (3, 2), 13),
    Conv(1, 24, 24, 19, 7, (7, 3), (3, 2), 24),
    Conv(1, 8, 8, 5, 5, (19, 19), 1, 8),
]


def set_strip_rows(monkeypatch, rows: int) -> None:
    monkeypatch.setattr(depthwise_conv2d, "_strip_rows", lambda *_: rows)
    monkeypatch.setattr(depthwise_conv2d, "_fixed_strip_rows", lambda _: rows)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", DEPTHWISE, ids=str)
def test_emulated_depthwise_agrees_on_seeds_and_strips(monkeypatch, case, dtype):
    input, weight, bias = operands(case, dtype, "cpu")
    outputs = []
    for seed, rows in enumerate((4, 8, 16, 1, 2, 3)):
        set_strip_rows(monkeypatch, rows)
        with deeplab_fast.backend("emulated"), machine(seed, "sm_86"):
            outputs.append(dilated_conv2d(input, weight, bias, case.dilation, case.groups))
    peer = same_conv2d(input, weight, bias, case.dilation, case.groups)
    exact = same_conv2d(*(t.double() for t in (input, weight, bias)), case.dilation, case.groups)
    assert_as_accurate_as(outputs[0], peer, exact)
    for output in outputs[1:]:
        assert torch.equal(output, outputs[0])


@pytest.mark.parametrize("num_parts", [1, 3, 50])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", DEPTHWISE[:5], ids=str)
def test_emulated_depthwise_gradients_in_parts(monkeypatch, case, dtype, num_parts):
    """Parts with much, little and nothing to add."""
    tensors = operands(case, dtype, "cpu")
    elements = tensors[0].numel()
    monkeypatch.setattr(depthwise_conv2d, "_ELEMENTS_PER_PART", elements // num_parts)
    grad_output = torch.randn(case.N, case.K, case.H, case.W).to(dtype)

    def ours(*tensors):
        return dilated_conv2d(*tensors, case.dilation, case.groups)

    def theirs(*tensors):
        return same_conv2d(*tensors, case.dilation, case.groups)

    results = []
    for seed in (0, 1, 2):
        with deeplab_fast.backend("emulated"), machine(seed, "sm_86"):
            results.append(gradients(ours, tensors, grad_output))
    exact = gradients(theirs, [t.double() for t in tensors], grad_output.double())
    for a, p, e in zip(results[0], gradients(theirs, tensors, grad_output), exact, strict=True):
        assert_as_accurate_as(a, p, e)
    for others in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(others, results[0], strict=True))


def test_emulated_depthwise_computes_only_needed_gradients(ran):
    tensors = operands(Conv(2, 8, 8, 7, 5, (3, 3), 2, 8), torch.float32, "cpu")
    full = None
    for mask in ((1, 1, 1), (1, 0, 0), (0, 1, 0), (0, 0, 1)):
        leaves = [t.clone().requires_grad_(bool(m)) for t, m in zip(tensors, mask)]
        with deeplab_fast.backend("emulated"):
            dilated_conv2d(*leaves, 2, 8).sum().backward()  # an expanded gradient
        grads = [leaf.grad for leaf in leaves]
        full = full or grads
        for grad, other, needed in zip(grads, full, mask):
            assert torch.equal(grad, other) if needed else grad is None
    assert ran == [(OP, "emulated"), (BACKWARD, "emulated")] * 4


@pytest.mark.parametrize("kernel", [(3, 3), (5, 5), (3, 5)])
def test_emulated_depthwise_gradients_see_no_padding(kernel):
    """An infinite input reaches the taps that meet it, and no other."""
    input, weight, bias = operands(Conv(1, 8, 8, 19, 9, kernel, 2, 8), torch.float32, "cpu")
    input[0, 3, 0, 0] = float("inf")
    input[0, 4, 18, 8] = float("nan")
    weight.requires_grad_()
    with deeplab_fast.backend("emulated"):
        dilated_conv2d(input, weight, bias, 2, 8).sum().backward()
    (expected,) = torch.autograd.grad(same_conv2d(input, weight, bias, 2, 8).sum(), weight)
    assert torch.equal(weight.grad.isfinite(), expected.isfinite())
    assert 0 < expected[3:5].isfinite().sum() < expected[3:5].numel()


@pytest.mark.parametrize("kernel", [(3, 3), (5, 5), (3, 5)])
@pytest.mark.parametrize("offset", [1, 4])
def test_emulated_depthwise_takes_unaligned_storage(kernel, offset):
    def shifted(tensor: Tensor) -> Tensor:
        buffer = torch.empty(tensor.numel() + offset, dtype=tensor.dtype)[offset:]
        return buffer.as_strided(tensor.shape, tensor.stride()).copy_(tensor)

    input, weight, bias = operands(Conv(2, 16, 16, 7, 5, kernel, 2, 16), torch.bfloat16, "cpu")
    input = with_layout(input, "channels_last")
    with deeplab_fast.backend("emulated"):
        expected = dilated_conv2d(input, weight, bias, 2, 16)
        actual = dilated_conv2d(shifted(input), shifted(weight), shifted(bias), 2, 16)
    assert torch.equal(actual, expected)


@pytest.mark.parametrize("kernel", [(3, 3), (5, 5), (3, 5)])
def test_emulated_depthwise_sees_no_padding_and_no_other_channel(kernel):
    input, weight, _ = operands(Conv(2, 16, 16, 15, 17, kernel, 6, 16), torch.bfloat16, "cpu")
    input[0, 3, 0, 0] = float("nan")
    input[1, 7, 14, 8] = float("inf")
    with deeplab_fast.backend("emulated"):
        output = dilated_conv2d(input, weight, dilation=6, groups=16)
    expected = same_conv2d(input.float(), weight.float(), None, 6, 16)
    assert torch.equal(output.isfinite(), expected.isfinite())


def test_emulated_depthwise_takes_any_rate():
    input, weight, bias = operands(Conv(1, 8, 8, 6, 7, groups=8), torch.float32, "cpu")
    with deeplab_fast.backend("emulated"):
        expected = dilated_conv2d(input, weight[:, :, 1:2, 1:2], bias, groups=8)
        assert torch.equal(dilated_conv2d(input, weight, bias, 2**40, 8), expected)


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
        parallel_dilated_conv2d(X, [], None, [])
    with pytest.raises(ValueError, match="2 weights, 1 dilations, 0 biases"):
        parallel_dilated_conv2d(X, [W, W], None, [1])
    with pytest.raises(ValueError, match="1 biases"):
        parallel_dilated_conv2d(X, [W, W], [torch.zeros(6)], [1, 2])
