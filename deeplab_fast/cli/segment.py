"""``deeplab-fast segment``: writes labels, an overlay and more for each image or video."""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from .._io.files import replacing
from .._io.legend import class_shares
from .._io.overlay import Painting
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
)
from .painting import add_painting, painting_from
from .results import (
    CONFIDENCE,
    CUTOUT,
    LABELS,
    OVERLAY,
    PROBABILITIES,
    Kind,
    Segmenter,
    write,
    write_to_stdout,
)
from .video import is_camera, is_video_or_camera, segment_video
from .views import add_views, smaller_window, views_of
from .weights import WEIGHTS, load_for_photos

_STDOUT = Path("-")


def add_parser(subparsers: Any) -> None:
    help = "write a label mask and an overlay for each image"
    parser = subparsers.add_parser(
        "segment",
        help=help,
        description=f"{help[0].upper()}{help[1:]}: NAME_labels.png and NAME_overlay.png, both as "
        "large as the image. The overlay leaves the background as it is: classes of a name such as "
        "background, unlabeled or void, and class 0 of a network of 2 or 21 classes without names. "
        "Videos and cameras become NAME_overlay.mp4 with the same times and audio (.mkv or .mov if "
        "the audio does not fit into MP4; no subtitles), and with --labels-only a folder "
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


def _run(arguments: argparse.Namespace, kinds: list[Kind]) -> int:
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
        model, num_labels = load_for_photos(arguments.weights, device, dtype)
    segmenter = Segmenter(
        model,
        painting_from(arguments, model, num_labels),
        views_of(arguments, model),
        kinds,
        arguments.legend,
    )
    if arguments.output != _STDOUT:
        _make_folder(arguments.output)
    names = result_names(images)
    records = []
    for image in tqdm(images, unit="image", leave=False, disable=None):
        is_video = is_video_or_camera(image)
        paths = {} if is_video else _paths(arguments, kinds, names[image])
        try:
            for path in paths.values():
                if os.path.realpath(path) in taken:
                    raise UserError(
                        f"{os.path.relpath(path)} would be overwritten, but it is also an input "
                        "(expected another --output)"
                    )
            smaller = f"{smaller_window(arguments, model)}, or a smaller image"
            with out_of_memory(smaller):
                if is_video:
                    if arguments.output == _STDOUT:
                        raise UserError("--output -: expected an image, got a video")
                    base = Path(os.path.abspath(arguments.output)) / names[image]
                    record, damage = segment_video(segmenter, image, base, taken, arguments.frames)
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


def _kinds(arguments: argparse.Namespace) -> list[Kind]:
    """The kinds of results to write.

    Raises:
        UserError: the options contradict each other.
    """
    kinds = [LABELS] if arguments.labels_only else [LABELS, OVERLAY]
    also = [kind for kind in (CUTOUT, CONFIDENCE, PROBABILITIES) if getattr(arguments, kind.name)]
    if arguments.output == _STDOUT:
        kinds = _kind_for_stdout([*([LABELS] if arguments.labels_only else []), *also])
    else:
        kinds += also
    if OVERLAY not in kinds and (arguments.legend or arguments.alpha is not None):
        option = "--legend" if arguments.legend else "--alpha"
        raise UserError(f"{option}: expected an overlay, which is not written")
    if arguments.palette is not None and not {LABELS, OVERLAY} & {*kinds}:
        raise UserError("--palette: expected labels or an overlay, which are not written")
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


def _kind_for_stdout(chosen: list[Kind]) -> list[Kind]:
    """The only kind of ``chosen``, or the overlay if there is none."""
    if PROBABILITIES in chosen:
        raise UserError("--output -: expected a folder with --probabilities")
    if len(chosen) > 1:
        names = ", ".join(f"--{'labels-only' if x == LABELS else x.name}" for x in chosen)
        raise UserError(f"--output -: expected one result, got {names}")
    if sys.stdout.isatty():
        raise UserError("--output -: standard output is a terminal (expected a pipe or a file)")
    return chosen or [OVERLAY]


def _paths(arguments: argparse.Namespace, kinds: list[Kind], name: Path) -> dict[Kind, Path]:
    """The files of an image's results; none if its result goes to standard output."""
    if arguments.output == _STDOUT:
        return {}
    output = Path(os.path.abspath(arguments.output))
    return {kind: output / f"{name}_{kind.name}.{kind.extension}" for kind in kinds}


def _segment_file(segmenter: Segmenter, image: Path, paths: dict[Kind, Path]) -> dict[str, Any]:
    """Segment an image, write its results and print its classes; return its entry in the JSON."""
    photo = read_image(image)
    labels, results = segmenter(photo)
    for kind, path in paths.items():
        try:
            write(results[kind], path)
        except OSError as error:
            raise UserError(f"cannot write {os.path.relpath(path)}: {reason(error)}") from error
    if not paths:
        (result,) = results.values()
        write_to_stdout(result)
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
