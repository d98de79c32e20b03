"""A pretend GPU: CPU tensors on which the emulated kernels compete with the reference."""

from __future__ import annotations

import pytest
import torch

from deeplab_fast.backends import dispatch_table, race, registry


@pytest.fixture
def nondeterministic():
    """Let measurements decide; all tests run in PyTorch's deterministic mode otherwise."""
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def user_table(monkeypatch, tmp_path):
    """The path of a user's table, which does not exist yet."""
    path = tmp_path / "cache" / "dispatch_table.csv"
    monkeypatch.setattr(dispatch_table, "user_path", lambda: path)
    caches = dispatch_table.fastest_kernels, dispatch_table._report_once
    for cached in caches:
        cached.cache_clear()
    yield path
    for cached in caches:
        cached.cache_clear()


@pytest.fixture
def pretend_gpu(monkeypatch, nondeterministic, user_table):
    """The CPU, as if it were a GPU with the backend ``emulated`` and an empty dispatch table."""
    monkeypatch.setattr(
        registry, "depends_on_measurements", lambda op, _: op in registry.shape_buckets
    )
    monkeypatch.setitem(registry._AUTOMATIC, "cpu", ("emulated", "reference"))
    monkeypatch.setattr(dispatch_table, "KERNELS", ("emulated",))
    monkeypatch.setattr(dispatch_table, "device_class", lambda device: "an emulator")
    monkeypatch.setattr(race, "_remembered", {})
