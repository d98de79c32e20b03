"""Training logs: JSONL and, optionally, TensorBoard."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from .checkpoint import cannot_write, write
from .errors import TrainingError

NO_TENSORBOARD = (
    "TensorBoard is not installed, so this run writes no curves and pictures: "
    'pip install "deeplab-fast[train]"'
)


class Log:
    """``log.jsonl``, one JSON object with a ``step`` per line, and TensorBoard's event files.

    Args:
        folder: folder of the files.
        step: number of updates before this start of the run. Lines of later updates are dropped.
        evaluated: number of updates at the last evaluation before this start of the run. Scores of
            later evaluations are dropped.

    Raises:
        TrainingError: a file cannot be written, or is not a log; the message names it.
    """

    def __init__(self, folder: Path, step: int, evaluated: int) -> None:
        self.path = folder / "log.jsonl"
        lines = []
        if step and self.path.exists():
            for line in self.path.read_bytes().splitlines(keepends=True):
                if line.endswith(b"\n") and self._is_before(line, step, evaluated):
                    lines.append(line)
        write(self.path, b"".join(lines))
        self.file = open(self.path, "a")
        self.writer: Any = None
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            tqdm.write(NO_TENSORBOARD, file=sys.stderr)
        else:
            self.writer = SummaryWriter(str(folder), purge_step=step + 1)

    def _is_before(self, line: bytes, step: int, evaluated: int) -> bool:
        try:
            row = json.loads(line)
            return row["step"] <= (step if "loss" in row else evaluated)
        except (ValueError, KeyError, TypeError) as error:
            raise TrainingError(
                f"{self.path}: {line[:50]!r} (expected a JSON object with a step)"
            ) from error

    def scalars(self, step: int, **values: float | None) -> None:
        """Write values of update ``step``; TensorBoard groups names that begin with "val_"."""
        with self._writing():
            print(json.dumps({"step": step, **values}), file=self.file, flush=True)
            if self.writer is not None:
                for name, value in values.items():
                    if value is not None:
                        self.writer.add_scalar(name.replace("val_", "val/"), value, step)

    def picture(self, step: int, name: str, images: list[Image.Image]) -> None:
        """Write images of the same size, side by side, to TensorBoard."""
        if self.writer is not None:
            row = np.concatenate([np.asarray(image) for image in images], axis=1)
            with self._writing():
                self.writer.add_image(name, row, step, dataformats="HWC")

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise cannot_write(self.path, error) from error

    def close(self) -> None:
        """Close the files. Errors are ignored, because a failing write has raised one before."""
        with contextlib.suppress(OSError):
            self.file.close()
        if self.writer is not None:
            with contextlib.suppress(OSError):
                self.writer.close()
