"""run_all.py runs all pieces, whatever happens to one of them."""

from __future__ import annotations

import contextlib
import importlib
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from .conftest import BENCHMARKS, SCRIPTS


def test_list_prints_the_names_of_all_pieces(harness, capsys):
    run_all = importlib.import_module("run_all")
    run_all.main(["--list", "--batch", "1"])
    names = capsys.readouterr().out.split()
    assert names[:2] == ["correctness", "ceilings"]
    assert {name.split("-")[0] for name in names[2:]} >= {
        script.removeprefix("bench_") for script in SCRIPTS
    } - {"ceilings"}
    assert "accelerate-smp-Unet-resnet18" in names
    gpu = run_all.pieces(torch.device("cuda"), [8, 1], tiny=False)
    assert list(gpu)[2] == "dispatch_table-bf16-8"
    assert {"aspp-tf32-1", "depthwise-fp32-8"} < set(gpu)
    assert gpu["model-bf16-8"][2:] == ["--full", "--dtype", "bf16", "--batch", "8"]
    for command in gpu.values():
        assert any(Path(part).exists() for part in command[1:])
    assert gpu["dispatch_table-bf16-8"][2:] == ["--dtype", "bf16", "--batch", "8"]
    assert "dispatch_table-bf16-1" not in run_all.pieces(torch.device("cpu"), [1], tiny=True)


def test_a_piece_writes_its_results(harness, tmp_path, monkeypatch, capsys):
    run_all = importlib.import_module("run_all")
    commands = run_all.pieces(torch.device("cpu"), [1], tiny=True)
    on_cpu = {name: [*command, "--device", "cpu"] for name, command in commands.items()}
    monkeypatch.setattr(run_all, "pieces", lambda *args: on_cpu)
    run_all.main(["ceil", "--tiny", "--output", str(tmp_path / "new")])
    assert re.search(r"^ceilings: done in \d+ s$", capsys.readouterr().out, re.MULTILINE)
    files = {path.suffix: path for path in (tmp_path / "new").glob("c*")}
    assert set(files) == {".csv", ".png", ".txt"}
    files[".png"].unlink()
    run_all.plot_unfinished(tmp_path / "new")
    assert files[".png"].read_bytes().startswith(b"\x89PNG")
    with pytest.raises(SystemExit):
        run_all.main(["asp", "lunch"])
    assert "PIECE: expected a prefix of a name in --list, got 'lunch'" in capsys.readouterr().err


def test_correctness_piece_tests_the_installed_package(harness, monkeypatch, tmp_path, capsys):
    run_all = importlib.import_module("run_all")
    for place in ("checkout", "installed"):
        package = tmp_path / place / "deeplab_fast" / "__init__.py"
        package.parent.mkdir(parents=True)
        package.write_text(f"place = {place!r}")
    tests = tmp_path / "checkout" / "tests"
    (tests / "ops").mkdir(parents=True)
    (tests / "ops" / "test_cudnn_reference.py").write_text(
        "import deeplab_fast\n\ndef test_place():\n    assert deeplab_fast.place == 'installed'\n"
    )
    monkeypatch.setattr(run_all, "TESTS", tests)
    monkeypatch.chdir(tmp_path / "checkout")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "installed"))
    run_all.main(["correctness", "--output", str(tmp_path / "out")])
    assert re.search(r"^correctness: done in \d+ s$", capsys.readouterr().out, re.MULTILINE)
    assert "1 passed" in (tmp_path / "out" / "correctness.txt").read_text()


def test_next_piece_runs_after_a_failure_or_timeout(harness, monkeypatch, tmp_path, capsys):
    run_all = importlib.import_module("run_all")
    python = {
        "correctness": "raise SystemExit(1)",
        "slow": "import time; time.sleep(60)",
        "broken": "raise RuntimeError",
        "good": "print('x')",
    }
    commands = {name: [sys.executable, "-I", "-c", code] for name, code in python.items()}
    monkeypatch.setattr(run_all, "pieces", lambda *args: commands)
    with pytest.raises(SystemExit, match="^failed or out of time: correctness slow broken$"):
        run_all.main(["--limit", "1", "--output", str(tmp_path)])
    correctness, slow, broken, good, _ = capsys.readouterr().out.splitlines()
    assert correctness.startswith("correctness: failed, status 1")
    assert slow.startswith("slow: out of time after 1 s")
    assert broken.startswith("broken: failed, status 1") and good.startswith("good: done")


def test_terminating_run_all_kills_the_running_piece(tmp_path):
    command = [sys.executable, BENCHMARKS / "run_all.py", "correctness", "--output", tmp_path]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    until = time.monotonic() + 60
    while not (pieces := children(process.pid, running="pytest")):
        assert process.poll() is None and time.monotonic() < until
        time.sleep(0.05)
    (piece,) = pieces
    time.sleep(0.2)  # until run_all waits for the piece
    process.terminate()
    assert process.wait(20) == 143
    assert not Path("/proc", piece).exists()


def children(pid: int, running: str) -> list[str]:
    """Child processes with ``running`` in their command line."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # the process has ended
            is_child = stat.read_text().rpartition(") ")[2].split()[1] == str(pid)
            if is_child and running in stat.with_name("cmdline").read_text():
                found.append(stat.parent.name)
    return found


def test_files_without_rows_are_not_plotted(harness, tmp_path):
    (tmp_path / "aspp-1.csv").write_text("# failed case: WRONG\n" + ",".join(harness.COLUMNS))
    importlib.import_module("run_all").plot_unfinished(tmp_path)
    assert [path.suffix for path in tmp_path.iterdir()] == [".csv"]
