"""What stops a run."""

from __future__ import annotations


class TrainingError(ValueError):
    """Something the user can put right, in one line that names the file or the argument."""


class Interrupted(Exception):
    """The run was asked to stop, and saved what it had."""
