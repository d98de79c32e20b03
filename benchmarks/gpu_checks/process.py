"""Run a function in a process of its own, to survive hangs, crashes and broken CUDA contexts."""

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
# Seconds to wait for a process to end after SIGKILL; one that waits inside a driver may never end.
_GRACE = 5.0


def run_in_subprocess(
    function: Callable[..., Iterable[dict[str, Any]]],
    arguments: tuple[Any, ...],
    log: Path,
    limit: float,
) -> tuple[list[dict[str, Any]], str]:
    """The rows that ``function(*arguments)`` yields within ``limit`` seconds, and how it failed.

    The second result is "" if the function returned. The process is forked, to save importing torch
    again, so the caller must not have used CUDA, which does not survive a fork. Its output goes to
    ``log``. Processes that it starts are killed with it.
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
            is_late = child.is_alive()
        finally:
            _kill(child)
        # An incomplete last row has no line end.
        rows = [json.loads(line) for line in path.read_text().split("\n")[:-1]]
    if child.is_alive():
        return rows, f"out of time after {limit:.0f} s, and it cannot be killed"
    if is_late:
        return rows, f"out of time after {limit:.0f} s"
    return rows, _end(child.exitcode or 0, log)


def _child(
    function: Callable[..., Iterable[dict[str, Any]]],
    arguments: tuple[Any, ...],
    path: Path,
    log: Path,
) -> None:
    os.setsid()  # a process group of its own, killed as a whole
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)  # end with the parent
    output = log.open("w", buffering=1)  # stays open for the traceback
    os.dup2(output.fileno(), 1)
    os.dup2(output.fileno(), 2)
    sys.stdout = sys.stderr = output
    with path.open("w", buffering=1) as rows:
        for row in function(*arguments):
            rows.write(json.dumps(row) + "\n")


def _kill(child: multiprocessing.process.BaseProcess) -> None:
    """Kill a process, if it still runs, and the processes that it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid or 0, signal.SIGKILL)
    child.kill()  # it may not have created its group yet
    child.join(_GRACE)


def _end(exitcode: int, log: Path) -> str:
    """How a process failed: the first line of its exception, its signal or its status; or ""."""
    if exitcode < 0:
        return f"ended by {signal.Signals(-exitcode).name}"
    if exitcode == 0:
        return ""
    _, traceback, text = log.read_text(errors="replace").rpartition("Traceback (most recent call")
    lines = [line for line in text.splitlines()[1:] if line and not line.startswith(" ")]
    return lines[0] if traceback and lines else f"ended with status {exitcode}"
