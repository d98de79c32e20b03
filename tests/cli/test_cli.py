"""Command line: its exit status, and info."""

from __future__ import annotations

import math
import subprocess
import sys
from importlib.metadata import entry_points
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import deeplab_fast
from deeplab_fast import _C
from deeplab_fast.backends import dispatch_table, registry
from deeplab_fast.cli import main
from deeplab_fast.cli.errors import UserError
from deeplab_fast.cli.processes import process_group
from deeplab_fast.models import DeepLabV3Plus, Preprocessing
from deeplab_fast.models.preprocessing import network_size
from deeplab_fast.training import TrainingError, distributed

from ..support.segment import photo, segment

pytestmark = pytest.mark.usefixtures("one_thread", "folder")


def test_console_script(capsys):
    (script,) = entry_points(group="console_scripts", name="deeplab-fast")
    with pytest.raises(SystemExit) as exit:
        script.load()(["--version"])
    assert not exit.value.code
    assert capsys.readouterr().out == f"deeplab-fast {deeplab_fast.__version__}\n"


def test_closed_pipe_is_not_reported():
    command = [sys.executable, "-I", "-m", "deeplab_fast", "info"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait() == 1


def test_full_disk_is_reported():
    command = [sys.executable, "-I", "-m", "deeplab_fast", "info"]
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 1
    assert done.stderr == "deeplab-fast: [Errno 28] No space left on device\n"


def test_only_rank_zero_reports_an_error_of_training(monkeypatch):
    for rank, error in ((0, UserError), (1, SystemExit)):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        with pytest.raises(error) as caught, process_group("cpu"):
            raise TrainingError("a.png: damaged")
        assert str(caught.value) == ("2" if rank else "a.png: damaged")


@pytest.mark.parametrize(
    "arguments", [[], ["paint"], ["segment"], ["segment", "x", "--dtype", "i"]]
)
def test_wrong_arguments(arguments, capsys):
    with pytest.raises(SystemExit) as exit:
        main(arguments)
    assert exit.value.code == 2
    assert "usage: deeplab-fast" in capsys.readouterr().err


@pytest.mark.parametrize(
    "size, resize, align_corners, expected",
    [
        ((640, 480), 520, False, (693, 520)),
        ((480, 640), 520, False, (520, 693)),
        ((640, 480), None, False, (640, 480)),
        ((640, 480), 513, True, (689, 513)),
        ((512, 512), 513, True, (513, 513)),
        ((451, 300), 513, True, (769, 513)),
        ((1, 1), 513, True, (513, 513)),
        ((100, 25), 520, False, (2080, 520)),
        ((1000, 25), 520, False, (2080, 52)),
        ((10**6, 1), 520, False, (2080, 1)),
        ((10**6, 1), 513, True, (2049, 1)),
        ((7, 9), None, True, (1, 17)),
    ],
)
def test_network_size(size, resize, align_corners, expected):
    assert network_size(size, resize, align_corners) == expected


def test_info(capsys):
    assert main(["info"]) == 0
    out = capsys.readouterr().out
    for fact in (
        deeplab_fast.__version__,
        torch.__version__,
        _C.build_info()["compiler"],
        "python",
        "triton",
    ):
        assert fact in out
    on_cpu = out.split("\nOn ")[1]
    assert on_cpu.startswith(f"cpu, in order of preference: {', '.join(registry.order('cpu'))}\n")
    ran = {line.split()[0]: line.split()[1] for line in on_cpu.splitlines()[1:] if line}
    assert set(ran) == {*registry.NAMES, *registry.ops()}
    for op in registry.ops():
        can_run = [n for n in registry.order("cpu") if n in registry.backends_of(op)]
        assert ran[op] == can_run[0]


def test_info_says_where_the_dispatch_tables_are_without_a_gpu(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert main(["info"]) == 0
    out = capsys.readouterr().out
    assert f"  shipped with the package: {dispatch_table.PATH}\n" in out
    assert f"  your own: {dispatch_table.user_path()}\n" in out


def test_info_gives_the_reason(monkeypatch, capsys):
    changed = registry._backends["cpu"]._replace(
        unavailable_reason=lambda device: "the moon is full"
    )
    monkeypatch.setitem(registry._backends, "cpu", changed)
    monkeypatch.delitem(registry._kernels["aspp"], "cpu")
    assert main(["info"]) == 0
    on_cpu = capsys.readouterr().out.split("\nOn ")[1].splitlines()
    lines = {line.split()[0]: line for line in on_cpu if line}
    assert lines["cpu"].endswith("the moon is full")
    assert "reference (cpu: the moon is full)" in lines["upsample_argmax"]
    assert "reference (cpu: it has no aspp kernel)" in lines["aspp"]


def test_info_prints_the_dispatch_table(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    gpu = SimpleNamespace(
        name="A GPU", major=9, minor=0, multi_processor_count=132, total_memory=2**37
    )
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: gpu)
    monkeypatch.setattr(dispatch_table, "device_class", lambda device: "sm_90 with 132 SMs")
    monkeypatch.setattr(dispatch_table, "PATH", tmp_path / "shipped.csv")
    monkeypatch.setattr(dispatch_table, "user_path", lambda: tmp_path / "cache" / "yours.csv")
    dispatch_table.write(dispatch_table.PATH, [])
    dispatch_table.fastest_kernels.cache_clear()
    for name in ("cuda", "cuda/sm90", "cuda/sm80", "triton"):
        changed = registry._backends[name]._replace(unavailable_reason=lambda device_type: None)
        monkeypatch.setitem(registry._backends, name, changed)
    assert main(["info"]) == 0
    out = capsys.readouterr().out
    on_gpu = {line.split()[0]: line for line in out.split("\nOn ")[2].splitlines() if line}
    assert on_gpu["aspp"].endswith("the fastest measured kernel, otherwise reference (cuDNN)")
    assert on_gpu["upsample_argmax"].split()[1] == "cuda"
    assert "Dispatch table for cuda:0, sm_90 with 132 SMs:\n" in out
    assert f"  shipped with the package: 0 rows in {tmp_path}/shipped.csv\n" in out
    assert f"  your own: 0 rows in {tmp_path}/cache/yours.csv\n" in out
    assert "  deeplab-fast tune measures the convolutions of a model\n" in out

    def row(bucket, kernel, ms, device="sm_90 with 132 SMs", versions=None, date="2026-11-30"):
        versions = dispatch_table.versions() if versions is None else versions
        return dispatch_table.Row(
            device, "aspp", bucket, kernel, ms, 0.063, "1x8x5x5", "A GPU", versions, "-", date
        )

    shipped = [
        row("a bucket", "cuda/sm90", 0.05), row("another", "triton", math.inf, versions="any"),
        row("another", "triton", 0.07, device="sm_80 with 108 SMs"),
    ]  # fmt: skip
    dispatch_table.write(dispatch_table.PATH, shipped)
    yours = [
        row("a bucket", "cuda/sm90", 0.04, date="2026-12-01"), row("a third", "cuda/sm90", 0.06),
        row("another", "triton", 0.01, versions="old"),
    ]  # fmt: skip
    dispatch_table.add(yours)
    assert main(["info"]) == 0
    out = capsys.readouterr().out
    assert f"  shipped with the package: 2 rows in {tmp_path}/shipped.csv\n" in out
    assert f"  your own: 2 rows in {tmp_path}/cache/yours.csv, and 1 out of date\n" in out
    assert "  aspp, 3 shape buckets: cuda/sm90 for 2, reference for 1\n" in out
    assert "another" not in out
    assert main(["info", "--dispatch-table"]) == 0
    lines = capsys.readouterr().out.splitlines()
    begin = lines.index("    cuda/sm90   a bucket")
    assert lines[begin + 1 : begin + 6] == [
        "      cuda/sm90    0.0400 ms, cuDNN    0.0630 ms, yours   2026-12-01: 1x8x5x5",
        "    reference   another",
        "      triton          failed, cuDNN    0.0630 ms, shipped 2026-11-30: 1x8x5x5",
        "    cuda/sm90   a third",
        "      cuda/sm90    0.0600 ms, cuDNN    0.0630 ms, yours   2026-11-30: 1x8x5x5",
    ]

    dispatch_table.PATH.write_text("device\n")
    dispatch_table.fastest_kernels.cache_clear()
    assert main(["info"]) == 2
    assert capsys.readouterr().err.startswith(f"deeplab-fast: {tmp_path}/shipped.csv: expected the")
    dispatch_table.fastest_kernels.cache_clear()


def test_info_explains_a_model(weights, capsys):
    shape = ["--size", "33", "47", "--batch", "2", "--device", "cpu"]
    assert main(["info", "--model", str(weights), *shape]) == 0
    title, first, *_, last = capsys.readouterr().out.splitlines()
    assert title.split() == ["layer", "op", "shapes", "backend", "evidence"]
    assert first.split()[:3] == ["backbone.features.0.0", "fused_conv2d", "2x3x33x47,"]
    assert " float32 " in first and first.endswith("fixed order: cpu, reference")
    assert last.split()[:2] == ["(model)", "upsample_argmax"]
    assert main(["info", "--model", str(weights), *shape, "--dtype", "bfloat16"]) == 0
    assert " bfloat16 " in capsys.readouterr().out.splitlines()[1]


def test_deeplabv3plus_is_segmented_and_explained(tmp_path, capsys):
    torch.manual_seed(0)
    model = DeepLabV3Plus("mobilenet_v2", 3, atrous_rates=(2,), separable=True, aspp_channels=8)
    model.preprocessing = Preprocessing(resize=64)
    path = tmp_path / "plus.safetensors"
    model.eval().save_pretrained(path)
    photo().save(tmp_path / "photo.png")
    status, out, err = segment(
        capsys, tmp_path / "photo.png", "--weights", path, "--output", tmp_path / "segmented"
    )
    assert (status, err) == (0, [])
    labels = np.asarray(Image.open(tmp_path / "segmented" / "photo_labels.png"))
    expected = model.predict(model.preprocessing(photo()), size=labels.shape)
    assert (labels == expected.numpy()).mean() > 0.99  # prepared for inference, it rounds elsewhere
    shape = ["--size", "33", "47", "--device", "cpu"]
    assert main(["info", "--model", str(path), *shape]) == 0
    layers = [line.split()[0] for line in capsys.readouterr().out.splitlines()[1:]]
    assert layers[-1] == "(model)" and any("classifier.0" in layer for layer in layers)
    assert main(["tune", str(path), *shape]) == 0
    assert "nothing to tune on cpu" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--model", "a.pth"], "expected --model WEIGHTS and --size HEIGHT WIDTH together"),
        (["--size", "5", "5"], "expected --model WEIGHTS and --size HEIGHT WIDTH together"),
        (["--model", "a.pth", "--size", "5", "0"], "--size: got 5 0 (expected positive integers)"),
        (["--model", "a.pth", "--size", "5", "5", "--batch", "0"], "--batch: got 0 (expected pos"),
        (["--model", "a.pth", "--size", "5", "5"], "deeplab-fast: --model: "),
    ],
)
def test_info_with_wrong_arguments(arguments, message, capsys):
    assert main(["info", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_info_of_one_subject_at_a_time(capsys):
    with pytest.raises(SystemExit):
        main(["info", "--model", "a.pth", "--size", "5", "5", "--dispatch-table"])
    assert "--dispatch-table: not allowed with argument --model" in capsys.readouterr().err
