"""Is this GPU right, and what does it gain? Every kernel family, each in a process of its own.

First all families are checked, at a tiny shape and at VOC, output stride 8, batch 8, against fp32
PyTorch on the same GPU; then, as the options say, timed beside cuDNN and eager PyTorch, and run
under NVIDIA's compute-sanitizer. A family that hangs or breaks the CUDA context costs only itself.
report.md and CSV files are written as it goes. Exit status: 0 if nothing failed, 1 if something
did or was not reached, 2 without a GPU.

--backend emulated runs the tiny shapes of all families on a CPU.
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
    parser.add_argument("--time", action="store_true", help="and time what is right")
    parser.add_argument(
        "--sanitize",
        nargs="+",
        choices=gpu_tools.SANITIZERS,
        default=[],
        help="and run the tiny shapes under compute-sanitizer",
    )
    parser.add_argument(
        "--variants",
        action="store_true",
        help="and compare the two forms of the Hopper convolution's producer",
    )
    parser.add_argument(
        "--families", nargs="+", default=[], metavar="NAME", help="or the beginning of names"
    )
    parser.add_argument(
        "--backend", choices=["emulated"], help="the tiny shapes on the CPU, in the emulator"
    )
    parser.add_argument("--limit", type=float, metavar="SECONDS", help="for everything")
    parser.add_argument(
        "--family-limit",
        type=float,
        default=FAMILY_LIMIT,
        metavar="SECONDS",
        help=f"for the check of one family, and for its times (default: {FAMILY_LIMIT:.0f})",
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


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # and so ends what it started
    status = main()
    sys.stdout.flush()
    os._exit(status)  # sys.exit would wait for processes that cannot be killed
