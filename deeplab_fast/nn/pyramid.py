"""The two steps of atrous spatial pyramid pooling: parallel branches, and the projection.

:class:`ASPP` and the accelerated modules of other projects call these functions.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops._transforms import active
from ..ops.dilated_conv2d_and_mean import parallel_dilated_conv2d_and_mean
from .conv import Conv2d, has_same_padding


def atrous_branches(
    input: Tensor, convs: Sequence[Any], norms: Sequence[Any], relu: bool
) -> tuple[Tensor, Tensor]:
    """Parallel convolutions of ``input``, each followed by its norm and, with ``relu``, by ReLU.

    Args:
        input: [N, C, H, W].
        convs: layers for which :func:`is_atrous_branch` is true.
        norms: one module per layer, or an empty sequence.

    Returns:
        The outputs concatenated, [N, sum(K_i), H, W], and the mean of the input [N, C, 1, 1].
    """
    features, mean = parallel_dilated_conv2d_and_mean(
        input, [conv.weight for conv in convs], [conv.dilation[0] for conv in convs]
    )
    if norms and _are_alike(norms):
        features = _batch_norm(features, norms)
    elif norms:
        chunks = features.split([conv.out_channels for conv in convs], dim=1)
        features = torch.cat([norm(x) for norm, x in zip(norms, chunks)], dim=1)
    return features.relu_() if relu else features, mean


def project(conv: Any, before: list[Tensor], pooled: Tensor, after: list[Tensor]) -> Tensor:
    """``conv`` of a concatenation along channels, one part of which is constant over an image.

    The constant part is neither broadcast nor concatenated. Its contribution to the output is added
    as a bias per image. A 3x3 projection has other biases at the border, where some taps are on
    padding.

    Args:
        conv: a layer for which :func:`is_projection` is true.
        before, after: the parts [N, C_i, H, W] before and after the constant one.
        pooled: the constant part [N, C_i, 1, 1].

    Returns:
        [N, K, H, W].
    """
    maps = [*before, *after]
    features = maps[0] if len(maps) == 1 else torch.cat(maps, dim=1)
    start = sum(x.size(1) for x in before)
    end = start + pooled.size(1)
    weight = conv.weight
    rest = [part for part in (weight[:, :start], weight[:, end:]) if part.size(1)]
    feature_weight = rest[0] if len(rest) == 1 else torch.cat(rest, dim=1)
    pool_weight = weight[:, start:end]
    if conv.kernel_size == (1, 1):
        bias = F.conv2d(pooled, pool_weight, conv.bias)
        return _conv1x1(features, feature_weight, bias.flatten(1))
    H, W = features.shape[2:]
    # All rows between the first and the last one are equal, and so are the columns.
    small = pooled.expand(-1, -1, min(H, 3), min(W, 3))
    image_bias = F.conv2d(small, pool_weight, conv.bias, padding=1)
    output = F.conv2d(features, feature_weight, padding=1)
    return output.add_(_stretched(_stretched(image_bias, 2, H), 3, W))


def _stretched(input: Tensor, dim: int, size: int) -> Tensor:
    """``input`` with its middle row or column repeated."""
    if size <= 3:
        return input
    first, middle, last = input.split(1, dim)
    shape = [-1] * 4
    shape[dim] = size - 2
    return torch.cat([first, middle.expand(shape), last], dim)


def _conv1x1(input: Tensor, weight: Tensor, image_bias: Tensor) -> Tensor:
    """1x1 convolution plus ``image_bias`` [N, K]. In half precision their sum is rounded once."""
    N, C, H, W = input.shape
    K = weight.size(0)
    bias = image_bias[:, None].expand(N, H * W, K)
    pixels = input.permute(0, 2, 3, 1).reshape(N * H * W, C)
    output = torch.addmm(bias.reshape(N * H * W, K), pixels, weight.flatten(1).t())
    output = output.view(N, H, W, K).permute(0, 3, 1, 2)
    if active():  # vmap has no memory formats
        return output
    in_channels_last = input.is_contiguous(memory_format=torch.channels_last)
    return output if in_channels_last else output.contiguous()


def is_atrous_branch(conv: Any) -> bool:
    """True for a "same" convolution without bias and groups, with one dilation for both axes."""
    return type(conv) in (nn.Conv2d, Conv2d) and (
        has_same_padding(conv)
        and (conv.bias, conv.groups, conv.dilation) == (None, 1, conv.dilation[:1] * 2)
    )


def is_projection(conv: Any) -> bool:
    """True for a 1x1 or 3x3 "same" convolution without groups and dilation."""
    return type(conv) in (nn.Conv2d, Conv2d) and (
        has_same_padding(conv)
        and conv.kernel_size in ((1, 1), (3, 3))
        and (conv.groups, conv.dilation) == (1, (1, 1))
    )


def _are_alike(norms: Sequence[Any]) -> bool:
    """True if :func:`_batch_norm` can run these norms as one."""
    first = norms[0]
    is_shared = any(norm is other for norm, other in combinations(norms, 2))
    return (
        not is_shared
        and type(first) in (nn.BatchNorm2d, nn.SyncBatchNorm)
        and all(
            type(norm) is type(first)
            and getattr(norm, "process_group", None) is getattr(first, "process_group", None)
            and norm.affine
            and norm.track_running_stats
            and norm.momentum is not None
            and (norm.training, norm.momentum, norm.eps)
            == (first.training, first.momentum, first.eps)
            for norm in norms
        )
    )


def _batch_norm(input: Tensor, norms: Sequence[Any]) -> Tensor:
    """Apply the norms of consecutive channel ranges of ``input`` as one norm."""
    first = norms[0]
    mean = torch.cat([norm.running_mean for norm in norms])
    var = torch.cat([norm.running_var for norm in norms])
    weight = torch.cat([norm.weight for norm in norms])
    bias = torch.cat([norm.bias for norm in norms])
    if isinstance(first, nn.SyncBatchNorm):  # it has no functional form
        merged = {"running_mean": mean, "running_var": var, "weight": weight, "bias": bias}
        merged["num_batches_tracked"] = input.new_zeros((), dtype=torch.int64)  # counted below
        output = torch.func.functional_call(first, merged, (input,))
    else:
        output = F.batch_norm(
            input, mean, var, weight, bias, first.training, first.momentum, first.eps
        )
    if first.training:
        sizes = [norm.num_features for norm in norms]
        for norm, new_mean, new_var in zip(norms, mean.split(sizes), var.split(sizes)):
            norm.running_mean.copy_(new_mean)
            norm.running_var.copy_(new_var)
            norm.num_batches_tracked.add_(1)
    return output
