"""Tables of the colours that mean classes in label images."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from .errors import TrainingError
from .label_ids import IGNORE, Color
from .text_files import read_lines

_NUMBERS = r"(?P<red>\d+)[\s,;]+(?P<green>\d+)[\s,;]+(?P<blue>\d+)"
_NAME_FIRST = re.compile(rf"(?P<name>.+?)\s*[,;:\t]\s*{_NUMBERS}\s*(?:[,;:].*)?")
_COLOR_FIRST = re.compile(rf"{_NUMBERS}[\s,;:]+(?P<name>.+)")


def read_colors(path: str | Path) -> dict[Color, str]:
    """The name of the class of each colour in a text file, in the order of the lines.

    A line is ``name,red,green,blue`` (the class_dict.csv of Kaggle's CamVid and DeepGlobe),
    ``red green blue name`` (the label_colors.txt of CamVid) or ``name:red,green,blue::`` (the
    labelmap.txt of CVAT's "Segmentation mask"). The first line may be a heading. Lines that begin
    with # are left out. Colours with the same name are one class.

    Raises:
        TrainingError: the file is missing or malformed; the message names the line.

    >>> read_colors("class_dict.csv")
    {(64, 128, 64): 'Animal', (192, 0, 128): 'Archway'}
    """
    path = Path(path)
    colors: dict[Color, str] = {}
    lines = read_lines(path, "a text file, one name,red,green,blue a line")
    lines = [line for line in lines if not line.startswith("#")]
    for number, line in enumerate(lines):
        match = _NAME_FIRST.fullmatch(line) or _COLOR_FIRST.fullmatch(line)
        if match is None:
            if number == 0 and not re.search(r"\d", line):
                continue  # a heading
            raise TrainingError(f"{path}: {line!r} (expected name,red,green,blue)")
        color = int(match["red"]), int(match["green"]), int(match["blue"])
        if max(color) > 255 or color in colors:
            raise TrainingError(
                f"{path}: {line!r} (expected colours of 0 to 255, each with one class)"
            )
        colors[color] = match["name"].strip("\"'")
    if not colors:
        raise TrainingError(f"{path}: no colours (expected a name,red,green,blue a line)")
    return colors


def classes_of_colors(
    colors: str | Path | Mapping[Color, str], ignore: Sequence[int | str]
) -> tuple[tuple[str, ...], dict[Color, int]]:
    """Names of the classes and the ``label_ids`` of colours.

    Args:
        colors: a file for :func:`read_colors`, or its result.
        ignore: names in ``colors`` whose pixels are ignored; they are no classes.

    Raises:
        TrainingError: the file is missing or malformed, or ``ignore`` has another name.
    """
    table = colors if isinstance(colors, Mapping) else read_colors(colors)
    names = dict.fromkeys(table.values())
    if unknown := [name for name in ignore if name not in names]:
        raise TrainingError(
            f"ignore: expected names in `colors` ({', '.join(names)}), got {unknown[0]!r}"
        )
    classes = tuple(name for name in names if name not in ignore)
    labels = {name: label for label, name in enumerate(classes)}
    return classes, {color: labels.get(name, IGNORE) for color, name in table.items()}
