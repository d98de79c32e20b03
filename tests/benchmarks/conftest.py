"""Fixtures of the tests of benchmarks/."""

from __future__ import annotations

import csv
import importlib
import os
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
# bench_host has no cases: its launchers compute nothing.
SCRIPTS = sorted({path.stem for path in BENCHMARKS.glob("bench_*.py")} - {"bench_host"})


@pytest.fixture(autouse=True)
def benchmarks_on_path(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)


@pytest.fixture(autouse=True)
def single_thread(one_thread):
    """Tiny shapes gain nothing from threads, which wait for one another on shared cores."""


@pytest.fixture
def harness():
    return importlib.import_module("common.harness")


@pytest.fixture
def report(harness, tmp_path):
    options = ["--tiny", "--device", "cpu", "--output", str(tmp_path)]
    return harness.Report("test", harness.arguments("", options))


def ones(value: float = 1.0) -> torch.Tensor:
    return torch.full((4,), value)


def measure(report, **changes) -> None:
    """A case of ``report`` with one correct variant and one baseline, except for ``changes``."""
    case = dict(
        batch=1,
        dtype="fp32",
        reference=ones,
        ours={"good": ones},
        baselines={"peer": ones},
        tolerance=1e-6,
    )
    report.case("sum", **case | changes)


def read_csv(folder: Path) -> tuple[list[str], list[dict[str, str]]]:
    (path,) = folder.glob("*.csv")
    lines = path.read_text().splitlines()
    comments = [line for line in lines if line.startswith("#")]
    return comments, list(csv.DictReader(lines[len(comments) :]))


def read_table(folder: Path, table: str = "correctness") -> list[dict[str, str]]:
    """The rows of a table in the output folder of gpu_check.py."""
    lines = (folder / f"{table}.csv").read_text().splitlines()
    return list(csv.DictReader(line for line in lines if not line.startswith("#")))


@pytest.fixture
def fake_sanitizer(monkeypatch, tmp_path):
    """Installs a compute-sanitizer that prints ``output`` and records its arguments."""

    def make(output: str, status: int) -> None:
        program = tmp_path / "compute-sanitizer"
        program.write_text(
            f"#!/bin/sh\necho $* >{tmp_path}/arguments\ncat <<'END'\n{output}END\nexit {status}\n"
        )
        program.chmod(0o755)

    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    return make
