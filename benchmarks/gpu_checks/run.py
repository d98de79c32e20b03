"""One run of gpu_check.py: which parts run in which order, within the time limits."""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import platform
import shutil
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from common.environment import ROOT, commit, device_name

import deeplab_fast
from deeplab_fast import _C
from deeplab_fast.backends import registry

from . import correctness, sanitizer, speed
from .correctness import CPU, GPU, Place, emulator
from .families import FAMILIES
from .inputs import REAL, SIZES, TINY, Size
from .process import run_in_subprocess
from .report import Report

OUT_OF_TIME = "the time limit of the whole run was reached"
# Families of the Hopper convolution, which has the two versions speed.ARRIVALS.
WITH_VARIANTS = ("sm90-projection", "sm90-forward", "sm90-dgrad")
Rows = list[dict[str, Any]]


class UnknownFamily(Exception):
    """No family has the requested name."""


class Run:
    def __init__(self, args: argparse.Namespace) -> None:
        for prefix in args.families:
            if not any(name.startswith(prefix) for name in FAMILIES):
                raise UnknownFamily(
                    f"--families: expected prefixes of {' '.join(FAMILIES)}, got {prefix!r}"
                )
        self.args, self.now = args, datetime.datetime.now().astimezone()
        limit = float("inf") if args.limit is None else args.limit
        self.deadline = time.monotonic() + limit
        prefixes = tuple(args.families) or ("",)
        self.families = {n: f for n, f in FAMILIES.items() if n.startswith(prefixes)}
        self.place, self.sizes = (CPU, (TINY,)) if args.backend else (GPU, SIZES)
        if args.backend:
            emulator.load()  # once, for all processes that are forked from this one
        local = ROOT / "benchmarks" / "results" / "local"
        self.folder = args.output or local / f"gpu-check-{self.now:%Y%m%d-%H%M%S}"

    def run(self) -> int:
        with tempfile.TemporaryDirectory() as logs:
            log = Path(logs) / "machine.txt"
            rows, failure = run_in_subprocess(machine, (self.place,), log, self.args.family_limit)
        if failure or "no_gpu" in rows[0]:
            reason = f"cannot query the GPU: {failure}" if failure else rows[0]["no_gpu"]
            print(f"gpu_check: {reason}", file=sys.stderr)
            return 2
        self.report = Report(self.folder, self.header(rows[0]["device"]))
        passed = self.check(rows[0]["unavailable"])
        if self.args.time and passed:
            self.time(passed)
        if self.args.variants:
            self.variants(passed)
        for tool in self.args.sanitize:
            self.sanitize(tool, passed)
        return self.verdict()

    def header(self, device: str) -> dict[str, str]:
        build = _C.build_info()
        return {
            "device": device,
            "versions": f"deeplab_fast {deeplab_fast.__version__}, torch {torch.__version__}, "
            f"triton {triton_version()}, python {platform.python_version()}",
            "CUDA": f"torch {torch.version.cuda}; kernels built with {build['cuda']} for "
            f"{' '.join(build['architectures']) or 'no GPU'}",
            "commit": commit(),
            "date": self.now.isoformat(timespec="seconds"),
            "families": " ".join(self.args.families) or "all",
        }

    def run_limited(
        self,
        function: Callable[..., Iterable[dict[str, Any]]],
        arguments: tuple[Any, ...],
        name: str,
        limit: float | None = None,
    ) -> tuple[Rows, str]:
        """run_in_subprocess within ``limit`` (default: a family's) and the time left to the run."""
        limit, left = limit or self.args.family_limit, self.deadline - time.monotonic()
        if left <= 0:
            return [], OUT_OF_TIME
        log = self.folder / "logs" / f"{name}.txt"
        rows, failure = run_in_subprocess(function, arguments, log, min(limit, left))
        is_over = left < limit and time.monotonic() >= self.deadline
        return rows, OUT_OF_TIME if failure and is_over else failure

    def check(self, unavailable: dict[str, str]) -> dict[str, list[str]]:
        """Check all families; returns the dtypes in which each passed at every shape."""
        passed: dict[str, list[str]] = {}
        for name, family in self.families.items():
            cases = [(size.name, dtype) for size in self.sizes for dtype in family.dtypes]
            if reason := unavailable.get(family.backend):
                rows: Rows = [{"outcome": "skipped", "note": reason}] * len(cases)
            else:
                rows, failure = self.run_limited(check, (name, self.place, self.sizes), name)
                rows += unfinished(len(cases) - len(rows), failure)
            for (size, dtype), row in zip(cases, rows):
                self.report.add("Correctness", family=name, shape=size, dtype=dtype, **row)
            failed = {dtype for (_, dtype), row in zip(cases, rows) if row["outcome"] != "pass"}
            if dtypes := [dtype for dtype in family.dtypes if dtype not in failed]:
                passed[name] = dtypes
        return passed

    def time(self, passed: dict[str, list[str]]) -> None:
        rows, failure = self.run_limited(speed.ceilings, (), "ceilings")
        for row in rows:
            unit, scale = ("GB/s", 1e9) if row["name"] == "copy" else ("TFLOP/s", 1e12)
            self.report.add(
                "Ceilings", measurement=row["measurement"], **{unit: row["rate"] / scale}
            )
        if failure:
            self.report.add("Ceilings", measurement=failure)
        rates = {row["name"]: row["rate"] for row in rows}
        for name, dtypes in passed.items():
            rows, failure = self.run_limited(times, (name, dtypes, rates), f"{name}-time")
            rows += unfinished(len(dtypes) - len(rows), failure)
            for dtype, row in zip(dtypes, rows):
                self.report.add("Time", family=name, dtype=dtype, **row)

    def variants(self, passed: dict[str, list[str]]) -> None:
        for name in (name for name in WITH_VARIANTS if name in self.families):
            if name not in passed:
                row = {"outcome": "skipped", "note": "the family did not pass its check"}
                self.report.add("Variants", family=name, variant="both", **row)
                continue
            arguments = name, self.place, self.sizes
            rows, failure = self.run_limited(arrivals, arguments, f"{name}-variants")
            left = list(speed.ARRIVALS)[len(rows) :] or ["both"] * bool(failure)
            rows += [
                {"variant": arrival, **row}
                for arrival, row in zip(left, unfinished(len(left), failure))
            ]
            for row in rows:
                self.report.add("Variants", family=name, **row)

    def sanitize(self, tool: str, passed: dict[str, list[str]]) -> None:
        names = [
            name
            for name in passed
            if tool != "racecheck" or self.families[name].backend in sanitizer.RACECHECK_BACKENDS
        ]
        if not names:
            return
        limit = len(names) * self.args.family_limit
        rows, failure = self.run_limited(sanitizer.sanitize, (tool, names), tool, limit)
        done = {row["family"] for row in rows}
        for row in rows:
            self.report.add("Sanitizer", **row)
        left = [name for name in names if not done & {name, "all"}]
        for name, row in zip(left, unfinished(len(left), failure)):
            self.report.add("Sanitizer", tool=tool, family=name, **row)

    def verdict(self) -> int:
        outcomes = self.report.outcomes()
        counts = {outcome: outcomes.count(outcome) for outcome in dict.fromkeys(outcomes)}
        summary = ", ".join(f"{count} {outcome}" for outcome, count in counts.items())
        print(f"\n{summary}; written to {self.folder}")
        if "pass" not in counts:
            print("gpu_check: no kernel passed", file=sys.stderr)
        return int("pass" not in counts or bool(counts.keys() & {"FAIL", "not run"}))


def unfinished(count: int, failure: str) -> Rows:
    """Rows for checks without a result: the first of them failed, the others were not reached."""
    rows: Rows = [{"outcome": "not run", "note": failure}] * count
    if rows and failure != OUT_OF_TIME:
        rows[0] = {"outcome": "FAIL", "note": failure or "ended without a result"}
    return rows


def triton_version() -> str:
    try:
        return importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return "-"


# The functions below run in forked processes. The parent must not use CUDA, because a CUDA context
# does not survive a fork.


def machine(place: Place) -> Iterator[dict[str, Any]]:
    """The device, and the reasons why backends cannot run on it."""
    if place.device.type == "cuda" and (reason := no_gpu_reason()):
        yield {"no_gpu": f"{reason}; --backend emulated needs no GPU"}
        return
    reasons = {
        family.backend: registry.unavailable_reason(place.backend(family), place.device.type)
        for family in FAMILIES.values()
    }
    device = device_name(place.device)
    if place.device.type == "cuda":
        major, minor = torch.cuda.get_device_capability()
        device += f", compute capability {major}.{minor}, driver {driver_version()}"
    else:
        device = f"emulated on {device}"
    unavailable = {backend: reason for backend, reason in reasons.items() if reason}
    yield {"device": device, "unavailable": unavailable}


def no_gpu_reason() -> str | None:
    """Why torch cannot use a GPU, with torch's own warnings; None if it can."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if torch.cuda.is_available():
            return None
    if not torch.version.cuda and not torch.version.hip:
        return f"torch {torch.__version__} was built without CUDA"
    reasons = [str(warning.message).partition("\n")[0] for warning in caught]
    return ": ".join(["torch finds no GPU that it can use", *reasons])


def driver_version() -> str:
    if not shutil.which("nvidia-smi"):
        return "-"
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"]
    result = subprocess.run(query, capture_output=True, text=True)
    return result.stdout.strip() if result.returncode == 0 else "-"


def check(name: str, place: Place, sizes: Sequence[Size]) -> Iterator[dict[str, Any]]:
    if place.device.type == "cpu":
        torch.set_num_threads(1)  # the tiny shapes gain nothing from threads
    for size in sizes:
        for dtype in FAMILIES[name].dtypes:
            yield correctness.check(FAMILIES[name], place, size, dtype)


def arrivals(name: str, place: Place, sizes: Sequence[Size]) -> Iterator[dict[str, Any]]:
    return speed.compare_arrivals(FAMILIES[name], place, sizes)


def times(name: str, dtypes: Sequence[str], rates: dict[str, float]) -> Iterator[dict[str, Any]]:
    for dtype in dtypes:
        row = speed.measured_time(FAMILIES[name], GPU, REAL, dtype, rates)
        yield {"outcome": "timed", **row}
