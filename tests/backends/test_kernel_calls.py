"""Calls of the CUDA kernels: strides of every operand, limits from both sides, amounts of work.

Inputs are small integers, whose sums are exact, so results equal those of float64 bit for bit.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_map_only

from deeplab_fast import _C
from deeplab_fast._native import work_lists
from deeplab_fast._native.common import DTYPES, LaunchContext
from deeplab_fast.backends import registry
from deeplab_fast.backends.arguments import Aspp
from deeplab_fast.backends.cuda import (
    aspp,
    depthwise_conv2d,
    dilated_conv2d,
    dilated_conv2d_backward,
)

from ..support import emulator
from ..support.convolution import convolved, depthwise, image_bias
from ..support.emulator import machine

CPU = torch.device("cpu")
DEVICES = pytest.mark.parametrize("device", ["sm_80", "sm_90"])
BF16 = torch.bfloat16


def kernels(device: str, num_ctas: int = 4) -> LaunchContext:
    return LaunchContext(emulator.load().cuda, 0, num_ctas, device == "sm_90")


def ints(*shape: int, dtype: torch.dtype = BF16) -> Tensor:
    return torch.randint(-2, 3, shape).to(dtype)


def spread(tensor: Tensor) -> Tensor:
    """Copy of the tensor with a stride of two elements."""
    return tensor.new_full((*tensor.shape, 2), 77)[..., 0].copy_(tensor)


def shifted(tensor: Tensor) -> Tensor:
    """Copy of the tensor that is not aligned to 16 bytes."""
    return tensor.new_empty(tensor.numel() + 1)[1:].view(tensor.shape).copy_(tensor)


# Views of weights. Only rows of a 1x1 weight may be slices of longer rows; others are copied.
WEIGHTS = {
    "columns of longer rows": lambda w: torch.cat([w, w + 7], dim=1)[:, : w.size(1)],
    "later columns": lambda w: torch.cat([w + 7, w], dim=1)[:, w.size(1) :],
    "columns of longer channels_last rows": lambda w: torch.cat([w + 7, w], dim=1).contiguous(
        memory_format=torch.channels_last
    )[:, w.size(1) :],
    "columns that start unaligned": lambda w: torch.cat([w[:, :1], w], dim=1)[:, 1:],
    "rows of unaligned length": lambda w: torch.cat([w, w[:, :1]], dim=1)[:, : w.size(1)],
    "transposed": lambda w: w.transpose(0, 1).contiguous().transpose(0, 1),
    "every second channel": lambda w: w.repeat_interleave(2, dim=1)[:, ::2],
    "every second row": lambda w: w.repeat_interleave(2, dim=0)[::2],
    "shifted": shifted,
}


@DEVICES
@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("view", WEIGHTS)
def test_views_of_weights(device, size, view):
    input, weight = ints(1, 16, 2, 3), ints(8, 16, size, size)
    with machine(0, device):
        output = convolved(kernels(device), input, [WEIGHTS[view](weight)], [None], [(1, 1)])
    expected = F.conv2d(input.double(), weight.double(), padding="same")
    assert torch.equal(output, expected.to(BF16))


@DEVICES
def test_strided_operands(device):
    """Strided input, weights, biases and gradient of the output."""
    input, grad, weights = (
        ints(2, 16, 3, 4),
        ints(2, 24, 3, 4),
        [ints(8, 16, 3, 3), ints(16, 16, 1, 1)],
    )
    biases, rates = [ints(8), ints(16)], [(1, 2), (1, 1)]
    where = kernels(device)
    with machine(0, device):
        output = convolved(
            where, spread(input), [spread(w) for w in weights], [spread(b) for b in biases], rates
        )
        grads = dilated_conv2d_backward.backward(
            where, spread(grad), spread(input), [spread(w) for w in weights], rates, [True] * 3
        )
    leaves = [t.double().requires_grad_() for t in (input, *weights, *biases)]
    branches = [
        F.conv2d(leaves[0], w, b, padding="same", dilation=rate)
        for w, b, rate in zip(leaves[1:3], leaves[3:], rates, strict=True)
    ]
    expected = torch.cat(branches, dim=1)
    assert torch.equal(output, expected.to(BF16))
    exact = torch.autograd.grad(expected, leaves, grad.double())
    for a, e in zip([grads[0], *grads[1], *grads[2]], exact, strict=True):
        assert torch.equal(a, e.to(BF16))
    assert len({t.untyped_storage().data_ptr() for t in (grads[0], *grads[1], *grads[2])}) == 5


def test_strided_operands_of_depthwise_convolution():
    input, grad, weight, bias = ints(2, 16, 3, 4), ints(2, 16, 3, 4), ints(16, 1, 3, 3), ints(16)
    residual, where = ints(2, 16, 3, 4), kernels("sm_80")
    output = spread(residual)
    operands = output, spread(input), spread(weight), spread(bias)
    with machine(0):
        registry.run(
            "fused_conv2d_add_", *operands, [1, 1], [2, 1], [2, 1], 16, "relu6", backend="emulated"
        )
        grads = depthwise_conv2d.backward(
            where, spread(grad), spread(input), spread(weight), (2, 1), [True] * 3
        )
    leaves = [t.double().requires_grad_() for t in (input, weight, bias)]
    sums = F.conv2d(*leaves, padding="same", dilation=(2, 1), groups=16)
    assert torch.equal(output, F.relu6(sums + residual).to(BF16))
    for a, e in zip(grads, torch.autograd.grad(sums, leaves, grad.double()), strict=True):
        assert torch.equal(a, e.to(BF16))


@DEVICES
def test_strided_operands_of_the_pooled_branch(device):
    means, pool, pool_bias = ints(2, 16, dtype=torch.float32), ints(8, 16, 1, 1), ints(8)
    project, bias = ints(5, 8, 1, 1), ints(5)
    with machine(0, device):
        actual = image_bias(
            kernels(device), means, spread(pool), spread(pool_bias), project, spread(bias)
        )
    hidden = F.relu(means.double() @ pool[..., 0, 0].double().T + pool_bias)
    expected = hidden @ project[..., 0, 0].double().T + bias
    assert torch.equal(actual, expected.float())


@DEVICES
def test_strided_operands_of_branches_and_the_pooled_branch(device):
    """All tensors of a call of the ops, biases and weights of the pooled branch among them."""
    branches = ints(2, 16, 3, 4), [ints(8, 16, 1, 1), ints(8, 16, 3, 3)], [ints(8), ints(8)], [1, 2]
    pooled = ints(8, 16, 1, 1), ints(8), ints(8, 24, 1, 1), ints(8)
    for op, operands in (
        ("parallel_dilated_conv2d", branches),
        ("aspp", (*branches, *pooled)),
    ):
        with machine(0, device):
            expected = registry.run(op, *operands, backend="emulated")
            strided = tree_map_only(Tensor, spread, operands)
            assert torch.equal(registry.run(op, *strided, backend="emulated"), expected)


@DEVICES
@pytest.mark.parametrize(("size", "rates"), [((3, 9), (2, 7)), ((9, 3), (7, 2)), ((3, 9), (5, 7))])
def test_rates_between_the_sides_of_a_map(device, size, rates):
    """A dilation beyond the map acts like the map's size, along each side separately."""
    input, grad, weight = ints(1, 8, *size), ints(1, 8, *size), ints(8, 8, 3, 3)
    weight_rows = ints(8, 1, 3, 3)
    where = kernels(device)
    with machine(0, device):
        results = [
            convolved(where, input, [weight], [None], [rates]),
            depthwise(where, input, weight_rows, None, rates),
        ]
        dx, (dw,), _ = dilated_conv2d_backward.backward(
            where, grad, input, [weight], [rates], [True, True, False]
        )
        depthwise_grads = depthwise_conv2d.backward(
            where, grad, input, weight_rows, rates, [True, True, False]
        )
    for w, groups, output, grads in (
        (weight, 1, results[0], (dx, dw)),
        (weight_rows, 8, results[1], depthwise_grads[:2]),
    ):
        leaves = [t.double().requires_grad_() for t in (input, w)]
        expected = F.conv2d(*leaves, padding="same", dilation=rates, groups=groups)
        assert torch.equal(output, expected.to(BF16))
        for a, e in zip(grads, torch.autograd.grad(expected, leaves, grad.double()), strict=True):
            assert torch.equal(a, e.to(BF16))


# Limits.


def meta(*shape: int, dtype: torch.dtype = BF16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def test_limits_of_dense_convolution():
    unsupported = dilated_conv2d.unsupported_dense
    weight = meta(8, 8, 3, 3)
    assert unsupported(meta(1, 8, 2**15, 2**16 - 1), [weight], 1) is None
    assert "fewer than 2^31 pixels" in unsupported(meta(1, 8, 2**15, 2**16), [weight], 1)
    assert unsupported(meta(1, 8, 2**15, 2**15 - 1), [weight] * 2, 1) is None
    assert "fewer than 2^31 pixels" in unsupported(meta(1, 8, 2**15, 2**15), [weight] * 2, 1)
    assert unsupported(meta(1, 8, 4, 4), [meta(8, 8, 31, 33)], 1) is None
    assert "at most 1024 taps" in unsupported(meta(1, 8, 4, 4), [meta(8, 8, 41, 25)], 1)
    assert unsupported(meta(1, 8, 4, 4), [weight] * 8, 1) is None
    assert "at most 8 branches, got 9" in unsupported(meta(1, 8, 4, 4), [weight] * 9, 1)
    assert "differ in dtype or device" in unsupported(meta(1, 8, 4, 4), [weight.half()], 1)
    assert "differ in dtype or device" in unsupported(
        meta(1, 8, 4, 4), [weight, ints(8, 8, 3, 3)], 1
    )
    assert "empty" in unsupported(meta(1, 8, 4, 4), [weight, meta(0, 8, 3, 3)], 1)
    for dtype, multiple in ((torch.float16, 8), (BF16, 8)):
        for channels in (multiple, multiple + 4):
            reason = unsupported(meta(1, channels, 4, 4, dtype=dtype), [weight.to(dtype)], 1)
            assert (reason is None) == (channels % multiple == 0)


def test_channels_of_tf32(tf32):
    weight = meta(8, 8, 3, 3, dtype=torch.float32)
    reasons = [
        dilated_conv2d.unsupported_dense(meta(1, channels, 4, 4, dtype=torch.float32), [weight], 1)
        for channels in (4, 6, 8)
    ]
    assert reasons[0] is reasons[2] is None
    assert reasons[1] == "the kernel supports a multiple of 4 input channels, got 6"


def test_limits_of_the_gradients():
    unsupported, x = dilated_conv2d_backward.unsupported_dense_backward, meta(1, 8, 4, 4)
    big, one = meta(8, 8, 31, 33), meta(8, 8, 1, 1)
    assert unsupported(x, [big, one], 1) is None  # 1024
    assert "at most 1024 taps in all branches" in unsupported(x, [big, one, one], 1)


def test_limits_of_depthwise_convolution():
    unsupported = depthwise_conv2d.unsupported_reason
    assert unsupported(meta(1, 8, 2**14, 2**14 - 1), meta(8, 1, 3, 3)) is None
    assert "fewer than" in unsupported(meta(1, 8, 2**14, 2**14), meta(8, 1, 3, 3))
    assert unsupported(meta(1, 8, 5, 5), meta(8, 1, 19, 19)) is None
    assert "at most 361 taps" in unsupported(meta(1, 8, 5, 5), meta(8, 1, 33, 11))
    assert "as input channels, got 16 and 8" in unsupported(meta(1, 8, 5, 5), meta(16, 1, 3, 3))


def test_limits_of_aspp():
    def unsupported(C: int = 8, branch: int = 8, pooled: int = 8) -> str | None:
        return aspp.unsupported_reason(Aspp(
            meta(1, C, 4, 4), [meta(branch, C, 1, 1), meta(8, C, 3, 3)], [], [1, 2],
            meta(pooled, C, 1, 1), meta(pooled), meta(8, branch + 8 + pooled, 1, 1), meta(8),
        ))  # fmt: skip

    assert unsupported() is unsupported(C=16384) is unsupported(pooled=16384) is None
    assert "at most 16384 channels in the pooled branch" in (unsupported(C=16392) or "")
    assert "at most 16384 channels in the pooled branch" in (unsupported(pooled=16392) or "")
    assert "channels of all convolutions together, got 12" in (unsupported(branch=4) or "")
    assert "pooled channels, got 12" in (unsupported(pooled=12) or "")


def test_kernels_reject_unaligned_channels():
    """Launchers check this themselves, although their callers never pass such channels."""
    memory = torch.zeros(4096, dtype=BF16)
    work_list = work_lists.conv_work_list(
        _C.schedule.forward_tiles, (1, 1, 1), ((1, 1, 1, 1),), 1, (8,), CPU, 1
    )

    def convolve(name, in_channels=16, source=(0, 8, 0), stride=16, outputs=1, sums=0) -> None:
        address = memory.data_ptr()
        arguments = _C.ConvArguments(
            [_C.ConvOutput(address, 0, 8, 0, stride)] * outputs,
            [_C.ConvSource(*source)] * outputs,
            work_list.work,
            (0.0, 1.0),
            _C.ConvShape(1, 1, in_channels, 8),
            DTYPES[BF16],
            summing_branch=0,
        )
        launch = getattr(emulator.load().cuda, name)
        launch(address, 0, address, 0, 0, sums, arguments, 0)

    changes = [
        {"in_channels": 20}, {"source": (4, 8, 0)}, {"source": (0, 12, 0)}, {"source": (0, 8, 4)},
        {"stride": 20}, {"stride": 4},
    ]  # fmt: skip
    for name in ("dilated_conv2d_fwd", "dilated_conv2d_fwd_sm90"):
        for change in changes:
            with pytest.raises(RuntimeError, match=f"{name}: expected input channels in multiples"):
                convolve(name, **change)
        with pytest.raises(RuntimeError, match=f"{name}: too many branches"):
            convolve(name, outputs=9)
    with pytest.raises(RuntimeError, match="expected no pixel_sums"):
        convolve("dilated_conv2d_fwd", sums=memory.data_ptr())
    with pytest.raises(RuntimeError, match="expected the work list of this kernel"):
        convolve("dilated_conv2d_fwd_sm90")


@pytest.mark.parametrize("suffix", ["", "_sm90"])
def test_gradient_kernels_reject_unaligned_channels(suffix):
    address = torch.zeros(4096, dtype=BF16).data_ptr()
    kernel = work_lists.WGRAD_SM90 if suffix else work_lists.WGRAD_SM80
    work_list = work_lists.wgrad_work_list(
        (1, 1, 1), ((1, 1, 1, 1),), 8, (8,), BF16, CPU, 1, kernel
    )

    def launch(C=8, out_channels=16, rows=(8, 8)) -> None:
        getattr(emulator.load().cuda, "dilated_conv2d_wgrad" + suffix)(
            0, address, address, [(address, k, 1) for k in rows], work_list.work,
            _C.ConvWgradShape(1, 1, 1, C, out_channels), DTYPES[BF16], 0,
        )  # fmt: skip

    for change in ({"C": 12}, {"out_channels": 12}, {"rows": (4, 8)}, {"rows": (8, 4)}):
        with pytest.raises(RuntimeError, match="expected channels in multiples of 16 bytes"):
            launch(**change)
    with pytest.raises(RuntimeError, match="too many branches"):
        launch(rows=(8,) * 9)


# Amounts of work.


@pytest.mark.parametrize(
    ("kernel", "dtype", "channels"),
    [
        (work_lists.CONV_SM80, BF16, 32),
        (work_lists.CONV_SM80, torch.float32, 16),
        (work_lists.CONV_SM90, torch.float16, 64),
    ],
)
def test_k_iterations_per_tap(kernel, dtype, channels):
    counts = (8, channels, channels + 8, 5 * channels)
    assert [work_lists.k_iters_per_tap(c, dtype, kernel) for c in counts] == [1, 1, 2, 5]


@pytest.mark.parametrize("kernel", [work_lists.CONV_SM80, work_lists.CONV_SM90])
def test_no_work_item_is_past_the_last_channel(kernel):
    tile = kernel.tile
    for channels, blocks in ((1, 1), (tile, 1), (tile + 1, 2), (3 * tile, 3)):
        work_list = work_lists.conv_work_list(
            _C.schedule.forward_tiles, (1, 1, 1), ((1, 1, 1, 1),), 1, (channels,), CPU, 8, kernel
        )
        items, first_items = work_list.tensors[3].view(-1, 5), work_list.tensors[5]
        assert sorted(items[:, 1].tolist()) == list(range(blocks))
        assert first_items[-1] == blocks and len(first_items) <= 8 // kernel.sm80_ctas + 1


@pytest.mark.parametrize("kernel", [work_lists.CONV_SM90, work_lists.WGRAD_SM90])
def test_persistent_clusters_have_balanced_work(kernel):
    """Clusters get the work items of the schedule; in list order the first ones get too many."""
    if kernel is work_lists.CONV_SM90:
        work_list = work_lists.conv_work_list(
            _C.schedule.forward_tiles, (1, 33, 33), ((3, 3, 12, 12),), 4, (512,), CPU, 16, kernel
        )
    else:
        work_list = work_lists.wgrad_work_list(
            (1, 33, 33), ((3, 3, 12, 12),), 512, (512,), BF16, CPU, 16, kernel
        )
    is_conv = kernel is work_lists.CONV_SM90
    items, _, first_items = work_list.tensors[3:6] if is_conv else work_list.tensors[1:4]
    costs = items.view(-1, 5)[:, 3] + 8 * (items.view(-1, 5)[:, 4] >= 0)
    loads = [costs[begin:end].sum().item() for begin, end in first_items.unfold(0, 2, 1).tolist()]
    assert len(loads) == 4 and max(loads) <= 1.25 * sum(loads) / 4


@pytest.mark.parametrize("kernel", [work_lists.WGRAD_SM80, work_lists.WGRAD_SM90])
def test_no_work_item_of_a_weight_gradient_is_past_the_last_channel(kernel):
    tile, k_iter = kernel.tile, kernel.k_iter_bytes // 2  # pixels per k-iteration
    for inputs, outputs, blocks in ((8, tile, 1), (tile, tile + 8, 2), (tile + 8, 2 * tile, 4)):
        for pixels, k_iters in ((1, 1), (k_iter, 1), (k_iter + 1, 2)):
            work_list = work_lists.wgrad_work_list(
                (1, 1, pixels), ((1, 1, 1, 1),), inputs, (outputs,), BF16, CPU, 8, kernel
            )
            _, items, _, first_items, *_ = work_list.tensors
            items = items.view(-1, 5)
            assert sorted(items[:, 1].tolist()) == list(range(blocks))
            assert set(items[:, 3].tolist()) == {k_iters}
            assert first_items[-1] == blocks
            assert len(first_items) <= 8 // kernel.sm80_ctas + 1


class Recorder:
    """Stand-in for the launchers that records their arguments."""

    def __init__(self) -> None:
        self.calls: dict[str, tuple] = {}

    def __getattr__(self, name: str):
        return lambda *args: self.calls.update({name: args})


@pytest.mark.parametrize(
    ("shape", "num_ctas", "parts"),
    [((1, 8, 1, 1), 8, 1), ((1, 8, 16, 16), 8, 1), ((1, 8, 16, 31), 8, 1), ((2, 8, 16, 16), 8, 2),
     ((3, 8, 64, 64), 8, 8), ((3, 8, 64, 64), 132, 48)],
)  # fmt: skip
def test_parts_of_a_bias_gradient(shape, num_ctas, parts):
    """At least 256 pixels per part, and no more parts than thread blocks that run at once."""
    recorder = Recorder()
    where = LaunchContext(recorder, 0, num_ctas)
    dilated_conv2d_backward.bias_gradients(where, torch.zeros(shape), [torch.zeros(8)])
    _, _, _, pixels, K, num_parts, *_ = recorder.calls["dilated_conv2d_bias_grad"]
    assert (pixels, K, num_parts) == (shape[0] * shape[2] * shape[3], 8, parts)


@pytest.mark.parametrize(
    ("shape", "parts"),
    [((1, 8, 1, 1), 1), ((1, 64, 32, 31), 1), ((1, 64, 32, 32), 2), ((2, 64, 64, 64), 16),
     ((1, 2**15, 8, 8), 2), ((8, 8192, 16, 16), 8)],
)  # fmt: skip
def test_parts_of_a_depthwise_gradient(shape, parts):
    """At least 2^15 elements per part, and at most 2^16 sums per tap."""
    recorder = Recorder()
    x = torch.zeros(1).expand(shape).contiguous(memory_format=torch.channels_last)
    weight = torch.zeros(shape[1], 1, 3, 3)
    where = LaunchContext(recorder, 0, 8)
    depthwise_conv2d.backward(where, x, x, weight, (1, 1), [False, True, False])
    assert recorder.calls["depthwise_conv2d_wgrad"][-3] == parts


def strip_rows(monkeypatch, num_ctas: int, shape: tuple[int, ...], kernel: tuple[int, int]):
    """Rows per strip of a convolution, of its input gradient and of its weight gradient."""
    recorder = Recorder()
    shapes = SimpleNamespace(DepthwiseShape=lambda size, kernel, rates, rows, mirrored: rows)
    monkeypatch.setattr(depthwise_conv2d, "_C", shapes)
    where = LaunchContext(recorder, 0, num_ctas)
    x = torch.empty(shape, dtype=torch.bfloat16, memory_format=torch.channels_last)
    weight = torch.empty(shape[1], 1, *kernel, dtype=torch.bfloat16)
    depthwise(where, x, weight, None, (1, 1))
    forward = recorder.calls["depthwise_conv2d_fwd"][-3]
    depthwise_conv2d.backward(where, x, x, weight, (1, 1), [True, True, False])
    grad_input = recorder.calls["depthwise_conv2d_fwd"][-3]
    return forward, grad_input, recorder.calls["depthwise_conv2d_wgrad"][-4]


@pytest.mark.parametrize(
    ("shape", "kernel", "num_ctas", "rows"),
    [((1, 960, 65, 65), (3, 3), 264, 11),  # 375 of 396 thread blocks; 10 rows would need 435
     ((8, 384, 65, 65), (3, 3), 264, 33),  # 390; 22 rows: 585
     ((1, 40, 65, 65), (5, 5), 264, 2),  # 4 channels per thread: 179 of 264; 1 row: 353
     ((8, 40, 65, 65), (5, 5), 264, 11),  # 260; 10 rows: 304
     ((1, 36, 65, 65), (3, 3), 264, 4),  # 1 channel per thread: 369 of 396; 3 rows: 477
     ((1, 24, 65, 65), (7, 3), 264, 1),  # 101 of 528
     ((1, 960, 65, 65), (3, 3), 8, 33),  # 12 rounds of 12, nearly full; 65 rows: 6 rounds
     ((1, 8, 2**20, 1), (3, 3), 264, 256)],  # 4096 strips, 32 blocks: the most that are tried
)  # fmt: skip
def test_depthwise_strips_fill_rounds_of_blocks(monkeypatch, shape, kernel, num_ctas, rows):
    """Each of 132 SMs runs three thread blocks of a 3x3 kernel, two of 5x5, four of others."""
    forward, grad_input, _ = strip_rows(monkeypatch, num_ctas, shape, kernel)
    assert forward == grad_input == rows


@pytest.mark.parametrize(("shape", "rows"), [((1, 960, 65, 65), 8), ((8, 384, 65, 65), 13)])
def test_strips_of_a_depthwise_gradient_do_not_depend_on_the_device(monkeypatch, shape, rows):
    """The order of its sums is that of the strips."""
    for num_ctas in (8, 264):
        assert strip_rows(monkeypatch, num_ctas, shape, (3, 3))[-1] == rows
