"""Exceptions that end a run."""

from __future__ import annotations

from pathlib import Path


class TrainingError(ValueError):
    """An error that the user can correct; its one line names the file or the argument."""


class Interrupted(Exception):
    """The run was asked to stop, and has saved its state."""


def diverged(problem: str, step: int, folder: Path) -> TrainingError:
    """The error of a run whose loss or weights are no longer finite."""
    return TrainingError(
        f"{problem} at update {step} (expected a number: try a lower learning rate or a longer "
        f"warm-up). {folder} keeps what was saved before"
    )
