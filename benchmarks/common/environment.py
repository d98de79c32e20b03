"""The device, the commit and the output files of a run."""

from __future__ import annotations

import argparse
import contextlib
import csv
import datetime
import io
import os
import platform
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

import deeplab_fast

ROOT = Path(__file__).resolve().parents[2]


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return f"{line.split(':')[1].strip()}, {torch.backends.cpu.get_cpu_capability()}"
    return platform.processor() or platform.machine()


def commit() -> str:
    """The checkout's commit, followed by "-dirty" if there are local changes.

    Without a usable git (no .git folder, git missing, files of another owner) this is the content
    of the file COMMIT in the checkout, or "-" if that is missing too.
    """
    if (ROOT / ".git").exists():
        with contextlib.suppress(OSError, subprocess.CalledProcessError):
            return subprocess.run(
                ["git", "describe", "--always", "--dirty", "--exclude=*"],
                cwd=ROOT, capture_output=True, text=True, check=True,
            ).stdout.strip()  # fmt: skip
    file = ROOT / "COMMIT"
    return file.read_text().strip() if file.exists() else "-"


def run_header(benchmark: str, device: torch.device) -> dict[str, str]:
    """Description of a run: the first lines of its CSV file."""
    now = datetime.datetime.now().astimezone()
    return {
        "benchmark": benchmark,
        "device": device_name(device),
        "threads": str(torch.get_num_threads()),
        "backends": " ".join(deeplab_fast.available_backends(device)),
        "versions": f"deeplab_fast {deeplab_fast.__version__}, torch {torch.__version__}, "
        f"python {platform.python_version()}",
        "commit": commit(),
        "date": now.isoformat(timespec="seconds"),
    }


def folder(text: str) -> Path:
    """The folder that a command-line option names. It need not exist."""
    path = Path(text)
    if path.exists() and not path.is_dir():
        raise argparse.ArgumentTypeError(f"expected a folder, got {text}")
    return path


def csv_path(folder: Path, name: str) -> Path:
    return folder / f"{name}-{datetime.datetime.now():%Y%m%d-%H%M%S}.csv"


def csv_text(
    header: Mapping[str, str], columns: Sequence[str], rows: Iterable[Mapping[str, Any]]
) -> bytes:
    """A CSV file that begins with the lines "# key: value" of ``header``."""
    text = io.StringIO()
    for key, value in header.items():
        text.write(f"# {key}: {value}\n")
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()})
    return text.getvalue().encode()


def write_atomically(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_bytes(content)
    temporary.replace(path)


def first_line(error: Exception) -> str:
    """The type of an exception and the first line of its message."""
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
