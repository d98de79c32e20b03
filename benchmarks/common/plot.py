"""Plot a run: one panel of bars per case."""

from __future__ import annotations

import io
from typing import Any

from matplotlib.figure import Figure

_MAX_PIXELS = 2**16 - 1  # limit of matplotlib's renderer for one side
_COLORS = {"ours": "#1b7837", "baseline": "#9e9e9e"}


def png(header: dict[str, str], rows: list[dict[str, Any]]) -> bytes:
    """A PNG of the median time of every variant, grouped by case; ours are green.

    ``rows`` have the columns of harness.COLUMNS, as numbers or as text read from a CSV file.
    """
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["case"], row["batch"], row["dtype"]), []).append(row)
    heights = [len(group) + 1.2 for group in groups.values()]
    figure = Figure(figsize=(9, 1.0 + 0.28 * sum(heights)), layout="constrained")
    panels = figure.subplots(len(groups), 1, squeeze=False, height_ratios=heights)[:, 0]
    for panel, ((case, batch, dtype), group) in zip(panels, groups.items()):
        bars = panel.barh(
            [row["variant"] for row in group],
            [float(row["median_ms"]) for row in group],
            color=[_COLORS[row["kind"]] for row in group],
        )
        panel.bar_label(bars, [_label(row) for row in group], padding=3, fontsize=8)
        panel.invert_yaxis()
        panel.margins(x=0.2)
        panel.set_title(f"{case}, batch {batch}, {dtype}", fontsize=9, loc="left")
        panel.tick_params(labelsize=8)
        panel.spines[["top", "right"]].set_visible(False)
    panels[-1].set_xlabel("median time in ms (speedup over the fastest baseline)", fontsize=8)
    figure.suptitle(
        f"{header['benchmark']}\n{header['device']}, {header['threads']} threads\n"
        f"{header['versions']}, commit {header['commit']}, {header['date'][:10]}",
        fontsize=8,
    )
    content = io.BytesIO()
    dpi = min(120, _MAX_PIXELS // figure.get_figheight())
    figure.savefig(content, format="png", dpi=dpi)
    return content.getvalue()


def _label(row: dict[str, Any]) -> str:
    speedup = f"  ({float(row['speedup']):.2f}x)" if row["speedup"] else ""
    time = float(row["median_ms"])
    return f"{time:.0f} ms{speedup}" if time >= 100 else f"{time:.3g} ms{speedup}"
