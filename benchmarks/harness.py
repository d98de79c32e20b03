"""What the benchmarks share: arguments, checked and interleaved timing, table, CSV and plot.

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
                        bytes=...,                           # least work the task needs
                    )
        report.finish()

Before anything of a case is timed, the output of every callable is compared with the reference:
``error(output, expected)`` has to be a number at most ``tolerance``. A callable that is wrong, or
that raises, is reported and dropped; the others are timed, and ``report.finish()`` exits with
status 1. Callables run in the grad mode that is on around ``report.case``; whatever else they
depend on (autocast, a forced backend) they switch on inside themselves, because on a GPU each is
captured into a CUDA graph in a thread of its own.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import datetime
import gc
import io
import os
import platform
import statistics
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from measure import Run, copy_roof, interleaved, is_lost, leaves, matmul_roof, prepare
from torch import Tensor

import deeplab_fast
from deeplab_fast.backends import registry

ROOT = Path(__file__).resolve().parent.parent

# tf32 is fp32 in memory with the tf32 switches of cuDNN and cuBLAS on.
DTYPES = {
    "fp32": torch.float32,
    "tf32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}

FAILED = "failed "  # begins the header line of a variant that raised or was wrong

COLUMNS = (
    "case", "batch", "dtype", "variant", "kind", "median_ms", "min_ms", "spread_percent", "rounds",
    "speedup", "gflop", "mbyte", "floor_ms", "percent_of_floor", "extra_mib", "error", "tolerance",
)  # fmt: skip


def arguments(
    description: str | None,
    argv: list[str] | None = None,
    gpu_dtypes: tuple[str, ...] = ("bf16",),
    parents: Sequence[argparse.ArgumentParser] = (),
) -> argparse.Namespace:
    """The command line that all benchmarks share, and that of ``parents``.

    ``dtype`` (keys of DTYPES) and ``batch`` of the result are lists, ``device`` a torch.device.
    """
    parser = argparse.ArgumentParser(
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        parents=parents,
    )
    parser.add_argument("--device", help="cpu, cuda or cuda:N (default: the GPU if there is one)")
    parser.add_argument(
        "--dtype", nargs="+", choices=DTYPES, help=f"default: fp32; {' '.join(gpu_dtypes)} on a GPU"
    )
    parser.add_argument(
        "--batch", nargs="+", type=int, help="default: 1; 1 8 16 on a GPU or with --full"
    )
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--full", action="store_true", help="all shapes, batches and peers")
    size.add_argument("--tiny", action="store_true", help="one toy shape: does it run at all")
    parser.add_argument(
        "--output",
        type=Path,
        default=ROOT / "benchmarks" / "results" / "local",
        help="folder for the CSV and the plot (default: benchmarks/results/local)",
    )
    args = parser.parse_args(argv)

    name = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        args.device = torch.device(name)
    except RuntimeError:
        parser.error(f"--device: expected cpu, cuda or cuda:N, got {name!r}")
    gpu = args.device.type == "cuda"
    if args.device.type not in ("cpu", "cuda"):
        parser.error(f"--device: expected cpu, cuda or cuda:N, got {name!r}")
    if gpu and (args.device.index or 0) >= torch.cuda.device_count():
        parser.error(f"--device {name}: PyTorch sees {torch.cuda.device_count()} GPUs here")
    if args.dtype and "tf32" in args.dtype and not gpu:
        parser.error("--dtype tf32: exists on a GPU only")
    if args.batch and min(args.batch) < 1:
        parser.error(f"--batch: expected positive numbers, got {min(args.batch)}")
    args.dtype = args.dtype or (list(gpu_dtypes) if gpu else ["fp32"])
    args.batch = args.batch or ([1, 8, 16] if args.full or (gpu and not args.tiny) else [1])
    return args


def relative_error(output: Any, expected: Any) -> float:
    """Largest |output - expected| over the largest |expected|; of several tensors the worst."""
    return _worst(_relative, output, expected)


def wrong_fraction(output: Any, expected: Any) -> float:
    """The fraction of elements that are not equal, for labels; of several tensors the worst."""
    return _worst(lambda out, truth: (out != truth).double().mean(), output, expected)


def _relative(out: Tensor, truth: Tensor) -> Tensor:
    scale = truth.double().abs().max().clamp_min(1e-30)
    return (out.double() - truth.double()).abs().max() / scale


def _worst(error: Callable[[Tensor, Tensor], Tensor], output: Any, expected: Any) -> float:
    outs, truths = leaves(output), leaves(expected)
    if [out.shape for out in outs] != [truth.shape for truth in truths]:
        return float("inf")
    return torch.stack([error(out, truth) for out, truth in zip(outs, truths)]).max().item()


@contextlib.contextmanager
def tf32(allowed: bool) -> Iterator[None]:
    """Switch tf32 for cuDNN and cuBLAS inside the block."""
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    before = cudnn.allow_tf32, matmul.allow_tf32
    cudnn.allow_tf32 = matmul.allow_tf32 = allowed
    try:
        yield
    finally:
        cudnn.allow_tf32, matmul.allow_tf32 = before


class Report:
    """One run of one benchmark: checks and measures cases, into a table, a CSV and a plot."""

    def __init__(self, name: str, args: argparse.Namespace) -> None:
        self.args = args
        self.device: torch.device = args.device
        now = datetime.datetime.now().astimezone()
        self.csv = Path(args.output) / f"{name}-{now:%Y%m%d-%H%M%S}.csv"
        self.rows: list[dict[str, Any]] = []
        self.header: dict[str, str] = {}
        self._roofs: dict[str, float] = {}
        self._note("benchmark", f"bench_{name}{' --full' * args.full}{' --tiny' * args.tiny}")
        self._note("device", device_name(self.device))
        self._note("threads", str(torch.get_num_threads()))
        self._note("backends", " ".join(deeplab_fast.available_backends(self.device)))
        self._note(
            "versions",
            f"deeplab_fast {deeplab_fast.__version__}, torch {torch.__version__}, "
            f"python {platform.python_version()}",
        )
        self._note("commit", commit())
        self._note("date", now.isoformat(timespec="seconds"))
        if self.device.type == "cpu":
            print("No GPU is used: these are times of the CPU.")

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
        error: Callable[[Any, Any], float] = relative_error,
        flops: float = 0,
        bytes: float = 0,
        graphs: bool = True,
    ) -> None:
        """Check every variant against the reference, then time them; one row each.

        Args:
            name: what is computed; with batch and dtype it identifies the case.
            dtype: a key of DTYPES. tf32 is off for "fp32" and for the reference.
            reference: returns the expected output.
            ours, baselines: variant name -> callable. One that raises is reported and dropped.
            tolerance, error: ``error(output, expected) <= tolerance``, or the variant is reported
                as WRONG and dropped.
            flops, bytes: the least work this task needs; 0 for what does not bound it.
            graphs: on a GPU, time replays of CUDA graphs; without it a call as users make it, from
                Python until the GPU is done. On a CPU it is always the latter.

        Raises:
            SystemExit: a CUDA error after which this process cannot use the GPU any more.
        """
        title = f"{name}, batch {batch}, {dtype}"
        try:
            with tf32(False):
                expected = reference()
        except Exception as problem:
            self._drop(title, "reference", problem)
            return
        with tf32(dtype == "tf32"):
            runs: dict[str, Run] = {}
            checked: dict[str, dict[str, Any]] = {}
            for variant, run in {**ours, **baselines}.items():
                try:
                    run, memory = prepare(run, self.device, graphs)
                    output = run()
                    found = error(output, expected)
                except Exception as problem:
                    self._drop(title, variant, problem)
                    continue
                if not found <= tolerance:  # NaN is wrong too
                    self._drop(
                        title, variant, f"WRONG: error {found:.3g}, tolerance {tolerance:.3g}"
                    )
                    continue
                runs[variant] = run
                checked[variant] = {
                    "kind": "ours" if variant in ours else "baseline",
                    "extra_mib": None if memory is None else memory / 2**20,
                    "error": found,
                }
            del expected
            if not runs:
                return
            try:
                floor = max(
                    flops / self._roof(f"{dtype} matmul") if flops else 0,
                    bytes / self._roof("copy") if bytes else 0,
                )
                budget = 0 if self.args.tiny else 8
                samples = interleaved(runs, self.device, budget, graphs)
            except Exception as problem:
                self._drop(title, "timing", problem)
                return
        medians = {variant: statistics.median(times) for variant, times in samples.items()}
        best = min((medians[v] for v in runs if checked[v]["kind"] == "baseline"), default=None)
        rows = []
        for variant, times in samples.items():
            lower, _, upper = statistics.quantiles(times, n=4, method="inclusive")
            median = medians[variant]
            rows.append({
                "case": name, "batch": batch, "dtype": dtype, "variant": variant,
                "median_ms": 1e3 * median, "min_ms": 1e3 * min(times),
                "spread_percent": 100 * (upper - lower) / median, "rounds": len(times),
                "speedup": best / median if best else None,
                "gflop": flops / 1e9 or None, "mbyte": bytes / 1e6 or None,
                "floor_ms": 1e3 * floor or None, "percent_of_floor": 100 * floor / median or None,
                "tolerance": tolerance, **checked[variant],
            })  # fmt: skip
        self.rows += rows
        self._print(title, rows)
        self._write_csv()  # after every case, so that an aborted run keeps what it has
        gc.collect()

    def finish(self) -> None:
        """Draw the plot, say where the results are, exit with status 1 if a variant was dropped."""
        print("\nfloors are those of the best rates seen in this run:")
        for key, value in self.header.items():
            if key.startswith("roof"):
                print(f"{key}: {value}")
        print(f"wrote {self.csv}")
        try:
            import plot
        except ImportError:
            print('no plot: pip install ".[bench]" brings matplotlib and the torchvision rows')
        else:
            if self.rows:
                picture = self.csv.with_suffix(".png")
                write_atomically(picture, plot.png(self.header, self.rows))
                print(f"wrote {picture}")
        self.exit_if_failed()

    def exit_if_failed(self) -> None:
        """Exit with status 1, and all failures again, if a variant was dropped."""
        failed = [
            f"{key}: {reason}" for key, reason in self.header.items() if key.startswith(FAILED)
        ]
        if failed:
            raise SystemExit("\n".join(failed))

    def _drop(self, title: str, variant: str, reason: Exception | str) -> None:
        """Report a variant that cannot be timed, in the terminal and in the CSV's header.

        Raises:
            SystemExit: the GPU does not answer any more, so nothing after this can run.
        """
        text = reason if isinstance(reason, str) else describe(reason)
        key = f"{FAILED}{title}, {variant}"
        self.header[key] = text
        print(f"{key}: {text}", flush=True)
        self._write_csv()
        if is_lost(self.device):
            raise SystemExit(
                f"CUDA ERROR: {key}: {text}: the GPU is lost to this process, nothing more is "
                "measured here"
            )

    def _note(self, key: str, value: str) -> None:
        self.header[key] = value
        print(f"{key}: {value}")

    def _roof(self, name: str) -> float:
        """The machine's best of all measurements in this run: FLOP/s, or bytes per second."""
        gpu, tiny = self.device.type == "cuda", self.args.tiny
        if name == "copy":
            rate = copy_roof(self.device, (1 << 30 if gpu else 1 << 28) >> 8 * tiny)
        else:
            dtype = DTYPES[name.removesuffix(" matmul")]
            rate = matmul_roof(self.device, dtype, (8192 if gpu else 2048) >> 3 * tiny)
        best = self._roofs[name] = max(rate, self._roofs.get(name, 0))
        unit = "GB/s" if name == "copy" else "GFLOP/s"
        self.header[f"roof {name}"] = f"{best / 1e9:.4g} {unit}"
        return best

    def _print(self, title: str, rows: list[dict[str, Any]]) -> None:
        work = "".join(
            f", {rows[0][key]:.4g} {unit}"
            for key, unit in (("gflop", "GFLOP"), ("mbyte", "MB"), ("floor_ms", "ms floor"))
            if rows[0][key] is not None
        )
        width = max(len(row["variant"]) for row in rows)
        print(f"\n{title}{work}")
        print(f"  {'':{width}}        ms  spread  speedup  of floor  extra MiB    error")
        for row in rows:
            print(
                f"  {row['variant']:{width}}{row['median_ms']:10.4g}{row['spread_percent']:7.0f}%"
                f"{_text(row['speedup'], '.2f', 'x'):>9}"
                f"{_text(row['percent_of_floor'], '.0f', '%'):>10}"
                f"{_text(row['extra_mib'], '.4g'):>11}{row['error']:9.1e}",
                flush=True,
            )

    def _write_csv(self) -> None:
        text = io.StringIO()
        for key, value in self.header.items():
            text.write(f"# {key}: {value}\n")
        writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
        writer.writeheader()
        for row in self.rows:
            writer.writerow({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()})
        write_atomically(self.csv, text.getvalue().encode())


def describe(problem: Exception) -> str:
    """The first line of an exception's message, with its type."""
    message = str(problem).partition("\n")[0]
    return f"{type(problem).__name__}: {message}"


def _text(value: float | None, spec: str, unit: str = "") -> str:
    return "-" if value is None else f"{value:{spec}}{unit}"


def write_atomically(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_bytes(content)
    temporary.replace(path)


def compiled(function: Callable[..., Any], device: torch.device, **options: bool) -> Run:
    """``function``, or a module, by torch.compile, for the shapes that it is called with next.

    Without the reset the second shape of a process would give a graph of symbolic sizes, which is
    slower, and from some number of shapes on none at all. ``options`` are those of Inductor; on a
    GPU it also tries its own kernels and keeps the fastest.
    """
    torch._dynamo.reset()
    options["max_autotune"] = device.type == "cuda"
    return torch.compile(function, fullgraph=True, dynamic=False, options=options)


def forced(run: Run, backend: str) -> Run:
    """``run`` on a backend, "" for the automatic choice."""

    def on_backend() -> object:
        with deeplab_fast.backend(backend):
            return run()

    return on_backend if backend else run


def preferring(run: Run, kernel: str) -> Run:
    """``run`` on the backend ``kernel`` wherever it can, else on the automatic choice."""

    def preferred() -> object:
        automatic = registry.automatic
        registry.automatic = lambda op, arguments: (kernel, *automatic(op, arguments))
        try:
            return run()
        finally:
            registry.automatic = automatic

    return preferred


def with_triton(ours: dict[str, Run], device: torch.device) -> dict[str, Run]:
    """And the first of them on the Triton kernels, where those are compiled."""
    if device.type != "cuda" or "triton" not in deeplab_fast.available_backends(device):
        return ours
    return {**ours, "deeplab_fast on triton": forced(next(iter(ours.values())), "triton")}


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return f"{line.split(':')[1].strip()}, {torch.backends.cpu.get_cpu_capability()}"
    return platform.processor() or platform.machine()


def commit() -> str:
    """The checkout's commit, "-dirty" with local changes.

    Where git cannot say (no .git came along, git is missing or distrusts the files' owner), what
    the file COMMIT says; "-" where there is none.
    """
    if (ROOT / ".git").exists():
        with contextlib.suppress(OSError, subprocess.CalledProcessError):
            return subprocess.run(
                ["git", "describe", "--always", "--dirty", "--exclude=*"],
                cwd=ROOT, capture_output=True, text=True, check=True,
            ).stdout.strip()  # fmt: skip
    file = ROOT / "COMMIT"
    return file.read_text().strip() if file.exists() else "-"
