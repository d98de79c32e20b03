"""Cache of device tensors: entries are computed once, outside of the memory of CUDA graphs."""

from __future__ import annotations

import gc
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from deeplab_fast._native import device_cache
from deeplab_fast._native.device_cache import cached_on_device


def test_computed_once_for_all_threads():
    calls = []

    @cached_on_device
    def make(size: int, *, device: str) -> tuple[int, str]:
        calls.append((size, device))
        time.sleep(0.05)
        return size, device

    with ThreadPoolExecutor(4) as threads:
        results = list(threads.map(lambda size: make(size, device="cpu"), [1, 1, 2, 1, 2, 1]))
    assert results == [(size, "cpu") for size in (1, 1, 2, 1, 2, 1)]
    assert sorted(calls) == [(1, "cpu"), (2, "cpu")]


def test_computed_outside_of_graph_memory_pools():
    makers = []

    @cached_on_device
    def make() -> None:
        makers.append(threading.get_ident())

    make()
    assert makers and makers[0] != threading.get_ident()


def test_modes_of_the_caller_do_not_apply():
    with torch.device("meta"):
        assert cached_on_device(lambda: torch.empty(1))().device.type == "cpu"


def test_errors_are_raised_and_not_cached():
    fail = True

    @cached_on_device
    def make() -> int:
        if fail:
            raise MemoryError("no room")
        return 1

    with pytest.raises(MemoryError, match="no room"):
        make()
    fail = False
    assert make() == 1


def test_first_call_during_capture_raises(monkeypatch):
    capturing = True
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    make = cached_on_device(lambda size: size)
    with pytest.raises(RuntimeError, match="call it once before capturing"):
        make(3)
    capturing = False
    assert make(3) == 3
    capturing = True
    assert make(3) == 3
    with pytest.raises(RuntimeError, match="call it once before capturing"):
        make(4)


@pytest.fixture
def small_cache(monkeypatch):
    """A cache of two generations of three entries. Returns a log of computations and waits."""
    log = []
    monkeypatch.setattr(device_cache, "MAX_ENTRIES", 3)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "synchronize", log.append)
    return log


@pytest.mark.parametrize("by_name", [False, True])
def test_old_entries_are_dropped_after_the_device_has_read_them(small_cache, by_name):
    @cached_on_device
    def make(size: int, device: torch.device) -> int:
        small_cache.append(size)
        return size

    gpu = torch.device("cuda", 1)
    for size in (1, 2, 3, 4, 1, 5, 6, 7, 1, 4, 2):
        assert (make(size, device=gpu) if by_name else make(size, gpu)) == size
    assert small_cache == [1, 2, 3, 4, gpu, 5, 6, gpu, 7, gpu, 2]


def test_entries_read_by_a_graph_stay(small_cache, monkeypatch):
    capturing = False
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)

    @cached_on_device
    def make(size: int) -> list[int]:
        return [size]

    first, second = make(1), make(2)
    capturing = True
    assert make(1) is first
    capturing = False
    for size in range(3, 20):
        make(size)
    assert make(1) is first and make(2) is not second


def test_cleared_entries_are_not_found_but_stay_if_a_graph_reads_them(monkeypatch):
    class Entry:
        pass

    capturing = False
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    cache: device_cache.DeviceCache[Entry] = device_cache.DeviceCache()
    for key in ("read by a graph", "not read"):
        cache.add(key, Entry())
    capturing = True
    entries = {key: weakref.ref(cache.find(key)) for key in ("read by a graph",)}
    capturing = False
    entries["not read"] = weakref.ref(cache.find("not read"))
    cache.clear()
    assert cache.find("read by a graph") is cache.find("not read") is None
    gc.collect()
    assert entries["read by a graph"]() is not None and entries["not read"]() is None
