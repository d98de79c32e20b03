"""Label images: class numbers or colours of any image mode, as one integer per pixel."""

from __future__ import annotations

import os

import numpy as np
from PIL import Image

from .._io.images import ImageError, decode
from .errors import TrainingError
from .label_ids import unpack_color

_NUM_COLORS_SHOWN = 8


def read_values(path: str | os.PathLike[str], by_color: bool) -> np.ndarray:
    """The value of each pixel of a label image, integers [H, W].

    Args:
        path: an image in any lossless format. An alpha channel is ignored, as by OpenCV: the value
            below a transparent pixel counts.
        by_color: the values are colours, packed as by :func:`pack_color`; those of a palette, if
            the image has one. Otherwise they are numbers: 8, 16 or 32-bit grey, 1-bit (0 and 1),
            indices into a palette, or RGB with three equal channels.

    Raises:
        TrainingError: the file is missing, damaged or a JPEG, or has colours where numbers are
            expected; the message names it.
    """
    try:
        image = decode(path)
    except ImageError as error:
        raise TrainingError(f"{path}: {error}") from error
    if image.format in ("JPEG", "MPO"):
        raise TrainingError(
            f"{path}: labels in a JPEG file, whose compression changes them (expected PNG, or "
            "another lossless format)"
        )
    if image.mode not in _MODES:
        kind = "colours" if by_color else "class numbers"
        raise TrainingError(
            f"{path}: an image of mode {image.mode} (expected {kind} in a grey, palette or RGB "
            "image)"
        )
    if by_color:
        return _colors(path, image)
    if image.mode in ("RGB", "RGBA"):
        return _equal_channels(path, image)
    values = np.asarray(image)
    if values.ndim == 3:  # LA, PA
        values = values[..., 0]
    if image.mode.startswith("I"):
        return values.astype(np.int32)  # in the byte order of this machine
    return values.astype(np.uint8) if image.mode == "1" else values


_MODES = ("1", "L", "P", "LA", "PA", "I", "I;16", "I;16B", "I;16L", "I;16N", "RGB", "RGBA")


def _colors(path: str | os.PathLike[str], image: Image.Image) -> np.ndarray:
    if image.mode.startswith("I"):
        raise TrainingError(
            f"{path}: {image.mode} has no colours (expected an RGB or palette image)"
        )
    rgb = np.asarray(image.convert("RGB")).astype(np.int32)
    return rgb[..., 0] << 16 | rgb[..., 1] << 8 | rgb[..., 2]


def _equal_channels(path: str | os.PathLike[str], image: Image.Image) -> np.ndarray:
    """The grey values of an RGB image."""
    rgb = np.asarray(image)
    red, green, blue = (rgb[..., channel] for channel in range(3))
    if np.array_equal(red, green) and np.array_equal(red, blue):
        return red
    colors, counts = np.unique(_colors(path, image), return_counts=True)
    order = np.argsort(-counts, kind="stable")[:_NUM_COLORS_SHOWN]
    shares = [
        f"{unpack_color(int(colors[i]))} {100 * counts[i] / counts.sum():.1f} %" for i in order
    ]
    more = f" and {len(colors) - len(order)} more" if len(colors) > len(order) else ""
    raise TrainingError(
        f"{path}: an image in colours, {', '.join(shares)}{more} (expected class numbers in a grey "
        "or palette image, or `colors`: a file with the lines name,red,green,blue)"
    )
