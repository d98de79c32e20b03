"""``deeplab-fast export``: writes a model in a format that runs without this package."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ..export import export_aoti, export_onnx, export_openvino, export_torch
from ..export.check import CheckFailed
from ..export.quantization import Agreement
from ..models import DeepLab
from .device import out_of_memory
from .errors import UserError, reason
from .images import VIDEO_EXTENSIONS, find_images
from .weights import WEIGHTS, load_model

_SUFFIXES = {"onnx": ".onnx", "openvino": ".xml", "torch": ".pt2", "aoti": ".pt2"}
# Options that not all formats have, with those that do.
_ONLY_FOR = {
    "batch": ("onnx", "torch", "aoti"),
    "portable": ("torch",),
    "int8": ("openvino",),
    "calibrate": ("openvino",),
}
_FORMATS = """\
  onnx      ONNX, for ONNX Runtime, TensorRT, OpenVINO and others; FILE.onnx
  openvino  OpenVINO IR, for CPUs and GPUs of Intel; FILE.xml, and FILE.bin beside it
  torch     a program of torch.export, for Python; FILE.pt2
  aoti      a library that AOTInductor compiles for this CPU, for C++ and Python; FILE.pt2"""


def add_parser(subparsers: Any) -> None:
    help = "write a model as ONNX, OpenVINO IR, torch.export program or compiled library"
    parser = subparsers.add_parser(
        "export",
        help=help,
        description=f"{help[0].upper()}{help[1:]}, and check that it computes the same. Its input "
        "are normalised images, float32 [N, C, H, W], its output their labels.",
        epilog=f"formats:\n{_FORMATS}\n\nWEIGHTS is one of\n{WEIGHTS}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("weights", metavar="WEIGHTS", help="name, file or folder of the model")
    parser.add_argument("--format", choices=tuple(_SUFFIXES), required=True, help="see below")
    parser.add_argument("--output", type=Path, required=True, metavar="FILE", help="file to write")
    parser.add_argument(
        "--size",
        type=int,
        nargs=2,
        metavar=("HEIGHT", "WIDTH"),
        help="size that all images have (default: any)",
    )
    parser.add_argument(
        "--batch",
        type=int,
        metavar="N",
        help="number of images that all batches have (default: any)",
    )
    parser.add_argument(
        "--result",
        choices=("labels", "logits"),
        default="labels",
        help="the output, as large as the images: labels [N, H, W] or logits [N, CLASSES, H, W] "
        "(default: labels)",
    )
    parser.add_argument(
        "--labels",
        choices=("uint8", "int32", "int64"),
        default="int64",
        help="dtype of the labels; uint8 for at most 256 classes (default: int64)",
    )
    parser.add_argument(
        "--portable",
        action="store_true",
        help="torch: PyTorch's operators instead of ours, so that the file can be loaded "
        "where deeplab_fast is not installed",
    )
    parser.add_argument(
        "--int8",
        action="store_true",
        help="openvino: compute in 8-bit integers, which --calibrate adapts to your photos",
    )
    parser.add_argument(
        "--calibrate",
        metavar="FOLDER",
        help="photos for --int8, some hundreds of the kind that the model will see",
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    _check(arguments)
    photos = _photos(arguments) if arguments.int8 else None
    model = load_model(arguments.weights, "WEIGHTS")
    write = _writer(arguments, photos)
    with out_of_memory("a smaller --size"):
        try:
            report = write(model)
        except CheckFailed as error:
            raise UserError(
                f"the exported model computes something else, so {arguments.output} was not "
                f"written: {error}"
            ) from error
        except (ImportError, OSError, ValueError) as error:
            raise UserError(f"--output {arguments.output}: {reason(error)}") from error
    _print(arguments, model, report)
    if isinstance(report, Agreement) and report.warning:
        print(f"deeplab-fast: {report.warning}", file=sys.stderr)
    return 0


def _photos(arguments: argparse.Namespace) -> list[Path]:
    """The photos to calibrate with."""
    try:
        found = find_images(arguments.calibrate, arguments.output).images
        photos = [path for path in found if path.suffix.lower() not in VIDEO_EXTENSIONS]
        if not photos:
            raise UserError("only videos (expected photos)")
    except UserError as error:
        raise UserError(f"--calibrate: {arguments.calibrate}: {error}") from error
    return photos


def _check(arguments: argparse.Namespace) -> None:
    """Raise UserError for options that do not fit together, before anything takes long."""
    format, output = arguments.format, arguments.output
    if output.suffix != _SUFFIXES[format]:
        raise UserError(f"--output {output}: expected a name that ends in {_SUFFIXES[format]}")
    if not output.parent.is_dir():
        raise UserError(f"--output {output}: no folder {output.parent} (expected one that exists)")
    for option, formats in _ONLY_FOR.items():
        if getattr(arguments, option) not in (None, False) and format not in formats:
            raise UserError(f"--{option}: expected --format {' or '.join(formats)}, got {format}")
    if arguments.int8 != (arguments.calibrate is not None):
        raise UserError("--int8 and --calibrate FOLDER: expected both or neither")
    for option, sizes in (("size", arguments.size or []), ("batch", [arguments.batch])):
        if any(size is not None and size < 1 for size in sizes):
            text = " ".join(map(str, sizes))
            raise UserError(f"--{option}: got {text} (expected positive integers)")


def _writer(
    arguments: argparse.Namespace, photos: list[Path] | None
) -> Callable[[DeepLab], object]:
    options: dict[str, Any] = {
        "result": arguments.result,
        "dtype": getattr(torch, arguments.labels),
        "size": arguments.size and tuple(arguments.size),
    }
    if arguments.format == "openvino":
        export: Callable[..., object] = export_openvino
        options |= {"calibration": photos}
    else:
        export = {"onnx": export_onnx, "torch": export_torch, "aoti": export_aoti}[arguments.format]
        options |= {"batch": arguments.batch}
        if arguments.format in _ONLY_FOR["portable"]:
            options |= {"portable": arguments.portable}
    return lambda model: export(model, arguments.output, **options)


def _print(arguments: argparse.Namespace, model: DeepLab, report: object) -> None:
    """Files, inputs, outputs and the result of the check."""
    output = arguments.output
    files = [output, output.with_suffix(".bin")] if arguments.format == "openvino" else [output]
    for file in files:
        print(f"{file} ({os.path.getsize(file) / 1e6:.1f} MB)")
    height, width = arguments.size or ("H", "W")
    classes = model.classifier[-1].out_channels
    batch = arguments.batch or "N"
    print(f"  input   images  float32 [{batch}, {model.in_channels}, {height}, {width}]")
    if arguments.result == "labels":
        print(f"  output  labels  {arguments.labels} [{batch}, {height}, {width}]")
    else:
        print(f"  output  logits  float32 [{batch}, {classes}, {height}, {width}]")
    if report is None:
        report = 'none, onnxruntime is not installed (pip install "deeplab-fast[export]")'
    print(f"  check   {report}")
