"""The harness of all benchmarks: command line, checks, timing, printed table, CSV and plot.

A benchmark is a loop over cases. Each case gives callables that compute the same thing:

    def main(argv=None):
        args = harness.arguments(__doc__, argv)
        report = harness.Report("upsample_argmax", args)
        for shape in cases.select(args, default=[cases.VOC_OS8]):
            for dtype in args.dtype:
                for batch in args.batch:
                    x = torch.randn(..., dtype=harness.DTYPES[dtype], device=args.device)
                    report.case(
                        shape.name,
                        batch=batch,
                        dtype=dtype,
                        reference=lambda: expected_output(x),        # run once, not timed
                        ours={"deeplab_fast": lambda: our_op(x)},
                        baselines={"PyTorch NCHW": lambda: their_op(x)},
                        error=harness.wrong_fraction,        # or relative_error, or your own
                        tolerance=0,                         # the largest error allowed
                        bytes=...,                           # least memory traffic of the task
                    )
        report.finish()

The output of every callable is compared with the reference before anything is timed:
``error(output, expected)`` must be at most ``tolerance``. A callable that is wrong or raises is
reported and dropped; the others are timed, and ``report.finish()`` exits with status 1.

Callables run in the grad mode that is set around ``report.case``. They must switch on anything else
that they depend on (autocast, a forced backend) themselves, because on a GPU each of them is
captured into a CUDA graph in a thread of its own.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from deeplab_fast.backends import tuning
from deeplab_fast.backends.tuning import is_unusable
from deeplab_fast.cli.allocator import keep_freed_memory

from .environment import (
    ROOT,
    csv_path,
    csv_text,
    first_line,
    folder,
    run_header,
    write_atomically,
)
from .timing import (
    Run,
    copy_bandwidth,
    interleaved,
    leaves,
    matmul_rate,
    prepare,
)

# tf32 is fp32 in memory, with the tf32 switches of cuDNN and cuBLAS on.
DTYPES = {
    "fp32": torch.float32,
    "tf32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}

FAILED = "failed "  # prefix of the header line of a variant that raised or was wrong

COLUMNS = (
    "case", "batch", "dtype", "variant", "kind", "median_ms", "min_ms", "iqr_percent", "rounds",
    "speedup", "gflop", "mbyte", "lower_bound_ms", "percent_of_lower_bound", "peak_mib", "error",
    "tolerance",
)  # fmt: skip


def arguments(
    description: str | None,
    argv: list[str] | None = None,
    gpu_dtypes: tuple[str, ...] = ("bf16",),
    parents: Sequence[argparse.ArgumentParser] = (),
) -> argparse.Namespace:
    """Parse the options that all benchmarks share, and those of ``parents``.

    In the result ``dtype`` (keys of DTYPES) and ``batch`` are lists, ``device`` is a torch.device.
    In a process of its own, that is without ``argv``, a benchmark keeps freed memory: otherwise its
    times contain page faults, whose number depends on what was freed before.
    """
    parser = argparse.ArgumentParser(
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        parents=parents,
    )
    parser.add_argument("--device", help="cpu, cuda or cuda:N (default: cuda if available)")
    parser.add_argument(
        "--dtype", nargs="+", choices=DTYPES, help=f"default: fp32; {' '.join(gpu_dtypes)} on a GPU"
    )
    parser.add_argument(
        "--batch", nargs="+", type=int, help="default: 1; 1 8 16 on a GPU or with --full"
    )
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--full", action="store_true", help="all shapes, batch sizes and baselines")
    size.add_argument("--tiny", action="store_true", help="one toy shape, as a smoke test")
    parser.add_argument(
        "--output",
        type=folder,
        default=ROOT / "benchmarks" / "results" / "local",
        help="folder for the CSV and the plot (default: benchmarks/results/local)",
    )
    args = parser.parse_args(argv)
    if argv is None:  # otherwise the process is the caller's
        keep_freed_memory()

    name = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        args.device = torch.device(name)
    except RuntimeError:
        parser.error(f"--device: expected cpu, cuda or cuda:N, got {name!r}")
    gpu = args.device.type == "cuda"
    if args.device.type not in ("cpu", "cuda"):
        parser.error(f"--device: expected cpu, cuda or cuda:N, got {name!r}")
    if gpu and (args.device.index or 0) >= torch.cuda.device_count():
        parser.error(
            f"--device: expected one of the {torch.cuda.device_count()} GPUs that PyTorch sees, "
            f"got {name!r}"
        )
    if args.dtype and "tf32" in args.dtype and not gpu:
        parser.error("--dtype: expected fp32, bf16 or fp16 on a CPU, got tf32")
    if args.batch and min(args.batch) < 1:
        parser.error(f"--batch: expected positive integers, got {min(args.batch)}")
    args.dtype = args.dtype or (list(gpu_dtypes) if gpu else ["fp32"])
    args.batch = args.batch or ([1, 8, 16] if args.full or (gpu and not args.tiny) else [1])
    return args


def relative_error(output: Any, expected: Any) -> float:
    """max |output - expected| / max |expected|; the largest over several tensors."""
    return tuning.relative_error(leaves(output), leaves(expected))


def wrong_fraction(output: Any, expected: Any) -> float:
    """The fraction of elements that differ, for labels; the largest over several tensors."""
    pairs = list(zip(leaves(output), leaves(expected)))
    if len(leaves(output)) != len(leaves(expected)) or any(a.shape != b.shape for a, b in pairs):
        return float("inf")
    return max((out != expected).double().mean().item() for out, expected in pairs)


@contextlib.contextmanager
def tf32(allowed: bool) -> Iterator[None]:
    """Allow or forbid tf32 in cuDNN and cuBLAS inside the block."""
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    before = cudnn.allow_tf32, matmul.allow_tf32
    cudnn.allow_tf32 = matmul.allow_tf32 = allowed
    try:
        yield
    finally:
        cudnn.allow_tf32, matmul.allow_tf32 = before


class WrongOutput(Exception):
    """The output of a variant differs from the reference by more than the tolerance."""


class Report:
    """One run of one benchmark: check and time cases, print a table, write a CSV and a plot.

    ``columns`` are columns of the benchmark's own in the CSV, after COLUMNS.
    """

    def __init__(self, name: str, args: argparse.Namespace, columns: Sequence[str] = ()) -> None:
        self.args = args
        self.columns = (*COLUMNS, *columns)
        self.device: torch.device = args.device
        self.csv = csv_path(Path(args.output), name)
        self.rows: list[dict[str, Any]] = []
        benchmark = f"bench_{name}{' --full' * args.full}{' --tiny' * args.tiny}"
        self.header = run_header(benchmark, self.device)
        self._rooflines: dict[str, float] = {}
        for key, value in self.header.items():
            print(f"{key}: {value}")
        if self.device.type == "cpu":
            print("Running on the CPU.")

    def case(
        self,
        name: str,
        *,
        batch: int,
        dtype: str,
        reference: Run,
        ours: Mapping[str, Run],
        baselines: Mapping[str, Run],
        tolerance: float,
        tolerances: Mapping[str, float] = MappingProxyType({}),
        error: Callable[[Any, Any], float] = relative_error,
        flops: float = 0,
        bytes: float = 0,
        graphs: bool = True,
        columns: Callable[[dict[str, list[float]]], dict[str, dict[str, Any]]] = lambda samples: {},
    ) -> None:
        """Check every variant against the reference, then time those that passed; a row for each.

        Args:
            name: what is computed; a case is identified by name, batch and dtype.
            dtype: a key of DTYPES. tf32 is off for "fp32" and for the reference.
            reference: returns the expected output.
            ours, baselines: callables by variant name. One that raises is reported and dropped.
            tolerance, error: a variant with ``error(output, expected) > tolerance`` is reported as
                WRONG and dropped.
            tolerances: those of variants of lower precision, by variant name. They are no baseline
                for the speedup of the others.
            flops, bytes: the least work of the task; 0 if it is not limited by that.
            graphs: on a GPU, time replays of CUDA graphs. If False, and always on a CPU, time calls
                from Python until the device is done.
            columns: returns the values of the benchmark's own columns by variant, from the seconds
                of each variant in each round.

        Raises:
            SystemExit: a CUDA error left the GPU unusable for this process.
        """
        title = f"{name}, batch {batch}, {dtype}"
        try:
            with tf32(False):
                expected = reference()
        except Exception as failure:
            self._drop(title, "reference", failure)
            return
        with tf32(dtype == "tf32"):
            runs: dict[str, Run] = {}
            checked: dict[str, dict[str, Any]] = {}
            for variant, run in {**ours, **baselines}.items():
                limit = tolerances.get(variant, tolerance)
                try:
                    runs[variant], found = self._check(run, expected, error, limit, graphs)
                except Exception as failure:
                    self._drop(title, variant, failure)
                else:
                    kind = "ours" if variant in ours else "baseline"
                    checked[variant] = {"kind": kind, "tolerance": limit, **found}
            del expected
            if not runs:
                return
            try:
                lower_bound = max(
                    flops / self._roofline(f"{dtype} matmul") if flops else 0,
                    bytes / self._roofline("copy") if bytes else 0,
                )
                budget = 0 if self.args.tiny else 8
                samples = interleaved(runs, self.device, budget, graphs)
            except Exception as failure:
                self._drop(title, "timing", failure)
                return
        medians = {variant: statistics.median(times) for variant, times in samples.items()}
        rivals = [v for v in runs if checked[v]["kind"] == "baseline" and v not in tolerances]
        best = min((medians[v] for v in rivals), default=None)
        own_columns = columns(samples)
        rows = []
        for variant, times in samples.items():
            lower, _, upper = statistics.quantiles(times, n=4, method="inclusive")
            median = medians[variant]
            rows.append({
                "case": name, "batch": batch, "dtype": dtype, "variant": variant,
                "median_ms": 1e3 * median, "min_ms": 1e3 * min(times),
                "iqr_percent": 100 * (upper - lower) / median, "rounds": len(times),
                "speedup": best / median if best else None,
                "gflop": flops / 1e9 or None, "mbyte": bytes / 1e6 or None,
                "lower_bound_ms": 1e3 * lower_bound or None,
                "percent_of_lower_bound": 100 * lower_bound / median or None,
                **checked[variant], **own_columns.get(variant, {}),
            })  # fmt: skip
        self.rows += rows
        self._print(title, rows)
        self._write_csv()  # after every case, so that an aborted run keeps its rows
        gc.collect()

    def _check(
        self,
        run: Run,
        expected: Any,
        error: Callable[[Any, Any], float],
        tolerance: float,
        graphs: bool,
    ) -> tuple[Run, dict[str, float | None]]:
        """``run`` ready to be timed, and its error and peak memory.

        Raises:
            WrongOutput: the error exceeds the tolerance.
        """
        run, memory = prepare(run, self.device, graphs)
        measured = error(run(), expected)
        if not measured <= tolerance:  # also true for NaN
            raise WrongOutput(f"WRONG: error {measured:.3g}, tolerance {tolerance:.3g}")
        return run, {"error": measured, "peak_mib": None if memory is None else memory / 2**20}

    def finish(self) -> None:
        """Draw the plot and print where the results are; exit with status 1 if a variant failed."""
        print("\nbest rates measured in this run, from which the lower bounds are computed:")
        for key, value in self.header.items():
            if key.startswith("roofline"):
                print(f"{key}: {value}")
        print(f"wrote {self.csv}")
        try:
            from .plot import png
        except ImportError:
            print('no plot: matplotlib is not installed (pip install ".[bench]")')
        else:
            if self.rows:
                image = self.csv.with_suffix(".png")
                write_atomically(image, png(self.header, self.rows))
                print(f"wrote {image}")
        self.exit_if_failed()

    def exit_if_failed(self) -> None:
        """Exit with status 1 and print all failures again, if a variant failed."""
        failed = [
            f"{key}: {reason}" for key, reason in self.header.items() if key.startswith(FAILED)
        ]
        if failed:
            raise SystemExit("\n".join(failed))

    def _drop(self, title: str, variant: str, reason: Exception) -> None:
        """Report a variant that cannot be timed, on the terminal and in the header of the CSV.

        Raises:
            SystemExit: a CUDA error left the GPU unusable for this process.
        """
        text = str(reason) if isinstance(reason, WrongOutput) else first_line(reason)
        key = f"{FAILED}{title}, {variant}"
        self.header[key] = text
        print(f"{key}: {text}", flush=True)
        self._write_csv()
        if is_unusable(self.device):
            raise SystemExit(
                f"{key}: {text}: the CUDA error left the GPU unusable for this process; stopping"
            )

    def _roofline(self, name: str) -> float:
        """The best rate measured so far in this run, in FLOP/s or bytes/s."""
        gpu, tiny = self.device.type == "cuda", self.args.tiny
        if name == "copy":
            rate = copy_bandwidth(self.device, (1 << 30 if gpu else 1 << 28) >> 8 * tiny)
        else:
            dtype = DTYPES[name.removesuffix(" matmul")]
            rate = matmul_rate(self.device, dtype, (8192 if gpu else 2048) >> 3 * tiny)
        best = self._rooflines[name] = max(rate, self._rooflines.get(name, 0))
        unit = "GB/s" if name == "copy" else "GFLOP/s"
        self.header[f"roofline {name}"] = f"{best / 1e9:.4g} {unit}"
        return best

    def _print(self, title: str, rows: list[dict[str, Any]]) -> None:
        units = {"gflop": "GFLOP", "mbyte": "MB", "lower_bound_ms": "ms lower bound"}
        work = "".join(
            f", {rows[0][column]:.4g} {unit}"
            for column, unit in units.items()
            if rows[0][column] is not None
        )
        width = max(len(row["variant"]) for row in rows)
        print(f"\n{title}{work}")
        print(f"  {'':{width}}        ms     IQR  speedup  of bound   peak MiB    error")
        for row in rows:
            print(
                f"  {row['variant']:{width}}{row['median_ms']:10.4g}{row['iqr_percent']:7.0f}%"
                f"{_text(row['speedup'], '.2f', 'x'):>9}"
                f"{_text(row['percent_of_lower_bound'], '.0f', '%'):>10}"
                f"{_text(row['peak_mib'], '.4g'):>11}{row['error']:9.1e}"
                + "".join(
                    f"  {key} {_value(row.get(key))}" for key in self.columns[len(COLUMNS) :]
                ),
                flush=True,
            )

    def _write_csv(self) -> None:
        write_atomically(self.csv, csv_text(self.header, self.columns, self.rows))


def _value(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value or "-")


def _text(value: float | None, spec: str, unit: str = "") -> str:
    return "-" if value is None else f"{value:{spec}}{unit}"
