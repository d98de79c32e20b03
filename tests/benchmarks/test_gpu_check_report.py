"""The tables of gpu_check.py's report."""

from __future__ import annotations

import importlib
import re

import pytest

from .conftest import read_table


@pytest.fixture
def report(tmp_path, capsys):
    gpu_report = importlib.import_module("gpu_checks.report")
    report = gpu_report.Report(tmp_path, {"device": "A GPU"})
    numbers = {
        "us": 950.04,
        "peer us": 1500.0,
        "speedup": 1.5789,
        "k-iters": 767,
        "us/k-iter": 1.2386,
    }
    report.add(
        "Time", family="sm90-forward", dtype="bf16", outcome="timed", peer="cuDNN", **numbers
    )
    report.add("Time", family="argmax", dtype="bf16", outcome="FAIL", note="a | b")
    return report


def test_report_tables(report, tmp_path, capsys):
    head, first, second = capsys.readouterr().out.splitlines()[-3:]
    for column, text in {
        "us": "950.0",
        "speedup": "1.58",
        "k-iters": "767",
        "us/k-iter": "1.239",
    }.items():
        end = re.search(rf" {column}(?= |$)", head).end()
        assert first[:end].endswith(f" {text}")
    assert first.endswith(" cuDNN") and second.endswith(" a | b")
    markdown = (tmp_path / "report.md").read_text()
    assert markdown.startswith("# gpu_check\n\n* device: A GPU\n\n## Time\n\n")
    head, _, first, second = [line for line in markdown.splitlines() if line.startswith("|")]
    columns = len(importlib.import_module("gpu_checks.report").TABLES["Time"])
    assert len(head.split(" | ")) == len(first.split(" | ")) == columns
    assert "| 950.0 | 1500.0 | 1.58 |" in first and second.endswith("|  | a \\| b |")
    assert (tmp_path / "time.csv").read_text().startswith("# device: A GPU\nfamily,dtype,outcome,")
    assert [row["speedup"] for row in read_table(tmp_path, "time")] == ["1.5789", ""]
