"""Common folder layouts of segmentation data sets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from .colors import classes_of_colors
from .data import Exif, SegmentationData
from .errors import TrainingError
from .label_ids import IGNORE, Color
from .patterns import Pattern, check_files, check_labels_exist, find_pairs, image_of
from .text_files import read_lines

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
    ignore: Sequence[int | str] = (),
    label_ids: Mapping[int, int] | None = None,
    *,
    images: str = "images/{split}/{name}",
    labels: str = "labels/{split}/{name}.png",
    colors: str | Path | Mapping[Color, str] | None = None,
    exif: Exif = "auto",
) -> SegmentationData:
    """Data set of ``images/SPLIT/NAME.jpg`` and ``labels/SPLIT/NAME.png``, or other patterns.

    NAME may contain subfolders. The image may be in any common format.

    Args:
        root: folder that has ``images`` and ``labels``.
        split: name of a subfolder, such as "train" or "val".
        classes: names of the classes; by default the lines of ``classes.txt`` in ``root``.
        ignore: values in label files to ignore, besides 255; or names in ``colors``, which are then
            no classes.
        label_ids: class of each value in label files; see :class:`SegmentationData`.
        images, labels: patterns of the paths below ``root``. ``{name}`` is what an image and its
            labels have in common. Images may lack the extension. Files that match ``labels`` are no
            images, so that both may be in one folder.
        colors: the classes' colours in the label files, as a table or a file; see
            :func:`read_colors`. By default ``class_dict.csv`` in ``root``, if there are neither
            ``classes`` nor ``classes.txt``.
        exif: whether to turn photos; see :class:`SegmentationData`.

    Raises:
        TrainingError: a folder or file is missing; the message names it.

    >>> data = folder("camvid", "train", classes=[f"class {i}" for i in range(11)], ignore=[11])
    >>> data = folder(
    ...     "CamVid", "train", ignore=["Void"], images="{split}/{name}.png",
    ...     labels="{split}_labels/{name}_L.png", colors="CamVid/class_dict.csv",
    ... )
    """
    root = Path(root)
    image_pattern = Pattern("images", images, root, split)
    label_pattern = Pattern("labels", labels, root, split)
    pairs = find_pairs(image_pattern, label_pattern)
    names, table = root / "classes.txt", root / "class_dict.csv"
    if colors is None and classes is None and not names.is_file() and table.is_file():
        colors = table
    if colors is None:
        if classes is None:
            classes = read_lines(names, "a text file, one name a line, or `classes`")
        ids = _number_ids(len(classes), ignore, label_ids)
        data = SegmentationData(pairs, tuple(classes), ids, exif)
    elif classes is None and label_ids is None:
        data = SegmentationData(pairs, *classes_of_colors(colors, ignore), exif)
    else:
        given = "label_ids" if classes is None else "classes"
        raise TrainingError(f"{given}: expected none, because `colors` has the classes")
    check_labels_exist(pairs, image_pattern, label_pattern)
    return data


def _number_ids(
    num_classes: int, ignore: Sequence[int | str], label_ids: Mapping[int, int] | None
) -> dict[int, int]:
    ids = dict(enumerate(range(num_classes))) if label_ids is None else dict(label_ids)
    for value in ignore:
        if isinstance(value, str):
            raise TrainingError(f"ignore: expected numbers (names need `colors`), got {value!r}")
        ids[value] = IGNORE
    return ids


def voc(
    root: str | Path, split: str, colors: str | Path | Mapping[Color, str] | None = None
) -> SegmentationData:
    """PASCAL VOC 2012: ``root`` has JPEGImages, SegmentationClass and ImageSets/Segmentation.

    Args:
        root: usually VOCdevkit/VOC2012.
        split: name of the list ImageSets/Segmentation/SPLIT.txt. A line is the name of an image, or
            the paths of image and labels below ``root``, as in the "trainaug" lists of the 10582
            images with SBD's labels. If a line is a name, its labels are in SegmentationClassAug if
            that folder exists and the split is not one of VOC's own, otherwise in
            SegmentationClass.
        colors: classes and their colours, if they are not VOC's; see :func:`read_colors`. CVAT's
            export "Segmentation mask" has them in labelmap.txt, and images with the extensions that
            they were uploaded with.

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
    for line in read_lines(list_path, "a text file, one name a line"):
        match line.split():
            case [name]:
                image_path = image_of(root / "JPEGImages" / name)
                pairs.append((image_path, labels / f"{name}.png"))
            case [image, label]:
                pairs.append((root / image.lstrip("/"), root / label.lstrip("/")))
            case _:
                raise TrainingError(
                    f"{list_path}: {line!r} (expected an image's name, or two paths)"
                )
    if not pairs:
        raise TrainingError(f"{list_path}: no images (expected at least one)")
    if colors is None:
        return check_files(SegmentationData(pairs, VOC_CLASSES))
    return check_files(SegmentationData(pairs, *classes_of_colors(colors, ())))


def cityscapes(root: str | Path, split: str) -> SegmentationData:
    """Cityscapes: ``root`` has leftImg8bit/SPLIT/CITY and gtFine/SPLIT/CITY.

    Labels are the ``*_gtFine_labelIds.png`` files; all but 19 of their classes are ignored.

    Raises:
        TrainingError: a folder or file is missing; the message names it.

    >>> data = cityscapes("cityscapes", "val")
    """
    ids = dict.fromkeys(range(34), IGNORE) | {id: i for i, id in enumerate(_CITYSCAPES)}
    return folder(
        root,
        split,
        tuple(_CITYSCAPES.values()),
        label_ids=ids,
        images="leftImg8bit/{split}/{name}_leftImg8bit.png",
        labels="gtFine/{split}/{name}_gtFine_labelIds.png",
    )


def ade20k(root: str | Path, split: str) -> SegmentationData:
    """ADE20K of the scene parsing challenge: images/training, annotations/training, and so on.

    Pixels of 0, which belong to no class, are ignored, and value n of an annotation is class n - 1,
    as in the challenge's evaluation (github.com/CSAILVision/sceneparsing).

    Args:
        root: usually ADEChallengeData2016. Its objectInfo150.txt has the names of the classes, of
            which the first synonym is taken.
        split: "training" or "validation"; "train" and "val" mean the same.

    Raises:
        TrainingError: a folder or file is missing; the message names it.

    >>> data = ade20k("ADEChallengeData2016", "train")
    """
    root = Path(root)
    lines = read_lines(root / "objectInfo150.txt", "the classes of ADE20K")
    # The first line is a heading; a line has the columns Idx, Ratio, Train, Val and Name.
    classes = [line.split("\t")[-1].split(",")[0].strip() for line in lines[1:]]
    return folder(
        root,
        {"train": "training", "val": "validation"}.get(split, split),
        classes,
        label_ids={0: IGNORE} | {label + 1: label for label in range(len(classes))},
        labels="annotations/{split}/{name}.png",
    )
