"""Fixtures shared by all tests: every backend that can run here, and poisoned memory."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import deeplab_fast
from deeplab_fast import backends

SHARED_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


def device_of(backend: str) -> str:
    """Where tests of a backend keep their tensors."""
    return "cuda" if backend in ("cuda", "triton") and torch.cuda.is_available() else "cpu"


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test with a ``backend`` argument runs on every implementation of its module's ``OP``."""
    if "backend" in metafunc.fixturenames:
        names = [
            name
            for name in backends.implementations(metafunc.module.OP)
            if backends.unavailable(name, device_of(name)) is None
        ]
        metafunc.parametrize("backend", names)


@pytest.fixture
def device(backend: str) -> str:
    return device_of(backend)


@pytest.fixture(autouse=True)
def poisoned_memory():
    """Uninitialised tensors hold NaN (or the largest integer), so an unwritten output shows."""
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def full_fp32(monkeypatch):
    """fp32 is fp32: torch allows convolutions to round it to tf32 unless told otherwise."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


@pytest.fixture
def tf32(monkeypatch, full_fp32):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)


@pytest.fixture
def shared_data() -> Path:
    """The folder of real weights and images that is not part of the project."""
    if not SHARED_DATA.is_dir():
        pytest.skip(
            f"no real weights here: {SHARED_DATA.name} folder beside the checkout is absent"
        )
    return SHARED_DATA


@pytest.fixture
def ran():
    """The (op, backend) pairs that ran during the test."""
    with deeplab_fast.backends.trace() as pairs:
        yield pairs
