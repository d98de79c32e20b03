"""Exceptions that end a run."""

from __future__ import annotations

from pathlib import Path


class TrainingError(ValueError):
    """An error that the user can correct. Its one-line message names the file or the argument."""


class Interrupted(Exception):
    """The run was stopped by a signal, and has saved its state."""


def diverged(problem: str, step: int, folder: Path) -> TrainingError:
    """The error for a run whose loss or weights are no longer finite."""
    return TrainingError(
        f"{problem} at update {step} (expected a number: try a lower learning rate or a longer "
        f"warm-up). {folder} still has what was saved before"
    )
