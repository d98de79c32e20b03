"""Check every kernel on the GPU at hand against PyTorch and, with --time, time it.

A family is one op on one backend. Each is checked in a process of its own, so that one that hangs
or crashes does not stop the others: with a tiny shape and with that of PASCAL VOC at output stride
8, batch 8, against PyTorch in fp32 on the same GPU. What passes can then be timed beside cuDNN and
eager PyTorch, and run under NVIDIA's compute-sanitizer. report.md and CSV files are written after
every row. Exit status: 0 if nothing failed; 1 if something failed or was not run, or if nothing
passed; 2 without a GPU.

With --backend emulated the tiny shapes run on a CPU. See benchmarks/README.md.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from pathlib import Path

import gpu_tools

FAMILY_LIMIT = 90.0


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--time", action="store_true", help="time the families that pass")
    parser.add_argument(
        "--sanitize",
        nargs="+",
        choices=gpu_tools.SANITIZERS,
        default=[],
        help="run the families that pass under compute-sanitizer, with tiny shapes",
    )
    parser.add_argument(
        "--variants",
        action="store_true",
        help="compare the two versions of the Hopper convolution",
    )
    parser.add_argument(
        "--families", nargs="+", default=[], metavar="NAME", help="names or their beginnings"
    )
    parser.add_argument(
        "--backend", choices=["emulated"], help="run the tiny shapes on the CPU, in the emulator"
    )
    parser.add_argument("--limit", type=float, metavar="SECONDS", help="for the whole run")
    parser.add_argument(
        "--family-limit",
        type=float,
        default=FAMILY_LIMIT,
        metavar="SECONDS",
        help=f"for checking one family, and for timing it (default: {FAMILY_LIMIT:.0f})",
    )
    parser.add_argument(
        "--output",
        type=Path,
        metavar="FOLDER",
        help="default: benchmarks/results/local/gpu-check-DATE-TIME",
    )
    args = parser.parse_args(argv)
    if args.backend and (args.time or args.sanitize):
        parser.error("--time and --sanitize need a GPU")
    if args.backend:
        os.environ["TRITON_INTERPRET"] = "1"  # before anything imports Triton
    import gpu_run

    try:
        return gpu_run.Run(args).run()
    except gpu_run.NoSuchFamily as problem:
        parser.error(str(problem))
    except gpu_run.emulator.BuildError as problem:
        print(f"gpu_check: {problem}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # and so ends what it started
    status = main()
    sys.stdout.flush()
    os._exit(status)  # sys.exit would wait for processes that cannot be killed
