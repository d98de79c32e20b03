"""Device-side tensors that a kernel reads at every launch, cached by launch shape."""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import ParamSpec, TypeGuard, TypeVar

import torch

_P = ParamSpec("_P")
_T = TypeVar("_T")

# Entries that a function keeps at least. The work list of a large batch takes about 1 MB.
MAX_ENTRIES = 1024

_owner = threading.local()  # `entries` is the list of kept_by_capture


@contextlib.contextmanager
def kept_by_capture() -> Iterator[list[object]]:
    """Make the caller the owner of what this thread's captures inside the block look up.

    The caller has to keep the list as long as the graph, and the graph until the device has run it.
    Without an owner, these entries are never dropped.
    """
    _owner.entries = []
    try:
        yield _owner.entries
    finally:
        del _owner.entries


def cached_on_device(make: Callable[_P, _T]) -> Callable[_P, _T]:
    """Decorator like ``functools.lru_cache``, for functions that put tensors on a device.

    An entry that was looked up while a CUDA graph was being captured is never dropped, because the
    graph holds its addresses, unless :func:`kept_by_capture` gave it an owner. When the cache is
    full, the least recently used of the other entries are dropped, after the device has finished
    all work that may read them.

    The entries are made in a separate thread. While ``torch.compile(mode="reduce-overhead")`` warms
    up, allocations of the calling thread come from the memory pool of a graph, which overwrites
    everything that is not an output of the graph (``_use_cuda_memory_pool_manager`` of
    torch/_inductor/cudagraph_trees.py).

    Raises:
        RuntimeError: the first call with these arguments, while a CUDA graph is being captured.
    """
    # There are two generations. A look-up moves an entry to `recent`; only `older` is dropped.
    recent: dict[tuple[object, ...], _T] = {}
    older: dict[tuple[object, ...], _T] = {}
    captured: dict[tuple[object, ...], _T] = {}
    gpus: set[torch.device] = set()
    lock = threading.Lock()

    @functools.wraps(make)
    def look_up(*args: _P.args, **kwargs: _P.kwargs) -> _T:
        nonlocal recent, older
        key = (*args, *kwargs.items())
        capturing = torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()
        generation = recent
        if key in generation and not capturing:
            return generation[key]
        with lock:
            for generation in (recent, older, captured):
                if key in generation:
                    found = generation[key]
                    break
            else:
                if capturing:
                    raise RuntimeError(
                        "deeplab_fast: a kernel's work list for these shapes is made at its first "
                        "call, which cannot be captured in a CUDA graph: call it once before "
                        "capturing"
                    )
                gpus.update(filter(_is_gpu, (*args, *kwargs.values())))
                with ThreadPoolExecutor(1) as thread:
                    found = thread.submit(make, *args, **kwargs).result()
            if capturing and hasattr(_owner, "entries"):
                _owner.entries.append(found)
            elif capturing:
                captured[key] = found
            elif len(recent) >= MAX_ENTRIES:
                for gpu in gpus:
                    torch.cuda.synchronize(gpu)
                recent, older = {}, recent
            recent[key] = found
        return found

    return look_up


def _is_gpu(argument: object) -> TypeGuard[torch.device]:
    return isinstance(argument, torch.device) and argument.type == "cuda"
