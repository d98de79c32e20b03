"""``deeplab-fast export``."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from deeplab_fast.cli import export, main
from deeplab_fast.export.check import CheckFailed, Comparison
from deeplab_fast.models import DeepLabV3

OPENVINO = ("--format", "openvino", "--output", "x.xml")
COMPARISON = Comparison(((1, 3, 65, 81),), 5265, 2, None)


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> str:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "model.safetensors"
    DeepLabV3("mobilenet_v2", 7, aspp_channels=8).eval().save_pretrained(path)
    return str(path)


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(capsys, *arguments: str) -> tuple[int, str, str]:
    status = main(["export", *arguments])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


@pytest.fixture
def calls(monkeypatch) -> list[tuple[str, str, dict[str, Any]]]:
    """Calls of the functions that write files, none of which are made."""
    calls = []

    def recorded(name: str) -> Any:
        def write(model: Any, path: Path, **options: Any) -> Comparison:
            calls.append((name, str(path), options))
            path.write_bytes(bytes(1_500_000))
            path.with_suffix(".bin").write_bytes(bytes(2_000_000))
            return COMPARISON

        return write

    for name in ("export_onnx", "export_openvino", "export_torch", "export_aoti"):
        monkeypatch.setattr(export, name, recorded(name))
    return calls


def test_onnx(capsys, weights):
    """The command in full: the file, and what is printed."""
    onnxruntime = pytest.importorskip("onnxruntime", reason="the extra export is not installed")
    pytest.importorskip("onnxscript", reason="the extra export is not installed")
    options = ("--format", "onnx", "--labels", "uint8", "--size", "33", "49", "--batch", "1")
    status, out, err = run(capsys, weights, *options, "--output", "model.onnx")
    assert status == 0, err
    size = Path("model.onnx").stat().st_size / 1e6
    *lines, check = out.splitlines()
    assert lines == [
        f"model.onnx ({size:.1f} MB)",
        "  input   images  float32 [1, 3, 33, 49]",
        "  output  labels  uint8 [1, 33, 49]",
    ]
    difference = r"largest difference of logits \d\.\de-\d\d of the largest"
    expected = rf"  check   0 of 1617 labels differ; {difference} \(images of 1x3x33x49\)"
    assert re.fullmatch(expected, check)
    session = onnxruntime.InferenceSession("model.onnx")
    assert session.get_inputs()[0].shape == [1, 3, 33, 49]
    assert session.get_outputs()[0].type == "tensor(uint8)"


@pytest.mark.parametrize(
    ("format", "suffix", "more"),
    [
        ("onnx", ".onnx", {"batch": None}),
        ("torch", ".pt2", {"batch": None, "portable": False}),
        ("aoti", ".pt2", {"batch": None}),
        ("openvino", ".xml", {"calibration": None}),
    ],
)
def test_formats(format, suffix, more, calls, capsys, weights):
    status, out, _ = run(capsys, weights, "--format", format, "--output", f"model{suffix}")
    defaults = {"result": "labels", "dtype": torch.int64, "size": None}
    assert status == 0
    assert calls == [(f"export_{format}", f"model{suffix}", defaults | more)]
    assert f"model{suffix} (1.5 MB)" in out and ("model.bin (2.0 MB)" in out) == (suffix == ".xml")
    assert "input   images  float32 [N, 3, H, W]" in out
    assert "output  labels  int64 [N, H, W]" in out
    assert "check   2 of 5265 labels differ" in out


def test_options(calls, capsys, weights):
    options = ["--result", "logits", "--size", "65", "97", "--batch", "2", "--portable"]
    status, out, _ = run(capsys, weights, "--format", "torch", "--output", "x.pt2", *options)
    expected = {"result": "logits", "size": (65, 97), "batch": 2, "portable": True}
    assert status == 0 and calls[0][2] == expected | {"dtype": torch.int64}
    assert "output  logits  float32 [2, 7, 65, 97]" in out


def test_photos_to_calibrate(calls, capsys, weights, folder):
    (folder / "photos").mkdir()
    for name in ("b.jpg", "a.png", "notes.txt"):
        (folder / "photos" / name).touch()
    options = ["--int8", "--calibrate", "photos"]
    assert run(capsys, weights, "--format", "openvino", "--output", "x.xml", *options)[0] == 0
    photos = calls[0][2]["calibration"]
    assert [path.name for path in photos] == ["a.png", "b.jpg"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--output", "x.pt2"], "--output x.pt2: expected a name that ends in .onnx"),
        (["--output", "no/x.onnx"], "--output no/x.onnx: no folder no"),
        (["--portable"], "--portable: expected --format torch, got onnx"),
        (["--int8"], "--int8: expected --format openvino, got onnx"),
        (["--size", "0", "33"], "--size: got 0 33 (expected positive integers)"),
        (["--batch", "0"], "--batch: got 0 (expected positive integers)"),
        (["--batch", "-1"], "--batch: got -1 (expected positive integers)"),
        ([*OPENVINO, "--batch", "2"], "--batch: expected --format onnx or torch or aoti"),
        ([*OPENVINO, "--int8"], "--int8 and --calibrate FOLDER: expected both or neither"),
        ([*OPENVINO, "--calibrate", "x"], "--int8 and --calibrate FOLDER: expected both"),
    ],
)  # fmt: skip
def test_wrong_options(options, message, calls, capsys):
    status, _, err = run(capsys, "no-weights", "--format", "onnx", "--output", "x.onnx", *options)
    assert status == 2 and not calls
    assert err.startswith("deeplab-fast: ") and message in err and err.count("\n") == 1


def test_a_folder_without_photos(calls, capsys, folder):
    options = ["--format", "openvino", "--output", "x.xml", "--int8", "--calibrate", str(folder)]
    status, _, err = run(capsys, "no-weights", *options)
    assert status == 2 and f"--calibrate: {folder}: no image there" in err


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (CheckFailed("labels: 7 of 9 differ"), "so x.onnx was not written: labels: 7 of 9 differ"),
        (ImportError("export to ONNX needs onnx"), "export to ONNX needs onnx"),
        (ValueError("dtype: expected one that holds 300 classes"), "holds 300 classes"),
        (PermissionError(13, "Permission denied"), "--output x.onnx: Permission denied"),
    ],
)
def test_errors_are_one_line(error, message, capsys, weights, monkeypatch):
    def fail(*args: Any, **options: Any) -> None:
        raise error

    monkeypatch.setattr(export, "export_onnx", fail)
    status, out, err = run(capsys, weights, "--format", "onnx", "--output", "x.onnx")
    assert status == 2 and message in err and err.count("\n") == 1 and not out


def test_nothing_is_checked_without_onnx_runtime(capsys, weights, monkeypatch):
    monkeypatch.setattr(export, "export_onnx", lambda model, path, **options: path.touch())
    status, out, _ = run(capsys, weights, "--format", "onnx", "--output", "x.onnx")
    assert status == 0 and 'check   none, onnxruntime is not installed (pip install "deep' in out
