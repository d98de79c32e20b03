"""Run everything there is to measure on a machine: correctness, ceilings, then all benchmarks.

The work is split into pieces: a piece is one benchmark in one dtype and batch size, with --full, or
one model of bench_accelerate at batch 1, in a process of its own. All pieces write to one folder,
benchmarks/results/DEVICE-DATE: CSV files, plots, their output and that of nvidia-smi. If a piece
fails or exceeds its time limit, its results so far are kept and the next piece runs. The exit
status is then 1, and the last line names it.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch
from common import networks, result_files
from common.environment import device_name, write_atomically

BENCHMARKS = Path(__file__).resolve().parent
TESTS = BENCHMARKS.parent / "tests"
DISPATCH_TABLE = "dispatch_table"  # first, because the other benchmarks dispatch by it
HOST = "host"
ACCELERATE = "accelerate"
WITHOUT_CASES = DISPATCH_TABLE, HOST  # they have no plot and no --full
GPU_DTYPES = {
    DISPATCH_TABLE: ("bf16", "fp16", "tf32"),
    "model": ("bf16",),
    "aspp": ("bf16", "fp16", "tf32"),
    "upsample_argmax": ("bf16",),
    "upsample_cross_entropy": ("bf16",),
    "depthwise": ("bf16", "fp16", "fp32"),
}
CPU_DTYPES = {name: ("fp32",) for name in GPU_DTYPES if name != DISPATCH_TABLE}
CORRECTNESS = "correctness"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "pieces",
        nargs="*",
        metavar="PIECE",
        help="the name of a piece, or the prefix of several; default: all",
    )
    parser.add_argument("--list", action="store_true", help="print the names of all pieces")
    parser.add_argument(
        "--limit",
        type=float,
        metavar="SECONDS",
        default=600,
        help="time limit of each piece; default: 600",
    )
    parser.add_argument("--batch", nargs="+", type=int, default=[8, 1, 16], help="default: 8 1 16")
    parser.add_argument("--tiny", action="store_true", help="toy sizes, as a smoke test")
    parser.add_argument("--output", type=Path, help="instead of benchmarks/results/DEVICE-DATE")
    args = parser.parse_args(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    all_pieces = pieces(device, args.batch, args.tiny)
    if args.list:
        print("\n".join(all_pieces))
        return
    for prefix in args.pieces:
        if not any(name.startswith(prefix) for name in all_pieces):
            parser.error(f"PIECE: expected a prefix of a name in --list, got {prefix!r}")
    folder = (args.output or BENCHMARKS / "results" / folder_name(device)).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    if shutil.which("nvidia-smi"):
        texts = [
            subprocess.run(["nvidia-smi", *option], capture_output=True, text=True).stdout
            for option in ([], ["-q"])
        ]
        write_atomically(folder / "nvidia-smi.txt", "\n".join(texts).encode())
    selected = {
        name: command
        for name, command in all_pieces.items()
        if not args.pieces or name.startswith(tuple(args.pieces))
    }
    failed = []
    for name, command in selected.items():
        log = folder / f"{name}.txt"
        outcome = run(command + output_option(name, folder), log, args.limit)
        print(f"{name}: {outcome}", flush=True)
        if not outcome.startswith("done"):
            failed.append(name)
    plot_unfinished(folder)
    print(f"results are in {folder}")
    if failed:
        raise SystemExit(f"failed or out of time: {' '.join(failed)}")


def pieces(device: torch.device, batches: list[int], tiny: bool) -> dict[str, list[str]]:
    """Commands by name, in the order in which they run."""

    def script(name: str, *options: str) -> list[str]:
        has_full = name not in WITHOUT_CASES
        size = ["--tiny"] if tiny else ["--full"] if has_full else []
        file = "tune_dispatch_table.py" if name == DISPATCH_TABLE else f"bench_{name}.py"
        return [sys.executable, str(BENCHMARKS / file), *size, *options]

    commands = {
        CORRECTNESS: [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            str(TESTS / "ops" / "test_cudnn_reference.py"),
        ],
        "ceilings": script("ceilings"),
    }
    benchmarks = GPU_DTYPES if device.type == "cuda" else CPU_DTYPES
    for dtype in ("bf16", "fp16", "tf32", "fp32"):
        for name in (name for name, dtypes in benchmarks.items() if dtype in dtypes):
            for batch in batches:
                options = "--dtype", dtype, "--batch", str(batch)
                commands[f"{name}-{dtype}-{batch}"] = script(name, *options)
    for model in networks.TINY if tiny else networks.BUILD:
        name = f"{ACCELERATE}-{model.replace(' ', '-')}"
        commands[name] = script(ACCELERATE, "--only", model, "--batch", "1")
    commands[HOST] = script(HOST)
    return commands


def output_option(name: str, folder: Path) -> list[str]:
    return [] if name == CORRECTNESS else ["--output", str(folder)]


def plot_unfinished(folder: Path) -> None:
    """Plot the CSV files of pieces that did not reach their end."""
    for file in folder.glob("*.csv"):
        image = file.with_suffix(".png")
        if image.exists() or file.name.startswith(WITHOUT_CASES):
            continue
        with contextlib.suppress(ImportError):  # without matplotlib, as the benchmarks report
            from common.plot import png

            header, rows = result_files.read(file)
            if rows:
                write_atomically(image, png(header, rows))


def folder_name(device: torch.device) -> str:
    """DEVICE-DATE, for example h200-2026-01-31."""
    name = device_name(device).partition(",")[0].lower().replace("nvidia ", "")
    name = re.sub("[^a-z0-9]+", "-", name.replace("(r)", "")).strip("-")
    return f"{name}-{datetime.date.today()}"


def run(command: list[str], log: Path, limit: float) -> str:
    """Run a command with its output in ``log`` and return the outcome in words.

    The working directory is tests/, because ``python -m`` imports from there, and the root of the
    checkout has the package without its compiled modules.
    """
    start = time.monotonic()
    with log.open("wb") as file:
        process = subprocess.Popen(
            command, cwd=TESTS, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            status = process.wait(limit)
        except BaseException as error:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # including compilers that it started
            process.wait()
            if not isinstance(error, subprocess.TimeoutExpired):
                raise
            return f"out of time after {limit:.0f} s, see {log}"
    seconds = time.monotonic() - start
    return f"done in {seconds:.0f} s" if status == 0 else f"failed, status {status}, see {log}"


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # which ends the running piece too
    main()
