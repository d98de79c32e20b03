"""Loss functions as modules."""

from __future__ import annotations

from torch import Tensor, nn

from ..ops.upsample_cross_entropy import upsample_cross_entropy


class UpsampleCrossEntropyLoss(nn.Module):
    """Cross entropy of bilinearly upsampled logits, without logits at full resolution.

    Replaces ``F.interpolate`` followed by :class:`torch.nn.CrossEntropyLoss`, and computes in
    float32; see :func:`deeplab_fast.upsample_cross_entropy`.

    Args:
        weight: floating [C], one factor per class, or None. A buffer of the module.
        ignore_index: label of the pixels that do not contribute to the loss.
        reduction: "mean", "sum", or "none" for the loss of every pixel.
        label_smoothing: fraction of each target spread evenly over all classes, 0 to 1.
        align_corners: convention of the upsampling, as in F.interpolate.

    Input logits [N, C, H, W], floating, and target [N, height, width] int64; output float32, a
    scalar or, with reduction "none", [N, height, width].

    Raises:
        ValueError, TypeError, IndexError: in ``forward``, as
            :func:`deeplab_fast.upsample_cross_entropy` does; the message names the argument.

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
        self.register_buffer("weight", weight)
        self.ignore_index = ignore_index
        self.reduction = reduction
        self.label_smoothing = label_smoothing
        self.align_corners = align_corners

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        return upsample_cross_entropy(
            logits,
            target,
            self.weight,
            self.ignore_index,
            self.reduction,
            self.label_smoothing,
            self.align_corners,
        )
