"""The one rule: which implementation runs, and what happens when a forced one cannot."""

from __future__ import annotations

import subprocess
import sys
import warnings
from types import SimpleNamespace

import pytest
import torch

import deeplab_fast
from deeplab_fast import _C, backends, cuda, dilated_conv2d

X, W = torch.randn(1, 2, 5, 5), torch.randn(2, 2, 3, 3)


def test_available_on_the_cpu():
    available = deeplab_fast.available_backends("cpu")
    assert "cpu" in available and "reference" in available
    assert "cuda" not in available


def test_unknown_name():
    with pytest.raises(
        ValueError, match="unknown backend 'cudnn': expected one of cuda, cuda/sm80, triton"
    ):
        deeplab_fast.backend("cudnn")


def test_forcing_nests_and_ends(ran):
    with deeplab_fast.backend("reference"):
        with deeplab_fast.backend("cpu"):
            dilated_conv2d(X, W)
        dilated_conv2d(X, W)
        with pytest.raises(KeyError), deeplab_fast.backend("cpu"):
            raise KeyError
        dilated_conv2d(X, W)
    dilated_conv2d(X, W)
    assert [name for _, name in ran] == ["cpu", "reference", "reference", "cpu"]
    assert backends.current() == ""


@pytest.mark.parametrize("name", ["cuda", "cuda/sm80", "triton"])
def test_forcing_a_gpu_backend_on_a_cpu_tensor_says_why(name):
    if name in deeplab_fast.available_backends("cpu"):
        pytest.skip(f"{name} runs on CPU tensors here")
    message = f"backend '{name}' cannot run dilated_conv2d on this input: .+"
    with deeplab_fast.backend(name), pytest.raises(RuntimeError, match=message):
        dilated_conv2d(X, W)


def test_a_refusal_falls_through_only_when_automatic(monkeypatch, ran):
    refusing = backends._table["dilated_conv2d"]["cpu"]._replace(refuses=lambda *args: "odd shape")
    monkeypatch.setitem(backends._table["dilated_conv2d"], "cpu", refusing)
    dilated_conv2d(X, W)
    assert ran == [("dilated_conv2d", "reference")]
    with deeplab_fast.backend("cpu"), pytest.raises(RuntimeError, match="odd shape"):
        dilated_conv2d(X, W)


@pytest.fixture
def old_driver(monkeypatch):
    """A GPU whose driver is for CUDA 12.8, and kernels built with CUDA 13.0."""
    versions = {"driver_version": 12080, "runtime_version": 13000}
    fake = SimpleNamespace(device_info=lambda: versions)
    monkeypatch.setattr(_C, "cuda", fake, raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for cached in (cuda._problem, backends._warn_once):
        cached.cache_clear()
    yield
    cuda._problem.cache_clear()
    backends._warn_once.cache_clear()


def test_a_driver_too_old_is_said_once(old_driver, monkeypatch):
    ours = {name: backends.Implementation(lambda x: "ran", backends._accepts_all)
            for name in ("cuda", "reference")}  # fmt: skip
    monkeypatch.setitem(backends._table, "an_op", ours)
    tensor = SimpleNamespace(device=torch.device("cuda"))
    with backends.trace() as ran, pytest.warns(UserWarning) as said:
        for _ in range(3):
            assert backends.run("an_op", "", tensor) == "ran"
    assert ran == [("an_op", "reference")] * 3
    (warning,) = said
    assert (
        "for 'cuda': built with CUDA 13.0, which this machine's driver (for CUDA 12.8) is"
        in str(warning.message)
    )
    with pytest.raises(RuntimeError, match="backend 'cuda' cannot run an_op.*driver"):
        backends.run("an_op", "cuda", tensor)


def test_nothing_is_said_where_no_gpu_is_used():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        dilated_conv2d(X, W)


def test_every_op_has_a_reference():
    for op in backends.ops():
        assert "reference" in backends.implementations(op)


def test_imports_without_a_gpu_or_side_effects():
    """Importing must not touch CUDA, so that a process can fork after it."""
    code = "import torch, deeplab_fast; assert not torch.cuda.is_initialized()"
    subprocess.run([sys.executable, "-I", "-c", code], check=True)
