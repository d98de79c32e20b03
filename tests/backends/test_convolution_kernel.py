"""The sm_80 convolution kernel beyond the public ops: epilogue, TF32, slices, several sources."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import deeplab_fast
from deeplab_fast import _C, dilated_conv2d
from deeplab_fast._native import work_lists
from deeplab_fast._native.common import LaunchContext
from deeplab_fast._native.memory_format import empty_nhwc
from deeplab_fast.models.fusion import FoldedASPP
from deeplab_fast.nn import ASPP
from deeplab_fast.ops.shape_bucket import tf32_is_allowed

from ..support import emulator
from ..support.cases import (
    DTYPES,
    LAYOUTS,
    Conv,
    assert_as_accurate_as,
    operands,
    to_tf32,
    with_layout,
)
from ..support.convolution import convolve, convolve_slices
from ..support.emulator import machine
from ..support.memory import copy_beside_unreadable_page, in_child

# With 24 CTAs output tiles are split along k, and a second kernel adds their partial sums.
NUM_CTAS = pytest.mark.parametrize("num_ctas", [1, 24])

ACTIVATIONS = {"none": lambda x: x, "relu": F.relu, "relu6": F.relu6}


def kernels(num_ctas: int) -> LaunchContext:
    return LaunchContext(emulator.load().cuda, 0, num_ctas)


def nhwc(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(shape).to(dtype).contiguous(memory_format=torch.channels_last)


def as_multiplied(x: Tensor) -> Tensor:
    return to_tf32(x) if x.dtype == torch.float32 else x


@NUM_CTAS
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_epilogue(dtype, activation, num_ctas):
    """The call works in place, with an odd number of channels and several images in a tile."""
    N, C, K, H, W = 3, 72, 21, 5, 7
    input, residual = nhwc(N, C, H, W, dtype=dtype), nhwc(N, K, H, W, dtype=dtype)
    weight = (5 * torch.randn(K, C, 3, 3) / (9 * C) ** 0.5).to(dtype)
    bias, image_bias = torch.randn(K).to(dtype), torch.randn(N, K)

    def definition(input, weight, bias, residual, image_bias):
        sums = F.conv2d(input, weight, bias, padding=2, dilation=2) + residual
        return ACTIVATIONS[activation](sums + image_bias[:, :, None, None].to(sums))

    tensors = as_multiplied(input), as_multiplied(weight), bias, residual, image_bias
    exact, peer = definition(*(t.double() for t in tensors)), definition(*tensors)
    for seed in (1, 2):
        output = residual.clone(memory_format=torch.preserve_format)
        with machine(seed):
            convolve(
                kernels(num_ctas), output, input, [weight], [bias], [(2, 2)],
                activation=activation, residual=output, image_bias=image_bias,
            )  # fmt: skip
        assert_as_accurate_as(output, peer, exact)


@NUM_CTAS
def test_nan_passes_activations(num_ctas):
    input = nhwc(1, 72, 3, 3, dtype=torch.bfloat16)
    input[0, 0, 1, 1] = float("nan")
    output = empty_nhwc(input, 8)
    weight, residual = torch.ones(8, 72, 3, 3).bfloat16(), torch.zeros_like(output)
    convolve(
        kernels(num_ctas), output, input, [weight], [None], [(1, 1)], activation="relu6",
        residual=residual,
    )  # fmt: skip
    assert output.isnan().all()


@NUM_CTAS
def test_reads_nothing_past_the_last_pixel_tap_or_weight(monkeypatch, num_ctas):
    """Operands and work lists end where an unreadable page begins; the last tile is not full."""

    def at_end_of_page(tensor: Tensor) -> Tensor:
        return copy_beside_unreadable_page(tensor, after=True)

    int32_rows = work_lists.int32_rows
    monkeypatch.setattr(work_lists, "int32_rows", lambda *args: at_end_of_page(int32_rows(*args)))

    def run() -> None:
        input = at_end_of_page(nhwc(1, 72, 11, 13, dtype=torch.bfloat16))
        weight = at_end_of_page(nhwc(21, 72, 3, 3, dtype=torch.bfloat16) / 25)
        output = empty_nhwc(input, 21)
        convolve(kernels(num_ctas), output, input, [weight], [None], [(2, 2)], activation="none")
        torch.testing.assert_close(output, F.conv2d(input, weight, padding=2, dilation=2))

    in_child(run)


# Whole vectors, single channels, and channels whose last vector would reach too far.
@pytest.mark.parametrize(("channels", "first"), [(16, 8), (21, 9), (18, 8)])
@NUM_CTAS
def test_slices_of_larger_buffers(num_ctas, channels, first):
    """72 of 104 input channels to a slice of the output; the rest of the output is unchanged."""
    buffer = nhwc(2, 104, 6, 5, dtype=torch.bfloat16)
    weight = (torch.randn(channels, 72, 3, 3) / 26).bfloat16()
    weight = weight.contiguous(memory_format=torch.channels_last)
    output = nhwc(2, 40, 6, 5, dtype=torch.bfloat16)
    before = output.clone()
    work_list = work_lists.conv_work_list(
        _C.schedule.forward_tiles, (2, 6, 5), ((3, 3, 2, 2),),
        work_lists.k_iters_per_tap(72, buffer.dtype), (channels,), torch.device("cpu"), num_ctas,
    )  # fmt: skip
    source = _C.ConvSource(24, 72, 0)
    convolve_slices(kernels(num_ctas), output, buffer, weight, [source], work_list, first)
    own = slice(first, first + channels)
    expected = F.conv2d(buffer[:, 24:96], weight, padding=2, dilation=2)
    torch.testing.assert_close(output[:, own], expected)
    output[:, own] = before[:, own]
    assert torch.equal(output, before)


@NUM_CTAS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_taps_of_several_sources(dtype, num_ctas):
    """Input gradient of parallel branches: one sum over the channels of all branches."""
    kernel_sizes, rates, channels = [(1, 1), (3, 3), (3, 5)], [1, 3, 2], [16, 40, 8]
    N, C, H, W = 2, 24, 7, 9
    weights = [
        (torch.randn(k, C, *size) / (k * size[0]) ** 0.5).to(dtype)
        for k, size in zip(channels, kernel_sizes, strict=True)
    ]
    grad = nhwc(N, sum(channels), H, W, dtype=dtype)
    rows = [w.permute(1, 2, 3, 0).reshape(C, -1) for w in weights]
    packed = torch.cat(rows, dim=1)
    sources = [
        _C.ConvSource(sum(channels[:i]), k, sum(row.size(1) for row in rows[:i]))
        for i, k in enumerate(channels)
    ]
    branches = tuple((*size, r, r) for size, r in zip(kernel_sizes, rates, strict=True))
    work_list = work_lists.conv_work_list(
        _C.schedule.input_grad_tiles, (N, H, W), branches, work_lists.k_iters_per_tap(40, dtype),
        (C,), torch.device("cpu"), num_ctas,
    )  # fmt: skip
    grad_input = empty_nhwc(grad, C)
    convolve_slices(kernels(num_ctas), grad_input, grad, packed, sources, work_list)

    def definition(grad, *weights):
        x = torch.zeros(N, C, H, W, dtype=grad.dtype, requires_grad=True)
        branches = zip(weights, rates, strict=True)
        y = torch.cat([F.conv2d(x, w, padding="same", dilation=r) for w, r in branches], dim=1)
        return torch.autograd.grad(y, x, grad)[0]

    tensors = [as_multiplied(t) for t in (grad, *weights)]
    assert_as_accurate_as(
        grad_input, definition(*tensors), definition(*(t.double() for t in tensors))
    )


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "case",
    [
        Conv(1, 4, 5, 6, 7, (3, 3), 2),
        Conv(2, 20, 21, 9, 13, (3, 3), (3, 2)),  # a partial k-iteration
        Conv(1, 72, 133, 12, 11, (3, 3), 5),
    ],
    ids=str,
)
def test_tf32(tf32, ran, case, layout):
    """The error is at most that of fp32 on operands rounded to TF32."""
    input, weight, bias = operands(case, torch.float32, "cpu")
    with deeplab_fast.backend("emulated"):
        output = dilated_conv2d(with_layout(input, layout), weight, bias, case.dilation)
    assert ran == [("dilated_conv2d", "emulated")]
    tensors = to_tf32(input), to_tf32(weight), bias

    def same(input, weight, bias):
        return F.conv2d(input, weight, bias, padding="same", dilation=case.dilation)

    assert_as_accurate_as(output, same(*tensors), same(*(t.double() for t in tensors)))


def test_tf32_follows_either_of_torchs_switches(tf32):
    assert tf32_is_allowed()
    torch.backends.cudnn.allow_tf32 = False
    assert not tf32_is_allowed()
    if not hasattr(torch.backends.cudnn, "conv"):
        return
    for precision, allowed in (("tf32", True), ("ieee", False), ("none", False)):
        torch.backends.cudnn.conv.fp32_precision = precision
        assert tf32_is_allowed() == allowed


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_cuda_graph_of_aspp():
    folded = FoldedASPP(ASPP(64, (2, 5), 32).eval()).to("cuda", torch.bfloat16)
    x = torch.randn(2, 64, 17, 19, device="cuda").bfloat16()
    x = x.contiguous(memory_format=torch.channels_last)
    with deeplab_fast.backend("cuda"), torch.no_grad():
        expected = folded(x)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            output = folded(x)
        graph.replay()
    assert torch.equal(output, expected)
