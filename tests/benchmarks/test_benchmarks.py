"""The benchmarks run, in a toy size, and time nothing that is wrong."""

from __future__ import annotations

import contextlib
import csv
import functools
import gc
import importlib
import json
import re
import subprocess
import sys
import time
import weakref
from collections import deque
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import deeplab_fast
from deeplab_fast.backends import dispatch_table, registry

from ..support.backends import device_of

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
SCRIPTS = sorted(path.stem for path in BENCHMARKS.glob("bench_*.py"))
DEVICES = [
    "cpu",
    pytest.param(
        "cuda",
        marks=[
            pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here"),
            pytest.mark.slow,  # the compiled peers try many kernels for every convolution
        ],
    ),
]


@pytest.fixture(autouse=True)
def one_thread(monkeypatch):
    """Toy sizes gain nothing from threads, which wait for one another where cores are shared."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def harness():
    return importlib.import_module("harness")


@pytest.fixture
def report(harness, tmp_path):
    options = ["--tiny", "--device", "cpu", "--output", str(tmp_path)]
    return harness.Report("test", harness.arguments("", options))


def ones(value: float = 1.0) -> torch.Tensor:
    return torch.full((4,), value)


def measure(report, **changes) -> None:
    case = dict(
        batch=1,
        dtype="fp32",
        reference=ones,
        ours={"good": ones},
        baselines={"peer": ones},
        tolerance=1e-6,
    )
    report.case("sum", **case | changes)


def read_csv(folder: Path) -> tuple[list[str], list[dict[str, str]]]:
    (path,) = folder.glob("*.csv")
    lines = path.read_text().splitlines()
    comments = [line for line in lines if line.startswith("#")]
    return comments, list(csv.DictReader(lines[len(comments) :]))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("script", SCRIPTS)
def test_every_benchmark_runs(script, device, harness, tmp_path, capsys):
    importlib.import_module(script).main(
        ["--tiny", "--device", device, "--output", str(tmp_path / "out")]
    )
    comments, rows = read_csv(tmp_path / "out")
    header = "\n".join(comments)
    for key in ("benchmark", "device", "threads", "versions", "commit", "date"):
        assert f"# {key}: " in header
    assert deeplab_fast.__version__ in header and torch.__version__ in header
    kinds = {"baseline"} if script == "bench_ceilings" else {"ours", "baseline"}
    assert {row["kind"] for row in rows} == kinds
    assert "# roof " in header
    printed = capsys.readouterr().out
    for row in rows:
        assert tuple(row) == harness.COLUMNS
        assert float(row["error"]) <= float(row["tolerance"])
        assert 0 < float(row["min_ms"]) <= float(row["median_ms"])
        assert float(row["speedup"]) > 0
        assert float(row["gflop"] or row["mbyte"]) > 0 and float(row["percent_of_floor"]) > 0
        assert row["variant"] in printed
    if script == "bench_aspp":
        assert any("branches, forward" in row["case"] for row in rows)
        skipped = "parallel_dilated_conv2d, fp32: deeplab_fast on cuda is skipped: the tensors are"
        assert device == "cuda" or skipped in printed
    if script in ("bench_aspp", "bench_model") and find_spec("torchvision"):
        assert {"torchvision NCHW", "torchvision channels_last"} <= {row["variant"] for row in rows}
    for case in {(row["case"], row["batch"], row["dtype"]) for row in rows}:
        speedups = [
            float(row["speedup"])
            for row in rows
            if (row["case"], row["batch"], row["dtype"]) == case and row["kind"] == "baseline"
        ]
        assert max(speedups) == 1
    files = {path.suffix: path for path in (tmp_path / "out").iterdir()}
    assert set(files) == {".csv", ".png"}
    assert files[".png"].read_bytes().startswith(b"\x89PNG")


@pytest.fixture
def choosing(monkeypatch):
    """measure_choices, as if the CPU were a GPU with two backends."""
    monkeypatch.setattr(dispatch_table, "KERNELS", ("cuda/sm90", "cpu", "emulated"))
    monkeypatch.setattr(dispatch_table, "device_class", lambda device: "two kernels")
    return importlib.import_module("measure_choices")


def test_choices_need_a_gpu(choosing, tmp_path):
    with pytest.raises(SystemExit, match="^measure_choices: needs a GPU; on a CPU nothing is"):
        choosing.main(["--device", "cpu", "--table", str(tmp_path / "table.csv")])
    assert not list(tmp_path.iterdir())


def test_choices_of_some_shapes(choosing, capsys):
    cases = importlib.import_module("cases")
    assert choosing.named(None) == list(choosing.SHAPES)
    names = ["VOC 513 OS8", "Cityscapes OS16"]
    assert choosing.named(names) == [cases.VOC_OS8, cases.CITYSCAPES_OS16]
    for name, message in (("VOC 513 OS8", "needs a GPU"), ("VOC", "2")):
        with pytest.raises(SystemExit, match=message):
            choosing.main(["--device", "cpu", "--shape", name])
    assert "invalid choice: 'VOC'" in capsys.readouterr().err


def test_choices_measure_the_shapes_that_are_named(choosing, monkeypatch, tmp_path):
    cases, seen = importlib.import_module("cases"), []
    gpu = SimpleNamespace(
        device=torch.device("cuda"), dtype=["bf16"], batch=[8], shape=["VOC 513 OS8"],
        tiny=False, full=False, table=tmp_path,
    )  # fmt: skip
    monkeypatch.setattr(choosing.harness, "arguments", lambda *args, **options: gpu)
    monkeypatch.setattr(choosing.harness, "Report", lambda *args: mock.MagicMock())
    monkeypatch.setattr(choosing, "calls", lambda shape, *args: seen.append(shape) or [])
    choosing.main([])
    assert seen == [cases.VOC_OS8]


@pytest.mark.parametrize("file, commit", [("abc1234-dirty\n", "abc1234-dirty"), (None, "-")])
@pytest.mark.parametrize("git", ["absent", "unusable"])
def test_commit_of_a_tree_without_git(harness, monkeypatch, tmp_path, file, commit, git):
    monkeypatch.setattr(harness, "ROOT", tmp_path)
    if git == "unusable":
        (tmp_path / ".git").write_text("gitdir: nowhere")
    if file is not None:
        (tmp_path / "COMMIT").write_text(file)
    assert harness.commit() == commit


def test_choices_are_measured_on_the_calls_of_deeplab(choosing, report, tmp_path):
    cases = importlib.import_module("cases")
    calls = choosing.calls(cases.TINY, 2, "fp32", ["mobilenet_v2"])
    assert {op for op, _ in calls} == set(registry.shape_buckets)
    assert len({(op, choosing.describe(call)) for op, call in calls}) == len(calls)
    first = dict(reversed(calls))
    # Tuples with empty tensors, an output that is an input, lists, and two kernels to choose from.
    some = ["dilated_conv2d_backward", "fused_conv2d_add_", "parallel_dilated_conv2d"]
    depthwise = next(
        call
        for op, call in calls
        if op == "fused_conv2d"
        and "groups 384" in registry.shape_buckets[op](registry.arguments(op, *call))
    )
    table = tmp_path / "table.csv"
    for op, call in [("fused_conv2d", depthwise), *((op, first[op]) for op in some)]:
        assert all(tensor.is_meta for tensor in call if isinstance(tensor, torch.Tensor))
        choosing.keep(table, choosing.measure(report, op, call, 2, "fp32"))
    rows = dispatch_table.read(table)
    assert [(row.op, row.kernel) for row in rows] == [
        ("dilated_conv2d_backward", "cpu"),
        ("fused_conv2d", "cpu"),
        ("fused_conv2d", "emulated"),
        ("fused_conv2d_add_", "cpu"),
        ("parallel_dilated_conv2d", "cpu"),
    ]
    assert rows[2].shape_class == "fp32 channels_last 384->384 3x3 groups 384 inside 5/8 pixels 2^5"
    for row in rows:
        assert row.device == "two kernels" and row.shape_class.startswith("fp32 channels_last ")
        mine = [r for r in report.rows if r["case"] == f"{row.op} {row.shape}"]
        by_variant = {r["variant"]: r["median_ms"] for r in mine}
        assert row.median_ms == pytest.approx(by_variant[row.kernel], rel=1e-5)
        fastest = min(by_variant["cuDNN"], by_variant["cuDNN, benchmark"])
        assert row.cudnn_ms == pytest.approx(fastest, rel=1e-5)


def test_choices_replace_what_is_measured_again(choosing, tmp_path):
    table = tmp_path / "table.csv"
    old = dispatch_table.Row(
        "gpu", "aspp", "a class", "cuda/sm90", 1.0, 2.0, "1x2", "A GPU", "1", "c", "d"
    )
    choosing.keep(table, iter([old, old._replace(device="another")]))
    choosing.keep(table, iter([old._replace(median_ms=3.0), old._replace(kernel="emulated")]))
    assert [(row.device, row.kernel, row.median_ms) for row in dispatch_table.read(table)] == [
        ("another", "cuda/sm90", 1.0), ("gpu", "cuda/sm90", 3.0), ("gpu", "emulated", 1.0)
    ]  # fmt: skip


@pytest.mark.skipif(torch.cuda.is_available(), reason="Triton compiles for the GPU here")
def test_l2_read_reads_everything_as_often_as_it_says():
    l2_read = importlib.import_module("l2_read")
    size = l2_read.buffer_size(200_000, num_programs=6)
    assert size == 49152  # two blocks each: three would take 295 kB
    device = device_of("triton")
    if problem := registry.unavailable_reason("triton", device):
        pytest.skip(problem)
    buffer = torch.randint(1000, (size,), dtype=torch.int32, device=device)
    sums = l2_read.l2_read(buffer, passes=3, num_programs=6)
    assert sums.sum() == 3 * buffer.sum() and len(sums) == 6
    with pytest.raises(ValueError, match="not even for 5 programs"):
        l2_read.l2_read(buffer, passes=3, num_programs=5)


def test_run_all_lists_its_pieces(harness, capsys):
    run_all = importlib.import_module("run_all")
    run_all.main(["--list", "--batch", "1"])
    names = capsys.readouterr().out.split()
    assert names[:2] == ["correctness", "ceilings"]
    assert {name.split("-")[0] for name in names[2:]} >= {
        script.removeprefix("bench_") for script in SCRIPTS
    } - {"ceilings"}
    gpu = run_all.pieces(torch.device("cuda"), [8, 1], tiny=False)
    assert list(gpu)[2] == "choices-bf16-8" and {"aspp-tf32-1", "depthwise-fp32-8"} < set(gpu)
    assert gpu["model-bf16-8"][2:] == ["--full", "--dtype", "bf16", "--batch", "8"]
    for command in gpu.values():
        assert any(Path(part).exists() for part in command[1:])
    assert gpu["choices-bf16-8"][2:] == ["--dtype", "bf16", "--batch", "8"]
    assert "choices-bf16-1" not in run_all.pieces(torch.device("cpu"), [1], tiny=True)


def test_run_all_runs_a_piece(harness, tmp_path, monkeypatch, capsys):
    run_all = importlib.import_module("run_all")
    commands = run_all.pieces(torch.device("cpu"), [1], tiny=True)
    on_cpu = {name: [*command, "--device", "cpu"] for name, command in commands.items()}
    monkeypatch.setattr(run_all, "pieces", lambda *args: on_cpu)
    run_all.main(["ceil", "--tiny", "--output", str(tmp_path / "new")])
    assert re.search(r"^ceilings: done in \d+ s$", capsys.readouterr().out, re.MULTILINE)
    files = {path.suffix: path for path in (tmp_path / "new").glob("c*")}
    assert set(files) == {".csv", ".png", ".txt"}
    files[".png"].unlink()
    run_all.plot_what_ran_out_of_time(tmp_path / "new")
    assert files[".png"].read_bytes().startswith(b"\x89PNG")
    with pytest.raises(SystemExit):
        run_all.main(["asp", "lunch"])
    assert "no piece begins with 'lunch': --list names them" in capsys.readouterr().err


def test_run_all_tests_the_installed_package(harness, monkeypatch, tmp_path, capsys):
    run_all = importlib.import_module("run_all")
    for place in ("checkout", "installed"):
        package = tmp_path / place / "deeplab_fast" / "__init__.py"
        package.parent.mkdir(parents=True)
        package.write_text(f"place = {place!r}")
    tests = tmp_path / "checkout" / "tests"
    tests.mkdir()
    (tests / "test_cudnn_reference.py").write_text(
        "import deeplab_fast\n\ndef test_place():\n    assert deeplab_fast.place == 'installed'\n"
    )
    monkeypatch.setattr(run_all, "TESTS", tests)
    monkeypatch.chdir(tmp_path / "checkout")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "installed"))
    run_all.main(["correctness", "--output", str(tmp_path / "out")])
    assert re.search(r"^correctness: done in \d+ s$", capsys.readouterr().out, re.MULTILINE)
    assert "1 passed" in (tmp_path / "out" / "correctness.txt").read_text()


def test_run_all_goes_on_after_pieces_that_fail_or_hang(harness, monkeypatch, tmp_path, capsys):
    run_all = importlib.import_module("run_all")
    python = {
        "correctness": "raise SystemExit(1)",
        "slow": "import time; time.sleep(60)",
        "broken": "raise RuntimeError",
        "good": "print('x')",
    }
    commands = {name: [sys.executable, "-I", "-c", code] for name, code in python.items()}
    monkeypatch.setattr(run_all, "pieces", lambda *args: commands)
    with pytest.raises(SystemExit, match="^failed or not finished: correctness slow broken$"):
        run_all.main(["--limit", "1", "--output", str(tmp_path)])
    correctness, slow, broken, good, _ = capsys.readouterr().out.splitlines()
    assert correctness.startswith("correctness: failed, status 1")
    assert slow.startswith("slow: out of time after 1 s")
    assert broken.startswith("broken: failed, status 1") and good.startswith("good: done")


def test_run_all_ends_its_piece_when_it_is_terminated(tmp_path):
    command = [sys.executable, BENCHMARKS / "run_all.py", "correctness", "--output", tmp_path]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    until = time.monotonic() + 60
    while not (tmp_path / "correctness.txt").exists() or not children(process.pid):
        assert process.poll() is None and time.monotonic() < until
        time.sleep(0.05)
    (piece,) = children(process.pid)
    process.terminate()
    assert process.wait(20) == 143
    assert not Path("/proc", piece).exists()


def children(pid: int) -> list[str]:
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it has ended
            if stat.read_text().rpartition(") ")[2].split()[1] == str(pid):
                found.append(stat.parent.name)
    return found


def test_run_all_plots_no_empty_file(harness, tmp_path):
    (tmp_path / "aspp-1.csv").write_text("# failed case: WRONG\n" + ",".join(harness.COLUMNS))
    importlib.import_module("run_all").plot_what_ran_out_of_time(tmp_path)
    assert [path.suffix for path in tmp_path.iterdir()] == [".csv"]


def test_results_in_readme_and_docs_match_the_files(harness):
    importlib.import_module("table").main(["--check"])


def test_table_of_results(harness, tmp_path):
    table = importlib.import_module("table")

    def write(file: str, benchmark: str, *rows: str) -> None:
        path = tmp_path / file
        path.parent.mkdir(exist_ok=True)
        keys = {"benchmark": f"bench_{benchmark} --full", "device": "A GPU", "threads": "2"}
        header = "".join(
            f"# {key}: {value}\n"
            for key, value in {**keys, "versions": "torch 3", "commit": file[-9:-4]}.items()
        )
        columns = "case,batch,dtype,kind,variant,median_ms,gflop,mbyte,extra_mib\n"
        path.write_text(header + columns + "\n".join(rows))

    write("gpu-2026-02-01/aspp-20260201-110000.csv", "aspp", "old,1,bf16,ours,deeplab_fast,1,,,")
    write(
        "gpu-2026-02-01/aspp-20260201-120000.csv",
        "aspp",
        *("old,1,bf16,ours,deeplab_fast,2.345,1,,10", "old,1,bf16,ours,in uint8,1.5,1,,"),
        *("old,1,bf16,baseline,PyTorch NCHW,240,1,,", "old,1,bf16,baseline,torchvision,4.69,1,,20"),
        *("old,1,bf16,baseline,OpenVINO,3,1,,", "old,1,fp16,ours,half,1,1,,"),
        *("old,16,bf16,ours,batch,1,1,,", '"VOC, 3x3 rate 6, dgrad",1,bf16,ours,one,1,1,,'),
    )
    write(
        "gpu-2026-02-01/ceilings-20260201-100000.csv",
        "ceilings",
        *("product,1,bf16,baseline,PyTorch,2,1600,,", "copy,1,fp32,baseline,PyTorch,0.5,,2000,"),
    )
    write("cpu-2026-01-01/model-20260101-100000.csv", "model", "x,1,fp32,ours,a,1,,,",
          "x,1,fp32,baseline,PyTorch,9,,,")  # fmt: skip
    write("local/model-20260301-100000.csv", "model", "x,1,fp32,ours,a,1,,,")
    write("gpu-2026-02-01/aspp-20260201-130000.csv", "aspp", "ours,1,bf16,ours,alone,1,,,")
    failed = tmp_path / "gpu-2026-02-01" / "aspp-20260201-130000.csv"
    failed.write_text(
        "# failed ours, batch 1, bf16, PyTorch: WRONG: error 1\n" + failed.read_text()
    )
    first, second = table.tables(tmp_path).split("A GPU, 2 threads; torch 3; ")[1:]
    assert (
        "| aspp: old, batch 1, bf16 | 2.35 ms (deeplab_fast) | 4.69 ms (torchvision) | 2.00x "
        in first
    )
    assert "| 2.00x | 10.0 / 20.0 | in uint8 1.50; PyTorch NCHW 240; OpenVINO 3.00 |" in first
    assert first.count("\n| aspp") == 1 and "rate 6" not in first and "half" not in first
    assert "Ceilings of that machine: product in bf16 800 TFLOP/s; copy in fp32 4000 GB/s." in first
    assert "raised:\n\n* ours, batch 1, bf16, PyTorch: WRONG: error 1\n\n" in first
    assert "| aspp: ours" not in first and "raised" not in second
    assert "model: x" in second and "2026-01-01" in second


@pytest.mark.parametrize("kind", ["ours", "baselines"])
@pytest.mark.parametrize("value", [1.1, float("nan"), None], ids=["off", "nan", "shape"])
def test_wrong_variant_is_named_and_the_rest_is_timed(report, tmp_path, capsys, kind, value):
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


@pytest.mark.parametrize("kind", ["ours", "baselines"])
def test_variant_that_raises_is_named_and_the_rest_is_timed(report, tmp_path, capsys, kind):
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


def test_case_whose_reference_or_timing_raises_is_named(report, tmp_path, monkeypatch):
    def bad(*args, **options):
        raise RuntimeError("out of memory")

    measure(report, reference=bad)
    measure(report, dtype="bf16")
    monkeypatch.setattr(importlib.import_module("harness"), "interleaved", bad)
    measure(report, dtype="fp16")
    comments, rows = read_csv(tmp_path)
    assert "# failed sum, batch 1, fp32, reference: RuntimeError: out of memory" in comments
    assert "# failed sum, batch 1, fp16, timing: RuntimeError: out of memory" in comments
    assert {row["dtype"] for row in rows} == {"bf16"}
    with pytest.raises(SystemExit):
        report.finish()


def test_no_variant_left_is_still_reported(report, tmp_path):
    measure(report, ours={"bad": lambda: ones(2.0)}, baselines={})
    with pytest.raises(SystemExit, match="bad: WRONG: error 1, tolerance 1e-06"):
        report.finish()
    comments, rows = read_csv(tmp_path)
    assert not rows and any("bad: WRONG" in line for line in comments)


def test_process_stops_when_the_gpu_is_lost(report, tmp_path, monkeypatch):
    def bad():
        raise RuntimeError("CUDA error: an illegal memory access was encountered\nCompile with")

    later = []
    monkeypatch.setattr(importlib.import_module("harness"), "is_lost", lambda device: True)
    with pytest.raises(SystemExit) as error:
        measure(report, ours={"bad": bad, "good": lambda: later.append(1)})
    assert error.value.code == (
        "CUDA ERROR: failed sum, batch 1, fp32, bad: RuntimeError: CUDA error: an illegal memory "
        "access was encountered: the GPU is lost to this process, nothing more is measured here"
    )
    assert not later and any("illegal memory access" in line for line in read_csv(tmp_path)[0])


def test_gpu_is_lost_when_it_does_not_synchronize(monkeypatch):
    def lost(device):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    is_lost = importlib.import_module("measure").is_lost
    monkeypatch.setattr(torch.cuda, "synchronize", lost)
    assert is_lost(torch.device("cuda")) and not is_lost(torch.device("cpu"))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    assert not is_lost(torch.device("cuda"))


def test_wrong_kernel_is_dropped_from_bench_aspp(monkeypatch, tmp_path, capsys):
    good = registry._kernels["aspp"]["cpu"]
    monkeypatch.setitem(
        registry._kernels["aspp"], "cpu", good._replace(run=lambda *args: good.run(*args) * 1.001)
    )
    with pytest.raises(SystemExit, match="tiny, batch 1, fp32, deeplab_fast.aspp.*: WRONG: error"):
        importlib.import_module("bench_aspp").main(
            ["--tiny", "--device", "cpu", "--output", str(tmp_path)]
        )
    _, rows = read_csv(tmp_path)
    variants = {row["variant"] for row in rows}
    assert "deeplab_fast.aspp, folded" not in variants and "deeplab_fast" in variants


def test_regret_tells_wrong_labels_from_ties():
    regret = importlib.import_module("bench_model").regret
    logits = torch.tensor([2.0, 2.0 - 1e-6, -1.0]).reshape(1, 3, 1, 1)
    assert regret(torch.tensor([[[0]]]), logits) == 0
    assert 0 < regret(torch.tensor([[[1]]]), logits) < 1e-5
    assert regret(torch.tensor([[[2]]]), logits) > 1
    assert regret(torch.tensor([[[0, 0]]]), logits) == float("inf")


def test_preferring_a_kernel_wherever_it_can(harness, ran):
    x, weight = torch.randn(1, 8, 5, 5), torch.randn(8, 8, 3, 3)
    run = harness.preferring(lambda: deeplab_fast.dilated_conv2d(x, weight), "emulated")
    run()  # it has no true fp32
    x, weight = x.bfloat16(), weight.bfloat16()
    run()
    deeplab_fast.dilated_conv2d(x, weight)
    assert [name for _, name in ran] == ["cpu", "emulated", "cpu"]


def test_plot_needs_matplotlib_and_says_so(report, monkeypatch, tmp_path, capsys):
    for module in ("matplotlib", "matplotlib.figure"):
        monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.delitem(sys.modules, "plot", raising=False)
    measure(report)
    report.finish()
    assert 'no plot: pip install ".[bench]"' in capsys.readouterr().out
    assert [path.suffix for path in tmp_path.iterdir()] == [".csv"]


def test_variants_take_turns(monkeypatch):
    turns = []
    runs = {name: lambda name=name: turns.append(name) for name in "abc"}
    timing = importlib.import_module("measure")
    monkeypatch.setattr(timing, "_seconds", lambda run: 1.0)
    samples = timing.interleaved(runs, torch.device("cpu"), budget=0)
    assert turns == list("aabbccbbccaa")  # each sample begins with a call that is not timed
    assert {name: len(times) for name, times in samples.items()} == dict.fromkeys("abc", 2)


def test_copies_of_what_a_call_reads():
    """Every tensor once, with its strides; what holds none stays."""
    timing, x, y = importlib.import_module("measure"), torch.ones(2, 3, 4, 5), torch.ones(3)
    x = x.contiguous(memory_format=torch.channels_last)
    leaf, both, module = ones().requires_grad_(), (x, [y]), torch.nn.Linear(2, 2)
    inner = lambda: (x, leaf)  # noqa: E731
    run = lambda: (x, y, both, inner(), module, ones)  # noqa: E731
    for copies in (timing.over_copies(run)(), timing.over_copies(run)()):
        (x2, y2, (x3, (y3,)), (x4, leaf2), module2, ones2) = copies
        assert x2 is x3 is x4 and y2 is y3 and module2 is module and ones2 is ones
        for copy, tensor in ((x2, x), (y2, y), (leaf2, leaf)):
            assert copy.data_ptr() != tensor.data_ptr() and torch.equal(copy, tensor)
            assert copy.stride() == tensor.stride()
            assert copy.is_leaf and copy.requires_grad == tensor.requires_grad
    compiled = torch.compile(lambda: x)
    assert timing.over_copies(lambda: compiled)() is compiled


@pytest.mark.parametrize("script", ["bench_depthwise", "bench_upsample_cross_entropy"])
def test_calls_on_copies_give_the_same(script, harness, tmp_path, monkeypatch):
    timing, seen = importlib.import_module("measure"), []

    def prepare(run, device, graphs):
        seen.append(harness.relative_error(timing.over_copies(run)(), run()))
        return run, None

    monkeypatch.setattr(harness, "prepare", prepare)
    options = ["--tiny", "--device", "cpu", "--output", str(tmp_path)]
    importlib.import_module(script).main(options)
    assert len(seen) > 3 and max(seen) < 1e-5


class Graph:
    """Of a run, without a GPU."""

    def __init__(self, run):
        self.replay = run


@pytest.mark.parametrize("microseconds, calls", [(49, 20), (51, 1)])
def test_short_calls_are_timed_together(monkeypatch, microseconds, calls):
    timing, x, read = importlib.import_module("measure"), ones(), deque()
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(timing, "extra_memory", lambda run, device: 8)
    monkeypatch.setattr(timing, "_captured", lambda run: (Graph(run), run()))

    def between_events(run):
        read.clear()
        run()
        return microseconds * 1e-6

    monkeypatch.setattr(timing, "_between_events", between_events)

    def double():
        read.append(x.data_ptr())
        return 2 * x

    run, memory = timing.prepare(double, torch.device("cuda"))
    assert memory == 8 and not run.output.any() and run() is run.output
    timer = timing._GpuTimer.__new__(timing._GpuTimer)
    timer._device, timer._flush, timer._samples = None, ones(), {}
    timer.sample("double", run)
    assert len(read) == run.calls == calls
    if calls > 1:
        assert len(set(read)) == calls and x.data_ptr() not in read
    assert timer.samples() == {"double": [microseconds * 1e-6 / calls]}


def test_copies_live_as_long_as_the_graph_that_reads_them(monkeypatch):
    timing, x, read = importlib.import_module("measure"), ones(), deque()
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(timing, "extra_memory", lambda run, device: 8)
    monkeypatch.setattr(timing, "_captured", lambda run: (Graph(int), run()))
    monkeypatch.setattr(timing, "_between_events", lambda run: 1e-6)

    def double():
        read.append(weakref.ref(x))
        return 2 * x

    run, _ = timing.prepare(double, torch.device("cuda"))
    gc.collect()
    assert len({id(tensor()) for tensor in read if tensor() is not None}) == 1 + run.calls


def test_call_from_python_ends_when_the_gpu_is_done(monkeypatch):
    timing, gpu, done = importlib.import_module("measure"), torch.device("cuda"), []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: done.append(str(device)))
    monkeypatch.setattr(timing, "extra_memory", lambda run, device: 8)
    run, memory = timing.prepare(lambda: done.append("run") or "output", gpu, graphs=False)
    assert run() == "output" and memory == 8
    assert done == ["run", "cuda", "run", "cuda"]  # a warm-up, a call
    monkeypatch.setattr(timing, "_seconds", lambda run: 1.0)
    (times,) = timing.interleaved({"one": run}, gpu, budget=0, graphs=False).values()
    assert len(times) == 2 and done == ["run", "cuda"] * 6


def test_models_are_called_from_python_at_batch_1_of_a_gpu():
    timings = importlib.import_module("bench_model").timings
    assert timings(torch.device("cuda"), 1) == {"": True, ", called from Python": False}
    for device, batch in (("cuda", 8), ("cpu", 1)):
        assert timings(torch.device(device), batch) == {"": True}


def test_cases_pass_on_whether_they_are_captured(report, monkeypatch):
    harness, seen = importlib.import_module("harness"), []
    prepare, interleaved = harness.prepare, harness.interleaved
    monkeypatch.setattr(harness, "prepare", lambda *args: seen.append(args[-1]) or prepare(*args))
    monkeypatch.setattr(
        harness, "interleaved", lambda *args: seen.append(args[-1]) or interleaved(*args)
    )
    measure(report, graphs=False)
    measure(report)
    assert seen == 3 * [False] + 3 * [True]


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="not Linux")
def test_extra_memory_is_that_of_the_peak():
    extra = importlib.import_module("measure").extra_memory
    for mebibytes in (64, 16):
        use = functools.partial(lambda n: torch.ones(n << 18).add_(1), mebibytes)
        use()
        used = extra(use, torch.device("cpu"))
        assert used / 2**20 == pytest.approx(mebibytes, abs=4)


@pytest.mark.parametrize("size", [(1, 1), (7, 4), (33, 33)])
@pytest.mark.parametrize(
    "rate, kernel, stride", [(1, 1, 1), (2, 3, 1), (6, 3, 1), (1, 7, 2), (3, 5, 2)]
)
def test_flops_are_those_of_taps_inside_the_image(size, rate, kernel, stride):
    cases = importlib.import_module("cases")
    x, weight = torch.ones(1, 1, *size), torch.ones(1, 1, kernel, kernel)
    products = F.conv2d(x, weight, None, stride, rate * (kernel // 2), rate).sum()
    assert cases.conv_flops(2, 3, 5, size, rate, kernel, stride) == 2 * 2 * 3 * 5 * products


def test_features_of_the_shapes():
    cases = importlib.import_module("cases")
    assert [shape.feature for shape in cases.ALL] == [
        (33, 33), (65, 65), (64, 64), (64, 128), (128, 256)
    ]  # fmt: skip


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--device", "gpu0"], "expected cpu, cuda or cuda:N, got 'gpu0'"),
        (["--device", "cuda:99"], "--device cuda:99: PyTorch sees"),
        (["--device", "meta"], "expected cpu, cuda or cuda:N, got 'meta'"),
        (["--device", "cpu", "--dtype", "tf32"], "exists on a GPU only"),
        (["--batch", "0"], "expected positive numbers, got 0"),
        (["--tiny", "--full"], "not allowed with argument"),
    ],
)
def test_bad_arguments(harness, argv, message, capsys):
    with pytest.raises(SystemExit) as error:
        harness.arguments("", argv)
    assert error.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
def test_engines_give_the_same_labels(engine):
    pytest.importorskip(engine)
    pytest.importorskip("onnxscript")
    peers = importlib.import_module("peers")
    module = torch.nn.Sequential(torch.nn.Conv2d(3, 5, 3), torch.nn.Flatten()).eval()
    x = torch.randn(2, 3, 9, 9)
    torch.testing.assert_close(
        getattr(peers, engine)(module, x, "fp32")(), module(x), rtol=1e-5, atol=1e-5
    )


@pytest.mark.slow
def test_compiled_peer_gives_the_same():
    peers = importlib.import_module("peers")
    module = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8)).eval()
    x = torch.randn(2, 3, 9, 9).contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        torch.testing.assert_close(peers.applied(module, x, compile=True)(), module(x))


COMPILING = {
    "bench_aspp": lambda script, report, shape: script.inference(report, shape, "fp32", 1, True),
    "bench_upsample_argmax": lambda script, report, shape: script.measure(
        report, shape, "fp32", "noise", torch.randn(1, shape.classes, *shape.feature)
    ),
    "bench_upsample_cross_entropy": lambda script, report, shape: script.step(
        report, shape, "fp32", 1, True
    ),
}


@pytest.fixture
def graphs(monkeypatch):
    """The sizes of the inputs of every graph that torch.compile makes, which then runs eagerly."""
    sizes = []

    def record(graph, inputs):
        sizes.append([size for input in inputs for size in getattr(input, "shape", [input])])
        return graph

    def compile(function, options, compile=torch.compile, **rest):
        return compile(function, backend=record, **rest)

    monkeypatch.setattr(torch, "compile", compile)
    return sizes


@pytest.mark.parametrize("script", COMPILING)
def test_compiled_peer_is_of_fixed_sizes_for_every_shape(script, report, graphs):
    report.args.full = True
    tiny = importlib.import_module("cases").TINY
    with torch._dynamo.config.patch(cache_size_limit=1):  # shapes may be more than torch allows
        for image in (tiny.image, (41, 49), (57, 65)):
            COMPILING[script](importlib.import_module(script), report, tiny._replace(image=image))
    compiled = [row for row in report.rows if row["variant"].endswith(" compiled")]
    assert len(compiled) == len(graphs) == 3
    assert all(type(size) is int for sizes in graphs for size in sizes), graphs


def test_compiled_function_is_of_fixed_sizes_when_called_with_others(harness, graphs):
    double = harness.compiled(lambda x: 2 * x, torch.device("cpu"))
    for size in (3, 5, 7):
        assert torch.equal(double(torch.ones(size, 2)), torch.full((size, 2), 2.0))
    assert graphs == [[3, 2], [5, 2], [7, 2]]
    assert all(type(size) is int for sizes in graphs for size in sizes)


def test_training_on_camvid_beside_torchvision(tmp_path, monkeypatch, capsys):
    """The whole comparison, on two made-up frames and at a toy size."""
    pytest.importorskip("torchvision")
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)  # slow to import
    for split, count in (("train", 2), ("test", 1)):
        for kind, mode in (("images", "RGB"), ("labels", "L")):
            (tmp_path / kind / split).mkdir(parents=True)
            for index in range(count):
                picture = Image.effect_noise((48, 36), 60).point(lambda value: value % 12)
                picture.convert(mode).save(tmp_path / kind / split / f"{index}.png")
    script = importlib.import_module("train_camvid")
    output = tmp_path / "results"
    options = ["--tiny", "--device", "cpu", "--workers", "0", "--output", str(output)]
    options += ["--seeds", "0"]
    script.main([str(tmp_path), *options, "--variants", "torchvision"])
    before = (output / "torchvision-0.json").read_bytes()
    script.main([str(tmp_path), *options])
    assert (output / "torchvision-0.json").read_bytes() == before  # not done again
    comments, rows = read_csv(output)
    assert any(line.startswith("# recipe: Recipe(epochs=1, batch_size=2") for line in comments)
    assert [row["variant"] for row in rows] == ["deeplab_fast", "torchvision"]
    ours, theirs = (
        json.loads((output / f"{variant}-0.json").read_text())["losses"]
        for variant in ("deeplab_fast", "torchvision")
    )
    # One update from the same weights on the same batch with the same dropout.
    assert ours == pytest.approx(theirs, rel=1e-4) and len(ours) == 1
    assert list(output.glob("*.png"))
    assert "deeplab_fast: mean test mIoU 0." in capsys.readouterr().out
    (output / "torchvision-0.json").write_bytes(
        before.replace(b"warmup_steps=100", b"warmup_steps=7")
    )
    with pytest.raises(
        SystemExit, match="torchvision-0.json: recipe .*warmup_steps=7,.* not .*warmup_steps=1"
    ):
        script.main([str(tmp_path), *options])
