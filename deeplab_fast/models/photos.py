"""Photos as arguments: PIL images, paths and arrays."""

from __future__ import annotations

import os
from typing import TypeAlias

import numpy as np
from PIL import Image

from .._io.images import ImageError, photo_of, read_photo
from ..ops._arguments import wrong_type

Photo: TypeAlias = "Image.Image | str | os.PathLike[str] | np.ndarray"


def photo_of_argument(image: Photo) -> Image.Image:
    """``image`` in RGB and upright.

    Raises:
        TypeError: ``image`` is no photo.
        ValueError: the image cannot be read, or the array has another shape.
    """
    if isinstance(image, Image.Image):
        try:
            return photo_of(image)
        except ImageError as error:
            raise ImageError(f"image: {error}") from None
    if isinstance(image, (str, os.PathLike)):
        try:
            return read_photo(image)
        except ImageError as error:
            raise ImageError(f"{os.fspath(image)}: {error}") from None
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8:
            raise TypeError(f"image: expected an array of uint8, from 0 to 255, got {image.dtype}")
        if image.ndim not in (2, 3) or image.shape[2:] not in ((), (3,)) or 0 in image.shape:
            raise ValueError(f"image: expected an array [H, W, 3] or [H, W], got {image.shape}")
        return Image.fromarray(image).convert("RGB")
    expected = "a PIL image, a path or a uint8 array [H, W, 3]"
    raise wrong_type("image", expected, image)
