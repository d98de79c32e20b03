"""The benchmarks run, in a toy size, and refuse to time what is wrong."""

from __future__ import annotations

import csv
import functools
import importlib
import json
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import deeplab_fast
from deeplab_fast import backends

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
SCRIPTS = sorted(path.stem for path in BENCHMARKS.glob("bench_*.py"))
DEVICES = [
    "cpu",
    pytest.param(
        "cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
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
    return harness.Report("test", harness.arguments("", ["--tiny", "--output", str(tmp_path)]))


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
    assert {row["kind"] for row in rows} == {"ours", "baseline"}
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


@pytest.mark.parametrize("kind", ["ours", "baselines"])
@pytest.mark.parametrize("value", [1.1, float("nan"), None], ids=["off", "nan", "shape"])
def test_wrong_output_ends_the_run_without_a_time(report, tmp_path, capsys, kind, value):
    measure(report)
    capsys.readouterr()
    with pytest.raises(SystemExit) as error:
        measure(report, **{kind: {"bad": lambda: torch.ones(2) if value is None else ones(value)}})
    assert str(error.value.code).startswith("WRONG: sum, batch 1, fp32: bad")
    assert " ms " not in capsys.readouterr().out
    assert [row["variant"] for row in read_csv(tmp_path)[1]] == ["good", "peer"]


def test_wrong_kernel_ends_bench_aspp(monkeypatch, tmp_path, capsys):
    good = backends._table["aspp"]["cpu"]
    monkeypatch.setitem(
        backends._table["aspp"], "cpu", good._replace(run=lambda *args: good.run(*args) * 1.001)
    )
    with pytest.raises(SystemExit, match="WRONG: tiny, batch 1, fp32: deeplab_fast"):
        importlib.import_module("bench_aspp").main(
            ["--tiny", "--device", "cpu", "--output", str(tmp_path)]
        )
    assert not list(tmp_path.iterdir())


def test_regret_tells_wrong_labels_from_ties():
    regret = importlib.import_module("bench_model").regret
    logits = torch.tensor([2.0, 2.0 - 1e-6, -1.0]).reshape(1, 3, 1, 1)
    assert regret(torch.tensor([[[0]]]), logits) == 0
    assert 0 < regret(torch.tensor([[[1]]]), logits) < 1e-5
    assert regret(torch.tensor([[[2]]]), logits) > 1
    assert regret(torch.tensor([[[0, 0]]]), logits) == float("inf")


def test_baseline_that_cannot_run_is_named(report, tmp_path, capsys):
    def broken():
        raise RuntimeError("needs a bigger machine\nand more")

    measure(report, baselines={"peer": ones, "engine": broken})
    assert "engine does not run here: needs a bigger machine\n" in capsys.readouterr().out
    assert [row["variant"] for row in read_csv(tmp_path)[1]] == ["good", "peer"]
    with pytest.raises(RuntimeError, match="bigger machine"):
        measure(report, ours={"good": broken})


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
    (output / "torchvision-0.json").write_bytes(before.replace(b"warmup=100", b"warmup=7"))
    with pytest.raises(SystemExit, match="torchvision-0.json: recipe .*warmup=7,.* not .*warmup=1"):
        script.main([str(tmp_path), *options])
