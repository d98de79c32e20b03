"""Time and peak memory of calls."""

from __future__ import annotations

import contextlib
import functools
import gc
import importlib
import weakref
from collections import deque
from pathlib import Path

import pytest
import torch

from .conftest import ones


def test_variants_take_turns(monkeypatch):
    turns = []
    runs = {name: lambda name=name: turns.append(name) for name in "abc"}
    timing = importlib.import_module("common.timing")
    monkeypatch.setattr(timing, "seconds", lambda run: 1.0)
    samples = timing.interleaved(runs, torch.device("cpu"), budget=0)
    assert turns == list("aabbccbbccaa")  # the first call of each sample is not timed
    assert {name: len(times) for name, times in samples.items()} == dict.fromkeys("abc", 2)


def test_over_copies_copies_every_tensor_once():
    """Copies keep strides and sharing; objects without tensors are shared."""
    timing, x, y = importlib.import_module("common.timing"), torch.ones(2, 3, 4, 5), torch.ones(3)
    x = x.contiguous(memory_format=torch.channels_last)
    leaf, both, module = ones().requires_grad_(), (x, [y]), torch.nn.Linear(2, 2)
    inner = lambda: (x, leaf)  # noqa: E731
    run = lambda: (x, y, both, inner(), module, ones)  # noqa: E731
    for copies in (timing.over_copies(run)(), timing.over_copies(run)()):
        (x2, y2, (x3, (y3,)), (x4, leaf2), module2, ones2) = copies
        assert x2 is x3 is x4 and y2 is y3 and module2 is module and ones2 is ones
        for copy, tensor in ((x2, x), (y2, y), (leaf2, leaf)):
            assert copy.data_ptr() != tensor.data_ptr() and torch.equal(copy, tensor)
            assert copy.stride() == tensor.stride()
            assert copy.is_leaf and copy.requires_grad == tensor.requires_grad
    compiled = torch.compile(lambda: x)
    assert timing.over_copies(lambda: compiled)() is compiled


@pytest.mark.parametrize("script", ["bench_depthwise", "bench_upsample_cross_entropy"])
def test_calls_on_copies_give_equal_results(script, harness, tmp_path, monkeypatch):
    timing, seen = importlib.import_module("common.timing"), []

    def prepare(run, device, graphs):
        seen.append(harness.relative_error(timing.over_copies(run)(), run()))
        return run, None

    monkeypatch.setattr(harness, "prepare", prepare)
    options = ["--tiny", "--device", "cpu", "--output", str(tmp_path)]
    importlib.import_module(script).main(options)
    assert len(seen) > 3 and max(seen) < 1e-5


class Graph:
    """Stand-in for a CUDA graph, without a GPU."""

    def __init__(self, run):
        self.replay = run


@pytest.mark.parametrize("microseconds, calls", [(49, 20), (51, 1)])
def test_short_calls_are_timed_together(monkeypatch, microseconds, calls):
    timing, x, read = importlib.import_module("common.timing"), ones(), deque()
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(timing, "peak_memory", lambda run, device: 8)
    monkeypatch.setattr(timing, "captured", lambda run: (Graph(run), run()))

    def between_events(run):
        read.clear()
        run()
        return microseconds * 1e-6

    monkeypatch.setattr(timing, "_between_events", between_events)

    def double():
        read.append(x.data_ptr())
        return 2 * x

    run, memory = timing.prepare(double, torch.device("cuda"))
    assert memory == 8 and not run.output.any() and run() is run.output
    timer = timing._GpuTimer.__new__(timing._GpuTimer)
    timer._device, timer._flush, timer._samples = None, ones(), {}
    timer.sample("double", run)
    assert len(read) == run.calls == calls
    if calls > 1:
        assert len(set(read)) == calls and x.data_ptr() not in read
    assert timer.samples() == {"double": [microseconds * 1e-6 / calls]}


def test_copies_stay_alive_as_long_as_their_graph(monkeypatch):
    timing, x, read = importlib.import_module("common.timing"), ones(), deque()
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(timing, "peak_memory", lambda run, device: 8)
    monkeypatch.setattr(timing, "captured", lambda run: (Graph(int), run()))
    monkeypatch.setattr(timing, "_between_events", lambda run: 1e-6)

    def double():
        read.append(weakref.ref(x))
        return 2 * x

    run, _ = timing.prepare(double, torch.device("cuda"))
    gc.collect()
    assert len({id(tensor()) for tensor in read if tensor() is not None}) == 1 + run.calls


def test_timing_without_graphs_synchronizes_every_call(monkeypatch):
    timing, gpu, done = importlib.import_module("common.timing"), torch.device("cuda"), []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: done.append(str(device)))
    monkeypatch.setattr(timing, "peak_memory", lambda run, device: 8)
    run, memory = timing.prepare(lambda: done.append("run") or "output", gpu, graphs=False)
    assert run() == "output" and memory == 8
    assert done == ["run", "cuda", "run", "cuda"]  # a warm-up, a call
    monkeypatch.setattr(timing, "seconds", lambda run: 1.0)
    (times,) = timing.interleaved({"one": run}, gpu, budget=0, graphs=False).values()
    assert len(times) == 2 and done == ["run", "cuda"] * 6


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="not Linux")
def test_peak_memory_of_a_call():
    peak_memory = importlib.import_module("common.timing").peak_memory
    for mebibytes in (64, 16):
        use = functools.partial(lambda n: torch.ones(n << 18).add_(1), mebibytes)
        use()
        used = peak_memory(use, torch.device("cpu"))
        assert used / 2**20 == pytest.approx(mebibytes, abs=4)
