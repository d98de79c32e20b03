"""The weight gradient's kernel for compute capability 9.0, in the emulator of such a device."""

from __future__ import annotations

import subprocess

import numpy as np
import pytest
import torch
from torch import Tensor

import deeplab_fast
from deeplab_fast import _C, _emulated
from deeplab_fast.cuda_kernels import dilated_conv2d_backward, work_lists
from deeplab_fast.cuda_kernels.common import Kernels
from deeplab_fast.emulated import machine

from .cases import assert_as_accurate_as
from .test_dilated_conv2d_backward import emulated_gradients, gradients, reference, tensors_of
from .test_emulator import NVCC, ROOT

DTYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
# One cluster computes whole sums, six split them and leave the parts to a second kernel.
WORKERS = pytest.mark.parametrize("num_workers", [1, 24])
CPU = torch.device("cpu")

# Of (input, [(K, R, S)], rates): channels past the ends of chunks, of a block and of an item;
# branches that begin inside of a chunk; boxes over every edge of a rectangle and past the last
# image; taps that are never inside.
CASES = [
    ((1, 8, 1, 1), [(8, 3, 3)], [1]),
    ((2, 8, 11, 1), [(8, 3, 3)], [2]),
    ((5, 8, 1, 3), [(8, 3, 3), (16, 1, 1)], [2, 1]),
    ((2, 40, 7, 9), [(24, 3, 3), (8, 1, 1), (72, 3, 5)], [3, 1, 20]),
    ((1, 72, 9, 9), [(133, 1, 3)], [2]),
    ((1, 264, 5, 4), [(8, 1, 1)], [1]),
    ((1, 8, 6, 5), [(264, 1, 1), (8, 1, 1)], [1, 1]),
]


def weight_gradients(
    input: Tensor, weights: list[Tensor], grad_output: Tensor, rates, num_workers: int, seed: int
) -> list[Tensor]:
    kernels = Kernels(_emulated.cuda, 0, num_workers, is_sm90=True)
    rates = [(rate, rate) for rate in rates]
    with machine(seed, "sm_90"):
        return dilated_conv2d_backward.backward(
            kernels, grad_output, input, weights, rates, [False, True, False]
        )[1]


def expected_gradients(*tensors) -> list[Tensor]:
    return gradients(reference, *tensors)[1 : 1 + len(tensors[1])]


def check(shape, kernels, rates, dtype, num_workers: int, seeds: range) -> None:
    input, weights, grad_output = tensors_of(shape, kernels, dtype)
    args = input, weights, grad_output, rates
    results = [weight_gradients(*args, num_workers, seed) for seed in seeds]
    exact = expected_gradients(
        input.double(), [w.double() for w in weights], grad_output.double(), rates
    )
    for a, p, e in zip(results[0], expected_gradients(*args), exact, strict=True):
        assert_as_accurate_as(a, p, e)
    for result in results[1:]:
        assert all(map(torch.equal, result, results[0]))


@WORKERS
@DTYPES
@pytest.mark.parametrize(("shape", "kernels", "rates"), CASES)
def test_seeds_agree(shape, kernels, rates, dtype, num_workers):
    check(shape, kernels, rates, dtype, num_workers, range(3))
