"""Time, memory and the machine's roofs: the numbers under :mod:`harness`."""

from __future__ import annotations

import ctypes
import math
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

Run = Callable[[], Any]

MIN_ROUNDS, MAX_ROUNDS = 5, 100


def interleaved(
    runs: Mapping[str, Run], device: torch.device, budget: float, graphs: bool = True
) -> dict[str, list[float]]:
    """Seconds per call of each variant, one sample per round, the variants taking turns.

    Turns spread whatever else the machine does over all variants alike. ``budget`` is the time to
    spend in seconds, within MIN_ROUNDS and MAX_ROUNDS rounds; 0 means two rounds. Without
    ``graphs`` the variants on a GPU are those of :func:`synchronized`, and wall time is taken.
    """
    timer = _GpuTimer(device) if device.type == "cuda" and graphs else _WallTimer(runs)
    names = list(runs)
    start = time.perf_counter()
    for round in range(MAX_ROUNDS):
        for name in names[round % len(names) :] + names[: round % len(names)]:
            timer.sample(name, runs[name])
        spent = time.perf_counter() - start
        if round + 1 >= (MIN_ROUNDS if budget else 2) and spent >= budget:
            break
    return timer.samples()


class _WallTimer:
    """Wall time of several calls in a row after one that is not timed, of 5 ms or more in all.

    The first call wakes the variant's threads and brings its memory back into the caches.
    """

    def __init__(self, runs: Mapping[str, Run]) -> None:
        self._samples: dict[str, list[float]] = {name: [] for name in runs}
        self._calls = {name: math.ceil(5e-3 / _seconds(run)) for name, run in runs.items()}

    def sample(self, name: str, run: Run) -> None:
        time.sleep(0.02)  # the idle threads of the variant before stop spinning
        run()
        start = time.perf_counter()
        for _ in range(self._calls[name]):
            run()
        self._samples[name].append((time.perf_counter() - start) / self._calls[name])

    def samples(self) -> dict[str, list[float]]:
        return self._samples


class _GpuTimer:
    """CUDA events around one call, with the L2 cache flushed before it.

    The flush also keeps the GPU busy while the CPU enqueues what follows, so that no launch latency
    is measured.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        l2 = torch.cuda.get_device_properties(device).L2_cache_size
        self._flush = torch.empty(max(4 * l2, 256 << 20), dtype=torch.int8, device=device)
        self._events: dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = {}

    def sample(self, name: str, run: Run) -> None:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        with torch.cuda.device(self._device):
            self._flush.zero_()
            start.record()
            run()
            end.record()
            end.synchronize()
        self._events.setdefault(name, []).append((start, end))

    def samples(self) -> dict[str, list[float]]:
        return {
            name: [start.elapsed_time(end) * 1e-3 for start, end in events]
            for name, events in self._events.items()
        }


def _seconds(run: Run) -> float:
    run()
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def synchronized(run: Run, device: torch.device) -> Run:
    """``run`` that returns when the GPU is done."""

    def until_done() -> Any:
        output = run()
        torch.cuda.synchronize(device)
        return output

    return until_done if device.type == "cuda" else run


def prepare(run: Run, device: torch.device, graphs: bool = True) -> tuple[Run, int | None]:
    """``run`` warmed up and ready to be timed, and the extra memory that it takes.

    On a GPU, with ``graphs``, it becomes a CUDA graph, which replays without the CPU's part. All of
    that happens in a thread of its own, because cuDNN's choice of algorithm is cached per thread:
    in a shared one the first variant's choice (cudnn.benchmark or not) would serve all later ones.
    """
    if device.type == "cpu" or not graphs:
        run = synchronized(run, device)
        run()
        return run, extra_memory(run, device)
    grad = torch.is_grad_enabled()

    def capture() -> tuple[Run, int | None]:
        with torch.cuda.device(device), torch.set_grad_enabled(grad):
            run()
            memory = extra_memory(run, device)
            stream = torch.cuda.Stream()
            with torch.cuda.stream(stream):
                run()
            stream.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=stream):
                output = run()
        for tensor in leaves(output):
            tensor.zero_()  # only a replay fills it again

        def replay() -> Any:
            graph.replay()
            return output

        return replay, memory

    with ThreadPoolExecutor(1) as thread:
        return thread.submit(capture).result()


def is_lost(device: torch.device) -> bool:
    """Whether a CUDA error has left ``device`` unusable for the rest of this process.

    After some errors, like an illegal memory access, every later CUDA call fails too.
    """
    if device.type != "cuda":
        return False
    try:
        torch.cuda.synchronize(device)
    except RuntimeError:  # torch.AcceleratorError is one
        return True
    return False


def leaves(outputs: Any) -> list[Tensor]:
    """The tensors of a tensor or a nested sequence of them."""
    if isinstance(outputs, Tensor):
        return [outputs]
    return [leaf for output in outputs for leaf in leaves(output)]


def extra_memory(run: Run, device: torch.device) -> int | None:
    """Bytes that ``run`` needs at its peak beyond what was there before, its outputs included.

    On a GPU what PyTorch's allocator hands out; on the CPU the growth of the process's resident
    memory (Linux; elsewhere None), which counts every library's allocations.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        run()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    try:
        ctypes.CDLL(None).malloc_trim(0)  # else freed heap is reused and does not show
        Path("/proc/self/clear_refs").write_text("5")  # sets the peak, VmHWM, to the present value
        before = _status("VmRSS")
    except (OSError, AttributeError):
        return None
    run()
    return max(_status("VmHWM") - before, 0)


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {field}")


def matmul_roof(device: torch.device, dtype: torch.dtype, size: int) -> float:
    """FLOP/s of the best of several size x size matrix products of normal random numbers."""
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    return 2 * size**3 / _best(lambda: a @ b, device)


def copy_roof(device: torch.device, nbytes: int) -> float:
    """Bytes per second, read and written, of the best of several copies of ``nbytes``."""
    source = torch.zeros(nbytes, dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    return 2 * nbytes / _best(lambda: target.copy_(source), device)


def _best(run: Run, device: torch.device) -> float:
    run()
    return min(interleaved({"": run}, device, budget=0.2)[""])
