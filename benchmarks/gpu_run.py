"""One run of gpu_check: what is done in which order, within the limits."""

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

import gpu_measure
import gpu_tools
import harness
import torch
from gpu_families import FAMILIES, REAL, SIZES, TINY, Size
from gpu_measure import CPU, GPU, Place, emulator
from gpu_process import run_apart
from gpu_report import Report

import deeplab_fast
from deeplab_fast import _C
from deeplab_fast.backends import registry

OUT_OF_TIME = "the limit of the whole run was reached"
# Families of the Hopper convolution, of which gpu_measure.FORMS are two versions.
VARIED = ("sm90-projection", "sm90-forward", "sm90-dgrad")
Rows = list[dict[str, Any]]


class NoSuchFamily(Exception):
    pass


class Run:
    def __init__(self, args: argparse.Namespace) -> None:
        for beginning in args.families:
            if not any(name.startswith(beginning) for name in FAMILIES):
                raise NoSuchFamily(f"no family begins with {beginning!r}: {' '.join(FAMILIES)}")
        self.args, self.now = args, datetime.datetime.now().astimezone()
        limit = float("inf") if args.limit is None else args.limit
        self.deadline = time.monotonic() + limit
        beginnings = tuple(args.families) or ("",)
        self.families = {n: f for n, f in FAMILIES.items() if n.startswith(beginnings)}
        self.place, self.sizes = (CPU, (TINY,)) if args.backend else (GPU, SIZES)
        if args.backend:
            emulator.load()  # once, for all the processes that are forked from this one
        local = Path(__file__).resolve().parent / "results" / "local"
        self.folder = args.output or local / f"gpu-check-{self.now:%Y%m%d-%H%M%S}"

    def run(self) -> int:
        with tempfile.TemporaryDirectory() as logs:
            log = Path(logs) / "machine.txt"
            rows, problem = run_apart(machine, (self.place,), log, self.args.family_limit)
        if problem or "none" in rows[0]:
            problem = f"asking for the GPU failed: {problem}" if problem else rows[0]["none"]
            print(f"gpu_check: {problem}", file=sys.stderr)
            return 2
        self.report = Report(self.folder, self.header(rows[0]["device"]))
        right = self.check(rows[0]["unavailable"])
        if self.args.time and right:
            self.time(right)
        if self.args.variants:
            self.variants(right)
        for tool in self.args.sanitize:
            self.sanitize(tool, right)
        return self.verdict()

    def header(self, device: str) -> dict[str, str]:
        build = _C.build_info()
        return {
            "device": device,
            "versions": f"deeplab_fast {deeplab_fast.__version__}, torch {torch.__version__}, "
            f"triton {triton_version()}, python {platform.python_version()}",
            "CUDA": f"torch {torch.version.cuda}; kernels built with {build['cuda']} for "
            f"{' '.join(build['architectures']) or 'no GPU'}",
            "commit": harness.commit(),
            "date": self.now.isoformat(timespec="seconds"),
            "families": " ".join(self.args.families) or "all",
        }

    def apart(
        self,
        function: Callable[..., Iterable[dict[str, Any]]],
        arguments: tuple[Any, ...],
        name: str,
        limit: float | None = None,
    ) -> tuple[Rows, str]:
        """Its rows and what ended it, within a family's limit and what is left of the whole."""
        limit, left = limit or self.args.family_limit, self.deadline - time.monotonic()
        if left <= 0:
            return [], OUT_OF_TIME
        log = self.folder / "logs" / f"{name}.txt"
        rows, problem = run_apart(function, arguments, log, min(limit, left))
        is_over = left < limit and time.monotonic() >= self.deadline
        return rows, OUT_OF_TIME if problem and is_over else problem

    def check(self, unavailable: dict[str, str]) -> dict[str, list[str]]:
        """All families; returns the dtypes in which each is right at every shape."""
        right: dict[str, list[str]] = {}
        for name, family in self.families.items():
            cases = [(size.name, dtype) for size in self.sizes for dtype in family.dtypes]
            if reason := unavailable.get(family.backend):
                rows: Rows = [{"outcome": "skipped", "note": reason}] * len(cases)
            else:
                rows, problem = self.apart(check, (name, self.place, self.sizes), name)
                rows += unfinished(len(cases) - len(rows), problem)
            for (size, dtype), row in zip(cases, rows):
                self.report.add("Correctness", family=name, shape=size, dtype=dtype, **row)
            not_right = {dtype for (_, dtype), row in zip(cases, rows) if row["outcome"] != "pass"}
            if dtypes := [dtype for dtype in family.dtypes if dtype not in not_right]:
                right[name] = dtypes
        return right

    def time(self, right: dict[str, list[str]]) -> None:
        rows, problem = self.apart(gpu_measure.ceilings, (), "ceilings")
        for row in rows:
            unit, scale = ("GB/s", 1e9) if row["name"] == "copy" else ("TFLOP/s", 1e12)
            self.report.add("Ceilings", what=row["what"], **{unit: row["rate"] / scale})
        if problem:
            self.report.add("Ceilings", what=problem)
        rates = {row["name"]: row["rate"] for row in rows}
        for name, dtypes in right.items():
            rows, problem = self.apart(times, (name, dtypes, rates), f"{name}-time")
            rows += unfinished(len(dtypes) - len(rows), problem)
            for dtype, row in zip(dtypes, rows):
                self.report.add("Time", family=name, dtype=dtype, **row)

    def variants(self, right: dict[str, list[str]]) -> None:
        for name in (name for name in VARIED if name in self.families):
            if name not in right:
                row = {"outcome": "skipped", "note": "its check did not pass"}
                self.report.add("Variants", family=name, variant="both", **row)
                continue
            arguments = name, self.place, self.sizes
            rows, problem = self.apart(forms, arguments, f"{name}-variants")
            left = list(gpu_measure.FORMS)[len(rows) :] or ["both"] * bool(problem)
            rows += [
                {"variant": form, **row} for form, row in zip(left, unfinished(len(left), problem))
            ]
            for row in rows:
                self.report.add("Variants", family=name, **row)

    def sanitize(self, tool: str, right: dict[str, list[str]]) -> None:
        names = [
            name
            for name in right
            if tool != "racecheck" or self.families[name].backend in gpu_tools.RACES_CHECKED
        ]
        if not names:
            return
        limit = len(names) * self.args.family_limit
        rows, problem = self.apart(gpu_tools.sanitize, (tool, names), tool, limit)
        done = {row["family"] for row in rows}
        for row in rows:
            self.report.add("Sanitizer", **row)
        left = [name for name in names if not done & {name, "all"}]
        for name, row in zip(left, unfinished(len(left), problem)):
            self.report.add("Sanitizer", tool=tool, family=name, **row)

    def verdict(self) -> int:
        outcomes = self.report.outcomes()
        counts = {outcome: outcomes.count(outcome) for outcome in dict.fromkeys(outcomes)}
        said = ", ".join(f"{count} {outcome}" for outcome, count in counts.items())
        print(f"\n{said}; written to {self.folder}")
        if "pass" not in counts:
            print("gpu_check: no kernel passed", file=sys.stderr)
        return int("pass" not in counts or bool(counts.keys() & {"FAIL", "not run"}))


def unfinished(count: int, problem: str) -> Rows:
    """Rows for what gave none: the first failed, the others were not reached."""
    rows: Rows = [{"outcome": "not run", "note": problem}] * count
    if rows and problem != OUT_OF_TIME:
        rows[0] = {"outcome": "FAIL", "note": problem or "ended without a result"}
    return rows


def triton_version() -> str:
    try:
        return importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return "-"


# The functions below run in forked processes. The parent must not use CUDA: it does not survive a
# fork.


def machine(place: Place) -> Iterator[dict[str, Any]]:
    """The device, and why backends of families cannot run there."""
    if place.device.type == "cuda" and (reason := why_no_gpu()):
        yield {"none": f"{reason}; --backend emulated needs no GPU"}
        return
    reasons = {
        family.backend: registry.unavailable_reason(place.backend(family), place.device.type)
        for family in FAMILIES.values()
    }
    device = harness.device_name(place.device)
    if place.device.type == "cuda":
        major, minor = torch.cuda.get_device_capability()
        device += f", compute capability {major}.{minor}, driver {driver_version()}"
    else:
        device = f"emulated on {device}"
    unavailable = {backend: reason for backend, reason in reasons.items() if reason}
    yield {"device": device, "unavailable": unavailable}


def why_no_gpu() -> str | None:
    """Why torch has no GPU here, in its words where it has some; None if it has one."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if torch.cuda.is_available():
            return None
    if not torch.version.cuda and not torch.version.hip:
        return f"torch {torch.__version__} was built without CUDA"
    said = [str(warning.message).partition("\n")[0] for warning in caught]
    return ": ".join(["there is no GPU that torch can use", *said])


def driver_version() -> str:
    if not shutil.which("nvidia-smi"):
        return "-"
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"]
    said = subprocess.run(query, capture_output=True, text=True)
    return said.stdout.strip() if said.returncode == 0 else "-"


def check(name: str, place: Place, sizes: Sequence[Size]) -> Iterator[dict[str, Any]]:
    if place.device.type == "cpu":
        torch.set_num_threads(1)  # toy sizes gain nothing from threads
    for size in sizes:
        for dtype in FAMILIES[name].dtypes:
            yield gpu_measure.check(FAMILIES[name], place, size, dtype)


def forms(name: str, place: Place, sizes: Sequence[Size]) -> Iterator[dict[str, Any]]:
    return gpu_measure.compare_forms(FAMILIES[name], place, sizes)


def times(name: str, dtypes: Sequence[str], rates: dict[str, float]) -> Iterator[dict[str, Any]]:
    for dtype in dtypes:
        row = gpu_measure.measured_time(FAMILIES[name], GPU, REAL, dtype, rates)
        yield {"outcome": "timed", **row}
