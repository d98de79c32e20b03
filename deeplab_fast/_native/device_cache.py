"""Values that kernels read at every launch, such as work lists on the device, cached by shape."""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Hashable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Generic, ParamSpec, TypeVar

import torch

_P = ParamSpec("_P")
_T = TypeVar("_T")

# A cache keeps at least this number of the last entries that were used, and at most twice as many.
# The work list of a large batch takes about 1 MB.
MAX_ENTRIES = 1024

_owner = threading.local()  # `entries` is the list of kept_by_capture


@contextlib.contextmanager
def kept_by_capture() -> Iterator[list[object]]:
    """Collect the entries of caches that this thread's captures inside the block find.

    The caller owns the list. It has to keep the list as long as the graph, which contains addresses
    of the entries, and the graph until the device has run it. Entries without an owner are never
    dropped.
    """
    _owner.entries = []
    try:
        yield _owner.entries
    finally:
        del _owner.entries


class DeviceCache(Generic[_T]):
    """Cache whose entries own tensors that running kernels and CUDA graphs may read.

    An entry that was found while a CUDA graph was being captured is never dropped, because the
    graph holds its addresses, unless :func:`kept_by_capture` gave it an owner. When the cache is
    full, the least recently used of the other entries are dropped, after the device has finished
    all work that may read them.
    """

    def __init__(self) -> None:
        # There are two generations. find() moves an entry to `_recent`; only `_older` is dropped.
        self._recent: dict[Hashable, _T] = {}
        self._older: dict[Hashable, _T] = {}
        self._captured: dict[Hashable, _T] = {}
        self._cleared: list[_T] = []  # cleared entries that a graph may hold
        self._gpus: set[torch.device] = set()
        self._lock = threading.RLock()

    def find(self, key: Hashable) -> _T | None:
        """The entry of ``key``, or None."""
        capturing = is_capturing()
        if not capturing:
            recent = self._recent.get(key)
            if recent is not None:
                return recent
        with self._lock:
            for generation in (self._recent, self._older, self._captured):
                if key in generation:
                    return self._keep(key, generation[key], capturing)
        return None

    def add(self, key: Hashable, value: _T, *devices: torch.device) -> None:
        """Keep ``value``, which may own tensors on these devices."""
        with self._lock:
            self._gpus.update(device for device in devices if device.type == "cuda")
            self._keep(key, value, capturing=False)

    def clear(self) -> None:
        """Forget all entries. Those that a CUDA graph may hold stay in memory."""
        with self._lock:
            self._wait()
            self._cleared += self._captured.values()
            self._recent, self._older, self._captured = {}, {}, {}

    def _keep(self, key: Hashable, value: _T, capturing: bool) -> _T:
        if capturing and hasattr(_owner, "entries"):
            _owner.entries.append(value)
        elif capturing:
            self._captured[key] = value
        elif key not in self._recent and len(self._recent) >= MAX_ENTRIES:
            self._wait()
            self._recent, self._older = {}, self._recent
        self._recent[key] = value
        return value

    def _wait(self) -> None:
        if torch.cuda.is_initialized():
            for gpu in self._gpus:
                torch.cuda.synchronize(gpu)


def is_capturing() -> bool:
    """True while a CUDA graph is being captured on the current stream."""
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


def cached_on_device(make: Callable[_P, _T]) -> Callable[_P, _T]:
    """Decorator like ``functools.lru_cache``, for functions that put tensors on a device.

    The entries, of a :class:`DeviceCache`, are made in a separate thread. While
    ``torch.compile(mode="reduce-overhead")`` warms up, allocations of the calling thread come from
    the memory pool of a graph, which overwrites everything that is not an output of the graph
    (``_use_cuda_memory_pool_manager`` of torch/_inductor/cudagraph_trees.py).

    Raises:
        RuntimeError: the first call with these arguments, while a CUDA graph is being captured.
    """
    cache: DeviceCache[_T] = DeviceCache()
    lock = threading.Lock()

    @functools.wraps(make)
    def look_up(*args: _P.args, **kwargs: _P.kwargs) -> _T:
        key = (*args, *kwargs.items())
        found = cache.find(key)
        if found is not None:
            return found
        if is_capturing():
            raise RuntimeError(
                "deeplab_fast: a kernel's work list for these shapes is made at its first call, "
                "which cannot be captured in a CUDA graph: call it once before capturing"
            )
        with lock:  # so that two threads do not make the same entry
            found = cache.find(key)
            if found is None:
                with ThreadPoolExecutor(1) as thread:
                    found = thread.submit(make, *args, **kwargs).result()
                devices = (d for d in (*args, *kwargs.values()) if isinstance(d, torch.device))
                cache.add(key, found, *devices)
        return found

    return look_up
