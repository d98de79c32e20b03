"""Arguments of each op, in the order of its schema.

The arguments of a call are passed as one of these objects to the kernel, to the check whether a
backend supports the call, and to the function that returns its shape bucket. The public functions
in ``deeplab_fast.ops`` document shapes and meanings.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class DilatedConv2d(NamedTuple):
    input: Tensor
    weight: Tensor
    bias: Tensor | None
    dilation: Sequence[int]
    groups: int


class DilatedConv2dBackward(NamedTuple):
    grad_output: Tensor
    input: Tensor
    weight: Tensor
    dilation: Sequence[int]
    groups: int
    output_mask: Sequence[bool]  # True for each needed gradient: input, weight, bias


class ParallelDilatedConv2d(NamedTuple):
    input: Tensor
    weights: Sequence[Tensor]
    biases: Sequence[Tensor]  # one per weight, or none at all
    dilations: Sequence[int]


class ParallelDilatedConv2dBackward(NamedTuple):
    grad_output: Tensor
    input: Tensor
    weights: Sequence[Tensor]
    dilations: Sequence[int]
    output_mask: Sequence[bool]  # True for each needed gradient: input, weights, biases
    grad_mean: Tensor | None = None  # [N, C], gradient of the mean over the pixels of ``input``


class ParallelDilatedConv2dAndMean(NamedTuple):
    input: Tensor
    weights: Sequence[Tensor]
    dilations: Sequence[int]

    def branches(self) -> ParallelDilatedConv2d:
        """The convolutions without the mean."""
        return ParallelDilatedConv2d(self.input, self.weights, [], self.dilations)


class FusedConv2d(NamedTuple):
    input: Tensor
    weight: Tensor
    bias: Tensor
    stride: Sequence[int]
    padding: Sequence[int]
    dilation: Sequence[int]
    groups: int
    activation: str


class FusedConv2dAdd(NamedTuple):
    residual: Tensor
    input: Tensor
    weight: Tensor
    bias: Tensor
    stride: Sequence[int]
    padding: Sequence[int]
    dilation: Sequence[int]
    groups: int
    activation: str

    def convolution(self, activation: str = "none") -> FusedConv2d:
        """The convolution whose result is added to ``residual``."""
        return FusedConv2d(*self[1:-1], activation)


class Aspp(NamedTuple):
    input: Tensor
    weights: Sequence[Tensor]
    biases: Sequence[Tensor]
    dilations: Sequence[int]
    pool_weight: Tensor
    pool_bias: Tensor
    project_weight: Tensor
    project_bias: Tensor


class UpsampleArgmax(NamedTuple):
    logits: Tensor
    size: Sequence[int]
    scale_factors: Sequence[float] | None
    align_corners: bool
    dtype: torch.dtype


class UpsampleCrossEntropy(NamedTuple):
    logits: Tensor
    target: Tensor
    weight: Tensor | None
    ignore_index: int
    reduction: str
    label_smoothing: float
    align_corners: bool


class UpsampleCrossEntropyBackward(NamedTuple):
    grad_loss: Tensor
    logits: Tensor
    target: Tensor
    weight: Tensor | None
    log_sum_exp: Tensor
    total_weight: Tensor
    ignore_index: int
    reduction: str
    label_smoothing: float
    align_corners: bool
