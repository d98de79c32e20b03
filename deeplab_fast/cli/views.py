"""Arguments that say how the network sees an image: scales, mirrored, in windows."""

from __future__ import annotations

import argparse
from typing import Any

from ..models.sliding_window import check_views
from .errors import UserError


def add_views(parser: Any) -> None:
    """Add --scales, --flip and --window."""
    parser.add_argument(
        "--scales",
        type=float,
        nargs="+",
        default=(1.0,),
        metavar="X",
        help="average over the image at these scales, e.g. 0.5 0.75 1 1.25 1.5 1.75 (default: 1)",
    )
    parser.add_argument("--flip", action="store_true", help="also average over mirrored images")
    parser.add_argument(
        "--window",
        type=int,
        nargs=2,
        metavar=("HEIGHT", "WIDTH"),
        help="divide large images into overlapping windows of this size, in multiples of 16, plus "
        "1 for a network that aligns corners",
    )


def views_of(arguments: argparse.Namespace, model: Any) -> dict[str, Any]:
    """Keyword arguments of :meth:`SegmentationModel.segment`.

    Raises:
        UserError: a scale or the window is out of range.
    """
    views = {
        "scales": tuple(arguments.scales),
        "flip": arguments.flip,
        "window": arguments.window and tuple(arguments.window),
    }
    try:
        check_views(model, views["scales"], views["window"])
    except ValueError as error:  # its message begins with the name of the option
        raise UserError(f"--{error}") from error
    return views


def smaller_window(arguments: argparse.Namespace, model: Any) -> str:
    """Advice that saves memory, for the end of the message of :func:`out_of_memory`."""
    if arguments.window is not None:
        return "a smaller --window"
    return "--window 513 513" if model.align_corners else "--window 512 512"
