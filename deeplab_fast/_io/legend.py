"""Shares of the classes of an image, and a legend of them below a picture."""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from .overlay import Painting

_SYSTEM_FONTS = ("DejaVuSans.ttf", "NotoSans-Regular.ttf", "NotoSansCJK-Regular.ttc")
_LONGEST_NAME = 40  # characters; longer names are cut


def class_shares(labels: np.ndarray) -> list[tuple[int, float]]:
    """The classes in ``labels`` and their shares of the pixels, the largest first.

    >>> class_shares(np.array([[0, 3, 3, 3]]))
    [(3, 0.75), (0, 0.25)]
    """
    counts = np.bincount(labels.ravel())
    order = np.argsort(-counts, kind="stable")
    return [(int(label), float(counts[label] / labels.size)) for label in order if counts[label]]


def with_legend(picture: Image.Image, labels: np.ndarray, painting: Painting) -> Image.Image:
    """``picture`` above a strip with the colours, names and shares of its classes.

    The picture keeps its pixels and its place, at the top left. The strip is as wide as the
    picture, or wider if one name needs more. The text grows with the picture. A class that is not
    painted has a white field. A class has its number instead of a name in letters that no font has.
    """
    size = max(12, round(math.sqrt(picture.width * picture.height) / 40))
    shares = class_shares(labels)
    plain = ImageFont.load_default(size)  # has English letters only
    texts = [
        (f"{100 * share:.1f} %  ", *_drawable(painting.name(label), label, plain))
        for label, share in shares
    ]
    row, gap = round(1.5 * size), size // 2
    lengths = [plain.getlength(percent) + font.getlength(name) for percent, name, font in texts]
    column = row + gap + math.ceil(max(lengths)) + size
    columns = max(1, min(len(texts), picture.width // column))
    rows = -(-len(texts) // columns)
    width = max(picture.width, columns * column)
    result = Image.new("RGB", (width, picture.height + rows * row + 2 * gap), "white")
    result.paste(picture)
    draw = ImageDraw.Draw(result)
    present = np.array([label for label, _ in shares])
    drawn, numbers = painting.draws(present), painting.colour_numbers(present)
    for index, (percent, name, font) in enumerate(texts):
        left = index // rows * column + gap
        top = picture.height + gap + index % rows * row
        colour = tuple(painting.palette[numbers[index]].tolist()) if drawn[index] else "white"
        field = (left, top + row // 8, left + row, top + row - row // 8)
        draw.rectangle(field, fill=colour, outline="grey")
        left, middle = left + row + gap, top + row // 2
        draw.text((left, middle), percent, "black", plain, anchor="lm")
        left += round(plain.getlength(percent))
        draw.text((left, middle), name, "black", font, anchor="lm")
    return result


def _system_fonts(size: int) -> Iterator[Any]:
    for name in _SYSTEM_FONTS:
        with contextlib.suppress(OSError):  # it is not installed
            yield ImageFont.truetype(name, size)


def _drawable(name: str, label: int, plain: Any) -> tuple[str, Any]:
    """The name, or the number of a class whose name no font can draw, and the font for it."""
    name = " ".join(name.split())
    if len(name) > _LONGEST_NAME:
        name = f"{name[: _LONGEST_NAME - 3]}..."
    for font in itertools.chain([plain], _system_fonts(plain.size)):
        missing = bytes(font.getmask("\U0010ffff"))
        if all(bytes(font.getmask(letter)) != missing for letter in name if letter != " "):
            return name, font
    return f"class {label}", plain
