"""The picture of a run: one panel of bars per case."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

_MAX_PIXELS = 2**16 - 1  # of a side, matplotlib's renderer
_COLORS = {"ours": "#1b7837", "baseline": "#9e9e9e"}


def png(header: dict[str, str], rows: list[dict[str, Any]]) -> bytes:
    """A PNG with the median time of every variant, ours coloured, grouped by case."""
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["case"], row["batch"], row["dtype"]), []).append(row)
    heights = [len(group) + 1.2 for group in groups.values()]
    figure = Figure(figsize=(9, 1.0 + 0.28 * sum(heights)), layout="constrained")
    panels = figure.subplots(len(groups), 1, squeeze=False, height_ratios=heights)[:, 0]
    for panel, ((case, batch, dtype), group) in zip(panels, groups.items()):
        bars = panel.barh(
            [row["variant"] for row in group],
            [row["median_ms"] for row in group],
            color=[_COLORS[row["kind"]] for row in group],
        )
        panel.bar_label(bars, [_label(row) for row in group], padding=3, fontsize=8)
        panel.invert_yaxis()
        panel.margins(x=0.2)
        panel.set_title(f"{case}, batch {batch}, {dtype}", fontsize=9, loc="left")
        panel.tick_params(labelsize=8)
        panel.spines[["top", "right"]].set_visible(False)
    panels[-1].set_xlabel("median time, ms (and speed-up over the best baseline)", fontsize=8)
    figure.suptitle(
        f"{header['benchmark']}\n{header['device']}, {header['threads']} threads\n"
        f"{header['versions']}, commit {header['commit']}, {header['date'][:10]}",
        fontsize=8,
    )
    content = io.BytesIO()
    dpi = min(120, _MAX_PIXELS // figure.get_figheight())
    figure.savefig(content, format="png", dpi=dpi)
    return content.getvalue()


def read(file: Path) -> tuple[dict[str, str], list[dict[str, Any]]]:
    """Header and rows of a run, from its CSV."""
    lines = file.read_text().splitlines()
    comments = [line for line in lines if line.startswith("#")]
    rows: list[dict[str, Any]] = list(csv.DictReader(lines[len(comments) :]))
    for row in rows:
        for column in ("median_ms", "speedup"):
            row[column] = float(row[column]) if row[column] else None
    return dict(line[2:].partition(": ")[::2] for line in comments), rows


def _label(row: dict[str, Any]) -> str:
    speedup = "" if row["speedup"] is None else f"  ({row['speedup']:.2f}x)"
    time = row["median_ms"]
    return f"{time:.0f} ms{speedup}" if time >= 100 else f"{time:.3g} ms{speedup}"
