"""Output of compute-sanitizer, read by gpu_check.py."""

from __future__ import annotations

import importlib

import pytest

from .conftest import BENCHMARKS

CLEAN = """========= COMPUTE-SANITIZER
family argmax
end argmax
========= ERROR SUMMARY: 0 errors
"""


FINDINGS = """========= COMPUTE-SANITIZER
family argmax
end argmax
family cross-entropy
========= Invalid __global__ read of size 4
=========     at kernel()+0x10
=========     by thread (0,0,0) in block (0,0,0)
=========
========= Invalid __global__ write of size 2
end cross-entropy
========= ERROR SUMMARY: 2 errors
"""


UNSUPPORTED = """========= COMPUTE-SANITIZER
========= Error: Device not supported. Please refer to
family argmax
end argmax
"""


@pytest.mark.parametrize(
    ("output", "status", "expected"),
    [
        (CLEAN, 0, [("argmax", "pass", ""), ("all", "pass", "ERROR SUMMARY: 0 errors")]),
        (
            CLEAN,
            1,
            [
                ("argmax", "pass", ""),
                ("all", "pass", "ERROR SUMMARY: 0 errors"),
                ("all", "FAIL", "ended with status 1"),
            ],
        ),
        (
            FINDINGS,
            1,
            [
                ("argmax", "pass", ""),
                ("cross-entropy", "FAIL", "2 findings, first: Invalid __global__ read of size 4"),
                ("all", "FAIL", "ERROR SUMMARY: 2 errors"),
            ],
        ),
        (UNSUPPORTED, 1, [("all", "skipped", "Error: Device not supported. Please refer to")]),
        ("family argmax\n", 1, [("all", "FAIL", "ended without a summary")]),
    ],
    ids=["clean", "status", "findings", "unsupported", "cut off"],
)  # fmt: skip
def test_output_of_compute_sanitizer(fake_sanitizer, tmp_path, output, status, expected):
    fake_sanitizer(output, status)
    gpu_tools = importlib.import_module("gpu_checks.sanitizer")
    rows = list(gpu_tools.sanitize("memcheck", ["argmax", "cross-entropy"]))
    assert [(row["family"], row["outcome"], row["note"]) for row in rows] == expected
    assert all(row["tool"] == "memcheck" for row in rows)
    arguments = (tmp_path / "arguments").read_text().split()
    assert arguments[:2] == ["--tool", "memcheck"]
    assert arguments[-4:-2] == ["-m", "gpu_checks.launch_once"]
    assert (BENCHMARKS / "gpu_checks" / "launch_once.py").exists()
    assert arguments[-2:] == ["argmax", "cross-entropy"]


def test_missing_compute_sanitizer_skips_its_part(monkeypatch):
    gpu_tools = importlib.import_module("gpu_checks.sanitizer")
    monkeypatch.setattr(gpu_tools.shutil, "which", lambda *args, **kwargs: None)
    (row,) = gpu_tools.sanitize("racecheck", ["argmax"])
    assert (row["outcome"], row["note"]) == ("skipped", "compute-sanitizer is not installed")
