"""Measure what a call of an op costs on the host: the time until its kernels are launched.

Ops run with the launchers of ``deeplab_fast._C.dry_run``, which do nothing, on small tensors of the
CPU. So no GPU is needed, and no kernel hides the cost. For each op the table shows the time of a
call, PyTorch's own share (an op of the same schema, registered in the same way, that returns at
once), the difference and its goal, and the ratio to the time of a tiny F.conv2d. The last row is a
whole network; its three convolutions of stride 2 and its max pooling really run, on PyTorch.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from common.environment import ROOT, csv_path, csv_text, folder, run_header, write_atomically
from common.timing import Run, interleaved
from common.variants import preferring
from torch import Tensor

import deeplab_fast
from deeplab_fast import _C, DeepLabV3
from deeplab_fast._native.common import LaunchContext
from deeplab_fast.backends import registry
from deeplab_fast.ops.fused_conv2d import fused_conv2d, fused_conv2d_add_

BACKEND = "dry_run"
CONV2D = "F.conv2d"
MODEL = "prepared ResNet-50"
COLUMNS = (
    "call", "median_us", "iqr_percent", "rounds", "dispatch_us", "above_dispatch_us", "goal_us",
    "times_conv2d",
)  # fmt: skip


class Call(NamedTuple):
    """A call of a public function, and the arguments that reach its op."""

    function: Run
    op: str
    arguments: tuple[Any, ...]
    goal_us: float | None = None  # above PyTorch's own dispatch


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tiny", action="store_true", help="two rounds, as a smoke test")
    parser.add_argument(
        "--output",
        type=folder,
        default=ROOT / "benchmarks" / "results" / "local",
        help="folder for the CSV (default: benchmarks/results/local)",
    )
    args = parser.parse_args(argv)
    register()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # a second thread would only add the time to wake it
    try:
        header = run_header("bench_host" + " --tiny" * args.tiny, torch.device("cpu"))
        rows = measure(0 if args.tiny else 20)
    finally:
        torch.set_num_threads(threads)
    print("\n".join(f"{key}: {value}" for key, value in header.items()))
    print_table(rows)
    path = csv_path(args.output, "host")
    write_atomically(path, csv_text(header, COLUMNS, rows))
    print(f"wrote {path}")


def register() -> None:
    """Register a backend with the kernels of ``cuda`` for an H100, which are never run."""
    context = LaunchContext(_C.dry_run, stream=0, num_ctas=264, is_sm90=True)
    target = registry.Target(context, lambda: 0, lambda: None)
    registry.register_backend(BACKEND, lambda device_type: None, lambda device: target)
    for op, kernel in registry.kernels_of("cuda").items():
        registry.add_kernel(op, BACKEND, kernel)


@torch.no_grad()
def measure(budget: float) -> list[dict[str, Any]]:
    """A row for each call, from interleaved samples taken in ``budget`` seconds."""
    dispatched = dispatch_only(calls())
    x, weight, bias = torch.randn(1, 8, 5, 5), torch.randn(8, 8, 3, 3), torch.randn(8)
    runs: dict[str, Run] = {CONV2D: lambda: F.conv2d(x, weight, bias, 1, 1, 1, 1)}
    for name, call in calls().items():
        runs[name] = call.function
        runs[f"dispatch of {name}"] = dispatched[name]
    images = torch.randn(1, 3, 33, 33).bfloat16()
    model = DeepLabV3("resnet50").eval().prepare_for_inference(torch.bfloat16)
    cpu = torch.device("cpu")
    with deeplab_fast.backend(BACKEND):
        samples = interleaved(runs, cpu, budget)
    model_run = preferring(lambda: model.predict(images), BACKEND)
    samples |= interleaved({MODEL: model_run}, cpu, budget / 10)
    medians = {name: 1e6 * statistics.median(times) for name, times in samples.items()}
    rows = []
    for name in (CONV2D, *calls(), MODEL):
        lower, _, upper = statistics.quantiles(samples[name], n=4, method="inclusive")
        dispatch = medians.get(f"dispatch of {name}")
        rows.append({
            "call": name,
            "median_us": f"{medians[name]:.2f}",
            "iqr_percent": f"{1e8 * (upper - lower) / medians[name]:.0f}",
            "rounds": len(samples[name]),
            "dispatch_us": None if dispatch is None else f"{dispatch:.2f}",
            "above_dispatch_us": None if dispatch is None else f"{medians[name] - dispatch:.2f}",
            "goal_us": calls()[name].goal_us if name in calls() else None,
            "times_conv2d": f"{medians[name] / medians[CONV2D]:.2f}",
        })  # fmt: skip
    return rows


def calls() -> dict[str, Call]:
    """The ops of inference, in bfloat16 and channels_last, with the shapes of small layers."""
    C, nhwc = 64, torch.channels_last

    def tensor(*shape: int) -> Tensor:
        value = torch.randn(shape).bfloat16()
        return value.contiguous(memory_format=nhwc) if len(shape) == 4 else value

    x, weight, bias = tensor(1, C, 9, 9), tensor(C, C, 3, 3), tensor(C)
    pointwise = tensor(C, C, 1, 1)
    convolution = x, weight, bias, (1, 1), (2, 2), (2, 2), 1, "relu"
    residual, depthwise = x.clone(), (x, tensor(C, 1, 3, 3), *convolution[2:6], C, "relu6")
    branches = [pointwise, weight, weight, weight], [bias] * 4, [1, 2, 4, 6]
    pyramid = x, *branches, pointwise, bias, tensor(C, 5 * C, 1, 1), bias
    logits, labels = tensor(1, 21, 9, 9), ((65, 65), None, False, torch.uint8)
    return {
        "fused_conv2d": Call(lambda: fused_conv2d(*convolution), "fused_conv2d", convolution, 12),
        "fused_conv2d, depthwise": Call(
            lambda: fused_conv2d(*depthwise), "fused_conv2d", depthwise, 12
        ),
        "fused_conv2d_add_": Call(
            lambda: fused_conv2d_add_(residual, *convolution),
            "fused_conv2d_add_",
            (residual, *convolution),
            12,
        ),
        "dilated_conv2d": Call(
            lambda: deeplab_fast.dilated_conv2d(x, weight, bias, 2),
            "dilated_conv2d",
            (x, weight, bias, (2, 2), 1),
        ),
        "aspp": Call(lambda: deeplab_fast.aspp(*pyramid), "aspp", pyramid, 25),
        "upsample_argmax": Call(
            lambda: deeplab_fast.upsample_argmax(logits, (65, 65), dtype=torch.uint8),
            "upsample_argmax",
            (logits, *labels),
            12,
        ),
    }  # fmt: skip


def dispatch_only(calls: dict[str, Call]) -> dict[str, Run]:
    """Calls of ops with the schemas of ours, which return at once."""
    namespace = f"deeplab_fast_dispatch_{len(_keep)}"  # a name can be defined once in a process
    library = torch.library.Library(namespace, "DEF")
    defined: dict[str, Callable[..., Any]] = {}
    for op in dict.fromkeys(call.op for call in calls.values()):
        ours = getattr(torch.ops.deeplab_fast, op).default
        library.define(op + str(ours._schema).removeprefix(ours._schema.name))
        result = None if not ours._schema.returns else torch.empty(0)
        library.impl(op, lambda *a, result=result, **k: result, "CompositeExplicitAutograd")
        if ours.has_kernel_for_dispatch_key(torch._C.DispatchKey.Autograd):
            name = f"{namespace}::{op}"
            torch.library.register_autograd(name, lambda ctx, *grads: None, lib=library)
        defined[op] = getattr(getattr(torch.ops, namespace), op)
    _keep.append(library)

    def run(call: Call) -> Run:
        return lambda: defined[call.op](*call.arguments, backend="")

    return {name: run(call) for name, call in calls.items()}


_keep: list[torch.library.Library] = []  # a library that is freed takes its ops along


def print_table(rows: list[dict[str, Any]]) -> None:
    lines = [("", "us", "IQR", "dispatch", "above", "goal", f"x {CONV2D}")]
    for row in rows:
        lines.append((
            row["call"], row["median_us"], f"{row['iqr_percent']}%", row["dispatch_us"] or "-",
            row["above_dispatch_us"] or "-", row["goal_us"] or "-", row["times_conv2d"],
        ))  # fmt: skip
    print()
    for line in lines:
        print("{:23}{:>9}{:>7}{:>11}{:>8}{:>7}{:>13}".format(*line))


if __name__ == "__main__":
    main()
