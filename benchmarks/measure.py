"""Time, memory and the machine's roofs: the numbers under :mod:`harness`."""

from __future__ import annotations

import ctypes
import math
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import CellType, FunctionType
from typing import Any, NamedTuple

import torch
from torch import Tensor

Run = Callable[[], Any]

MIN_ROUNDS, MAX_ROUNDS = 5, 100

# Two events around a replay add some microseconds: so much shorter calls are timed together.
SHORT_CALL, CALLS_TOGETHER = 50e-6, 20


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


class Replay(NamedTuple):
    """A call captured into a CUDA graph; and what is timed in its place, a graph of ``calls``."""

    graph: torch.cuda.CUDAGraph
    output: Any
    timed: torch.cuda.CUDAGraph
    calls: int
    inputs: list[Run]  # hold the copies that ``timed`` reads

    def __call__(self) -> Any:
        self.graph.replay()
        return self.output


class _GpuTimer:
    """CUDA events around one call, or several short ones, with the L2 cache flushed before it.

    The flush also keeps the GPU busy while the CPU enqueues what follows, so that no launch latency
    is measured.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        l2 = torch.cuda.get_device_properties(device).L2_cache_size
        self._flush = torch.empty(max(4 * l2, 256 << 20), dtype=torch.int8, device=device)
        self._samples: dict[str, list[float]] = {}

    def sample(self, name: str, run: Run) -> None:
        timed, calls = (run.timed.replay, run.calls) if isinstance(run, Replay) else (run, 1)
        with torch.cuda.device(self._device):
            self._flush.zero_()
            seconds = _between_events(timed)
        self._samples.setdefault(name, []).append(seconds / calls)

    def samples(self) -> dict[str, list[float]]:
        return self._samples


def _between_events(run: Run) -> float:
    """The seconds that the current GPU takes for ``run``."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) * 1e-3


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
            graph, output = _captured(run)
            timed, runs = graph, [run]
            graph.replay()  # the first one uploads the graph
            if _between_events(graph.replay) < SHORT_CALL:
                runs = [over_copies(run) for _ in range(CALLS_TOGETHER)]
                timed, _ = _captured(lambda: [run() for run in runs][-1])
        for tensor in leaves(output):
            tensor.zero_()  # only a replay fills it again
        return Replay(graph, output, timed, len(runs), runs), memory

    with ThreadPoolExecutor(1) as thread:
        return thread.submit(capture).result()


def _captured(run: Run) -> tuple[torch.cuda.CUDAGraph, Any]:
    """A CUDA graph of ``run``, and the output that its replay fills."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        run()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        output = run()
    return graph, output


def over_copies(run: Run) -> Run:
    """``run`` on copies of the tensors that it closes over, which no other call has in the caches.

    Those in lists, tuples and functions that it calls are copied too; modules, and so their
    weights, and functions compiled by torch.compile are not.
    """
    copies: dict[int, Any] = {}

    def copied(value: Any) -> Any:
        if id(value) not in copies:
            copies[id(value)] = _copy(value, copied)
        return copies[id(value)]

    return copied(run)


def _copy(value: Any, copied: Callable[[Any], Any]) -> Any:
    if isinstance(value, Tensor):
        return value.detach().clone().requires_grad_(value.requires_grad)
    if type(value) in (list, tuple):
        return type(value)(copied(item) for item in value)
    is_compiled = hasattr(value, "_torchdynamo_orig_callable")
    if not isinstance(value, FunctionType) or not value.__closure__ or is_compiled:
        return value
    cells = tuple(CellType(copied(cell.cell_contents)) for cell in value.__closure__)
    function = FunctionType(
        value.__code__, value.__globals__, value.__name__, value.__defaults__, cells
    )
    function.__kwdefaults__ = value.__kwdefaults__
    return function


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
