"""Launch plans: made once for all calls of the same shapes, and anew where a call differs."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import itertools
import re
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import deeplab_fast
from deeplab_fast import _C
from deeplab_fast._native.memory_format import aligned_rows
from deeplab_fast.backends import registry
from deeplab_fast.ops.fused_conv2d import fused_conv2d, fused_conv2d_add_

from ..support.backends import set_tf32
from ..support.emulator import machine


@pytest.fixture
def plans(monkeypatch) -> list[str]:
    """The ops for which a plan is made during the test."""
    made: list[str] = []
    make = registry._make_plan

    def recorded(op: str, *arguments: Any) -> registry.Plan:
        made.append(op)
        return make(op, *arguments)

    monkeypatch.setattr(registry, "_make_plan", recorded)
    return made


X, W = torch.rand(1, 4, 5, 6), torch.rand(4, 4, 3, 3)


def convolve(x: Tensor = X, weight: Tensor = W, **options: Any) -> Tensor:
    return deeplab_fast.dilated_conv2d(x, weight, **options)


def test_one_plan_for_all_calls_of_the_same_shapes(plans):
    convolve()
    for x in (X, X.clone(), torch.rand(1, 4, 5, 6)):
        torch.testing.assert_close(convolve(x), torch.nn.functional.conv2d(x, W, padding=1))
    assert plans == ["dilated_conv2d"]


def nhwc(tensor: Tensor) -> Tensor:
    return tensor.contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    "other",
    [
        {"x": torch.rand(2, 4, 5, 6)},
        {"x": torch.rand(1, 4, 6, 5)},
        {"x": nhwc(X)},
        {"x": X.double(), "weight": W.double()},
        {"weight": torch.rand(8, 4, 3, 3)},
        {"weight": torch.rand(4, 4, 3, 1)},
        {"weight": nhwc(W)},
        {"weight": torch.rand(4, 2, 3, 3), "groups": 2},
        {"bias": torch.rand(4)},
        {"dilation": 2},
        {"dilation": (1, 2)},
    ],
)
def test_another_plan_for_another_call(plans, other):
    convolve()
    convolve(**other)
    convolve()
    assert plans == ["dilated_conv2d"] * 2


def test_another_plan_for_another_backend_or_setting(plans):
    for _ in range(2):
        with deeplab_fast.backend("reference"):
            convolve()
        with deeplab_fast.backend("cpu"):
            convolve()
        convolve()
    assert len(plans) == 3


@pytest.mark.parametrize("setting", ["deterministic", "benchmark", "tf32"])
def test_another_plan_for_another_global_setting(plans, setting, monkeypatch):
    convolve()
    if setting == "deterministic":
        torch.use_deterministic_algorithms(False)
    elif setting == "benchmark":
        monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    else:
        set_tf32(True)
    convolve()
    assert len(plans) == 2


def test_no_plan_is_kept_while_a_graph_is_captured(plans, monkeypatch):
    monkeypatch.setattr(registry, "is_capturing", lambda: True)
    convolve(), convolve()
    monkeypatch.setattr(registry, "is_capturing", lambda: False)
    convolve(), convolve()
    assert len(plans) == 3


def test_replaced_kernels_are_used_once_plans_are_forgotten(monkeypatch):
    convolve()
    zeros = registry.Kernel(lambda arguments: torch.zeros(1), lambda arguments: None)
    monkeypatch.setitem(registry._kernels["dilated_conv2d"], "cpu", zeros)
    assert convolve().numel() > 1
    registry.forget_plans()
    assert convolve().numel() == 1


def test_wrong_shapes_are_an_error_at_every_call(plans):
    for _ in range(2):
        with pytest.raises(ValueError, match="^weight: expected"):
            convolve(weight=torch.rand(4, 3, 3, 3))
        with pytest.raises(ValueError, match="^weight: expected"):  # without the public function
            torch.ops.deeplab_fast.dilated_conv2d(X, torch.rand(4, 3, 3, 3), None, [1, 1], 1)
    assert len(plans) == 4


BAD_GRADIENTS = {
    "grad_output": lambda ops: ops.dilated_conv2d_backward(X[..., 1:], X, W, [1, 1], 1, [True] * 3),
    "weight": lambda ops: ops.dilated_conv2d_backward(X, X, W[:, 1:], [1, 1], 1, [True] * 3),
    "grad_output: expected (1, 8, 5, 6)": lambda ops: ops.parallel_dilated_conv2d_backward(
        X, X, [W, W], [1, 2], [True] * 3
    ),
    "grad_mean": lambda ops: ops.parallel_dilated_conv2d_backward(
        X, X, [W], [1], [True] * 3, torch.zeros(1, 3)
    ),
}


@pytest.mark.parametrize("message", BAD_GRADIENTS)
def test_gradients_that_do_not_fit_are_an_error(message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        BAD_GRADIENTS[message](torch.ops.deeplab_fast)


def operands(dtype: torch.dtype = torch.bfloat16) -> list[Tensor]:
    """Input, weight and bias that kernels read without a copy."""
    x, weight = torch.randint(-2, 3, (1, 8, 4, 5)), torch.randint(-2, 3, (8, 8, 3, 3))
    bias = torch.randint(-2, 3, (8,))
    return [nhwc(x.to(dtype)), nhwc(weight.to(dtype)), bias.to(dtype)]


def shifted(tensor: Tensor) -> Tensor:
    """Copy of the tensor, in its memory format, that is not aligned to 16 bytes."""
    memory = tensor.new_empty(tensor.numel() + 1)[1:]
    return memory.as_strided(tensor.shape, tensor.stride(), 1).copy_(tensor)


GEOMETRY = (1, 1), (1, 1), (1, 1), 1, "relu"


@pytest.mark.parametrize("device", ["sm_80", "sm_90"])
@pytest.mark.parametrize("moved", range(3))
def test_a_plan_reads_the_tensors_of_each_call(device, moved):
    """Addresses and their alignment change from call to call."""
    first = operands()
    with machine(0, device), deeplab_fast.backend("emulated"):
        fused_conv2d(*first, *GEOMETRY)
        for place in (Tensor.clone, shifted, lambda t: t):
            tensors = operands()
            tensors[moved] = place(tensors[moved])
            output = fused_conv2d(*tensors, *GEOMETRY)
            x, weight, bias = (t.double() for t in tensors)
            expected = torch.nn.functional.conv2d(x, weight, bias, padding=1).relu()
            assert torch.equal(output, expected.bfloat16())
            assert output.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("dilation", [0, -1])
@pytest.mark.parametrize("groups", [1, 8])
def test_the_kernels_refuse_dilations_that_are_not_positive(groups, dilation):
    """The public functions refuse them too, but the ops themselves can be called."""
    x, weight, bias = operands()
    arguments = x, weight[:, : 8 // groups], bias, [dilation, dilation], groups
    with machine(), pytest.raises(ValueError, match="^dilation: expected at least 1"):
        torch.ops.deeplab_fast.dilated_conv2d(*arguments, backend="emulated")


def rows(first: int, distance: int) -> Tensor:
    """Weight [8, 16, 1, 1] whose rows begin ``distance`` elements after each other in memory."""
    memory = torch.randint(-2, 3, (8 * 48,)).bfloat16()
    return memory.as_strided((8, 16, 1, 1), (distance, 1, 1, 1), first)


POINTWISE = (1, 1), (0, 0), (1, 1), 1
ZEROS, NO_POOL = torch.zeros(8).bfloat16(), torch.zeros(8, 16, 1, 1).bfloat16()
FIRST_8 = torch.eye(8, 16).bfloat16()[:, :, None, None]  # without the pooled channels


@pytest.mark.parametrize("device", ["sm_80", "sm_90"])
@pytest.mark.parametrize("offsets", [(16, 17), (17, 16)])
@pytest.mark.parametrize(
    "convolve",
    [
        lambda x, w: deeplab_fast.dilated_conv2d(x, w),
        lambda x, w: deeplab_fast.parallel_dilated_conv2d(x, [w], None, [1]),
        lambda x, w: fused_conv2d(x, w, ZEROS, *POINTWISE, "none"),
        lambda x, w: fused_conv2d_add_(
            nhwc(torch.zeros_like(x[:, :8])), x, w, ZEROS, *POINTWISE, "none"
        ),
        lambda x, w: deeplab_fast.aspp(x, [w], [ZEROS], [1], NO_POOL, ZEROS, FIRST_8, ZEROS),
        lambda x, w: deeplab_fast.aspp(x, [FIRST_8], [ZEROS], [1], NO_POOL, ZEROS, w, ZEROS),
    ],
)
def test_the_distance_of_rows_does_not_depend_on_their_alignment(convolve, device, offsets):
    """The rows of both weights are parts of longer ones. Offset 16 is aligned, 17 is not."""
    x = nhwc(torch.randint(-2, 3, (1, 16, 4, 5)).bfloat16())
    with machine(0, device):
        for weight in (rows(offset, 48) for offset in offsets):
            with deeplab_fast.backend("reference"):
                expected = convolve(x, weight)
            with deeplab_fast.backend("emulated"):
                assert torch.equal(convolve(x, weight), expected)


@pytest.mark.parametrize("distance", [0, 8])
def test_rows_that_overlap_are_copied(distance):
    weight = rows(0, distance)
    copy = aligned_rows(weight)
    assert torch.equal(copy, weight)
    assert copy.stride(0) == 16


def test_a_plan_keeps_no_tensor_of_a_call():
    x, weight, bias = operands()
    watched = [weakref.ref(t) for t in (x, weight, bias)]
    with machine(), deeplab_fast.backend("emulated"):
        fused_conv2d(x, weight, bias, *GEOMETRY)
        del x, weight, bias
        gc.collect()
        assert all(ref() is None for ref in watched)


@dataclasses.dataclass
class Context:
    stream: int = 0

    def _replace(self, stream: int) -> Context:
        return Context(stream)


@pytest.mark.parametrize("is_current", [False, True])
@pytest.mark.parametrize("makes_plan", [False, True])
def test_calls_are_launched_on_the_stream_of_their_device(monkeypatch, makes_plan, is_current):
    """The stream is asked for, and the kernel is launched, while the device is the current one."""
    log: list[str] = []

    @contextlib.contextmanager
    def guard() -> Iterator[None]:
        log.append("enter")
        yield
        log.append("exit")

    def stream() -> int:
        log.append("stream")
        return 7

    def plan(context: Context, arguments: Any) -> Any:
        log.append("plan")
        return lambda stream, arguments: log.append(f"launch on {stream}")

    def launch(context: Context, arguments: Any) -> None:
        log.append(f"launch on {context.stream}")

    target = registry.Target(Context(), stream, (lambda: None) if is_current else guard)
    backend = registry.Backend(lambda device_type: None, lambda device: target, None)
    kernel = registry.Kernel(plan if makes_plan else launch, lambda arguments: None, makes_plan)
    monkeypatch.setitem(registry._backends, "fake", backend)
    monkeypatch.setitem(registry._kernels["dilated_conv2d"], "fake", kernel)
    launched = ["stream", "launch on 7"]
    for steps in ([["plan"], launched] if makes_plan else [launched], [launched]):
        log.clear()
        registry.run("dilated_conv2d", X, W, None, [1, 1], 1, backend="fake")
        guarded = steps if is_current else [["enter", *step, "exit"] for step in steps]
        assert log == list(itertools.chain.from_iterable(guarded))


# Signatures.


def signature(*arguments: Any) -> bytes:
    return _C.call_signature(arguments, torch.device("cpu"))


def test_signatures_of_different_arguments_differ():
    values = [
        (), (None,), (True,), (False,), (1,), (0,), (-1,), (2**40,), (1.0,), (0.5,), ("",), ("1",),
        ([],), ([1],), ([1, 2],), ([[1], 2],), ([1], 2), (1, 2), ((1, 2), 3), (1, (2, 3)),
        ("a", "bc"), ("ab", "c"), (torch.float16,), (torch.uint8,), ([X],), (X,), (X, None),
        (X[0],), (X.half(),), (X.mT,), (X.to("meta"),), (X.flatten(2),),
    ]  # fmt: skip
    signatures = [signature(*arguments) for arguments in values]
    assert len(set(signatures)) == len(values)
    assert signatures == [signature(*arguments) for arguments in values]


def test_signatures_of_lists_and_tuples_are_equal():
    """An op gets lists where the caller passes tuples."""
    assert signature([X, (1, 2)], 3) == signature((X.clone(), [1, 2]), 3)
    assert signature(torch.nn.Parameter(X)) == signature(X)


def test_numbers_beyond_64_bits_have_no_signature():
    with pytest.raises(OverflowError):
        signature(2**64)


def test_the_device_of_the_call_is_left_out():
    meta = X.to("meta")
    on_meta = _C.call_signature((meta,), meta.device)
    assert on_meta == signature(X) != signature(meta)
