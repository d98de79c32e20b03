"""Bilinear upsampling fused with cross entropy: a loss without full-resolution logits."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .._native.memory_format import empty_like_format
from ..backends import registry
from ..backends.arguments import UpsampleCrossEntropy, UpsampleCrossEntropyBackward
from ._arguments import (
    INT64_MAX,
    INTEGERS,
    boolean,
    check_logits,
    check_tensor,
    integer,
    real,
    wrong_type,
)
from ._register import define, differentiable, not_differentiable

_REDUCTIONS = ("none", "mean", "sum")


def upsample_cross_entropy(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    align_corners: bool = False,
) -> Tensor:
    """Cross entropy of the logits after bilinear upsampling to the size of the target.

    Equals ``F.cross_entropy(F.interpolate(logits.float(), target.shape[-2:], mode="bilinear",
    align_corners=align_corners), target, weight, ignore_index=ignore_index, reduction=reduction,
    label_smoothing=label_smoothing)`` up to rounding. Half and double dtypes are interpolated in
    fp32 too, also under autocast. Reduction "mean" divides by the summed weight of the pixels that
    are not ignored, and is NaN if there are none. Results are the same bits in every call and for
    every number of threads.

    Args:
        logits: [N, C, H, W], floating, any memory format. The only argument with a gradient. One
            channel stands for two classes with the logits 0 and ``logits``, so the loss is the
            binary cross entropy. (F.cross_entropy of one channel is always 0.)
        target: [N, height, width] classes in [0, C), or ``ignore_index``: uint8, int8, int16, int32
            or int64. The kernels read int64, to which others are converted.
        weight: [C] floating weights of the classes, or None.
        ignore_index: target of the pixels that do not count; any int, also that of a class.
        reduction: "mean", "sum", or "none" for the loss of every pixel.
        label_smoothing: in [0, 1], the part of each target spread evenly over all classes.
        align_corners: as in F.interpolate.

    Returns:
        fp32 loss, a scalar or [N, height, width] with reduction "none". Differentiable once. The
        inputs and one fp32 number per pixel are saved for the gradient.

    Raises:
        ValueError: a shape, device, reduction or label_smoothing does not fit, or weight requires
            a gradient.
        TypeError: logits or weight are not floating, target holds no integers, or another argument
            is of a wrong type.
        IndexError: on the CPU, a target is neither a class nor ignore_index. On other devices the
            loss is NaN instead, because nothing waits for the device there.

    >>> logits = torch.randn(1, 21, 65, 65, requires_grad=True)
    >>> upsample_cross_entropy(logits, torch.randint(21, (1, 513, 513))).backward()
    """
    check_logits(logits)
    target = checked_target(logits, target)
    logits = with_background(logits)
    if weight is not None:
        _check_weight(logits, weight)
    ignore_index = integer(ignore_index, "ignore_index")
    if not -INT64_MAX - 1 <= ignore_index <= INT64_MAX:
        raise ValueError(f"ignore_index: expected an int of 64 bits, got {ignore_index}")
    reduction = checked_reduction(reduction)
    label_smoothing = real(label_smoothing, "label_smoothing")
    if not 0.0 <= label_smoothing <= 1.0:
        raise ValueError(f"label_smoothing: expected 0 to 1, got {label_smoothing}")
    align_corners = boolean(align_corners, "align_corners")
    loss, _, _ = upsample_cross_entropy_op(
        logits, target, weight, ignore_index, reduction, float(label_smoothing), align_corners,
        backend=registry.current(),
    )  # fmt: skip
    return loss


def checked_reduction(reduction: str) -> str:
    if not isinstance(reduction, str):
        raise wrong_type("reduction", f"one of {', '.join(_REDUCTIONS)}", reduction)
    if reduction not in _REDUCTIONS:
        raise ValueError(f"reduction: expected one of {', '.join(_REDUCTIONS)}, got {reduction!r}")
    return reduction


def with_background(logits: Tensor) -> Tensor:
    """Logits of two classes from those of one channel, with a channel of zeros for class 0.

    Their softmax is the sigmoid of the channel, and their argmax is 1 where it is above 0. Other
    logits are returned as they are.
    """
    return F.pad(logits, (0, 0, 0, 0, 1, 0)) if logits.size(1) == 1 else logits


def checked_target(logits: Tensor, target: Tensor) -> Tensor:
    """``target`` in int64."""
    check_tensor(target, "target")
    if target.dim() != 3 or target.size(0) != logits.size(0) or 0 in target.shape[1:]:
        raise ValueError(
            f"target: expected [{logits.size(0)}, height, width] of at least 1x1, got shape "
            f"{tuple(target.shape)}"
        )
    if target.dtype not in INTEGERS:
        raise TypeError(f"target: expected an integer dtype, got {target.dtype}")
    if target.device != logits.device:
        raise ValueError(f"target: expected on {logits.device}, got {target.device}")
    return target.long()


def _check_weight(logits: Tensor, weight: Tensor) -> None:
    check_tensor(weight, "weight")
    if tuple(weight.shape) != (logits.size(1),):
        raise ValueError(f"weight: expected ({logits.size(1)},), got {tuple(weight.shape)}")
    if not weight.is_floating_point():
        raise TypeError(f"weight: expected a floating dtype, got {weight.dtype}")
    if weight.device != logits.device:
        raise ValueError(f"weight: expected on {logits.device}, got {weight.device}")
    if weight.requires_grad:
        raise ValueError("weight: expected requires_grad=False, got True")


def _fake(arguments: UpsampleCrossEntropy) -> tuple[Tensor, Tensor, Tensor]:
    logits, shape = arguments.logits, tuple(arguments.target.shape)
    return (
        logits.new_empty(shape if arguments.reduction == "none" else (), dtype=torch.float32),
        logits.new_empty(shape, dtype=torch.float32),
        logits.new_empty((), dtype=torch.float32),
    )


def _fake_backward(arguments: UpsampleCrossEntropyBackward) -> Tensor:
    return empty_like_format(arguments.logits, tuple(arguments.logits.shape))


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    logits, target, weight, *ctx.options = inputs
    _, log_sum_exp, total_weight = output
    ctx.mark_non_differentiable(log_sum_exp, total_weight)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(logits, target, weight, log_sum_exp, total_weight)


def _backward(ctx: Any, grad_loss: Tensor | None, *others: Any) -> tuple[Tensor | None, ...]:
    grad_logits = None
    if grad_loss is not None and ctx.needs_input_grad[0]:
        grad_logits = upsample_cross_entropy_backward_op(
            grad_loss, *ctx.saved_tensors, *ctx.options, backend=ctx.backend
        )
    return grad_logits, None, None, None, None, None, None


def _jvp(
    arguments: Any, tangents: Any, output: tuple[Tensor, ...], backend: str
) -> tuple[Tensor, None, None]:
    """The tangent of a scalar loss: the inner product of its gradient and the logits' tangent."""
    logits, target, weight, *options = arguments
    t_logits, _, t_weight, *_ = tangents
    loss, *saved = output
    if t_weight is not None:
        raise ValueError("weight: expected no tangent, because logits alone have a derivative")
    if loss.dim() > 0:
        raise NotImplementedError(
            'upsample_cross_entropy with reduction="none" has no forward-mode derivative: use '
            '"mean" or "sum", or F.interpolate and F.cross_entropy'
        )
    grad_logits = upsample_cross_entropy_backward_op(
        torch.ones_like(loss), logits, target, weight, *saved, *options, backend=backend
    )
    return (grad_logits.float() * t_logits.float()).sum(), None, None


_OPTIONS = "int ignore_index, str reduction, float label_smoothing, bool align_corners"
# log_sum_exp [N, height, width] belongs to the upsampled centred logits. "Centred" means that their
# maximum over classes is subtracted at each low-resolution pixel, which does not change the softmax
# and keeps this number accurate. total_weight is the divisor of "mean".
upsample_cross_entropy_op = define(
    "upsample_cross_entropy",
    UpsampleCrossEntropy,
    f"(Tensor logits, Tensor target, Tensor? weight, {_OPTIONS}) "
    "-> (Tensor loss, Tensor log_sum_exp, Tensor total_weight)",
    _fake,
)
upsample_cross_entropy_backward_op = define(
    "upsample_cross_entropy_backward",
    UpsampleCrossEntropyBackward,
    "(Tensor grad_loss, Tensor logits, Tensor target, Tensor? weight, Tensor log_sum_exp, "
    f"Tensor total_weight, {_OPTIONS}) -> Tensor",
    _fake_backward,
)
differentiable("upsample_cross_entropy", _backward, _setup, _jvp)
not_differentiable("upsample_cross_entropy_backward", "use F.interpolate and F.cross_entropy")
