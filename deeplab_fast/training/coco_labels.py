"""Labels of one image of a COCO file, drawn from polygons and run lengths."""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .errors import TrainingError

_FARTHEST = 2**31  # coordinate, in pixels, that no corner of a polygon has


@dataclass(frozen=True)
class CocoLabels:
    """Labels of one image, drawn from its annotations when they are read.

    The format is that of https://cocodataset.org/#format-data. Pixels of no object are class 0. A
    pixel of several objects belongs to the smallest of them, so that small objects stay visible on
    large ones. A crowd (``iscrowd``) has the class of its category, as in COCO-Stuff and
    torchvision's reference: CVAT marks every mask that was drawn with a brush as a crowd.

    Args:
        path: the COCO file, for error messages.
        image: name of the image in it, for error messages.
        size: (width, height) of the image.
        objects: pickled list of (class, segmentation). As bytes they take less memory than Python's
            lists, and worker processes share them.
    """

    path: Path
    image: str
    size: tuple[int, int]
    objects: bytes

    def __str__(self) -> str:
        return f"{self.path}: {self.image}"

    def read(self) -> np.ndarray:
        """Classes, uint8 [H, W].

        Raises:
            TrainingError: a segmentation is malformed.
        """
        drawn = []
        for label, segmentation in pickle.loads(self.objects):
            try:
                mask = _mask(segmentation, self.size)
            except (ValueError, TypeError, KeyError, IndexError) as error:
                raise TrainingError(
                    f"{self}: a malformed segmentation (expected polygons or run lengths)"
                ) from error
            drawn.append((np.count_nonzero(mask), label, mask))
        labels = np.zeros(self.size[::-1], np.uint8)
        for _, label, mask in sorted(drawn, key=lambda item: -item[0]):
            labels[mask] = label
        return labels


def _mask(segmentation: Any, size: tuple[int, int]) -> np.ndarray:
    """Pixels of an object, bool [H, W]."""
    width, height = size
    if isinstance(segmentation, dict):
        if list(segmentation["size"]) != [height, width]:
            raise ValueError("run lengths of another size")
        counts = segmentation["counts"]
        return from_run_lengths(decode_counts(counts) if isinstance(counts, str) else counts, size)
    mask = np.zeros((height, width), bool)
    for polygon in segmentation:
        points = np.asarray(polygon, np.float64).reshape(-1, 2)
        if not (np.abs(points) < _FARTHEST).all():
            raise ValueError("a corner is not a number, or far away")
        mask |= fill_polygon(points, size)
    return mask


def fill_polygon(points: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Pixels whose centre lies in a polygon, by the even-odd rule: bool [H, W].

    Every edge flips the pixels to the right of it in the rows whose centre it crosses.

    Args:
        points: corners (x, y), float64 [N, 2]. Pixel (0, 0) covers [0, 1] x [0, 1].
        size: (width, height) of the result.

    >>> fill_polygon(np.array([[0.0, 0], [2, 0], [2, 1], [0, 1]]), (3, 2)).astype(int)
    array([[1, 1, 0],
           [0, 0, 0]])
    """
    width, height = size
    filled = np.zeros((height, width), bool)
    # The centre of pixel i is at i + 0.5, so that pixel ceil(x - 0.5) is the first right of x.
    left, top = np.clip(np.ceil(points.min(0) - 0.5), 0, size).astype(np.int64)
    right, bottom = np.clip(np.ceil(points.max(0) - 0.5), 0, size).astype(np.int64)
    starts, ends = points, np.roll(points, -1, axis=0)
    is_upward = starts[:, 1] > ends[:, 1]
    starts, ends = np.where(is_upward[:, None], (ends, starts), (starts, ends))
    first, last = (
        np.clip(np.ceil(y - 0.5), top, bottom).astype(np.int64) for y in (starts[:, 1], ends[:, 1])
    )
    num_rows = last - first
    edge = np.repeat(np.arange(len(points)), num_rows)
    rows = np.arange(len(edge)) - np.repeat(np.cumsum(num_rows) - num_rows - first, num_rows)
    (x, y), (run, rise) = starts[edge].T, (ends - starts)[edge].T
    columns = np.ceil(x + (rows + 0.5 - y) * (run / rise) - 0.5)
    flips = np.zeros((bottom - top, right - left + 1), np.uint8)  # the last column is outside
    np.add.at(flips, (rows - top, np.clip(columns, left, right).astype(np.int64) - left), 1)
    filled[top:bottom, left:right] = np.cumsum(flips[:, :-1], axis=1, dtype=np.uint8) & 1
    return filled


def from_run_lengths(counts: Sequence[int], size: tuple[int, int]) -> np.ndarray:
    """Pixels of run lengths, bool [H, W]: in turn of pixels outside and inside, column by column.

    >>> from_run_lengths([1, 2, 1], (2, 2)).astype(int)
    array([[0, 1],
           [1, 0]])
    """
    width, height = size
    if sum(counts) != width * height or min(counts) < 0:
        raise ValueError("run lengths of another number of pixels")
    inside = np.arange(len(counts)) % 2 == 1
    return np.repeat(inside, counts).reshape(width, height).T


def decode_counts(text: str) -> list[int]:
    """Run lengths of their compressed form.

    A number is a sequence of characters with 6 bits each, the lowest 5-bit group first: bit 5 says
    that another character follows, and bit 4 of the last one is the sign. From the fourth number
    on, it is the difference to the number two before (rleToString in cocoapi/common/maskApi.c).

    >>> decode_counts("52203")
    [5, 2, 2, 2, 5]
    """
    counts: list[int] = []
    number = shift = 0
    for character in text.encode():
        code = character - 48
        number |= (code & 31) << shift
        shift += 5
        if not code & 32:
            if code & 16:
                number -= 1 << shift
            counts.append(number + (counts[-2] if len(counts) > 2 else 0))
            number = shift = 0
    return counts
