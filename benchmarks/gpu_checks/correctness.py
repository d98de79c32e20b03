"""Check that the kernels of a family write all outputs, reproducibly and accurately."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from common import harness
from common.environment import ROOT, first_line
from common.timing import Run
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from deeplab_fast import _C
from deeplab_fast.backends import registry

from .families import Family
from .inputs import Size
from .references import reference

sys.path.insert(0, str(ROOT))  # for the emulator, which belongs to the tests
from tests.support import emulator  # noqa: E402

EMULATED_ON = {"cuda/sm90": "sm_90", "cuda/sm80": "sm_80", "cuda": "sm_80"}
SEED = 1  # the emulator's: asynchronous copies complete as late as the waits for them allow

# The error of rounding to a dtype, relative to the largest magnitude, as in tests/support/cases.py.
# tf32 has as many mantissa bits as fp16.
ROUNDING = {"fp32": 1e-6, "tf32": 1e-3, "fp16": 1e-3, "bf16": 8e-3}


class Place(NamedTuple):
    """Device that families run on: the GPU, or the CPU with emulator and Triton's interpreter."""

    device: torch.device

    def backend(self, family: Family) -> str:
        on_cpu = self.device.type == "cpu" and family.backend in EMULATED_ON
        return "emulated" if on_cpu else family.backend

    def kernels(self) -> Any:
        """The compiled module of the CUDA kernels."""
        return _C.cuda if self.device.type == "cuda" else emulator.load().cuda

    def machine(self, family: Family) -> contextlib.AbstractContextManager[None]:
        if self.backend(family) != "emulated":
            return contextlib.nullcontext()
        return emulator.machine(SEED, EMULATED_ON[family.backend])


GPU, CPU = Place(torch.device("cuda")), Place(torch.device("cpu"))


def arguments_of(family: Family, size: Size, dtype: str, device: torch.device) -> tuple[Any, ...]:
    torch.manual_seed(0)
    return family.arguments(size, harness.DTYPES[dtype], device)


def unsupported_reason(family: Family, place: Place, arguments: tuple[Any, ...]) -> str | None:
    """Why this call cannot run here; None if it can."""
    return registry.unsupported_reason(
        family.op, place.backend(family), registry.arguments(family.op, *arguments)
    )


def ours(family: Family, place: Place, arguments: tuple[Any, ...]) -> Run:
    op = getattr(torch.ops.deeplab_fast, family.op)
    return lambda: outputs_of(op(*arguments, backend=place.backend(family)))


def outputs_of(result: Any) -> list[Tensor]:
    """The tensors of a result, without the empty ones of gradients that were not requested."""
    return [tensor for tensor in tree_leaves(result) if tensor.numel()]


def check(family: Family, place: Place, size: Size, dtype: str) -> dict[str, Any]:
    """Check that our outputs are written, equal in two runs, and as accurate as PyTorch's."""
    try:
        return _check(family, place, size, dtype)
    except torch.OutOfMemoryError as error:  # a small or busy GPU is not a fault of the kernel
        return {"outcome": "not run", "note": first_line(error)}


def _check(family: Family, place: Place, size: Size, dtype: str) -> dict[str, Any]:
    start = time.perf_counter()
    arguments = arguments_of(family, size, dtype, place.device)
    with harness.tf32(dtype == "tf32"), place.machine(family):
        if reason := unsupported_reason(family, place, arguments):
            return {"outcome": "skipped", "note": reason}
        run = ours(family, place, arguments)
        with poisoned_memory():
            outputs, again = run(), run()
        nchw = tree_map_only(Tensor, Tensor.contiguous, arguments)
        peer = outputs_of(reference(family.op, *nchw))
    with harness.tf32(False):
        expected = outputs_of(family.ground_truth(family.op, *arguments))
    result = compared(outputs, again, peer, expected, family.error, dtype)
    if place.device.type == "cuda":
        torch.cuda.synchronize()  # raises the error of any kernel so far
    return {**result, "seconds": time.perf_counter() - start}


def compared(
    outputs: list[Tensor],
    again: list[Tensor],
    peer: list[Tensor],
    expected: list[Tensor],
    error: Callable[[Any, Any], float],
    dtype: str,
) -> dict[str, Any]:
    """Outcome, error, tolerance and note; errors are relative to an output's largest magnitude."""
    shapes = [(t.shape, t.dtype) for t in outputs]
    if shapes != [(t.shape, t.dtype) for t in peer]:
        return {"outcome": "FAIL", "note": f"outputs: unexpected shapes or dtypes {shapes}"}
    for output in outputs:
        if missing := int(unwritten(output).sum()):
            note = f"{missing} of {output.numel()} elements are unwritten or NaN"
            return {"outcome": "FAIL", "note": note}
    if not all(torch.equal(a, b) for a, b in zip(outputs, again)):
        return {"outcome": "FAIL", "note": "two runs differ"}
    worst: dict[str, Any] = {"outcome": "pass", "error": 0.0, "tolerance": 0.0}
    for output, theirs, exact in zip(outputs, peer, expected):
        # fp32 outputs of a bf16 op are not rounded to bf16, so fp32's tolerance holds. Outputs of
        # tf32 ops are fp32 too, but their operands were rounded to tf32.
        name = dtype if output.dtype == harness.DTYPES[dtype] else "fp32"
        library_error = error([theirs], [exact])
        tolerance = 2 * library_error + ROUNDING[name]
        our_error = error([output], [exact])
        if not library_error <= 0.1:  # also true for NaN
            return {"outcome": "FAIL", "note": f"PyTorch's own error is {library_error:.2g}"}
        if not our_error <= tolerance:
            return {"outcome": "FAIL", "error": our_error, "tolerance": tolerance, "note": "wrong"}
        if worst["tolerance"] == 0 or our_error / tolerance > worst["error"] / worst["tolerance"]:
            worst |= {"error": our_error, "tolerance": tolerance}
    return worst


@contextlib.contextmanager
def poisoned_memory() -> Iterator[None]:
    """Fill uninitialised tensors with NaN or the largest integer, to detect unwritten elements.

    The private function avoids torch.use_deterministic_algorithms, which imports torch's compiler
    and takes a second.
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
