"""Targets of the cross entropy."""

from __future__ import annotations


def bad_target(value: int, classes: int, ignore_index: int) -> IndexError:
    """The error for a target that is neither a class nor ``ignore_index``."""
    return IndexError(
        f"target: {value} is not a class: expected 0 to {classes - 1}, or ignore_index "
        f"({ignore_index})"
    )
