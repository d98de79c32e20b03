"""Atrous spatial pyramid pooling in inference: two launches of dilated_conv2d's kernel.

The first launch computes all branches into one buffer, the second the projection. The pooled branch
is constant over an image, so its contribution to the projection is a bias per image, in fp32. It is
neither broadcast nor concatenated.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..._native.memory_format import in_format_of
from ..arguments import Aspp
from ..registry import register_kernel
from .device import widened
from .dilated_conv2d import forward as convolve
from .dilated_conv2d import unsupported_convolution


def forward(
    input: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    dilations: Sequence[int],
    pool_weight: Tensor,
    pool_bias: Tensor,
    project_weight: Tensor,
    project_bias: Tensor,
) -> Tensor:
    pairs = [(dilation, dilation) for dilation in dilations]
    branches = convolve(input, weights, biases, pairs, activation="relu")
    mean = input.mean((2, 3), dtype=torch.float32)
    pooled = F.linear(mean, pool_weight.flatten(1).float(), pool_bias.float()).relu_()
    channels = [branches.size(1), pooled.size(1)]
    branch_weight, pooled_weight = project_weight.split(channels, dim=1)
    image_bias = F.linear(pooled, pooled_weight.flatten(1).float(), project_bias.float())
    return convolve(branches, [branch_weight], [image_bias], [(1, 1)], activation="relu")


def unsupported_reason(arguments: Aspp) -> str | None:
    weights = [*arguments.weights, arguments.pool_weight, arguments.project_weight]
    return unsupported_convolution(arguments.input, weights)


@register_kernel("aspp", "triton", unsupported_reason=unsupported_reason)
def aspp(arguments: Aspp) -> Tensor:
    input = arguments.input
    with torch.cuda.device_of(input):
        output = forward(*widened(*arguments))
    return in_format_of(output.to(input.dtype), input)
