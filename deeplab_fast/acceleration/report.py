"""Table of what was replaced in a model, what was not, and why."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

from .._io.tables import aligned
from .counting import PASSES, Cost

WIDTH = 100


class Entry(NamedTuple):
    """A part of a model.

    Attributes:
        name: its path in the model, "" for the model itself.
        kind: what it is, such as "ASPP" or "depthwise convolution".
        replacement: what runs instead, or None.
        reason: why nothing was replaced; "" if something was.
    """

    name: str
    kind: str
    replacement: str | None
    reason: str = ""

    @property
    def result(self) -> str:
        return f"kept: {self.reason}" if self.replacement is None else self.replacement

    def contains(self, layer: str) -> bool:
        """True for the name of the part itself and of a module in it."""
        return not self.name or f"{layer}.".startswith(f"{self.name}.")


class Report(NamedTuple):
    """The parts of a model that matter, in the model's order. ``str()`` of it is a table.

    Attributes:
        entries: the parts.
        before: what the original computes for one image, or None if it was not counted.
        after: what the accelerated model computes.
        uncounted: why something was not counted.
    """

    entries: list[Entry]
    before: Cost | None = None
    after: Cost | None = None
    uncounted: str = ""

    def replaced(self) -> list[Entry]:
        return [entry for entry in self.entries if entry.replacement is not None]

    def __str__(self) -> str:
        lines = [self._table()] if self.entries else ["no part that could be replaced"]
        if self.before is not None:
            lines += ["", _flops_in_words(self, self.before)]
            if self.after is not None and (passes := _passes(self.before, self.after)):
                lines += ["", passes]
        if self.uncounted:
            lines += ["", self.uncounted]
        return "\n".join(lines)

    def _table(self) -> str:
        groups: dict[tuple[str, ...], list[Entry]] = {}
        for entry in self.entries:
            key = entry.name.partition(".")[0], entry.kind, entry.result
            groups.setdefault(key, []).append(entry)
        rows = [
            (_names(entries), kind, *self._shares(entries), result)
            for (_, kind, result), entries in groups.items()
        ]
        header = ("part", "kind", "GFLOP", "share", "padding", "what runs")
        if self.before is None:
            return aligned([(*row[:2], row[-1]) for row in (header, *rows)], width=WIDTH)
        rest = sum(self.before.flops.values()) - _sum(self.before.flops, self.entries)
        if rest:
            rows.append(("everything else", "", *self._columns(rest, 0), "as before"))
        return aligned([header, *rows], right={2, 3, 4}, width=WIDTH)

    def _shares(self, entries: list[Entry]) -> tuple[str, str, str]:
        if self.before is None:
            return "", "", ""
        flops, padding = (_sum(counts, entries) for counts in self.before[1:3])
        return self._columns(flops, padding)

    def _columns(self, flops: int, padding: int) -> tuple[str, str, str]:
        total = sum(self.before.flops.values()) if self.before else 0
        return _giga(flops), _percent(flops, total), _percent(padding, flops) if padding else ""


def _names(entries: list[Entry]) -> str:
    """The name of a part, or what the names of several parts begin with, and how many they are."""
    names = [entry.name.split(".") for entry in entries]
    common = itertools.takewhile(lambda items: len(set(items)) == 1, zip(*names))
    prefix = ".".join(items[0] for items in common) or "(model)"
    return f"{prefix} ({len(entries)} parts)" if entries[1:] else prefix


def _sum(counts: Counter[str], entries: list[Entry]) -> int:
    """The sum of what was counted in the modules of these parts."""
    return sum(
        number
        for layer, number in counts.items()
        if any(entry.contains(layer) for entry in entries)
    )


def _flops_in_words(report: Report, before: Cost) -> str:
    total = sum(before.flops.values())
    replaced = _sum(before.flops, report.replaced())
    of_replaced = f", of which {_giga(replaced)} ({_percent(replaced, total)}) in replaced parts"
    lines = [
        f"Forward pass of one image of {'x'.join(map(str, before.shape))}, with the products with "
        "padding:",
        f"  {_giga(total)} GFLOP in the original{of_replaced if report.replaced() else ''}",
    ]
    if report.after is not None:
        lines += _savings(report, total, report.after)
    return "\n".join(lines)


def _savings(report: Report, total: int, after: Cost) -> Iterator[str]:
    saved = total - sum(after.flops.values())
    if abs(saved) > total / 10_000:
        has_aspp = any("ASPP" in entry.kind for entry in report.replaced())
        why = " (ASPP projects its pooled branch once per image)" if has_aspp and saved > 0 else ""
        change = "fewer" if saved > 0 else "more"
        yield f"  {_giga(abs(saved))} GFLOP ({_percent(abs(saved), total)}) {change} now{why}"
    if skipped := sum(after.skipped.values()):
        yield (
            f"  {_giga(skipped)} GFLOP ({_percent(skipped, total)}) of products with padding that "
            "the CUDA kernels skip; oneDNN, on a CPU, does not"
        )


def _passes(before: Cost, after: Cost) -> str:
    rows = [
        (name, _mega(before.traffic[name]), _mega(after.traffic[name]))
        for name in PASSES
        if before.traffic[name] != after.traffic[name]
    ]
    if not rows:
        return ""
    header = ("MB read and written by", "original", "now")
    return aligned([header, *rows], right={1, 2})


def _giga(number: int) -> str:
    return f"{number / 1e9:.2f}"


def _mega(number: int) -> str:
    return f"{number / 1e6:.1f}"


def _percent(part: int, whole: int) -> str:
    return f"{100 * part / whole:.1f}%" if whole else ""
