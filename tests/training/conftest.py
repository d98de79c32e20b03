"""Fixtures shared by the tests of training: a tiny data set, and no TensorBoard."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from ..support.shapes import write_shapes


@pytest.fixture(scope="session")
def shapes(tmp_path_factory) -> Path:
    """A data set of the layout "folder" with 6 training and 2 validation images."""
    return write_shapes(tmp_path_factory.mktemp("data") / "shapes")


@pytest.fixture(autouse=True)
def no_tensorboard(request, monkeypatch) -> None:
    """Hide TensorBoard, whose import takes seconds, from tests that do not ask for it."""
    if "tensorboard" not in request.fixturenames:
        monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)


@pytest.fixture
def tensorboard():
    return pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
