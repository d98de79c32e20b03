"""Sizes one below, at and one past those of a vector, a warp, a k-iteration, a CTA and a tile.

Inputs are small integers, whose sums are exact, so results equal those of float64 bit for bit.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from deeplab_fast import _C
from deeplab_fast._native.common import DTYPES, LaunchContext
from deeplab_fast._native.memory_format import empty_nhwc
from deeplab_fast.backends.arguments import ParallelDilatedConv2dAndMean
from deeplab_fast.backends.cuda import (
    depthwise_conv2d,
    dilated_conv2d_and_mean,
    dilated_conv2d_backward,
)

from ..support import emulator
from ..support.convolution import convolve, depthwise, image_bias
from ..support.emulator import machine

KERNELS = pytest.mark.parametrize(
    ("device", "dtype"),
    [("sm_80", torch.bfloat16), ("sm_80", torch.float32), ("sm_90", torch.float16)],
    ids=["sm80-bf16", "sm80-tf32", "sm90-fp16"],
)


def kernels(device: str, num_ctas: int) -> LaunchContext:
    return LaunchContext(emulator.load().cuda, 0, num_ctas, device == "sm_90")


def ints(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randint(-1, 3, shape).to(dtype)


def nhwc(*shape: int, dtype: torch.dtype) -> Tensor:
    return ints(*shape, dtype=dtype).contiguous(memory_format=torch.channels_last)


def exact(sums: Tensor, dtype: torch.dtype) -> Tensor:
    assert sums.dtype == torch.float64 and sums.abs().max() < 2**24
    return sums.to(dtype)


# Pixels per warp (16 or 64 rows), per CTA and per tile; output channels per vector of four, per
# warp and per tile.
@pytest.mark.parametrize(
    ("pixels", "channels"),
    [(15, 1), (16, 4), (17, 5), (63, 63), (64, 64), (65, 65), (127, 127), (128, 128), (129, 129),
     (255, 255), (256, 256), (257, 257)],
)  # fmt: skip
@KERNELS
def test_pixels_and_output_channels(device, dtype, pixels, channels):
    if device == "sm_80" and pixels > 200:
        pytest.skip("an sm_80 tile has 128 pixels and 128 channels")
    input, weight = nhwc(1, 8, 1, pixels, dtype=dtype), ints(channels, 8, 1, 1, dtype=dtype)
    bias, output = ints(channels, dtype=dtype), empty_nhwc(input, channels)
    with machine(1, device):
        convolve(kernels(device, 1), output, input, [weight], [bias], [(1, 1)], activation="none")
    expected = F.conv2d(input.double(), weight.double(), bias.double())
    assert torch.equal(output, exact(expected, dtype))


@pytest.mark.parametrize("num_ctas", [1, 24])
@pytest.mark.parametrize("channels", [8, 16, 24, 32, 40, 64, 72, 128, 136, 200, 264])
@KERNELS
def test_k_iterations(device, dtype, channels, num_ctas):
    """Tiles, whole and split, have one k-iteration up to more than the pipeline has stages."""
    input, weight = nhwc(2, channels, 1, 3, dtype=dtype), ints(8, channels, 1, 1, dtype=dtype)
    output = empty_nhwc(input, 8)
    with machine(1, device):
        convolve(
            kernels(device, num_ctas), output, input, [weight], [None], [(1, 1)],
            activation="none",
        )  # fmt: skip
    assert torch.equal(output, exact(F.conv2d(input.double(), weight.double()), dtype))


@pytest.mark.parametrize("count", [1, 2, 8])
@KERNELS
def test_branches(device, dtype, count):
    """Up to the maximum of 8 branches, with different channels, biases and numbers of taps."""
    input = nhwc(2, 8, 3, 4, dtype=dtype)
    sizes = [(3 + 2 * i, 1 + 2 * (i % 3)) for i in range(count)]
    weights = [ints(k, 8, r, r, dtype=dtype) for k, r in sizes]
    biases = [ints(k, dtype=dtype) for k, _ in sizes]
    rates = [(1 + i % 2, 1 + i % 3) for i in range(count)]
    output = empty_nhwc(input, sum(k for k, _ in sizes))
    with machine(1, device):
        convolve(kernels(device, 3), output, input, weights, biases, rates, activation="none")
    branches = [
        F.conv2d(input.double(), w.double(), b.double(), padding="same", dilation=rate)
        for w, b, rate in zip(weights, biases, rates, strict=True)
    ]
    assert torch.equal(output, exact(torch.cat(branches, dim=1), dtype))


@pytest.mark.parametrize(
    ("pixels", "outputs", "inputs"),
    [(1, 8, 8), (15, 8, 56), (16, 56, 64), (17, 64, 72), (31, 72, 8), (32, 8, 120), (33, 120, 128),
     (63, 128, 136), (64, 136, 8), (65, 8, 248), (127, 248, 256), (128, 256, 264), (129, 264, 8)],
)  # fmt: skip
@pytest.mark.parametrize("num_ctas", [1, 24])
@KERNELS
def test_weight_gradients(device, dtype, pixels, outputs, inputs, num_ctas):
    input, grad = nhwc(1, inputs, 1, pixels, dtype=dtype), nhwc(1, outputs, 1, pixels, dtype=dtype)
    weight = torch.empty(outputs, inputs, 1, 1, dtype=dtype)
    with machine(1, device):
        _, (actual,), (bias,) = dilated_conv2d_backward.backward(
            kernels(device, num_ctas), grad, input, [weight], [(1, 1)], [False, True, True]
        )
    expected = torch.einsum("nkyx,ncyx->kc", grad.double(), input.double())
    assert torch.equal(actual[:, :, 0, 0], exact(expected, dtype))
    assert torch.equal(bias, exact(grad.double().sum((0, 2, 3)), dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(
    ("pixels", "channels", "parts"),
    [(1, 8, 1), (31, 24, 1), (32, 32, 1), (33, 40, 1), (64, 56, 2), (65, 64, 2), (7, 72, 3),
     (100, 248, 1), (5, 256, 4), (3, 264, 5)],
)  # fmt: skip
def test_bias_gradients(dtype, pixels, channels, parts):
    """Rows and channels of a thread block, threads of the reduction, and parts without pixels."""
    grad = ints(pixels, channels, dtype=dtype)
    result, partial = torch.full((channels,), 99, dtype=dtype), torch.empty(parts, channels)
    with machine(1):
        emulator.load().cuda.dilated_conv2d_bias_grad(
            result.data_ptr(), partial.data_ptr(), grad.data_ptr(), pixels, channels, parts,
            DTYPES[dtype], 0,
        )  # fmt: skip
    assert torch.equal(result, exact(grad.double().sum(0), dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(
    ("images", "channels", "pooled", "outputs"),
    [(1, 8, 8, 1), (2, 120, 16, 7), (3, 128, 8, 8), (1, 136, 120, 9), (2, 248, 128, 16),
     (1, 256, 136, 17), (2, 264, 248, 5), (1, 512, 264, 3), (1, 520, 8, 8)],
)  # fmt: skip
def test_pooled_branch(dtype, images, channels, pooled, outputs):
    """Channels that a warp loads, and outputs of a thread block."""
    means = ints(images, channels, dtype=torch.float32)
    pool, pool_bias = ints(pooled, channels, 1, 1, dtype=dtype), ints(pooled, dtype=dtype)
    project, bias = ints(outputs, pooled, 1, 1, dtype=dtype), ints(outputs, dtype=dtype)
    with machine(1):
        actual = image_bias(kernels("sm_80", 1), means, pool, pool_bias, project, bias)
    hidden = F.relu(means.double() @ pool[:, :, 0, 0].double().T + pool_bias)
    expected = hidden @ project[:, :, 0, 0].double().T + bias
    assert torch.equal(actual, exact(expected, torch.float32))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(
    ("images", "pixels", "channels", "run"),
    [(1, 1, 8, 1), (1, 7, 120, 8), (2, 8, 128, 8), (3, 9, 136, 8), (2, 5, 248, 3), (5, 2, 256, 7),
     (4, 3, 264, 12), (3, 16, 8, 64), (2, 64, 32, 64), (2, 65, 40, 64)],
)  # fmt: skip
def test_means(dtype, images, pixels, channels, run):
    """Warps and channels of a thread block; runs within an image and across images."""
    input = ints(images, pixels, channels, dtype=dtype)
    num_rows = -(-images * pixels // run) + images - 1
    sums = torch.full((num_rows + 1, channels), float("nan"))
    means = torch.full((images + 1, channels), float("nan"))
    runs = _C.PixelRuns(images, pixels, channels, run, 1)
    with machine(1):
        emulator.load().cuda.pixel_sums_fwd(
            sums.data_ptr(), input.data_ptr(), runs, DTYPES[dtype], 0
        )
        emulator.load().cuda.pixel_means_fwd(means.data_ptr(), sums.data_ptr(), runs, False, 0)
    assert torch.equal(means[:-1], (input.double().sum(1).float() / pixels))
    assert means[-1].isnan().all() and sums[-1].isnan().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(
    ("shape", "kernel"),
    [
        ((1, 7, 1, 1), (3, 3)),
        ((1, 8, 4, 15), (3, 3)),
        ((1, 32, 5, 16), (3, 3)),  # the channels of a thread block in fp32
        ((2, 64, 4, 17), (3, 3)),  # in 16 bits
        ((1, 72, 3, 33), (3, 3)),
        ((2, 64, 3, 9), (5, 5)),
        ((1, 72, 5, 8), (5, 5)),
        ((1, 63, 2, 3), (3, 3)),
        ((1, 65, 2, 3), (1, 3)),
        ((2, 128, 2, 2), (3, 1)),
        ((1, 129, 2, 2), (3, 3)),
    ],
)
def test_depthwise(dtype, shape, kernel):
    """Channels and columns of a thread block, and last strips of fewer rows."""
    N, C, H, W = shape
    input, grad = nhwc(*shape, dtype=dtype), nhwc(*shape, dtype=dtype)
    weight, bias = ints(C, 1, *kernel, dtype=dtype), ints(C, dtype=dtype)
    where = kernels("sm_80", 1)
    with machine(1):
        output = depthwise(where, input, weight, bias, (1, 2))
        grads = depthwise_conv2d.backward(where, grad, input, weight, (1, 2), [True] * 3)
    leaves = [t.double().requires_grad_() for t in (input, weight, bias)]
    expected = F.conv2d(*leaves, padding="same", dilation=(1, 2), groups=C)
    assert torch.equal(output, exact(expected.detach(), dtype))
    for a, e in zip(grads, torch.autograd.grad(expected, leaves, grad.double()), strict=True):
        assert torch.equal(a, exact(e, dtype))


@pytest.mark.parametrize("device", ["sm_80", "sm_90"])
@pytest.mark.parametrize(
    "shape",
    [(1, 8, 1, 127), (1, 8, 8, 16), (2, 8, 1, 129), (3, 72, 5, 17), (2, 64, 16, 17)],
    ids=str,
)
def test_means_along_a_convolution(device, shape):
    """Images that end one pixel before, at and after the end of a run or a CTA's pixels."""
    C, dtype = shape[1], torch.bfloat16
    input = nhwc(*shape, dtype=dtype)
    weights = [ints(8, C, k, k, dtype=dtype) for k in (3, 1)]
    with machine(1, device):
        output, means = dilated_conv2d_and_mean.parallel_dilated_conv2d_and_mean(
            kernels(device, 4), ParallelDilatedConv2dAndMean(input, weights, [2, 1])
        )
    expected = [
        F.conv2d(input.double(), w.double(), padding="same", dilation=r)
        for w, r in zip(weights, (2, 1), strict=True)
    ]
    assert torch.equal(output, exact(torch.cat(expected, dim=1), dtype))
    total = input.double().sum((2, 3)).float()
    torch.testing.assert_close(means, total / (shape[2] * shape[3]), rtol=1e-6, atol=0)
