"""The harness reports variants that are wrong or raise, and times the others."""

from __future__ import annotations

import importlib
import re
import sys
import time

import pytest
import torch

from .conftest import measure, ones, read_csv


@pytest.mark.parametrize("kind", ["ours", "baselines"])
@pytest.mark.parametrize("value", [1.1, float("nan"), None], ids=["off", "nan", "shape"])
def test_wrong_variant_is_reported_and_the_others_are_timed(report, tmp_path, capsys, kind, value):
    def bad():
        return torch.ones(2) if value is None else ones(value)

    good = {"ours": {"good": ones}, "baselines": {"peer": ones}}
    measure(report, **{kind: {**good[kind], "bad": bad}})
    measure(report, dtype="bf16")
    error = {None: "inf", 1.1: "0.1"}.get(value, "nan")
    failure = f"failed sum, batch 1, fp32, bad: WRONG: error {error}, tolerance 1e-06"
    assert f"{failure}\n" in capsys.readouterr().out
    comments, rows = read_csv(tmp_path)
    assert f"# {failure}" in comments
    assert [(row["dtype"], row["variant"]) for row in rows] == [
        ("fp32", "good"), ("fp32", "peer"), ("bf16", "good"), ("bf16", "peer")
    ]  # fmt: skip
    with pytest.raises(SystemExit, match=f"^{re.escape(failure)}$"):
        report.finish()


def test_a_variant_can_have_a_tolerance_of_its_own(report, tmp_path):
    variants = {"exact": ones, "coarse": lambda: ones(1.1), "off": lambda: ones(1.1)}
    measure(report, ours=variants, tolerances={"coarse": 0.2})
    _, rows = read_csv(tmp_path)
    tolerances = {row["variant"]: float(row["tolerance"]) for row in rows}
    assert tolerances == {"exact": 1e-6, "coarse": 0.2, "peer": 1e-6}


def test_a_variant_of_lower_precision_is_no_baseline(report, tmp_path):
    def slow():
        time.sleep(0.01)
        return ones()

    measure(report, baselines={"peer": slow, "int8": ones}, tolerances={"int8": 0.2})
    measure(report, dtype="bf16", baselines={"int8": ones}, tolerances={"int8": 0.2})
    _, rows = read_csv(tmp_path)
    speedups = {(row["dtype"], row["variant"]): row["speedup"] for row in rows}
    assert speedups["fp32", "peer"] == "1" and float(speedups["fp32", "int8"]) > 1
    assert {value for (dtype, _), value in speedups.items() if dtype == "bf16"} == {""}


@pytest.mark.parametrize("kind", ["ours", "baselines"])
def test_variant_that_raises_is_reported_and_the_others_are_timed(report, tmp_path, capsys, kind):
    def bad():
        raise ValueError("needs a bigger machine\nand more")

    good = {"ours": {"good": ones}, "baselines": {"peer": ones}}
    measure(report, **{kind: {"bad": bad, **good[kind]}})
    failure = "failed sum, batch 1, fp32, bad: ValueError: needs a bigger machine"
    assert f"{failure}\n" in capsys.readouterr().out
    comments, rows = read_csv(tmp_path)
    assert f"# {failure}" in comments and [row["variant"] for row in rows] == ["good", "peer"]
    with pytest.raises(SystemExit, match=f"^{failure}$"):
        report.finish()


def test_case_whose_reference_or_timing_raises_is_reported(report, tmp_path, monkeypatch):
    def bad(*args, **options):
        raise RuntimeError("out of memory")

    measure(report, reference=bad)
    measure(report, dtype="bf16")
    monkeypatch.setattr(importlib.import_module("common.harness"), "interleaved", bad)
    measure(report, dtype="fp16")
    comments, rows = read_csv(tmp_path)
    assert "# failed sum, batch 1, fp32, reference: RuntimeError: out of memory" in comments
    assert "# failed sum, batch 1, fp16, timing: RuntimeError: out of memory" in comments
    assert {row["dtype"] for row in rows} == {"bf16"}
    with pytest.raises(SystemExit):
        report.finish()


def test_case_without_a_correct_variant_is_reported(report, tmp_path):
    measure(report, ours={"bad": lambda: ones(2.0)}, baselines={})
    with pytest.raises(SystemExit, match="bad: WRONG: error 1, tolerance 1e-06"):
        report.finish()
    comments, rows = read_csv(tmp_path)
    assert not rows and any("bad: WRONG" in line for line in comments)


def test_process_stops_when_the_gpu_is_unusable(report, tmp_path, monkeypatch):
    def bad():
        raise RuntimeError("CUDA error: an illegal memory access was encountered\nCompile with")

    later = []
    harness = importlib.import_module("common.harness")
    monkeypatch.setattr(harness, "is_unusable", lambda device: True)
    with pytest.raises(SystemExit) as error:
        measure(report, ours={"bad": bad, "good": lambda: later.append(1)})
    assert error.value.code == (
        "failed sum, batch 1, fp32, bad: RuntimeError: CUDA error: an illegal memory access was "
        "encountered: the CUDA error left the GPU unusable for this process; stopping"
    )
    assert not later and any("illegal memory access" in line for line in read_csv(tmp_path)[0])


def test_graphs_option_reaches_warm_up_and_timing(report, monkeypatch):
    harness, seen = importlib.import_module("common.harness"), []
    prepare, interleaved = harness.prepare, harness.interleaved
    monkeypatch.setattr(harness, "prepare", lambda *args: seen.append(args[-1]) or prepare(*args))
    monkeypatch.setattr(
        harness, "interleaved", lambda *args: seen.append(args[-1]) or interleaved(*args)
    )
    measure(report, graphs=False)
    measure(report)
    assert seen == 3 * [False] + 3 * [True]


def test_missing_matplotlib_is_reported(report, monkeypatch, tmp_path, capsys):
    for module in ("matplotlib", "matplotlib.figure"):
        monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.delitem(sys.modules, "common.plot", raising=False)
    measure(report)
    report.finish()
    assert "no plot: matplotlib is not installed" in capsys.readouterr().out
    assert [path.suffix for path in tmp_path.iterdir()] == [".csv"]


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--device", "gpu0"], "expected cpu, cuda or cuda:N, got 'gpu0'"),
        (["--device", "cuda:99"], " GPUs that PyTorch sees, got 'cuda:99'"),
        (["--device", "meta"], "expected cpu, cuda or cuda:N, got 'meta'"),
        (
            ["--device", "cpu", "--dtype", "tf32"],
            "--dtype: expected fp32, bf16 or fp16 on a CPU, got tf32",
        ),
        (["--batch", "0"], "expected positive integers, got 0"),
        (["--output", __file__], "argument --output: expected a folder, got "),
        (["--tiny", "--full"], "not allowed with argument"),
    ],
)
def test_invalid_arguments_are_rejected(harness, argv, message, capsys):
    with pytest.raises(SystemExit) as error:
        harness.arguments("", argv)
    assert error.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("file, commit", [("abc1234-dirty\n", "abc1234-dirty"), (None, "-")])
@pytest.mark.parametrize("git", ["absent", "unusable"])
def test_commit_without_git_is_read_from_a_file(monkeypatch, tmp_path, file, commit, git):
    environment = importlib.import_module("common.environment")
    monkeypatch.setattr(environment, "ROOT", tmp_path)
    if git == "unusable":
        (tmp_path / ".git").write_text("gitdir: nowhere")
    if file is not None:
        (tmp_path / "COMMIT").write_text(file)
    assert environment.commit() == commit
