"""Run kernel families under NVIDIA's compute-sanitizer and read its output."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

BENCHMARKS = Path(__file__).resolve().parents[1]

TOOLS = ("memcheck", "racecheck")
# racecheck does not support the bulk copies and barriers of Hopper, which Triton uses there too.
RACECHECK_BACKENDS = ("cuda", "cuda/sm80")

# The first line of a finding is indented by one space, the lines that explain it by more.
_FINDING = re.compile(r"^========= (?!COMPUTE-SANITIZER|[A-Z]+ SUMMARY)\S")
_SUMMARY = re.compile(r"^========= [A-Z]+ SUMMARY: ")


def sanitize(tool: str, names: Sequence[str]) -> Iterator[dict[str, Any]]:
    """A row for each family that ran to its end, and one for the tool's summary."""
    program = shutil.which("compute-sanitizer", path=f"{os.environ['PATH']}:/usr/local/cuda/bin")
    if program is None:
        yield {"tool": tool, "family": "all", "outcome": "skipped",
               "note": "compute-sanitizer is not installed"}  # fmt: skip
        return
    options = ["--tool", tool, "--report-api-errors", "no"]
    process = subprocess.Popen(
        [program, *options, sys.executable, "-m", "gpu_checks.launch_once", *names],
        cwd=BENCHMARKS,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        # Every tensor gets an allocation of its own, so that reads past its end are detected.
        env=os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
    )
    assert process.stdout is not None
    row: dict[str, Any] = {}
    for row in parse(tool, echoed(process.stdout)):
        yield row
    status = process.wait()
    if status and row["outcome"] == "pass":
        yield {**row, "outcome": "FAIL", "note": f"ended with status {status}"}


def echoed(lines: Iterable[str]) -> Iterator[str]:
    """Print ``lines`` and pass them on."""
    for line in lines:
        print(line, end="", flush=True)
        yield line.rstrip("\n")


def parse(tool: str, lines: Iterable[str]) -> Iterator[dict[str, Any]]:
    """Rows from the output of compute-sanitizer running launch_once.py.

    On a GPU that the tool does not support the program may run unobserved; no family passes then.
    """
    family, summary, unsupported = "start", "ended without a summary", ""
    findings: list[str] = []
    for line in lines:
        text = line.removeprefix("========= ")
        if "Device not supported" in line:
            unsupported = text
        elif line.startswith("family "):
            family, findings = line.removeprefix("family "), []
        elif line == f"end {family}" and not unsupported:
            outcome = "FAIL" if findings else "pass"
            note = f"{len(findings)} findings, first: {findings[0]}" if findings else ""
            yield {"tool": tool, "family": family, "outcome": outcome, "note": note}
        elif _FINDING.match(line):
            findings.append(text)
        elif _SUMMARY.match(line):
            summary = text
    outcome = "pass" if re.search(r"SUMMARY: 0 (errors|hazards)", summary) else "FAIL"
    if unsupported:
        outcome, summary = "skipped", unsupported
    yield {"tool": tool, "family": "all", "outcome": outcome, "note": summary}
