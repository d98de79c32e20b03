"""Shares of the classes of an image, and a legend of them below a picture."""

from __future__ import annotations

import math

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from .overlay import Painting

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
    painted has a white field.
    """
    size = max(12, round(math.sqrt(picture.width * picture.height) / 40))
    font = ImageFont.load_default(size)
    shares = class_shares(labels)
    texts = [f"{100 * share:.1f} %  {_short(painting.name(label))}" for label, share in shares]
    row, gap = round(1.5 * size), size // 2
    column = row + gap + math.ceil(max(font.getlength(text) for text in texts)) + size
    columns = max(1, min(len(texts), picture.width // column))
    rows = -(-len(texts) // columns)
    width = max(picture.width, columns * column)
    result = Image.new("RGB", (width, picture.height + rows * row + 2 * gap), "white")
    result.paste(picture)
    draw = ImageDraw.Draw(result)
    drawn = painting.draws(np.array([label for label, _ in shares]))
    numbers = painting.colour_numbers(np.array([label for label, _ in shares]))
    for index, text in enumerate(texts):
        left = index // rows * column + gap
        top = picture.height + gap + index % rows * row
        colour = tuple(painting.palette[numbers[index]].tolist()) if drawn[index] else "white"
        field = (left, top + row // 8, left + row, top + row - row // 8)
        draw.rectangle(field, fill=colour, outline="grey")
        draw.text((left + row + gap, top + row // 2), text, "black", font, anchor="lm")
    return result


def _short(name: str) -> str:
    return name if len(name) <= _LONGEST_NAME else f"{name[: _LONGEST_NAME - 3]}..."
