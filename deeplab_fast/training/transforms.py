"""Random changes to training images."""

from __future__ import annotations

from typing import Any

import numpy as np
from PIL import Image, ImageEnhance

from .data import IGNORE
from .recipe import Recipe

_FILL = (124, 116, 104)  # ImageNet's mean: padding is nearly zero once it is normalised


def augment(
    image: Image.Image, labels: np.ndarray, recipe: Recipe, random: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """A random crop of an image and its labels, as ``recipe`` has it.

    Args:
        image: RGB.
        labels: uint8 [H, W], as large as ``image``.
        random: where the chances come from.

    Returns:
        uint8 [*recipe.crop, 3] and [*recipe.crop], 255 in the labels where the image does not
        reach.

    >>> pixels, labels = augment(image, labels, Recipe(), np.random.default_rng(0))
    """
    height, width = recipe.crop
    scale = random.uniform(*recipe.scale)
    scaled = [max(1, round(side * scale)) for side in image.size]
    size = min(width, scaled[0]), min(height, scaled[1])
    corner = [random.integers(whole - part + 1) for whole, part in zip(scaled, size)]
    # The crop's own place in the image: nothing is resized only to be cut away.
    shrink = [side / whole for side, whole in zip(image.size, scaled)]
    box: Any = (
        *(start * factor for start, factor in zip(corner, shrink)),
        *((start + part) * factor for start, part, factor in zip(corner, size, shrink)),
    )
    image = image.resize(size, Image.Resampling.BILINEAR, box)
    target = Image.fromarray(labels).resize(size, Image.Resampling.NEAREST, box)
    for enhance in (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color):
        if recipe.jitter:
            image = enhance(image).enhance(random.uniform(1 - recipe.jitter, 1 + recipe.jitter))
    canvas = Image.new("RGB", (width, height), _FILL)
    canvas.paste(image)
    truth = Image.new("L", (width, height), IGNORE)
    truth.paste(target)
    pixels, classes = np.asarray(canvas), np.asarray(truth)
    if random.random() < recipe.flip:
        pixels, classes = pixels[:, ::-1], classes[:, ::-1]
    return pixels.copy(), classes.copy()
