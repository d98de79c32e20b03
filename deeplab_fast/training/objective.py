"""Training loss of a segmentation model."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..nn import UpsampleCrossEntropyLoss
from .data import IGNORE
from .errors import TrainingError
from .recipe import Recipe


class Objective(nn.Module):
    """A model and its loss as one module, for DistributedDataParallel and torch.compile.

    The loss is the cross entropy of the logits upsampled to the size of the labels, computed
    without logits at that size, plus ``recipe.aux_weight`` times that of the auxiliary classifier.

    Args:
        model: a module with ``align_corners`` and ``logits(images)``, which returns "out" and
            optionally "aux", such as :class:`deeplab_fast.DeepLabV3`.
        recipe: weights and options of the loss.

    >>> objective = Objective(model, Recipe())
    >>> objective(images, target, objective.loss_normalizer(target)).backward()
    """

    def __init__(self, model: Any, recipe: Recipe) -> None:
        super().__init__()
        self.model = model
        self.recipe = recipe
        weights = recipe.class_weights
        if weights == "auto":
            raise TrainingError(
                "class_weights: expected numbers, got 'auto', which only train replaces by them"
            )
        self.cross_entropy = UpsampleCrossEntropyLoss(
            None if weights is None else torch.tensor(weights),
            ignore_index=IGNORE,
            reduction="sum" if recipe.top_k_pixels is None else "none",
            label_smoothing=recipe.label_smoothing,
            align_corners=model.align_corners,
        )

    def loss_normalizer(self, target: Tensor) -> Tensor:
        """Summed weight of the labels, by which F.cross_entropy with reduction "mean" divides.

        If all micro-batches of an update, on all processes, divide by its sum over them, their
        gradients add up to that of the whole batch, whichever images the ignored pixels are in.
        """
        counts = target != IGNORE
        weight = self.cross_entropy.weight
        if weight is None:
            return counts.sum(dtype=torch.float32)
        return weight[target.where(counts, 0)].where(counts, 0).sum()

    def forward(self, images: Tensor, target: Tensor, normalizer: Tensor) -> Tensor:
        """The share of these images in the loss of an update.

        Args:
            images: [N, 3, H, W], normalised.
            target: [N, H, W] int64, 255 for pixels to ignore.
            normalizer: :meth:`loss_normalizer` of the whole update.

        Returns:
            A scalar. The scalars of all micro-batches add up to the loss of the update.
        """
        logits = self.model.logits(images)
        loss = self._loss(logits["out"], target, normalizer)
        if "aux" in logits:
            loss = loss + self.recipe.aux_weight * self._loss(logits["aux"], target, normalizer)
        return loss

    def _loss(self, logits: Tensor, target: Tensor, normalizer: Tensor) -> Tensor:
        losses = self.cross_entropy(logits, target)
        fraction = self.recipe.top_k_pixels
        if fraction is None:
            # If all pixels are ignored, the loss is 0 and not 0 / 0.
            return losses / normalizer.clamp(min=torch.finfo(normalizer.dtype).tiny)
        count = max(1, int(fraction * target.numel()))
        return losses.flatten().topk(count).values.mean() / self.recipe.grad_accum_steps
