"""``deeplab-fast segment``: writes labels, an overlay and more for each image or video."""

from __future__ import annotations

import argparse
import io
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from .._io.files import replacing
from .._io.legend import class_shares, with_legend
from .._io.overlay import Painting, cutout, overlay
from .._io.palette import label_image
from ..models import InferenceModel
from .device import add_device, add_dtype, find_device, out_of_memory
from .errors import UserError, reason
from .images import (
    STDIN,
    VIDEO_EXTRA,
    add_max_pixels,
    find_images,
    foreign_files,
    max_pixels,
    read_image,
    result_names,
    shown,
    unread_videos,
    write_npz,
    write_png,
)
from .painting import add_painting, painting_from
from .video import is_camera, is_video_or_camera, segment_video
from .views import add_views, smaller_window, views_of
from .weights import WEIGHTS, load_for_photos

_STDOUT = Path("-")


class _Kind(NamedTuple):
    """A kind of result: its name in file names, and the file's extension."""

    name: str
    extension: str = "png"


_LABELS, _OVERLAY, _CUTOUT = _Kind("labels"), _Kind("overlay"), _Kind("cutout")
_CONFIDENCE, _PROBABILITIES = _Kind("confidence"), _Kind("probabilities", "npz")

_Result = Image.Image | dict[str, np.ndarray]


def add_parser(subparsers: Any) -> None:
    help = "write a label mask and an overlay for each image"
    parser = subparsers.add_parser(
        "segment",
        help=help,
        description=f"{help[0].upper()}{help[1:]}: NAME_labels.png and NAME_overlay.png, both as "
        "large as the image. The overlay leaves the background as it is: classes of a name such as "
        "background, unlabeled or void, and class 0 of a network of 2 or 21 classes without names. "
        "Videos and cameras become NAME_overlay.mp4 with the same times and audio, or "
        "NAME_overlay.mkv if the audio does not fit into MP4, and with --labels-only a folder "
        "NAME_labels of 000001.png, 000002.png ... instead; "
        f"they need {VIDEO_EXTRA}.",
        epilog=f"WEIGHTS is one of\n{WEIGHTS}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "images",
        nargs="+",
        metavar="IMAGE",
        help="an image or video, a folder to search, a quoted glob, - for an image on standard "
        "input, or camera:0 (/dev/video0), which is recorded until Ctrl-C",
    )
    parser.add_argument("--weights", help="name, file or folder of the model; see below")
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("segmented"),
        metavar="FOLDER",
        help="folder of the results, which keep the images' subfolders (default: segmented); - "
        "writes the overlay of a single image to standard output, or, with the option, its labels, "
        "cut-out or confidence",
    )
    network = parser.add_argument_group("network")
    add_device(network)
    add_dtype(network, "float32", "float32")
    add_views(network)
    add_max_pixels(network)
    network.add_argument(
        "--frames", type=int, metavar="N", help="end the recording of a camera after N frames"
    )
    results = parser.add_argument_group("results")
    results.add_argument("--labels-only", action="store_true", help="write no overlay")
    results.add_argument(
        "--cutout",
        action="store_true",
        help="also NAME_cutout.png: the image, transparent outside the classes of --only, or in "
        "the background",
    )
    results.add_argument(
        "--confidence",
        action="store_true",
        help="also NAME_confidence.png: the largest probability, from 0 to 255",
    )
    results.add_argument(
        "--probabilities",
        action="store_true",
        help="also NAME_probabilities.npz: probabilities [C, H, W] in float16, of all classes or "
        "those of --only, and their names, classes [C]; 2 C H W bytes: 0.5 GB for 21 classes and "
        "12 megapixels",
    )
    results.add_argument(
        "--json",
        type=Path,
        metavar="FILE",
        help="also write the classes of each image and their shares as JSON",
    )
    drawing = parser.add_argument_group("drawing")
    add_painting(drawing)
    drawing.add_argument(
        "--legend",
        action="store_true",
        help="add a strip with colours, names and shares below the overlay",
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    if arguments.weights is None:
        raise UserError(f"segment needs --weights, one of\n{WEIGHTS}")
    kinds = _kinds(arguments)
    with max_pixels(arguments.max_pixels):
        return _run(arguments, kinds)


def _run(arguments: argparse.Namespace, kinds: list[_Kind]) -> int:
    device = find_device(arguments.device)
    images, failures = _find(arguments)
    if not images:
        return 1
    if arguments.output == _STDOUT and len(images) > 1:
        raise UserError(f"--output -: expected one image, got {len(images)}")
    taken = {os.path.realpath(image) for image in images if image != STDIN}
    if arguments.json is not None and os.path.realpath(arguments.json) in taken:
        raise UserError(f"--json {arguments.json}: expected a file that is not an input")
    with out_of_memory("another --device"):
        dtype = getattr(torch, arguments.dtype)
        model, num_classes = load_for_photos(arguments.weights, device, dtype)
    segmenter = _Segmenter(
        model,
        painting_from(arguments, model, num_classes),
        views_of(arguments, model),
        arguments.legend,
        kinds,
    )
    if arguments.output != _STDOUT:
        _make_folder(arguments.output)
    names = result_names(images)
    records = []
    for image in tqdm(images, unit="image", leave=False, disable=None):
        paths = _paths(arguments, kinds, names[image])
        try:
            for path in paths.values():
                if os.path.realpath(path) in taken:
                    raise UserError(
                        f"{os.path.relpath(path)} would be overwritten, but it is also an input "
                        "(expected another --output)"
                    )
            smaller = f"{smaller_window(arguments, model)}, or a smaller image"
            with out_of_memory(smaller):
                if is_video_or_camera(image):
                    record, damage = _segment_video(
                        arguments, segmenter, image, names[image], taken
                    )
                    if damage is not None:
                        failures.append(_complain(shown(image), damage))
                else:
                    record = _segment_file(segmenter, image, paths)
            records.append(record)
        except UserError as error:
            failures.append(_complain(shown(image), str(error)))
    if arguments.json is not None:
        _write_json(arguments, segmenter.painting, records, failures)
    return 1 if failures else 0


def _kinds(arguments: argparse.Namespace) -> list[_Kind]:
    """The kinds of results to write.

    Raises:
        UserError: the options contradict each other.
    """
    kinds = [_LABELS, *([] if arguments.labels_only else [_OVERLAY])]
    kinds += [
        kind for kind in (_CUTOUT, _CONFIDENCE, _PROBABILITIES) if getattr(arguments, kind.name)
    ]
    if arguments.output == _STDOUT:
        if arguments.probabilities:
            raise UserError("--output -: expected a folder with --probabilities")
        kinds = kinds[2:] if not arguments.labels_only else kinds
        kinds = kinds or [_OVERLAY]
        if len(kinds) > 1:
            names = ", ".join(
                f"--{kind.name}".replace("--labels", "--labels-only") for kind in kinds
            )
            raise UserError(f"--output -: expected one result, got {names}")
        if sys.stdout.isatty():
            raise UserError("--output -: standard output is a terminal (expected a pipe or a file)")
    if _OVERLAY not in kinds:
        for option, is_given in (
            ("alpha", arguments.alpha is not None),
            ("legend", arguments.legend),
        ):
            if is_given:
                raise UserError(f"--{option}: expected an overlay, which is not written")
    if "-" in arguments.images and sys.stdin.isatty():
        raise UserError("-: standard input is a terminal (expected an image)")
    if arguments.frames is not None:
        if arguments.frames < 1:
            raise UserError(f"--frames {arguments.frames}: expected a positive number")
        if not any(map(is_camera, arguments.images)):
            raise UserError("--frames: expected a camera, such as camera:0")
    if arguments.json is not None and not arguments.json.absolute().parent.is_dir():
        raise UserError(f"--json: {arguments.json.parent}: no such folder (expected one)")
    return kinds


class _Segmenter(NamedTuple):
    """What to compute of each image.

    Attributes:
        model: the network.
        painting: how its classes are drawn.
        views: keyword arguments of ``model.segment``.
        kinds: the kinds of results.
    """

    model: InferenceModel
    painting: Painting
    views: dict[str, Any]
    legend: bool
    kinds: list[_Kind]

    def __call__(self, photo: Image.Image) -> tuple[np.ndarray, dict[_Kind, _Result]]:
        """The labels of a photo, and the results of all kinds."""
        results: dict[_Kind, _Result] = {}
        if _CONFIDENCE in self.kinds or _PROBABILITIES in self.kinds:
            labels, strips = self.model.segment_with_probabilities(photo, **self.views)
            results = self._from_probabilities(strips, labels.shape)
        else:
            labels = self.model.segment(photo, **self.views)
        labels, painting = self.painting.keep_only(labels), self.painting
        results[_LABELS] = label_image(labels, painting.palette)
        if _OVERLAY in self.kinds:
            picture = overlay(photo, labels, painting)
            results[_OVERLAY] = with_legend(picture, labels, painting) if self.legend else picture
        if _CUTOUT in self.kinds:
            results[_CUTOUT] = cutout(photo, labels, painting)
        return labels, {kind: results[kind] for kind in self.kinds}

    def _from_probabilities(
        self, strips: Iterator[np.ndarray], size: tuple[int, ...]
    ) -> dict[_Kind, _Result]:
        """The confidence, and the probabilities if they are asked for, from strips of rows."""
        only, names = self.painting.only, np.array(self.painting.names)
        classes = sorted(range(len(names)) if only is None else only)
        confidence = np.empty(size, np.uint8)
        keep = _PROBABILITIES in self.kinds
        probabilities = np.empty((len(classes) if keep else 0, *size), np.float16)
        top = 0
        for strip in strips:
            rows = slice(top, top + strip.shape[1])
            confidence[rows] = np.round(255 * strip.max(0))
            if keep:
                probabilities[:, rows] = strip[classes]
            top = rows.stop
        return {
            _CONFIDENCE: Image.fromarray(confidence),
            _PROBABILITIES: {"probabilities": probabilities, "classes": names[classes]},
        }


def _paths(arguments: argparse.Namespace, kinds: list[_Kind], name: Path) -> dict[_Kind, Path]:
    """The files of an image's results; none if its result goes to standard output."""
    if arguments.output == _STDOUT:
        return {}
    output = Path(os.path.abspath(arguments.output))
    return {kind: output / f"{name}_{kind.name}.{kind.extension}" for kind in kinds}


def _segment_file(segmenter: _Segmenter, image: Path, paths: dict[_Kind, Path]) -> dict[str, Any]:
    """Segment an image, write its results and print its classes; return its entry in the JSON."""
    photo = read_image(image)
    labels, results = segmenter(photo)
    for kind, path in paths.items():
        try:
            _write(results[kind], path)
        except OSError as error:
            raise UserError(f"cannot write {os.path.relpath(path)}: {reason(error)}") from error
    if not paths:
        (result,) = results.values()
        _print(result)
    written = {kind.name: os.path.relpath(path) for kind, path in paths.items()}
    shares = class_shares(labels)
    name = segmenter.painting.name
    lines = [
        f"{shown(image)} ({photo.width}x{photo.height}) -> "
        f"{', '.join(written.values()) or 'standard output'}"
    ]
    lines += [f"  {100 * share:5.1f} %  {name(label)}" for label, share in shares]
    tqdm.write("\n".join(lines), file=sys.stdout if paths else sys.stderr)
    return {
        "image": shown(image),
        "width": photo.width,
        "height": photo.height,
        "results": written,
        "shares": [
            {"class": label, "name": name(label), "share": share} for label, share in shares
        ],
    }


def _segment_video(
    arguments: argparse.Namespace,
    segmenter: _Segmenter,
    source: Path,
    name: Path,
    inputs: set[str],
) -> tuple[dict[str, Any], str | None]:
    """Segment a video or camera; see :func:`segment_video`."""
    for option in ("cutout", "confidence", "probabilities", "legend"):
        if getattr(arguments, option):
            raise UserError(f"--{option}: expected an image, got a video")
    if arguments.output == _STDOUT:
        raise UserError("--output -: expected an image, got a video")

    def label(photo: Image.Image) -> np.ndarray:
        return segmenter.painting.keep_only(segmenter.model.segment(photo, **segmenter.views))

    return segment_video(
        source,
        Path(os.path.abspath(arguments.output)) / name,
        label,
        segmenter.painting,
        arguments.labels_only,
        inputs,
        arguments.frames,
    )


def _write(result: _Result, path: Path) -> None:
    if isinstance(result, dict):
        write_npz(result, path)
    else:
        write_png(result, path)


def _print(result: _Result) -> None:
    """Write a PNG to standard output."""
    assert isinstance(result, Image.Image)
    buffer = io.BytesIO()
    result.save(buffer, format="PNG")
    sys.stdout.buffer.write(buffer.getvalue())
    sys.stdout.flush()


def _write_json(
    arguments: argparse.Namespace,
    painting: Painting,
    records: list[dict[str, Any]],
    failures: list[dict[str, str]],
) -> None:
    settings = {
        name: getattr(arguments, name) for name in ("weights", "dtype", "scales", "flip", "window")
    }
    only = None if painting.only is None else [painting.name(x) for x in sorted(painting.only)]
    content = {
        **settings, "only": only, "classes": painting.names, "images": records, "failed": failures,
    }  # fmt: skip
    try:
        with replacing(arguments.json) as partial:
            partial.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n")
    except OSError as error:
        raise UserError(f"--json: cannot write {arguments.json}: {reason(error)}") from error


def _find(arguments: argparse.Namespace) -> tuple[list[Path], list[dict[str, str]]]:
    """All images in order, without duplicates, and the arguments that have no images."""
    output = Path(os.path.abspath(arguments.output))
    images: dict[Path, None] = {}
    failures = []
    for argument in arguments.images:
        if argument == str(STDIN) or is_camera(argument):
            images[Path(argument)] = None
            continue
        try:
            found = find_images(argument, output)
        except UserError as error:
            failures.append(_complain(argument, str(error)))
            continue
        images.update(dict.fromkeys(found.images))
        if found.foreign:
            _complain(argument, f"skipped {foreign_files(found.foreign)}")
        if found.videos:
            _complain(argument, f"skipped {unread_videos(found.videos)}")
    return list(images), failures


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output {folder}: {reason(error)} (expected a folder)") from error
    if not os.access(folder, os.W_OK | os.X_OK):
        raise UserError(f"--output {folder}: not writable (expected a folder to write to)")


def _complain(image: str, error: str) -> dict[str, str]:
    """Print an error above the progress bar, and return its entry in the JSON."""
    tqdm.write(f"deeplab-fast: {image}: {error}", file=sys.stderr)
    return {"image": image, "error": error}
