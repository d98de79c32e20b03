"""Loss functions as modules."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops._arguments import INTEGERS, boolean, check_logits, check_tensor, integer, real
from ..ops.upsample_cross_entropy import (
    checked_reduction,
    upsample_cross_entropy,
    with_background,
)
from .deferred import DeferredUpsampling


class UpsampleCrossEntropyLoss(nn.Module):
    """Cross entropy of bilinearly upsampled logits, without logits at full resolution.

    Replaces ``F.interpolate`` followed by :class:`torch.nn.CrossEntropyLoss`, and computes in
    float32; see :func:`deeplab_fast.upsample_cross_entropy`. Takes either the logits before the
    upsampling or, within :func:`deeplab_fast.deferred_upsampling`, the output of a model that
    upsamples them itself.

    Logits that have the size of the target already go to F.cross_entropy on a CPU.

    The call is that of the losses of segmentation_models_pytorch, ``loss(logits, masks)``. Its
    ``SoftCrossEntropyLoss(smooth_factor=s)`` is this loss with ``label_smoothing=s``, but its
    "mean" divides by the number of all pixels, the ignored ones too. That value is
    ``UpsampleCrossEntropyLoss(reduction="sum", ...)(logits, masks) / masks.numel()``.
    mmsegmentation's loss is :class:`deeplab_fast.nn.mmsegmentation.UpsampleCrossEntropyLoss`.

    Args:
        weight: floating [C], one factor per class, or None. A buffer of the module.
        ignore_index: label of the pixels that do not contribute to the loss.
        reduction: "mean", "sum", or "none" for the loss of every pixel.
        label_smoothing: fraction of each target spread evenly over all classes, 0 to 1.
        align_corners: convention of the upsampling, as in F.interpolate. A deferred output is
            upsampled with the model's own ``align_corners`` instead.

    Input logits [N, C, H, W], floating, and target [N, height, width] or [N, 1, height, width], of
    an integer dtype; output float32, a scalar or, with reduction "none", [N, height, width].

    Raises:
        ValueError, TypeError, IndexError: in ``forward``, as
            :func:`deeplab_fast.upsample_cross_entropy` does; the message names the argument.
        ValueError: the size of the target is not that of the deferred output.

    >>> criterion = UpsampleCrossEntropyLoss(ignore_index=255)
    >>> loss = criterion(model.logits(images)["out"], target)
    """

    weight: Tensor | None

    def __init__(
        self,
        weight: Tensor | None = None,
        ignore_index: int = -100,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
        align_corners: bool = False,
    ) -> None:
        super().__init__()
        if weight is not None:
            check_tensor(weight, "weight")
        self.register_buffer("weight", weight)
        self.ignore_index = integer(ignore_index, "ignore_index")
        self.reduction = checked_reduction(reduction)
        self.label_smoothing = real(label_smoothing, "label_smoothing")
        self.align_corners = boolean(align_corners, "align_corners")

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        logits, target, align_corners = before_upsampling(logits, target, self.align_corners)
        if _have_equal_sizes(logits, target):
            # There is nothing to upsample, and PyTorch takes half the time on a CPU.
            return F.cross_entropy(
                logits.float(),
                target,
                None if self.weight is None else self.weight.float(),
                ignore_index=self.ignore_index,
                reduction=self.reduction,
                label_smoothing=self.label_smoothing,
            )
        return upsample_cross_entropy(
            logits,
            target,
            self.weight,
            self.ignore_index,
            self.reduction,
            self.label_smoothing,
            align_corners,
        )


class UpsampleFocalLoss(nn.Module):
    """Focal loss of bilinearly upsampled logits, without logits at full resolution.

    The loss of a pixel is ``(1 - p) ** gamma * -log(p)``, where p is the softmax probability of its
    class: equation 4 of Lin et al., Focal Loss for Dense Object Detection, 2017, for several
    classes. It is computed from the cross entropy ``-log(p)`` of every pixel in float32.

    It replaces ``F.interpolate`` followed by the ``FocalLoss`` of DeepLabV3Plus-Pytorch (VainF),
    whose ``alpha`` is a constant factor. ``FocalLoss("multiclass")`` of segmentation_models_pytorch
    is another function, a sum of binary losses of the sigmoid of each class.

    Args:
        gamma: exponent, at least 0; 0 gives the cross entropy.
        ignore_index: label of the pixels that do not contribute to the loss.
        reduction: "mean" over all pixels, the ignored ones too; "sum"; or "none" for the loss of
            every pixel.
        align_corners: convention of the upsampling, as in F.interpolate. A deferred output is
            upsampled with the model's own ``align_corners`` instead.

    Inputs, output and errors are those of :class:`UpsampleCrossEntropyLoss`.

    Raises:
        ValueError: ``gamma`` is negative, or ``reduction`` is unknown.

    >>> criterion = UpsampleFocalLoss(ignore_index=255)
    >>> loss = criterion(model.logits(images)["out"], target)
    """

    def __init__(
        self,
        gamma: float = 2.0,
        ignore_index: int = -100,
        reduction: str = "mean",
        align_corners: bool = False,
    ) -> None:
        super().__init__()
        self.gamma = real(gamma, "gamma")
        if not self.gamma >= 0:
            raise ValueError(f"gamma: expected at least 0, got {gamma}")
        self.ignore_index = integer(ignore_index, "ignore_index")
        self.reduction = checked_reduction(reduction)
        self.align_corners = boolean(align_corners, "align_corners")

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        logits, target, align_corners = before_upsampling(logits, target, self.align_corners)
        cross_entropy = upsample_cross_entropy(
            logits,
            target,
            ignore_index=self.ignore_index,
            reduction="none",
            align_corners=align_corners,
        )
        # Ignored pixels have 1 - p = 0, where a power with gamma below 1 has no derivative.
        tiny = torch.finfo(torch.float32).tiny
        one_minus_p = (-torch.expm1(-cross_entropy)).clamp(min=tiny)
        loss = one_minus_p**self.gamma * cross_entropy
        if self.reduction == "none":
            return loss
        return loss.mean() if self.reduction == "mean" else loss.sum()


def _have_equal_sizes(logits: Tensor, target: Tensor) -> bool:
    """True for valid operands on a CPU whose sizes are equal."""
    return (
        isinstance(logits, Tensor)
        and isinstance(target, Tensor)
        and logits.is_cpu
        and target.is_cpu
        and (logits.is_floating_point(), target.dtype) == (True, torch.int64)
        and (logits.dim(), logits.size(0), *logits.shape[2:]) == (4, *target.shape)
    )


def before_upsampling(
    logits: Tensor, target: Tensor, align_corners: bool
) -> tuple[Tensor, Tensor, bool]:
    """The logits before a deferred upsampling, if there is one, the target, and align_corners.

    Logits of one channel become those of two classes, as :func:`with_background` makes them. A
    target of another integer dtype becomes int64, and one of shape [N, 1, height, width] becomes
    [N, height, width]. ``align_corners`` is returned, unless the deferred upsampling has its own.
    """
    if isinstance(target, Tensor):
        if target.dim() == 4 and target.size(1) == 1:
            target = target.squeeze(1)
        if target.dtype in INTEGERS:
            target = target.long()
    if isinstance(logits, DeferredUpsampling):
        if target.shape[1:] != logits.shape[2:]:
            expected = [logits.size(0), *logits.shape[2:]]
            raise ValueError(
                f"target: expected {expected}, the size of the upsampled logits, got "
                f"{list(target.shape)}"
            )
        if logits.is_pending and logits.interpolation.scale_factors is None:
            align_corners, logits = logits.interpolation.align_corners, logits.logits
    check_logits(logits)
    return with_background(logits), target, align_corners
