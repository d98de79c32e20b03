"""Command-line arguments for the data to train and evaluate on."""

from __future__ import annotations

import argparse
import os
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


def add_workers(parser: Any) -> None:
    default = min(4, len(os.sched_getaffinity(0)))
    parser.add_argument(
        "--workers",
        type=int,
        default=default,
        metavar="N",
        help=f"processes that read images, per GPU (default on this machine: {default})",
    )


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
    return folder(arguments.data, split, classes, arguments.ignore)
