"""Draw how an atrous convolution is cut into tiles: docs/figures/tiles.svg.

    python docs/figures/tiles.py

The tiles are those that the kernels run: ``_C.schedule.forward_tiles`` lists them for a 65x65 map,
as ASPP sees it at output stride 8 of a 513x513 image, and for each of ASPP's dilations.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from deeplab_fast import _C

FIGURE = Path(__file__).with_suffix(".svg")
SIZE, DILATIONS, BLOCK_M = 65, (12, 24, 36), 128
SCALE, GAP, LINE = 4, 40, 26  # SVG units: a pixel of the map, between panels, a line of text
PANEL = SIZE * SCALE
FIRST_ROW, SECOND_ROW = 2.5 * LINE, 4.5 * LINE + PANEL
# ColorBrewer's Blues, from 1 tap to 9.
BLUES = "#f7fbff #e3eef9 #d0e1f2 #b0d2e7 #82bbdb #59a1cf #3787c0 #1b6aaf #084d96".split()


def main() -> None:
    FIGURE.write_text(draw())


def draw() -> str:
    width = len(DILATIONS) * (PANEL + GAP)
    height = SECOND_ROW + PANEL + 1.5 * LINE
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height:g}" '
        'font-family="sans-serif" font-size="15" text-anchor="middle">',
        f"<title>Taps and tiles of 3x3 atrous convolutions on a {SIZE}x{SIZE} map</title>",
        f'<rect width="{width}" height="{height:g}" fill="white"/>',
        text(width / 2, LINE, "Taps inside the map, for each output pixel"),
        text(
            width / 2,
            SECOND_ROW - LINE / 2,
            f"Tiles of {BLOCK_M} pixels, and the taps that each runs",
        ),
    ]
    for i, dilation in enumerate(DILATIONS):
        pixels, taps, tiles = tile_list(dilation)
        x = i * (PANEL + GAP) + GAP / 2
        inside = taps_inside(taps)
        executed = sum(num_taps for *_, num_taps in tiles) * BLOCK_M
        dense = 9 * SIZE * SIZE
        parts += [
            text(x + PANEL / 2, FIRST_ROW - 10, f"dilation {dilation}"),
            *(
                area(x, FIRST_ROW, zone, len(taps_there), label=True)
                for taps_there, zone in groups(inside.flat, np.arange(SIZE * SIZE))
            ),
            *(
                area(x, SECOND_ROW, pixels[first : first + count], num_taps)
                for _, first, count, _, num_taps in tiles
            ),
            text(
                x + PANEL / 2,
                SECOND_ROW + PANEL + LINE,
                f"executed {executed / dense:.0%} of dense, needed {needed(inside) / dense:.0%}",
            ),
        ]
    return "\n".join([*parts, "</svg>"]) + "\n"


def tile_list(dilation: int) -> tuple[np.ndarray, np.ndarray, list[list[int]]]:
    """The rows of csrc's TileList: pixels [SIZE * SIZE], taps [9, 4] and tiles [num_tiles, 5]."""
    buffers = _C.schedule.forward_tiles((1, SIZE, SIZE), [(3, 3, dilation, dilation)], BLOCK_M)
    pixels, taps, tiles = (np.frombuffer(buffer, np.int32) for buffer in buffers)
    return pixels, taps.reshape(-1, 4), tiles.reshape(-1, 5).tolist()


def taps_inside(taps: np.ndarray) -> np.ndarray:
    """The set of taps (dy, dx) that read inside the map, for each output pixel: [SIZE, SIZE]."""
    offsets = {(int(dy), int(dx)) for dy, dx, *_ in taps}
    inside = np.empty((SIZE, SIZE), object)
    for y, x in np.ndindex(SIZE, SIZE):
        inside[y, x] = frozenset(
            (dy, dx) for dy, dx in offsets if 0 <= y + dy < SIZE and 0 <= x + dx < SIZE
        )
    return inside


def needed(inside: np.ndarray) -> int:
    return sum(map(len, inside.flat))


def groups(keys: Iterable, values: Sequence) -> list[tuple]:
    """(key, values with that key), in the order in which the keys come first."""
    found: dict = {}
    for key, value in zip(keys, values):
        found.setdefault(key, []).append(value)
    return list(found.items())


def area(x: float, y: float, pixels: Sequence[int], num_taps: int, label: bool = False) -> str:
    """The pixels of the map as one shape, coloured by ``num_taps``, with the number in it."""
    inside = np.zeros((SIZE, SIZE + 1), bool)
    rows, columns = np.divmod(np.asarray(pixels), SIZE)
    inside[rows, columns + 1] = True
    path = "".join(
        f"M{x + start * SCALE:g} {y + row * SCALE:g}h{(end - start) * SCALE}v{SCALE}"
        f"h{(start - end) * SCALE}z"
        for row, start, end in runs(inside)
    )
    shape = f'<path fill="{BLUES[num_taps - 1]}" d="{path}"/>' + outline(x, y, pixels)
    if label:
        middle_x, middle_y = columns.mean() + 0.5, rows.mean() + 0.5
        colour = "white" if num_taps > 5 else "black"
        shape += text(x + middle_x * SCALE, y + middle_y * SCALE + 5, str(num_taps), colour)
    return shape


def outline(x: float, y: float, pixels: Sequence[int]) -> str:
    """A line along the border of the pixels."""
    inside = np.zeros((SIZE + 2, SIZE + 2), bool)
    rows, columns = np.divmod(np.asarray(pixels), SIZE)
    inside[rows + 1, columns + 1] = True
    path = [
        f"M{x + start * SCALE:g} {y + row * SCALE:g}h{(end - start) * SCALE}"
        for row, start, end in runs(inside[:-1] != inside[1:])
    ]
    path += [
        f"M{x + column * SCALE:g} {y + start * SCALE:g}v{(end - start) * SCALE}"
        for column, start, end in runs((inside[:, :-1] != inside[:, 1:]).T)
    ]
    return f'<path stroke="#444" stroke-width="0.8" d="{"".join(path)}"/>'


def runs(mask: np.ndarray) -> list[tuple[int, int, int]]:
    """(row, start, end) of consecutive True in each row; columns count from the second one."""
    edges = np.diff(mask.astype(np.int8), prepend=0, append=0)
    starts, ends = np.argwhere(edges == 1), np.argwhere(edges == -1)
    return [(int(row), int(a) - 1, int(b) - 1) for (row, a), (_, b) in zip(starts, ends)]


def text(x: float, y: float, content: str, colour: str = "black") -> str:
    return f'<text x="{x:g}" y="{y:g}" fill="{colour}">{content}</text>'


if __name__ == "__main__":
    main()
