"""What the command line tells its user instead of a traceback."""

from __future__ import annotations


class UserError(Exception):
    """Something the user can put right; the message is shown as it is."""


def reason(error: BaseException) -> str:
    """One line saying what ``error`` is about, without the path that an OSError repeats."""
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return " ".join(text.split()) or type(error).__name__
