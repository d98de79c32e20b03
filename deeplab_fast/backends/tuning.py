"""Tuning: times of our kernels and of cuDNN for the calls that a model makes."""

from __future__ import annotations

import datetime
import math
import sys
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only
from tqdm import tqdm

from . import dispatch_table, race, registry
from .arguments import shapes
from .calls import Call, record, runner
from .dispatch_table import Row

# Time for the samples of one call, over all kernels and cuDNN. A ResNet-50 prepared for inference
# makes 26 distinct calls at one size. Three of them have stride 2, which only cuDNN supports, so
# the samples take 23 s. Each of the 23 calls may also compile a Triton kernel, and cuDNN tries all
# its algorithms once. The budget leaves 1.5 to 4 s per call for that, if tuning one model at one
# size is to take one to two minutes.
BUDGET_MS = 1000

# Largest relative_error against the reference in fp32, by precision. The operands are random with
# mean zero, so the rounding errors of a sum cancel as its terms do, and the limits hold for every
# number of terms. The error of a wrong kernel is about 1.
TOLERANCE = {"fp32": 1e-5, "tf32": 5e-3, "fp16": 5e-3, "bf16": 3e-2}

# cuDNN with the algorithm that its heuristics choose, and with the fastest of all.
CUDNN, CUDNN_BENCHMARK = "cuDNN", "cuDNN, benchmark"


class UnusableGPU(RuntimeError):
    """A kernel raised an error after which every CUDA call of this process fails."""


class Result(NamedTuple):
    """Measurements of a call."""

    call: Call
    layers: list[str]  # the layers that make such calls
    rows: list[Row]  # a row for each kernel that supports the call


class Tuning(NamedTuple):
    """Result of :func:`tune`. ``str()`` of it is a table."""

    device: torch.device
    results: list[Result]
    failures: list[str]  # a line for each kernel that was wrong or raised an error

    def __str__(self) -> str:
        if not can_tune(self.device):
            return (
                f"nothing to tune on {self.device}: kernels are chosen by their speed on GPUs only"
            )
        if not self.results:
            return "nothing to tune: the model called none of the ops that cuDNN has too"
        lines = [("layer", "op", "shapes", "cuDNN ms", "ours ms", "choice")]
        for call, layers, rows in self.results:
            best = min(rows, key=lambda row: row.ratio, default=None)
            ours = "-" if best is None else "failed" if best.failed else f"{best.median_ms:.4f}"
            lines.append((
                _several(layers),
                call.op,
                shapes(call.arguments),
                f"{best.cudnn_ms:.4f}" if best else "-",
                ours,
                _choice(call, rows, self.device),
            ))  # fmt: skip
        *widths, _ = (max(map(len, column)) for column in zip(*lines))
        formats = [f"{{:{side}{width}}}" for side, width in zip("<<<>>", widths)]
        return "\n".join("  ".join([*formats, "{}"]).format(*line) for line in lines)


def _several(layers: list[str]) -> str:
    """The first of these names, if it has one, and the number of the others."""
    more = f" and {len(layers) - 1} more" if len(layers) > 1 else ""
    return layers[0] + more if layers[0] else "-"


def _choice(call: Call, rows: list[Row], device: torch.device) -> str:
    """The kernel that the automatic dispatch takes, which depends on all rows of the bucket."""
    buckets = dispatch_table.fastest_kernels(device).get(call.op, {})
    supported = {row.kernel for row in rows}
    faster = (kernel for kernel in buckets.get(call.shape_bucket, ()) if kernel in supported)
    return next(faster, CUDNN)


def can_tune(device: torch.device) -> bool:
    """True if the choice of kernels depends on measurements on this device."""
    return any(registry.depends_on_measurements(op, device.type) for op in registry.ops())


def tune(
    run: Callable[[], object], device: torch.device | str, model: nn.Module | None = None
) -> Tuning:
    """Measure which kernels are the fastest for the calls that ``run()`` makes on ``device``.

    Every distinct call of an op that cuDNN has too is timed on each kernel that supports it and on
    cuDNN, after a check of the kernel's output. The times are added to the user's dispatch table
    after each call, and calls that it has already are skipped: a tuning that was interrupted goes
    on where it stopped. A kernel that is wrong or raises an error is reported on stderr and not
    chosen for any call of this shape bucket. Nothing is measured on devices other than GPUs.

    Args:
        run: runs the model once, for example a training step with its backward pass.
        model: the module whose submodules name the layers in the table.

    Raises:
        TypeError: ``run`` is not a function.
        RuntimeError: deterministic algorithms are on, with which the dispatch does not depend on
            measurements.
        UnusableGPU: a kernel left the GPU unusable for this process.
        OSError: the user's dispatch table cannot be written.

    >>> print(tune(lambda: criterion(model(images)["out"], target).backward(), images.device))
    """
    if not callable(run):
        raise TypeError(f"run: expected a function, got {type(run).__name__}")
    device = torch.device(device)
    if not can_tune(device):
        return Tuning(device, [], [])
    if torch.are_deterministic_algorithms_enabled() or torch.backends.cudnn.deterministic:
        raise RuntimeError(
            "tune: expected torch.use_deterministic_algorithms(False) and "
            "torch.backends.cudnn.deterministic = False: deterministic algorithms are not chosen "
            "by speed"
        )
    distinct: dict[tuple[str, str, str], tuple[Call, list[str]]] = {}
    for call in record(run, model):
        key = call.op, call.shape_bucket, call.shape
        distinct.setdefault(key, (call, []))[1].append(call.layer)
    measured = _measured(device)
    tuning = Tuning(device, [], [])
    for key, (call, layers) in tqdm(distinct.items(), unit="call", leave=False, disable=None):
        if key not in measured:
            times, failures = measure(call, device)
            measured[key] = rows(call, times, device)
            if measured[key]:
                dispatch_table.add(measured[key])
            for failure in failures:
                tqdm.write(f"deeplab_fast: {failure}", file=sys.stderr)
            tuning.failures.extend(failures)
        tuning.results.append(Result(call, layers, measured[key]))
    return tuning


def _measured(device: torch.device) -> dict[tuple[str, str, str], list[Row]]:
    """The user's rows that were measured on this kind of device with these versions."""
    here = dispatch_table.device_class(device), dispatch_table.versions()
    found: dict[tuple[str, str, str], list[Row]] = {}
    for row in dispatch_table.user_rows():
        if (row.device, row.versions) == here:
            found.setdefault((row.op, row.shape_bucket, row.shape), []).append(row)
    return found


def rows(
    call: Call, times: Mapping[str, float], device: torch.device, commit: str = "-"
) -> list[Row]:
    """Rows of the dispatch table for the median times, in ms, of kernels and of cuDNN."""
    cudnn = min((times[name] for name in (CUDNN, CUDNN_BENCHMARK) if name in times), default=None)
    return [
        Row(
            dispatch_table.device_class(device),
            call.op,
            call.shape_bucket,
            kernel,
            ms,
            cudnn,
            call.shape,
            torch.cuda.get_device_name(device),
            dispatch_table.versions(),
            commit,
            datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        )
        for kernel, ms in times.items()
        if cudnn is not None and kernel in dispatch_table.KERNELS
    ]


def measure(call: Call, device: torch.device) -> tuple[dict[str, float], list[str]]:
    """Median times in ms of the kernels that support a call, and of cuDNN.

    Returns:
        The times by kernel, and a line of text for each kernel that is wrong or raises an error.
        The time of such a kernel is inf. If no kernel supports the call, both are empty.
    """
    arguments = call.scratch_arguments(device)
    kernels = registry.supporting_kernels(call.op, registry.arguments(call.op, *arguments))
    if not kernels:
        return {}, []
    device = arguments[0].device  # has an index
    failures = _failures(call, arguments, kernels)
    replays = {
        kernel: _replay(runner(call.op, arguments, kernel), device)
        for kernel in kernels
        if kernel not in failures
    }
    cudnn = runner(call.op, arguments, "reference")
    replays[CUDNN] = _replay(cudnn, device)
    replays[CUDNN_BENCHMARK] = _replay(cudnn, device, benchmark=True)
    times = race.milliseconds(replays, device, BUDGET_MS) | dict.fromkeys(failures, math.inf)
    return times, [_failure(call, kernel, why) for kernel, why in failures.items()]


def _failure(call: Call, kernel: str, why: str) -> str:
    return f"{kernel}: {call.op} {call.shape}: {why}"


def _failures(call: Call, arguments: tuple[Any, ...], kernels: list[str]) -> dict[str, str]:
    """The kernels that cannot be used, and why: their exception, or how wrong they are.

    Raises:
        UnusableGPU: a kernel left the GPU unusable.
    """
    in_fp32 = tree_map_only(Tensor, Tensor.float, arguments)
    expected = runner(call.op, in_fp32, "reference")()
    tolerance = TOLERANCE[call.shape_bucket.split()[0]]
    failures = {}
    # Outputs are kept, because a kernel that writes nothing would look right in the memory of a
    # correct output.
    outputs = []
    for kernel in kernels:
        try:
            outputs.append(runner(call.op, arguments, kernel)())
            error = relative_error(outputs[-1], expected)
            if not error <= tolerance:  # also if it is NaN
                failures[kernel] = f"relative error {error:.3g} (expected at most {tolerance:g})"
        except Exception as problem:
            why = f"{type(problem).__name__}: {str(problem).strip().partition(chr(10))[0]}"
            failures[kernel] = why
            if is_unusable(arguments[0].device):
                raise UnusableGPU(
                    f"{_failure(call, kernel, why)} (the GPU is unusable in this process now)"
                ) from problem
    return failures


def is_unusable(device: torch.device) -> bool:
    """True if a CUDA error, such as an illegal memory access, makes every later CUDA call fail."""
    if device.type != "cuda":
        return False
    try:
        torch.cuda.synchronize(device)
    except RuntimeError:  # including torch.AcceleratorError
        return True
    return False


def relative_error(outputs: list[Tensor], expected: list[Tensor]) -> float:
    """max |output - expected| / max |expected|; the largest over several tensors."""
    if [output.shape for output in outputs] != [tensor.shape for tensor in expected]:
        return float("inf")
    errors = []
    for output, right in zip(outputs, expected):
        scale = right.double().abs().max().clamp_min(1e-30)
        errors.append((output.double() - right.double()).abs().max() / scale)
    return torch.stack(errors).max().item()


def _replay(
    run: Callable[[], object], device: torch.device, benchmark: bool = False
) -> Callable[[], object]:
    """``run`` as the replay of a CUDA graph on a GPU, where it costs no time on the host.

    It is captured in a thread of its own, because cuDNN keeps its choice of an algorithm for each
    thread: in a shared one all calls would use the algorithm that was chosen first, whatever
    ``benchmark``, the value of torch.backends.cudnn.benchmark, is.
    """
    if device.type != "cuda":
        return run

    def capture() -> Callable[[], object]:
        with torch.no_grad(), torch.cuda.device(device):
            graph, _ = captured(run)
            return graph.replay

    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = benchmark
    try:
        with ThreadPoolExecutor(1) as thread:
            return thread.submit(capture).result()
    finally:
        torch.backends.cudnn.benchmark = before


def captured(run: Callable[[], Any]) -> tuple[torch.cuda.CUDAGraph, Any]:
    """A CUDA graph of ``run``, and the output that a replay writes."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        run()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        output = run()
    return graph, output
