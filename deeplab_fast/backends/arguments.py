"""Arguments of each op, in the order of its schema.

The arguments of a call are passed as one of these objects to the kernel, to the check whether a
backend supports the call, and to the function that returns its shape bucket. The public functions
in ``deeplab_fast.ops`` document shapes and meanings.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves


def shapes(arguments: Any) -> str:
    """The shapes of images and weights, with the dtype of the first, for messages.

    >>> shapes(DilatedConv2d(x, weight, bias, (2, 2), 1))
    '8x512x65x65, 256x512x3x3, bfloat16'
    """
    tensors = [value for value in tree_leaves(arguments) if isinstance(value, Tensor)]
    texts = ["x".join(map(str, tensor.shape)) for tensor in tensors if tensor.dim() == 4]
    counted = [f"{texts.count(text)} * {text}" if texts.count(text) > 1 else text
               for text in dict.fromkeys(texts)]  # fmt: skip
    return ", ".join([*counted, str(arguments[0].dtype).removeprefix("torch.")])


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
