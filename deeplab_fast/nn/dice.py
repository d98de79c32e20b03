"""Dice loss as a module."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..ops import _transforms
from ..ops._arguments import boolean, check_logits, int_list, integer, real
from ..ops.upsample_class_sums import upsample_class_sums
from ..ops.upsample_cross_entropy import checked_target
from .loss import before_upsampling


class UpsampleDiceLoss(nn.Module):
    """Soft Dice loss of bilinearly upsampled logits, without probabilities at full resolution.

    Replaces ``F.interpolate`` followed by ``DiceLoss("multiclass")`` of
    segmentation_models_pytorch. With sums over all pixels of the batch that are not ignored, the
    score of a class is ``(sum(p * t) + smooth) / ((sum(p) + sum(t)) / 2 + smooth)``, where p is the
    softmax probability, and t is 1 at the pixels of the class and 0 elsewhere. The loss is the mean
    over classes of 1 minus the score, or of minus its logarithm. Classes without a pixel contribute
    0.

    The logits are upsampled a few rows at a time, and again for the gradient. Half-precision logits
    are computed in float32.

    Args:
        classes: indices of the classes that count, or None for all.
        log_loss: use minus the logarithm of the score, instead of 1 minus the score.
        smooth: as in the formula, at least 0.
        ignore_index: label of the pixels that do not contribute to the loss.
        eps: smallest divisor, and smallest score for the logarithm.
        align_corners: convention of the upsampling, as in F.interpolate. A deferred output is
            upsampled with the model's own ``align_corners`` instead.

    Inputs are those of :class:`UpsampleCrossEntropyLoss`. The output is a scalar of float32, or of
    float64 for logits of that dtype. It has no second derivatives.

    Raises:
        ValueError: a shape does not fit.
        TypeError: logits are not floating or target is not an integer tensor.
        NotImplementedError: a torch.func transform or forward mode is active.
        IndexError: on the CPU, a target is neither a class nor ignore_index.

    >>> criterion = UpsampleDiceLoss(ignore_index=255)
    >>> loss = criterion(model.logits(images)["out"], target)
    """

    def __init__(
        self,
        classes: Sequence[int] | None = None,
        log_loss: bool = False,
        smooth: float = 0.0,
        ignore_index: int = -100,
        eps: float = 1e-7,
        align_corners: bool = False,
    ) -> None:
        super().__init__()
        self.classes = None if classes is None else int_list(classes, "classes")
        self.log_loss = boolean(log_loss, "log_loss")
        self.smooth = real(smooth, "smooth")
        self.ignore_index = integer(ignore_index, "ignore_index")
        self.eps = real(eps, "eps")
        self.align_corners = boolean(align_corners, "align_corners")

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        logits, target, align_corners = before_upsampling(logits, target, self.align_corners)
        check_logits(logits)
        if _transforms.active():
            raise NotImplementedError(
                "UpsampleDiceLoss: torch.func transforms and forward mode are not supported: use "
                "F.interpolate and another Dice loss"
            )
        target = checked_target(logits, target)
        of_target, of_all = upsample_class_sums(logits, target, self.ignore_index, align_corners)
        labels = target[target != self.ignore_index]
        pixels = torch.bincount(labels, minlength=logits.size(1)).to(of_all.dtype)
        divisor = ((of_all + pixels) / 2 + self.smooth).clamp(min=self.eps)
        score = (of_target + self.smooth) / divisor
        loss = -score.clamp(min=self.eps).log() if self.log_loss else 1 - score
        loss = loss * (pixels > 0)
        return loss.mean() if self.classes is None else loss[self.classes].mean()
