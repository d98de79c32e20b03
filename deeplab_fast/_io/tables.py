"""Tables in plain text."""

from __future__ import annotations

import textwrap
from collections.abc import Collection, Sequence


def aligned(
    rows: Sequence[Sequence[str]], right: Collection[int] = (), width: int | None = None
) -> str:
    """The rows as lines with aligned columns, two spaces apart.

    Args:
        rows: texts, as many in each row.
        right: indices of the columns whose texts end at the same place, such as numbers.
        width: where the last column is wrapped. It gets at least 30 characters. None: nowhere.

    >>> print(aligned([("layer", "GFLOP"), ("conv1", "1.2")], right={1}))
    layer  GFLOP
    conv1    1.2
    """
    *widths, _ = (max(map(len, column)) for column in zip(*rows))
    indent = sum(widths) + 2 * len(widths)
    lines: list[str] = []
    for *texts, last in rows:
        cells = [
            f"{text:>{length}}" if index in right else f"{text:<{length}}"
            for index, (text, length) in enumerate(zip(texts, widths))
        ]
        wrapped = [last] if width is None else textwrap.wrap(last, max(30, width - indent))
        lines.append("  ".join([*cells, *wrapped[:1]]).rstrip())
        lines += [" " * indent + text for text in wrapped[1:]]
    return "\n".join(lines)
