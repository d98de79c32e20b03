"""Conversion of an image into the input of a network."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from .._io.images import to_rgb
from ..ops._arguments import wrong_type

# Images with a larger aspect ratio are scaled down further, to bound the memory for panoramas.
_MAX_ASPECT = 4


@dataclass(frozen=True)
class Preprocessing:
    """Resize, crop and normalise an image; by default with ImageNet's statistics and at any size.

    To segment a whole photo with a network whose preprocessing crops:
    ``dataclasses.replace(model.preprocessing, crop=None)``.

    Attributes:
        mean, std: statistics of the channels, of values in [0, 1]; std is positive. Three channels
            are RGB, one is grey. With other numbers the network takes tensors only.
        resize: pixels of the shorter side after resizing, or None. Bilinear with antialiasing, the
            longer side rounded down, as in torchvision's ``resize``.
        crop: (height, width) of the centre crop of the resized image, or None. A smaller image is
            padded with black.

    Raises:
        ValueError: an attribute has an invalid value; the message names it.

    >>> images = Preprocessing(resize=520)(Image.open("photo.jpg"))[None]
    """

    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    resize: int | None = None
    crop: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        for name, values in (("mean", self.mean), ("std", self.std)):
            if not values or not all(math.isfinite(value) for value in values):
                raise ValueError(f"{name}: expected finite numbers, got {values!r}")
        if len(self.std) != len(self.mean):
            raise ValueError(
                f"std: expected as many numbers as mean, {len(self.mean)}, got {self.std!r}"
            )
        if any(value <= 0 for value in self.std):
            raise ValueError(f"std: expected positive numbers, got {self.std!r}")
        if self.resize is not None and not _is_positive_int(self.resize):
            raise ValueError(f"resize: expected a positive int or None, got {self.resize!r}")
        if self.crop is not None and (
            len(self.crop) != 2 or not all(_is_positive_int(side) for side in self.crop)
        ):
            raise ValueError(f"crop: expected two positive ints or None, got {self.crop!r}")

    def __call__(self, image: Image.Image) -> Tensor:
        """``image`` as float32 [3, H, W], or [1, H, W] with statistics of one channel.

        Other modes are converted to RGB as by :func:`to_rgb`, and to grey as Pillow does.

        Raises:
            TypeError: ``image`` is no PIL image.
            ValueError: the image has 32 bits per channel, or there are statistics of another number
                of channels.
        """
        if not isinstance(image, Image.Image):
            expected = "a PIL image (model.segment takes paths and arrays, too)"
            raise wrong_type("image", expected, image)
        self.check_takes_photos()
        image = to_rgb(image)
        if len(self.mean) == 1:
            image = image.convert("L")
        if self.resize is not None:
            short = min(image.size)
            width, height = (side * self.resize // short for side in image.size)
            image = image.resize((width, height), Image.Resampling.BILINEAR)
        if self.crop is not None:
            height, width = self.crop
            left, top = (image.width - width) // 2, (image.height - height) // 2
            image = image.crop((left, top, left + width, top + height))
        pixels = np.asarray(image, dtype=np.float32) / 255
        pixels = np.atleast_3d(pixels)
        pixels = (pixels - np.array(self.mean, np.float32)) / np.array(self.std, np.float32)
        return torch.from_numpy(pixels.transpose(2, 0, 1).copy())

    def check_takes_photos(self) -> None:
        """Raise ValueError unless there are one or three channels, as in an image file."""
        if len(self.mean) not in (1, 3):
            raise ValueError(
                f"image: expected a network of 1 or 3 channels, got one of {len(self.mean)}, which "
                "takes tensors only"
            )

    def for_channels(self, channels: int) -> Preprocessing:
        """Preprocessing of another number of channels, made from that of RGB images.

        One channel gets the averages of the statistics; n channels get them in turn.

        Raises:
            ValueError: this preprocessing is neither for RGB images nor for ``channels``.
        """
        if len(self.mean) == channels:
            return self
        if len(self.mean) != 3:
            raise ValueError(f"mean: expected {channels} numbers, got {self.mean!r}")
        mean, std = (
            (sum(values) / 3,) if channels == 1 else (values * channels)[:channels]
            for values in (self.mean, self.std)
        )
        return replace(self, mean=mean, std=std)


def network_size(size: tuple[int, int], resize: int | None, align_corners: bool) -> tuple[int, int]:
    """Size (width, height) of the network's input for a whole image of ``size``.

    The shorter side becomes ``resize``, as in training, or less if the longer side would exceed 4
    times ``resize``. With ``align_corners`` the sides are 16 k + 1: then the corners of the logits
    lie on the corners of the image, and TensorFlow's padding is symmetric.
    """
    width, height = size
    if resize is not None:
        short = max(min(size), -(-max(size) // _MAX_ASPECT))
        width, height = (max(1, side * resize // short) for side in size)
    if align_corners:
        width, height = ((side + 7) // 16 * 16 + 1 for side in (width, height))
    return width, height


def network_input(image: Image.Image, preprocessing: Preprocessing, align_corners: bool) -> Tensor:
    """The network's input for a whole RGB image: float32 [1, C, H, W], channels_last."""
    size = network_size(image.size, preprocessing.resize, align_corners)
    if size != image.size:
        image = image.resize(size, Image.Resampling.BILINEAR)
    pixels = replace(preprocessing, resize=None, crop=None)(image)
    return pixels[None].contiguous(memory_format=torch.channels_last)


def _is_positive_int(value: Any) -> bool:
    return isinstance(value, int) and value > 0
