"""The benchmark scripts run at the tiny shape, and their cases are computed correctly."""

from __future__ import annotations

import copy
import importlib
import sys
from importlib.util import find_spec

import pytest
import torch
import torch.nn.functional as F

import deeplab_fast
from deeplab_fast import DeepLabV3Plus
from deeplab_fast.backends import registry
from deeplab_fast.nn import Conv2d

from ..support.backends import device_of
from .conftest import SCRIPTS, read_csv

DEVICES = [
    "cpu",
    pytest.param(
        "cuda",
        marks=[
            pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here"),
            pytest.mark.slow,  # torch.compile tries many kernels for every convolution
        ],
    ),
]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("script", SCRIPTS)
def test_every_benchmark_runs(script, device, harness, tmp_path, capsys):
    if script == "bench_accelerate":
        pytest.importorskip("torchvision", reason="accelerates a model of torchvision")
    benchmark = importlib.import_module(script)
    benchmark.main(["--tiny", "--device", device, "--output", str(tmp_path / "out")])
    own_columns = benchmark.COLUMNS if script == "bench_accelerate" else ()
    comments, rows = read_csv(tmp_path / "out")
    header = "\n".join(comments)
    for key in ("benchmark", "device", "threads", "versions", "commit", "date"):
        assert f"# {key}: " in header
    assert deeplab_fast.__version__ in header and torch.__version__ in header
    kinds = {"baseline"} if script == "bench_ceilings" else {"ours", "baseline"}
    assert {row["kind"] for row in rows} == kinds
    assert "# roofline " in header
    printed = capsys.readouterr().out
    for row in rows:
        assert tuple(row) == (*harness.COLUMNS, *own_columns)
        assert float(row["error"]) <= float(row["tolerance"])
        assert 0 < float(row["min_ms"]) <= float(row["median_ms"])
        assert float(row["speedup"]) > 0
        assert float(row["gflop"] or row["mbyte"]) > 0 and float(row["percent_of_lower_bound"]) > 0
        assert row["variant"] in printed
    if script == "bench_aspp":
        assert any("branches, forward" in row["case"] for row in rows)
        skipped = "parallel_dilated_conv2d, fp32: deeplab_fast on cuda is skipped: does not run on"
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


@pytest.mark.slow
def test_wrong_kernel_is_not_timed_by_bench_aspp(monkeypatch, tmp_path, capsys):
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


def test_verdict_of_bench_accelerate():
    """Medians of the ratios in each round, so that a slow round of the machine changes nothing."""
    verdict = importlib.import_module("bench_accelerate").verdict
    samples = {
        "original NCHW": [4.0, 4.0, 40.0],
        "original channels_last": [2.0, 2.0, 20.0],
        "original channels_last again": [2.04, 2.06, 20.6],
        "original, compiled": [1.9, 1.9, 19.0],
        "accelerated": [2.08, 2.08, 20.8],
    }

    def goal(seconds=2.08, must_gain=False, **changes):
        ours = [seconds, seconds, 10 * seconds]
        return verdict(samples | {"accelerated": ours} | changes, must_gain)["accelerated"]["goal"]

    rows = verdict(samples, must_gain=False)
    assert rows["original NCHW"]["ratio"] == 2 and rows["original channels_last"]["ratio"] == 1
    assert rows["original NCHW"]["noise_percent"] == pytest.approx(3)
    assert rows["accelerated"]["ratio"] == pytest.approx(1.04)
    assert rows["accelerated"]["ratio_to_compiled"] == pytest.approx(2.08 / 1.9)
    assert [row["goal"] for row in rows.values()] == [None, None, None, None, "met"]
    assert goal(2.12) == "missed"  # 1.06, above 1.02 and the noise
    assert goal(1.95, must_gain=True) == "missed"  # below 1.05x
    assert goal(1.90, must_gain=True) == "met"
    faster = [1.5, 1.5, 15.0]  # the compiled original
    assert goal(1.90, True, **{"original, compiled": faster}) == "missed"
    assert goal(1.54, True, **{"original, compiled": faster}) == "met"  # within the noise
    assert verdict({"accelerated": [1.0]}, must_gain=False) == {}


def test_gradients_of_bench_accelerate_are_compared():
    gradient_error = importlib.import_module("bench_accelerate").gradient_error
    expected = [torch.tensor(2.0), torch.tensor([3.0, 4.0])]
    assert gradient_error(expected, expected) == 0
    assert gradient_error([expected[0], torch.tensor([3.0, 4.5])], expected) == pytest.approx(0.1)
    assert gradient_error([torch.tensor(2.01), expected[1]], expected) == float("inf")
    assert gradient_error([expected[0], torch.ones(3)], expected) == float("inf")


def test_models_of_missing_packages_are_left_out(monkeypatch, tmp_path, capsys):
    bench_accelerate = importlib.import_module("bench_accelerate")
    for name in ("segmentation_models_pytorch", "transformers"):
        monkeypatch.setitem(sys.modules, name, None)
    options = ["--tiny", "--device", "cpu", "--output", str(tmp_path)]
    bench_accelerate.main([*options, "--only", "PSPNet", "transformers"])
    printed = capsys.readouterr().out
    assert "transformers is not installed, so its models are left out" in printed
    assert "segmentation_models_pytorch is not installed" in printed
    with pytest.raises(SystemExit):
        bench_accelerate.main([*options, "--only", "HRNet"])
    assert "--only: expected a part of torchvision deeplabv3_resnet50, " in capsys.readouterr().err


@pytest.mark.parametrize("dilation, padding, stride", [(1, 0, 1), (2, 3, 2), (6, 6, 1)])
def test_flops_of_the_networks_count_taps_inside_the_image(dilation, padding, stride):
    networks = importlib.import_module("common.networks")
    conv = torch.nn.Conv2d(4, 6, (3, 5), stride, padding, dilation, groups=2, bias=False)
    x = torch.randn(2, 4, 29, 31)
    products = torch.nn.utils.skip_init(
        torch.nn.Conv2d, 4, 6, (3, 5), stride, padding, dilation, groups=2, bias=False
    ).requires_grad_(False)
    products.weight.fill_(1.0)
    assert networks.flops(conv, x) == 2 * products(torch.ones_like(x)).sum()


def test_regret_distinguishes_wrong_labels_from_ties():
    regret = importlib.import_module("bench_model").regret
    logits = torch.tensor([2.0, 2.0 - 1e-6, -1.0]).reshape(1, 3, 1, 1)
    assert regret(torch.tensor([[[0]]]), logits) == 0
    assert 0 < regret(torch.tensor([[[1]]]), logits) < 1e-5
    assert regret(torch.tensor([[[2]]]), logits) > 1
    assert regret(torch.tensor([[[0, 0]]]), logits) == float("inf")


def test_models_are_timed_from_python_at_batch_1_on_a_gpu():
    timings = importlib.import_module("bench_model").timings
    assert timings(torch.device("cuda"), 1) == {"": True, ", called from Python": False}
    for device, batch in (("cuda", 8), ("cpu", 1)):
        assert timings(torch.device(device), batch) == {"": True}


def test_prepared_models_called_from_python_capture_their_own_graphs():
    bench_model, cases = (importlib.import_module(name) for name in ("bench_model", "common.cases"))
    model = bench_model.trained_like("mobilenet_v2", cases.TINY)
    images = torch.randn(1, 3, 17, 17)
    ours = {"deeplab_fast prepared": model.prepare_for_inference, "deeplab_fast.DeepLabV3": model}
    runs = bench_model.called_from_python(ours, model, images)
    assert runs["deeplab_fast prepared, cuda_graphs=False"] is ours["deeplab_fast prepared"]
    assert runs["deeplab_fast.DeepLabV3"] is model and len(runs) == 3
    labels = model.prepare_for_inference().predict(images)
    assert torch.equal(runs["deeplab_fast prepared"](), labels)


@pytest.mark.parametrize("size", [(1, 1), (7, 4), (33, 33)])
@pytest.mark.parametrize(
    "dilation, kernel, stride", [(1, 1, 1), (2, 3, 1), (6, 3, 1), (1, 7, 2), (3, 5, 2)]
)
def test_flops_count_taps_inside_the_image(size, dilation, kernel, stride):
    cases = importlib.import_module("common.cases")
    x, weight = torch.ones(1, 1, *size), torch.ones(1, 1, kernel, kernel)
    products = F.conv2d(x, weight, None, stride, dilation * (kernel // 2), dilation).sum()
    assert cases.conv_flops(2, 3, 5, size, dilation, kernel, stride) == 2 * 2 * 3 * 5 * products


def test_flops_of_deeplabv3plus(harness):
    """All convolutions, decoder and depthwise ones included, and the pooled branch per image."""
    bench_model, cases = (importlib.import_module(name) for name in ("bench_model", "common.cases"))
    model = DeepLabV3Plus(
        "mobilenet_v2", 5, 8, (2, 6), aspp_channels=8, low_level_channels=4, separable_decoder=True
    ).eval()
    products = 0.0

    def count(conv, inputs, output):
        nonlocal products
        ones = torch.ones_like(conv.weight), torch.ones_like(inputs[0])
        taps = F.conv2d(
            ones[1], ones[0], None, conv.stride, conv.padding, conv.dilation, conv.groups
        )
        products += taps.double().sum().item()

    shape = cases.TINY._replace(in_channels=320)
    counted = copy.deepcopy(model)
    for module in counted.modules():
        if isinstance(module, torch.nn.Conv2d):
            module.register_forward_hook(count)
    with torch.no_grad():
        counted(torch.randn(2, 3, *shape.image))
    height, width = shape.feature
    per_pixel = 2 * 8 * 8 * height * width  # the pooled branch in the projection, as hooked
    products += 2 * 8 * 8 - per_pixel
    assert bench_model.flops(model, shape, 2) == 2 * products


def test_baseline_of_deeplabv3plus_is_plain_pytorch(harness, ran):
    peers = importlib.import_module("common.peers")
    torch.manual_seed(0)
    model = DeepLabV3Plus("mobilenet_v2", 5, atrous_rates=(2,), aspp_channels=8).eval()
    name, baseline = peers.model(model)
    images = torch.randn(2, 3, 33, 33)
    with torch.no_grad():
        actual = baseline(images)["out"]
        assert name == "PyTorch" and ran == []
        torch.testing.assert_close(actual, model(images)["out"], rtol=1e-4, atol=1e-5)
    assert not any(type(module) is Conv2d for module in baseline.modules())
    assert any(type(module) is Conv2d for module in model.modules())


def test_feature_sizes_of_the_shapes():
    cases = importlib.import_module("common.cases")
    assert [shape.feature for shape in cases.ALL] == [
        (33, 33), (65, 65), (64, 64), (64, 128), (128, 256)
    ]  # fmt: skip


@pytest.mark.skipif(torch.cuda.is_available(), reason="Triton compiles for the GPU here")
def test_l2_read_sums_the_buffer_in_every_pass():
    l2_read = importlib.import_module("common.l2_read")
    size = l2_read.buffer_size(200_000, num_programs=6)
    assert size == 49152  # two blocks each: three would take 295 kB
    device = device_of("triton")
    if reason := registry.unavailable_reason("triton", device):
        pytest.skip(reason)
    buffer = torch.randint(1000, (size,), dtype=torch.int32, device=device)
    sums = l2_read.l2_read(buffer, passes=3, num_programs=6)
    assert sums.sum() == 3 * buffer.sum() and len(sums) == 6
    with pytest.raises(
        ValueError, match="expected a multiple of 5 blocks of 4096, got 49152 elements x 3"
    ):
        l2_read.l2_read(buffer, passes=3, num_programs=5)


@pytest.mark.slow
def test_engines_match_pytorch():
    for package in ("onnxruntime", "onnxscript", "openvino", "nncf"):
        pytest.importorskip(package, reason="an engine of the benchmark")
    peers = importlib.import_module("common.peers")
    torch.manual_seed(0)
    module = torch.nn.Sequential(torch.nn.Conv2d(3, 5, 3), torch.nn.Flatten()).eval()
    x = torch.randn(2, 3, 9, 9)
    with torch.no_grad():
        expected = module(x)
    runs = peers.engines(module, x, "fp32")
    assert list(runs) == ["ONNX Runtime", "OpenVINO", peers.INT8]
    for name in ("ONNX Runtime", "OpenVINO"):
        torch.testing.assert_close(runs[name](), expected, rtol=1e-5, atol=1e-5)
    error = (runs[peers.INT8]() - expected).norm() / expected.norm()
    assert 1e-4 < error < 0.05  # 8 bits
    assert list(peers.engines(module, x, "bf16")) == ["OpenVINO"]
    assert peers.engines(module, x, "fp16") == {}


def test_the_cost_on_the_host_is_measured_without_a_gpu(tmp_path, capsys):
    bench_host = importlib.import_module("bench_host")
    bench_host.main(["--tiny", "--output", str(tmp_path)])
    comments, rows = read_csv(tmp_path)
    assert any(line.startswith("# commit: ") for line in comments)
    names = [bench_host.CONV2D, *bench_host.calls(), bench_host.MODEL]
    assert [row["call"] for row in rows] == names
    for row in rows[1:-1]:
        above = float(row["median_us"]) - float(row["dispatch_us"])
        assert float(row["above_dispatch_us"]) == pytest.approx(above, abs=0.02)
    printed = capsys.readouterr().out
    assert all(row["call"] in printed and row["median_us"] in printed for row in rows)


def test_the_cost_on_the_host_is_that_of_our_kernels():
    bench_host = importlib.import_module("bench_host")
    bench_host.register()
    with registry.trace() as ran, deeplab_fast.backend(bench_host.BACKEND), torch.no_grad():
        for name, call in bench_host.calls().items():
            call.function()
            assert ran[-1] == (call.op, bench_host.BACKEND), name


def test_bench_model_times_the_chosen_backbones(tmp_path, monkeypatch, capsys):
    bench_model = importlib.import_module("bench_model")
    timed = []
    monkeypatch.setattr(bench_model, "trained_like", lambda backbone, *args: torch.nn.Linear(1, 1))
    monkeypatch.setattr(bench_model, "inference", lambda *args: timed.append(args[1].name))
    monkeypatch.setattr(bench_model.harness.Report, "finish", lambda report: None)
    options = ["--tiny", "--output", str(tmp_path)]
    bench_model.main(options)
    assert len(timed) == len(bench_model.TINY)
    bench_model.main([*options, "--only", "mobilenet"])
    assert len(timed) == len(bench_model.TINY) + 1
    with pytest.raises(SystemExit):
        bench_model.main([*options, "--only", "vgg"])
    assert "--only: expected parts of resnet50, mobilenet_v2, got vgg" in capsys.readouterr().err
