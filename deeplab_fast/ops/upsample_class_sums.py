"""Sums of the softmax of upsampled logits, without the softmax at full resolution."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .._native.cross_entropy import bad_target

# Size of the logits of one stripe. Stripes of 0.5 to 16 MB took the same time on a CPU.
_STRIPE_BYTES = 4 << 20


class _Stripe(NamedTuple):
    """Neighbouring output rows of one image, S of H, computed from s of its h source rows."""

    image: int
    sources: slice
    row_weights: Tensor  # [S, s]
    softmax: Tensor  # [C, S, W]
    target: Tensor  # [S, W], 0 for ignored pixels
    counts: Tensor  # [S, W] bool, False for ignored pixels


def _stripes(
    logits: Tensor, target: Tensor, ignore_index: int, align_corners: bool
) -> Iterator[_Stripe]:
    classes, source_height = logits.shape[1:3]
    height, width = target.shape[1:]
    # Interpolation of the unit vectors gives the weights of the source rows.
    weights = F.interpolate(
        torch.eye(source_height, dtype=logits.dtype)[None, None],
        (height, source_height),
        mode="bilinear",
        align_corners=align_corners,
    )[0, 0]
    weights_on_device = weights.to(logits.device)
    step = max(1, _STRIPE_BYTES // (classes * width * logits.element_size()))
    for image in range(logits.size(0)):
        for begin in range(0, height, step):
            rows = slice(begin, begin + step)
            used = weights[rows].any(0).nonzero()
            sources = slice(int(used[0]), int(used[-1]) + 1)
            row_weights = weights_on_device[rows, sources]
            narrow = row_weights @ logits[image, :, sources]
            upsampled = torch.ops.aten.upsample_bilinear2d(
                narrow[None], [narrow.size(1), width], align_corners, None, None
            )
            labels = target[image, rows]
            counts = labels != ignore_index
            yield _Stripe(
                *(image, sources, row_weights, upsampled[0].softmax(0)),
                *(labels.where(counts, 0), counts),
            )


def _upsample_class_sums(
    logits: Tensor, target: Tensor, ignore_index: int, align_corners: bool
) -> tuple[Tensor, Tensor]:
    classes = logits.size(1)
    if target.device.type == "cpu":
        known = (target == ignore_index) | ((target >= 0) & (target < classes))
        if not known.all():
            raise bad_target(int(target[~known][0]), classes, ignore_index)
    logits = _at_least_float32(logits)
    of_target, of_all = logits.new_zeros(classes), logits.new_zeros(classes)
    for stripe in _stripes(logits, target, ignore_index, align_corners):
        hits = stripe.softmax.gather(0, stripe.target[None])[0] * stripe.counts
        of_target.index_add_(0, stripe.target.flatten(), hits.flatten())
        of_all += stripe.softmax.flatten(1) @ stripe.counts.flatten().to(logits.dtype)
    return of_target, of_all


def _upsample_class_sums_backward(
    grad_of_target: Tensor,
    grad_of_all: Tensor,
    logits: Tensor,
    target: Tensor,
    ignore_index: int,
    align_corners: bool,
) -> Tensor:
    dtype, logits = logits.dtype, _at_least_float32(logits)
    grad = torch.zeros_like(logits, memory_format=torch.contiguous_format)
    for stripe in _stripes(logits, target, ignore_index, align_corners):
        softmax, index = stripe.softmax, stripe.target[None]
        # The gradient of a pixel's softmax is grad_of_all, plus grad_of_target at its class.
        extra = grad_of_target[stripe.target]
        mean = (grad_of_all @ softmax.flatten(1)).view_as(extra)
        mean += softmax.gather(0, index)[0] * extra
        grad_logits = grad_of_all[:, None, None] - mean
        grad_logits.scatter_(0, index, grad_logits.gather(0, index) + extra)
        grad_logits *= softmax
        grad_logits *= stripe.counts
        shape = [1, logits.size(1), grad_logits.size(1), logits.size(3)]
        grad_narrow = torch.ops.aten.upsample_bilinear2d_backward(
            grad_logits[None], list(grad_logits.shape[1:]), shape, align_corners, None, None
        )
        grad[stripe.image, :, stripe.sources] += stripe.row_weights.t() @ grad_narrow[0]
    return grad.to(dtype)


def _at_least_float32(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()


upsample_class_sums = torch.library.custom_op(
    "deeplab_fast::upsample_class_sums", _upsample_class_sums, mutates_args=()
)
"""Sums over pixels of the softmax of bilinearly upsampled logits, for each class.

``upsample_class_sums(logits, target, ignore_index, align_corners)`` returns two tensors [C]: the
sum over the pixels whose target is the class, and the sum over all pixels, without those of
ignore_index. The logits [N, C, h, w] are upsampled to the size of the target [N, H, W], int64, a
few rows at a time, here and again for the gradient.
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
