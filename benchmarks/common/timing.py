"""Measure the time and the peak memory of calls, and the rates that a device reaches."""

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

from deeplab_fast.backends.tuning import captured

Run = Callable[[], Any]

MIN_ROUNDS, MAX_ROUNDS = 5, 100

# Two events around a replay add a few microseconds, so calls shorter than 50 us are timed 20 at a
# time.
SHORT_CALL, CALLS_TOGETHER = 50e-6, 20


def interleaved(
    runs: Mapping[str, Run], device: torch.device, budget: float, graphs: bool = True
) -> dict[str, list[float]]:
    """Seconds per call of each variant, one sample per round; the variants take turns.

    Taking turns spreads other load on the machine evenly over the variants. ``budget`` is the time
    to spend in seconds, within MIN_ROUNDS and MAX_ROUNDS rounds; 0 means two rounds. If ``graphs``
    is False, variants on a GPU must come from :func:`synchronized` and wall time is measured.
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
    """Wall time of as many consecutive calls as take 5 ms, after one call that is not timed.

    The first call wakes the variant's threads and brings its memory back into the caches.
    """

    def __init__(self, runs: Mapping[str, Run]) -> None:
        self._samples: dict[str, list[float]] = {name: [] for name in runs}
        self._calls = {name: math.ceil(5e-3 / seconds(run)) for name, run in runs.items()}

    def sample(self, name: str, run: Run) -> None:
        time.sleep(0.02)  # until the idle threads of the previous variant stop spinning
        run()
        start = time.perf_counter()
        for _ in range(self._calls[name]):
            run()
        self._samples[name].append((time.perf_counter() - start) / self._calls[name])

    def samples(self) -> dict[str, list[float]]:
        return self._samples


class Replay(NamedTuple):
    """A call captured into a CUDA graph, and the graph of ``calls`` such calls that is timed."""

    graph: torch.cuda.CUDAGraph
    output: Any
    timed: torch.cuda.CUDAGraph
    calls: int
    inputs: list[Run]  # keep alive the copies that ``timed`` reads

    def __call__(self) -> Any:
        self.graph.replay()
        return self.output


class _GpuTimer:
    """CUDA events around one call, or around several short ones, after a flush of the L2 cache.

    The flush also keeps the GPU busy while the CPU enqueues the call, so that no launch latency is
    measured.
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
    """Seconds that ``run`` takes on the current GPU."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) * 1e-3


def seconds(run: Run) -> float:
    """Duration of the second call."""
    run()
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def synchronized(run: Run, device: torch.device) -> Run:
    """``run``, but on a GPU it returns only when the GPU is done."""

    def until_done() -> Any:
        output = run()
        torch.cuda.synchronize(device)
        return output

    return until_done if device.type == "cuda" else run


def prepare(run: Run, device: torch.device, graphs: bool = True) -> tuple[Run, int | None]:
    """``run`` warmed up and ready to be timed, and its peak memory in bytes.

    On a GPU, with ``graphs``, ``run`` is captured into a CUDA graph, whose replay needs no work on
    the host. Warm-up and capture happen in a thread of their own, because cuDNN caches its choice
    of algorithm per thread: in a shared thread every variant would use the algorithm that the first
    one chose, with or without cudnn.benchmark.
    """
    if device.type == "cpu" or not graphs:
        run = synchronized(run, device)
        run()
        return run, peak_memory(run, device)
    grad = torch.is_grad_enabled()

    def capture() -> tuple[Run, int | None]:
        with torch.cuda.device(device), torch.set_grad_enabled(grad):
            run()
            memory = peak_memory(run, device)
            graph, output = captured(run)
            timed, runs = graph, [run]
            graph.replay()  # the first replay uploads the graph
            if _between_events(graph.replay) < SHORT_CALL:
                runs = [over_copies(run) for _ in range(CALLS_TOGETHER)]
                timed, _ = captured(lambda: [run() for run in runs][-1])
        for tensor in leaves(output):
            tensor.zero_()  # so that a replay that does not write it is detected
        return Replay(graph, output, timed, len(runs), runs), memory

    with ThreadPoolExecutor(1) as thread:
        return thread.submit(capture).result()


def over_copies(run: Run) -> Run:
    """``run`` on copies of the tensors in its closure, so that no other call has cached them.

    Tensors in lists and tuples and in the closures of called functions are copied too. Modules, and
    so their weights, and functions compiled by torch.compile are shared.
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


def leaves(outputs: Any) -> list[Tensor]:
    """The tensors of a tensor or a nested sequence of them."""
    if isinstance(outputs, Tensor):
        return [outputs]
    return [leaf for output in outputs for leaf in leaves(output)]


def peak_memory(run: Run, device: torch.device) -> int | None:
    """Peak memory of ``run`` in bytes: outputs and temporaries, without what was there before.

    On a GPU this counts PyTorch's allocator only. On a CPU it is the growth of the process's
    resident memory, which counts every library's allocations; None on systems other than Linux.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        run()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    try:
        ctypes.CDLL(None).malloc_trim(0)  # otherwise freed heap memory is reused without growth
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak, VmHWM, to the current size
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


def matmul_rate(device: torch.device, dtype: torch.dtype, size: int) -> float:
    """FLOP/s of the fastest of several size x size products of normally distributed matrices."""
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    return 2 * size**3 / _best(lambda: a @ b, device)


def copy_bandwidth(device: torch.device, nbytes: int) -> float:
    """Bytes read and written per second by the fastest of several copies of ``nbytes``."""
    source = torch.zeros(nbytes, dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    return 2 * nbytes / _best(lambda: target.copy_(source), device)


def _best(run: Run, device: torch.device) -> float:
    run()
    return min(interleaved({"": run}, device, budget=0.2)[""])
