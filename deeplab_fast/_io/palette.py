"""Label images and overlays in the colours of PASCAL VOC."""

from __future__ import annotations

import numpy as np
from PIL import Image


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


def label_image(labels: np.ndarray) -> Image.Image:
    """``labels`` [H, W] as an image: uint8 with the VOC palette, other dtypes as 16-bit grey."""
    if labels.dtype != np.uint8:
        return Image.fromarray(labels.astype(np.uint16))
    image = Image.fromarray(labels)
    image.putpalette(voc_palette().tobytes())
    return image


def overlay(photo: Image.Image, labels: np.ndarray) -> Image.Image:
    """``photo`` (RGB) with all classes but 0 in half-transparent colours, outlined in white.

    Class 0, the background of VOC, is left as in the photo. Classes beyond 255 repeat the colours
    from class 1 on.
    """
    classes = labels if labels.dtype == np.uint8 else np.where(labels, (labels - 1) % 255 + 1, 0)
    colours = label_image(classes.astype(np.uint8)).convert("RGB")
    blended = Image.blend(photo, colours, alpha=0.6)
    painted = Image.composite(blended, photo, Image.fromarray(labels != 0))
    outline = np.zeros(labels.shape, dtype=bool)
    outline[1:] |= labels[1:] != labels[:-1]
    outline[:, 1:] |= labels[:, 1:] != labels[:, :-1]
    painted.paste("white", mask=Image.fromarray(outline))
    return painted
