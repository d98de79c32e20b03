"""Gradients of dilated_conv2d on a CPU against float64, over a grid of shapes.

    python cpu_gradients.py START STEP

Runs every STEP-th case from number START on and prints "case NUMBER DESCRIPTION" before each and,
where a gradient is wrong, "wrong NUMBER WHAT" after it. It is a program because a wrong kernel of a
library may crash, and because a library reads its variables (ONEDNN_MAX_CPU_ISA) only once per
process.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import deeplab_fast

# (input channels, output channels, groups): multiples of 16 and others; dense, depthwise, grouped.
CHANNELS = (
    (16, 16, 1),
    (24, 16, 1),
    (40, 32, 1),
    (16, 16, 16),
    (40, 40, 40),
    (48, 32, 4),
)
WIDTHS = (9, 29, 33, 65)
DILATIONS = (1, 2, 6, 12)
KERNELS = (3, 1)
# Backend, threads, memory format.
RUNS = (
    ("cpu", 1, torch.contiguous_format),
    ("cpu", 1, torch.channels_last),
    ("cpu", 2, torch.contiguous_format),
    ("cpu", 2, torch.channels_last),
    ("reference", 1, torch.channels_last),
    ("reference", 2, torch.contiguous_format),
)
HEIGHT = 9
# Half an ulp is at most 2^-8 of a bfloat16 and 2^-11 of a float16; these are twice as much.
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 2**-7, torch.float16: 2**-10}


class Case(NamedTuple):
    channels: tuple[int, int, int]
    width: int
    dilation: int
    kernel: int
    dtype: torch.dtype


def cases() -> list[Case]:
    grid = itertools.product(CHANNELS, WIDTHS, DILATIONS, KERNELS, TOLERANCES)
    return [Case(*values) for values in grid if values[3] == 3 or values[2] in (1, 6)]


def wrong_gradients(case: Case) -> Iterator[str]:
    """A description of each gradient that is further from float64 than its dtype explains."""
    C, K, groups = case.channels
    input = torch.randn(1, C, HEIGHT, case.width).to(case.dtype)
    weight = torch.randn(K, C // groups, case.kernel, case.kernel).to(case.dtype)
    bias = torch.randn(K).to(case.dtype)
    grad_output = torch.randn(1, K, HEIGHT, case.width).to(case.dtype)

    def exact(input: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.conv2d(input, weight, bias, 1, "same", case.dilation, groups)

    def ours(input: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return deeplab_fast.dilated_conv2d(input, weight, bias, case.dilation, groups)

    expected = gradients(
        exact, (input.double(), weight.double(), bias.double()), grad_output.double()
    )
    for backend, threads, memory_format in RUNS:
        torch.set_num_threads(threads)
        operands = (input.contiguous(memory_format=memory_format), weight, bias)
        with deeplab_fast.backend(backend):
            actual = gradients(ours, operands, grad_output.contiguous(memory_format=memory_format))
        for name, a, e in zip(("input", "weight", "bias"), actual, expected):
            error = ((a.double() - e).norm() / e.norm()).item()
            if not error <= TOLERANCES[case.dtype]:  # NaN is wrong, too
                yield (
                    f"{backend}, {threads} threads, {memory_format}: gradient of {name} is off by "
                    f"{error:.2g}, allowed {TOLERANCES[case.dtype]:.2g}"
                )


def gradients(function, tensors: tuple[Tensor, ...], grad_output: Tensor) -> tuple[Tensor, ...]:
    leaves = [tensor.detach().requires_grad_() for tensor in tensors]
    return torch.autograd.grad(function(*leaves), leaves, grad_output)


def main() -> None:
    for number, case in list(enumerate(cases()))[int(sys.argv[1]) :: int(sys.argv[2])]:
        print("case", number, case, flush=True)
        torch.manual_seed(number)
        for what in wrong_gradients(case):
            print("wrong", number, what, flush=True)


if __name__ == "__main__":
    main()
