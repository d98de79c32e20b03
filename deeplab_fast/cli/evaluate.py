"""``deeplab-fast evaluate``: metrics of a network on images with labels."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch

from ..models import DeepLab
from ..training import Scores, check_labels, checkpoint, distributed, evaluate
from .datasets import LAYOUTS, add_arguments, add_no_check, add_workers, open_split
from .device import add_device, add_dtype, out_of_memory
from .errors import UserError
from .images import add_max_pixels, max_pixels
from .processes import process_group
from .views import add_views, smaller_window
from .weights import load_model


def add_parser(subparsers: Any) -> None:
    help = "compute mIoU and other metrics of a network on images with label masks"
    parser = subparsers.add_parser(
        "evaluate",
        help=help,
        description=f"{help[0].upper()}{help[1:]}.",
        epilog=f"layouts of DATA:\n{LAYOUTS}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_arguments(parser)
    add_no_check(parser)
    parser.add_argument("--split", default="val", help="name of the split (default: val)")
    parser.add_argument("--weights", required=True, help="model, as for `deeplab-fast segment`")
    add_views(parser)
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the results as JSON")
    add_device(parser)
    add_dtype(parser, "float32", "float32")
    add_workers(parser)
    add_max_pixels(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    if arguments.json is not None and not arguments.json.parent.is_dir():
        raise UserError(f"--json: {arguments.json.parent}: no such folder (expected one)")
    with (
        process_group(arguments.device) as device,
        max_pixels(arguments.max_pixels),
        out_of_memory("another --device"),
    ):
        data = open_split(arguments, arguments.split)
        model = _model(arguments.weights, len(data.classes)).to(device)
        quiet = distributed.rank() > 0
        if not quiet:
            _warn_of_names(model, data.classes)
        if not arguments.no_check:
            check_labels({arguments.split: data}, arguments.workers, quiet)
        with out_of_memory(smaller_window(arguments, model)):
            scores = evaluate(
                model.prepare_for_inference(getattr(torch, arguments.dtype)),
                data,
                arguments.scales,
                arguments.flip,
                arguments.window and tuple(arguments.window),
                workers=arguments.workers,
                quiet=quiet,
            )
        if distributed.rank() == 0:
            print(scores.table())
            if scores.only_prediction is not None:
                print(
                    f"warning: all pixels are predicted as {scores.only_prediction}",
                    file=sys.stderr,
                )
            if arguments.json is not None:
                _write(arguments, len(data), scores)
    return 0


def _warn_of_names(model: DeepLab, classes: tuple[str, ...]) -> None:
    """Print a warning if the classes of the model have other names than those of the data."""
    different = [
        f"{label} is {ours} in --weights and {theirs} in the data"
        for label, (ours, theirs) in enumerate(zip(model.label_names or classes, classes))
        if _letters(ours) != _letters(theirs)
    ]
    if different:
        print(
            f"warning: {len(different)} of {len(classes)} classes have other names in the data, so "
            f"that scores may compare different things: class {different[0]}",
            file=sys.stderr,
        )


def _letters(name: str) -> str:
    """A name without what projects write differently, as in dining_table and diningtable."""
    return "".join(filter(str.isalnum, name)).casefold()


def _write(arguments: argparse.Namespace, images: int, scores: Scores) -> None:
    names = ("weights", "split", "scales", "flip", "window", "dtype")
    settings = {name: getattr(arguments, name) for name in names}
    results = {**settings, "images": images, **scores.as_dict()}
    text = json.dumps(results, indent=2, allow_nan=False)
    checkpoint.write(arguments.json, text.encode() + b"\n")


def _model(weights: str, num_classes: int) -> DeepLab:
    model = load_model(weights)
    if model.num_labels != num_classes:
        raise UserError(
            f"--weights: {weights} has {model.num_labels} classes (expected "
            f"{num_classes}, as the data)"
        )
    return model
