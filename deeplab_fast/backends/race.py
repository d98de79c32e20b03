"""Race: the kernels that support a call take turns at it, and their times are remembered.

Races happen where ``torch.backends.cudnn.benchmark`` is True, PyTorch's own switch for "try the
algorithms and keep the fastest". This process remembers the times of exactly these shapes.
"""

from __future__ import annotations

import contextlib
import logging
import statistics
import threading
import time
from collections.abc import Callable, Hashable, Iterator, Mapping
from functools import partial
from typing import Any

import torch

from .._native import _C
from .._native.precision import tf32_is_allowed
from .arguments import shapes

BUDGET_MS = 10.0  # for all samples of a race; the calls before the first sample are not counted
MAX_REMEMBERED = 10_000  # races, as many as cuDNN remembers in PyTorch's benchmark mode
MIN_SAMPLES = 2
FAR_SLOWER = 2  # a call whose first sample takes so many times the shortest one gets no more
# Clock cycles that the GPU waits before each sample, about 0.2 ms. Meanwhile the CPU enqueues the
# call, so that its time on the GPU is measured without launch latency.
HEAD_START = 400_000

_logger = logging.getLogger("deeplab_fast")
_remembered: dict[Hashable, dict[str, float]] = {}
_lock = threading.RLock()


def remembered(op: str, arguments: Any) -> dict[str, float] | None:
    """Times in ms of the kernels that raced at calls like this one; None if there was no race."""
    return _remembered.get(_key(op, arguments))


def _key(op: str, arguments: Any) -> Hashable:
    device = arguments[0].device
    return op, tf32_is_allowed(), device, _C.call_signature(tuple(arguments), device)


def run(
    op: str,
    arguments: Any,
    kernels: Mapping[str, Callable[[Any], object]],
    clock: Callable[[], float] = time.perf_counter,
) -> None:
    """Time these kernels at a call, and remember the times.

    The results are thrown away; an op that works in place works on a copy. Kernels that raise an
    exception are left out. If there is no memory for the copy, there are no times.
    """
    key = _key(op, arguments)
    with _lock:
        if key in _remembered:  # another thread was first
            return
        times: dict[str, float] = {}
        try:
            scratch = _scratch(op, arguments)
            calls = {name: partial(kernel, scratch) for name, kernel in kernels.items()}
            times = milliseconds(calls, arguments[0].device, BUDGET_MS, clock)
        except torch.OutOfMemoryError as error:
            _logger.debug("no race: %s", error)
        if len(_remembered) >= MAX_REMEMBERED:
            del _remembered[next(iter(_remembered))]
        _remembered[key] = times
    ranking = sorted(times, key=times.__getitem__)
    results = ", ".join(f"{name} {times[name]:.4g} ms" for name in ranking)
    _logger.debug("race of %s %s: %s", op, shapes(arguments), results or "none finished")


def _scratch(op: str, arguments: Any) -> Any:
    """The arguments, with a copy of the first one if the op writes to it."""
    if not op.endswith("_"):
        return arguments
    return arguments._replace(**{arguments._fields[0]: arguments[0].clone()})


def milliseconds(
    calls: Mapping[str, Callable[[], object]],
    device: torch.device,
    budget_ms: float,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, float]:
    """Median time of each call, in ms.

    Each call is made once without being timed. After that the calls take turns, one sample each,
    until the budget is used. A call that is far slower than the fastest one in its first sample
    gets no more samples, and one that raises an exception is left out of the result.

    Args:
        calls: functions to time, by name.
        device: device that they run on, a GPU on its current stream.
        budget_ms: time for all samples together, in ms. Each call gets MIN_SAMPLES at least.
        clock: returns the time in s. It measures the budget, and on a CPU the samples.

    >>> milliseconds({"matmul": lambda: a @ b, "einsum": lambda: einsum("ij,jk", a, b)}, cpu, 50)
    {'matmul': 0.8, 'einsum': 0.9}
    """
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for name, call in calls.items():
        with _leaving_out(samples, name):
            call()
    start = clock()
    racing, num_rounds = list(samples), 0
    while racing and (num_rounds < MIN_SAMPLES or 1e3 * (clock() - start) < budget_ms):
        for name in racing:
            with _leaving_out(samples, name):
                samples[name].append(_sample(calls[name], device, clock))
        num_rounds += 1
        limit = FAR_SLOWER * min((times[0] for times in samples.values()), default=0)
        racing = [name for name, times in samples.items() if times[0] <= limit]
    return {name: statistics.median(times) for name, times in samples.items()}


@contextlib.contextmanager
def _leaving_out(samples: dict[str, list[float]], name: str) -> Iterator[None]:
    """Remove a call from the race if the block, which makes it, raises an exception."""
    try:
        yield
    except Exception as error:
        _logger.debug("%s is out of the race: %r", name, error)
        del samples[name]


def _sample(call: Callable[[], object], device: torch.device, clock: Callable[[], float]) -> float:
    """Time of one call in ms."""
    if device.type != "cuda":
        start = clock()
        call()
        return 1e3 * (clock() - start)
    with torch.cuda.device(device):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(HEAD_START)
        begin.record()
        call()
        end.record()
        end.synchronize()
    elapsed: float = begin.elapsed_time(end)
    return elapsed
