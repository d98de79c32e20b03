"""Time the kernels of a family, and measure the rates that the device reaches."""

from __future__ import annotations

import contextlib
import statistics
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest import mock

import torch
from common import harness
from common.environment import first_line
from common.timing import Run, copy_bandwidth, interleaved, matmul_rate, prepare

from deeplab_fast._native.work_lists import (
    CONV_SM90,
    SPLIT_K_ITERS,
    ConvWorkList,
    WgradWorkList,
)
from deeplab_fast.backends import cuda

from .correctness import GPU, Place, arguments_of, check, ours
from .families import Family
from .inputs import Size

# Two versions of dilated_conv2d_fwd_sm90: arrival of pixels in shared memory is signalled either by
# the threads that copied them or by the copies themselves.
ARRIVALS = {"threads arrive": False, "copies arrive": True}


def measured_time(
    family: Family, place: Place, size: Size, dtype: str, rates: dict[str, float]
) -> dict[str, Any]:
    """Time our kernel and the family's peers; ``rates`` are those of :func:`ceilings`."""
    arguments = arguments_of(family, size, dtype, place.device)
    with harness.tf32(dtype == "tf32"), place.machine(family), torch.no_grad():
        run = ours(family, place, arguments)
        runs = {"": prepare(run, place.device)[0]}
        if not all(torch.equal(a, b) for a, b in zip(runs[""](), run())):
            return {"outcome": "FAIL", "note": "a replay of its CUDA graph gives different results"}
        notes = []
        for name, peer in family.peers(family.op, *arguments).items():
            try:
                runs[name] = prepare(peer, place.device)[0]
            except Exception as error:
                notes.append(f"{name} fails: {first_line(error)}")
        samples = interleaved(runs, place.device, budget=1.0)
        k_iters = busiest_cta(run) if family.backend == "cuda/sm90" else None
    medians = {name: 1e6 * statistics.median(times) for name, times in samples.items()}
    us = medians.pop("")
    peer = min(medians, key=medians.__getitem__, default=None)
    work = family.work(size, harness.DTYPES[dtype].itemsize)
    lower_bound = None
    if {dtype, "copy"} <= rates.keys():
        lower_bound = 1e6 * max(work.flops / rates[dtype], work.bytes / rates["copy"])
    return {
        "us": us,
        "peer us": medians.get(peer),
        "peer": peer,
        "speedup": medians[peer] / us if peer else None,
        "TFLOP/s": work.dense_flops / us / 1e6 if work.dense_flops else None,
        "GB/s": None if work.dense_flops else work.bytes / us / 1e3,
        "bound us": lower_bound,
        "of bound": 100 * lower_bound / us if lower_bound else None,
        "k-iters": k_iters,
        "us/k-iter": us / k_iters if k_iters else None,
        "note": "; ".join(notes),
    }


def compare_arrivals(
    family: Family, place: Place, sizes: Sequence[Size]
) -> Iterator[dict[str, Any]]:
    """Check each of ARRIVALS; then, on a GPU, time those that passed, at the last of ``sizes``.

    Each result is yielded before the next version runs, so that a hang is attributed correctly.
    """
    dtype, set_copies_arrive = family.dtypes[0], place.kernels().set_copies_arrive
    before = set_copies_arrive(False)
    try:
        passed = []
        for arrival, copies_arrive in ARRIVALS.items():
            set_copies_arrive(copies_arrive)
            checks = [check(family, place, size, dtype) for size in sizes]
            failures = [row for row in checks if row["outcome"] != "pass"]
            yield {"variant": arrival, **(failures or checks[-1:])[0]}
            passed += [] if failures else [arrival]
        if place.device.type == "cpu" or not passed:
            return
        run = ours(family, place, arguments_of(family, sizes[-1], dtype, place.device))
        runs = {}
        for arrival in passed:
            set_copies_arrive(ARRIVALS[arrival])  # a CUDA graph keeps what it was captured with
            runs[arrival] = prepare(run, place.device)[0]
        for arrival, times in interleaved(runs, place.device, budget=1.0).items():
            yield {"variant": arrival, "outcome": "timed", "us": 1e6 * statistics.median(times)}
    finally:
        set_copies_arrive(before)


def busiest_cta(run: Run) -> int:
    """The k-iterations of the busiest CTA in the first work list that ``run`` uses.

    A work item counts as two more, for its prologue and epilogue, and as another eight if its
    output tile is split.
    """
    lists: list[ConvWorkList | WgradWorkList] = []

    def recording(make: Callable[..., Any]) -> Callable[..., Any]:
        def look_up(*args: Any, **kwargs: Any) -> Any:
            lists.append(make(*args, **kwargs))
            return lists[-1]

        return look_up

    forward, backward = cuda.dilated_conv2d, cuda.dilated_conv2d_backward
    makers = [(forward, "conv"), (backward, "conv"), (backward, "wgrad")]
    with contextlib.ExitStack() as stack:
        for module, kind in makers:
            name = f"{kind}_work_list"
            stack.enter_context(mock.patch.object(module, name, recording(getattr(module, name))))
        run()
    tensors = lists[0].tensors[3:] if isinstance(lists[0], ConvWorkList) else lists[0].tensors[1:]
    work_items, _, first_items, *_ = (tensor.cpu() for tensor in tensors)
    num_k_iters, slots = work_items[:, 3], work_items[:, 4]
    costs = num_k_iters + CONV_SM90.item_k_iters + SPLIT_K_ITERS * (slots >= 0)
    return max(int(cta.sum()) for cta in costs.tensor_split(first_items[1:-1].tolist()))


def ceilings() -> Iterator[dict[str, Any]]:
    """Rates for lower bounds: matrix products in FLOP/s, a copy in bytes/s."""
    for dtype in ("bf16", "tf32"):
        with harness.tf32(dtype == "tf32"):
            rate = matmul_rate(GPU.device, harness.DTYPES[dtype], 8192)
        yield {"name": dtype, "measurement": f"matrix product 8192^3, {dtype}", "rate": rate}
    yield {
        "name": "copy",
        "measurement": "copy of 1 GiB",
        "rate": copy_bandwidth(GPU.device, 1 << 30),
    }
