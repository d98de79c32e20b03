"""Augmentation of training images."""

from __future__ import annotations

from typing import Any

import numpy as np
from PIL import Image, ImageEnhance

from .data import IGNORE
from .recipe import Recipe

_FILL = (124, 116, 104)  # ImageNet mean, so that normalised padding is nearly zero


def augment(
    image: Image.Image, labels: np.ndarray, recipe: Recipe, random: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Random crop, scale, flip and color jitter of an image and its labels.

    Args:
        image: RGB.
        labels: uint8 [H, W], as large as ``image``.
        recipe: the ranges of the augmentation.
        random: generator of all random numbers.

    Returns:
        pixels uint8 [*recipe.crop_size, 3] and labels uint8 [*recipe.crop_size]. Labels are 255
        outside the image.

    >>> pixels, labels = augment(image, labels, Recipe(), np.random.default_rng(0))
    """
    height, width = recipe.crop_size
    scale = random.uniform(*recipe.scale)
    scaled = [max(1, round(side * scale)) for side in image.size]
    size = min(width, scaled[0]), min(height, scaled[1])
    corner = [random.integers(whole - part + 1) for whole, part in zip(scaled, size)]
    # Only the box of the crop is resized, not the whole image.
    shrink = [side / whole for side, whole in zip(image.size, scaled)]
    box: Any = (
        *(start * factor for start, factor in zip(corner, shrink)),
        *((start + part) * factor for start, part, factor in zip(corner, size, shrink)),
    )
    image = image.resize(size, Image.Resampling.BILINEAR, box)
    target = Image.fromarray(labels).resize(size, Image.Resampling.NEAREST, box)
    for enhance in (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color):
        if recipe.color_jitter:
            image = enhance(image).enhance(
                random.uniform(1 - recipe.color_jitter, 1 + recipe.color_jitter)
            )
    canvas = Image.new("RGB", (width, height), _FILL)
    canvas.paste(image)
    padded = Image.new("L", (width, height), IGNORE)
    padded.paste(target)
    pixels, classes = np.asarray(canvas), np.asarray(padded)
    if random.random() < recipe.flip:
        pixels, classes = pixels[:, ::-1], classes[:, ::-1]
    return pixels.copy(), classes.copy()
