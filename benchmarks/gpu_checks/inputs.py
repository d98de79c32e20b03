"""The shapes of gpu_check.py, and the arguments of each op at these shapes."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
from bench_upsample_argmax import trained_like
from bench_upsample_cross_entropy import IGNORE_INDEX, labels
from common import cases, convolutions
from common.cases import Shape
from torch import Tensor


class Size(NamedTuple):
    name: str
    shape: Shape
    batch: int
    depthwise: tuple[int, int]  # channels, dilation


TINY = Size(
    "tiny", Shape("tiny", (49, 57), 7, 8, (2, 3, 9), in_channels=72, channels=24), 2, (24, 2)
)
REAL = Size("VOC OS8 batch 8", cases.VOC_OS8, 8, (960, 4))
SIZES = (TINY, REAL)


def channels_last(*shape: int, like: Tensor, scale: float = 1.0) -> Tensor:
    """Normal random numbers in channels_last, in the dtype and on the device of ``like``."""
    random = torch.randn(shape, device=like.device) * scale
    return random.to(like.dtype, memory_format=torch.channels_last)


def branches(size: Size, dtype: torch.dtype, device: torch.device) -> tuple[Any, ...]:
    """Input, weights, dilations and output gradient of an ASPP's four convolutions."""
    shape = size.shape
    x = cases.features(shape, size.batch, dtype, device).contiguous(
        memory_format=torch.channels_last
    )
    c_in, c = shape.in_channels, shape.channels
    weights = [channels_last(c, c_in, k, k, like=x, scale=1 / k / c_in**0.5) for k in (1, 3, 3, 3)]
    grad = channels_last(size.batch, 4 * c, *shape.feature, like=x)
    return x, weights, [1, *shape.atrous_rates], grad


def forward_arguments(*place: Any) -> tuple[Any, ...]:
    x, weights, dilations, _ = branches(*place)
    return x, weights, [], dilations


def backward_arguments(direction: str, *place: Any) -> tuple[Any, ...]:
    x, weights, dilations, grad = branches(*place)
    return grad, x, weights, dilations, convolutions.mask(direction)


def projection_arguments(size: Size, dtype: torch.dtype, device: torch.device) -> tuple[Any, ...]:
    """Projection of four branches; its weight is a slice that leaves out the pooled branch."""
    channels = size.shape.channels
    shape = size.shape._replace(in_channels=4 * channels)
    x = cases.features(shape, size.batch, dtype, device)
    weight = channels_last(channels, 5 * channels, 1, 1, like=x, scale=(4 * channels) ** -0.5)
    x = x.contiguous(memory_format=torch.channels_last)
    return x, weight[:, : 4 * channels], None, [1, 1], 1


def aspp_arguments(*place: Any) -> tuple[Any, ...]:
    x, weights, dilations, _ = branches(*place)
    c = weights[0].size(0)
    bias = functools.partial(torch.randn, c, dtype=x.dtype, device=x.device)
    pool = channels_last(c, x.size(1), 1, 1, like=x, scale=x.size(1) ** -0.5)
    project = channels_last(c, 5 * c, 1, 1, like=x, scale=(5 * c) ** -0.5)
    return x, weights, [bias() for _ in weights], dilations, pool, bias(), project, bias()


def depthwise_arguments(
    direction: str, size: Size, dtype: torch.dtype, device: torch.device
) -> Any:
    channels, dilation = size.depthwise
    x = torch.empty(0, dtype=dtype, device=device)
    x = channels_last(size.batch, channels, *size.shape.feature, like=x)
    weight = channels_last(channels, 1, 3, 3, like=x, scale=1 / 3)
    if direction == "forward":
        bias = torch.randn(channels, dtype=dtype, device=device)
        return x, weight, bias, [1, 1], [dilation] * 2, [dilation] * 2, channels, "relu6"
    grad = channels_last(*x.shape, like=x)
    return grad, x, weight, [dilation] * 2, channels, convolutions.mask(direction)


def argmax_arguments(size: Size, dtype: torch.dtype, device: torch.device) -> tuple[Any, ...]:
    """Random logits at the tiny shape, where many classes can win; else trained-like logits."""
    shape = size.shape
    if size is TINY:
        logits = torch.randn(size.batch, shape.classes, *shape.feature)
    else:
        logits = trained_like(shape, size.batch)
    logits = logits.to(device, dtype).contiguous(memory_format=torch.channels_last)
    return logits, list(shape.image), None, False, torch.int64


def loss_arguments(size: Size, dtype: torch.dtype, device: torch.device) -> tuple[Any, ...]:
    like = torch.empty(0, dtype=dtype, device=device)
    logits = channels_last(size.batch, size.shape.classes, *size.shape.feature, like=like, scale=3)
    target = labels(size.shape, size.batch, device)
    return logits, target, None, IGNORE_INDEX, "mean", 0.0, False


def loss_gradient_arguments(*place: Any) -> tuple[Any, ...]:
    """Arguments with the reference's saved tensors, so that only the gradient is checked."""
    logits, target, *options = loss_arguments(*place)
    forward = torch.ops.deeplab_fast.upsample_cross_entropy
    _, *saved = forward(logits, target, *options, backend="reference")
    grad_loss = torch.tensor(0.5, device=logits.device)
    return grad_loss, logits, target, options[0], *saved, *options[1:]
