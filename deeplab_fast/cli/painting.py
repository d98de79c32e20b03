"""Arguments that say how classes are drawn."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from .._io.overlay import Painting, painting_of
from .._io.palette_file import PaletteError, read_palette
from ..models import InferenceModel
from .errors import UserError


def add_painting(parser: Any) -> None:
    """Add --only, --palette and --alpha."""
    parser.add_argument(
        "--only",
        nargs="+",
        metavar="CLASS",
        help="names or numbers of the classes to draw and to keep in labels, where the others "
        "become 0 if class 0 is the background, else 255",
    )
    parser.add_argument(
        "--palette",
        type=Path,
        metavar="FILE",
        help="colours of the classes: lines of R,G,B or NAME,R,G,B, JSON, or an image with a "
        "palette (default: PASCAL VOC's)",
    )
    parser.add_argument(
        "--alpha",
        type=float,
        metavar="X",
        help="opacity of the colours in overlays, from 0 to 1 (default: 0.6)",
    )


def painting_from(
    arguments: argparse.Namespace, model: InferenceModel, num_labels: int
) -> Painting:
    """How the classes of ``model`` are drawn.

    Raises:
        UserError: the network has no such class, the palette cannot be used, or ``--alpha`` is out
            of range.
    """
    alpha = 0.6 if arguments.alpha is None else arguments.alpha
    if not 0 <= alpha <= 1:
        raise UserError(f"--alpha {alpha}: expected a number from 0 to 1")
    categories = model.label_names
    only = arguments.only and [_class(name, categories, num_labels) for name in arguments.only]
    palette = None
    if arguments.palette is not None:
        try:
            palette = read_palette(arguments.palette, categories, num_labels)
        except PaletteError as error:
            raise UserError(f"--palette {arguments.palette}: {error}") from error
    return painting_of(categories, num_labels, palette, only, alpha)


def _class(name: str, categories: tuple[str, ...] | None, num_labels: int) -> int:
    """The class with a name, without regard to case, or with a number."""
    names = [category.casefold() for category in categories or ()]
    if name.casefold() in names:
        return names.index(name.casefold())
    if name.isdecimal() and int(name) < num_labels:
        return int(name)
    known = f"a number from 0 to {num_labels - 1}"
    if categories is not None:
        known = f"{', '.join(categories)}, or {known}"
    raise UserError(f"--only {name}: no such class (expected {known})")
