"""Atrous spatial pyramid pooling in inference: two launches of dilated_conv2d's kernel.

The first runs all branches into one buffer, the second the projection. The pooled branch is
constant over space, so its share of the projection is a bias per image, in fp32: neither its
broadcast nor the concatenation exists.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .dilated_conv2d import dilated_conv2d


def aspp(
    input: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    dilations: Sequence[int],
    pool_weight: Tensor,
    pool_bias: Tensor,
    project_weight: Tensor,
    project_bias: Tensor,
) -> Tensor:
    rates = [(rate, rate) for rate in dilations]
    branches = dilated_conv2d(input, weights, biases, rates, activation="relu")
    mean = input.mean((2, 3), dtype=torch.float32)
    pooled = F.linear(mean, pool_weight.flatten(1).float(), pool_bias.float()).relu_()
    channels = [branches.size(1), pooled.size(1)]
    branch_weight, pooled_weight = project_weight.split(channels, dim=1)
    image_bias = F.linear(pooled, pooled_weight.flatten(1).float(), project_bias.float())
    return dilated_conv2d(branches, [branch_weight], [image_bias], [(1, 1)], activation="relu")
