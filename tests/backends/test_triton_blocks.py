"""Triton convolutions with the block sizes of compiled kernels; the interpreter's are larger.

The shapes are around the sizes of blocks, and offsets exceed int32. Every access to memory is
checked.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import deeplab_fast
from deeplab_fast import dilated_conv2d, parallel_dilated_conv2d
from deeplab_fast.backends import registry

from ..support import bilinear_oracle
from ..support.backends import is_interpreted, set_tf32
from ..support.cases import Conv, assert_as_accurate_as, operands
from ..support.triton_memory import check_memory, number_programs_from, zeros_without_memory
from ..support.triton_splits import record_num_slots, set_blocks, set_num_programs

pytest.importorskip("triton", minversion="3.6")
if not is_interpreted("triton"):
    pytest.skip(
        f"no interpreter: {registry.unavailable_reason('triton', 'cpu')}", allow_module_level=True
    )

import triton  # noqa: E402
import triton.language as tl  # noqa: E402
from triton.runtime.interpreter import TensorHandle, interpreter_builder  # noqa: E402

from deeplab_fast._native import work_lists as native_work_lists  # noqa: E402
from deeplab_fast.backends.triton import (  # noqa: E402
    bilinear,
    block_sizes,
    depthwise_conv2d,
    tf32,
    work_lists,
)
from deeplab_fast.backends.triton import dilated_conv2d as kernels  # noqa: E402
from deeplab_fast.backends.triton import dilated_conv2d_backward as gradients  # noqa: E402


@pytest.fixture(autouse=True)
def checked(monkeypatch):
    check_memory(monkeypatch)


@pytest.fixture
def compiled_sizes(monkeypatch):
    """Block sizes of compiled kernels."""
    monkeypatch.setattr(block_sizes, "INTERPRETED", False)


@pytest.fixture
def num_slots(monkeypatch) -> list[int]:
    return record_num_slots(monkeypatch)


def results(function, tensors: list[Tensor], grad: Tensor) -> list[Tensor]:
    """The output and the gradients of all tensors."""
    leaves = [t.detach().requires_grad_() for t in tensors]
    output = function(*leaves)
    return [output.detach(), *torch.autograd.grad(output, leaves, grad)]


def assert_right(ours, theirs, tensors: list[Tensor], grad: Tensor) -> None:
    """Check the output and all gradients of the triton backend."""
    with deeplab_fast.backend("triton"):
        actual = results(ours, tensors, grad)
    exact = results(theirs, [t.double() for t in tensors], grad.double())
    for a, p, e in zip(actual, results(theirs, tensors, grad), exact, strict=True):
        assert_as_accurate_as(a, p, e)


def branches_of(branches):
    """Parallel branches of (K, R, S) and a dilation each, as our function and as PyTorch's."""
    dilations = [dilation for _, dilation in branches]

    def ours(x, *weights):
        return parallel_dilated_conv2d(x, weights, None, dilations)

    def theirs(x, *weights):
        return torch.cat(
            [F.conv2d(x, w, padding="same", dilation=d) for w, d in zip(weights, dilations)], dim=1
        )

    return ours, theirs


def parallel_operands(N, C, H, W, branches, dtype=torch.float32):
    """[input, *weights] and a gradient of the output."""
    shapes = [(k, C, r, s) for (k, r, s), _ in branches]
    weights = [torch.randn(shape) / (shape[1] * shape[2] * shape[3]) ** 0.5 for shape in shapes]
    tensors = [torch.randn(N, C, H, W), *weights]
    grad = torch.randn(N, sum(shape[0] for shape in shapes), H, W)
    return [t.to(dtype) for t in tensors], grad.to(dtype)


def rounded_to_tf32(tensor: Tensor) -> Tensor:
    """``tensor`` truncated to TF32, which represents it exactly."""
    return (tensor.contiguous().view(torch.int32) & ~0x1FFF).view(torch.float32)


# Block sizes of compiled kernels.

PRECISIONS = {"fp16": (128, 128, 64), "tf32": (128, 128, 32), "ieee": (64, 64, 16)}


@pytest.mark.parametrize(("precision", "num_programs"), [("fp16", 132), ("tf32", 1), ("ieee", 132)])
def test_dense_convolutions(compiled_sizes, monkeypatch, num_slots, precision, num_programs):
    """Several blocks in each dimension of every kernel, the last ones partial."""
    set_num_programs(monkeypatch, num_programs)
    set_tf32(precision == "tf32")
    calls, choose = [], block_sizes.blocks_for
    monkeypatch.setattr(
        block_sizes, "blocks_for", lambda *shape: calls.append(shape) or choose(*shape)
    )
    m, n, k = PRECISIONS[precision]
    dtype = torch.float16 if precision == "fp16" else torch.float32
    branches = [((3, 1, 3), 3), ((n + 5, 1, 1), 1)]
    width = m // 14 + 1
    tensors, grad = parallel_operands(2, 72, 7, width, branches, dtype)
    if precision == "tf32":
        tensors, grad = [rounded_to_tf32(t) for t in tensors], rounded_to_tf32(grad)
    assert_right(*branches_of(branches), tensors, grad)
    pixels, most = 14 * width, n + 5
    products = [(pixels, most, 72), (pixels, 72, most), (most, 72, pixels)]
    assert calls == [(dtype, tf32.precision_of(dtype), *product) for product in products]
    assert {choose(*shape)[:3] for shape in calls} == {(m, n, k)}
    assert [count > 0 for count in num_slots] == [num_programs > 1] * 3


BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


@pytest.mark.parametrize(
    ("dtype", "precision", "columns", "depth", "expected"),
    [
        (BF16, "ieee", 256, 2048, (128, 128, 64, 8, 4)),
        (FP16, "ieee", 256, 2048, (128, 128, 64, 8, 4)),
        (FP32, "tf32", 256, 2048, (128, 128, 32, 8, 4)),
        (FP32, "ieee", 256, 2048, (64, 64, 16, 4, 2)),
        (BF16, "ieee", 65, 33, (128, 128, 64, 8, 4)),
        (BF16, "ieee", 64, 32, (128, 64, 32, 8, 4)),
        (FP32, "tf32", 21, 17, (128, 32, 32, 8, 4)),
        (FP32, "ieee", 1, 1, (64, 16, 16, 4, 2)),
        (BF16, "ieee", 1, 3, (128, 16, 16, 8, 4)),  # tensor cores multiply blocks of at least 16
    ],
)
@pytest.mark.parametrize("is_amd", [False, True])
def test_compiled_block_sizes(
    compiled_sizes, monkeypatch, is_amd, dtype, precision, columns, depth, expected
):
    """Sizes that were found to compile without spills, whatever the number of pixels."""
    if is_amd:
        monkeypatch.setattr(torch.version, "hip", "7.0")
        expected = (*expected[:4], 2)
    for pixels in (1, 10**6):
        assert block_sizes.blocks_for(dtype, precision, pixels, columns, depth) == expected


def test_one_program_per_sm(monkeypatch):
    class Properties:
        multi_processor_count = 132

    devices = []
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda device: devices.append(device) or Properties
    )
    gpu = torch.device("cuda", 1)
    assert work_lists.num_programs(gpu) == 132 and devices == [gpu]


@pytest.mark.parametrize(
    "blocks",
    [(128, 128, 64), (128, 128, 32), (128, 64, 64), (64, 128, 64), (64, 64, 32)],
    ids=str,
)
def test_other_block_sizes(compiled_sizes, monkeypatch, blocks):
    set_num_programs(monkeypatch, 132)
    set_blocks(monkeypatch, *blocks)
    x, weight, bias = operands(Conv(1, 136, 7, 1, 133, (1, 1)), torch.float16, "cpu")
    with deeplab_fast.backend("triton"):
        output = dilated_conv2d(x, weight, bias)
    exact = F.conv2d(x.double(), weight.double(), bias.double())
    assert_as_accurate_as(output, F.conv2d(x, weight, bias), exact)


# Small blocks: few pixels and channels fill several.


@pytest.fixture
def small_blocks(compiled_sizes, monkeypatch) -> None:
    """Small blocks. Two programs add up the partial sums of each output tile."""
    set_blocks(monkeypatch, 32, 16, 16)


@pytest.mark.parametrize(
    ("pixels", "in_channels", "out_channels", "num_programs"),
    [
        *[(pixels, 5, 5, 1) for pixels in (15, 16, 17, 31, 32, 33)],
        *[(7, channels, 5, 1) for channels in (15, 16, 17)],
        *[(7, 5, channels, 1) for channels in (15, 16, 17, 31, 32, 33)],
        (64, 48, 48, 132),
        (33, 33, 33, 132),
    ],
)
def test_sizes_around_a_block(
    small_blocks, monkeypatch, num_slots, pixels, in_channels, out_channels, num_programs
):
    set_num_programs(monkeypatch, num_programs)
    branches = [((out_channels, 1, 1), 1), ((2, 1, 1), 1)]
    tensors, grad = parallel_operands(1, in_channels, 1, pixels, branches)
    assert_right(*branches_of(branches), tensors, grad)
    assert [count > 0 for count in num_slots] == [num_programs > 1] * 3


@pytest.mark.parametrize("num_programs", [1, 132])
@pytest.mark.parametrize("activation", ["none", "relu", "relu6"])
@pytest.mark.parametrize(
    ("bias", "with_residual"), [("none", True), ("channels", False), ("images", True)]
)
def test_epilogue(
    small_blocks, monkeypatch, num_slots, num_programs, activation, bias, with_residual
):
    """Bias, residual and activation apply once, in this order, to split and whole sums."""
    set_num_programs(monkeypatch, num_programs)
    x, weight = torch.randn(3, 33, 3, 5), torch.randn(18, 33, 1, 1)
    biases = {"none": None, "channels": 3 * torch.randn(18), "images": 3 * torch.randn(3, 18)}
    residual = 3 * torch.randn(3, 18, 3, 5).contiguous(memory_format=torch.channels_last)
    given = biases[bias]
    expected = F.conv2d(x, weight)
    if given is not None:
        expected += given.view(-1, 18, 1, 1)
    if with_residual:
        expected += residual
    expected = {"none": lambda t: t, "relu": F.relu, "relu6": F.relu6}[activation](expected)
    output = kernels.forward(
        x, [weight], [given], [(1, 1)], residual if with_residual else None, activation
    )
    assert (output is residual) == with_residual
    torch.testing.assert_close(output, expected, rtol=1e-5, atol=2e-5)
    assert any(num_slots) == (num_programs > 1)


@pytest.mark.parametrize("num_programs", [1, 132])
def test_sums_are_fp32(small_blocks, monkeypatch, num_slots, num_programs):
    """2049 - 2048 + 1 would be 0 or 1 in fp16: over k-iterations, split sums and the epilogue."""
    set_num_programs(monkeypatch, num_programs)
    x = torch.ones(1, 48, 1, 4).half()
    weight = torch.zeros(18, 48, 1, 1).half()
    weight[:, 0], weight[:, 1], weight[:, 16], weight[:, 32] = 2048, 1, -2048, 1
    # All sums of k-iterations are exact in fp32; the first two are not in fp16.
    with deeplab_fast.backend("triton"):
        assert (dilated_conv2d(x, weight) == 2).all()
        grad_input = results(lambda t: dilated_conv2d(t, weight.transpose(0, 1)), [x[:, :18]], x)
        assert (grad_input[1] == 2).all()
    bias, residual = torch.tensor([-2048.0] * 18).half(), torch.full((1, 18, 1, 4), 0.5).half()
    residual = residual.contiguous(memory_format=torch.channels_last)
    weight[:, 16:] = 0
    output = kernels.forward(x, [weight], [bias], [(1, 1)], residual)
    assert (output == 1.5).all()
    pixels = torch.zeros(1, 1, 1, 48).half()
    pixels[..., 0], pixels[..., 1], pixels[..., 16], pixels[..., 32] = 2048, 1, -2048, 1
    grad_weights = gradients.weight_gradients(
        pixels, torch.ones(1, 5, 1, 48).half(), [weight[:1, :5]], [(1, 1)]
    )
    assert (grad_weights[0] == 2).all()
    assert any(num_slots) == (num_programs > 1)


def test_taps_outside_the_map_have_zero_gradient(small_blocks, monkeypatch):
    set_num_programs(monkeypatch, 132)
    branches = [((3, 3, 3), 7), ((2, 3, 1), 2)]
    tensors, grad = parallel_operands(2, 5, 6, 2, branches)
    assert_right(*branches_of(branches), tensors, grad)


@pytest.mark.parametrize("dilation", [(2**40, 1), (1, 2**40), (2, 2**40), (5, 1), (1, 7)])
@pytest.mark.parametrize("groups", [1, 4])
def test_any_dilation(dilation, groups):
    """A dilation beyond the map equals one of the map's size, in either direction."""
    case = Conv(1, 4, 4, 5, 7, (3, 3), dilation, groups)
    tensors = operands(case, torch.float32, "cpu")

    def ours(x, w, b):
        return dilated_conv2d(x, w, b, dilation, groups)

    def theirs(x, w, b):
        rows, columns = (min(d, n) for d, n in zip(dilation, (5, 7)))
        return F.conv2d(x, w, b, padding="same", dilation=(rows, columns), groups=groups)

    assert_right(ours, theirs, tensors, torch.randn(1, 4, 5, 7))


@pytest.mark.parametrize(
    ("channels", "alignment"),
    [
        ((16,), 16),
        ((64, 48), 16),
        ((8, 16), 8),
        ((24, 40), 8),
        ((4, 6), 2),
        ((16, 5), 1),
        ((1,), 1),
    ],
)
def test_alignment_of_channels(channels, alignment):
    assert work_lists.alignment(channels) == alignment


@pytest.mark.parametrize(("channels", "alignment"), [((4, 6), 2), ((16, 5), 1)])
def test_alignment_passed_to_kernels(small_blocks, monkeypatch, channels, alignment):
    """Compiled kernels assume that all first channels and their numbers are multiples of it."""
    set_num_programs(monkeypatch, 132)
    log = []

    class Recorded:
        def __init__(self, kernel):
            self.kernel = kernel

        def __getitem__(self, grid):
            return lambda *args, **options: (
                log.append(options) or self.kernel[grid](*args, **options)
            )

    for module, name in (
        (kernels, "dilated_conv2d_kernel"),
        (kernels, "dilated_conv2d_reduce_kernel"),
        (gradients, "dilated_conv2d_wgrad_kernel"),
        (gradients, "dilated_conv2d_wgrad_reduce_kernel"),
    ):
        monkeypatch.setattr(module, name, Recorded(getattr(module, name)))
    branches = [((k, 1, 1), 1) for k in channels]
    tensors, grad = parallel_operands(1, 33, 1, 33, branches)
    assert_right(*branches_of(branches), tensors, grad)
    assert {options["ALIGNMENT"] for options in log} == {alignment}
    assert sum("BLOCK_R" in options for options in log) >= 2


# Depthwise convolutions.


def assert_depthwise_is_right(case: Conv) -> None:
    dilation, groups = case.dilation, case.groups
    assert_right(
        lambda x, w, b: dilated_conv2d(x, w, b, dilation, groups),
        lambda x, w, b: F.conv2d(x, w, b, padding="same", dilation=dilation, groups=groups),
        list(operands(case, torch.float32, "cpu")),
        torch.randn(case.N, case.K, case.H, case.W),
    )


@pytest.mark.parametrize("multiplier", [1, 3])
def test_depthwise_with_compiled_block_sizes(compiled_sizes, monkeypatch, multiplier):
    """More channels and pixels than a block, in runs of two blocks."""
    monkeypatch.setattr(depthwise_conv2d, "_RUN", 64)
    channels = 66 // multiplier
    assert_depthwise_is_right(Conv(3, channels, 66, 2, 23, (1, 3), (1, 5), channels))


def test_depthwise_with_more_pixels_than_a_run():
    assert_depthwise_is_right(Conv(3, 2, 2, 1, 1400, (1, 3), (1, 700), 2))


@pytest.mark.parametrize("channels", [2, 4, 5, 63, 64, 65])
def test_depthwise_sizes_around_a_block(compiled_sizes, monkeypatch, channels):
    monkeypatch.setattr(depthwise_conv2d, "_RUN", 32)
    assert_depthwise_is_right(Conv(2, channels, channels, 3, 4, (3, 1), (2, 1), channels))


@pytest.mark.parametrize("pixels", [31, 32, 33, 63, 64, 65, 129])
def test_depthwise_sizes_around_a_run(monkeypatch, pixels):
    """A run, the pixels that one program sums, has two blocks."""
    monkeypatch.setattr(depthwise_conv2d, "_RUN", 64)
    monkeypatch.setattr(depthwise_conv2d, "_blocks", lambda pixels, channels: (32, 4))
    assert_depthwise_is_right(Conv(1, 5, 5, 1, pixels, (1, 3), (1, 40), 5))


def test_compiled_depthwise_block_sizes(compiled_sizes):
    """A block has 2048 elements of up to 64 channels."""
    sizes = {channels: depthwise_conv2d._blocks(10**6, channels) for channels in (1, 3, 64, 65)}
    assert sizes == {1: (2048, 1), 3: (512, 4), 64: (32, 64), 65: (32, 64)}
    assert depthwise_conv2d._blocks(1, 64) == (32, 64)


def test_depthwise_sums_are_fp32(monkeypatch):
    """2048 + 1 - 2048 would be 0 in fp16: over taps, pixels, runs and the epilogue."""
    monkeypatch.setattr(depthwise_conv2d, "_RUN", 4)
    x = torch.ones(1, 2, 1, 12).half()
    weight = torch.tensor([2048.0, 1.0, -2048.0]).half().view(1, 1, 1, 3).repeat(2, 1, 1, 1)
    with deeplab_fast.backend("triton"):
        output, grad_input = results(lambda t: dilated_conv2d(t, weight, groups=2), [x], x)
    assert (output[..., 1:-1] == 1).all() and (grad_input[..., 1:-1] == 1).all()
    bias, residual = torch.tensor([-2048.0] * 2).half(), torch.full((1, 2, 1, 12), 0.5).half()
    residual = residual.contiguous(memory_format=torch.channels_last)
    output = depthwise_conv2d.forward(2049 * x.float(), weight[..., 1:2], bias, (1, 1), residual)
    assert (output == 1.5).all()
    bias[:], three = -3072, torch.full((2, 1, 1, 1), 3).half()
    output = depthwise_conv2d.forward(1025 * x, three, bias, (1, 1))
    assert (output == 3).all()  # 3075 - 3072, which would be 4 in fp16
    grad = torch.zeros_like(x)
    grad[..., 3], grad[..., 7] = 1025, -1024
    gradient = depthwise_conv2d.weight_gradient
    assert (gradient(grad, 3 * x, three, (1, 1)) == 3).all()
    pixels = torch.tensor([2048, 0, 0, 1, 0, 0, 0, 0, 0, 0, -2048, 1]).half().view(1, 1, 1, 12)
    for run in (4, 16):
        monkeypatch.setattr(depthwise_conv2d, "_RUN", run)
        grad_weight = gradient(pixels.expand(1, 2, 1, 12), x, three, (1, 1))
        assert grad_weight.dtype == torch.float16 and (grad_weight == 2).all()


@pytest.mark.parametrize("activation", ["none", "relu", "relu6"])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("with_residual", [False, True])
def test_depthwise_epilogue(activation, with_bias, with_residual):
    x, weight = torch.randn(2, 5, 3, 4), 3 * torch.randn(5, 1, 3, 3)
    bias = 3 * torch.randn(5) if with_bias else None
    residual = 3 * torch.randn(2, 5, 3, 4).contiguous(memory_format=torch.channels_last)
    expected = F.conv2d(x, weight, bias, padding=1, groups=5)
    expected = expected + residual if with_residual else expected
    expected = {"none": lambda t: t, "relu": F.relu, "relu6": F.relu6}[activation](expected)
    output = depthwise_conv2d.forward(
        x, weight, bias, (1, 1), residual if with_residual else None, activation
    )
    assert (output is residual) == with_residual
    torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-5)


# Operands.


@pytest.mark.parametrize("elements", [1, 1023, 1024, 1025, 2053])
def test_tf32_rounding_with_compiled_block_sizes(compiled_sizes, elements):
    x = torch.randn(1, elements, 1, 1)
    expected = ((x.view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)
    assert torch.equal(tf32.operand(x, "tf32"), expected)
    assert tf32.operand(x, "ieee") is x


def test_tf32_switch_is_read_at_every_call():
    """The same shapes are computed with torch's switch off, on and off again."""
    x, weight = torch.randn(1, 5, 3, 4), torch.randn(6, 5, 1, 1)
    exact, outputs = F.conv2d(x.double(), weight.double()), []
    for allowed in (False, True, False):
        set_tf32(allowed)
        with deeplab_fast.backend("triton"):
            outputs.append(dilated_conv2d(x, weight))
    assert torch.equal(outputs[0], outputs[2])
    errors = [(output - exact).abs().max() for output in outputs]
    assert errors[0] < 1e-5 < 1e-4 < errors[1] < 1e-2


@pytest.mark.parametrize(
    ("dtype", "allowed", "is_amd", "expected"),
    [
        (FP32, True, False, "tf32"),
        (FP32, False, False, "ieee"),
        (FP32, True, True, "ieee"),
        (FP16, True, False, "ieee"),
        (BF16, True, False, "ieee"),
    ],
)
def test_precision(monkeypatch, dtype, allowed, is_amd, expected):
    monkeypatch.setattr(torch.version, "hip", "7.0" if is_amd else None)
    set_tf32(allowed)
    assert tf32.precision_of(dtype) == expected


@pytest.mark.parametrize("groups", [1, 4])
def test_operands_of_any_strides(groups):
    """Input, weight, bias and the incoming gradient need not be contiguous."""
    x = torch.randn(5, 7, 4, 2).permute(3, 2, 1, 0)
    weight = torch.randn(3, 3, 4 // groups, 8)[..., ::2].permute(3, 2, 1, 0)
    bias, grad = torch.randn(8)[::2], torch.randn(5, 4, 7, 2).permute(3, 1, 2, 0)
    assert_right(
        lambda x, w, b: dilated_conv2d(x, w, b, (1, 2), groups),
        lambda x, w, b: F.conv2d(x, w, b, padding="same", dilation=(1, 2), groups=groups),
        [x, weight, bias],
        grad,
    )
    expanded = torch.ones(1, 1, 1, 1).expand(2, 4, 7, 5)
    assert_right(
        lambda x, w, b: dilated_conv2d(x, w, b, (1, 2), groups),
        lambda x, w, b: F.conv2d(x, w, b, padding="same", dilation=(1, 2), groups=groups),
        [x, weight, bias],
        expanded,
    )


# Work lists.

BASE = {
    "shape": (1, 6, 4, 5),
    "kernels": [((6, 3, 1), 1), ((6, 1, 1), 1)],
    "blocks": (32, 16, 16),
    "num_programs": 1,
}
CHANGES = [
    {"shape": (2, 6, 4, 5)},
    {"shape": (1, 5, 4, 5)},
    {"shape": (1, 6, 5, 4)},
    {"shape": (1, 6, 4, 4)},
    {"kernels": [((7, 3, 1), 1), ((6, 1, 1), 1)]},
    {"kernels": [((6, 3, 1), 1), ((5, 1, 1), 1)]},
    {"kernels": [((6, 3, 1), 3), ((6, 1, 1), 1)]},
    {"kernels": [((6, 1, 3), 1), ((6, 1, 1), 1)]},
    {"kernels": [((6, 5, 1), 1), ((6, 1, 1), 1)]},
    {"kernels": [((6, 1, 1), 1), ((6, 3, 1), 1)]},
    {"kernels": [((6, 3, 1), 1)]},
    {"blocks": (16, 16, 16)},
    {"blocks": (32, 32, 16)},
    {"blocks": (32, 16, 32)},
    {"num_programs": 50},
]


def test_work_list_per_shape(monkeypatch):
    """Calls that differ from the first one in a single property have their own work lists."""
    for call in (BASE, *[BASE | change for change in CHANGES]):
        set_num_programs(monkeypatch, call["num_programs"])
        set_blocks(monkeypatch, *call["blocks"])
        N, C, H, W = call["shape"]
        tensors, grad = parallel_operands(N, C, H, W, call["kernels"])
        assert_right(*branches_of(call["kernels"]), tensors, grad)


def test_work_list_is_cached(monkeypatch):
    calls = []
    schedule = native_work_lists._schedule
    monkeypatch.setattr(
        native_work_lists, "_schedule", lambda *args: calls.append(args) or schedule(*args)
    )
    for _ in range(2):
        tensors, grad = parallel_operands(1, 3, 2, 29, [((4, 1, 1), 1)])
        assert_right(*branches_of([((4, 1, 1), 1)]), tensors, grad)
    assert len(calls) == 3  # forward, gradient of the input, gradient of the weight


# Offsets beyond 2^31 elements. Only the few elements that are touched take memory.

SIXTEEN = {"BLOCK_M": 16, "BLOCK_N": 16}
FAR = 2**30  # channels of a pixel: the third pixel begins at offset 2^31


def rows(*values: tuple[int, ...]) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def far_pixels(values: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Tensor [1, FAR, 1, 3] whose first channels are ``values`` [pixels, channels]."""
    x = zeros_without_memory(1, FAR, 1, 3, dtype=dtype or values.dtype)
    x[0, : values.size(1), 0] = values.T
    return x


def first_channels(far: Tensor, count: int) -> Tensor:
    return far[0, :count, 0].T


def test_far_input():
    x, weight = torch.randn(3, 16), torch.randn(5, 16)
    output = kernels.forward(far_pixels(x), [weight[..., None, None]], [None], [(1, 1)])
    torch.testing.assert_close(output[0, :, 0].T, x @ weight.T)


def test_far_output_and_residual():
    x, weight, residual = torch.randn(3, 16), torch.randn(5, 16), torch.randn(3, 5)
    output = kernels.forward(
        x.T[None, :, None], [weight[..., None, None]], [None], [(1, 1)], far_pixels(residual)
    )
    torch.testing.assert_close(first_channels(output, 5), x @ weight.T + residual)


def test_far_bias():
    x, weight = torch.randn(3, 16), torch.randn(5, 16)
    bias = zeros_without_memory(3, FAR, dtype=torch.float32)
    bias[:, :5] = torch.randn(3, 5)
    output = kernels.forward(x[..., None, None], [weight[..., None, None]], [bias], [(1, 1)])
    torch.testing.assert_close(output[..., 0, 0], x @ weight.T + bias[:, :5])


def sum_taps(output: Tensor, input: Tensor, weight: Tensor, work_items: Tensor, **others) -> None:
    """Launch the kernel for one tap and 3 pixels."""
    arguments = dict(
        p_output=output,
        p_partial=torch.empty(0),
        p_input=input,
        weights=(weight,),
        p_bias=output,
        p_residual=output,
        p_pixels=torch.arange(3, dtype=torch.int32),
        p_taps=rows((0, 0, 0, 0)),
        p_tiles=rows((0, 0, 3, 0, 1)),
        p_work_items=work_items,
        p_branches=rows((weight.size(0), 0, 1)),
        H=1,
        W=3,
        C=weight.size(1),
        in_channels=input.size(1),
        out_channels=output.size(1),
        stride_bias=0,
        FLIPPED=False,
        HAS_BIAS=False,
        HAS_RESIDUAL=False,
        ACTIVATION="none",
        PRECISION="ieee",
        ALIGNMENT=1,
        BLOCK_K=16,
        **SIXTEEN,
    )
    kernels.dilated_conv2d_kernel[(work_items.size(0),)](**arguments | others)


def test_far_weight():
    """The second block of output channels and, for the input's gradient, k-iteration is far."""
    weight = zeros_without_memory(18, 2**27, dtype=torch.float32)
    near = weight[16:, :16]
    near.copy_(torch.randn(2, 16))
    x, output = torch.randn(3, 16), torch.zeros(3, 18)
    sum_taps(output, x, weight, rows((0, 1, 0, 1, -1)))
    torch.testing.assert_close(output[:, 16:], x @ near.T)
    grad, grad_input = torch.randn(3, 18), torch.empty(3, 16)
    sum_taps(grad_input, grad, weight, rows((0, 0, 1, 1, -1)), FLIPPED=True)
    torch.testing.assert_close(grad_input, grad[:, 16:] @ near)


def test_far_workspace_slots():
    far = 2**31 // 256
    partial = zeros_without_memory((far + 2) * 256, dtype=torch.float32)
    x, weight, output = torch.randn(3, 32), torch.randn(5, 32), torch.empty(3, 5)
    sum_taps(output, x, weight, rows((0, 0, 0, 1, far), (0, 0, 1, 1, far + 1)), p_partial=partial)
    kernels.dilated_conv2d_reduce_kernel[(2,)](
        output,
        partial,
        output,
        output,
        torch.arange(3, dtype=torch.int32),
        rows((0, 0, 3, 0, 1)),
        rows((0, 0, far, 2)),
        rows((5, 0, 1)),
        H=1,
        W=3,
        C=32,
        out_channels=5,
        stride_bias=0,
        FLIPPED=False,
        HAS_BIAS=False,
        HAS_RESIDUAL=False,
        ACTIVATION="none",
        ALIGNMENT=1,
        BLOCK_R=8,
        **SIXTEEN,
    )
    torch.testing.assert_close(output, x @ weight.T)


@pytest.mark.parametrize("is_split", [False, True])
def test_far_weight_gradient(is_split):
    """The third row of both operands and of the result is far, and so is the workspace slot."""
    far = 2**31 // 256
    grad, x = torch.randn(3, 3), torch.randn(3, 16)
    grad_weight = zeros_without_memory(3, FAR, dtype=torch.float32)
    partial = zeros_without_memory((far + 1) * 256, dtype=torch.float32)
    rectangle, branch = rows((0, 0, 0, 0, 0, 0, 1, 3)), rows((3, 0, 1))
    gradients.dilated_conv2d_wgrad_kernel[(1,)](
        (grad_weight,),
        partial,
        far_pixels(grad),
        far_pixels(x),
        rectangle,
        rows((0, 0, 0, 1, far if is_split else -1)),
        branch,
        H=1,
        W=3,
        N=1,
        C=FAR,
        out_channels=FAR,
        PRECISION="ieee",
        ALIGNMENT=1,
        BLOCK_K=16,
        **SIXTEEN,
    )
    if is_split:
        gradients.dilated_conv2d_wgrad_reduce_kernel[(2,)](
            (grad_weight,),
            partial,
            rectangle,
            rows((0, 0, far, 1)),
            branch,
            C=FAR,
            ALIGNMENT=1,
            BLOCK_R=8,
            **SIXTEEN,
        )
    torch.testing.assert_close(grad_weight[:, :16], grad.T @ x)


def test_rounding_far_elements_to_tf32(monkeypatch):
    x, output = (zeros_without_memory(2**31 + 3, dtype=torch.float32) for _ in range(2))
    x[2**31 :] = 1 + 2**-11
    number_programs_from(monkeypatch, 2**21)
    tf32.round_to_tf32_kernel[(1,)](output, x, x.numel(), BLOCK=1024)
    assert output[2**31 :].tolist() == [1 + 2**-10] * 3


def test_far_pixels_of_a_depthwise_convolution():
    x, weight, residual = torch.randn(3, 16), torch.randn(16), torch.randn(3, 16)
    output = far_pixels(residual)
    depthwise_conv2d.depthwise_conv2d_kernel[(1, 1)](
        output,
        far_pixels(x),
        weight,
        output,
        output,
        num_pixels=3,
        H=1,
        W=3,
        in_channels=FAR,
        out_channels=FAR,
        dilation_h=1,
        dilation_w=1,
        R=1,
        S=1,
        MULTIPLIER=1,
        FLIPPED=False,
        HAS_BIAS=False,
        HAS_RESIDUAL=True,
        ACTIVATION="none",
        BLOCK_P=4,
        BLOCK_C=16,
    )
    torch.testing.assert_close(first_channels(output, 16), x * weight + residual)


def test_far_pixels_of_a_depthwise_weight_gradient():
    """The partial sums of the third tap are far, too."""
    grad, x = torch.randn(3, 16), torch.randn(3, 16)
    partial = zeros_without_memory(3, FAR, dtype=torch.float32)
    depthwise_conv2d.depthwise_conv2d_wgrad_kernel[(3, 1)](
        partial,
        far_pixels(grad),
        far_pixels(x),
        num_pixels=3,
        H=1,
        W=3,
        K=FAR,
        dilation_h=1,
        dilation_w=1,
        R=1,
        S=3,
        MULTIPLIER=1,
        RUN=4,
        BLOCK_P=4,
        BLOCK_C=16,
    )
    expected = [(grad[1:] * x[:-1]).sum(0), (grad * x).sum(0), (grad[:-1] * x[1:]).sum(0)]
    torch.testing.assert_close(partial[:, :16], torch.stack(expected))


# Interpolation.

_source_pair, _interpolate = bilinear.source_pair, bilinear.interpolate


@triton.jit
def interpolated(p_output, p_input, size, scale, ALIGN_CORNERS: tl.constexpr, BLOCK: tl.constexpr):
    o = tl.arange(0, BLOCK)
    o_lo, o_hi, b_w0, b_w1 = _source_pair(o, size, scale, ALIGN_CORNERS)
    b_output = _interpolate(tl.load(p_input + o_lo), tl.load(p_input + o_hi), b_w0, b_w1)
    tl.store(p_output + o, b_output)


@pytest.mark.parametrize("emulated", [False, True])
@pytest.mark.parametrize("align_corners", [False, True])
def test_interpolation_with_the_fma_of_a_gpu(monkeypatch, emulated, align_corners):
    """Results equal the oracle's bit for bit, also at both ends and if the fma is emulated."""
    monkeypatch.setattr(
        interpreter_builder,
        "create_fma",
        lambda a, b, c: TensorHandle(bilinear_oracle.fma(a.data, b.data, c.data), a.dtype.scalar),
    )
    monkeypatch.setattr(bilinear, "_EMULATE_FMA", tl.constexpr(emulated))
    x, size, scale = torch.randn(100), 128, (99 / 127 if align_corners else 100 / 128)
    output = torch.empty(size)
    interpolated[(1,)](output, x, 100, scale, ALIGN_CORNERS=align_corners, BLOCK=size)
    lo, hi, w0, w1 = bilinear_oracle.source_pairs(size, 100, scale, align_corners)
    values = x.numpy()
    expected = torch.from_numpy(bilinear_oracle.fma(values[lo], w0, values[hi] * w1))
    assert torch.equal(output, expected)
    whole = F.interpolate(
        x.double()[None, None, None], (1, size), mode="bilinear", align_corners=align_corners
    )
    assert np.abs(expected.double().numpy() - whole.numpy().flatten()).max() < 1e-4
