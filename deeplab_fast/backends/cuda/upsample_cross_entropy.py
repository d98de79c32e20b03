"""Bilinear upsampling and cross entropy, forward and backward."""

from __future__ import annotations

import torch
from torch import Tensor

from ..._native import _C
from ..._native.common import DTYPES, LaunchContext
from ..._native.cross_entropy import cross_entropy_params
from ..._native.memory_format import empty_like_format, in_format_of
from ..._native.upsample_shape import upsample_shape
from ..arguments import UpsampleCrossEntropy, UpsampleCrossEntropyBackward
from ..registry import register_kernel


@register_kernel("upsample_cross_entropy", "cuda")
def upsample_cross_entropy(
    context: LaunchContext, arguments: UpsampleCrossEntropy
) -> tuple[Tensor, Tensor, Tensor]:
    logits, target, weight, ignore_index, reduction, label_smoothing, align_corners = arguments
    if logits.dtype not in DTYPES:
        logits = logits.float()
    target = target.contiguous()
    weight = None if weight is None else weight.float().contiguous()
    shape = upsample_shape(logits, target.shape[1:], None, align_corners)
    per_pixel = reduction == "none"
    loss = logits.new_empty(target.shape if per_pixel else (), dtype=torch.float32)
    log_sum_exp = logits.new_empty(target.shape, dtype=torch.float32)
    total_weight = logits.new_empty((), dtype=torch.float32)
    workspace = _workspace(context, logits, shape, backward=False)
    context.module.upsample_cross_entropy_fwd(
        0 if per_pixel else loss.data_ptr(),
        loss.data_ptr() if per_pixel else 0,
        log_sum_exp.data_ptr(),
        total_weight.data_ptr(),
        workspace.data_ptr(),
        logits.data_ptr(),
        target.data_ptr(),
        reduction == "mean",
        shape,
        cross_entropy_params(weight, ignore_index, label_smoothing),
        DTYPES[logits.dtype],
        context.stream,
    )
    return loss, log_sum_exp, total_weight


@register_kernel("upsample_cross_entropy_backward", "cuda")
def upsample_cross_entropy_backward(
    context: LaunchContext, arguments: UpsampleCrossEntropyBackward
) -> Tensor:
    (
        grad_loss, logits, target, weight, log_sum_exp, total_weight,
        ignore_index, reduction, label_smoothing, align_corners,
    ) = arguments  # fmt: skip
    typed = logits if logits.dtype in DTYPES else logits.float()
    grad_logits = empty_like_format(typed, tuple(typed.shape))
    grad_loss = grad_loss.expand(target.shape)
    target, log_sum_exp = target.contiguous(), log_sum_exp.contiguous()
    weight = None if weight is None else weight.float().contiguous()
    shape = upsample_shape(typed, target.shape[1:], None, align_corners)
    workspace = _workspace(context, typed, shape, backward=True)
    context.module.upsample_cross_entropy_bwd(
        grad_logits.data_ptr(),
        workspace.data_ptr(),
        grad_loss.data_ptr(),
        grad_loss.stride(),
        total_weight.data_ptr() if reduction == "mean" else 0,
        log_sum_exp.data_ptr(),
        typed.data_ptr(),
        target.data_ptr(),
        not grad_logits.is_contiguous(),
        shape,
        cross_entropy_params(weight, ignore_index, label_smoothing),
        DTYPES[typed.dtype],
        context.stream,
    )
    return in_format_of(grad_logits.to(logits.dtype), logits)


def _workspace(
    context: LaunchContext, logits: Tensor, shape: _C.UpsampleShape, backward: bool
) -> Tensor:
    nbytes = context.module.upsample_cross_entropy_workspace(shape, backward)
    return logits.new_empty(nbytes, dtype=torch.uint8)
