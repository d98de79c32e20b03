"""Kernels write only to their outputs and workspaces.

Other tests would miss a write past an end that is read back from the same place.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from deeplab_fast.backends import registry
from deeplab_fast.backends.cuda import depthwise_conv2d

from ..support import emulator
from ..support.emulator import machine
from ..support.memory import GuardedAllocations


def nhwc(*shape: int) -> Tensor:
    return torch.randn(shape).bfloat16().contiguous(memory_format=torch.channels_last)


def weights(C: int, *kernels: tuple[int, int]) -> list[Tensor]:
    return [(torch.randn(k, C, r, r) / 8).bfloat16() for k, r in kernels]


def convolution(shape, kernels, rates) -> tuple[Any, ...]:
    ws = weights(shape[1], *kernels)
    return nhwc(*shape), ws, [w[:, 0, 0, 0].clone() for w in ws], rates


def without_biases(shape, kernels, rates) -> tuple[Any, ...]:
    input, ws, _, _ = convolution(shape, kernels, rates)
    return input, ws, rates


def gradient(shape, kernels, rates) -> tuple[Any, ...]:
    grad = nhwc(shape[0], sum(k for k, _ in kernels), *shape[2:])
    return grad, nhwc(*shape), weights(shape[1], *kernels), rates, [True] * 3


def pooled_branches(shape) -> tuple[Any, ...]:
    pool, project = weights(shape[1], (16, 1)), weights(32, (21, 1))
    branches = convolution(shape, [(8, 1), (8, 3)], [1, 2])
    biases = torch.randn(16).bfloat16(), torch.randn(21).bfloat16()
    return *branches, pool[0], biases[0], project[0], biases[1]


def cross_entropy(shape, size) -> tuple[Any, ...]:
    target = torch.randint(shape[1], (shape[0], *size))
    return torch.randn(shape), target, torch.rand(shape[1]), -1, "mean", 0.1, False


def cross_entropy_gradient(shape, size) -> tuple[Any, ...]:
    logits, target, *others = cross_entropy(shape, size)
    lse = torch.randn(target.shape).abs()
    return torch.ones(()), logits, target, others[0], lse, torch.tensor(7.0), *others[1:]


def depthwise(shape) -> tuple[Any, ...]:
    C = shape[1]
    return nhwc(*shape), weights(1, (C, 3))[0], torch.randn(C).bfloat16(), [2, 2], C


def depthwise_gradient(shape) -> tuple[Any, ...]:
    return nhwc(*shape), nhwc(*shape), weights(1, (shape[1], 3))[0], [2, 2], shape[1], [True] * 3


# (op, device, num_ctas of a convolution, arguments)
CALLS: dict[str, tuple[str, str, int, Callable[[], tuple[Any, ...]]]] = {}
for device in ("sm_80", "sm_90"):
    CALLS |= {
        f"{name} on {device}": (op, device, 24, arguments)
        for name, op, arguments in (
            ("convolution", "parallel_dilated_conv2d", lambda: convolution(
                (2, 136, 5, 7), [(24, 3), (133, 1)], [2, 1])),
            ("gradients", "parallel_dilated_conv2d_backward", lambda: gradient(
                (2, 72, 5, 15), [(24, 3), (8, 1)], [2, 1])),
            ("means", "parallel_dilated_conv2d_and_mean", lambda: without_biases(
                (5, 40, 13, 11), [(8, 3), (16, 1)], [2, 1])),
            ("aspp", "aspp", lambda: pooled_branches((3, 40, 5, 13))),
        )
    }  # fmt: skip
CALLS |= {
    "argmax": ("upsample_argmax", "sm_80", 1,
               lambda: (torch.randn(2, 5, 3, 4), [17, 33], None, False, torch.uint8)),
    "argmax in vectors": ("upsample_argmax", "sm_80", 1,
                          lambda: (torch.randn(2, 5, 3, 5), [17, 48], None, False, torch.uint8)),
    "argmax of small cells": ("upsample_argmax", "sm_80", 1,
                              lambda: (torch.randn(2, 5, 9, 9), [3, 4], None, False, torch.int64)),
    "cross entropy": ("upsample_cross_entropy", "sm_80", 1,
                      lambda: cross_entropy((2, 5, 2, 18), (7, 40))),
    "gradient of cross entropy": ("upsample_cross_entropy_backward", "sm_80", 1,
                                  lambda: cross_entropy_gradient((2, 5, 2, 18), (7, 40))),
    "many classes": ("upsample_cross_entropy_backward", "sm_80", 1,
                     lambda: cross_entropy_gradient((1, 70, 2, 3), (4, 5))),
    "depthwise": ("dilated_conv2d", "sm_80", 1, lambda: depthwise((2, 72, 9, 7))),
    "gradients of depthwise": ("dilated_conv2d_backward", "sm_80", 1,
                               lambda: depthwise_gradient((2, 72, 9, 7))),
    "depthwise without vectors": ("dilated_conv2d", "sm_80", 1, lambda: depthwise((2, 13, 9, 7))),
    "gradients of depthwise without vectors": ("dilated_conv2d_backward", "sm_80", 1,
                                               lambda: depthwise_gradient((2, 13, 9, 7))),
}  # fmt: skip


@pytest.mark.parametrize("name", CALLS)
def test_kernels_write_only_to_outputs_and_workspaces(monkeypatch, name):
    op, device, num_ctas, arguments = CALLS[name]
    monkeypatch.setattr(emulator, "num_ctas", num_ctas)
    monkeypatch.setattr(depthwise_conv2d, "_ELEMENTS_PER_PART", 512)
    call, guarded = arguments(), GuardedAllocations()
    with machine(1, device):
        expected = registry.run(op, *call, backend="emulated")
        with guarded:
            # As an op the call would be opaque to the mode.
            actual = registry.run(op, *call, backend="emulated")
    guarded.assert_intact()
    for a, e in zip(tree_leaves(actual), tree_leaves(expected), strict=True):
        assert torch.equal(a, e)
