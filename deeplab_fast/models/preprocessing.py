"""How an image becomes the input that a network was trained on."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from .._io.images import to_rgb

# A panorama is seen at a smaller scale, or it would need memory without bound.
_MAX_ASPECT = 4


@dataclass(frozen=True)
class Preprocessing:
    """Resize, crop and normalise an image; the defaults are ImageNet's statistics at any size.

    To segment a whole photo with a network that came with a crop:
    ``dataclasses.replace(model.preprocessing, crop=None)``.

    Attributes:
        mean, std: RGB, of values in [0, 1]; std is positive.
        resize: pixels of the shorter side, or None. Bilinear with antialiasing, the longer side
            rounded down, as torchvision's ``resize``.
        crop: (height, width) cut from the centre after that, or None; beyond the image it is black.

    Raises:
        ValueError: an attribute is not what is said above, naming it.

    >>> images = Preprocessing(resize=520)(Image.open("photo.jpg"))[None]
    """

    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    resize: int | None = None
    crop: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        for name, values in (("mean", self.mean), ("std", self.std)):
            if len(values) != 3 or not all(math.isfinite(value) for value in values):
                raise ValueError(f"{name}: expected three finite numbers, got {values!r}")
        if any(value <= 0 for value in self.std):
            raise ValueError(f"std: expected positive numbers, got {self.std!r}")
        if self.resize is not None and not _is_positive_int(self.resize):
            raise ValueError(f"resize: expected a positive int or None, got {self.resize!r}")
        if self.crop is not None and (
            len(self.crop) != 2 or not all(_is_positive_int(side) for side in self.crop)
        ):
            raise ValueError(f"crop: expected two positive ints or None, got {self.crop!r}")

    def __call__(self, image: Image.Image) -> Tensor:
        """``image`` as float32 [3, H, W]; other modes than RGB are converted.

        16 bits are scaled, transparent pixels are white.

        Raises:
            ValueError: the image has 32 bits per channel.
        """
        image = to_rgb(image)
        if self.resize is not None:
            short = min(image.size)
            width, height = (side * self.resize // short for side in image.size)
            image = image.resize((width, height), Image.Resampling.BILINEAR)
        if self.crop is not None:
            height, width = self.crop
            left, top = (image.width - width) // 2, (image.height - height) // 2
            image = image.crop((left, top, left + width, top + height))
        pixels = np.asarray(image, dtype=np.float32) / 255
        pixels = (pixels - np.array(self.mean, np.float32)) / np.array(self.std, np.float32)
        return torch.from_numpy(pixels.transpose(2, 0, 1).copy())


def network_size(size: tuple[int, int], resize: int | None, align_corners: bool) -> tuple[int, int]:
    """The size at which the network sees a whole image of ``size``, (width, height).

    The shorter side becomes ``resize`` as in training, or less if the longer one would be over 4
    times that. With ``align_corners`` sides are 16 k + 1: only there the corners of the logits are
    those of the image, and TensorFlow's padding is symmetric.
    """
    width, height = size
    if resize is not None:
        seen = max(min(size), -(-max(size) // _MAX_ASPECT))
        width, height = (max(1, side * resize // seen) for side in size)
    if align_corners:
        width, height = ((side + 7) // 16 * 16 + 1 for side in (width, height))
    return width, height


def _is_positive_int(value: Any) -> bool:
    return isinstance(value, int) and value > 0
