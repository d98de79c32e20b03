"""Checks that the model, the data, the recipe and the processes of a run fit together."""

from __future__ import annotations

import itertools
from typing import Any

import torch

from . import distributed
from .data import SegmentationData
from .errors import TrainingError
from .recipe import Recipe


def check_compatible(
    model: Any,
    train_data: SegmentationData,
    val_data: SegmentationData | None,
    recipe: Recipe,
) -> None:
    """Raise TrainingError if the arguments of a run do not fit together."""
    for name, data in (("train_data", train_data), ("val_data", val_data)):
        if data is not None and not len(data):
            raise TrainingError(f"{name}: expected images, got none")
    try:
        model.preprocessing.check_takes_photos()
    except ValueError as error:
        raise TrainingError(str(error)) from error
    _check_batch_size(recipe, next(model.parameters()).device)
    # One output channel stands for two classes.
    classes, labels = len(train_data.classes), max(2, model.classifier[-1].out_channels)
    if classes < 2:
        raise TrainingError(
            f"classes: expected two or more, such as background and {train_data.classes[0]}, got 1"
        )
    if labels != classes:
        raise TrainingError(f"model: expected {classes} classes as in the data, got {labels}")
    weights = recipe.class_weights
    if weights not in (None, "auto") and len(weights) != classes:
        raise TrainingError(f"class_weights: expected {classes} numbers, got {len(weights)}")
    if val_data is not None and val_data.classes != train_data.classes:
        names = itertools.zip_longest(val_data.classes, train_data.classes, fillvalue="none")
        label, (got, expected) = next(item for item in enumerate(names) if len({*item[1]}) == 2)
        raise TrainingError(
            f"val_data: expected the classes of train_data, got {got} instead of {expected} as "
            f"class {label}"
        )


def _check_batch_size(recipe: Recipe, device: torch.device) -> None:
    processes = distributed.world_size()
    micro_batches = processes * recipe.grad_accum_steps
    if recipe.batch_size % micro_batches:
        raise TrainingError(
            f"batch_size: expected a multiple of {micro_batches} ({processes} processes, "
            f"{recipe.grad_accum_steps} micro-batches), got {recipe.batch_size}"
        )
    # After image pooling, batch norm has one value per image and channel, so it needs at least two
    # images. SyncBatchNorm, which exists on GPUs only, uses the images of all processes.
    images = recipe.batch_size // recipe.grad_accum_steps
    if device.type != "cuda":
        images //= processes
    if images < 2 and not recipe.freeze_batch_norm:
        raise TrainingError(
            "batch_size: expected at least 2 images at a time for batch norm (or "
            f"freeze_batch_norm), got {images}"
        )
