"""``deeplab-fast segment``: writes labels and an overlay for each image."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from .._io.overlay import Painting, overlay
from .._io.palette import label_image
from ..models import InferenceModel
from .device import add_device, add_dtype, find_device, out_of_memory
from .errors import UserError, reason
from .images import find_images, read_image, result_names, write_png
from .painting import add_painting, painting_from
from .weights import WEIGHTS, load_for_photos


def add_parser(subparsers: Any) -> None:
    help = "write a label mask and an overlay for each image"
    parser = subparsers.add_parser(
        "segment",
        help=help,
        description=f"{help[0].upper()}{help[1:]}: NAME_labels.png and NAME_overlay.png, both as "
        "large as the image.",
        epilog=f"WEIGHTS is one of\n{WEIGHTS}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "images", nargs="+", metavar="IMAGE", help="a file, a folder to search, or a quoted glob"
    )
    parser.add_argument("--weights", help="name, file or folder of the model; see below")
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("segmented"),
        metavar="FOLDER",
        help="folder of the results, which keep the images' subfolders (default: segmented)",
    )
    add_painting(parser)
    add_device(parser)
    add_dtype(parser, "float32", "float32")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    if arguments.weights is None:
        raise UserError(f"segment needs --weights, one of\n{WEIGHTS}")
    device = find_device(arguments.device)
    output = Path(os.path.abspath(arguments.output))
    images, failures = _find(arguments.images, output)
    if not images:
        return 1
    with out_of_memory("another --device"):
        dtype = getattr(torch, arguments.dtype)
        model, num_classes = load_for_photos(arguments.weights, device, dtype)
    painting = painting_from(arguments, model, num_classes)
    _make_folder(arguments.output)
    taken = {os.path.realpath(image) for image in images}
    names = result_names(images)
    for image in tqdm(images, unit="image", leave=False, disable=None):
        results = [output / f"{names[image]}_{kind}.png" for kind in ("labels", "overlay")]
        try:
            for result in results:
                if os.path.realpath(result) in taken:
                    raise UserError(
                        f"{os.path.relpath(result)} would be overwritten, but it is also an input "
                        "(expected another --output)"
                    )
            with out_of_memory("a smaller image"):
                _segment_file(model, painting, image, *results)
        except UserError as error:
            failures += _complain(f"{os.path.relpath(image)}: {error}")
    return 1 if failures else 0


def _segment_file(
    model: InferenceModel, painting: Painting, path: Path, label_path: Path, overlay_path: Path
) -> None:
    photo = read_image(path)
    labels = painting.keep_only(model.segment(photo))
    for image, result in (
        (label_image(labels, painting.palette), label_path),
        (overlay(photo, labels, painting), overlay_path),
    ):
        try:
            write_png(image, result)
        except OSError as error:
            raise UserError(f"cannot write {os.path.relpath(result)}: {reason(error)}") from error
    written = f"{os.path.relpath(label_path)}, {os.path.relpath(overlay_path)}"
    lines = [f"{os.path.relpath(path)} ({photo.width}x{photo.height}) -> {written}"]
    classes, counts = np.unique(labels, return_counts=True)
    for index in np.argsort(-counts, kind="stable"):
        share = 100 * counts[index] / labels.size
        lines.append(f"  {share:5.1f} %  {painting.name(int(classes[index]))}")
    tqdm.write("\n".join(lines))


def _find(arguments: list[str], output: Path) -> tuple[list[Path], int]:
    """All images in order, without duplicates, and the number of arguments that have no images."""
    images: dict[Path, None] = {}
    failures = 0
    for argument in arguments:
        try:
            images.update(dict.fromkeys(find_images(argument, output)))
        except UserError as error:
            failures += _complain(f"{argument}: {error}")
    return list(images), failures


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output {folder}: {reason(error)} (expected a folder)") from error
    if not os.access(folder, os.W_OK | os.X_OK):
        raise UserError(f"--output {folder}: not writable (expected a folder to write to)")


def _complain(message: str) -> int:
    """Print an error above the progress bar, and return 1, the number of failures."""
    tqdm.write(f"deeplab-fast: {message}", file=sys.stderr)
    return 1
