"""Cache keys contain everything that a cached value depends on.

Each test changes one component of a key after a first call; a stale entry would be returned.
"""

from __future__ import annotations

import math
import warnings
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from deeplab_fast import _C
from deeplab_fast._native import work_lists
from deeplab_fast._native.common import DTYPES, LaunchContext
from deeplab_fast._native.device_cache import cached_on_device
from deeplab_fast._native.memory_format import empty_nhwc
from deeplab_fast.backends import dispatch_table, registry
from deeplab_fast.backends.cuda import device as cuda_device
from deeplab_fast.backends.cuda import dilated_conv2d_backward
from deeplab_fast.ops.shape_bucket import shape_bucket

from ..support import emulator
from ..support.backends import set_tf32
from ..support.convolution import convolve
from ..support.emulator import machine

CPU = torch.device("cpu")


def ints(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Small integers, whose sums are exact."""
    return torch.randint(-2, 3, shape).to(dtype)


def nhwc(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return ints(*shape, dtype=dtype).contiguous(memory_format=torch.channels_last)


# Work lists.


def test_every_argument_is_part_of_the_key():
    @cached_on_device
    def make(first: int, second: int, *, third: int = 0, fourth: int = 0) -> tuple[int, ...]:
        return first, second, third, fourth

    for first in (1, 2):
        for second in (1, 2):
            assert make(first, second) == (first, second, 0, 0)
            for value in (1, 2):
                assert make(first, second, third=value) == (first, second, value, 0)
                assert make(first, second, fourth=value) == (first, second, 0, value)
                assert make(first, second, third=3, fourth=value) == (first, second, 3, value)


def test_functions_share_no_entries():
    one, other = (
        cached_on_device(lambda size: ("one", size)),
        cached_on_device(lambda size: ("other", size)),
    )
    assert [one(1), other(1), one(1)] == [("one", 1), ("other", 1), ("one", 1)]


CONV_ARGUMENTS: dict[str, Any] = {
    "list_tiles": _C.schedule.forward_tiles,
    "plane": (1, 5, 7),
    "branches": ((3, 3, 1, 1), (1, 3, 1, 2)),
    "k_iters_per_tap": 3,
    "out_channels": (8, 8),
    "device": CPU,
    "num_ctas": 8,
    "kernel": work_lists.CONV_SM80,
}
WGRAD_ARGUMENTS: dict[str, Any] = {
    "plane": (2, 5, 16),
    "branches": ((3, 3, 1, 1), (1, 3, 1, 2)),
    "channels": 16,
    "out_channels": (8, 8),
    "dtype": torch.bfloat16,
    "device": CPU,
    "num_ctas": 8,
    "kernel": work_lists.WGRAD_SM80,
}
BRANCHES = [
    ((3, 3, 1, 1),),
    ((1, 3, 1, 2), (3, 3, 1, 1)),
    ((5, 3, 1, 1), (1, 3, 1, 2)),
    ((3, 1, 1, 1), (1, 3, 1, 2)),
    ((3, 3, 2, 1), (1, 3, 1, 2)),
    ((3, 3, 1, 2), (1, 3, 1, 2)),
    ((3, 3, 1, 1), (1, 3, 1, 1)),
]
CONV_CHANGES = [
    ("list_tiles", _C.schedule.input_grad_tiles),
    ("plane", (2, 5, 7)),
    ("plane", (1, 6, 7)),
    ("plane", (1, 5, 8)),
    *(("branches", branches) for branches in BRANCHES),
    ("k_iters_per_tap", 4),
    ("out_channels", (136, 8)),
    ("out_channels", (8, 136)),
    ("device", torch.device("meta")),
    ("num_ctas", 24),
    ("kernel", work_lists.CONV_SM90),
]
WGRAD_CHANGES = [
    ("plane", (3, 5, 16)),
    ("plane", (2, 6, 16)),
    ("plane", (2, 5, 17)),
    *(("branches", branches) for branches in BRANCHES),
    ("channels", 136),
    ("out_channels", (136, 8)),
    ("out_channels", (8, 136)),
    ("dtype", torch.float32),
    ("device", torch.device("meta")),
    ("num_ctas", 24),
    ("kernel", work_lists.WGRAD_SM90),
]


def described(work_list: Any) -> list[Any]:
    """Everything of a work list that a launch reads."""
    tensors = [t if t.is_meta else t.tolist() for t in work_list.tensors]
    return [work_list.num_slots, getattr(work_list, "kernel", None), *tensors]


@pytest.mark.parametrize(
    ("make", "arguments", "name", "value"),
    [
        pytest.param(make, arguments, name, value, id=f"{make.__name__}-{name}-{i}")
        for make, arguments, changes in (
            (work_lists.conv_work_list, CONV_ARGUMENTS, CONV_CHANGES),
            (work_lists.wgrad_work_list, WGRAD_ARGUMENTS, WGRAD_CHANGES),
        )
        for i, (name, value) in enumerate(changes)
    ],
)
def test_work_lists_of_other_arguments(make, arguments, name, value):
    changed = arguments | {name: value}
    if name == "branches" and len(value) == 1:
        changed["out_channels"] = (8,)
    before = make(**arguments)
    assert make(**arguments) is before
    after = make(**changed)
    assert after is not before and make(**changed) is after
    assert {t.device for t in after.tensors} == {changed["device"]}
    if changed["device"] == CPU:
        assert described(after) == described(make.__wrapped__(**changed)) != described(before)


# Arguments of call_and_check; `kernels` are (K, R, S). CALLS: what changes, and to which value.
CALL = {
    "shape": (1, 8, 5, 7), "kernels": [(8, 3, 3)], "rates": [(1, 2)], "dtype": torch.bfloat16,
    "num_ctas": 8, "is_sm90": False,
}  # fmt: skip
CALLS = {
    "images": {"shape": (2, 8, 5, 7)},
    "channels": {"shape": (1, 72, 5, 7)},
    "rows": {"shape": (1, 8, 6, 7)},
    "columns": {"shape": (1, 8, 5, 8)},
    "rows and columns": {"shape": (1, 8, 7, 5)},
    "outputs": {"kernels": [(136, 3, 3)]},
    "kernel rows": {"kernels": [(8, 5, 3)]},
    "kernel columns": {"kernels": [(8, 3, 5)]},
    "vertical rate": {"rates": [(2, 2)]},
    "horizontal rate": {"rates": [(1, 3)]},
    "branches": {"kernels": [(8, 3, 3), (8, 1, 1)], "rates": [(1, 2), (1, 1)]},
    "outputs of one branch": {"kernels": [(8, 3, 3), (136, 1, 1)], "rates": [(1, 2), (1, 1)]},
    "dtype": {"dtype": torch.float32},
    "CTAs": {"num_ctas": 24},
    "compute capability": {"is_sm90": True},
}


def call_and_check(shape, kernels, rates, dtype, num_ctas, is_sm90) -> None:
    """Compare the output and gradients of all branches, which are exact for small integers."""
    N, C, H, W = shape
    input = nhwc(*shape, dtype=dtype)
    weights = [ints(k, C, r, s, dtype=dtype) for k, r, s in kernels]
    output = empty_nhwc(input, sum(w.size(0) for w in weights))
    grad_output = nhwc(*output.shape, dtype=dtype)
    where = LaunchContext(emulator.load().cuda, 0, num_ctas, is_sm90)
    with machine(0, "sm_90" if is_sm90 else "sm_80"):
        convolve(where, output, input, weights, [None] * len(weights), rates, activation="none")
        grads = dilated_conv2d_backward.backward(
            where, grad_output, input, weights, rates, [True, True, False]
        )
    x, *ws = (t.double().requires_grad_() for t in (input, *weights))
    branches = [
        F.conv2d(x, w, padding="same", dilation=rate) for w, rate in zip(ws, rates, strict=True)
    ]
    expected = torch.cat(branches, dim=1)
    assert torch.equal(output, expected.to(dtype))
    for a, e in zip([grads[0], *grads[1]], torch.autograd.grad(expected, [x, *ws], grad_output)):
        assert torch.equal(a, e.to(dtype))


@pytest.mark.parametrize("change", CALLS)
def test_convolutions_after_another_shape(change):
    call_and_check(**CALL)
    call_and_check(**CALL | CALLS[change])
    call_and_check(**CALL)


# Tensor maps of weights, for compute capability 9.0.


def multiply(input: Tensor, weights: list[Tensor], tap: int = 0, *, runs: bool = True) -> Tensor:
    """Products of pixels [P, C] and one tap of weights [K, taps, C] with any stride of rows."""
    P, C = input.shape
    outputs, sources, output = [], [], torch.zeros(P, sum(w.size(0) for w in weights)).to(input)
    for weight in weights:
        first = sum(w.size(0) for w in weights[: len(outputs)])
        address, K, row = weight.data_ptr(), weight.size(0), weight.stride(0)
        outputs.append(_C.ConvOutput(address, 0, K, first, row))
        sources.append(_C.ConvSource(0, C, 0))
    count = len(weights)
    lists = [
        list(range(P)) * count,
        [(0, 0, branch, tap) for branch in range(count)],
        [(branch, branch * P, P, branch, 1) for branch in range(count)],
        [(branch, 0, 0, -(-C // 64), -1) for branch in range(count)],
        [],
    ]
    tensors = [torch.tensor(rows, dtype=torch.int32) for rows in lists]
    first_items = torch.tensor([0, count], dtype=torch.int32)
    pixels, _, tiles, items, _ = tensors
    more = (
        work_lists.listed_pixels(pixels, (1, P, 1)),
        work_lists.tile_items(items, tiles, pixels, (1, P, 1), 64),
    )
    work = _C.ConvWork(
        *(t.data_ptr() for t in tensors), count, 0, first_items.data_ptr(), 1,
        *(t.data_ptr() for t in more),
    )  # fmt: skip
    clusters = {} if runs else {"dilated_conv2d_fwd_sm90_kernel": (0, 0)}
    outer = emulator.load().set_clusters(clusters)
    try:
        with machine(0, "sm_90"):
            shape, dtype = _C.ConvShape(P, 1, C, output.size(1)), DTYPES[input.dtype]
            emulator.load().cuda.dilated_conv2d_fwd_sm90(
                output.data_ptr(), 0, input.data_ptr(), 0, 0, 0,
                _C.ConvArguments(outputs, sources, work, (-math.inf, math.inf), shape, dtype), 0,
            )  # fmt: skip
    finally:
        emulator.load().set_clusters(outer)
    return output


# (shape and row stride of a first weight, shape and row stride of a second one in the same memory,
# offset of the second in elements)
MAPS = {
    "address": ((16, 1, 16), 16, (16, 1, 16), 16, 16),
    "rows": ((8, 1, 16), 16, (16, 1, 16), 16, 0),
    "fewer rows": ((16, 1, 16), 16, (8, 1, 16), 16, 0),
    "channels": ((16, 1, 16), 16, (16, 1, 8), 16, 0),
    "taps": ((16, 1, 16), 32, (16, 3, 16), 48, 0),
    "stride of rows": ((16, 1, 16), 32, (16, 1, 16), 40, 0),
    "shorter stride of rows": ((16, 1, 16), 40, (16, 1, 16), 32, 0),
}


@pytest.mark.parametrize("change", MAPS)
def test_weights_in_the_memory_of_others(change):
    first, first_stride, second, second_stride, offset = MAPS[change]
    memory = ints(1024)
    for shape, stride, begin in ((first, first_stride, 0), (second, second_stride, offset)):
        weight = memory[begin:].as_strided(shape, (stride, shape[2], 1))
        input, tap = ints(5, shape[2]), shape[1] - 1
        expected = input.double() @ weight[:, tap].double().T
        assert torch.equal(multiply(input, [weight], tap), expected.bfloat16())


def test_more_weights_than_the_cache_of_tensor_maps_holds():
    """The cache is cleared at 1024 tensor maps, which are then encoded again when needed."""
    memory, input = ints(8 * 1400), ints(5, 8)
    weights = [memory[8 * i :].as_strided((8, 1, 8), (8, 8, 1)) for i in range(1300)]

    def check(indices: range) -> None:
        for i in indices:
            expected = input.double() @ weights[i][:, 0].double().T
            assert torch.equal(multiply(input, [weights[i]]), expected.bfloat16())

    check(range(3))
    for begin in range(3, 1296, 8):
        multiply(input, weights[begin : begin + 8], runs=False)
    check(range(3))
    check(range(1290, 1300))


# Shape buckets and devices, which decide which kernel runs.

BUCKET_ARGUMENTS = {
    "shape": (2, 16, 8, 16), "kernel": (24, 3, 5), "rate": (1, 2), "groups": 1, "mask": (),
    "dtype": torch.bfloat16, "memory_format": torch.channels_last,
}  # fmt: skip
BUCKETS = [
    ({}, "bf16 channels_last 16->24 3x5 inside 7/8 pixels 2^8"),
    (
        {"memory_format": torch.contiguous_format},
        "bf16 NCHW 16->24 3x5 inside 7/8 pixels 2^8",
    ),
    ({"shape": (4, 16, 8, 16)}, "bf16 channels_last 16->24 3x5 inside 7/8 pixels 2^9"),
    ({"shape": (2, 32, 8, 16)}, "bf16 channels_last 32->24 3x5 inside 7/8 pixels 2^8"),
    ({"shape": (2, 16, 2, 16)}, "bf16 channels_last 16->24 3x5 inside 5/8 pixels 2^6"),
    ({"shape": (2, 16, 8, 4)}, "bf16 channels_last 16->24 3x5 inside 3/8 pixels 2^6"),
    ({"shape": (2, 16, 16, 8)}, "bf16 channels_last 16->24 3x5 inside 6/8 pixels 2^8"),
    ({"kernel": (40, 3, 5)}, "bf16 channels_last 16->40 3x5 inside 7/8 pixels 2^8"),
    ({"kernel": (24, 1, 5)}, "bf16 channels_last 16->24 1x5 inside 7/8 pixels 2^8"),
    ({"kernel": (24, 3, 3)}, "bf16 channels_last 16->24 3x3 inside 7/8 pixels 2^8"),
    ({"rate": (4, 2)}, "bf16 channels_last 16->24 3x5 inside 5/8 pixels 2^8"),
    ({"rate": (1, 6)}, "bf16 channels_last 16->24 3x5 inside 5/8 pixels 2^8"),
    ({"groups": 8}, "bf16 channels_last 16->24 3x5 groups 8 inside 7/8 pixels 2^8"),
    ({"mask": (True, False, False)}, "bf16 channels_last 16->24 3x5 inside 7/8 pixels 2^8 dinput"),
    ({"mask": (False, True, False)}, "bf16 channels_last 16->24 3x5 inside 7/8 pixels 2^8 dweight"),
    ({"mask": (False, False, True)}, "bf16 channels_last 16->24 3x5 inside 7/8 pixels 2^8 dbias"),
    ({"dtype": torch.float16}, "fp16 channels_last 16->24 3x5 inside 7/8 pixels 2^8"),
    ({"dtype": torch.float32}, "fp32 channels_last 16->24 3x5 inside 7/8 pixels 2^8"),
]


def bucket_of(shape, kernel, rate, groups, mask, dtype, memory_format) -> str:
    x = torch.empty(shape, dtype=dtype, device="meta", memory_format=memory_format)
    K, R, S = kernel
    weight = torch.empty(K, 16 // groups, R, S, dtype=dtype, device="meta")
    return shape_bucket(x, [weight], [rate], groups, mask)


def test_shape_buckets_differ_in_every_component():
    for change, expected in BUCKETS:
        assert bucket_of(**BUCKET_ARGUMENTS) == BUCKETS[0][1]
        assert bucket_of(**BUCKET_ARGUMENTS | change) == expected
    set_tf32(True)
    assert bucket_of(**BUCKET_ARGUMENTS | {"dtype": torch.float32}).startswith("tf32 ")


@pytest.fixture
def two_gpus(monkeypatch, tmp_path):
    """Two fake GPUs, and a dispatch table with a different kernel for each."""
    properties = [
        SimpleNamespace(major=9, minor=0, multi_processor_count=132),
        SimpleNamespace(major=8, minor=0, multi_processor_count=108),
    ]
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda gpu: properties[gpu.index])
    monkeypatch.setattr(torch.version, "hip", None)
    lines = [",".join(dispatch_table.Row._fields)]
    for device, kernel in (("sm_90 with 132", "cuda/sm90"), ("sm_80 with 108", "triton")):
        lines.append(f"{device} SMs,an_op,wide,{kernel},1,2,,,,,")
    monkeypatch.setattr(dispatch_table, "PATH", tmp_path / "dispatch_table.csv")
    dispatch_table.PATH.write_text("\n".join(lines))
    caches = dispatch_table.device_class, dispatch_table.fastest_kernels
    for cached in caches:
        cached.cache_clear()
    yield [torch.device("cuda", i) for i in range(2)]
    for cached in caches:
        cached.cache_clear()


def test_each_gpu_has_its_own_fastest_kernels(two_gpus):
    for _ in range(2):
        assert [dispatch_table.fastest_kernels(gpu)["an_op"]["wide"] for gpu in two_gpus] == [
            ("cuda/sm90",),
            ("triton",),
        ]
        classes = list(map(dispatch_table.device_class, two_gpus))
        assert classes == ["sm_90 with 132 SMs", "sm_80 with 108 SMs"]


def test_each_gpu_is_queried_once_for_its_own_capacity(two_gpus, monkeypatch):
    asked = []
    properties = torch.cuda.get_device_properties
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda gpu: asked.append(gpu) or properties(gpu)
    )
    streams = lambda index: 7 + index  # noqa: E731
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", streams, raising=False)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(_C, "cuda", "the kernels", raising=False)
    monkeypatch.setattr(cuda_device, "_HAS_SM90", True)
    cuda_device.target.cache_clear()
    try:
        for _ in range(2):
            for gpu, num_ctas, is_sm90 in zip(two_gpus, (2 * 132, 2 * 108), (True, False)):
                for sm90 in (True, False):
                    target = cuda_device.target(gpu, sm90=sm90)
                    context = LaunchContext("the kernels", 0, num_ctas, is_sm90 and sm90)
                    assert target.context == context
                    assert target.stream() == 7 + gpu.index
                    # Only a device that is not the current one is made current.
                    assert isinstance(target.guard(), torch.cuda.device) == (gpu.index != 1)
    finally:
        cuda_device.target.cache_clear()
    assert asked == [gpu for gpu in two_gpus for _ in range(2)]


def test_each_backend_and_reason_is_warned_about_once():
    registry._warn_once.cache_clear()
    calls = [("cuda", "old driver"), ("triton", "old driver"), ("cuda", "old compiler")]
    try:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            for name, reason in calls * 2:
                registry._warn_once(name, reason)
    finally:
        registry._warn_once.cache_clear()
    assert [str(warning.message) for warning in said] == [
        f"deeplab_fast: backend {name!r} is not used: {reason}" for name, reason in calls
    ]
