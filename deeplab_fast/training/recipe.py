"""How to train: the numbers, and what they mean for the optimizer."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from .errors import TrainingError


@dataclass(frozen=True)
class Recipe:
    """Everything that decides what a training ends with, besides model and data.

    Defaults follow Chen et al. 2017 (section 4.1: poly learning rate, crop 513, scales 0.5 to 2)
    and torchvision's references/segmentation (SGD, weight decay 1e-4, auxiliary loss 0.5).

    Args:
        epochs: how often every image is seen.
        batch_size: images per update, over all processes and accumulated parts.
        accumulate: parts in which a process computes its images of one update, to save memory. The
            gradient is that of the whole; only batch norm sees the parts.
        crop: (height, width) of the training images; smaller ones are padded and the padding
            ignored.
        scale: range of the random resizing.
        flip: probability of mirroring.
        jitter: brightness, contrast and saturation each change by a factor of 1 - jitter to
            1 + jitter.
        learning_rate: of the backbone and, unless ``head_learning_rate`` is given, of the rest.
        warmup: updates in which the learning rates grow linearly to the poly schedule.
        power: of the poly schedule, ``(1 - step / steps) ** power``.
        momentum, weight_decay: of SGD.
        aux_weight: of the auxiliary classifier's loss, where the model has one.
        class_weights: one factor per class, or None.
        label_smoothing: as in F.cross_entropy.
        hard_pixels: the fraction of a batch's pixels with the largest losses that count
            (detectron2's DeepLabCE), or None for all of them.
        freeze_batch_norm: keep the statistics and parameters of batch norm (Chen et al. 2017,
            section 4.1, second stage).
        ema: decay of an exponential moving average of the weights, which is then what is evaluated
            and kept, or None.
        dtype: "float32", or "bfloat16" or "float16" for autocast, the latter with loss scaling.
        seed: of crops, order and dropout.

    Raises:
        TrainingError: a number is out of its range, naming it.

    >>> recipe = Recipe(epochs=100, batch_size=8, crop=(360, 480))
    """

    epochs: int = 50
    batch_size: int = 16
    accumulate: int = 1
    crop: tuple[int, int] = (513, 513)
    scale: tuple[float, float] = (0.5, 2.0)
    flip: float = 0.5
    jitter: float = 0.2
    learning_rate: float = 0.01
    head_learning_rate: float | None = None
    warmup: int = 0
    power: float = 0.9
    momentum: float = 0.9
    weight_decay: float = 1e-4
    aux_weight: float = 0.5
    class_weights: tuple[float, ...] | None = None
    label_smoothing: float = 0.0
    hard_pixels: float | None = None
    freeze_batch_norm: bool = False
    ema: float | None = None
    dtype: str = "float32"
    seed: int = 0

    def __post_init__(self) -> None:
        for name, fits, expected in (
            ("epochs", self.epochs >= 1, "at least 1"),
            ("batch_size", self.batch_size >= 1, "at least 1"),
            ("accumulate", self.accumulate >= 1, "at least 1"),
            ("crop", min(self.crop) >= 1, "a positive height and width"),
            ("scale", 0 < self.scale[0] <= self.scale[1], "a positive range"),
            ("flip", 0 <= self.flip <= 1, "0 to 1"),
            ("jitter", 0 <= self.jitter <= 1, "0 to 1"),
            ("learning_rate", self.learning_rate > 0, "a positive number"),
            (
                "head_learning_rate",
                self.head_learning_rate is None or self.head_learning_rate > 0,
                "a positive number",
            ),
            ("warmup", self.warmup >= 0, "0 or more"),
            ("power", self.power >= 0, "0 or more"),
            ("momentum", 0 <= self.momentum < 1, "0 to below 1"),
            ("weight_decay", self.weight_decay >= 0, "0 or more"),
            ("aux_weight", self.aux_weight >= 0, "0 or more"),
            (
                "class_weights",
                self.class_weights is None
                or min(self.class_weights, default=-1) >= 0 < max(self.class_weights),
                "numbers of 0 or more, not all 0",
            ),
            ("label_smoothing", 0 <= self.label_smoothing <= 1, "0 to 1"),
            ("hard_pixels", self.hard_pixels is None or 0 < self.hard_pixels <= 1, "above 0 to 1"),
            ("ema", self.ema is None or 0 < self.ema < 1, "between 0 and 1"),
            (
                "dtype",
                self.dtype in ("float32", "bfloat16", "float16"),
                "float32, bfloat16 or float16",
            ),
            ("seed", self.seed >= 0, "0 or more"),
        ):
            if not fits:
                raise TrainingError(f"{name}: expected {expected}, got {getattr(self, name)}")

    def learning_rate_factor(self, step: int, steps: int) -> float:
        """Of update ``step`` among ``steps``: the poly schedule, under a linear warm-up."""
        warmup = min(1.0, (step + 1) / self.warmup) if self.warmup else 1.0
        return warmup * (1 - step / steps) ** self.power

    def optimizer(self, model: nn.Module) -> torch.optim.SGD:
        """SGD with one group for the backbone and one for the rest."""
        backbone: list[nn.Parameter] = []
        head: list[nn.Parameter] = []
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                (backbone if name.startswith("backbone.") else head).append(parameter)
        head_rate = self.head_learning_rate or self.learning_rate
        groups = [{"params": backbone, "lr": self.learning_rate}, {"params": head, "lr": head_rate}]
        for group in groups:
            group["initial_lr"] = group["lr"]
        return torch.optim.SGD(groups, momentum=self.momentum, weight_decay=self.weight_decay)

    def set_learning_rates(self, optimizer: torch.optim.Optimizer, step: int, steps: int) -> None:
        factor = self.learning_rate_factor(step, steps)
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * factor
