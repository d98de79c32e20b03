"""Segmentation data sets: pairs of an image and its labels, read on access."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image

from .._io.images import (
    Header,
    ImageError,
    decode,
    forget_orientation,
    header_of,
    read_header,
    to_rgb,
    turn,
)
from .coco_labels import CocoLabels
from .errors import TrainingError
from .label_files import read_values
from .label_ids import IGNORE, Color, class_table, ranges, unpack_color

Exif = Literal["auto", "upright", "stored"]


@dataclass(frozen=True)
class SegmentationData:
    """A list of images and their labels, read on access.

    A photo whose EXIF orientation says that it is stored turned is turned upright if its labels
    are as large as the upright photo, and read as it is stored if they are only as large as that.
    The sizes do not tell if the photo is square, mirrored or turned by 180 degrees. It is then
    turned upright, as annotation tools show it: labelme since 2019 (wkentaro/labelme#305), CVAT
    since 2022 (cvat-ai/cvat#4529), Label Studio and every browser (CSS Images 3,
    ``image-orientation: from-image``); Roboflow stores it upright. :attr:`exif` can say otherwise.

    Args:
        pairs: (image, labels). An image is the path of any file that Pillow reads. Labels are the
            path of an image of the same size, in any lossless format; usually PNG. Its values are
            numbers (8, 16 or 32-bit grey, 1-bit, a palette's indices, or RGB with equal channels)
            or colours. An alpha channel is ignored. :func:`coco` makes labels of polygons.
        classes: names of the classes, class 0 first.
        label_ids: maps a number in a label file to a class, or to 255 for pixels to ignore. By
            default number i is class i. The number 255 is ignored unless it has a class. With
            keys (red, green, blue) label files are read as colours, also those of a palette.
        exif: "upright" turns all photos as their EXIF orientation says, "stored" none, and "auto"
            chooses by the size of the labels.

    >>> data = SegmentationData([("a.jpg", "a.png")], ("road", "other"), {0: 255, 1: 0, 2: 1})
    >>> image, labels = data.read(0)
    >>> SegmentationData(pairs, ("sky", "road"), {(128, 128, 128): 0, (128, 64, 128): 1})
    """

    pairs: Sequence[tuple[str | Path, str | Path | CocoLabels]]
    classes: tuple[str, ...]
    label_ids: Mapping[int, int] | Mapping[Color, int] | None = None
    exif: Exif = "auto"
    by_color: bool = field(init=False, repr=False, compare=False)
    _table: np.ndarray = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not 1 <= len(self.classes) <= IGNORE:
            raise TrainingError(f"classes: expected 1 to {IGNORE}, got {len(self.classes)}")
        if len(set(self.classes)) < len(self.classes) or "" in self.classes:
            raise TrainingError(f"classes: expected names that differ, got {self.classes}")
        if self.exif not in ("auto", "upright", "stored"):
            raise TrainingError(f"exif: expected auto, upright or stored, got {self.exif!r}")
        ids = self.label_ids
        by_color = bool(ids) and all(isinstance(key, tuple) for key in ids or ())
        object.__setattr__(self, "by_color", by_color)
        object.__setattr__(self, "_table", class_table(ids, len(self.classes), by_color))

    def __len__(self) -> int:
        return len(self.pairs)

    def read(self, index: int) -> tuple[Image.Image, np.ndarray]:
        """The RGB image of pair ``index`` and its labels, uint8 [H, W].

        The image has no EXIF orientation any more.

        Raises:
            TrainingError: a file is missing or damaged, the sizes differ, or a label is not a
                class; the message names the file.
        """
        image_path, label_path = self.pairs[index]
        try:
            image = decode(image_path)
            header = header_of(image)
            image = to_rgb(image)
        except ImageError as error:
            raise TrainingError(f"{image_path}: {error}") from error
        values = self.label_values(index)
        size = values.shape[1], values.shape[0]
        if header.is_turned:
            if self._turns(header, size):
                image = turn(image, header.orientation)
            forget_orientation(image)
        if image.size != size:
            raise TrainingError(
                f"{label_path}: {_pixels(size)} pixels (expected {self._expected(header)}, the "
                f"size of {image_path})"
            )
        classes = self.classes_of(values)
        if classes.min() < 0:
            wrong = np.unique(values[classes < 0])[:5]
            raise TrainingError(
                f"{label_path}: label {', '.join(map(self.value_name, wrong))} is no class "
                f"(expected {self._known_values()})"
            )
        return image, classes.astype(np.uint8)

    def label_values(self, index: int) -> np.ndarray:
        """The values in the label file of pair ``index``: integers [H, W].

        They are numbers as they are stored, or packed colours; :meth:`value_name` gives a text.

        Raises:
            TrainingError: the file is missing or damaged, or holds something else.
        """
        labels = self.pairs[index][1]
        if isinstance(labels, CocoLabels):
            return labels.read()
        return read_values(labels, self.by_color)

    def classes_of(self, values: np.ndarray) -> np.ndarray:
        """The class of each of ``label_values``, 255 if it is ignored, -1 if it is no class."""
        if values.dtype == np.uint8:  # the table has all of them
            return self._table[values]
        known = (values >= 0) & (values < len(self._table))
        classes = self._table[values * known]
        classes[~known] = -1
        return classes

    def value_name(self, value: int) -> str:
        """Text for one of ``label_values``, such as "7" or, for a colour, "(128, 0, 64)"."""
        return str(unpack_color(int(value)) if self.by_color else int(value))

    def image_size(self, index: int) -> tuple[int, int]:
        """Size (width, height) of the image of pair ``index`` as :meth:`read` returns it.

        Only the headers of the files are read.

        Raises:
            TrainingError: a file is missing or is no image.
        """
        header = _header(self.pairs[index][0])
        turns = header.is_turned and self._turns(header, self.label_size(index))
        return header.upright_size if turns else header.size

    def label_size(self, index: int) -> tuple[int, int]:
        """Size (width, height) of the labels of pair ``index``; only the header is read.

        Raises:
            TrainingError: the file is missing or is no image.
        """
        labels = self.pairs[index][1]
        return labels.size if isinstance(labels, CocoLabels) else _header(labels).size

    def turn_is_unclear(self, index: int) -> bool:
        """True if the size of the labels does not tell whether they belong to the upright image.

        Only the header of the image is read.

        Raises:
            TrainingError: the file is missing or is no image.
        """
        if self.exif != "auto":
            return False
        header = _header(self.pairs[index][0])
        return header.is_turned and header.upright_size == header.size

    def _turns(self, image: Header, label_size: tuple[int, int]) -> bool:
        """True if the image is read upright."""
        if self.exif == "auto":
            return label_size == image.upright_size or label_size != image.size
        return self.exif == "upright"

    def _expected(self, image: Header) -> str:
        """The sizes that labels of an image may have."""
        sizes = {"stored": image.size, "upright": image.upright_size}
        if self.exif != "auto":
            return _pixels(sizes[self.exif])
        if image.size == image.upright_size:
            return _pixels(image.size)
        return f"{_pixels(image.upright_size)} upright or {_pixels(image.size)} as stored"

    def _known_values(self) -> str:
        known = np.flatnonzero(self._table >= 0)
        if self.by_color:
            shown = ", ".join(map(self.value_name, known[:5]))
            return f"{shown}{', ...' if len(known) > 5 else ''}, the colours of `colors`"
        numbers = ranges(sorted({*known.tolist()} - {IGNORE}))
        return f"{numbers}, or {IGNORE} or a value of `ignore`"


def _header(path: str | Path) -> Header:
    try:
        return read_header(path)
    except ImageError as error:
        raise TrainingError(f"{path}: {error}") from error


def _pixels(size: tuple[int, int]) -> str:
    return f"{size[0]}x{size[1]}"
