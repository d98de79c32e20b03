"""Losses with the interface of mmsegmentation's."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..ops._arguments import check_tensor, real, wrong_type
from ..ops.upsample_cross_entropy import upsample_cross_entropy
from .loss import before_upsampling


class UpsampleCrossEntropyLoss(nn.Module):
    """mmsegmentation's CrossEntropyLoss, computed from the logits before the upsampling.

    A decode head of mmsegmentation upsamples its logits before it calls the losses. If the model
    runs within :func:`deeplab_fast.deferred_upsampling`, this loss takes the logits before the
    upsampling; otherwise it computes the same value from the upsampled logits. It computes in
    float32. The decode head's accuracy, ``acc_seg``, still needs the upsampled logits, but not
    their gradient.

    After ``MODELS.register_module(module=UpsampleCrossEntropyLoss)``, with ``MODELS`` of
    mmseg.registry, a configuration names it as ``loss_decode=dict(type="UpsampleCrossEntropyLoss",
    loss_weight=1.0)``.

    Args:
        use_sigmoid: must be False. The argument exists because configurations set it.
        reduction: "mean", "sum", or "none" for the loss of every pixel.
        class_weight: one factor per class, or None.
        loss_weight: factor of the loss.
        loss_name: key of the loss in the log.
        avg_non_ignore: leave ignored pixels out of the divisor of "mean", which is the number of
            pixels or, with ``class_weight``, the sum of the weights of their classes. A label that
            is not a class has no weight.

    ``forward`` takes logits [N, C, H, W], floating, and labels [N, H, W], of an integer dtype;
    ``weight``, a factor for each pixel, [N, H, W]; ``avg_factor``, a divisor for "mean" instead of
    the number of pixels; ``reduction_override``, instead of ``reduction``; and ``ignore_index``.
    The output is float32.

    Raises:
        ValueError: ``use_sigmoid`` is True, ``avg_factor`` is given with reduction "sum", or the
            reduction is unknown.
        ValueError, TypeError, IndexError: in ``forward``, as
            :func:`deeplab_fast.upsample_cross_entropy` does; the message names the argument.
    """

    class_weight: Tensor | None

    def __init__(
        self,
        use_sigmoid: bool = False,
        reduction: str = "mean",
        class_weight: Sequence[float] | None = None,
        loss_weight: float = 1.0,
        loss_name: str = "loss_ce",
        avg_non_ignore: bool = False,
    ) -> None:
        super().__init__()
        if use_sigmoid:
            raise ValueError("use_sigmoid: expected False, got True")
        weights = None
        if class_weight is not None:
            try:
                weights = torch.as_tensor(class_weight).float()
            except (TypeError, ValueError, RuntimeError):
                raise wrong_type("class_weight", "a list of numbers", class_weight) from None
        # mmsegmentation's loss has no state either.
        self.register_buffer("class_weight", weights, persistent=False)
        self.reduction = reduction
        self.loss_weight = loss_weight
        self.loss_name = loss_name
        self.avg_non_ignore = avg_non_ignore

    def forward(
        self,
        cls_score: Tensor,
        label: Tensor,
        weight: Tensor | None = None,
        avg_factor: float | Tensor | None = None,
        reduction_override: str | None = None,
        ignore_index: int = -100,
    ) -> Tensor:
        reduction = reduction_override or self.reduction
        if reduction not in ("none", "mean", "sum"):
            raise ValueError(f"reduction: expected one of none, mean, sum, got {reduction!r}")
        if weight is not None:
            check_tensor(weight, "weight")
        if avg_factor is not None and not isinstance(avg_factor, Tensor):
            avg_factor = real(avg_factor, "avg_factor")
        if avg_factor is not None and reduction == "sum":
            raise ValueError('avg_factor: expected None with reduction "sum"')
        logits, label, align_corners = before_upsampling(cls_score, label, False)
        loss = upsample_cross_entropy(
            logits,
            label,
            self.class_weight,
            ignore_index,
            reduction="none" if weight is not None or reduction == "none" else "sum",
            align_corners=align_corners,
        )
        if weight is not None:
            loss = loss * weight.float()
        if reduction != "none":
            loss = loss.sum()
        if reduction == "mean":
            if avg_factor is None:
                avg_factor = self._total_weight(label, ignore_index)
            # mmsegmentation adds this epsilon, so 0 pixels give a loss of 0.
            loss = loss / (avg_factor + torch.finfo(torch.float32).eps)
        return self.loss_weight * loss

    def _total_weight(self, label: Tensor, ignore_index: int) -> Tensor | int:
        """The divisor of "mean"."""
        if self.class_weight is None:
            return (label != ignore_index).sum() if self.avg_non_ignore else label.numel()
        counts = (label >= 0) & (label < len(self.class_weight))
        if self.avg_non_ignore:
            counts &= label != ignore_index
        return (self.class_weight[label.where(counts, 0)] * counts).sum()
