"""Launches of every CUDA kernel in the emulator, small enough for a build with a sanitizer.

They are the smallest that reach every path. A sanitizer reports the line of a missing barrier.
"""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import deeplab_fast
from deeplab_fast import (
    aspp,
    dilated_conv2d,
    parallel_dilated_conv2d,
    upsample_argmax,
    upsample_cross_entropy,
)
from deeplab_fast.backends.cuda import depthwise_conv2d

from ..support import emulator
from ..support.cases import Conv, operands, with_layout
from ..support.emulator import machine
from ..support.toolchain import ROOT

SM80, SM90 = "dilated_conv2d_fwd_kernel", "dilated_conv2d_fwd_sm90_kernel"
REDUCE = "dilated_conv2d_fwd_reduce_kernel"
BIAS_GRAD = {"dilated_conv2d_bias_grad_kernel", "dilated_conv2d_bias_grad_reduce_kernel"}
WGRAD = {"dilated_conv2d_wgrad_kernel", *BIAS_GRAD}
WGRAD_SM90 = {"dilated_conv2d_wgrad_sm90_kernel", *BIAS_GRAD}
WGRAD_REDUCE = "dilated_conv2d_wgrad_reduce_kernel"
DEPTHWISE_WGRAD = {"depthwise_conv2d_wgrad_kernel", "depthwise_conv2d_wgrad_reduce_kernel"}
ASPP = {"pixel_means_fwd_kernel", "aspp_fwd_linear_kernel"}
ENTROPY = {f"upsample_cross_entropy_{name}_kernel" for name in ("prepare", "fwd", "reduce")}
ENTROPY |= {f"upsample_cross_entropy_{name}_kernel" for name in ("bwd", "gather")}


def backward(output: Tensor, *leaves: Tensor) -> list[Tensor]:
    torch.manual_seed(1)
    grad_output = torch.randn(output.shape).to(output.dtype)
    return [output.detach(), *torch.autograd.grad(output, leaves, grad_output)]


def convolution(shape, kernels, rates, dtype) -> Callable[[], list[Tensor]]:
    """Parallel branches, and the gradients of all their inputs."""

    def run() -> list[Tensor]:
        def leaf(*size: int) -> Tensor:
            return (torch.randn(size) / 8).to(dtype).requires_grad_()

        input = leaf(*shape)
        weights = [leaf(k, shape[1], r, s) for k, r, s in kernels]
        biases = [leaf(k) for k, _, _ in kernels]
        output = parallel_dilated_conv2d(input, weights, biases, rates)
        return backward(output, input, *weights, *biases)

    return run


def depthwise(case: Conv) -> Callable[[], list[Tensor]]:
    def run() -> list[Tensor]:
        leaves = [t.requires_grad_() for t in operands(case, torch.bfloat16, "cpu")]
        return backward(dilated_conv2d(*leaves, case.dilation, case.groups), *leaves)

    return run


def pooled_branches() -> list[Tensor]:
    """Channel means from several runs of pixels, one of which spans two images."""

    def weight(*shape: int) -> Tensor:
        return (torch.randn(shape) / 4).bfloat16()

    branches = [weight(8, 40, 1, 1), weight(8, 40, 3, 3)], [weight(8), weight(8)], [1, 2]
    return [
        aspp(
            weight(2, 40, 7, 11), *branches, weight(16, 40, 1, 1), weight(16),
            weight(8, 32, 1, 1), weight(8),
        )
    ]  # fmt: skip


def cross_entropy(shape, size, scale, layout, reduction) -> Callable[[], list[Tensor]]:
    def run() -> list[Tensor]:
        logits = with_layout(scale * torch.randn(shape), layout).requires_grad_()
        target = torch.randint(-1, shape[1], (shape[0], *size))
        weight = torch.rand(shape[1])
        loss = upsample_cross_entropy(
            logits, target, weight, ignore_index=-1, reduction=reduction, label_smoothing=0.1
        )
        return backward(loss, logits)

    return run


def argmax(shape, size) -> Callable[[], list[Tensor]]:
    return lambda: [upsample_argmax(torch.randn(shape), size=size, dtype=torch.int32)]


BRANCHES = [(24, 3, 3), (8, 1, 1)], [2, 1]
# name -> device, CTAs of a convolution, function to run, kernels that it has to launch. With so few
# CTAs the work items of split tiles are long enough to fill all stages of a pipeline.
LAUNCHES: dict[str, tuple[str, int, Callable[[], list[Tensor]], set[str]]] = {
    "whole tiles": (
        "sm_80", 1, convolution((2, 72, 3, 5), *BRANCHES, torch.bfloat16), {SM80, *WGRAD},
    ),
    "whole tiles in tf32": (
        "sm_80", 1, convolution((2, 36, 3, 5), *BRANCHES, torch.float32), {SM80, *WGRAD},
    ),
    "split tiles along channels": (
        "sm_86", 3, convolution((1, 72, 3, 5), [(72, 3, 3)], [1], torch.bfloat16),
        {SM80, REDUCE, *WGRAD},
    ),
    "split tiles along pixels": (
        "sm_86", 3, convolution((1, 8, 23, 29), [(8, 1, 1)], [1], torch.bfloat16),
        {SM80, *WGRAD, WGRAD_REDUCE},
    ),
    "whole tiles on sm_90": (
        "sm_90", 1, convolution((1, 72, 3, 5), [(264, 3, 3)], [1], torch.bfloat16),
        {SM90, *WGRAD_SM90},
    ),
    "split tiles along channels on sm_90": (
        "sm_90", 8, convolution((1, 72, 3, 5), [(8, 3, 3)], [1], torch.float16),
        {SM90, REDUCE, *WGRAD_SM90},
    ),
    "split tiles along pixels on sm_90": (
        "sm_90", 8, convolution((2, 8, 25, 27), [(8, 1, 1)], [1], torch.bfloat16),
        {SM90, *WGRAD_SM90, WGRAD_REDUCE},
    ),
    "depthwise 3x3": (
        "sm_80", 1, depthwise(Conv(1, 72, 72, 9, 5, (3, 3), 2, 72)),
        {"depthwise_conv2d_fwd_kernel", *DEPTHWISE_WGRAD},
    ),
    "depthwise 5x5": (
        "sm_80", 1, depthwise(Conv(2, 16, 16, 9, 5, (5, 5), 2, 16)),
        {"depthwise_conv2d_fwd_kernel", *DEPTHWISE_WGRAD},
    ),
    "depthwise of any kernel": (
        "sm_80", 1, depthwise(Conv(1, 24, 24, 9, 5, (1, 3), 2, 24)),
        {"depthwise_conv2d_fwd_any_kernel", *DEPTHWISE_WGRAD},
    ),
    "depthwise without vectors": (
        "sm_80", 1, depthwise(Conv(1, 13, 13, 9, 5, (3, 3), 2, 13)),
        {"depthwise_conv2d_fwd_any_kernel", *DEPTHWISE_WGRAD},
    ),
    "aspp": ("sm_80", 1, pooled_branches, {SM80, "pixel_sums_fwd_kernel", *ASPP}),
    "aspp on sm_90": ("sm_90", 8, pooled_branches, {SM90, *ASPP}),
    # Cells with several groups of rows, and with columns for more than one block.
    "cross entropy": (
        "sm_80", 1, cross_entropy((1, 3, 2, 2), (20, 280), 1, "contiguous", "mean"), ENTROPY,
    ),
    "cross entropy that underflows": (
        "sm_80", 1, cross_entropy((1, 3, 2, 2), (20, 280), 100, "channels_last", "none"), ENTROPY,
    ),
    "cross entropy of several strips": (
        "sm_80", 1, cross_entropy((1, 3, 1, 18), (3, 20), 1, "contiguous", "sum"), ENTROPY,
    ),
    "cross entropy of many classes": (
        "sm_86", 1, cross_entropy((1, 161, 1, 2), (3, 3), 1, "channels_last", "sum"), ENTROPY,
    ),
    "cross entropy of many classes that underflows": (
        "sm_86", 1, cross_entropy((1, 161, 1, 2), (3, 3), 100, "contiguous", "sum"), ENTROPY,
    ),
    "argmax": ("sm_80", 1, argmax((2, 5, 3, 4), (17, 33)), {"upsample_argmax_fwd_pruned_kernel"}),
    "argmax in vectors": (
        "sm_80", 1, argmax((1, 21, 3, 5), (17, 36)), {"upsample_argmax_fwd_pruned_kernel"},
    ),
    "argmax, downsampled": (
        "sm_80", 1, argmax((1, 5, 9, 9), (3, 4)), {"upsample_argmax_fwd_kernel"},
    ),
}  # fmt: skip


def test_every_kernel_is_launched():
    sources = "".join(path.read_text() for path in (ROOT / "csrc" / "cuda").rglob("*.cu*"))
    kernels = set(re.findall(r"__global__[^;{]*?\b(\w+_kernel)\(", sources))
    assert kernels == set().union(*(kernels for *_, kernels in LAUNCHES.values()))


@pytest.mark.parametrize("name", LAUNCHES)
def test_launch(monkeypatch, tf32, name):
    """Copies land as late as possible, or a missing wait would not show."""
    device, num_ctas, run, kernels = LAUNCHES[name]
    monkeypatch.setattr(emulator, "num_ctas", num_ctas)
    monkeypatch.setattr(depthwise_conv2d, "_ELEMENTS_PER_PART", 1024)
    before = emulator.load().launch_counts()
    torch.manual_seed(0)
    with deeplab_fast.backend("emulated"), machine(1, device):
        actual = run()
    after = emulator.load().launch_counts()
    assert {name for name in after if after[name] > before.get(name, 0)} == kernels
    torch.manual_seed(0)
    with deeplab_fast.backend("reference"):
        torch.testing.assert_close(actual, run(), rtol=0.02, atol=0.02)
