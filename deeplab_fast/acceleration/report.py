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
        modules: the paths of its modules, if it is several modules that ``name`` summarises.
    """

    name: str
    kind: str
    replacement: str | None
    reason: str = ""
    modules: tuple[str, ...] = ()

    @property
    def result(self) -> str:
        """The replacement, or the reason why there is none."""
        return f"kept: {self.reason}" if self.replacement is None else self.replacement

    def contains(self, layer: str) -> bool:
        """True for the path of a module of this part, or of a module in one."""
        if self.kind == "final resize":  # a call of the model's own code, not a module
            return False
        return any(
            not module or f"{layer}.".startswith(f"{module}.")
            for module in self.modules or (self.name,)
        )


class Report(NamedTuple):
    """The parts of a model that were replaced or could have been. ``str(report)`` is a table.

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
        """The entries with a replacement."""
        return [entry for entry in self.entries if entry.replacement is not None]

    def __str__(self) -> str:
        lines = [self._table()] if self.entries else ["no part can be replaced"]
        if self.before is not None:
            lines += ["", _flops_in_words(self, self.before)]
            if self.after is not None and (passes := _passes(self.before, self.after)):
                lines += ["", passes]
        if self.uncounted:
            lines += ["", self.uncounted]
        return "\n".join(lines)

    def _table(self) -> str:
        groups: dict[tuple[str, ...], list[int]] = {}
        for index, entry in enumerate(self.entries):
            key = entry.name.partition(".")[0], entry.kind, entry.result
            groups.setdefault(key, []).append(index)
        titles = [_names([self.entries[i].name for i in indices]) for indices in groups.values()]
        keys = [(title, kind, result) for title, (_, kind, result) in zip(titles, groups)]
        if self.before is None:
            return aligned([("part", "kind", "what runs"), *keys], width=WIDTH)

        total = sum(self.before.flops.values())
        flops, padding = self._by_entry(self.before.flops), self._by_entry(self.before.padding)
        rows = [("part", "kind", "GFLOP", "share", "padding", "what runs")]
        for (title, kind, result), indices in zip(keys, groups.values()):
            part, on_padding = (sum(counts[i] for i in indices) for counts in (flops, padding))
            numbers = ("", "", "")
            if part:
                padded = _percent(on_padding, part) if on_padding else ""
                numbers = _giga(part), _percent(part, total), padded
            rows.append((title, kind, *numbers, result))
        if rest := total - sum(flops):
            numbers = _giga(rest), _percent(rest, total), ""
            rows.append(("everything else", "", *numbers, "as before"))
        return aligned(rows, right={2, 3, 4}, width=WIDTH)

    def _by_entry(self, counts: Counter[str]) -> list[int]:
        """The sum of ``counts`` over each part. A layer counts for the innermost part with it."""
        sums = [0] * len(self.entries)
        for layer, number in counts.items():
            owners = [i for i, entry in enumerate(self.entries) if entry.contains(layer)]
            if owners:
                sums[max(owners, key=lambda i: len(self.entries[i].name))] += number
        return sums


def _names(names: list[str]) -> str:
    """The name of a part, or the common beginning of several names and their number."""
    paths = [name.split(".") for name in names]
    common = itertools.takewhile(lambda items: len(set(items)) == 1, zip(*paths))
    prefix = ".".join(items[0] for items in common) or "(model)"
    return f"{prefix} ({len(names)} parts)" if names[1:] else prefix


def _flops_in_words(report: Report, before: Cost) -> str:
    total = sum(before.flops.values())
    by_entry = zip(report.entries, report._by_entry(before.flops))
    replaced = sum(flops for entry, flops in by_entry if entry.replacement is not None)
    of_replaced = ""
    if replaced:
        of_replaced = (
            f", of which {_giga(replaced)} ({_percent(replaced, total)}) in replaced parts"
        )
    lines = [
        f"Forward pass of one image of {'x'.join(map(str, before.shape))}, multiplications of zero "
        "padding included:",
        f"  {_giga(total)} GFLOP in the original{of_replaced}",
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
            f"  {_giga(skipped)} GFLOP ({_percent(skipped, total)}) now multiply zero padding; the "
            "CUDA kernels skip most of these, oneDNN none"
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
    return f"{100 * part / whole:.1f}%"
