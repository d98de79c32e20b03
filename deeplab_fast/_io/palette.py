"""Colours of the classes, and label images that have them as their palette."""

from __future__ import annotations

import numpy as np
from PIL import Image

# Colour of class 0 where it is no background: black would darken a road or a sky. No other light
# colour is as far from the first 40 colours of PASCAL VOC.
_FIRST_CLASS = (32, 240, 240)


def voc_palette() -> np.ndarray:
    """The PASCAL VOC colour map: uint8 [256, 3].

    Bit ``3 * i + channel`` of the class becomes bit ``7 - i`` of that channel, as in the VOC
    development kit's ``VOClabelcolormap.m``. Class 0, the background, is black.

    >>> voc_palette()[15]
    array([192, 128, 128], dtype=uint8)
    """
    classes = np.arange(256)
    colours = np.zeros((256, 3), dtype=np.uint8)
    for bit in range(8):
        for channel in range(3):
            colours[:, channel] |= ((classes >> (3 * bit + channel) & 1) << (7 - bit)).astype(
                np.uint8
            )
    return colours


def palette_of(has_background: bool) -> np.ndarray:
    """The PASCAL VOC colour map, with light blue for a class 0 that is not the background."""
    palette = voc_palette()
    if not has_background:
        palette[0] = _FIRST_CLASS
    return palette


def label_image(labels: np.ndarray, palette: np.ndarray) -> Image.Image:
    """``labels`` [H, W] as an image: uint8 with ``palette`` [256, 3], other dtypes as 16-bit grey.

    >>> label_image(labels, voc_palette()).save("labels.png")
    """
    if labels.dtype != np.uint8:
        return Image.fromarray(labels.astype(np.uint16))
    image = Image.fromarray(labels)
    image.putpalette(palette.tobytes())
    return image
