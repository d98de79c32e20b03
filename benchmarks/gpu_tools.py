"""gpu_check's calls of other programs: compute-sanitizer, and CMake for the two producers."""

from __future__ import annotations

import csv
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

BENCHMARKS = Path(__file__).resolve().parent
ROOT = BENCHMARKS.parent

SANITIZERS = ("memcheck", "racecheck")
VARIANTS = {"wait_group": "OFF", "async arrive": "ON"}  # of DEEPLAB_FAST_ASYNC_ARRIVE
VARIED = ("sm90-projection", "sm90-forward")  # the families whose kernel has the two forms

# The first line of a finding has one space before its text, lines that explain it have more.
_FINDING = re.compile(r"^========= (?!COMPUTE-SANITIZER|[A-Z]+ SUMMARY)\S")
_SUMMARY = re.compile(r"^========= [A-Z]+ SUMMARY: ")


def races_are_checked(family: str, backend: str) -> bool:
    """racecheck knows neither the copies nor the barriers of compute capability 9.0."""
    return backend == "cuda/sm80" or family in ("argmax", "cross-entropy", "cross-entropy-backward")


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
    """What the output of compute-sanitizer over gpu_measure.py says.

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


def cannot_build() -> str | None:
    """What a build of the CUDA kernels lacks here; None if nothing."""
    tools = {
        "nvcc (CUDACXX, or on the path)": os.environ.get("CUDACXX") or shutil.which("nvcc"),
        "cmake": shutil.which("cmake"),
        "ninja": shutil.which("ninja"),
        "pybind11": importlib.util.find_spec("pybind11"),
    }
    missing = ", ".join(name for name, found in tools.items() if not found)
    return f"building the kernels twice needs {missing}" if missing else None


def variants(families: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Both forms of the Hopper producer: built, then checked and timed. by gpu_check itself."""
    says = "from deeplab_fast import _C; print(_C.build_info()['async_arrive'])"
    with tempfile.TemporaryDirectory() as folder:
        for name, switch in VARIANTS.items():
            place = Path(folder) / switch
            path = [str(build(place, switch)), os.environ.get("PYTHONPATH", "")]
            environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, path))}
            answer = subprocess.run(
                [sys.executable, "-c", says], env=environment, cwd=folder, capture_output=True
            )
            built_with = answer.stdout.decode().strip()
            if built_with != str(switch == "ON"):
                note = f"the build says async_arrive is {built_with or 'unknown'}"
                yield {"variant": name, "family": "all", "outcome": "FAIL", "note": note}
                continue
            command = [sys.executable, str(BENCHMARKS / "gpu_check.py"), "--time"]
            command += ["--families", *families, "--output", str(place / "results")]
            subprocess.run(command, env=environment)
            yield from variant_rows(name, place / "results")


def build(place: Path, switch: str) -> Path:
    """The folder of a copy of the installed package, its _C built with the switch."""
    import pybind11

    import deeplab_fast

    configure = [
        *("cmake", "-S", str(ROOT), "-B", str(place / "build"), "-G", "Ninja"),
        f"-DPython_EXECUTABLE={sys.executable}",
        f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
        f"-DDEEPLAB_FAST_VERSION={deeplab_fast.__version__}",
        "-DDEEPLAB_FAST_CUDA=ON",
        "-DCMAKE_CUDA_ARCHITECTURES=90a-real",
        f"-DDEEPLAB_FAST_ASYNC_ARRIVE={switch}",
    ]
    compiler = os.environ.get("CUDACXX") or str(shutil.which("nvcc"))
    subprocess.run(configure, check=True, env=os.environ | {"CUDACXX": compiler})
    subprocess.run(["cmake", "--build", str(place / "build"), "--target", "_C"], check=True)
    package = place / "package" / "deeplab_fast"
    others = shutil.ignore_patterns("_C*.so", "__pycache__")
    shutil.copytree(Path(deeplab_fast.__file__).parent, package, ignore=others)
    shutil.copy(place / "build" / "_C.so", package)
    return package.parent


def variant_rows(name: str, results: Path) -> Iterator[dict[str, Any]]:
    """What a gpu_check wrote: of each family the real shape, and the tiny one if it is wrong."""
    times = {row["family"]: row for row in read_csv(results / "time.csv")}
    for row in read_csv(results / "correctness.csv"):
        if row["shape"] == "tiny" and row["outcome"] == "pass":
            continue
        known = row | {key: value for key, value in times.get(row["family"], {}).items() if value}
        numbers = ("error", "tolerance", "us", "ratio", "us/step")
        yield {
            "variant": name,
            **{key: row[key] for key in ("family", "outcome", "note")},
            **{key: float(known[key]) for key in numbers if known.get(key)},
        }


def read_csv(path: Path) -> list[dict[str, str]]:
    if not path.exists():
        return []
    lines = [line for line in path.read_text().splitlines() if not line.startswith("#")]
    return list(csv.DictReader(lines))
