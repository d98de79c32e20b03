"""gpu_check's calls of NVIDIA's compute-sanitizer."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

BENCHMARKS = Path(__file__).resolve().parent

SANITIZERS = ("memcheck", "racecheck")
# racecheck knows neither the copies nor the barriers of Hopper, which Triton uses there too.
RACES_CHECKED = ("cuda", "cuda/sm80")

# The first line of a finding has one space before its text, lines that explain it have more.
_FINDING = re.compile(r"^========= (?!COMPUTE-SANITIZER|[A-Z]+ SUMMARY)\S")
_SUMMARY = re.compile(r"^========= [A-Z]+ SUMMARY: ")


def sanitize(tool: str, names: Sequence[str]) -> Iterator[dict[str, Any]]:
    """A row for each family that came to its end, and one for what the tool says of them all."""
    program = shutil.which("compute-sanitizer", path=f"{os.environ['PATH']}:/usr/local/cuda/bin")
    if program is None:
        yield {"tool": tool, "family": "all", "outcome": "skipped",
               "note": "compute-sanitizer is not installed"}  # fmt: skip
        return
    options = ["--tool", tool, "--report-api-errors", "no"]
    process = subprocess.Popen(
        [program, *options, sys.executable, str(BENCHMARKS / "gpu_measure.py"), *names],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        # Each tensor is an allocation of its own, so that reading past its end is seen.
        env=os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
    )
    assert process.stdout is not None
    row: dict[str, Any] = {}
    for row in sanitizer_rows(tool, printed(process.stdout)):
        yield row
    status = process.wait()
    if status and row["outcome"] == "pass":
        yield {**row, "outcome": "FAIL", "note": f"ended with status {status}"}


def printed(lines: Iterable[str]) -> Iterator[str]:
    for line in lines:
        print(line, end="", flush=True)
        yield line.rstrip("\n")


def sanitizer_rows(tool: str, lines: Iterable[str]) -> Iterator[dict[str, Any]]:
    """Read the output of compute-sanitizer over gpu_measure.py.

    Where the tool cannot watch this GPU the program may run all the same: no family passes then.
    """
    family, summary, unsupported = "start", "ended without a summary", ""
    findings: list[str] = []
    for line in lines:
        said = line.removeprefix("========= ")
        if "Device not supported" in line:
            unsupported = said
        elif line.startswith("family "):
            family, findings = line.removeprefix("family "), []
        elif line == f"end {family}" and not unsupported:
            outcome = "FAIL" if findings else "pass"
            note = f"{len(findings)} findings, first: {findings[0]}" if findings else ""
            yield {"tool": tool, "family": family, "outcome": outcome, "note": note}
        elif _FINDING.match(line):
            findings.append(said)
        elif _SUMMARY.match(line):
            summary = said
    outcome = "pass" if re.search(r"SUMMARY: 0 (errors|hazards)", summary) else "FAIL"
    if unsupported:
        outcome, summary = "skipped", unsupported
    yield {"tool": tool, "family": "all", "outcome": outcome, "note": summary}
