"""Whether a family's kernels are right, how fast they are, and what the machine can do.

Started as a program it runs our kernels of the families that it is given once, at the tiny shape,
and nothing else: for compute-sanitizer.
"""

from __future__ import annotations

import contextlib
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import harness
import torch
from gpu_families import FAMILIES, TINY, Family, Size, reference
from harness import Run
from measure import copy_roof, interleaved, matmul_roof, prepare
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from deeplab_fast import _C
from deeplab_fast.backends import cuda, registry

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the checkout, for its tests
from tests.support import emulator  # noqa: E402

EMULATED_ON = {"cuda/sm90": "sm_90", "cuda/sm80": "sm_80", "cuda": "sm_80"}
# Two versions of dilated_conv2d_fwd_sm90: either the threads that copy pixels signal that these
# have arrived, or the copies themselves do.
FORMS = {"threads arrive": False, "copies arrive": True}
SEED = 1  # the emulator's: copies land as late as their waits allow

# The error, relative to the largest |truth|, that rounding to a dtype alone can cause. As in
# tests/support/cases.py; tf32 has as many mantissa bits as fp16.
ROUNDING = {"fp32": 1e-6, "tf32": 1e-3, "fp16": 1e-3, "bf16": 8e-3}


class Place(NamedTuple):
    """The device that families run on: the GPU, or the CPU with emulator and interpreter."""

    device: torch.device

    def backend(self, family: Family) -> str:
        on_cpu = self.device.type == "cpu" and family.backend in EMULATED_ON
        return "emulated" if on_cpu else family.backend

    def kernels(self) -> Any:
        """The compiled module."""
        return _C.cuda if self.device.type == "cuda" else emulator.load().cuda

    def machine(self, family: Family) -> contextlib.AbstractContextManager[None]:
        if self.backend(family) != "emulated":
            return contextlib.nullcontext()
        return emulator.machine(SEED, EMULATED_ON[family.backend])


GPU, CPU = Place(torch.device("cuda")), Place(torch.device("cpu"))


def arguments_of(family: Family, size: Size, dtype: str, device: torch.device) -> tuple[Any, ...]:
    torch.manual_seed(0)
    return family.arguments(size, harness.DTYPES[dtype], device)


def why_not(family: Family, place: Place, arguments: tuple[Any, ...]) -> str | None:
    """Why this call cannot run here; None if it can."""
    return registry.unsupported_reason(
        family.op, place.backend(family), registry.arguments(family.op, *arguments)
    )


def ours(family: Family, place: Place, arguments: tuple[Any, ...]) -> Run:
    op = getattr(torch.ops.deeplab_fast, family.op)
    return lambda: outputs_of(op(*arguments, backend=place.backend(family)))


def outputs_of(result: Any) -> list[Tensor]:
    """Its tensors, without the empty ones that stand for gradients nobody asked for."""
    return [tensor for tensor in tree_leaves(result) if tensor.numel()]


def check(family: Family, place: Place, size: Size, dtype: str) -> dict[str, Any]:
    """Whether our outputs are written, the same twice, and as accurate as PyTorch's."""
    try:
        return _check(family, place, size, dtype)
    except torch.OutOfMemoryError as problem:  # a small GPU, or a busy one, says nothing about us
        return {"outcome": "not run", "note": harness.describe(problem)}


def _check(family: Family, place: Place, size: Size, dtype: str) -> dict[str, Any]:
    start = time.perf_counter()
    arguments = arguments_of(family, size, dtype, place.device)
    with harness.tf32(dtype == "tf32"), place.machine(family):
        if reason := why_not(family, place, arguments):
            return {"outcome": "skipped", "note": reason}
        run = ours(family, place, arguments)
        with poisoned_memory():
            outputs, again = run(), run()
        nchw = tree_map_only(Tensor, Tensor.contiguous, arguments)
        peer = outputs_of(reference(family.op, *nchw))
    with harness.tf32(False):
        expected = outputs_of(family.truth(family.op, *arguments))
    found = compared(outputs, again, peer, expected, family.error, dtype)
    if place.device.type == "cuda":
        torch.cuda.synchronize()  # an error of any kernel so far is raised here
    return {**found, "seconds": time.perf_counter() - start}


def compared(
    outputs: list[Tensor],
    again: list[Tensor],
    peer: list[Tensor],
    expected: list[Tensor],
    error: Callable[[Any, Any], float],
    dtype: str,
) -> dict[str, Any]:
    """Outcome, error, tolerance and note; errors relative to the largest of an output."""
    shapes = [(t.shape, t.dtype) for t in outputs]
    if shapes != [(t.shape, t.dtype) for t in peer]:
        return {"outcome": "FAIL", "note": f"outputs are {shapes}"}
    for output in outputs:
        if missing := int(unwritten(output).sum()):
            note = f"{missing} of {output.numel()} elements are unwritten or NaN"
            return {"outcome": "FAIL", "note": note}
    if not all(torch.equal(a, b) for a, b in zip(outputs, again)):
        return {"outcome": "FAIL", "note": "two runs differ"}
    worst: dict[str, Any] = {"outcome": "pass", "error": 0.0, "tolerance": 0.0}
    for output, theirs, truth in zip(outputs, peer, expected):
        # A bf16 op may have fp32 outputs: they are not rounded to bf16. Those of tf32 ops are fp32
        # too, but their operands were rounded to tf32.
        name = dtype if output.dtype == harness.DTYPES[dtype] else "fp32"
        library_error = error([theirs], [truth])
        tolerance = 2 * library_error + ROUNDING[name]
        found = error([output], [truth])
        if not library_error <= 0.1:  # NaN is wrong too
            return {"outcome": "FAIL", "note": f"PyTorch's own error is {library_error:.2g}"}
        if not found <= tolerance:
            return {"outcome": "FAIL", "error": found, "tolerance": tolerance, "note": "wrong"}
        if worst["tolerance"] == 0 or found / tolerance > worst["error"] / worst["tolerance"]:
            worst |= {"error": found, "tolerance": tolerance}
    return worst


@contextlib.contextmanager
def poisoned_memory() -> Iterator[None]:
    """Uninitialised tensors hold NaN, or the largest integer, so that an unwritten element shows.

    torch.use_deterministic_algorithms would import torch's compiler first, for a second.
    """
    assert torch.utils.deterministic.fill_uninitialized_memory
    torch._C._set_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch._C._set_deterministic_algorithms(False, warn_only=False)


def unwritten(output: Tensor) -> Tensor:
    if output.is_floating_point():
        return output.isnan()
    return output == torch.iinfo(output.dtype).max


def measured_time(
    family: Family, place: Place, size: Size, dtype: str, rates: dict[str, float]
) -> dict[str, Any]:
    """Ours beside the family's peers; ``rates`` are those of ``ceilings``."""
    arguments = arguments_of(family, size, dtype, place.device)
    with harness.tf32(dtype == "tf32"), place.machine(family), torch.no_grad():
        run = ours(family, place, arguments)
        runs = {"": prepare(run, place.device)[0]}
        if not all(torch.equal(a, b) for a, b in zip(runs[""](), run())):
            return {"outcome": "FAIL", "note": "a replay of its CUDA graph gives other results"}
        notes = []
        for name, peer in family.peers(family.op, *arguments).items():
            try:
                runs[name] = prepare(peer, place.device)[0]
            except Exception as problem:
                reason = str(problem).partition("\n")[0] or type(problem).__name__
                notes.append(f"{name} does not run: {reason}")
        samples = interleaved(runs, place.device, budget=1.0)
        steps = longest_worker(run) if family.backend == "cuda/sm90" else None
    medians = {name: 1e6 * statistics.median(times) for name, times in samples.items()}
    us = medians.pop("")
    peer = min(medians, key=medians.__getitem__, default=None)
    work = family.work(size, harness.DTYPES[dtype].itemsize)
    bound = None
    if {dtype, "copy"} <= rates.keys():
        bound = 1e6 * max(work.flops / rates[dtype], work.bytes / rates["copy"])
    return {
        "us": us,
        "peer us": medians.get(peer),
        "peer": peer,
        "ratio": medians[peer] / us if peer else None,
        "TFLOP/s": work.dense_flops / us / 1e6 if work.dense_flops else None,
        "GB/s": None if work.dense_flops else work.bytes / us / 1e3,
        "bound us": bound,
        "of bound": 100 * bound / us if bound else None,
        "steps": steps,
        "us/step": us / steps if steps else None,
        "note": "; ".join(notes),
    }


def compare_forms(family: Family, place: Place, sizes: Sequence[Size]) -> Iterator[dict[str, Any]]:
    """Whether each of FORMS is right; then, on a GPU, how fast those that are right are.

    Times are taken in turns, at the last of ``sizes``. Each form is yielded before the next one
    runs, so that a hang is blamed on the form that hangs.
    """
    dtype, set_form = family.dtypes[0], place.kernels().set_copies_arrive
    before = set_form(False)
    try:
        right = []
        for form, copies_arrive in FORMS.items():
            set_form(copies_arrive)
            checks = [check(family, place, size, dtype) for size in sizes]
            wrong = [row for row in checks if row["outcome"] != "pass"]
            yield {"variant": form, **(wrong or checks[-1:])[0]}
            right += [] if wrong else [form]
        if place.device.type == "cpu" or not right:
            return
        run = ours(family, place, arguments_of(family, sizes[-1], dtype, place.device))
        runs = {}
        for form in right:
            set_form(FORMS[form])  # a CUDA graph keeps the form that it was captured with
            runs[form] = prepare(run, place.device)[0]
        for form, times in interleaved(runs, place.device, budget=1.0).items():
            yield {"variant": form, "outcome": "timed", "us": 1e6 * statistics.median(times)}
    finally:
        set_form(before)


def longest_worker(run: Run) -> int:
    """The steps of the worker that has most, in the first work list that ``run`` takes.

    Each of its items counts two more, for what it costs besides.
    """
    lists: list[Any] = []

    def kept(make: Callable[..., Any]) -> Callable[..., Any]:
        def look_up(*args: Any, **kwargs: Any) -> Any:
            lists.append(make(*args, **kwargs))
            return lists[-1]

        return look_up

    forward, backward = cuda.dilated_conv2d, cuda.dilated_conv2d_backward
    places = [(forward, "conv"), (backward, "conv"), (backward, "wgrad")]
    with contextlib.ExitStack() as stack:
        for module, kind in places:
            name = f"{kind}_work_list"
            stack.enter_context(mock.patch.object(module, name, kept(getattr(module, name))))
        run()
    return lists[0].makespan


def ceilings() -> Iterator[dict[str, Any]]:
    """The rates that lower bounds divide by: matrix products in FLOP/s, a copy in bytes/s."""
    for dtype in ("bf16", "tf32"):
        with harness.tf32(dtype == "tf32"):
            rate = matmul_roof(GPU.device, harness.DTYPES[dtype], 8192)
        yield {"name": dtype, "what": f"matrix product 8192^3, {dtype}", "rate": rate}
    yield {"name": "copy", "what": "copy of 1 GiB", "rate": copy_roof(GPU.device, 1 << 30)}


def main(names: Sequence[str]) -> None:
    for name in names:
        family = FAMILIES[name]
        print(f"family {name}", flush=True)
        for dtype in family.dtypes:
            arguments = arguments_of(family, TINY, dtype, GPU.device)
            with harness.tf32(dtype == "tf32"):
                ours(family, GPU, arguments)()
        torch.cuda.synchronize()
        print(f"end {name}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
