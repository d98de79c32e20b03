"""NaN and infinity through all convolution ops and epilogues: where plain arithmetic has them.

Finite operands are small integers and halves, so that sums are exact in every dtype and order, and
the kernels of this project have to give the oracle's numbers bit for bit.
"""

from __future__ import annotations

import copy
import functools
import math
import re
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

import deeplab_fast
from deeplab_fast import (
    ASPP,
    aspp,
    dilated_conv2d,
    parallel_dilated_conv2d,
)
from deeplab_fast._native.common import LaunchContext
from deeplab_fast.backends import registry
from deeplab_fast.backends.cuda import depthwise_conv2d
from deeplab_fast.models import DeepLabV3
from deeplab_fast.models.backbones.mobilenet_v2 import InvertedResidual
from deeplab_fast.models.backbones.resnet import Bottleneck
from deeplab_fast.models.deeplabv3 import _classifier
from deeplab_fast.models.fusion import fuse
from deeplab_fast.ops.dilated_conv2d_and_mean import parallel_dilated_conv2d_and_mean
from deeplab_fast.ops.fused_conv2d import fused_conv2d, fused_conv2d_add_

from ..backends.test_prepared_kernels import with_statistics
from ..ops.test_aspp import operands as aspp_operands
from ..support import emulator
from ..support.cases import Conv
from ..support.convolution import convolve
from ..support.triton_splits import record_num_slots, set_blocks, set_num_programs
from ..support.unsupported import skip_if_unsupported

pytestmark = pytest.mark.usefixtures("tf32")  # else the CUDA kernels take no fp32

NAN, INF = math.nan, math.inf
# Times 2 it overflows, times 1 it does not.
LARGE = {torch.float32: 2.0**127, torch.bfloat16: 2.0**127, torch.float16: 2.0**15}


class Runner(NamedTuple):
    """A backend, and how its emulated or interpreted kernels are run."""

    backend: str
    dtype: torch.dtype
    device: str = ""
    splits: bool = False

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return "-".join([self.device or self.backend, dtype, *(["split"] if self.splits else [])])

    @property
    def is_ours(self) -> bool:
        """True if the kernels are ours, not torch's."""
        return self.backend not in ("cpu", "reference")


FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
# Whole sums, and sums that are split and added by another kernel. Triton's interpreter gets bf16 as
# fp32; those of sm_90 have no fp32.
RUNNERS = (
    *(Runner(name, dtype) for name in ("reference", "cpu") for dtype in (FP32, BF16)),
    *(Runner("emulated", dtype, "sm_80") for dtype in (FP32, BF16, FP16)),
    *(Runner("emulated", dtype, "sm_80", splits=True) for dtype in (FP32, FP16)),
    *(Runner("emulated", dtype, "sm_90") for dtype in (BF16, FP16)),
    Runner("emulated", BF16, "sm_90", splits=True),
    *(Runner("triton", dtype) for dtype in (FP32, FP16)),
    Runner("triton", FP32, splits=True),
)
SPLIT = tuple(runner for runner in RUNNERS if runner.splits)
WHOLE = tuple(runner for runner in RUNNERS if not runner.splits)
# LaunchContext that have no variant for sm_90.
ANY_DEVICE = tuple(runner for runner in WHOLE if runner.device != "sm_90")


def on(*runners: Runner):
    return pytest.mark.parametrize("runner", runners, ids=str, indirect=True)


@pytest.fixture
def runner(request, monkeypatch):
    """Run a test on this backend, and check that sums are split if and only if they should be."""
    chosen: Runner = request.param
    if reason := registry.unavailable_reason(chosen.backend, "cpu"):
        pytest.skip(reason)
    if (chosen.backend, chosen.dtype) == ("cpu", BF16):
        skip_if_unsupported("cpu", "fused_conv2d", torch.zeros(1, 1, 1, 1, dtype=BF16))
    slots = split_triton(monkeypatch) if chosen.splits and chosen.backend == "triton" else []
    monkeypatch.setattr(emulator, "num_ctas", 96 if chosen.splits else 1)
    before = launches("_reduce_")
    with deeplab_fast.backend(chosen.backend), emulator.machine(1, chosen.device or "sm_80"):
        yield chosen
    split = launches("_reduce_") > before or max(slots, default=0) > 0
    assert split == chosen.splits


def launches(word: str) -> int:
    """Launches of emulated dense kernels with this word in their name."""
    counts = emulator.load().launch_counts().items()
    is_dense = re.compile("dilated_conv2d_(fwd|wgrad)").match
    return sum(n for name, n in counts if word in name and is_dense(name))


def split_triton(monkeypatch) -> list[int]:
    """Split the sums of Triton's convolutions; returns the numbers of workspace slots."""
    set_num_programs(monkeypatch, 48)
    set_blocks(monkeypatch, 64, 32, 32)
    return record_num_slots(monkeypatch)


def digits(*shape: int, largest: int = 2) -> Tensor:
    """Integers other than 0, whose product with infinity would be NaN."""
    return torch.randint(1, largest + 1, shape) * (2.0 * torch.randint(0, 2, shape) - 1)


def taps_inside(
    input: Tensor, kernel: tuple[int, int], dilation: tuple[int, int], padded: bool
) -> list[tuple[int, int, tuple[slice, slice], Tensor]]:
    """The outputs to which each tap (r, s) contributes, and the input pixels that it reads.

    ``padded``: for all outputs, of an input with zeros around.
    """
    H, W = input.shape[2:]
    reach = [d * (k // 2) for d, k in zip(dilation, kernel)]
    surrounded = F.pad(input, (reach[1], reach[1], reach[0], reach[0]))
    result = []
    for r in range(kernel[0]):
        for s in range(kernel[1]):
            dy, dx = r * dilation[0] - reach[0], s * dilation[1] - reach[1]
            ys = slice(0, H) if padded else slice(max(0, -dy), max(0, min(H, H - dy)))
            xs = slice(0, W) if padded else slice(max(0, -dx), max(0, min(W, W - dx)))
            read = surrounded[
                :, :, ys.start + dy + reach[0] : ys.stop + dy + reach[0],
                xs.start + dx + reach[1] : xs.stop + dx + reach[1],
            ]  # fmt: skip
            result.append((r, s, (ys, xs), read))
    return result


def pair(dilation: int | tuple[int, int]) -> tuple[int, int]:
    return (dilation, dilation) if isinstance(dilation, int) else dilation


def convolution(
    input: Tensor, weight: Tensor, dilation: int | tuple[int, int] = 1, groups: int = 1,
    padded: bool = False, overflows: bool = False,
) -> Tensor:  # fmt: skip
    """Sum in float64, product by product as a BLAS might skip some: taps inside the map, or all."""
    input, weight = input.double(), weight.double()
    output = input.new_zeros(input.size(0), weight.size(0), *input.shape[2:])
    each = weight.size(0) // groups
    for r, s, (ys, xs), read in taps_inside(input, weight.shape[2:], pair(dilation), padded):
        read = read.unflatten(1, (groups, -1)).repeat_interleave(each, 1)
        products = read * weight[None, :, :, r, s, None, None]
        output[:, :, ys, xs] += (products.float().double() if overflows else products).sum(2)
    return output


def convolutions(*arguments, **options) -> list[Tensor]:
    """The outputs without the taps that fall on padding, and with their products by zero.

    Each with products that overflow in fp32, or only sums that do: Inf may come before or after.
    """
    return [
        convolution(*arguments, **options, padded=padded, overflows=overflows)
        for padded in (False, True)
        for overflows in (False, True)
    ]


ACTIVATIONS = {
    "none": lambda x: x,
    "relu": lambda x: torch.where(x < 0, 0.0, x),
    "relu6": lambda x: torch.where(x < 0, 0.0, torch.where(x > 6, 6.0, x)),
}


def assert_same(runner: Runner, actual: Tensor, expected: list[Tensor], dropped=None) -> None:
    """Each element equals one of the expected ones rounded to the dtype, NaN included.

    Bit for bit for kernels of this project. ``dropped``: elements that may be 0 as well.
    """
    close = {} if not runner.is_ours else {"rtol": 0, "atol": 0}
    if not runner.is_ours and actual.dtype != torch.float32:
        close = {"rtol": 2e-2, "atol": 2e-2}
    right = torch.zeros_like(actual, dtype=torch.bool)
    for exact in expected:
        rounded = exact.float().to(actual.dtype)
        right |= actual.isclose(rounded, **close, equal_nan=True)
    if dropped is not None:
        right |= dropped & (actual == 0)
    wrong = (~right).nonzero()
    if len(wrong):
        at = tuple(wrong[0].tolist())
        values = [exact[at].item() for exact in expected]
        pytest.fail(f"{len(wrong)} wrong, first {at}: {actual[at].item()}, expected {values}")


def with_cudas_nan(tensor: Tensor) -> Tensor:
    """CUDA's canonical NaN, all ones, which careless rounding turns into 0."""
    as_integers = tensor.view(torch.int32 if tensor.dtype == FP32 else torch.int16)
    as_integers[tensor.isnan()] = torch.iinfo(as_integers.dtype).max
    return tensor


def special_input(N: int, C: int, H: int, W: int, dtype: torch.dtype) -> Tensor:
    """Images without special values, with NaN, Inf, -Inf, both, and a large one."""
    input = digits(6, C, H, W)
    y, x, c = H // 2, W // 3, C // 2
    input[1, c, y, x] = NAN
    input[2, c, y, x] = INF
    input[3, c - 1, y, x] = -INF
    input[4, 0, y, x], input[4, C - 1, y - 1, x + 2] = INF, -INF
    input[5, c, y, x] = LARGE[dtype]
    input[0, [6, C - 1], 0, 0] = 0  # times Inf it is NaN
    return with_cudas_nan(input.to(dtype))


def special_channels(weight: Tensor, bias: Tensor, dtype: torch.dtype) -> None:
    """A special value in the bias, the weight's middle tap, or both, of a channel each."""
    r, s = weight.size(2) // 2, weight.size(3) // 2
    c = weight.size(1) - 1
    bias[1], bias[2], bias[3], bias[4] = NAN, INF, -INF, LARGE[dtype]
    weight[4].abs_()  # two large numbers add up
    if weight.size(1) > 1:
        weight[0, [0, weight.size(1) // 2], r, s] = 0
    else:
        weight[-1, 0, r, s] = 0
    weight[5, c, r, s], weight[6, c, r, s], weight[7, 0, r, s] = NAN, INF, -INF
    if weight.size(0) > 8:
        bias[8], weight[8, 0, r, s] = INF, -INF
        weight[9, c, 0, 0] = INF  # a tap that falls on padding somewhere
        weight[10, c, -1, -1] = NAN


def special_residual(shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """A special value at one pixel of each image, and a large value in the first."""
    residual = digits(*shape, largest=9)
    for x, value in enumerate([NAN, INF, -INF, -0.0]):
        residual[:, :, 0, x] = value
    residual[0, :, 1, 0] = LARGE[dtype]
    return residual.to(dtype).contiguous(memory_format=torch.channels_last)


DEPTHWISE = [
    Conv(6, 16, 16, 4, 5, (3, 3), (1, 2), 16),
    Conv(6, 16, 16, 4, 5, (5, 5), 1, 16),
    Conv(6, 16, 16, 4, 5, (3, 5), 1, 16),  # any other kernel, in vectors
    Conv(6, 13, 13, 4, 5, (3, 3), 2, 13),  # and one channel at a time
]


class Special(NamedTuple):
    """Operands, and the sums of products that are correct for them."""

    input: Tensor
    weight: Tensor
    bias: Tensor
    sums: list[Tensor]


@functools.cache
def special(case: Conv, dtype: torch.dtype) -> Special:
    """Cached oracle, because it is slow: all backends share it, and nobody may write to it."""
    torch.manual_seed(1)
    input = special_input(case.N, case.C, case.H, case.W, dtype)
    weight = digits(case.K, case.C // case.groups, *case.kernel)
    bias = digits(case.K, largest=9) / 2
    special_channels(weight, bias, dtype)
    weight, bias = with_cudas_nan(weight.to(dtype)), with_cudas_nan(bias.to(dtype))
    sums = convolutions(input, weight, case.dilation, case.groups)
    return Special(input, weight, bias, sums)


def same_geometry(case: Conv) -> tuple:
    """Stride, padding, dilation and groups."""
    dilation = pair(case.dilation)
    return (1, 1), tuple(d * (k // 2) for d, k in zip(dilation, case.kernel)), dilation, case.groups


def check_fused(runner: Runner, case: Conv, activation: str, with_residual: bool) -> None:
    input, weight, bias, sums = special(case, runner.dtype)
    sums = [s + bias.double()[:, None, None] for s in sums]
    geometry = same_geometry(case)
    if with_residual:
        residual = special_residual(sums[0].shape, runner.dtype)
        sums = [s + residual.double() for s in sums]
        output = fused_conv2d_add_(residual, input, weight, bias, *geometry, activation)
        assert output is residual
    else:
        output = fused_conv2d(input, weight, bias, *geometry, activation)
    # oneDNN's own ReLU makes 0 of NaN; the models see to it that no such NaN is lost.
    is_fused = activation != "none" and runner.backend == "cpu" and case.C < 512
    expected = [ACTIVATIONS[activation](s) for s in sums]
    assert_same(runner, output, expected, sums[-1].isnan() if is_fused else None)


# Output channels that do not fill a vector, and that do.
@on(*RUNNERS)
@pytest.mark.parametrize(
    ("channels", "activation", "with_residual"), [(21, "relu6", True), (24, "relu", False)]
)
def test_dense(runner, channels, activation, with_residual):
    case = Conv(6, 72 if runner.splits else 16, channels, 4, 5)
    check_fused(runner, case, activation, with_residual)


@on(Runner("cpu", BF16))
@pytest.mark.parametrize("with_residual", [False, True])
def test_channels_split_for_onednn(runner, with_residual):
    check_fused(runner, Conv(6, 520, 16, 4, 5), "relu6", with_residual)


@on(*ANY_DEVICE)
@pytest.mark.parametrize("case", DEPTHWISE, ids=str)
@pytest.mark.parametrize(
    ("activation", "with_residual"), [("none", False), ("relu", True), ("relu6", False)]
)
def test_depthwise(runner, case, activation, with_residual):
    check_fused(runner, case, activation, with_residual)


# With bf16 oneDNN multiplies NaN of one group by the zeros of another.
@on(*(Runner(name, FP32) for name in ("reference", "cpu", "triton")))
def test_several_outputs_of_each_channel(runner):
    check_fused(runner, Conv(6, 8, 16, 4, 5, groups=8), "relu6", with_residual=True)


@on(*(runner for runner in WHOLE if not runner.is_ours))
def test_groups(runner):
    case = Conv(6, 32, 32, 4, 5, groups=2)
    input, weight, bias, sums = special(case, runner.dtype)
    output = dilated_conv2d(input, weight, bias, groups=2)
    assert_same(runner, output, [s + bias.double()[:, None, None] for s in sums])


@on(*(r for r in RUNNERS if r != Runner("triton", FP32, splits=True)))  # which takes long
def test_parallel_branches_and_mean(runner):
    """The second branch begins at an odd channel."""
    C = 72 if runner.splits else 16
    cases = Conv(6, C, 11, 4, 5, (1, 1)), Conv(6, C, 8, 4, 5, (3, 3), 2)
    (input, first, bias, sums), (_, second, other_bias, others) = (
        special(case, runner.dtype) for case in cases
    )
    weights, dilations, biases = [first, second], [1, 2], [bias, other_bias]
    expected = [torch.cat(s, dim=1) for s in zip(sums, others)]
    op = torch.ops.deeplab_fast.parallel_dilated_conv2d_and_mean
    output, means = op(input, weights, dilations, backend=runner.backend)
    assert_same(runner, output, expected)
    assert means.dtype == torch.float32
    assert_same(runner, means, [input.double().mean((2, 3))])
    output = parallel_dilated_conv2d(input, weights, biases, dilations)
    added = torch.cat(biases).double()[:, None, None]
    assert_same(runner, output, [s + added for s in expected])


@on(*(runner for runner in RUNNERS if runner.backend == "emulated"))
@pytest.mark.parametrize("activation", ["none", "relu6"])
def test_emulated_bias_of_an_image(runner, activation):
    """All other terms at once, which no op combines."""
    case = Conv(6, 72 if runner.splits else 16, 21, 4, 5)
    input, weight, bias, sums = special(case, runner.dtype)
    image_bias = digits(6, 21, largest=9) / 2
    image_bias[0, 12], image_bias[1, 13], image_bias[2, 14] = NAN, INF, -INF
    output = special_residual(sums[0].shape, runner.dtype)
    terms = bias.double()[:, None, None] + output.double() + image_bias.double()[:, :, None, None]
    kernels = LaunchContext(
        emulator.load().cuda, 0, emulator.num_ctas, is_sm90=runner.device == "sm_90"
    )
    convolve(
        kernels, output, input.contiguous(memory_format=torch.channels_last), [weight], [bias],
        [(1, 1)], activation=activation, residual=output, image_bias=image_bias,
    )  # fmt: skip
    assert_same(runner, output, [ACTIVATIONS[activation](s + terms) for s in sums])


# --- epilogues of finite numbers


@on(*RUNNERS)
def test_each_term_is_added_once_and_before_the_activation(runner):
    """Sums are on both sides of 0 and 6, with and without each term."""
    C, K = 72 if runner.splits else 16, 24
    input, bias = digits(3, C, 4, 5), digits(K, largest=7) / 2
    weight = digits(K, C, 3, 3) * (torch.rand(K, C, 3, 3) < 0.3 / C)
    residual = (digits(3, K, 4, 5, largest=7) / 2).contiguous(memory_format=torch.channels_last)
    input, weight, bias, residual = (t.to(runner.dtype) for t in (input, weight, bias, residual))
    terms = convolution(input, weight), bias.double()[:, None, None], residual.double()
    for partial in (terms[0], terms[0] + terms[1], terms[0] + terms[2], sum(terms)):
        assert (partial < 0).any() and (partial > 6).any() and ((0 < partial) & (partial < 6)).any()
    geometry = same_geometry(Conv(3, C, K, 4, 5))
    for added in (None, residual):
        exact = ACTIVATIONS["relu6"](terms[0] + terms[1] + (0 if added is None else terms[2]))
        if added is None:
            output = fused_conv2d(input, weight, bias, *geometry, "relu6")
        else:
            output = fused_conv2d_add_(residual, input, weight, bias, *geometry, "relu6")
        assert_same(runner, output, [exact])


# --- gradients


def special_gradients(case: Conv, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Input, weight and gradient of the output; a special value in a channel of each."""
    input = digits(case.N, case.C, case.H, case.W)
    grad_output = digits(case.N, case.K, case.H, case.W)
    for tensor, y in ((input, 1), (grad_output, 2)):
        tensor[:, 4].abs_()  # large products add up
        tensor[0, 0, y, 1] = NAN
        tensor[1, 1, y, 1] = INF
        tensor[2, 2, 0, 0] = -INF
        tensor[3, 3, y, 1], tensor[4, 3, y, 2] = INF, -INF
        tensor[y + 3, 4, y, 1] = LARGE[dtype]
    weight = digits(case.K, case.C // case.groups, *case.kernel)
    r, s = case.kernel[0] // 2, case.kernel[1] // 2
    weight[5, -1, r, s], weight[6, 0, r, s], weight[7, 0, r, s] = NAN, INF, -INF
    return input.to(dtype), weight.to(dtype), grad_output.to(dtype)


def input_gradients(grad_output: Tensor, weight: Tensor, case: Conv) -> list[Tensor]:
    mirrored = weight.flip(2, 3)
    if case.groups == 1:
        mirrored = mirrored.transpose(0, 1)
    return convolutions(grad_output, mirrored, case.dilation, case.groups)


def weight_gradients(grad_output: Tensor, input: Tensor, case: Conv) -> list[Tensor]:
    """Sums over the pixels at which a tap is inside the map, with and without products by zeros."""
    results = []
    for padded in (False, True):
        for overflows in (False, True):
            rows = []
            dilation = pair(case.dilation)
            for _, _, (ys, xs), read in taps_inside(input.double(), case.kernel, dilation, padded):
                grad = grad_output.double()[:, :, ys, xs]
                products = grad * read if case.groups > 1 else grad[:, :, None] * read[:, None]
                products = products.float().double() if overflows else products
                rows.append(products.sum((0, -2, -1)))
            shape = case.K, case.C // case.groups, *case.kernel
            results.append(torch.stack(rows, dim=-1).view(shape))
    return results


def beside(grad_output: Tensor, input: Tensor, case: Conv) -> Tensor:
    """Weights with an infinite or NaN input that their tap reads for no output."""
    outside = []
    for _, _, _, read in taps_inside(input, case.kernel, pair(case.dilation), padded=False):
        never_read = (~input.isfinite()).sum((0, 2, 3)) > (~read.isfinite()).sum((0, 2, 3))
        outside.append(never_read.expand(case.K, -1))
    return torch.stack(outside, dim=-1).view(case.K, case.C, *case.kernel)


# torch's own gradients of bf16 are wrong on some CPUs.
GRADIENTS = tuple(r for r in RUNNERS if r.is_ours or r.dtype == FP32)


@on(*GRADIENTS)
def test_gradients_of_parallel_branches_and_mean(runner):
    H, W = (9, 11) if runner.splits and runner.backend == "emulated" else (4, 5)
    cases = Conv(6, 8, 72 if runner.splits else 16, H, W), Conv(6, 8, 5, H, W, (1, 1))
    input, first, grad = special_gradients(cases[0], runner.dtype)
    second, other_grad = digits(5, 8, 1, 1).to(runner.dtype), digits(6, 5, H, W).to(runner.dtype)
    grad_mean = H * W * digits(6, 8)
    grad_mean[5, 1], grad_mean[5, 2], grad_mean[5, 3] = NAN, INF, -INF
    before = [launches(name) for name in ("fwd_reduce", "wgrad_reduce")]
    grad_input, grad_weights, grad_biases = (
        torch.ops.deeplab_fast.parallel_dilated_conv2d_backward(
            torch.cat([grad, other_grad], 1), input, [first, second], [1, 1], [True] * 3,
            grad_mean, backend=runner.backend,
        )
    )  # fmt: skip
    if runner.backend == "emulated":
        after = [launches(name) for name in ("fwd_reduce", "wgrad_reduce")]
        assert [a > b for a, b in zip(after, before)] == [runner.splits] * 2
    grads = (grad, other_grad)
    share = (grad_mean / (H * W)).double()[:, :, None, None]
    other = convolution(other_grad, second.transpose(0, 1))
    sums = [s + other + share for s in input_gradients(grad, first, cases[0])]
    assert_same(runner, grad_input, sums)
    for actual, g, case in zip(grad_weights, grads, cases):
        expected = weight_gradients(g, input, case)
        if runner.is_ours and runner.device != "sm_90":
            expected = expected[:2]  # they multiply no zeros
        elif runner.device == "sm_90":
            nan = torch.where(beside(g, input, case), NAN, expected[0])
            expected.append(nan)
        assert_same(runner, actual, expected)
    for actual, g in zip(grad_biases, grads):
        assert_same(runner, actual, [g.double().sum((0, 2, 3))])


@on(*(Runner(name, FP32) for name in ("reference", "cpu")))
def test_gradient_of_the_mean_alone(runner):
    input = digits(2, 8, 4, 5).requires_grad_()
    _, mean = parallel_dilated_conv2d_and_mean(input, [digits(3, 8, 1, 1)], [1])
    grad_mean = 20 * digits(2, 8, 1, 1)
    grad_mean[0, 1], grad_mean[0, 2], grad_mean[1, 3] = NAN, INF, -INF
    (grad_input,) = torch.autograd.grad(mean, input, grad_mean)
    assert_same(runner, grad_input, [(grad_mean.double() / 20).expand_as(input)])


@on(*(r for r in ANY_DEVICE if r in GRADIENTS))
@pytest.mark.parametrize("case", DEPTHWISE, ids=str)
def test_gradients_of_a_depthwise_convolution(runner, case, monkeypatch):
    monkeypatch.setattr(depthwise_conv2d, "_ELEMENTS_PER_PART", case.N * case.C * 7)  # three parts
    input, weight, grad = special_gradients(case, runner.dtype)
    grad_input, grad_weight, grad_bias = torch.ops.deeplab_fast.dilated_conv2d_backward(
        grad, input, weight, pair(case.dilation), case.groups, [True] * 3, backend=runner.backend
    )
    assert_same(runner, grad_input, input_gradients(grad, weight, case))
    assert_same(runner, grad_weight, weight_gradients(grad, input, case))
    assert_same(runner, grad_bias, [grad.double().sum((0, 2, 3))])


# --- ASPP


# Positions of aspp's arguments; a pair is one of several branches.
PLACES = {
    "1x1 weight": ((1, 0), (2, 3, 0, 0)),
    "atrous weight": ((1, 1), (2, 3, 1, 1)),
    "1x1 bias": ((2, 0), (4,)),
    "atrous bias": ((2, 1), (4,)),
    "pool weight": ((4,), (2, 3, 0, 0)),
    "pool bias": ((5,), (3,)),
}


def aspp_close(runner: Runner) -> dict:
    return {"rtol": 3e-2, "atol": 3e-2} if runner.dtype != FP32 else {"rtol": 2e-3, "atol": 2e-3}


def aspp_definition(
    input, weights, biases, dilations, pool_weight, pool_bias, project_weight, project_bias
) -> Tensor:
    branches = [
        convolution(input, w, dilation) + b.double()[:, None, None]
        for w, b, dilation in zip(weights, biases, dilations)
    ]
    mean = input.double().mean((2, 3), keepdim=True)
    pooled = convolution(mean, pool_weight) + pool_bias.double()[:, None, None]
    branches.append(pooled.expand(-1, -1, *input.shape[2:]))
    joined = ACTIVATIONS["relu"](torch.cat(branches, dim=1))
    output = convolution(joined, project_weight) + project_bias.double()[:, None, None]
    return ACTIVATIONS["relu"](output)


def check_aspp(runner: Runner, arguments: list) -> Tensor:
    expected = aspp_definition(*arguments)
    output = aspp(*arguments)
    torch.testing.assert_close(output.double(), expected, **aspp_close(runner), equal_nan=True)
    return output


@on(*(r for r in WHOLE if r.dtype != FP16))
@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_aspp_of_a_non_finite_image(runner, value):
    """Image pooling takes NaN to all of an image, past pixels that no branch reads it at."""
    arguments = aspp_operands((3, 8, 5, 6), runner.dtype, dilations=(1,))
    arguments[0][1, 3, 4, 5] = value
    output = check_aspp(runner, arguments)
    assert output[0].isfinite().all() and output[2].isfinite().all()
    assert output[1].isnan().all() or not math.isnan(value)


@on(*(r for r in WHOLE if r.dtype != FP16))
@pytest.mark.parametrize("place", PLACES)
def test_aspp_of_non_finite_branches(runner, place):
    """-Inf in a bias is a channel that ReLU makes 0, NaN and Inf reach all of the output."""
    position, index = PLACES[place]
    for value in (NAN, INF, -INF) if "bias" in place else (NAN,):
        arguments = aspp_operands((2, 8, 3, 4), runner.dtype, dilations=(1,))
        tensor = arguments[position[0]]
        tensor = tensor if len(position) == 1 else tensor[position[1]]
        tensor[index] = value
        output = check_aspp(runner, arguments)
        assert output.isnan().all() or not math.isnan(value)


@on(*(r for r in WHOLE if r.dtype != FP16))
def test_aspp_of_a_non_finite_projection(runner):
    """One channel each: special values of the branches' weights, pooled weights and bias."""
    arguments = aspp_operands((2, 8, 3, 4), runner.dtype, dilations=(1,))
    branches = sum(weight.size(0) for weight in arguments[1])
    arguments[5].abs_().add_(9)  # the pooled features are not 0, nor
    arguments[2][0][:] = 9  # are those of the first branch
    weight, bias = arguments[6:]
    weight[0, 1], weight[1, 1] = NAN, INF
    weight[2, branches + 1], weight[3, branches + 1], weight[4, branches + 2] = NAN, INF, -INF
    bias[5] = NAN
    output = check_aspp(runner, arguments)
    assert output[:, [0, 2, 5]].isnan().all() and (output[:, [1, 3]] == INF).all()
    assert (output[:, 4] == 0).all() and output[:, 6].isfinite().all()


@on(*(Runner(name, FP32) for name in ("reference", "cpu", "triton")), Runner("emulated", BF16))
def test_gradients_of_aspp_of_a_non_finite_image(runner):
    """ReLU of NaN has a gradient, as in PyTorch: NaN and Inf do not make others 0."""
    arguments = aspp_operands((3, 8, 3, 4), runner.dtype, dilations=(1,))
    arguments[0][1, 3, 2, 1] = NAN
    grad_output = torch.randn(3, 7, 3, 4).to(runner.dtype)

    def gradients(function, convert) -> list[Tensor]:
        converted = tree_map_only(Tensor, lambda t: convert(t).requires_grad_(), arguments)
        leaves = [t for t in tree_leaves(converted) if isinstance(t, Tensor)]
        return list(torch.autograd.grad(function(*converted), leaves, convert(grad_output)))

    actual = gradients(aspp, Tensor.detach)
    for a, e in zip(actual, gradients(aspp_definition, Tensor.double), strict=True):
        torch.testing.assert_close(a.double(), e, **aspp_close(runner), equal_nan=True)


def one_by_one(module: ASPP) -> ASPP:
    """A copy that calls its modules one after the other, in plain PyTorch."""
    module = copy.deepcopy(module)
    module.project.register_forward_hook(lambda *args: None)
    return module


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_module(training, value):
    """Outputs, gradients and running statistics break where those of plain PyTorch break.

    But a gradient may be Inf, infinity times a sum, where that of a concatenation adds 0 * Inf.
    """
    module = ASPP(8, (1, 2), 4).train(training)
    module.project[-1].p = 0.0  # no dropout
    x = torch.randn(3, 8, 5, 6)
    x[1, 3, 2, 2] = value
    results = []
    for aspp_module in (one_by_one(module), copy.deepcopy(module)):
        input = x.clone().requires_grad_()
        output = aspp_module(input)
        output.sum().backward()
        grads = [parameter.grad for parameter in aspp_module.parameters()]
        grads = [torch.where(grad.isfinite(), grad, NAN) for grad in (input.grad, *grads)]
        results.append([output, *grads, *aspp_module.buffers()])
    expected, actual = results
    assert expected[0].isnan().any()
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-3, atol=1e-4, equal_nan=True)


# --- models


BLOCKS = {
    "bottleneck": (lambda: Bottleneck(32, 8, 1, 2), 32),
    "downsampled": (lambda: Bottleneck(8, 8, 1, 2), 8),
    "inverted residual": (lambda: InvertedResidual(16, 16, 2, 1, 2, False), 16),
    "head": (lambda: _classifier(ASPP(16, (1,)), 5, True), 16),
}


# On the CPU NaN may not survive a block.
@on(*(r for r in WHOLE if r.dtype == BF16 and r.backend != "cpu"), Runner("triton", FP32))
@pytest.mark.parametrize("name", BLOCKS)
@torch.no_grad()
def test_prepared_blocks(runner, name):
    """NaN where the block that was prepared has it, and 6 where Inf meets ReLU6."""
    build, channels = BLOCKS[name]
    block = with_statistics(build())
    x = torch.randn(3, channels, 4, 5)
    x[1, 3, 2, 2], x[2, 5, 3, 0] = NAN, INF
    expected = block(x)
    assert expected.isnan().any() and not expected.isnan().all()
    prepared = fuse(block).to(runner.dtype, memory_format=torch.channels_last)
    actual = prepared(x.to(runner.dtype, memory_format=torch.channels_last))
    torch.testing.assert_close(actual.float(), expected, rtol=0.05, atol=0.05, equal_nan=True)


@pytest.fixture(scope="module")
def mobilenet() -> DeepLabV3:
    model = with_statistics(DeepLabV3("mobilenet_v2", 5, output_stride=16))
    torch.nn.init.constant_(model.classifier[-1].bias[0], -1e4)  # class 0 is that of NaN only
    return model


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
@torch.no_grad()
def test_non_finite_image_in_a_prepared_model(mobilenet, dtype):
    """oneDNN's ReLU, which turns NaN into 0, would hide it."""
    images = torch.randn(3, 3, 33, 33)
    images[1, 2, 20, 7] = NAN
    prepared = mobilenet.prepare_for_inference(dtype)
    for model in (mobilenet, prepared):
        logits = model(images)["out"]
        assert logits[1].isnan().all() and logits[[0, 2]].isfinite().all()
    labels = prepared.predict(images)
    assert (labels[1] == 0).all() and (labels[[0, 2]] != 0).any()
    images[1, 2, 20, 7] = -INF
    assert prepared.logits(images)["out"][1].isnan().all()


@pytest.mark.parametrize(
    "name", ["backbone.features.3.conv.1.0.weight", "backbone.features.0.1.running_var",
             "classifier.0.convs.1.1.bias", "classifier.2.running_mean"],
)  # fmt: skip
@torch.no_grad()
def test_non_finite_weights_in_a_prepared_model(mobilenet, name):
    model = copy.deepcopy(mobilenet)
    dict([*model.named_parameters(), *model.named_buffers()])[name].view(-1)[2] = NAN
    images = torch.randn(1, 3, 17, 17)
    assert model(images)["out"].isnan().all()
    prepared = model.prepare_for_inference()
    assert prepared(images)["out"].isnan().all()
    finite = mobilenet.prepare_for_inference()
    non_finite_state = copy.deepcopy(prepared.state_dict())
    prepared.load_state_dict(finite.state_dict())
    assert prepared(images)["out"].isfinite().all()
    finite.load_state_dict(non_finite_state)
    assert finite(images)["out"].isnan().all()


@torch.no_grad()
def test_non_finite_class_in_a_prepared_model(mobilenet):
    model = copy.deepcopy(mobilenet)
    model.classifier[-1].bias[3] = NAN
    images = torch.randn(1, 3, 17, 17)
    for logits in (model(images)["out"], model.prepare_for_inference()(images)["out"]):
        assert logits[:, 3].isnan().all() and logits[:, [0, 1, 2, 4]].isfinite().all()
