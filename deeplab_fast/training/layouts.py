"""Common folder layouts of segmentation data sets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from .data import IGNORE, SegmentationData
from .errors import TrainingError

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


def folder(
    root: str | Path,
    split: str,
    classes: Sequence[str] | None = None,
    ignore: Sequence[int] = (),
    label_ids: Mapping[int, int] | None = None,
) -> SegmentationData:
    """Data set of ``images/SPLIT/NAME.jpg`` and ``labels/SPLIT/NAME.png``, with any subfolders.

    Args:
        root: folder that has ``images`` and ``labels``.
        split: name of a subfolder, such as "train" or "val".
        classes: names of the classes; by default the lines of ``classes.txt`` in ``root``.
        ignore: values in label files to ignore, besides 255.
        label_ids: class of each value in label files; see :class:`SegmentationData`.

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
    ids = dict(enumerate(range(len(names)))) if label_ids is None else dict(label_ids)
    ids |= dict.fromkeys(ignore, IGNORE)
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
    paths = [str(path) for pair in data.pairs for path in pair]
    if missing := [path for path in paths if not Path(path).is_file()]:
        others = ", ".join(missing[1:3]) + (", ..." if missing[3:] else "")
        more = f", and {len(missing) - 1} more: {others}" if others else ""
        raise TrainingError(f"{missing[0]}: no such file{more} (expected labels for each image)")
    return data
