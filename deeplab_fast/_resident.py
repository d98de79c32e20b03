"""What kernels read at every launch of a shape, made once: work lists."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import ParamSpec, TypeVar

import torch

_P = ParamSpec("_P")
_T = TypeVar("_T")


def resident(make: Callable[_P, _T]) -> Callable[_P, _T]:
    """Decorator like ``functools.cache``, for functions that put tensors on a device.

    The tensors stay, because captured CUDA graphs hold their addresses, and are made in a thread of
    their own: where ``torch.compile(mode="reduce-overhead")`` warms up, the caller's allocations
    come from the memory pool of a graph, which overwrites what is not an output of it. Such a pool
    is one thread's (``_use_cuda_memory_pool_manager`` of torch/_inductor/cudagraph_trees.py).

    Raises:
        RuntimeError: the first call with these arguments, while a CUDA graph is being captured.
    """
    made: dict[object, _T] = {}
    lock = threading.Lock()

    @functools.wraps(make)
    def look_up(*args: _P.args, **kwargs: _P.kwargs) -> _T:
        key = (args, *kwargs.items())
        if key not in made:
            with lock:
                if key not in made:
                    if torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():
                        raise RuntimeError(
                            "deeplab_fast: a kernel's work list for these shapes is made at its "
                            "first call, which cannot be captured in a CUDA graph: call it once "
                            "before capturing"
                        )
                    with ThreadPoolExecutor(1) as thread:
                        made[key] = thread.submit(make, *args, **kwargs).result()
        return made[key]

    return look_up
