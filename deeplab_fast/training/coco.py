"""Data sets in COCO's format, and exports of annotation tools in it."""

from __future__ import annotations

import json
import pickle
from collections import defaultdict
from pathlib import Path
from typing import Any

from .coco_labels import CocoLabels
from .data import Exif, SegmentationData
from .errors import TrainingError
from .patterns import check_files

_LONGEST = 65535  # pixels of the longest side of an image, as in JPEG


def coco(root: str | Path, split: str, exif: Exif = "auto") -> SegmentationData:
    """Objects of a COCO file as classes, and everything else as the class "background", 0.

    The first of these files that exists is read (for "val" also with "valid", as Roboflow has it):

    * annotations/instances_SPLIT2017.json, COCO itself;
    * annotations/instances_SPLIT.json, as CVAT exports it, where SPLIT is "default";
    * SPLIT/_annotations.coco.json, as Roboflow exports it;
    * SPLIT/result.json, as Label Studio exports it into one folder per split.

    Images are looked for beside the file and in images/SPLIT2017, SPLIT2017, images/SPLIT, SPLIT
    and images. Categories are classes in the order of their ids. :class:`CocoLabels` says how the
    objects are drawn. A category that is only the ``supercategory`` of others and has no objects,
    as in Roboflow's exports, is no class.

    Args:
        root: folder of the data set.
        split: name of a split, such as "train" or "val".
        exif: whether to turn photos; see :class:`SegmentationData`.

    Raises:
        TrainingError: a file is missing or malformed, or an object has only a box; the message
            names it.

    >>> data = coco("coco", "val")
    """
    root = Path(root)
    path = _annotation_file(root, split)
    content = _load(path)
    try:
        names, labels = _classes(content)
        objects = _objects(path, content, labels)
        images = {
            image["id"]: (
                str(image["file_name"]).replace("\\", "/"),
                _side(path, image, "width"),
                _side(path, image, "height"),
            )
            for image in content["images"]
        }
    except TrainingError:
        raise
    except (KeyError, TypeError, AttributeError) as error:
        raise TrainingError(
            f"{path}: {error!r} (expected COCO's images, annotations and categories)"
        ) from error
    if not images:
        raise TrainingError(f"{path}: no images (expected at least one)")
    folder = _image_folder(root, path, split, next(iter(images.values()))[0])
    pairs = [
        (folder / name, CocoLabels(path, name, (width, height), pickle.dumps(objects[id])))
        for id, (name, width, height) in images.items()
    ]
    return check_files(SegmentationData(pairs, tuple(names), exif=exif))


def _splits(split: str) -> tuple[str, ...]:
    return (split, "valid") if split == "val" else (split,)


def _annotation_file(root: Path, split: str) -> Path:
    files = [
        root / file
        for name in _splits(split)
        for file in (
            f"annotations/instances_{name}2017.json",
            f"annotations/instances_{name}.json",
            f"{name}/_annotations.coco.json",
            f"{name}/result.json",
        )
    ]
    for file in files:
        if file.is_file():
            return file
    expected = " or ".join(str(file.relative_to(root)) for file in files)
    raise TrainingError(f"{root}: no COCO file of the split {split!r} (expected {expected})")


def _image_folder(root: Path, file: Path, split: str, first: str) -> Path:
    """The folder that has the first image."""
    folders = [file.parent, file.parent / "images"]
    for name in _splits(split):
        for folder in (f"images/{name}2017", f"{name}2017", f"images/{name}", name, "images"):
            folders.append(root / folder)
    for path in folders:
        if (path / first).is_file():
            return path
    raise TrainingError(
        f"{file}: {first} is in none of the folders {', '.join(map(str, folders))} (expected the "
        "images in one of them)"
    )


def _load(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes())
    except OSError as error:
        raise TrainingError(f"{path}: {error.strerror} (expected a COCO file)") from error
    except (ValueError, RecursionError) as error:
        raise TrainingError(f"{path}: {error} (expected JSON)") from error


def _classes(content: Any) -> tuple[list[str], dict[int, int]]:
    """Names of the classes, and the class of each category id."""
    categories = sorted(content["categories"], key=lambda category: category["id"])
    used = {annotation["category_id"] for annotation in content["annotations"]}
    parents = {
        category["supercategory"]
        for category in categories
        if category.get("supercategory") not in (None, category["name"])
    }
    names, classes = ["background"], {}
    for category in categories:
        name = "background" if category["name"].lower() == "background" else category["name"]
        if name in parents and category["id"] not in used:
            continue
        if name not in names:
            names.append(name)
        classes[category["id"]] = names.index(name)
    return names, classes


def _side(path: Path, image: Any, name: str) -> int:
    """Width or height of an image."""
    side = image[name]
    if not isinstance(side, (int, float)) or not 1 <= side <= _LONGEST or side != int(side):
        raise TrainingError(
            f"{path}: {image['file_name']}: {name} {side!r} (expected pixels, 1 to {_LONGEST})"
        )
    return int(side)


def _objects(path: Path, content: Any, classes: dict[int, int]) -> dict[int, list[tuple[int, Any]]]:
    """Class and segmentation of the objects of each image id."""
    objects: dict[int, list[tuple[int, Any]]] = defaultdict(list)
    boxes = 0
    for annotation in content["annotations"]:
        segmentation = annotation.get("segmentation")
        boxes += not segmentation
        category = annotation["category_id"]
        if category not in classes:
            raise TrainingError(
                f"{path}: an object of category {category!r} (expected the id of one of the "
                "file's categories)"
            )
        objects[annotation["image_id"]].append((classes[category], segmentation))
    if boxes:
        raise TrainingError(
            f"{path}: {boxes} of {len(content['annotations'])} annotations have no segmentation "
            "(expected polygons or run lengths; boxes are no labels of pixels)"
        )
    return objects
