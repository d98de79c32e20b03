"""first_gpu_run.sh runs all its parts; every test file that it names exists."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

from .conftest import BENCHMARKS


def test_first_gpu_run_continues_after_a_failure(tmp_path):
    """The programs that it calls only record their arguments."""
    for name in ("python", "cmake", "ninja"):
        (tmp_path / name).write_text(
            f'#!/bin/sh\necho "$*" >>{tmp_path}/calls\n'
            'case "$*" in *conformance*) echo bad bits; exit 3;; esac\n'
        )
        (tmp_path / name).chmod(0o755)
    environment = os.environ | {
        "PYTHON": "./python",
        "CUDACXX": "true",
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
    }
    script = str(BENCHMARKS / "first_gpu_run.sh")

    def run(*arguments: str) -> int:
        return subprocess.run([script, *arguments], env=environment, cwd=tmp_path).returncode

    assert run("first", "1") == run("second", "2") == 0
    assert run() == run("first") == run("third", "3") == 2
    summary = (tmp_path / "1" / "summary.txt").read_text().splitlines()
    parts = [line.partition(":")[0] for line in summary[:-1]]
    assert parts == ["build", "architectures", "conformance", "check", "sm80", "upsampling", "sm90"]
    assert re.fullmatch(r"conformance: failed, status 3, after \d s; bad bits", summary[2])
    assert all(": done after " in line for line in summary[3:-1])
    files = {word for word in (tmp_path / "calls").read_text().split() if word.endswith(".py")}
    assert {"ops/test_cudnn_reference.py", "ops/test_aspp.py", "backends/test_triton.py"} < files
    tests = Path(__file__).parents[1]
    assert [file for file in files if not (tests / file).exists()] == []
