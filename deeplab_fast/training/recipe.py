"""Hyperparameters of a training run, and the optimizer and learning rates that depend on them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from .errors import TrainingError

_LARGEST = torch.finfo(torch.float32).max


def _are_weights(values: Any) -> bool:
    numbers = not isinstance(values, str) and all(not isinstance(value, str) for value in values)
    return numbers and any(values) and all(0 <= value < math.inf for value in values)


@dataclass(frozen=True)
class Recipe:
    """All settings that affect the result of a training run, besides the model and the data.

    The defaults follow Chen et al. 2017 (section 4.1: poly learning rate, crop 513, scales 0.5 to
    2) and torchvision's references/segmentation (SGD, weight decay 1e-4, auxiliary loss 0.5).

    Args:
        epochs: passes over the training images.
        batch_size: images per update, over all processes and micro-batches.
        grad_accum_steps: micro-batches per update and process, to save memory. The gradient is that
            of the whole batch, but batch norm uses the statistics of each micro-batch.
        crop_size: (height, width) of the training images; smaller images are padded, and the
            padding is ignored.
        scale: (minimum, maximum) factor of the random resizing.
        flip: probability of mirroring.
        color_jitter: brightness, contrast and saturation are each multiplied by a random factor of
            1 - color_jitter to 1 + color_jitter.
        learning_rate: initial learning rate of the backbone and, unless ``head_learning_rate`` is
            given, of the other layers.
        head_learning_rate: initial learning rate of all layers but the backbone, or None.
        warmup_steps: updates over which the learning rates rise linearly to the poly schedule.
        power: exponent of the poly schedule, ``(1 - step / steps) ** power``.
        momentum, weight_decay: as in torch.optim.SGD.
        aux_weight: factor of the auxiliary classifier's loss, if the model has one.
        class_weights: one factor per class, None, or "auto" for those of
            :func:`balanced_class_weights` from the pixels of each class in the training labels,
            which :func:`train` counts.
        label_smoothing: as in F.cross_entropy.
        top_k_pixels: fraction of a batch's pixels, those with the largest losses, that count
            (detectron2's DeepLabCE), or None for all of them.
        freeze_batch_norm: keep the statistics and parameters of batch norm (Chen et al. 2017,
            section 4.1, second stage).
        ema_decay: decay of an exponential moving average of the weights, which is then evaluated
            and saved, or None.
        dtype: "float32", or "bfloat16" or "float16" for autocast; float16 adds loss scaling.
        seed: seed of image order, augmentation and dropout.

    Raises:
        TrainingError: a number is out of its range; the message names it.

    >>> recipe = Recipe(epochs=100, batch_size=8, crop_size=(360, 480))
    """

    epochs: int = 50
    batch_size: int = 16
    grad_accum_steps: int = 1
    crop_size: tuple[int, int] = (513, 513)
    scale: tuple[float, float] = (0.5, 2.0)
    flip: float = 0.5
    color_jitter: float = 0.2
    learning_rate: float = 0.01
    head_learning_rate: float | None = None
    warmup_steps: int = 0
    power: float = 0.9
    momentum: float = 0.9
    weight_decay: float = 1e-4
    aux_weight: float = 0.5
    class_weights: tuple[float, ...] | Literal["auto"] | None = None
    label_smoothing: float = 0.0
    top_k_pixels: float | None = None
    freeze_batch_norm: bool = False
    ema_decay: float | None = None
    dtype: str = "float32"
    seed: int = 0

    def __post_init__(self) -> None:
        for name, fits, expected in (
            ("epochs", self.epochs >= 1, "at least 1"),
            ("batch_size", self.batch_size >= 1, "at least 1"),
            ("grad_accum_steps", self.grad_accum_steps >= 1, "at least 1"),
            ("crop_size", min(self.crop_size) >= 1, "a positive height and width"),
            ("scale", 0 < self.scale[0] <= self.scale[1] < math.inf, "a positive range"),
            ("flip", 0 <= self.flip <= 1, "0 to 1"),
            ("color_jitter", 0 <= self.color_jitter <= 1, "0 to 1"),
            ("learning_rate", 0 < self.learning_rate <= _LARGEST, "a positive number"),
            (
                "head_learning_rate",
                self.head_learning_rate is None or 0 < self.head_learning_rate <= _LARGEST,
                "a positive number",
            ),
            ("warmup_steps", self.warmup_steps >= 0, "0 or more"),
            ("power", self.power >= 0, "0 or more"),
            ("momentum", 0 <= self.momentum < 1, "0 to below 1"),
            ("weight_decay", self.weight_decay >= 0, "0 or more"),
            ("aux_weight", self.aux_weight >= 0, "0 or more"),
            (
                "class_weights",
                self.class_weights in (None, "auto") or _are_weights(self.class_weights),
                "numbers of 0 or more, not all 0, or auto",
            ),
            ("label_smoothing", 0 <= self.label_smoothing <= 1, "0 to 1"),
            (
                "top_k_pixels",
                self.top_k_pixels is None or 0 < self.top_k_pixels <= 1,
                "above 0 to 1",
            ),
            ("ema_decay", self.ema_decay is None or 0 < self.ema_decay < 1, "between 0 and 1"),
            (
                "dtype",
                self.dtype in ("float32", "bfloat16", "float16"),
                "float32, bfloat16 or float16",
            ),
            ("seed", 0 <= self.seed < 2**63, "0 to 2**63 - 1"),
        ):
            if not fits:
                raise TrainingError(f"{name}: expected {expected}, got {getattr(self, name)}")

    def learning_rate_factor(self, step: int, steps: int) -> float:
        """Factor of the learning rates at update ``step`` of ``steps``: warm-up times poly."""
        warmup = min(1.0, (step + 1) / self.warmup_steps) if self.warmup_steps else 1.0
        return warmup * (1 - step / steps) ** self.power

    def optimizer(self, model: nn.Module) -> torch.optim.SGD:
        """SGD with one parameter group for the backbone and one for the other layers."""
        backbone: list[nn.Parameter] = []
        head: list[nn.Parameter] = []
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                (backbone if name.startswith("backbone.") else head).append(parameter)
        head_learning_rate = self.head_learning_rate or self.learning_rate
        groups = [
            {"params": backbone, "lr": self.learning_rate},
            {"params": head, "lr": head_learning_rate},
        ]
        for group in groups:
            group["initial_lr"] = group["lr"]
        return torch.optim.SGD(groups, momentum=self.momentum, weight_decay=self.weight_decay)

    def set_learning_rates(self, optimizer: torch.optim.Optimizer, step: int, steps: int) -> None:
        """Set the learning rates of update ``step`` of ``steps``."""
        factor = self.learning_rate_factor(step, steps)
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * factor
