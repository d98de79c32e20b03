"""Classes of the values in label files: numbers, or colours packed into numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from .errors import TrainingError

IGNORE = 255  # label of pixels that count neither in training nor in evaluation

_MAX_VALUE = 2**24 - 1  # the largest packed colour

Color = tuple[int, int, int]


def pack_color(color: tuple[int, int, int]) -> int:
    """A colour (red, green, blue) as one number.

    >>> pack_color((0, 1, 2))
    258
    """
    red, green, blue = color
    return red << 16 | green << 8 | blue


def unpack_color(value: int) -> tuple[int, int, int]:
    """The colour (red, green, blue) that :func:`pack_color` made a number.

    >>> unpack_color(258)
    (0, 1, 2)
    """
    return value >> 16 & 255, value >> 8 & 255, value & 255


def class_table(
    label_ids: Mapping[int, int] | Mapping[Color, int] | None, num_classes: int, by_color: bool
) -> np.ndarray:
    """Class of each value in label files: int16, -1 for values that are no class.

    Args:
        label_ids: class of each number, or of each colour; None for number i of class i.
        num_classes: number of classes.
        by_color: ``label_ids`` has colours. The table is then indexed by packed colours.

    Raises:
        TrainingError: a key or a class is out of range.
    """
    if label_ids is None:
        ids: Mapping[int, int] = dict(enumerate(range(num_classes)))
    else:
        ids = {_packed(key, by_color): label for key, label in label_ids.items()}
    if not by_color:
        ids = {IGNORE: IGNORE, **ids}
    for value, label in ids.items():
        if label not in (*range(num_classes), IGNORE):
            raise TrainingError(
                f"label_ids: expected classes of 0 to {num_classes - 1} or {IGNORE}, got "
                f"{unpack_color(value) if by_color else value}: {label}"
            )
    table = np.full(max(255, *ids) + 1, -1, dtype=np.int16)
    table[list(ids)] = list(ids.values())
    return table


def _packed(key: int | Color, by_color: bool) -> int:
    channels = key if isinstance(key, tuple) else ()
    if by_color and len(channels) == 3 and all(0 <= channel <= 255 for channel in channels):
        return pack_color(channels)
    if isinstance(key, (int, np.integer)) and 0 <= key <= _MAX_VALUE:
        return int(key)
    raise TrainingError(
        f"label_ids: expected numbers of 0 to {_MAX_VALUE} or colours (red, green, blue) of 0 to "
        f"255 each, got {key!r}"
    )


def ranges(values: Sequence[int]) -> str:
    """Sorted integers as text, with ranges.

    >>> ranges([0, 1, 2, 7])
    '0-2, 7'
    """
    runs: list[list[int]] = []
    for value in values:
        if runs and value == runs[-1][-1] + 1:
            runs[-1].append(value)
        else:
            runs.append([value])
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)
