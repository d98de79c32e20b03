"""Segmentation data sets on disk: any list of pairs, and three common folder layouts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image

from .._io.images import ImageError, decode, to_rgb
from .errors import TrainingError

IGNORE = 255  # label of pixels that count neither in training nor in evaluation

_IMAGES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")

VOC_CLASSES = (
    "background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair",
    "cow", "diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa",
    "train", "tvmonitor",
)  # fmt: skip

# labelId -> name of the evaluated classes, in the order of their trainId
# (cityscapesscripts/helpers/labels.py).
_CITYSCAPES = {
    7: "road", 8: "sidewalk", 11: "building", 12: "wall", 13: "fence", 17: "pole",
    19: "traffic light", 20: "traffic sign", 21: "vegetation", 22: "terrain", 23: "sky",
    24: "person", 25: "rider", 26: "car", 27: "truck", 28: "bus", 31: "train", 32: "motorcycle",
    33: "bicycle",
}  # fmt: skip


@dataclass(frozen=True)
class SegmentationData:
    """A list of images and their labels, read on access.

    Args:
        pairs: (image, labels) paths. An image is any file that Pillow reads; labels are an 8-bit
            grey or palette image of the same size, usually PNG.
        classes: names of the classes, class 0 first.
        label_ids: maps a value in a label file to a class, or to 255 for pixels to ignore. By
            default value i is class i. The value 255 is always ignored.

    >>> data = SegmentationData([("a.jpg", "a.png")], ("road", "other"), {0: 255, 1: 0, 2: 1})
    >>> image, labels = data.read(0)
    """

    pairs: Sequence[tuple[str | Path, str | Path]]
    classes: tuple[str, ...]
    label_ids: Mapping[int, int] | None = None
    _table: np.ndarray = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not 1 <= len(self.classes) <= IGNORE:
            raise TrainingError(f"classes: expected 1 to {IGNORE}, got {len(self.classes)}")
        if len(set(self.classes)) < len(self.classes) or "" in self.classes:
            raise TrainingError(f"classes: expected names that differ, got {self.classes}")
        ids = (
            dict(enumerate(range(len(self.classes)))) if self.label_ids is None else self.label_ids
        )
        table = np.full(256, -1, dtype=np.int16)
        for value, label in {**ids, IGNORE: IGNORE}.items():
            if not 0 <= value < 256 or label not in (*range(len(self.classes)), IGNORE):
                raise TrainingError(
                    f"label_ids: expected values of 0 to 255 for classes of 0 to "
                    f"{len(self.classes) - 1} or {IGNORE}, got {value}: {label}"
                )
            table[value] = label
        object.__setattr__(self, "_table", table)

    def __len__(self) -> int:
        return len(self.pairs)

    def read(self, index: int) -> tuple[Image.Image, np.ndarray]:
        """The RGB image of pair ``index`` and its labels, uint8 [H, W].

        EXIF orientation is not applied, because the labels belong to the pixels as stored.

        Raises:
            TrainingError: a file is missing or damaged, the sizes differ, or a label is not a
                class; the message names the file.
        """
        image_path, label_path = self.pairs[index]
        try:
            image = to_rgb(_load(image_path))
        except ImageError as error:
            raise TrainingError(f"{image_path}: {error}") from error
        values = self.label_values(index)
        if values.shape != (image.height, image.width):
            raise TrainingError(
                f"{label_path}: {values.shape[1]}x{values.shape[0]} pixels (expected "
                f"{image.width}x{image.height}, the size of {image_path})"
            )
        classes = self.classes_of(values)
        if classes.min() < 0:
            wrong = np.unique(values[classes < 0]).tolist()
            known = sorted({*np.flatnonzero(self._table >= 0).tolist()} - {IGNORE})
            raise TrainingError(
                f"{label_path}: label {', '.join(map(str, wrong[:5]))} is no class (expected "
                f"{_ranges(known)}, or {IGNORE} or a value of `ignore`)"
            )
        return image, classes.astype(np.uint8)

    def label_values(self, index: int) -> np.ndarray:
        """The values in the label file of pair ``index``, as they are stored: integers [H, W].

        Raises:
            TrainingError: the file is missing or damaged, or holds something else.
        """
        _, path = self.pairs[index]
        labels = _load(path)
        if labels.mode not in ("L", "P"):
            raise TrainingError(
                f"{path}: mode {labels.mode} (expected class numbers in an 8-bit grey or palette "
                "image)"
            )
        return np.asarray(labels)

    def classes_of(self, values: np.ndarray) -> np.ndarray:
        """The class of each value in a label file, 255 if it is ignored, -1 if it is no class."""
        return self._table[values]


def _load(path: str | Path) -> Image.Image:
    try:
        return decode(path)
    except ImageError as error:
        raise TrainingError(f"{path}: {error}") from error


def _ranges(values: Sequence[int]) -> str:
    """Sorted integers as text, with ranges.

    >>> _ranges([0, 1, 2, 7])
    '0-2, 7'
    """
    runs: list[list[int]] = []
    for value in values:
        if runs and value == runs[-1][-1] + 1:
            runs[-1].append(value)
        else:
            runs.append([value])
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)


def folder(
    root: str | Path,
    split: str,
    classes: Sequence[str] | None = None,
    ignore: Sequence[int] = (),
) -> SegmentationData:
    """Data set of ``images/SPLIT/NAME.jpg`` and ``labels/SPLIT/NAME.png``, with any subfolders.

    Args:
        root: folder that has ``images`` and ``labels``.
        split: name of a subfolder, such as "train" or "val".
        classes: names of the classes; by default the lines of ``classes.txt`` in ``root``.
        ignore: values in label files to ignore, besides 255.

    Raises:
        TrainingError: a folder or file is missing; the message names it.

    >>> data = folder("camvid", "train", classes=[f"class {i}" for i in range(11)], ignore=[11])
    """
    root = Path(root)
    images = _folder(root / "images" / split, split)
    names = _lines(root / "classes.txt", ", or `classes`") if classes is None else list(classes)
    pairs = []
    for image in sorted(images.rglob("*")):
        if image.suffix.lower() in _IMAGES and not image.name.startswith("."):
            label = (root / "labels" / split / image.relative_to(images)).with_suffix(".png")
            pairs.append((image, label))
    ids = {label: label for label in range(len(names))} | {value: IGNORE for value in ignore}
    return _checked(SegmentationData(pairs, tuple(names), ids), images)


def voc(root: str | Path, split: str) -> SegmentationData:
    """PASCAL VOC 2012: ``root`` has JPEGImages, SegmentationClass and ImageSets/Segmentation.

    Args:
        root: usually VOCdevkit/VOC2012.
        split: name of the list ImageSets/Segmentation/SPLIT.txt. A line is the name of an image, or
            the paths of image and labels below ``root``, as in the "trainaug" lists of the 10582
            images with SBD's labels. If a line is a name, its labels are in SegmentationClassAug if
            that folder exists and the split is not one of VOC's own, otherwise in
            SegmentationClass.

    Raises:
        TrainingError: a folder or file is missing; the message names it.

    >>> data = voc("VOCdevkit/VOC2012", "trainaug")
    """
    root = Path(root)
    list_path = root / "ImageSets" / "Segmentation" / f"{split}.txt"
    labels = root / "SegmentationClass"
    if split not in ("train", "val", "trainval", "test") and (root / f"{labels.name}Aug").is_dir():
        labels = root / f"{labels.name}Aug"
    pairs = []
    for line in _lines(list_path):
        match line.split():
            case [name]:
                pairs.append((root / "JPEGImages" / f"{name}.jpg", labels / f"{name}.png"))
            case [image, label]:
                pairs.append((root / image.lstrip("/"), root / label.lstrip("/")))
            case _:
                raise TrainingError(
                    f"{list_path}: {line!r} (expected an image's name, or two paths)"
                )
    return _checked(SegmentationData(pairs, VOC_CLASSES), list_path)


def cityscapes(root: str | Path, split: str) -> SegmentationData:
    """Cityscapes: ``root`` has leftImg8bit/SPLIT/CITY and gtFine/SPLIT/CITY.

    Labels are the ``*_gtFine_labelIds.png`` files; all but 19 of their classes are ignored.

    Raises:
        TrainingError: a folder or file is missing; the message names it.

    >>> data = cityscapes("cityscapes", "val")
    """
    root = Path(root)
    images = _folder(root / "leftImg8bit" / split, split)
    suffix = "_leftImg8bit.png"
    pairs = []
    for image in sorted(images.glob(f"*/*{suffix}")):
        name = image.name.removesuffix(suffix) + "_gtFine_labelIds.png"
        pairs.append((image, root / "gtFine" / split / image.parent.name / name))
    ids = dict.fromkeys(range(34), IGNORE) | {id: i for i, id in enumerate(_CITYSCAPES)}
    return _checked(SegmentationData(pairs, tuple(_CITYSCAPES.values()), ids), images)


def _folder(path: Path, split: str) -> Path:
    if not path.is_dir():
        raise TrainingError(
            f"{path}: no such folder (expected images of the split {split!r}, or another layout)"
        )
    return path


def _lines(path: Path, instead: str = "") -> list[str]:
    try:
        return [line.strip() for line in path.read_text().splitlines() if line.strip()]
    except (OSError, UnicodeError) as error:
        why = getattr(error, "strerror", None) or error
        expected = f"expected a text file, one name a line{instead}"
        raise TrainingError(f"{path}: {why} ({expected})") from error


def _checked(data: SegmentationData, where: Path) -> SegmentationData:
    """Return ``data``, after checking that it is not empty and that all its files exist."""
    if not data.pairs:
        raise TrainingError(f"{where}: no images (expected at least one)")
    for pair in data.pairs:
        for path in pair:
            if not Path(path).is_file():
                raise TrainingError(f"{path}: no such file (expected labels for each image)")
    return data
