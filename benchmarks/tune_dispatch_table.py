"""Fill the dispatch table on this GPU: time every convolution kernel against cuDNN.

The calls are those that DeepLab-v3 makes in training and when prepared for inference, and each
convolution of its ASPP alone. The table, deeplab_fast/backends/dispatch_table.csv of the package in
use, is rewritten after each call: rows of the same device, op and shapes are replaced, all others
are kept.
"""

from __future__ import annotations

import argparse
import csv
import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from common import cases, harness
from common.cases import Shape
from common.convolutions import layers
from common.environment import write_atomically
from common.timing import Run
from common.variants import with_cudnn
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from deeplab_fast import DeepLabV3, dilated_conv2d
from deeplab_fast.backends import dispatch_table, registry

SHAPES = (cases.VOC_OS16, cases.VOC_OS8, cases.CITYSCAPES_OS16, cases.CITYSCAPES_OS8)
BACKBONES = ("resnet50", "mobilenet_v2")

# Largest harness.relative_error against fp32; that of a wrong kernel is about 1.
TOLERANCE = {"fp32": 1e-5, "tf32": 5e-3, "fp16": 5e-3, "bf16": 3e-2}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument(
        "--table", type=Path, default=dispatch_table.PATH, help=f"default: {dispatch_table.PATH}"
    )
    parser.add_argument(
        "--shape",
        nargs="+",
        choices=[shape.name for shape in SHAPES],
        metavar="NAME",
        help=f"any of {', '.join(repr(shape.name) for shape in SHAPES)}; default: all",
    )
    args = harness.arguments(__doc__, argv, gpu_dtypes=("bf16", "fp16", "tf32"), parents=[parser])
    if args.device.type != "cuda":
        raise SystemExit("tune_dispatch_table: expected a GPU; the CPU has no dispatch table")
    report = harness.Report("dispatch_table", args)
    work = [
        (op, call, batch, dtype)
        for dtype in args.dtype
        for batch in args.batch
        for shape in cases.select(args, selected(args.shape))
        for op, call in calls(shape, batch, dtype, BACKBONES[args.tiny :])
    ]
    work.sort(key=lambda item: item[0].startswith("fused_conv2d"))  # the many backbone layers last
    for item in work:
        update_table(args.table, measure(report, *item))
    print(f"wrote {report.csv} and {args.table}")  # no plot: it would have hundreds of panels
    report.exit_if_failed()


def selected(names: Sequence[str] | None) -> list[Shape]:
    """The shapes with these names, or all."""
    return [shape for shape in SHAPES if names is None or shape.name in names]


class _Recorder(TorchDispatchMode):
    """Records the calls of ops that a vendor library has too.

    Their tensors are converted to channels_last, as on a GPU; the meta device chooses other memory
    formats.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, tuple[Any, ...]]] = []

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        namespace, _, op = function._schema.name.partition("::")
        if namespace == "deeplab_fast" and op in registry.shape_buckets:
            args = tree_map_only(Tensor, _channels_last, args)
            self.calls.append((op, args))
            if op == "parallel_dilated_conv2d_and_mean":  # and the public op without the mean
                input, weights, dilations = args
                self.calls.append(("parallel_dilated_conv2d", (input, weights, [], dilations)))
        return function(*args, **kwargs or {})


def _channels_last(tensor: Tensor) -> Tensor:
    if tensor.dim() != 4:
        return tensor
    return tensor.detach().contiguous(memory_format=torch.channels_last)


def calls(
    shape: Shape, batch: int, dtype: str, backbones: Sequence[str] = BACKBONES
) -> list[tuple[str, tuple[Any, ...]]]:
    """Name and arguments, on the meta device, of each distinct call that DeepLab-v3 makes."""
    nhwc = {"memory_format": torch.channels_last}
    with _Recorder() as recorder, torch.device("meta"):
        images = torch.empty(batch, 3, *shape.image, dtype=harness.DTYPES[dtype]).to(**nhwc)
        for backbone in backbones:
            model = DeepLabV3(backbone, shape.classes, shape.output_stride, shape.atrous_rates)
            model.to(images.dtype, **nhwc).train()
            model.classifier[0].convs[-1].eval()  # one image gives batch norm a single value
            logits = model(images)["out"]
            logits.backward(torch.empty_like(logits))
            model.eval().prepare_for_inference(images.dtype)(images)
        features = torch.empty(batch, shape.in_channels, *shape.feature, dtype=images.dtype)
        features = features.to(**nhwc).requires_grad_()
        for kernel, dilation in layers(shape):
            weight = features.new_empty(shape.channels, shape.in_channels, kernel, kernel)
            output = dilated_conv2d(features, weight.to(**nhwc).requires_grad_(), dilation=dilation)
            output.backward(torch.empty_like(output))
    return list({(op, describe(call)): (op, call) for op, call in recorder.calls}.values())


def describe(call: Any) -> str:
    """The arguments of a call as text, with the shapes of tensors."""
    if isinstance(call, Tensor):
        return "x".join(map(str, call.shape))
    if isinstance(call, (list, tuple)):
        return " ".join(filter(None, map(describe, call)))
    return str(call)


def measure(
    report: harness.Report, op: str, call: tuple[Any, ...], batch: int, dtype: str
) -> Iterator[dispatch_table.Row]:
    """Time all kernels that support a call, and cuDNN; a row for each kernel."""
    arguments = tree_map_only(Tensor, lambda t: _filled(t, report.device), call)
    with harness.tf32(dtype == "tf32"):
        values = registry.arguments(op, *arguments)
        shape_bucket = registry.shape_buckets[op](values)
        kernels = [
            kernel
            for kernel in dispatch_table.KERNELS
            if registry.unsupported_reason(op, kernel, values) is None
        ]
    if not kernels:
        return
    cudnn = _run(op, arguments, "reference")
    num_before = len(report.rows)
    report.case(
        f"{op} {describe(call)}",
        batch=batch,
        dtype=dtype,
        reference=_run(op, tree_map_only(Tensor, Tensor.float, arguments), "reference"),
        ours={kernel: _run(op, arguments, kernel) for kernel in kernels},
        baselines={"cuDNN": cudnn, "cuDNN, benchmark": with_cudnn(cudnn, {"benchmark": True})},
        tolerance=TOLERANCE[dtype],
    )
    rows = report.rows[num_before:]
    cudnn_times = [row["median_ms"] for row in rows if row["kind"] == "baseline"]
    for row in rows if cudnn_times else ():
        if row["kind"] == "ours":
            yield dispatch_table.Row(
                dispatch_table.device_class(report.device),
                op,
                shape_bucket,
                row["variant"],
                row["median_ms"],
                min(cudnn_times),
                describe(call),
                report.header["device"],
                f"{report.header['versions']}, cuDNN {torch.backends.cudnn.version()}",
                report.header["commit"],
                report.header["date"],
            )


def _filled(tensor: Tensor, device: torch.device) -> Tensor:
    """Random numbers, small enough that no sum overflows in fp16."""
    empty = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device)
    return empty.normal_(0, 0.1)


def _run(op: str, arguments: tuple[Any, ...], backend: str) -> Run:
    function = getattr(torch.ops.deeplab_fast, op)

    def run() -> list[Tensor]:
        outputs = function(*arguments, backend=backend)
        return [tensor for tensor in tree_leaves(outputs) if tensor.numel()]

    def run_in_place() -> Tensor:
        output = arguments[0].clone()
        function(output, *arguments[1:], backend=backend)
        return output

    return run_in_place if op.endswith("_") else run


def update_table(table: Path, new: Iterator[dispatch_table.Row]) -> None:
    """Add the rows ``new`` to the file ``table``, replacing rows of the same kernel and call."""
    old = dispatch_table.read(table) if table.exists() else []
    rows = {(row.device, row.op, row.shape_bucket, row.shape, row.kernel): row
            for row in (*old, *new)}  # fmt: skip
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(dispatch_table.Row._fields)
    for _, row in sorted(rows.items()):
        writer.writerow(f"{value:.6g}" if isinstance(value, float) else value for value in row)
    write_atomically(table, text.getvalue().encode())


if __name__ == "__main__":
    main()
