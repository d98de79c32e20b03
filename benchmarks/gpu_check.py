"""Check every kernel on this machine's GPU against PyTorch and, with --time, time it.

Kernels are checked in families; a family is one op on one backend. Each family runs in a process of
its own, so that a hang or a crash does not stop the others, at a tiny shape and at that of PASCAL
VOC with output stride 8 and batch 8, against PyTorch in fp32 on the same GPU. Those that pass can
then be timed against cuDNN and eager PyTorch, and run under NVIDIA's compute-sanitizer. report.md
and CSV files are rewritten after every row. The exit status is 0 if nothing failed; 1 if something
failed or was not run, or if nothing passed; 2 without a GPU.

--backend emulated runs the tiny shapes on a CPU. See benchmarks/README.md.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from pathlib import Path

from gpu_checks.sanitizer import TOOLS

FAMILY_LIMIT = 90.0


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--time", action="store_true", help="time the families that pass")
    parser.add_argument(
        "--sanitize",
        nargs="+",
        choices=TOOLS,
        default=[],
        help="run the families that pass under compute-sanitizer, with tiny shapes",
    )
    parser.add_argument(
        "--variants",
        action="store_true",
        help="compare two ways to signal arrived data in the Hopper convolution",
    )
    parser.add_argument(
        "--families", nargs="+", default=[], metavar="NAME", help="names of families, or prefixes"
    )
    parser.add_argument(
        "--backend", choices=["emulated"], help="run the tiny shapes in the CPU emulator"
    )
    parser.add_argument(
        "--limit", type=float, metavar="SECONDS", help="time limit of the whole run"
    )
    parser.add_argument(
        "--family-limit",
        type=float,
        default=FAMILY_LIMIT,
        metavar="SECONDS",
        help=f"time limit for checking or timing one family (default: {FAMILY_LIMIT:.0f})",
    )
    parser.add_argument(
        "--output",
        type=Path,
        metavar="FOLDER",
        help="default: benchmarks/results/local/gpu-check-DATE-TIME",
    )
    args = parser.parse_args(argv)
    if args.backend and (args.time or args.sanitize):
        parser.error("--backend emulated: expected neither --time nor --sanitize, which need a GPU")
    if args.backend:
        os.environ["TRITON_INTERPRET"] = "1"  # before anything imports Triton
    from gpu_checks import run

    try:
        return run.Run(args).run()
    except run.UnknownFamily as error:
        parser.error(str(error))
    except run.emulator.BuildError as error:
        print(f"gpu_check: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # which ends its child processes
    status = main()
    sys.stdout.flush()
    os._exit(status)  # sys.exit would wait for processes that cannot be killed
