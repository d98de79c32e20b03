"""``deeplab-fast accelerate-report``: the tables, and its errors."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from deeplab_fast.cli import main

MODELS = """
import functools
import torch
from torch import nn


def block(channels, out_channels):
    convolution = nn.Conv2d(channels, out_channels, 3, padding=2, dilation=2)
    return nn.Sequential(convolution, nn.BatchNorm2d(out_channels), nn.ReLU())


def build(channels=3):
    return nn.Sequential(block(channels, 8), block(8, 4))


def from_configuration(path, *, width): ...


def five_channels():
    return build(5)


def decides():
    class Decides(nn.Module):
        def forward(self, x):
            return x if x.sum() > 0 else -x

    return nn.Sequential(build(), Decides())


def broken():
    raise FileNotFoundError(2, "No such file or directory", "weights\\n.pth")


def exits():
    raise SystemExit("usage: models.py CONFIG")


def state_dict():
    return build().state_dict()


model = build()
half_done = functools.partial(build, channels=4)
number = 3
"""


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "report_models.py").write_text(MODELS)
    yield tmp_path
    for name in [name for name in sys.modules if name.startswith("report_")]:
        del sys.modules[name]


def report(capsys, *arguments: str) -> str:
    before = sys.path.copy()
    assert main(["accelerate-report", *arguments]) == 0
    assert sys.path == before
    out, err = capsys.readouterr()
    assert err == ""
    return out


def error(capsys, *arguments: str) -> str:
    """The line that the command prints when it fails."""
    assert main(["accelerate-report", *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    (line,) = err.splitlines()
    return line.removeprefix("deeplab-fast: ")


def test_training_form_is_the_default(capsys):
    out = report(capsys, "report_models:build")
    assert "one image of 3x512x512" in out
    assert "fused" not in out


def test_inference_form(capsys):
    out = report(capsys, "report_models:build", "--inference", "--size", "64", "48")
    assert out.startswith("part ")
    assert "one image of 3x64x48" in out
    assert "batch norm" in out


@pytest.mark.parametrize(
    "name, channels",
    [("model", 3), ("five_channels", 5), ("half_done", 4)],
)
def test_what_is_called(capsys, name, channels):
    assert f"one image of {channels}x512x512" in report(capsys, f"report_models:{name}")


def test_file(capsys, folder):
    (folder / "inner").mkdir()
    (folder / "inner" / "report_parts.py").write_text("from report_models import block\n")
    (folder / "inner" / "report_file.py").write_text(
        "from report_parts import block\ndef build(): return block(3, 6)\n"
    )
    path = folder / "inner" / "report_file.py"
    assert "one image of 3x512x512" in report(capsys, f"{path}:build")
    assert "one image of 3x512x512" in report(capsys, "inner/report_file.py:build")


def test_channels(capsys):
    message = "not counted: the model fails on meta tensors for an image of 4x8x8: RuntimeError: "
    options = "--channels", "4", "--size", "8", "8"
    assert message in report(capsys, "report_models:build", *options)


def test_what_cannot_be_counted_is_no_error(capsys):
    out = report(capsys, "report_models:decides", "--inference")
    assert out.splitlines()[0].split() == ["part", "kind", "what", "runs"]
    assert "fails on meta tensors for an image of 3x512x512: RuntimeError" in out


def test_package(capsys):
    pytest.importorskip("torchvision", reason="a package that is installed")
    out = report(capsys, "torchvision.models:squeezenet1_1", "--size", "33", "33")
    assert "one image of 3x33x33" in out


@pytest.mark.parametrize(
    "argument, message",
    [
        ("report_models", "report_models: expected MODULE:FUNCTION, such as my_models:build"),
        (":build", ":build: expected MODULE:FUNCTION, such as my_models:build"),
        (
            "report_missing:build",
            "report_missing: no such module (expected one that Python can import from {folder}, "
            "or a .py file)",
        ),
        (
            "report_models.inner:build",
            "report_models.inner: no such module (expected one that Python can import from "
            "{folder}, or a .py file)",
        ),
        (
            "missing.py:build",
            "missing.py: no such file (expected a .py file or the name of a module)",
        ),
        (
            "report_models:biuld",
            "report_models:biuld: no such function (expected one such as build)",
        ),
        (
            "report_models:network",
            "report_models:network: no such function (expected one such as block, build, "
            "from_configuration)",
        ),
        (
            "report_models:from_configuration",
            "report_models:from_configuration: needs arguments: path, width (expected a function "
            "without arguments)",
        ),
        (
            "report_models:state_dict",
            "report_models:state_dict: returned OrderedDict (expected an nn.Module)",
        ),
        (
            "report_models:number",
            "report_models:number: expected a function or an nn.Module, got int",
        ),
        (
            "report_models:broken",
            "report_models:broken: FileNotFoundError: No such file or directory",
        ),
        ("report_models:exits", "report_models:exits: SystemExit: usage: models.py CONFIG"),
    ],
)
def test_errors(capsys, folder, argument, message):
    assert error(capsys, argument) == message.format(folder=folder)


def test_errors_of_the_module(capsys, folder):
    (folder / "report_syntax.py").write_text("def build(:\n")
    assert error(capsys, "report_syntax:build").startswith("report_syntax: SyntaxError: invalid")
    assert error(capsys, "report_syntax.py:build").startswith("report_syntax.py: SyntaxError: ")
    (folder / "report_import.py").write_text("import report_of_another_project\n")
    message = "ModuleNotFoundError: No module named 'report_of_another_project'"
    assert error(capsys, "report_import:build") == f"report_import: {message}"


@pytest.mark.parametrize(
    "options, message",
    [
        (("--size", "0", "5"), "--size: got 0 5 (expected positive integers)"),
        (("--channels", "-1"), "--channels: got -1 (expected positive integers)"),
    ],
)
def test_wrong_options(capsys, options, message):
    assert error(capsys, "report_models:build", *options) == message


def test_as_a_process(folder):
    command = [sys.executable, "-m", "deeplab_fast", "accelerate-report"]
    command += ["report_models:build", "--size", "32", "32"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "one image of 3x32x32" in done.stdout
