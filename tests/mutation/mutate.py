"""Mutation check: insert one fault at a time into the code, and report the test that detects it.

    python tests/mutation/mutate.py                    all faults of faults/
    python tests/mutation/mutate.py --report FILE      and a table of them, as docs/mutations.md
    python tests/mutation/mutate.py --few 3            3 faults, chosen by the commit
    python tests/mutation/mutate.py barrier cells.cuh  faults with such a word in their name or file

Works on a copy of csrc and of the package in a temporary folder, compiles what a fault changes, and
runs the tests of that file until one fails. The exit status is 1 if a fault was not detected.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import multiprocessing
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import pybind11
import pytest

os.environ["TRITON_INTERPRET"] = "1"  # as in conftest.py, before something imports triton
import torch._dynamo  # noqa: E402, F401  imported once, for the tests that are forked from here

sys.path.insert(0, str(Path(__file__).parent))
from faults import FAULTS, GUARDS, Fault, Guard, check_texts  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
MODULES = ("_C", "_emulated")
TIMEOUT = 600  # seconds; the emulator itself ends a kernel that waits or spins for ever


class Verdict(NamedTuple):
    path: str
    fault: Fault
    detected_by: str | None
    seconds: float


class Scratch:
    """A copy of the sources, with its build folder and the modules that were built from it."""

    def __init__(self, folder: Path) -> None:
        self.source, self.build, self.sound = (
            folder / name for name in ("source", "build", "sound")
        )
        compiled = shutil.ignore_patterns("*.so", "__pycache__")
        for name in ("csrc", "deeplab_fast"):
            shutil.copytree(ROOT / name, self.source / name, ignore=compiled)
        shutil.copy(ROOT / "CMakeLists.txt", self.source)
        options = [
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            "-DDEEPLAB_FAST_CUDA=OFF",
            "-DCMAKE_BUILD_TYPE=None",
            # A misaligned vector, an error on a GPU, ends the process with signal 4.
            "-DCMAKE_CXX_FLAGS=-O1 -fsanitize=alignment -fsanitize-undefined-trap-on-error",
            f"-DDEEPLAB_FAST_VERSION={importlib.metadata.version('deeplab-fast')}",
        ]
        self._run("cmake", "-S", self.source, "-B", self.build, "-G", "Ninja", *options)
        self.compile(*MODULES)
        self.sound.mkdir()
        for module in MODULES:
            shutil.copy(self.build / f"{module}.so", self.sound)
            self.install(self.sound, module)

    @staticmethod
    def _run(*command: str | Path) -> None:
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode != 0:
            sys.exit(f"{' '.join(map(str, command))} failed:\n{done.stdout}{done.stderr}")

    def compile(self, *targets: str) -> None:
        self._run("cmake", "--build", self.build, "--target", *targets)

    def install(self, folder: Path, module: str) -> None:
        """Copy a compiled module from this folder to where the tests import it from."""
        package = self.source / "deeplab_fast" if module == "_C" else self.source
        shutil.copy(folder / f"{module}.so", package)

    def failing_test(self, tests: str) -> str | None:
        """The first test of this selection that fails, or None."""
        names = [word for word in tests.split() if word.endswith(".py")]
        files = [str(path) for name in names for path in ROOT.glob(f"tests/*/{name}")]
        selected = " ".join(word for word in tests.split() if not word.endswith(".py"))
        options = ["-x", "-q", "-n0", "-p", "no:cacheprovider", f"--rootdir={ROOT}", *files]
        if selected:
            options += ["-k", selected]
        log = self.source / "log"
        process = multiprocessing.get_context("fork").Process(
            target=run_pytest, args=(self.source, options, log)
        )
        process.start()
        process.join(TIMEOUT)
        if process.exitcode is None:
            process.kill()
            return f"a timeout of {TIMEOUT} s"
        if process.exitcode == 0:
            return None
        if process.exitcode < 0:
            return f"a crash with signal {-process.exitcode}"
        failed = re.search(r"^FAILED \S*?(\w+\.py::.+?)(?: - .*)?$", log.read_text(), re.M)
        if process.exitcode != 1 or not failed:
            sys.exit(f"pytest {tests} ended with {process.exitcode}:\n{log.read_text()}")
        return failed[1]

    def verdict(self, path: str, fault: Fault) -> Verdict:
        start = time.monotonic()
        file, guard = self.source / path, guard_of(path, fault)
        sound = file.read_text()
        file.write_text(sound.replace(fault.sound, fault.faulty))
        try:
            if path.startswith("csrc/"):
                self.compile(guard.module)
                self.install(self.build, guard.module)
            detected_by = self.failing_test(guard.tests)
        finally:
            file.write_text(sound)
            self.install(self.sound, guard.module)
        return Verdict(path, fault, detected_by, time.monotonic() - start)


def run_pytest(folder: Path, options: list[str], log: Path) -> None:
    """Run pytest on the package in ``folder``, which this process has not imported yet."""
    with log.open("w") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    os.chdir(folder)
    os.environ["PYTHONPATH"] = str(folder)
    sys.path.insert(0, str(folder))
    # A cached module of the same size and time would be used instead of a faulty one.
    os.environ["PYTHONDONTWRITEBYTECODE"] = "1"
    sys.dont_write_bytecode = True
    sys.exit(pytest.main(options))


def guard_of(path: str, fault: Fault) -> Guard:
    return fault.guard or GUARDS[path]


def chosen(few: int | None, words: list[str]) -> list[tuple[str, Fault]]:
    """The faults to insert, each with the path of its file."""
    faults = [
        (path, fault)
        for path in FAULTS
        for fault in FAULTS[path]
        if not words or any(word in path + fault.name for word in words)
    ]
    if few is None:
        return faults
    commit = subprocess.run(
        ["git", "-C", ROOT, "rev-parse", "HEAD"], capture_output=True, text=True, check=True
    ).stdout.strip()
    print(f"the faults of commit {commit}")
    start = int(commit, 16) % len(faults)
    stride = max(1, len(faults) // few)  # spreads them over files, since faults are listed by file
    return [faults[(start + i * stride) % len(faults)] for i in range(min(few, len(faults)))]


def report(verdicts: list[Verdict]) -> str:
    lines = [
        "# Mutation check",
        "",
        "Written by `python tests/mutation/mutate.py --report docs/mutations.md`. Each fault was",
        "inserted into the sources, which were compiled if need be, and the tests of that file ran",
        "until one failed.",
        "",
        "| file | fault | detected by |",
        "|---|---|---|",
    ]
    for path, fault, detected_by, _ in verdicts:
        test = f"`{detected_by}`".replace("|", "\\|") if detected_by else "**nothing**"
        lines.append(f"| {Path(path).name} | {fault.name} | {test} |")
    detected = sum(v.detected_by is not None for v in verdicts)
    return "\n".join([*lines, "", f"{detected} of {len(verdicts)} faults detected.", ""])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "words", nargs="*", help="only faults with one of these words in their name or file"
    )
    parser.add_argument("--few", type=int, help="only this many faults, chosen by the commit")
    parser.add_argument("--report", type=Path, help="Markdown file to write a table to")
    arguments = parser.parse_args()
    faults = chosen(arguments.few, arguments.words)
    check_texts()

    verdicts = []
    with tempfile.TemporaryDirectory() as folder:
        scratch = Scratch(Path(folder))
        for tests in dict.fromkeys(guard_of(*item).tests for item in faults):
            if failing := scratch.failing_test(tests):
                sys.exit(f"{failing} fails without any fault")
        for path, fault in faults:
            verdicts.append(scratch.verdict(path, fault))
            _, _, detected_by, seconds = verdicts[-1]
            print(
                f"{Path(path).name}: {fault.name}: "
                f"{detected_by or 'NOT DETECTED'}, {seconds:.0f} s",
                flush=True,
            )
    text = report(verdicts)
    if arguments.report:
        arguments.report.write_text(text)
    print(text.splitlines()[-1])
    return any(v.detected_by is None for v in verdicts)


if __name__ == "__main__":
    sys.exit(main())
