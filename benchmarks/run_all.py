"""Everything there is to measure on a machine, in pieces: correctness, ceilings, then benchmarks.

A piece is one benchmark in one dtype and batch size, with --full, in a process of its own. All
write to one folder, benchmarks/results/DEVICE-DATE: raw CSVs, plots, what each piece printed,
nvidia-smi's output. A piece that fails, hangs or runs out of time keeps what it had measured, and
the next one begins. The exit status is 1 if there was such a piece; the last line names them.
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

import harness
import torch

BENCHMARKS = Path(__file__).resolve().parent
TESTS = BENCHMARKS.parent / "tests"
CHOICES = "choices"  # first, so that the benchmarks after it show what was chosen
GPU_DTYPES = {
    CHOICES: ("bf16", "fp16", "tf32"),
    "model": ("bf16",),
    "aspp": ("bf16", "fp16", "tf32"),
    "upsample_argmax": ("bf16",),
    "upsample_cross_entropy": ("bf16",),
    "depthwise": ("bf16", "fp16", "fp32"),
}
CPU_DTYPES = {name: ("fp32",) for name in GPU_DTYPES if name != CHOICES}
CORRECTNESS = "correctness"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "pieces",
        nargs="*",
        metavar="PIECE",
        help="its name or the beginning of names; default: all",
    )
    parser.add_argument("--list", action="store_true", help="print the names of all pieces")
    parser.add_argument(
        "--limit", type=float, metavar="SECONDS", default=600, help="for each piece; default: 600"
    )
    parser.add_argument("--batch", nargs="+", type=int, default=[8, 1, 16], help="default: 8 1 16")
    parser.add_argument("--tiny", action="store_true", help="toy sizes: does it run at all")
    parser.add_argument("--output", type=Path, help="instead of benchmarks/results/DEVICE-DATE")
    args = parser.parse_args(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    all_pieces = pieces(device, args.batch, args.tiny)
    if args.list:
        print("\n".join(all_pieces))
        return
    for beginning in args.pieces:
        if not any(name.startswith(beginning) for name in all_pieces):
            parser.error(f"no piece begins with {beginning!r}: --list names them")
    folder = (args.output or BENCHMARKS / "results" / folder_name(device)).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    if shutil.which("nvidia-smi"):
        texts = [
            subprocess.run(["nvidia-smi", *option], capture_output=True, text=True).stdout
            for option in ([], ["-q"])
        ]
        harness.write_atomically(folder / "nvidia-smi.txt", "\n".join(texts).encode())
    chosen = {
        name: command
        for name, command in all_pieces.items()
        if not args.pieces or name.startswith(tuple(args.pieces))
    }
    failed = []
    for name, command in chosen.items():
        log = folder / f"{name}.txt"
        outcome = run(command + output_of(name, folder), log, args.limit)
        print(f"{name}: {outcome}", flush=True)
        if not outcome.startswith("done"):
            failed.append(name)
    plot_what_ran_out_of_time(folder)
    print(f"results are in {folder}")
    if failed:
        raise SystemExit(f"failed or not finished: {' '.join(failed)}")


def pieces(device: torch.device, batches: list[int], tiny: bool) -> dict[str, list[str]]:
    """Commands by name, in the order in which they run."""

    def script(name: str, *options: str) -> list[str]:
        size = ["--tiny"] if tiny else [] if name == CHOICES else ["--full"]
        file = "measure_choices.py" if name == CHOICES else f"bench_{name}.py"
        return [sys.executable, str(BENCHMARKS / file), *size, *options]

    found = {
        CORRECTNESS: [sys.executable, "-m", "pytest", "-q", str(TESTS / "test_cudnn_reference.py")],
        "ceilings": script("ceilings"),
    }
    benchmarks = GPU_DTYPES if device.type == "cuda" else CPU_DTYPES
    for dtype in ("bf16", "fp16", "tf32", "fp32"):
        for name in (name for name, dtypes in benchmarks.items() if dtype in dtypes):
            for batch in batches:
                options = "--dtype", dtype, "--batch", str(batch)
                found[f"{name}-{dtype}-{batch}"] = script(name, *options)
    return found


def output_of(name: str, folder: Path) -> list[str]:
    return [] if name == CORRECTNESS else ["--output", str(folder)]


def plot_what_ran_out_of_time(folder: Path) -> None:
    for file in folder.glob("*.csv"):
        picture = file.with_suffix(".png")
        if picture.exists() or file.name.startswith(CHOICES):
            continue
        with contextlib.suppress(ImportError):  # matplotlib may be absent; benchmarks say so
            import plot

            header, rows = plot.read(file)
            if rows:
                harness.write_atomically(picture, plot.png(header, rows))


def folder_name(device: torch.device) -> str:
    """h200-2026-01-31 for NVIDIA's."""
    name = harness.device_name(device).partition(",")[0].lower().replace("nvidia ", "")
    name = re.sub("[^a-z0-9]+", "-", name.replace("(r)", "")).strip("-")
    return f"{name}-{datetime.date.today()}"


def run(command: list[str], log: Path, limit: float) -> str:
    """The outcome of a command whose output goes to ``log``, in words.

    It starts in the folder of the tests, because ``python -m`` imports from the folder where it
    starts, and in the checkout's root that would be the package without its compiled modules.
    """
    start = time.monotonic()
    with log.open("wb") as file:
        process = subprocess.Popen(
            command, cwd=TESTS, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            status = process.wait(limit)
        except BaseException as stopped:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # and the compilers that it started
            process.wait()
            if not isinstance(stopped, subprocess.TimeoutExpired):
                raise
            return f"out of time after {limit:.0f} s, see {log}"
    seconds = time.monotonic() - start
    return f"done in {seconds:.0f} s" if status == 0 else f"failed, status {status}, see {log}"


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # and so ends the piece that it runs
    main()
