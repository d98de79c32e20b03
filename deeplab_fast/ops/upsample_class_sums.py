"""Sums of the softmax of upsampled logits, without the softmax at full resolution."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .._native.cross_entropy import bad_target

# Bytes of the upsampled logits of one stripe. Stripes of 0.5 to 16 MB took equally long on a CPU.
_STRIPE_BYTES = 4 << 20


class _Stripe(NamedTuple):
    """S of the H output rows of one image, computed from s of its h source rows."""

    image: int
    sources: slice
    row_weights: Tensor  # [S, s]
    softmax: Tensor  # [C, S, W]
    target: Tensor  # [1, S, W], 0 for ignored pixels
    counts: Tensor  # [S, W] bool, False for ignored pixels


def _source_weights(logits: Tensor, dim: int, size: int, align_corners: bool) -> Tensor:
    """Weights [size, logits.size(dim)] of the bilinear upsampling along one dimension."""
    source_size = logits.size(dim)
    # Each column is the interpolation of a unit vector.
    weights = F.interpolate(
        torch.eye(source_size, dtype=logits.dtype)[None],
        size,
        mode="linear",
        align_corners=align_corners,
    )
    return weights[0].t().contiguous()


def _stripes(
    logits: Tensor, target: Tensor, row_weights: Tensor, column_weights: Tensor, ignore_index: int
) -> Iterator[_Stripe]:
    step = max(1, _STRIPE_BYTES // (logits.size(1) * target.size(2) * logits.element_size()))
    on_device = row_weights.to(logits.device)
    for image in range(logits.size(0)):
        for begin in range(0, target.size(1), step):
            rows = slice(begin, begin + step)
            used = row_weights[rows].any(0).nonzero()
            sources = slice(int(used[0]), int(used[-1]) + 1)
            weights = on_device[rows, sources]
            upsampled = weights @ (logits[image, :, sources] @ column_weights.t())
            labels = target[image, rows]
            counts = labels != ignore_index
            labels = labels.where(counts, 0)[None]
            yield _Stripe(image, sources, weights, upsampled.softmax(0), labels, counts)


def _without_autocast(function: Any) -> Any:
    """``function``, which computes in float32, with autocast disabled."""

    @functools.wraps(function)
    def run(*args: Any) -> Any:
        with torch.autocast("cuda" if args[-3].is_cuda else "cpu", enabled=False):
            return function(*args)

    return run


@_without_autocast
def _upsample_class_sums(
    logits: Tensor, target: Tensor, ignore_index: int, align_corners: bool
) -> tuple[Tensor, Tensor]:
    classes = logits.size(1)
    if target.device.type == "cpu":
        known = (target == ignore_index) | ((target >= 0) & (target < classes))
        if not known.all():
            raise bad_target(int(target[~known][0]), classes, ignore_index)
    logits = _at_least_float32(logits)
    rows = _source_weights(logits, 2, target.size(1), align_corners)
    columns = _source_weights(logits, 3, target.size(2), align_corners).to(logits.device)
    of_target, of_all = logits.new_zeros(classes), logits.new_zeros(classes)
    for stripe in _stripes(logits, target, rows, columns, ignore_index):
        hits = stripe.softmax.gather(0, stripe.target) * stripe.counts
        # index_add_ would add in an undefined order on a GPU.
        of_target += torch.zeros_like(stripe.softmax).scatter_(0, stripe.target, hits).sum((1, 2))
        of_all += stripe.softmax.flatten(1) @ stripe.counts.flatten().to(logits.dtype)
    return of_target, of_all


@_without_autocast
def _upsample_class_sums_backward(
    grad_of_target: Tensor,
    grad_of_all: Tensor,
    logits: Tensor,
    target: Tensor,
    ignore_index: int,
    align_corners: bool,
) -> Tensor:
    dtype, logits = logits.dtype, _at_least_float32(logits)
    rows = _source_weights(logits, 2, target.size(1), align_corners)
    columns = _source_weights(logits, 3, target.size(2), align_corners).to(logits.device)
    grad = torch.zeros_like(logits, memory_format=torch.contiguous_format)
    for stripe in _stripes(logits, target, rows, columns, ignore_index):
        softmax, index = stripe.softmax, stripe.target
        # The gradient of a pixel's softmax is grad_of_all, plus grad_of_target at its class.
        extra = grad_of_target[index[0]]
        mean = (grad_of_all @ softmax.flatten(1)).view_as(extra)
        mean += softmax.gather(0, index)[0] * extra
        grad_logits = grad_of_all[:, None, None] - mean
        grad_logits.scatter_(0, index, grad_logits.gather(0, index) + extra)
        grad_logits *= softmax
        grad_logits *= stripe.counts
        grad_narrow = stripe.row_weights.t() @ grad_logits
        grad[stripe.image, :, stripe.sources] += grad_narrow @ columns
    return grad.to(dtype)


def _at_least_float32(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()


upsample_class_sums = torch.library.custom_op(
    "deeplab_fast::upsample_class_sums", _upsample_class_sums, mutates_args=()
)
"""Sums over pixels of the softmax of bilinearly upsampled logits, for each class.

``upsample_class_sums(logits, target, ignore_index, align_corners)`` returns two tensors [C]: the
sum over the pixels whose target is the class, and the sum over all pixels whose target is not
ignore_index; both are float32, or float64 for logits of that dtype. The logits [N, C, h, w],
floating, are upsampled to the size of the target [N, H, W], int64, a few rows at a time, and again
for the gradient. Raises IndexError on the CPU if a target is neither a class nor ignore_index.
"""
_backward_op = torch.library.custom_op(
    "deeplab_fast::upsample_class_sums_backward", _upsample_class_sums_backward, mutates_args=()
)


@upsample_class_sums.register_fake
def _fake(
    logits: Tensor, target: Tensor, ignore_index: int, align_corners: bool
) -> tuple[Tensor, Tensor]:
    sums = _at_least_float32(logits).new_empty(logits.size(1))
    return sums, torch.empty_like(sums)


@_backward_op.register_fake
def _fake_backward(
    grad_of_target: Tensor,
    grad_of_all: Tensor,
    logits: Tensor,
    target: Tensor,
    ignore_index: int,
    align_corners: bool,
) -> Tensor:
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    logits, target, *ctx.options = inputs
    ctx.save_for_backward(logits, target)


def _backward(ctx: Any, grad_of_target: Tensor, grad_of_all: Tensor) -> tuple[Any, ...]:
    grad = _backward_op(grad_of_target, grad_of_all, *ctx.saved_tensors, *ctx.options)
    return grad, None, None, None


upsample_class_sums.register_autograd(_backward, setup_context=_setup)
