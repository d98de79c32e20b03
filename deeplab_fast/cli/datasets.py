"""Command-line arguments for the data to train and evaluate on."""

from __future__ import annotations

import argparse
import os
import re
from pathlib import Path
from typing import Any

from ..training import SegmentationData, cityscapes, folder, voc

LAYOUTS = """\
  folder      images/SPLIT/NAME.jpg, labels/SPLIT/NAME.png, and the names of the classes in
              classes.txt or --classes
  voc         PASCAL VOC 2012: JPEGImages, SegmentationClass, ImageSets/Segmentation/SPLIT.txt;
              with SBD's labels: SegmentationClassAug and the split trainaug
  cityscapes  leftImg8bit/SPLIT/CITY/*_leftImg8bit.png, gtFine/SPLIT/CITY/*_gtFine_labelIds.png"""


def add_arguments(parser: Any) -> None:
    parser.add_argument("data", type=Path, metavar="DATA", help="folder of the data set")
    parser.add_argument(
        "--layout",
        choices=("folder", "voc", "cityscapes"),
        default="folder",
        help="layout of its files; see below (default: folder)",
    )
    parser.add_argument(
        "--classes",
        metavar="NAME,NAME,...",
        help="names of the classes, class 0 first, for the layout folder",
    )
    parser.add_argument(
        "--ignore",
        type=int,
        nargs="+",
        default=(),
        metavar="LABEL",
        help="values in label files to ignore, besides 255, for the layout folder",
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


def open_split(arguments: argparse.Namespace, split: str) -> SegmentationData:
    """The data set of one split.

    Raises:
        TrainingError: a folder or file is missing; the message names it.
    """
    if arguments.layout == "voc":
        return voc(arguments.data, split)
    if arguments.layout == "cityscapes":
        return cityscapes(arguments.data, split)
    classes = arguments.classes and arguments.classes.split(",")
    ids = arguments.label_ids and {
        value: label for part in arguments.label_ids for value, label in part.items()
    }
    return folder(arguments.data, split, classes, arguments.ignore, ids)
