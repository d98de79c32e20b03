"""gpu_check: every family is in its report, and what hangs, breaks or is wrong is a failure."""

from __future__ import annotations

import csv
import functools
import importlib
import itertools
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
import types
import warnings
from pathlib import Path

import pytest
import torch

from deeplab_fast.backends import registry

from ..support import emulator

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
GPU_CHECK = [sys.executable, str(BENCHMARKS / "gpu_check.py")]


@pytest.fixture(autouse=True)
def benchmarks(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # gpu_check sets it, and this test takes it back


@pytest.fixture(autouse=True)
def poisoned_memory():
    """In the place of conftest's: gpu_check has to do that by itself."""
    assert not torch.are_deterministic_algorithms_enabled()


def read(folder: Path, table: str = "correctness") -> list[dict[str, str]]:
    lines = (folder / f"{table}.csv").read_text().splitlines()
    return list(csv.DictReader(line for line in lines if not line.startswith("#")))


def gpu_check(folder: Path, families: list[str], *options: str) -> dict[str, tuple[str, str]]:
    """Outcome and note of each family; the run has to fail exactly if an outcome does."""
    arguments = ["--backend", "emulated", "--output", str(folder), "--families", *families]
    status = importlib.import_module("gpu_check").main([*arguments, *options])
    found = {row["family"]: (row["outcome"], row["note"]) for row in read(folder)}
    assert status == int({outcome for outcome, _ in found.values()} != {"pass"})
    return found


def test_every_family_is_right_in_the_emulator(tmp_path):
    done = subprocess.run(
        [*GPU_CHECK, "--backend", "emulated", "--output", tmp_path / "out"],
        cwd=tmp_path, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    rows = read(tmp_path / "out")
    families = importlib.import_module("gpu_families").FAMILIES
    assert [(row["family"], row["dtype"]) for row in rows] == [
        (name, dtype) for name, family in families.items() for dtype in family.dtypes
    ]
    report = (tmp_path / "out" / "report.md").read_text()
    for row in rows:
        if row["outcome"] == "skipped":  # Triton's interpreter does not work with every NumPy
            assert row["family"].startswith("triton-") and row["note"] and not row["error"]
        else:
            assert row["outcome"] == "pass" and float(row["error"]) <= float(row["tolerance"])
        assert f"| {row['family']} | tiny | {row['dtype']} | {row['outcome']} |" in report
        assert re.search(rf"^{row['family']} +tiny +{row['dtype']}", done.stdout, re.MULTILINE)
    for key in ("device", "versions", "CUDA", "commit", "date"):
        assert f"* {key}: " in report and f"\n{key}: " in "\n" + done.stdout


def test_without_a_gpu_one_line_says_so(tmp_path):
    done = subprocess.run(
        [*GPU_CHECK, "--output", tmp_path / "out"],
        cwd=tmp_path, capture_output=True, text=True, env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},
    )  # fmt: skip
    assert done.returncode == 2 and done.stdout == ""
    reason = "there is no GPU that torch can use.*|torch .* was built without CUDA"
    line = f"gpu_check: ({reason}); --backend emulated needs no GPU\n"
    assert re.fullmatch(line, done.stderr)
    assert not (tmp_path / "out").exists()


def test_why_torch_has_no_gpu(monkeypatch):
    def is_available():
        warnings.warn("The NVIDIA driver on your system is too old\nmore", stacklevel=1)
        return False

    gpu_run = importlib.import_module("gpu_run")
    monkeypatch.setattr(torch.cuda, "is_available", is_available)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    (row,) = gpu_run.machine(gpu_run.GPU)
    assert row["none"].startswith(
        "there is no GPU that torch can use: The NVIDIA driver on your system is too old; "
    )
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(torch.version, "hip", None)
    (row,) = gpu_run.machine(gpu_run.GPU)
    assert row["none"].startswith(f"torch {torch.__version__} was built without CUDA; ")


def test_a_gpu_that_does_not_answer_is_given_up(tmp_path, monkeypatch, capsys):
    gpu_run = importlib.import_module("gpu_run")
    monkeypatch.setattr(gpu_run, "machine", lambda place: time.sleep(60))
    arguments = ["--family-limit", "1", "--output", str(tmp_path / "out")]
    assert importlib.import_module("gpu_check").main(arguments) == 2
    said = "gpu_check: asking for the GPU failed: out of time after 1 s\n"
    assert capsys.readouterr().err == said


def test_its_own_process_leaves_cuda_alone(tmp_path):
    """Its forks could not use a GPU else."""
    code = """
import argparse, torch
def used(*args): raise AssertionError("CUDA is used")
torch.cuda.is_available = torch.cuda.device_count = torch.cuda._lazy_init = used
torch._C._cuda_getDeviceCount = torch._C._cuda_init = used
import gpu_run
args = argparse.Namespace(families=[], limit=None, backend=None, output=None, family_limit=1)
gpu_run.Run(args).header("a GPU")
"""
    environment = os.environ | {"TRITON_INTERPRET": "0"}
    path = os.pathsep.join(filter(None, [str(BENCHMARKS), environment.get("PYTHONPATH")]))
    command, environment = [sys.executable, "-c", code], environment | {"PYTHONPATH": path}
    subprocess.run(command, check=True, cwd=tmp_path, env=environment)


@pytest.fixture
def faulty(monkeypatch):
    """Puts a function in the place of an op in the emulator; it gets what the op returns."""

    def replace(op: str, function) -> None:
        good = registry._kernels[op]["emulated"]
        changed = good._replace(run=lambda *args: function(good.run(*args)))
        monkeypatch.setitem(registry._kernels[op], "emulated", changed)

    return replace


def test_a_family_that_hangs_is_ended_with_what_it_started(tmp_path, faulty):
    def hang(output):
        sleeper = subprocess.Popen(["sleep", "300"])
        (tmp_path / "pid").write_text(str(sleeper.pid))
        while True:
            time.sleep(1)

    faulty("upsample_argmax", hang)
    found = gpu_check(tmp_path, ["argmax", "depthwise-forward"], "--family-limit", "3")
    assert found == {
        "argmax": ("FAIL", "out of time after 3 s"),
        "depthwise-forward": ("pass", ""),
    }
    assert is_over((tmp_path / "pid").read_text())


def is_over(pid: str) -> bool:
    stat = Path("/proc", pid, "stat")
    return not stat.exists() or stat.read_text().rpartition(") ")[2].startswith("Z")


def test_a_process_that_cannot_be_killed_is_left_behind(tmp_path, monkeypatch):
    """As one that waits inside a driver."""
    gpu_process = importlib.import_module("gpu_process")
    pid = tmp_path / "pid"

    def hang():
        pid.write_text(str(os.getpid()))
        yield {"done": 1}
        time.sleep(60)

    monkeypatch.setattr(gpu_process, "_GRACE", 0.1)
    with monkeypatch.context() as harmless:
        harmless.setattr(gpu_process.os, "killpg", lambda *args: None)
        harmless.setattr(multiprocessing.process.BaseProcess, "kill", lambda self: None)
        rows, problem = gpu_process.run_apart(hang, (), tmp_path / "log", 1)
    os.kill(int(pid.read_text()), signal.SIGKILL)
    assert rows == [{"done": 1}] and problem == "out of time after 1 s, and it cannot be killed"


def test_a_family_ends_when_gpu_check_is_killed(tmp_path):
    code = """
import os, pathlib, time, gpu_process
def hang():
    pathlib.Path("new").write_text(str(os.getpid()))
    pathlib.Path("new").rename("pid")
    time.sleep(60)
    yield {}
gpu_process.run_apart(hang, (), pathlib.Path("log"), 60)
"""
    environment = os.environ | {"PYTHONPATH": str(BENCHMARKS)}
    parent = subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path, env=environment)
    pid = tmp_path / "pid"
    until = time.monotonic() + 20
    while not pid.exists() and time.monotonic() < until:
        time.sleep(0.05)
    parent.kill()
    parent.wait()
    while not is_over(pid.read_text()) and time.monotonic() < until:
        time.sleep(0.05)
    assert is_over(pid.read_text())


def change_one(output: torch.Tensor, value: float) -> torch.Tensor:
    output[-1, -1, -1, -1] += value
    return output


def unwritten_end(output: torch.Tensor) -> torch.Tensor:
    partly = torch.empty_like(output)
    partly[:-1], partly[-1, :-1] = output[:-1], output[-1, :-1]  # all but the last channel
    return partly


def broken(output: torch.Tensor) -> torch.Tensor:
    raise RuntimeError("no kernel image\nFor debugging consider passing something")


def no_room(output: torch.Tensor) -> torch.Tensor:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nSee documentation")


NUMBERS = itertools.count()
FAULTS = {
    "wrong": (lambda output: change_one(output, 0.5), "wrong"),
    "unwritten": (unwritten_end, "56 of 2688 elements are unwritten or NaN"),
    "raises": (broken, "RuntimeError: no kernel image"),
    "crashes": (lambda output: os.kill(os.getpid(), signal.SIGKILL), "ended by SIGKILL"),
    "leaves": (lambda output: os._exit(0), "ended without a result"),
    "varies": (lambda output: change_one(output, next(NUMBERS)), "two runs differ"),
    "shape": (lambda output: output[:1], r"outputs are .*torch.Size\(\[1, 24, 7, 8\]\).*"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_a_failure_of_its_family_only(tmp_path, faulty, fault):
    function, note = FAULTS[fault]
    faulty("fused_conv2d", function)
    found = gpu_check(tmp_path, ["argmax", "depthwise-forward", "depthwise-dgrad"])
    assert [outcome for outcome, _ in found.values()] == ["pass", "FAIL", "pass"]
    assert re.fullmatch(note, found["depthwise-forward"][1])


def test_labels_that_are_no_classes_are_a_failure(tmp_path, faulty):
    faulty("upsample_argmax", torch.empty_like)
    (outcome, note) = gpu_check(tmp_path, ["argmax"])["argmax"]
    assert outcome == "FAIL" and note.endswith("elements are unwritten or NaN")


def test_too_little_memory_is_no_fault_of_a_family(tmp_path, faulty):
    faulty("fused_conv2d", no_room)
    note = "OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB."
    assert gpu_check(tmp_path, ["argmax", "depthwise-forward"]) == {
        "argmax": ("pass", ""),
        "depthwise-forward": ("not run", note),
    }


def test_a_wrong_peer_is_no_measure():
    gpu_measure, harness = map(importlib.import_module, ("gpu_measure", "harness"))
    ours = [torch.ones(8)]
    for theirs, said in ((torch.full((8,), torch.nan), "nan"), (torch.full((8,), 1.5), "0.5")):
        row = gpu_measure.compared(ours, ours, [theirs], ours, harness.relative_error, "fp32")
        assert row == {"outcome": "FAIL", "note": f"PyTorch's own error is {said}"}


def test_at_the_limit_of_all_what_was_done_is_written(tmp_path, faulty):
    faulty("upsample_cross_entropy", lambda output: time.sleep(60))
    found = gpu_check(tmp_path, ["argmax", "cross-entropy"], "--limit", "6")
    reached = "the limit of the whole run was reached"
    assert found == {
        "argmax": ("pass", ""),
        "cross-entropy": ("not run", reached),
        "cross-entropy-backward": ("not run", reached),
    }


def test_a_limit_of_nothing_runs_nothing(tmp_path):
    reached = "the limit of the whole run was reached"
    assert gpu_check(tmp_path, ["argmax"], "--limit", "0") == {"argmax": ("not run", reached)}


def test_what_cannot_run_is_skipped_and_no_pass(tmp_path, monkeypatch, capsys):
    changed = registry._backends["emulated"]._replace(
        unavailable_reason=lambda device: "no such GPU"
    )
    monkeypatch.setitem(registry._backends, "emulated", changed)
    assert gpu_check(tmp_path, ["argmax"]) == {"argmax": ("skipped", "no such GPU")}
    assert "gpu_check: no kernel passed" in capsys.readouterr().err


def test_a_call_that_is_refused_is_skipped_with_the_reason(tmp_path, monkeypatch):
    good = registry._kernels["fused_conv2d"]["emulated"]
    refusing = good._replace(unsupported_reason=lambda *args: "odd channels")
    monkeypatch.setitem(registry._kernels["fused_conv2d"], "emulated", refusing)
    assert gpu_check(tmp_path, ["depthwise-forward"]) == {
        "depthwise-forward": ("skipped", "odd channels")
    }


@pytest.fixture
def fake_sanitizer(monkeypatch, tmp_path):
    """Makes a program of that name that says ``output``, and keeps what it was called with."""

    def make(output: str, status: int) -> None:
        program = tmp_path / "compute-sanitizer"
        program.write_text(
            f"#!/bin/sh\necho $* >{tmp_path}/arguments\ncat <<'END'\n{output}END\nexit {status}\n"
        )
        program.chmod(0o755)

    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    return make


@pytest.fixture
def two_rounds(monkeypatch):
    """Of each timing, instead of those of a second."""
    gpu_measure, measure = map(importlib.import_module, ("gpu_measure", "measure"))
    shortest = functools.partial(measure.interleaved, budget=0)
    monkeypatch.setattr(gpu_measure, "interleaved", lambda *args, budget: shortest(*args))


@pytest.fixture
def as_if_on_a_gpu(monkeypatch, two_rounds):
    """gpu_check's other parts, with the emulator in the place of a GPU."""
    gpu_run, gpu_measure = map(importlib.import_module, ("gpu_run", "gpu_measure"))
    tiny = importlib.import_module("gpu_families").TINY
    for name, value in {"GPU": gpu_measure.CPU, "SIZES": (tiny,), "REAL": tiny}.items():
        monkeypatch.setattr(gpu_run, name, value)
    rates = [
        {"name": "bf16", "what": "matrix product", "rate": 8e14},
        {"name": "copy", "what": "copy", "rate": 4e12},
    ]
    monkeypatch.setattr(gpu_measure, "ceilings", lambda: rates)


def test_only_what_is_right_is_timed(tmp_path, as_if_on_a_gpu, faulty, monkeypatch):
    families = importlib.import_module("gpu_families").FAMILIES
    crashing = families["depthwise-wgrad"]._replace(peers=lambda *args: os._exit(0))
    monkeypatch.setitem(families, "depthwise-wgrad", crashing)
    faulty("fused_conv2d", lambda output: output + 1)
    names = ["depthwise-forward", "depthwise-dgrad", "depthwise-wgrad"]
    arguments = ["--time", "--output", str(tmp_path), "--families", *names]
    assert importlib.import_module("gpu_check").main(arguments) == 1
    assert [row["outcome"] for row in read(tmp_path)] == ["FAIL", "pass", "pass"]
    first, second = read(tmp_path, "time")
    assert (first["family"], first["outcome"]) == ("depthwise-dgrad", "timed")
    bound = 2 * 2 * 24 * 7 * 8 * 2 / 4e12  # 2 images of 24 channels in and out, at the copy's rate
    assert float(first["bound us"]) == pytest.approx(1e6 * bound, rel=1e-4)
    assert (second["family"], second["outcome"]) == ("depthwise-wgrad", "FAIL")
    assert second["note"] == "ended without a result" and not second["us"]
    assert [row["TFLOP/s"] or row["GB/s"] for row in read(tmp_path, "ceilings")] == ["800", "4000"]


def test_races_are_looked_for_where_the_tool_can(tmp_path, as_if_on_a_gpu, fake_sanitizer):
    fake_sanitizer("family argmax\nend argmax\n", status=1)
    names = ["argmax", "depthwise-forward", "sm90-projection"]
    arguments = ["--sanitize", "racecheck", "--output", str(tmp_path), "--families", *names]
    assert importlib.import_module("gpu_check").main(arguments) == 1
    called = (tmp_path / "arguments").read_text().split()
    assert called[:2] == ["--tool", "racecheck"] and called[-3].endswith(".py")
    assert called[-2:] == ["argmax", "depthwise-forward"]
    assert [(row["family"], row["outcome"]) for row in read(tmp_path, "sanitizer")] == [
        ("argmax", "pass"), ("all", "FAIL")
    ]  # fmt: skip


def test_both_variants_of_the_hopper_producer_are_right(tmp_path):
    command = ["--backend", "emulated", "--variants", "--families", "sm90-projection", "sm90-dgrad"]
    assert importlib.import_module("gpu_check").main([*command, "--output", str(tmp_path)]) == 0
    rows = [(row["family"], row["variant"], row["outcome"]) for row in read(tmp_path, "variants")]
    assert rows == [
        ("sm90-projection", "threads arrive", "pass"),
        ("sm90-projection", "copies arrive", "pass"),
        ("sm90-dgrad", "threads arrive", "pass"),
        ("sm90-dgrad", "copies arrive", "pass"),
    ]


def test_a_variant_that_hangs_is_the_one_that_fails(tmp_path, monkeypatch):
    gpu_measure = importlib.import_module("gpu_measure")
    check, calls = gpu_measure.check, itertools.count()  # each process has its own

    def hang_the_second_time(*args):
        time.sleep(60 * next(calls))
        return check(*args)

    monkeypatch.setattr(gpu_measure, "check", hang_the_second_time)
    command = ["--backend", "emulated", "--variants", "--families", "sm90-projection"]
    arguments = [*command, "--family-limit", "3", "--output", str(tmp_path)]
    assert importlib.import_module("gpu_check").main(arguments) == 1
    rows = [(row["variant"], row["outcome"], row["note"]) for row in read(tmp_path, "variants")]
    assert rows == [
        ("threads arrive", "pass", ""),
        ("copies arrive", "FAIL", "out of time after 3 s"),
    ]


@pytest.mark.parametrize("right", [[False, True], [False]], ids=["both right", "one right"])
def test_variants_are_captured_in_the_form_that_they_name(monkeypatch, right):
    """Whoever runs the kernel afterwards has the form that was there before."""
    gpu_measure, gpu_families = map(importlib.import_module, ("gpu_measure", "gpu_families"))
    family = gpu_families.FAMILIES["sm90-forward"]
    place = types.SimpleNamespace(
        device=torch.device("cuda"),
        kernels=lambda: types.SimpleNamespace(set_copies_arrive=set_form),
    )
    forms = [True]  # as they were set, one after the other

    def set_form(value: bool) -> bool:
        forms.append(value)
        return forms[-2]

    def check(*args):
        return {"outcome": "pass" if forms[-1] in right else "FAIL"}

    def interleaved(runs, device, budget):
        return {name: [1.0 + captured] for name, captured in runs.items()}

    for name, function in {
        "check": check,
        "interleaved": interleaved,
        "arguments_of": lambda *args: (),
        "ours": lambda *args: None,
        "prepare": lambda run, device: (forms[-1], None),
    }.items():
        monkeypatch.setattr(gpu_measure, name, function)
    rows = list(gpu_measure.compare_forms(family, place, ["tiny"]))
    named = {"threads arrive": False, "copies arrive": True}
    timed = [row for row in rows if row["outcome"] == "timed"]
    assert [(row["variant"], row["us"]) for row in timed] == [
        (name, 1e6 * (1 + form)) for name, form in named.items() if form in right
    ]
    assert [row["variant"] for row in rows if row["outcome"] == "pass"] == [
        row["variant"] for row in timed
    ]
    assert forms[-1] is True


def test_each_variant_runs_the_form_that_it_names(monkeypatch):
    """In all shapes; one that is wrong is told."""
    gpu_measure, gpu_families = map(importlib.import_module, ("gpu_measure", "gpu_families"))
    family, place, sizes = gpu_families.FAMILIES["sm90-forward"], gpu_measure.CPU, ["tiny", "real"]
    switched: list[bool] = []

    def set_form(value: bool) -> bool:
        switched.append(value)
        return False

    kernels = types.SimpleNamespace(set_copies_arrive=set_form)
    monkeypatch.setattr(gpu_measure.Place, "kernels", lambda self: kernels)

    def check(family, place, size, dtype):
        wrong = switched[-1] and size == "tiny"
        return {"outcome": "FAIL" if wrong else "pass", "note": size}

    monkeypatch.setattr(gpu_measure, "check", check)
    rows = list(gpu_measure.compare_forms(family, place, sizes))
    assert switched == [False, False, True, False]
    assert [(row["variant"], row["outcome"], row["note"]) for row in rows] == [
        ("threads arrive", "pass", "real"),
        ("copies arrive", "FAIL", "tiny"),
    ]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--families", "lunch"], "no family begins with 'lunch': sm90-projection sm90-forward"),
        (["--backend", "emulated", "--time"], "--time and --sanitize need a GPU"),
        (["--sanitize", "synccheck"], "invalid choice: 'synccheck'"),
    ],
)
def test_bad_arguments(argv, message, capsys):
    with pytest.raises(SystemExit) as error:
        importlib.import_module("gpu_check").main(argv)
    assert error.value.code == 2
    assert message in capsys.readouterr().err


@pytest.fixture
def report(tmp_path, capsys):
    gpu_report = importlib.import_module("gpu_report")
    report = gpu_report.Report(tmp_path, {"device": "A GPU"})
    numbers = {"us": 950.04, "peer us": 1500.0, "ratio": 1.5789, "steps": 767, "us/step": 1.2386}
    report.add(
        "Time", family="sm90-forward", dtype="bf16", outcome="timed", peer="cuDNN", **numbers
    )
    report.add("Time", family="argmax", dtype="bf16", outcome="FAIL", note="a | b")
    return report


def test_tables(report, tmp_path, capsys):
    head, first, second = capsys.readouterr().out.splitlines()[-3:]
    for column, text in {
        "us": "950.0",
        "ratio": "1.58",
        "steps": "767",
        "us/step": "1.239",
    }.items():
        end = re.search(rf" {column}(?= |$)", head).end()
        assert first[:end].endswith(f" {text}")
    assert first.endswith(" cuDNN") and second.endswith(" a | b")
    markdown = (tmp_path / "report.md").read_text()
    assert markdown.startswith("# gpu_check\n\n* device: A GPU\n\n## Time\n\n")
    head, _, first, second = [line for line in markdown.splitlines() if line.startswith("|")]
    columns = len(importlib.import_module("gpu_report").TABLES["Time"])
    assert len(head.split(" | ")) == len(first.split(" | ")) == columns
    assert "| 950.0 | 1500.0 | 1.58 |" in first and second.endswith("|  | a \\| b |")
    assert (tmp_path / "time.csv").read_text().startswith("# device: A GPU\nfamily,dtype,outcome,")
    assert [row["ratio"] for row in read(tmp_path, "time")] == ["1.5789", ""]


def test_times_have_what_the_table_shows(two_rounds):
    gpu_measure = importlib.import_module("gpu_measure")
    columns = importlib.import_module("gpu_report").TABLES["Time"]
    families = importlib.import_module("gpu_families")
    rates = {"bf16": 1e12, "copy": 1e9}

    def row(name: str):
        family = families.FAMILIES[name]
        return gpu_measure.measured_time(family, gpu_measure.CPU, families.TINY, "bf16", rates)

    wgrad, loss = row("sm90-wgrad"), row("cross-entropy-backward")
    for found in (wgrad, loss):
        assert {"family", "dtype", "outcome", *found} == set(columns)
        assert found["ratio"] == found["peer us"] / found["us"] and found["note"] == ""
    assert wgrad["peer"].startswith("cuDNN") and loss["peer"] == "eager NCHW"
    assert wgrad["us/step"] == wgrad["us"] / wgrad["steps"]
    assert wgrad["TFLOP/s"] and not wgrad["GB/s"] and loss["GB/s"] and not loss["TFLOP/s"]
    # Logits read and their gradient written; a target and a logarithm of a sum for each pixel.
    nbytes = 2 * 2 * 2 * 7 * 7 * 8 + 2 * 49 * 57 * (8 + 4)
    assert loss["bound us"] == pytest.approx(nbytes / 1e9 * 1e6)
    assert loss["of bound"] == pytest.approx(100 * loss["bound us"] / loss["us"])


def tensors_of(value: object) -> list[torch.Tensor]:
    """Those that a function reaches through what it closes over."""
    if isinstance(value, torch.Tensor):
        return [value]
    parts = value if isinstance(value, (list, tuple)) else ()
    if isinstance(value, types.FunctionType):
        parts = [cell.cell_contents for cell in value.__closure__ or ()]
    return [tensor for part in parts for tensor in tensors_of(part)]


def test_short_calls_of_every_peer_are_timed_on_copies():
    """Else a peer would find its inputs in the cache, and ours would not."""
    gpu_measure, measure = map(importlib.import_module, ("gpu_measure", "measure"))
    gpu_families = importlib.import_module("gpu_families")
    for name, family in gpu_families.FAMILIES.items():
        if family.backend == "triton":
            continue  # the peers of the families in CUDA
        arguments = gpu_measure.arguments_of(
            family, gpu_families.TINY, "bf16", gpu_measure.CPU.device
        )
        for peer, run in family.peers(family.op, *arguments).items():
            before, after = tensors_of(run), tensors_of(measure.over_copies(run))
            shared = {t.data_ptr() for t in before} & {t.data_ptr() for t in after}
            assert before and len(before) == len(after) and not shared, (name, peer)


def test_a_wrong_replay_is_not_timed(monkeypatch, two_rounds):
    gpu_measure = importlib.import_module("gpu_measure")
    families = importlib.import_module("gpu_families")

    def prepare(run, device):
        return lambda: [output + 1 for output in run()], None

    monkeypatch.setattr(gpu_measure, "prepare", prepare)
    family = families.FAMILIES["depthwise-forward"]
    assert gpu_measure.measured_time(family, gpu_measure.CPU, families.TINY, "bf16", {}) == {
        "outcome": "FAIL", "note": "a replay of its CUDA graph gives other results"
    }  # fmt: skip


def test_steps_of_the_worker_that_has_most(monkeypatch):
    """One worker has them all: of each tap those that its tiles need, and two for the item."""
    from deeplab_fast import dilated_conv2d
    from deeplab_fast.backends import backend

    gpu_measure = importlib.import_module("gpu_measure")
    monkeypatch.setattr(emulator, "num_ctas", 4)
    x = torch.randn(1, 200, 4, 4).bfloat16()
    with backend("emulated"), emulator.machine(1, "sm_90"):
        weights = [torch.randn(8, 200, k, k).bfloat16() for k in (1, 3)]
        steps = [
            gpu_measure.longest_worker(lambda w=w: dilated_conv2d(x, w, dilation=2))
            for w in weights
        ]
    assert steps == [4 + 2, 9 * 4 + 2]  # 200 channels are four steps of 64


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
def test_what_compute_sanitizer_says(fake_sanitizer, tmp_path, output, status, expected):
    fake_sanitizer(output, status)
    gpu_tools = importlib.import_module("gpu_tools")
    rows = list(gpu_tools.sanitize("memcheck", ["argmax", "cross-entropy"]))
    assert [(row["family"], row["outcome"], row["note"]) for row in rows] == expected
    assert all(row["tool"] == "memcheck" for row in rows)
    arguments = (tmp_path / "arguments").read_text().split()
    assert arguments[:2] == ["--tool", "memcheck"]
    assert Path(arguments[-3]).exists() and arguments[-2:] == ["argmax", "cross-entropy"]


def test_without_compute_sanitizer_its_part_is_skipped(monkeypatch):
    gpu_tools = importlib.import_module("gpu_tools")
    monkeypatch.setattr(gpu_tools.shutil, "which", lambda *args, **kwargs: None)
    (row,) = gpu_tools.sanitize("racecheck", ["argmax"])
    assert (row["outcome"], row["note"]) == ("skipped", "compute-sanitizer is not installed")


def test_the_first_run_goes_on_after_what_fails(tmp_path):
    """With programs that only write down how they were called."""
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
    assert {"test_cudnn_reference.py", "test_aspp.py", "test_triton.py"} < files
    tests = Path(__file__).parent
    assert [file for file in files if not (tests / file).exists()] == []
