"""Command-line arguments for the data to train and evaluate on."""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..training import (
    SegmentationData,
    ade20k,
    cityscapes,
    coco,
    coco_stuff,
    folder,
    voc,
)
from .errors import UserError

LAYOUTS = """\
  folder      images/SPLIT/NAME.jpg, labels/SPLIT/NAME.png, and the names of the classes in
              classes.txt or --classes, or with their colours in class_dict.csv or --colors;
              other folders and names: --images "{split}/{name}.jpg"
              --labels "{split}_labels/{name}_L.png"
  voc         PASCAL VOC 2012: JPEGImages, SegmentationClass, ImageSets/Segmentation/SPLIT.txt;
              with SBD's labels: SegmentationClassAug and the split trainaug;
              CVAT's "Segmentation mask": --colors labelmap.txt
  cityscapes  leftImg8bit/SPLIT/CITY/*_leftImg8bit.png, gtFine/SPLIT/CITY/*_gtFine_labelIds.png
  ade20k      images/training, annotations/training, objectInfo150.txt
  coco        annotations/instances_SPLIT2017.json, SPLIT2017 or images/SPLIT2017; and the exports
              of CVAT, Roboflow (SPLIT/_annotations.coco.json) and Label Studio (SPLIT/result.json)
  coco-stuff  images/SPLIT2017, stuffthingmaps/SPLIT2017 or annotations/SPLIT2017"""

# Layout -> its function, and the options that it takes
_LAYOUTS: dict[str, tuple[Any, tuple[str, ...]]] = {
    "folder": (folder, ("classes", "ignore", "label_ids", "images", "labels", "colors")),
    "voc": (voc, ("colors",)),
    "cityscapes": (cityscapes, ()),
    "ade20k": (ade20k, ()),
    "coco": (coco, ()),
    "coco-stuff": (coco_stuff, ()),
}


def add_arguments(parser: Any) -> None:
    parser.add_argument("data", type=Path, metavar="DATA", help="folder of the data set")
    parser.add_argument(
        "--layout",
        choices=tuple(_LAYOUTS),
        default="folder",
        help="layout of its files; see below (default: folder)",
    )
    parser.add_argument(
        "--classes",
        type=lambda text: text.split(","),
        metavar="NAME,NAME,...",
        help="names of the classes, class 0 first, for the layout folder",
    )
    parser.add_argument(
        "--ignore",
        type=lambda text: int(text) if text.isdecimal() else text,
        nargs="+",
        metavar="LABEL",
        help="values in label files to ignore, besides 255, for the layout folder; with colours: "
        "names of classes to ignore",
    )
    parser.add_argument(
        "--label-ids",
        type=_label_ids,
        nargs="+",
        metavar="VALUE=CLASS",
        help="class of each value in label files, for the layout folder: 0=0 255=1 for masks of 0 "
        "and 255, 1-11=0-10 for classes that count from 1, 0=255 to ignore 0 (default: value i is "
        "class i)",
    )
    parser.add_argument(
        "--images",
        metavar="PATTERN",
        help="where the images are in DATA, for the layout folder; {name} is what they have in "
        "common with their labels (default: images/{split}/{name}, with any extension)",
    )
    parser.add_argument(
        "--labels",
        metavar="PATTERN",
        help="where the labels are in DATA, for the layout folder (default: "
        "labels/{split}/{name}.png)",
    )
    parser.add_argument(
        "--colors",
        type=Path,
        metavar="FILE",
        help="for label images in colours, in the layouts folder and voc: text file with a line "
        "name,red,green,blue for each class (default: class_dict.csv in DATA, if there is no "
        "classes.txt)",
    )
    parser.add_argument(
        "--exif",
        choices=("auto", "upright", "stored"),
        default="auto",
        help="whether labels belong to photos turned as their EXIF orientation says; auto: as "
        "their size tells, otherwise upright (default: auto)",
    )


def add_no_check(parser: Any) -> None:
    parser.add_argument(
        "--no-check", action="store_true", help="do not check all label files before the start"
    )


def add_workers(parser: Any) -> None:
    default = min(4, len(os.sched_getaffinity(0)))
    parser.add_argument(
        "--workers",
        type=int,
        default=default,
        metavar="N",
        help=f"processes that read images, per GPU (default on this machine: {default})",
    )


def _label_ids(text: str) -> dict[int, int]:
    """The mapping that VALUE=CLASS means; both sides may be a range FIRST-LAST."""
    match = re.fullmatch(r"(\d+)(?:-(\d+))?=(\d+)(?:-(\d+))?", text)
    if match is not None:
        first, last, label, last_label = match.groups()
        values = range(int(first), int(last or first) + 1)
        labels = range(int(label), int(last_label or label) + 1)
        if values and len(labels) in (1, len(values)):
            return dict(zip(values, labels if last_label else [*labels] * len(values)))
    raise argparse.ArgumentTypeError(f"{text!r} (expected VALUE=CLASS, such as 255=1 or 1-11=0-10)")


def _merged(mappings: Sequence[Mapping[int, int]]) -> dict[int, int]:
    """The classes of all values.

    Raises:
        UserError: a value has two classes.
    """
    merged: dict[int, int] = {}
    for value, label in (item for mapping in mappings for item in mapping.items()):
        if merged.setdefault(value, label) != label:
            raise UserError(
                f"--label-ids {value}={merged[value]} {value}={label}: expected one class for "
                f"value {value}"
            )
    return merged


def open_split(arguments: argparse.Namespace, split: str) -> SegmentationData:
    """The data set of one split.

    Raises:
        TrainingError: a folder or file is missing; the message names it.
        UserError: the layout does not take an option.
    """
    layout, options = _LAYOUTS[arguments.layout]
    given = {}
    for name in ("classes", "ignore", "label_ids", "images", "labels", "colors"):
        value = getattr(arguments, name)
        if value is not None:
            if name not in options:
                option = name.replace("_", "-")
                raise UserError(
                    f"--{option}: not for the layout {arguments.layout} (expected none)"
                )
            given[name] = _merged(value) if name == "label_ids" else value
    data: SegmentationData = layout(arguments.data, split, **given)
    return replace(data, exif=arguments.exif)
