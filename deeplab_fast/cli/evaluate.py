"""``deeplab-fast evaluate``: how good a network is on images with labels."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch

from ..models import DeepLabV3
from ..training import TrainingError, checkpoint, distributed, evaluate
from .datasets import LAYOUTS, add_arguments, add_workers, open_split
from .device import find_device, is_out_of_memory
from .errors import UserError


def add_parser(subparsers: Any) -> None:
    help = "measure IoU and accuracy of a network on images with labels"
    parser = subparsers.add_parser(
        "evaluate",
        help=help,
        description=f"{help[0].upper()}{help[1:]}.",
        epilog=f"layouts of DATA:\n{LAYOUTS}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_arguments(parser)
    parser.add_argument("--split", default="val", help="(default: val)")
    parser.add_argument("--weights", required=True, help="what `deeplab-fast segment` takes")
    parser.add_argument(
        "--scales",
        type=float,
        nargs="+",
        default=(1.0,),
        metavar="X",
        help="sizes at which an image is seen, averaged: 0.5 0.75 1 1.25 1.5 1.75 (default: 1)",
    )
    parser.add_argument("--flip", action="store_true", help="see each of them mirrored, too")
    parser.add_argument(
        "--window",
        type=int,
        nargs=2,
        metavar=("HEIGHT", "WIDTH"),
        help="see large images a part at a time, in multiples of 16",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results there as well")
    parser.add_argument("--device", help="cpu, cuda, cuda:1 ... (default: cuda if there is one)")
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        default="float32",
        help="what the network computes in (default: float32)",
    )
    add_workers(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    if arguments.json is not None and not arguments.json.parent.is_dir():
        raise UserError(f"--json: {arguments.json.parent}: no such folder (expected one)")
    device = distributed.start(find_device(arguments.device))
    try:
        data = open_split(arguments, arguments.split)
        model = _model(arguments.weights, len(data.classes)).to(device)
        scores = evaluate(
            model.prepare_for_inference(getattr(torch, arguments.dtype)),
            data,
            arguments.scales,
            arguments.flip,
            arguments.window and tuple(arguments.window),
            workers=arguments.workers,
            quiet=distributed.rank() > 0,
        )
        if distributed.rank() == 0:
            print(scores.table())
            if arguments.json is not None:
                names = ("weights", "split", "scales", "flip", "window", "dtype")
                how = {name: getattr(arguments, name) for name in names}
                results = {**how, "images": len(data), **scores.as_dict()}
                text = json.dumps(results, indent=2, allow_nan=False)
                checkpoint.write(arguments.json, text.encode() + b"\n")
    except TrainingError as error:
        if distributed.rank() > 0:  # the first says it
            return 2
        raise UserError(str(error)) from error
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise UserError("not enough memory (expected a --window)") from error
    finally:
        distributed.stop()
    return 0


def _model(weights: str, num_classes: int) -> DeepLabV3:
    try:
        model = DeepLabV3.from_pretrained(weights)
    except (OSError, ValueError, RuntimeError, ImportError) as error:
        raise UserError(f"--weights: {' '.join(str(error).split())}") from error
    if model.config["num_classes"] != num_classes:
        raise UserError(
            f"--weights: {weights} has {model.config['num_classes']} classes (expected "
            f"{num_classes}, as the data)"
        )
    return model
