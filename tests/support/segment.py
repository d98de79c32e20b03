"""Photos, and runs of ``deeplab-fast segment`` on them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from deeplab_fast.cli import main


def photo(width: int = 96, height: int = 72) -> Image.Image:
    """An image of random blocks."""
    pixels = np.random.default_rng(0).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((width, height), Image.Resampling.NEAREST)


def segment(capsys, *arguments: object) -> tuple[int, str, list[str]]:
    """Exit status, stdout and the lines of stderr of ``deeplab-fast segment ARGUMENTS``.

    It runs on the CPU by default: other devices round otherwise, and labels are compared with those
    of the CPU.
    """
    status = main(["segment", "--device", "cpu", *map(str, arguments)])
    out, err = capsys.readouterr()
    assert all(line.startswith("deeplab-fast: ") for line in err.splitlines()), err
    return status, out, err.splitlines()


def files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
