"""tune_dispatch_table.py times kernels against cuDNN and updates the table."""

from __future__ import annotations

import importlib
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from torch.utils._pytree import tree_leaves

from deeplab_fast.backends import dispatch_table, registry
from deeplab_fast.backends.calls import Call


@pytest.fixture
def tune(monkeypatch):
    """tune_dispatch_table, as if the CPU were a GPU with two backends."""
    monkeypatch.setattr(dispatch_table, "KERNELS", ("cuda/sm90", "cpu", "emulated"))
    monkeypatch.setattr(dispatch_table, "device_class", lambda device: "two kernels")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "A GPU")
    return importlib.import_module("tune_dispatch_table")


def test_tuning_requires_a_gpu(tune, tmp_path):
    with pytest.raises(SystemExit, match="^tune_dispatch_table: expected a GPU; the CPU has no"):
        tune.main(["--device", "cpu", "--table", str(tmp_path / "table.csv")])
    assert not list(tmp_path.iterdir())


def test_shape_option_selects_shapes_by_name(tune, capsys):
    cases = importlib.import_module("common.cases")
    assert tune.selected(None) == list(tune.SHAPES)
    names = ["VOC 513 OS8", "Cityscapes OS16"]
    assert tune.selected(names) == [cases.VOC_OS8, cases.CITYSCAPES_OS16]
    for name, message in (("VOC 513 OS8", "expected a GPU"), ("VOC", "2")):
        with pytest.raises(SystemExit, match=message):
            tune.main(["--device", "cpu", "--shape", name])
    assert "invalid choice: 'VOC'" in capsys.readouterr().err


def test_tuning_measures_the_selected_shapes(tune, monkeypatch, tmp_path):
    cases, seen = importlib.import_module("common.cases"), []
    gpu = SimpleNamespace(
        device=torch.device("cuda"), dtype=["bf16"], batch=[8], shape=["VOC 513 OS8"],
        tiny=False, full=False, table=tmp_path / "table.csv",
    )  # fmt: skip
    monkeypatch.setattr(tune.harness, "arguments", lambda *args, **options: gpu)
    monkeypatch.setattr(tune.harness, "Report", lambda *args: mock.MagicMock())
    monkeypatch.setattr(tune, "calls", lambda shape, *args: seen.append(shape) or [])
    tune.main([])
    assert seen == [cases.VOC_OS8]


def test_tuning_times_the_calls_of_deeplab(tune, report, tmp_path):
    cases = importlib.import_module("common.cases")
    calls = tune.calls(cases.TINY, 2, "fp32", ["mobilenet_v2"])
    assert {call.op for call in calls} == set(registry.shape_buckets)
    assert len({(call.op, call.shape) for call in calls}) == len(calls)
    for tensor in tree_leaves([call.arguments for call in calls]):
        if isinstance(tensor, torch.Tensor):
            assert tensor.is_meta
            assert tensor.dim() != 4 or tensor.is_contiguous(memory_format=torch.channels_last)
    first = {call.op: call for call in reversed(calls)}
    # These cover tuples with empty tensors, an in-place output, lists, and calls of two kernels.
    some = ["dilated_conv2d_backward", "fused_conv2d_add_", "parallel_dilated_conv2d"]
    depthwise = next(
        call for call in calls if call.op == "fused_conv2d" and "groups 384" in call.shape_bucket
    )
    table = tmp_path / "table.csv"
    for call in (depthwise, *(first[op] for op in some)):
        rows = tune.measure(report, call, 2, "fp32")
        dispatch_table.write(
            table, [*(dispatch_table.read(table) if table.exists() else []), *rows]
        )
    rows = dispatch_table.read(table)
    assert [(row.op, row.kernel) for row in rows] == [
        ("dilated_conv2d_backward", "cpu"),
        ("fused_conv2d", "cpu"),
        ("fused_conv2d", "emulated"),
        ("fused_conv2d_add_", "cpu"),
        ("parallel_dilated_conv2d", "cpu"),
    ]
    bucket = "fp32 channels_last 384->384 3x3 groups 384 inside 5/8 pixels 2^5"
    assert rows[2].shape_bucket == bucket
    for row in rows:
        assert row.device == "two kernels" and row.gpu == "A GPU"
        assert row.commit == report.header["commit"]
        assert row.shape_bucket.startswith("fp32 channels_last ")
        mine = [r for r in report.rows if r["case"] == f"{row.op} {row.shape}"]
        by_variant = {r["variant"]: r["median_ms"] for r in mine}
        assert row.median_ms == pytest.approx(by_variant[row.kernel], rel=1e-5)
        fastest = min(by_variant["cuDNN"], by_variant["cuDNN, benchmark"])
        assert row.cudnn_ms == pytest.approx(fastest, rel=1e-5)


def test_table_is_written_after_each_call(tune, monkeypatch, tmp_path):
    """Rows of the same kernel and call are replaced, all others are kept."""
    table = tmp_path / "new folder" / "table.csv"
    old = dispatch_table.Row(
        "gpu", "aspp", "a class", "cuda/sm90", 1.0, 2.0, "1x2", "A GPU", "1", "c", "d"
    )
    measured = iter([
        [old, old._replace(device="another")],
        [old._replace(median_ms=3.0), old._replace(kernel="emulated")],
        [],
    ])  # fmt: skip
    seen = []

    def measure(report, *item):
        seen.append(len(dispatch_table.read(table)) if table.exists() else None)
        return next(measured)

    gpu = SimpleNamespace(
        device=torch.device("cuda"), dtype=["bf16"], batch=[8], shape=["VOC 513 OS8"],
        tiny=False, full=False, table=table,
    )  # fmt: skip
    monkeypatch.setattr(tune.harness, "arguments", lambda *args, **options: gpu)
    monkeypatch.setattr(tune.harness, "Report", lambda *args: mock.MagicMock())
    monkeypatch.setattr(tune, "calls", lambda *args: [Call("aspp", ())] * 3)
    monkeypatch.setattr(tune, "measure", measure)
    tune.main([])
    assert seen == [None, 2, 3]
    assert [(row.device, row.kernel, row.median_ms) for row in dispatch_table.read(table)] == [
        ("another", "cuda/sm90", 1.0), ("gpu", "cuda/sm90", 3.0), ("gpu", "emulated", 1.0)
    ]  # fmt: skip
