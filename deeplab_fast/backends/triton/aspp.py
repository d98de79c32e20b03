"""Atrous spatial pyramid pooling in inference: two launches of dilated_conv2d's kernel.

The first launch computes all branches in one buffer, the second one the projection. The pooled
branch is constant over space, so its share of the projection is a bias per image in fp32. Neither
its broadcast nor the concatenation of the branches is ever stored.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..._native.memory_format import in_format_of
from ..arguments import Aspp
from ..registry import register_kernel
from .device import widened
from .dilated_conv2d import forward, unsupported_convolution


def unsupported_reason(arguments: Aspp) -> str | None:
    weights = [*arguments.weights, arguments.pool_weight, arguments.project_weight]
    return unsupported_convolution(arguments.input, weights)


@register_kernel("aspp", "triton", unsupported_reason=unsupported_reason)
def aspp(arguments: Aspp) -> Tensor:
    input, weights, biases, dilations, pool_weight, pool_bias, project_weight, project_bias = (
        widened(*arguments)
    )
    pairs = [(dilation, dilation) for dilation in dilations]
    with torch.cuda.device_of(input):
        branches = forward(input, weights, biases, pairs, activation="relu")
        mean = input.mean((2, 3), dtype=torch.float32)
        pooled = F.linear(mean, pool_weight.flatten(1).float(), pool_bias.float()).relu_()
        channels = [branches.size(1), pooled.size(1)]
        branch_weight, pooled_weight = project_weight.split(channels, dim=1)
        image_bias = F.linear(pooled, pooled_weight.flatten(1).float(), project_bias.float())
        output = forward(branches, [branch_weight], [image_bias], [(1, 1)], activation="relu")
    return in_format_of(output.to(arguments.input.dtype), arguments.input)
