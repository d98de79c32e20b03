"""``deeplab-fast tune``: measures which kernels are the fastest for a model on this GPU."""

from __future__ import annotations

import argparse
from typing import Any

import torch

from ..backends import dispatch_table, tuning
from .device import add_device, add_dtype, find_device, out_of_memory
from .errors import UserError, reason
from .weights import WEIGHTS, load_model


def add_parser(subparsers: Any) -> None:
    help = "measure which kernels are the fastest for a model on this GPU"
    parser = subparsers.add_parser(
        "tune",
        help=help,
        description=f"{help[0].upper()}{help[1:]}, and use them from then on.\n\n"
        "Each convolution of the model, prepared for inference, is timed on our kernels and on\n"
        "cuDNN. Tune with the size, batch size and dtype that you use. If the command is\n"
        "interrupted, run it again: it goes on where it stopped.",
        epilog=f"WEIGHTS is one of\n{WEIGHTS}\n\nThe measurements are kept in\n"
        f"  {dispatch_table.user_path()}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("weights", metavar="WEIGHTS", help="name, file or folder of the model")
    parser.add_argument(
        "--size",
        type=int,
        nargs=2,
        required=True,
        metavar=("HEIGHT", "WIDTH"),
        help="size of the images that the network gets",
    )
    parser.add_argument(
        "--batch",
        type=int,
        nargs="+",
        default=[1],
        metavar="N",
        help="one or several batch sizes (default: 1, as `deeplab-fast segment`)",
    )
    add_device(parser)
    add_dtype(parser, "float32", "float32")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    for option in ("size", "batch"):
        values = getattr(arguments, option)
        if min(values) < 1:
            raise UserError(
                f"--{option}: got {' '.join(map(str, values))} (expected positive integers)"
            )
    device = find_device(arguments.device)
    if not tuning.can_tune(device):
        print(tuning.Tuning(device, [], []))
        return 0
    failures = []
    with out_of_memory("a smaller --size or --batch"):
        trained = load_model(arguments.weights, "WEIGHTS").to(device)
        model = trained.prepare_for_inference(getattr(torch, arguments.dtype))
        for batch in arguments.batch:
            images = torch.zeros(batch, trained.in_channels, *arguments.size, device=device)
            try:
                tuned = model.tune(images)
            except (OSError, tuning.UnusableGPU) as error:
                raise UserError(reason(error)) from error
            print(f"batch {batch}:\n{tuned}")
            failures += tuned.failures
    print(f"The measurements are in {dispatch_table.user_path()}")
    return 1 if failures else 0
