"""``deeplab-fast convert``: reads a checkpoint of any format and writes it in ours."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch

from ..models import DeepLab, DeepLabV3
from ..models.checkpoints import Checkpoint, torchvision_options, write_torchvision
from ..models.deeplab import atrous_rates_of
from .errors import UserError, reason
from .weights import WEIGHTS, load_model


def add_parser(subparsers: Any) -> None:
    help = "convert a checkpoint of another project"
    parser = subparsers.add_parser(
        "convert",
        help=help,
        description=f"{help[0].upper()}{help[1:]}, into a file that from_pretrained and all "
        "commands read. Keys and shapes determine the network; output stride and atrous rates are "
        "the project's defaults, unless an option says otherwise.",
        epilog=f"what IN can be:\n{WEIGHTS}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("weights", metavar="IN", help="checkpoint, folder or name")
    parser.add_argument(
        "output",
        type=Path,
        metavar="OUT",
        help="FILE.safetensors or a folder, or FILE.pth for torchvision",
    )
    parser.add_argument(
        "--to",
        choices=("deeplab-fast", "torchvision"),
        default="deeplab-fast",
        help="format of OUT: of save_pretrained, or a state dict for torchvision's model, which "
        "only a plain DeepLab-v3 has (default: deeplab-fast)",
    )
    parser.add_argument("--output-stride", type=int, choices=(8, 16), help="output stride")
    parser.add_argument(
        "--atrous-rates", type=int, nargs="+", metavar="RATE", help="rates of ASPP's 3x3 branches"
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    given = {"output_stride": arguments.output_stride, "atrous_rates": arguments.atrous_rates}
    overrides = {name: value for name, value in given.items() if value is not None}
    _refuse_to_overwrite(Path(arguments.weights), arguments.output)
    model = load_model(arguments.weights, "IN", **overrides)
    config = model.config | {"atrous_rates": tuple(atrous_rates_of(model.config))}
    try:
        if arguments.to == "torchvision":
            _write_torchvision(arguments.output, model, config)
        else:
            model.save_pretrained(arguments.output)
    except (OSError, ValueError) as error:
        raise UserError(f"OUT: {arguments.output}: {reason(error)}") from error
    rates = "/".join(map(str, config["atrous_rates"])) or "none"
    print(
        f"{type(model).__name__} with {config['backbone']}, {config['num_classes']} classes, "
        f"output stride {config['output_stride']}, atrous rates {rates}: {arguments.output}"
    )
    return 0


def _refuse_to_overwrite(weights: Path, output: Path) -> None:
    """Refuse an output that is the input, or a file of it if that is a folder."""
    inputs = list(weights.iterdir()) if weights.is_dir() else [weights]
    outputs = list(output.iterdir()) if output.is_dir() else [output]
    for path in outputs:
        if path.exists() and any(other.exists() and path.samefile(other) for other in inputs):
            raise UserError(f"OUT: {path} is a file of IN (expected another name)")


def _write_torchvision(path: Path, model: DeepLab, config: dict[str, Any]) -> None:
    with torch.device("meta"):
        usual = DeepLabV3(**torchvision_options(config["backbone"])).config
    usual = usual | {"atrous_rates": tuple(atrous_rates_of(usual))}
    checkpoint = Checkpoint(
        type(model).__name__, config, model.state_dict(), model.preprocessing, model.categories
    )
    write_torchvision(path, checkpoint, usual)
