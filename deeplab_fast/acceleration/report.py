"""Table of what was replaced in a model, what was not, and why."""

from __future__ import annotations

from typing import NamedTuple


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


class Report(NamedTuple):
    """The parts of a model that matter, in the model's order."""

    entries: list[Entry]

    def replaced(self) -> list[Entry]:
        return [entry for entry in self.entries if entry.replacement is not None]

    def __str__(self) -> str:
        return "\n".join(
            f"{name or '(model)'}  {kind}  {replacement or 'kept: ' + reason}"
            for name, kind, replacement, reason in self.entries
        )
