"""What kernels read at every launch of a shape, made once: work lists."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import ParamSpec, TypeGuard, TypeVar

import torch

_P = ParamSpec("_P")
_T = TypeVar("_T")

KEPT = 1024  # of one function, at least; a work list of a large batch has about a MB


def resident(make: Callable[_P, _T]) -> Callable[_P, _T]:
    """Decorator like ``functools.lru_cache``, for functions that put tensors on a device.

    What was looked up while a CUDA graph was being captured stays for ever, because the graph holds
    its addresses. The others are dropped, when many shapes have come after them, once the device
    has done all that reads them.

    They are made in a thread of their own: where ``torch.compile(mode="reduce-overhead")`` warms
    up, the caller's allocations come from the memory pool of a graph, which overwrites what is not
    an output of it. Such a pool is one thread's (``_use_cuda_memory_pool_manager`` of
    torch/_inductor/cudagraph_trees.py).

    Raises:
        RuntimeError: the first call with these arguments, while a CUDA graph is being captured.
    """
    # Two generations: what is looked up is in the recent one, and only the older one is dropped.
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
            if capturing:
                captured[key] = found
            elif len(recent) >= KEPT:
                for gpu in gpus:
                    torch.cuda.synchronize(gpu)
                recent, older = {}, recent
            recent[key] = found
        return found

    return look_up


def _is_gpu(argument: object) -> TypeGuard[torch.device]:
    return isinstance(argument, torch.device) and argument.type == "cuda"
