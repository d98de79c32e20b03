"""Errors that the command line shows in one line, without a traceback."""

from __future__ import annotations


class UserError(Exception):
    """An error that the user can correct. Its message is shown unchanged."""


def reason(error: BaseException) -> str:
    """The message of an error in one line, without the path that an OSError appends."""
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return " ".join(text.split()) or type(error).__name__
