"""``deeplab-fast tune`` and ``SegmentationModel.tune``, on a simulated GPU."""

from __future__ import annotations

import pytest
import torch

from deeplab_fast import DeepLabV3
from deeplab_fast.backends import registry, tuning
from deeplab_fast.cli import main

from ..support.pretend_gpu import PretendGPU

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    gpu = PretendGPU(monkeypatch, tmp_path)
    times = {"cuda/sm90": 0.4, "triton": 0.5, "cuDNN": 1.0, "cuDNN, benchmark": 0.8}
    gpu.times = lambda name, output: times[name]
    return gpu


@pytest.fixture(scope="module")
def model() -> DeepLabV3:
    return DeepLabV3("mobilenet_v2", 3, 16, atrous_rates=(2,), head_conv=False).eval()


@pytest.fixture(scope="module")
def weights(model, tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("weights") / "tiny.safetensors"
    model.save_pretrained(path)
    return str(path)


def tune(capsys, weights: str, *arguments: object) -> tuple[int, str, list[str]]:
    """Exit status, stdout and the lines of stderr."""
    options = ("--device", "cpu", *map(str, arguments))
    status = main(["tune", weights, "--size", "33", "49", *options])
    out, err = capsys.readouterr()
    return status, out, err.splitlines()


def test_tune_a_model(gpu, weights, capsys):
    status, out, err = tune(capsys, weights, "--batch", 2)
    assert (status, err) == (0, [])
    lines = out.splitlines()
    assert lines[0] == "batch 2:" and lines[1].startswith("layer  ")
    assert lines[-1] == f"The measurements are in {gpu.table}"
    layers = {line.split()[0]: line for line in lines[2:-1]}
    assert layers["backbone.features.0.0"].endswith("0.8000   0.4000  cuda/sm90")
    assert "  fused_conv2d  " in layers["backbone.features.0.0"]
    assert "2x3x33x49, 32x3x3x3, float32" in layers["backbone.features.0.0"]
    assert "  aspp  " in layers["classifier.0"]
    assert len(gpu.rows()) == 2 * len(gpu.timed) == 2 * len(layers)


def test_tuned_kernels_run_the_model(gpu, model, weights, capsys):
    images = torch.zeros(1, 3, 33, 49)
    prepared = model.prepare_for_inference()

    def backends():
        with registry.trace() as ran:
            prepared.predict(images)
        return {name for op, name in ran if op in registry.shape_buckets}

    assert backends() == {"reference"}
    assert tune(capsys, weights)[0] == 0
    assert backends() == {"cuda/sm90"}


def test_several_batch_sizes_and_another_dtype(gpu, weights, capsys):
    status, out, _ = tune(capsys, weights, "--batch", 1, 3, "--dtype", "bf16")
    assert status == 0
    assert "batch 1:\n" in out and "batch 3:\n" in out
    assert {row.shape_bucket.split()[0] for row in gpu.rows()} == {"bf16"}
    assert {row.shape[:2] for row in gpu.rows()} == {"1x", "3x"}


def test_wrong_kernel(gpu, weights, capsys):
    gpu.wrong = {"triton": lambda output: output + 1}
    gpu.unsupported = {
        "triton": lambda arguments: None if type(arguments).__name__ == "Aspp" else "not an ASPP"
    }
    status, out, err = tune(capsys, weights)
    assert status == 1
    (line,) = err
    assert line.startswith("deeplab_fast: triton: aspp 1x320x3x4 ") and "relative error" in line
    assert "cuda/sm90" in out and "failed" not in out


def test_interrupted(gpu, weights, capsys):
    calls = iter(range(100))

    def times(name, output):
        if next(calls) == 7:
            raise KeyboardInterrupt
        return 1.0

    gpu.times = times
    assert tune(capsys, weights) == (130, "", ["deeplab-fast: interrupted"])
    assert len(gpu.rows()) == 2  # of the first call; the second was interrupted
    gpu.times, gpu.timed = lambda name, output: 1.0, []
    assert tune(capsys, weights)[0] == 0
    assert len(gpu.rows()) == 2 * len(gpu.timed) + 2


def test_table_that_cannot_be_written(gpu, weights, capsys):
    gpu.table.parent.write_text("a file, where a folder has to be")
    status, out, err = tune(capsys, weights)
    assert (status, out) == (2, "")
    (line,) = err
    assert line.startswith(f"deeplab-fast: cannot write your dispatch table {gpu.table}: ")


def test_kernel_that_leaves_the_gpu_unusable(gpu, weights, monkeypatch, capsys):
    def illegal(outputs):
        raise RuntimeError("CUDA error: an illegal memory access was encountered\nMore of it")

    gpu.wrong = {"triton": illegal}
    monkeypatch.setattr(tuning, "is_unusable", lambda device: True)
    status, out, err = tune(capsys, weights)
    assert (status, out) == (2, "")
    (line,) = err
    assert line.startswith("deeplab-fast: triton: fused_conv2d 1x3x33x49 ")
    assert line.endswith(
        "RuntimeError: CUDA error: an illegal memory access was encountered (the GPU is unusable "
        "in this process now)"
    )


def test_nothing_to_tune_on_a_cpu(capsys):
    status, out, err = tune(capsys, "weights that are not read")
    assert (status, err) == (0, [])
    assert out == ("nothing to tune on cpu: kernels are chosen by their speed on GPUs only\n")


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--batch", "1", "0"], "--batch: got 1 0 (expected positive integers)"),
        (["--size", "-1", "9"], "--size: got -1 9 (expected positive integers)"),
        (["--device", "cuda:99"], "--device cuda:99: "),
        ([], "WEIGHTS: missing.pth: "),
    ],
)
def test_wrong_arguments(gpu, capsys, arguments, message):
    status, out, err = tune(capsys, "missing.pth", *arguments)
    assert (status, out, len(err)) == (2, "", 1)
    assert err[0].startswith(f"deeplab-fast: {message}")


@pytest.mark.parametrize("arguments", [["w"], ["w", "--size", "33"], ["--size", "3", "3"]])
def test_missing_arguments(capsys, arguments):
    with pytest.raises(SystemExit) as exit:
        main(["tune", *arguments])
    assert exit.value.code == 2
    assert "usage: deeplab-fast tune" in capsys.readouterr().err


def test_help(gpu, capsys):
    with pytest.raises(SystemExit):
        main(["tune", "--help"])
    out = capsys.readouterr().out
    assert str(gpu.table) in out and "deeplabv3_resnet50" in out


def test_out_of_memory(gpu, weights, capsys):
    def times(name, output):
        raise torch.OutOfMemoryError("CUDA out of memory")

    gpu.times = times
    status, _, err = tune(capsys, weights)
    assert status == 2
    assert err == ["deeplab-fast: not enough memory (expected a smaller --size or --batch)"]


def test_tune_in_python(gpu, model):
    tuned = model.tune(torch.zeros(3, 33, 49))
    (result,) = tuned.results
    assert result.layers == ["classifier.0"]
    assert result.call.op == "parallel_dilated_conv2d_and_mean"
    assert str(tuned).splitlines()[1].startswith("classifier.0  parallel_dilated_conv2d_and_mean  ")


def test_errors_of_tune_in_python(gpu):
    model = DeepLabV3("mobilenet_v2", 3, 16, atrous_rates=(2,), head_conv=False)
    with pytest.raises(RuntimeError, match=r"^tune: expected evaluation mode: .*model\.eval\(\)"):
        model.tune(torch.zeros(1, 3, 33, 33))
    with pytest.raises(ValueError, match=r"^images: expected \[N, 3, H, W\]"):
        model.eval().tune(torch.zeros(1, 4, 33, 33))
    with pytest.raises(TypeError, match=r"^images: expected a tensor .*got a tuple"):
        model.tune((33, 33))
