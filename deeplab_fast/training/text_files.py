"""Text files that users write: class names, lists of images, tables of colours."""

from __future__ import annotations

import codecs
from pathlib import Path

from .errors import TrainingError


def read_lines(path: Path, expected: str) -> list[str]:
    """The lines of a text file, without blank ones and outer spaces.

    The encoding is UTF-8, or UTF-16 with a byte order mark; line ends may be those of Windows.

    Args:
        path: the file.
        expected: what the file should be, for the error message.

    Raises:
        TrainingError: the file cannot be read; the message names it.
    """
    try:
        content = path.read_bytes()
        is_utf16 = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
        text = content.decode("utf-16" if is_utf16 else "utf-8-sig")
    except (OSError, UnicodeError) as error:
        why = getattr(error, "strerror", None) or f"not UTF-8 ({error})"
        raise TrainingError(f"{path}: {why} (expected {expected})") from error
    if "\0" in text:
        raise TrainingError(f"{path}: no text in UTF-8 (expected {expected})")
    return [line.strip() for line in text.splitlines() if line.strip()]
