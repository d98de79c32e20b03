"""gpu_check.py reports every family; families that hang, crash or are wrong fail."""

from __future__ import annotations

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
from ..support.backends import with_outputs
from .conftest import BENCHMARKS, read_table

GPU_CHECK = [sys.executable, str(BENCHMARKS / "gpu_check.py")]


@pytest.fixture(autouse=True)
def triton_interpret(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # set by gpu_check too; monkeypatch restores it


@pytest.fixture(autouse=True)
def poisoned_memory():
    """Replaces the fixture of tests/conftest.py, because gpu_check poisons memory itself."""
    assert not torch.are_deterministic_algorithms_enabled()


def gpu_check(folder: Path, families: list[str], *options: str) -> dict[str, tuple[str, str]]:
    """Outcome and note of each family; the exit status must be 0 exactly if all pass."""
    arguments = ["--backend", "emulated", "--output", str(folder), "--families", *families]
    status = importlib.import_module("gpu_check").main([*arguments, *options])
    found = {row["family"]: (row["outcome"], row["note"]) for row in read_table(folder)}
    assert status == int({outcome for outcome, _ in found.values()} != {"pass"})
    return found


def test_every_family_passes_in_the_emulator(tmp_path):
    done = subprocess.run(
        [*GPU_CHECK, "--backend", "emulated", "--output", tmp_path / "out"],
        cwd=tmp_path, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    rows = read_table(tmp_path / "out")
    families = importlib.import_module("gpu_checks.families").FAMILIES
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


def test_missing_gpu_is_reported_in_one_line(tmp_path):
    done = subprocess.run(
        [*GPU_CHECK, "--output", tmp_path / "out"],
        cwd=tmp_path, capture_output=True, text=True, env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},
    )  # fmt: skip
    assert done.returncode == 2 and done.stdout == ""
    reason = "torch finds no GPU that it can use.*|torch .* was built without CUDA"
    line = f"gpu_check: ({reason}); --backend emulated needs no GPU\n"
    assert re.fullmatch(line, done.stderr)
    assert not (tmp_path / "out").exists()


def test_reason_why_torch_has_no_gpu(monkeypatch):
    def is_available():
        warnings.warn("The NVIDIA driver on your system is too old\nmore", stacklevel=1)
        return False

    gpu_run = importlib.import_module("gpu_checks.run")
    monkeypatch.setattr(torch.cuda, "is_available", is_available)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    (row,) = gpu_run.machine(gpu_run.GPU)
    assert row["no_gpu"].startswith(
        "torch finds no GPU that it can use: The NVIDIA driver on your system is too old; "
    )
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(torch.version, "hip", None)
    (row,) = gpu_run.machine(gpu_run.GPU)
    assert row["no_gpu"].startswith(f"torch {torch.__version__} was built without CUDA; ")


def test_gpu_query_that_hangs_is_ended(tmp_path, monkeypatch, capsys):
    gpu_run = importlib.import_module("gpu_checks.run")
    monkeypatch.setattr(gpu_run, "machine", lambda place: time.sleep(60))
    arguments = ["--family-limit", "1", "--output", str(tmp_path / "out")]
    assert importlib.import_module("gpu_check").main(arguments) == 2
    message = "gpu_check: cannot query the GPU: out of time after 1 s\n"
    assert capsys.readouterr().err == message


def test_parent_process_does_not_use_cuda(tmp_path):
    """Forked processes cannot use a GPU if their parent has used it."""
    code = """
import argparse, torch
def used(*args): raise AssertionError("CUDA is used")
torch.cuda.is_available = torch.cuda.device_count = torch.cuda._lazy_init = used
torch._C._cuda_getDeviceCount = torch._C._cuda_init = used
from gpu_checks import run
args = argparse.Namespace(families=[], limit=None, backend=None, output=None, family_limit=1)
run.Run(args).header("a GPU")
"""
    environment = os.environ | {"TRITON_INTERPRET": "0"}
    path = os.pathsep.join(filter(None, [str(BENCHMARKS), environment.get("PYTHONPATH")]))
    command, environment = [sys.executable, "-c", code], environment | {"PYTHONPATH": path}
    subprocess.run(command, check=True, cwd=tmp_path, env=environment)


@pytest.fixture
def faulty(monkeypatch):
    """Passes the outputs of an op in the emulator through a function."""

    def replace(op: str, function) -> None:
        good = registry._kernels[op]["emulated"]
        changed = with_outputs(good, function)
        monkeypatch.setitem(registry._kernels[op], "emulated", changed)

    return replace


def test_family_that_hangs_is_killed_with_its_children(tmp_path, faulty):
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
    assert has_ended((tmp_path / "pid").read_text())


def has_ended(pid: str) -> bool:
    stat = Path("/proc", pid, "stat")
    return not stat.exists() or stat.read_text().rpartition(") ")[2].startswith("Z")


def test_process_that_cannot_be_killed_is_abandoned(tmp_path, monkeypatch):
    """Such a process may wait inside a driver."""
    gpu_process = importlib.import_module("gpu_checks.process")
    pid = tmp_path / "pid"

    def hang():
        pid.write_text(str(os.getpid()))
        yield {"done": 1}
        time.sleep(60)

    monkeypatch.setattr(gpu_process, "_GRACE", 0.1)
    with monkeypatch.context() as harmless:
        harmless.setattr(gpu_process.os, "killpg", lambda *args: None)
        harmless.setattr(multiprocessing.process.BaseProcess, "kill", lambda self: None)
        rows, failure = gpu_process.run_in_subprocess(hang, (), tmp_path / "log", 1)
    os.kill(int(pid.read_text()), signal.SIGKILL)
    assert rows == [{"done": 1}] and failure == "out of time after 1 s, and it cannot be killed"


def test_family_ends_when_gpu_check_is_killed(tmp_path):
    code = """
import os, pathlib, time
from gpu_checks.process import run_in_subprocess
def hang():
    pathlib.Path("new").write_text(str(os.getpid()))
    pathlib.Path("new").rename("pid")
    time.sleep(60)
    yield {}
run_in_subprocess(hang, (), pathlib.Path("log"), 60)
"""
    environment = os.environ | {"PYTHONPATH": str(BENCHMARKS)}
    parent = subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path, env=environment)
    pid = tmp_path / "pid"
    until = time.monotonic() + 20
    while not pid.exists() and time.monotonic() < until:
        time.sleep(0.05)
    parent.kill()
    parent.wait()
    while not has_ended(pid.read_text()) and time.monotonic() < until:
        time.sleep(0.05)
    assert has_ended(pid.read_text())


def change_one(output: torch.Tensor, value: float) -> torch.Tensor:
    output[-1, -1, -1, -1] += value
    return output


def last_channel_unwritten(output: torch.Tensor) -> torch.Tensor:
    partly = torch.empty_like(output)
    partly[:-1], partly[-1, :-1] = output[:-1], output[-1, :-1]  # not the last channel
    return partly


def raises(output: torch.Tensor) -> torch.Tensor:
    raise RuntimeError("no kernel image\nFor debugging consider passing something")


def out_of_memory(output: torch.Tensor) -> torch.Tensor:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nSee documentation")


NUMBERS = itertools.count()
FAULTS = {
    "wrong": (lambda output: change_one(output, 0.5), "wrong"),
    "unwritten": (last_channel_unwritten, "56 of 2688 elements are unwritten or NaN"),
    "raises": (raises, "RuntimeError: no kernel image"),
    "crashes": (lambda output: os.kill(os.getpid(), signal.SIGKILL), "ended by SIGKILL"),
    "leaves": (lambda output: os._exit(0), "ended without a result"),
    "varies": (lambda output: change_one(output, next(NUMBERS)), "two runs differ"),
    "shape": (
        lambda output: output[:1],
        r"outputs: unexpected shapes or dtypes .*torch.Size\(\[1, 24, 7, 8\]\).*",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_fault_fails_only_its_own_family(tmp_path, faulty, fault):
    function, note = FAULTS[fault]
    faulty("fused_conv2d", function)
    found = gpu_check(tmp_path, ["argmax", "depthwise-forward", "depthwise-dgrad"])
    assert [outcome for outcome, _ in found.values()] == ["pass", "FAIL", "pass"]
    assert re.fullmatch(note, found["depthwise-forward"][1])


def test_unwritten_labels_fail(tmp_path, faulty):
    faulty("upsample_argmax", torch.empty_like)
    (outcome, note) = gpu_check(tmp_path, ["argmax"])["argmax"]
    assert outcome == "FAIL" and note.endswith("elements are unwritten or NaN")


def test_out_of_memory_is_not_a_failure(tmp_path, faulty):
    faulty("fused_conv2d", out_of_memory)
    note = "OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB."
    assert gpu_check(tmp_path, ["argmax", "depthwise-forward"]) == {
        "argmax": ("pass", ""),
        "depthwise-forward": ("not run", note),
    }


def test_inaccurate_peer_fails_the_check():
    correctness = importlib.import_module("gpu_checks.correctness")
    harness = importlib.import_module("common.harness")
    ours = [torch.ones(8)]
    for theirs, text in ((torch.full((8,), torch.nan), "nan"), (torch.full((8,), 1.5), "0.5")):
        row = correctness.compared(ours, ours, [theirs], ours, harness.relative_error, "fp32")
        assert row == {"outcome": "FAIL", "note": f"PyTorch's own error is {text}"}


def test_results_before_the_time_limit_are_written(tmp_path, faulty):
    faulty("upsample_cross_entropy", lambda output: time.sleep(60))
    found = gpu_check(tmp_path, ["argmax", "cross-entropy"], "--limit", "6")
    reached = "the time limit of the whole run was reached"
    assert found == {
        "argmax": ("pass", ""),
        "cross-entropy": ("not run", reached),
        "cross-entropy-backward": ("not run", reached),
    }


def test_time_limit_of_zero_runs_nothing(tmp_path):
    reached = "the time limit of the whole run was reached"
    assert gpu_check(tmp_path, ["argmax"], "--limit", "0") == {"argmax": ("not run", reached)}


def test_unavailable_backend_is_skipped_and_does_not_pass(tmp_path, monkeypatch, capsys):
    changed = registry._backends["emulated"]._replace(
        unavailable_reason=lambda device: "no such GPU"
    )
    monkeypatch.setitem(registry._backends, "emulated", changed)
    assert gpu_check(tmp_path, ["argmax"]) == {"argmax": ("skipped", "no such GPU")}
    assert "gpu_check: no kernel passed" in capsys.readouterr().err


def test_unsupported_call_is_skipped_with_the_reason(tmp_path, monkeypatch):
    good = registry._kernels["fused_conv2d"]["emulated"]
    changed = good._replace(unsupported_reason=lambda *args: "odd channels")
    monkeypatch.setitem(registry._kernels["fused_conv2d"], "emulated", changed)
    assert gpu_check(tmp_path, ["depthwise-forward"]) == {
        "depthwise-forward": ("skipped", "odd channels")
    }


@pytest.fixture
def two_rounds(monkeypatch):
    """Time two rounds instead of a second."""
    speed, timing = map(importlib.import_module, ("gpu_checks.speed", "common.timing"))
    shortest = functools.partial(timing.interleaved, budget=0)
    monkeypatch.setattr(speed, "interleaved", lambda *args, budget: shortest(*args))


@pytest.fixture
def as_if_on_a_gpu(monkeypatch, two_rounds):
    """The parts of gpu_check that need a GPU, with the emulator in its place."""
    gpu_run = importlib.import_module("gpu_checks.run")
    speed = importlib.import_module("gpu_checks.speed")
    tiny = importlib.import_module("gpu_checks.inputs").TINY
    for name, value in {"GPU": gpu_run.CPU, "SIZES": (tiny,), "REAL": tiny}.items():
        monkeypatch.setattr(gpu_run, name, value)
    rates = [
        {"name": "bf16", "measurement": "matrix product", "rate": 8e14},
        {"name": "copy", "measurement": "copy", "rate": 4e12},
    ]
    monkeypatch.setattr(speed, "ceilings", lambda: rates)


def test_only_families_that_pass_are_timed(tmp_path, as_if_on_a_gpu, faulty, monkeypatch):
    families = importlib.import_module("gpu_checks.families").FAMILIES
    crashing = families["depthwise-wgrad"]._replace(peers=lambda *args: os._exit(0))
    monkeypatch.setitem(families, "depthwise-wgrad", crashing)
    faulty("fused_conv2d", lambda output: output + 1)
    names = ["depthwise-forward", "depthwise-dgrad", "depthwise-wgrad"]
    arguments = ["--time", "--output", str(tmp_path), "--families", *names]
    assert importlib.import_module("gpu_check").main(arguments) == 1
    assert [row["outcome"] for row in read_table(tmp_path)] == ["FAIL", "pass", "pass"]
    first, second = read_table(tmp_path, "time")
    assert (first["family"], first["outcome"]) == ("depthwise-dgrad", "timed")
    bound = (
        2 * 2 * 24 * 7 * 8 * 2 / 4e12
    )  # 2 images of 24 channels, in and out, at the rate of the copy
    assert float(first["bound us"]) == pytest.approx(1e6 * bound, rel=1e-4)
    assert (second["family"], second["outcome"]) == ("depthwise-wgrad", "FAIL")
    assert second["note"] == "ended without a result" and not second["us"]
    assert [row["TFLOP/s"] or row["GB/s"] for row in read_table(tmp_path, "ceilings")] == [
        "800",
        "4000",
    ]


def test_racecheck_runs_the_families_that_it_supports(tmp_path, as_if_on_a_gpu, fake_sanitizer):
    fake_sanitizer("family argmax\nend argmax\n", status=1)
    names = ["argmax", "depthwise-forward", "sm90-projection"]
    arguments = ["--sanitize", "racecheck", "--output", str(tmp_path), "--families", *names]
    assert importlib.import_module("gpu_check").main(arguments) == 1
    called = (tmp_path / "arguments").read_text().split()
    assert called[:2] == ["--tool", "racecheck"] and called[-4:-2] == [
        "-m",
        "gpu_checks.launch_once",
    ]
    assert called[-2:] == ["argmax", "depthwise-forward"]
    assert [(row["family"], row["outcome"]) for row in read_table(tmp_path, "sanitizer")] == [
        ("argmax", "pass"), ("all", "FAIL")
    ]  # fmt: skip


def test_both_variants_of_the_hopper_producer_pass(tmp_path):
    command = ["--backend", "emulated", "--variants", "--families", "sm90-projection", "sm90-dgrad"]
    assert importlib.import_module("gpu_check").main([*command, "--output", str(tmp_path)]) == 0
    rows = [
        (row["family"], row["variant"], row["outcome"]) for row in read_table(tmp_path, "variants")
    ]
    assert rows == [
        ("sm90-projection", "threads arrive", "pass"),
        ("sm90-projection", "copies arrive", "pass"),
        ("sm90-dgrad", "threads arrive", "pass"),
        ("sm90-dgrad", "copies arrive", "pass"),
    ]


def test_variant_that_hangs_fails_alone(tmp_path, monkeypatch):
    speed = importlib.import_module("gpu_checks.speed")
    check, calls = speed.check, itertools.count()  # every process counts for itself

    def hang_the_second_time(*args):
        time.sleep(60 * next(calls))
        return check(*args)

    monkeypatch.setattr(speed, "check", hang_the_second_time)
    command = ["--backend", "emulated", "--variants", "--families", "sm90-projection"]
    arguments = [*command, "--family-limit", "3", "--output", str(tmp_path)]
    assert importlib.import_module("gpu_check").main(arguments) == 1
    rows = [
        (row["variant"], row["outcome"], row["note"]) for row in read_table(tmp_path, "variants")
    ]
    assert rows == [
        ("threads arrive", "pass", ""),
        ("copies arrive", "FAIL", "out of time after 3 s"),
    ]


@pytest.mark.parametrize("correct", [[False, True], [False]], ids=["both", "one"])
def test_variants_are_timed_as_captured(monkeypatch, correct):
    """The setting is restored afterwards."""
    speed, gpu_families = map(importlib.import_module, ("gpu_checks.speed", "gpu_checks.families"))
    family = gpu_families.FAMILIES["sm90-forward"]
    place = types.SimpleNamespace(
        device=torch.device("cuda"),
        kernels=lambda: types.SimpleNamespace(set_copies_arrive=set_copies_arrive),
    )
    settings = [True]  # in the order in which they were set

    def set_copies_arrive(value: bool) -> bool:
        settings.append(value)
        return settings[-2]

    def check(*args):
        return {"outcome": "pass" if settings[-1] in correct else "FAIL"}

    def interleaved(runs, device, budget):
        return {name: [1.0 + captured] for name, captured in runs.items()}

    for name, function in {
        "check": check,
        "interleaved": interleaved,
        "arguments_of": lambda *args: (),
        "ours": lambda *args: None,
        "prepare": lambda run, device: (settings[-1], None),
    }.items():
        monkeypatch.setattr(speed, name, function)
    rows = list(speed.compare_arrivals(family, place, ["tiny"]))
    named = {"threads arrive": False, "copies arrive": True}
    timed = [row for row in rows if row["outcome"] == "timed"]
    assert [(row["variant"], row["us"]) for row in timed] == [
        (name, 1e6 * (1 + setting)) for name, setting in named.items() if setting in correct
    ]
    assert [row["variant"] for row in rows if row["outcome"] == "pass"] == [
        row["variant"] for row in timed
    ]
    assert settings[-1] is True


def test_every_variant_is_checked_with_its_setting(monkeypatch):
    """The checks run at all shapes; a wrong variant is reported."""
    speed, gpu_families = map(importlib.import_module, ("gpu_checks.speed", "gpu_checks.families"))
    family, place, sizes = (
        gpu_families.FAMILIES["sm90-forward"],
        speed.Place(torch.device("cpu")),
        ["tiny", "real"],
    )
    switched: list[bool] = []

    def set_copies_arrive(value: bool) -> bool:
        switched.append(value)
        return False

    kernels = types.SimpleNamespace(set_copies_arrive=set_copies_arrive)
    monkeypatch.setattr(speed.Place, "kernels", lambda self: kernels)

    def check(family, place, size, dtype):
        wrong = switched[-1] and size == "tiny"
        return {"outcome": "FAIL" if wrong else "pass", "note": size}

    monkeypatch.setattr(speed, "check", check)
    rows = list(speed.compare_arrivals(family, place, sizes))
    assert switched == [False, False, True, False]
    assert [(row["variant"], row["outcome"], row["note"]) for row in rows] == [
        ("threads arrive", "pass", "real"),
        ("copies arrive", "FAIL", "tiny"),
    ]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--families", "lunch"], "--families: expected prefixes of sm90-projection sm90-forward"),
        (
            ["--backend", "emulated", "--time"],
            "--backend emulated: expected neither --time nor --sanitize",
        ),
        (["--sanitize", "synccheck"], "invalid choice: 'synccheck'"),
    ],
)
def test_invalid_arguments_are_rejected(argv, message, capsys):
    with pytest.raises(SystemExit) as error:
        importlib.import_module("gpu_check").main(argv)
    assert error.value.code == 2
    assert message in capsys.readouterr().err


def test_time_rows_fill_the_columns_of_the_table(two_rounds):
    speed = importlib.import_module("gpu_checks.speed")
    cpu = importlib.import_module("gpu_checks.correctness").CPU
    columns = importlib.import_module("gpu_checks.report").TABLES["Time"]
    families = importlib.import_module("gpu_checks.families")
    tiny = importlib.import_module("gpu_checks.inputs").TINY
    rates = {"bf16": 1e12, "copy": 1e9}

    def row(name: str):
        family = families.FAMILIES[name]
        return speed.measured_time(family, cpu, tiny, "bf16", rates)

    wgrad, loss = row("sm90-wgrad"), row("cross-entropy-backward")
    for found in (wgrad, loss):
        assert {"family", "dtype", "outcome", *found} == set(columns)
        assert found["speedup"] == found["peer us"] / found["us"] and found["note"] == ""
    assert wgrad["peer"].startswith("cuDNN") and loss["peer"] == "eager NCHW"
    assert wgrad["us/k-iter"] == wgrad["us"] / wgrad["k-iters"]
    assert wgrad["TFLOP/s"] and not wgrad["GB/s"] and loss["GB/s"] and not loss["TFLOP/s"]
    # Logits are read and their gradient written; every pixel has a target and a log-sum-exp.
    nbytes = 2 * 2 * 2 * 7 * 7 * 8 + 2 * 49 * 57 * (8 + 4)
    assert loss["bound us"] == pytest.approx(nbytes / 1e9 * 1e6)
    assert loss["of bound"] == pytest.approx(100 * loss["bound us"] / loss["us"])


def tensors_of(value: object) -> list[torch.Tensor]:
    """The tensors that a function reaches through its closure."""
    if isinstance(value, torch.Tensor):
        return [value]
    parts = value if isinstance(value, (list, tuple)) else ()
    if isinstance(value, types.FunctionType):
        parts = [cell.cell_contents for cell in value.__closure__ or ()]
    return [tensor for part in parts for tensor in tensors_of(part)]


def test_short_calls_of_every_peer_are_timed_on_copies():
    """Otherwise a peer would find its inputs in the cache, and ours would not."""
    correctness = importlib.import_module("gpu_checks.correctness")
    timing = importlib.import_module("common.timing")
    gpu_families = importlib.import_module("gpu_checks.families")
    tiny = importlib.import_module("gpu_checks.inputs").TINY
    for name, family in gpu_families.FAMILIES.items():
        if family.backend == "triton":
            continue  # the peers of the families in CUDA
        arguments = correctness.arguments_of(family, tiny, "bf16", correctness.CPU.device)
        for peer, run in family.peers(family.op, *arguments).items():
            before, after = tensors_of(run), tensors_of(timing.over_copies(run))
            shared = {t.data_ptr() for t in before} & {t.data_ptr() for t in after}
            assert before and len(before) == len(after) and not shared, (name, peer)


def test_wrong_replay_is_not_timed(monkeypatch, two_rounds):
    speed = importlib.import_module("gpu_checks.speed")
    cpu = importlib.import_module("gpu_checks.correctness").CPU
    families = importlib.import_module("gpu_checks.families")
    tiny = importlib.import_module("gpu_checks.inputs").TINY

    def prepare(run, device):
        return lambda: [output + 1 for output in run()], None

    monkeypatch.setattr(speed, "prepare", prepare)
    family = families.FAMILIES["depthwise-forward"]
    assert speed.measured_time(family, cpu, tiny, "bf16", {}) == {
        "outcome": "FAIL", "note": "a replay of its CUDA graph gives different results"
    }  # fmt: skip


def test_k_iterations_of_the_busiest_cta(monkeypatch):
    """One CTA has the only tile: all its taps x channel blocks, and two for the work item."""
    from deeplab_fast import dilated_conv2d
    from deeplab_fast.backends import backend

    speed = importlib.import_module("gpu_checks.speed")
    monkeypatch.setattr(emulator, "num_ctas", 4)
    x = torch.randn(1, 200, 4, 4).bfloat16()
    with backend("emulated"), emulator.machine(1, "sm_90"):
        weights = [torch.randn(8, 200, k, k).bfloat16() for k in (1, 3)]
        k_iters = [speed.busiest_cta(lambda w=w: dilated_conv2d(x, w, dilation=2)) for w in weights]
    assert k_iters == [4 + 2, 9 * 4 + 2]  # 200 channels are four blocks of 64
