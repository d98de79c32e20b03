"""A function in a process of its own, so that a hang or a broken CUDA context costs only itself."""

from __future__ import annotations

import contextlib
import ctypes
import json
import multiprocessing
import os
import signal
import sys
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

_PR_SET_PDEATHSIG = 1  # <sys/prctl.h>
# Seconds for a process to be gone after SIGKILL. One that waits inside a driver may never be.
_GRACE = 5.0


def run_apart(
    function: Callable[..., Iterable[dict[str, Any]]],
    arguments: tuple[Any, ...],
    log: Path,
    limit: float,
) -> tuple[list[dict[str, Any]], str]:
    """The rows that ``function(*arguments)`` gave within ``limit`` seconds; what ended it, or "".

    The process is a fork, so that it need not import torch again: the caller must not have used
    CUDA, which does not survive a fork. What it prints goes to ``log``; what it started ends with
    it.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows"
        path.touch()
        child = multiprocessing.get_context("fork").Process(
            target=_child, args=(function, arguments, path, log)
        )
        child.start()
        try:
            child.join(limit)
            hangs = child.is_alive()
        finally:
            _kill(child)
        # A row that was cut off has no line end.
        rows = [json.loads(line) for line in path.read_text().split("\n")[:-1]]
    if child.is_alive():
        return rows, f"out of time after {limit:.0f} s, and it cannot be killed"
    if hangs:
        return rows, f"out of time after {limit:.0f} s"
    return rows, _end(child.exitcode or 0, log)


def _child(
    function: Callable[..., Iterable[dict[str, Any]]],
    arguments: tuple[Any, ...],
    path: Path,
    log: Path,
) -> None:
    os.setsid()  # a group of its own, which is killed as a whole
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)  # it must not outlive its parent
    output = log.open("w", buffering=1)  # open to the end, for the traceback
    os.dup2(output.fileno(), 1)
    os.dup2(output.fileno(), 2)
    sys.stdout = sys.stderr = output
    with path.open("w", buffering=1) as rows:
        for row in function(*arguments):
            rows.write(json.dumps(row) + "\n")


def _kill(child: multiprocessing.process.BaseProcess) -> None:
    """The process and what it started, which may be there although the process has ended."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid or 0, signal.SIGKILL)
    child.kill()  # it may not have made its group yet
    child.join(_GRACE)


def _end(exitcode: int, log: Path) -> str:
    """How a process ended, in words: of an exception its first line."""
    if exitcode < 0:
        return f"ended by {signal.Signals(-exitcode).name}"
    if exitcode == 0:
        return ""
    _, traceback, said = log.read_text(errors="replace").rpartition("Traceback (most recent call")
    lines = [line for line in said.splitlines()[1:] if line and not line.startswith(" ")]
    return lines[0] if traceback and lines else f"ended with status {exitcode}"
