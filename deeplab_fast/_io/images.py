"""Conversion of images to RGB."""

from __future__ import annotations

import numpy as np
from PIL import Image


def to_rgb(image: Image.Image) -> Image.Image:
    """``image`` in 8-bit RGB: 16 bits are scaled, and transparent pixels become white.

    Raises:
        ValueError: the image has 32 bits per channel, whose range is unknown.

    >>> to_rgb(Image.open("photo.png")).mode
    'RGB'
    """
    if image.mode.startswith("I;16"):
        return Image.fromarray((np.asarray(image) / 257).round().astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        raise ValueError(f"32 bits per channel, mode {image.mode} (expected 8 or 16)")
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer)
    return image.convert("RGB")
