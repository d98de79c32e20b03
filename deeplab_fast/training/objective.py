"""What training makes small."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..ops import upsample_cross_entropy
from .data import IGNORE
from .recipe import Recipe


class Objective(nn.Module):
    """The loss of a model, as a module: DistributedDataParallel and torch.compile see one forward.

    Cross entropy of the logits upsampled to the size of the labels, without logits at that size,
    plus ``recipe.aux_weight`` times that of the auxiliary classifier.

    Args:
        model: has ``logits(images)``, "out" and maybe "aux", and ``align_corners``, as
            :class:`deeplab_fast.DeepLabV3`.
        recipe: its losses.

    >>> objective = Objective(model, Recipe())
    >>> objective(images, target, objective.loss_normalizer(target)).backward()
    """

    class_weights: Tensor | None

    def __init__(self, model: Any, recipe: Recipe) -> None:
        super().__init__()
        self.model = model
        self.recipe = recipe
        weights = recipe.class_weights
        self.register_buffer("class_weights", None if weights is None else torch.tensor(weights))

    def loss_normalizer(self, target: Tensor) -> Tensor:
        """How much the labels weigh: what "mean" divides by in F.cross_entropy.

        Summed over all parts of an update, on all processes, it makes the gradient of the parts
        that of the whole, however the pixels to ignore are spread.
        """
        counts = target != IGNORE
        if self.class_weights is None:
            return counts.sum(dtype=torch.float32)
        return self.class_weights[target.where(counts, 0)].where(counts, 0).sum()

    def forward(self, images: Tensor, target: Tensor, weight: Tensor) -> Tensor:
        """The share of these images in the loss of an update.

        Args:
            images: [N, 3, H, W], normalised.
            target: [N, H, W] int64, 255 for pixels that do not count.
            weight: :meth:`loss_normalizer` the whole update. The losses of its parts add up.
        """
        logits = self.model.logits(images)
        loss = self._loss(logits["out"], target, weight)
        if "aux" in logits:
            loss = loss + self.recipe.aux_weight * self._loss(logits["aux"], target, weight)
        return loss

    def _loss(self, logits: Tensor, target: Tensor, weight: Tensor) -> Tensor:
        hard = self.recipe.top_k_pixels
        losses = upsample_cross_entropy(
            logits,
            target,
            self.class_weights,
            ignore_index=IGNORE,
            reduction="sum" if hard is None else "none",
            label_smoothing=self.recipe.label_smoothing,
            align_corners=self.model.align_corners,
        )
        if hard is None:
            # Nothing to learn where all pixels are ignored: 0, not 0 / 0.
            return losses / weight.clamp(min=torch.finfo(weight.dtype).tiny)
        hardest = losses.flatten().topk(max(1, int(hard * target.numel()))).values
        return hardest.mean() / self.recipe.grad_accum_steps
