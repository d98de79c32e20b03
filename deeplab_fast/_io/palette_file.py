"""Colours of classes from a file: text, JSON, or an image with a palette."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .images import ImageError, decode
from .palette import voc_palette

_Row = tuple[str | None, tuple[int, ...]]  # name of a class, or None, and its colour


class PaletteError(ValueError):
    """A palette cannot be used. The message gives the reason in one line, without the path."""


def read_palette(path: Path, categories: Sequence[str] | None, num_classes: int) -> np.ndarray:
    """The colours in a file: uint8 [256, 3], completed with those of PASCAL VOC.

    The file is one of

    - text, one colour a line: ``R,G,B`` or ``NAME,R,G,B``, separated by commas, semicolons, tabs or
      spaces, with any header and comments (#), such as a class_dict.csv;
    - JSON: ``[[R, G, B], ...]``, ``{"NAME": [R, G, B], ...}`` or ``[{"name": NAME, "color": [R, G,
      B]}, ...]``;
    - an image with a palette, such as a label PNG.

    If every colour has a name, and the classes have, colours are assigned by name, without regard
    to case; otherwise in the order of the classes. Colours of no class are ignored.

    Raises:
        PaletteError: the file cannot be read, a colour is wrong, or a class has none.

    >>> read_palette(Path("class_dict.csv"), model.categories, 11)[3]
    array([128,  64, 128], dtype=uint8)
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise PaletteError(f"{error.strerror} (expected a readable file)") from error
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError:
        rows = _rows_of_image(path)
    else:
        rows = _rows_of_json(text) if text.lstrip()[:1] in ("[", "{") else _rows_of_text(text)
    palette = voc_palette()
    colours = _in_order(rows, categories, min(num_classes, 256))
    palette[: len(colours)] = colours
    return palette


def _in_order(
    rows: Sequence[_Row], categories: Sequence[str] | None, num_classes: int
) -> list[tuple[int, ...]]:
    """The colours in the order of the classes."""
    if categories is None or any(name is None for name, _ in rows):
        if len(rows) < num_classes:
            raise PaletteError(
                f"{len(rows)} colours (expected one for each of {num_classes} classes)"
            )
        return [colour for _, colour in rows[:256]]
    by_name = {(name or "").casefold(): colour for name, colour in rows}
    for label, name in enumerate(categories[:num_classes]):
        if name.casefold() not in by_name:
            raise PaletteError(f"no colour for class {label}, {name} (expected one for each class)")
    return [by_name[name.casefold()] for name in categories[:num_classes]]


def _rows_of_text(text: str) -> list[_Row]:
    rows: list[_Row] = []
    for number, line in enumerate(text.splitlines(), 1):
        line = line.strip()
        if not line or line.startswith("#"):
            continue
        separator = next((mark for mark in ",;\t" if mark in line), None)
        parts = [part.strip() for part in line.split(separator)]
        if not rows and not re.search(r"\d", line):
            continue  # a header
        name = (separator or " ").join(parts[:-3]).strip("\"'") or None
        rows.append((name, _colour(parts[-3:], f"line {number}", line)))
    return rows


def _rows_of_json(text: str) -> list[_Row]:
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise PaletteError(f"{error} (expected JSON)") from error
    if isinstance(content, dict):
        return [(name, _colour(value, name, value)) for name, value in content.items()]
    rows: list[_Row] = []
    for number, entry in enumerate(content, 1):
        is_object = isinstance(entry, dict)
        name = str(entry["name"]) if is_object and "name" in entry else None
        colour = entry.get("color") if is_object else entry
        rows.append((name, _colour(colour, f"entry {number}", entry)))
    return rows


def _rows_of_image(path: Path) -> list[_Row]:
    try:
        image = decode(path)
    except ImageError as error:
        raise PaletteError(str(error)) from None
    if image.mode != "P":
        raise PaletteError(f"an image of mode {image.mode} (expected one with a palette)")
    values = image.getpalette("RGB") or []
    return [(None, tuple(values[i : i + 3])) for i in range(0, len(values), 3)]


def _colour(values: Any, where: str, got: object) -> tuple[int, ...]:
    """Three integers from 0 to 255, as texts or numbers."""
    try:
        is_row = isinstance(values, (list, tuple)) and len(values) == 3
        if is_row and not any(isinstance(value, float) for value in values):  # also 0.0 to 1.0
            colour = tuple(int(value) for value in values)
            if all(0 <= value <= 255 for value in colour):
                return colour
    except (TypeError, ValueError):
        pass
    raise PaletteError(f"{where}: expected R, G, B from 0 to 255, got {got!r}")
