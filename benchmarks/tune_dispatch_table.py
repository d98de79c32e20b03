"""Fill the dispatch table on this GPU: time every convolution kernel against cuDNN.

The calls are those that DeepLab-v3 makes in training and when prepared for inference, and each
convolution of its ASPP alone. The table, deeplab_fast/backends/dispatch_table.csv of the package in
use, is rewritten after each call: rows of the same device, op and shapes are replaced, all others
are kept.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from common import cases, harness
from common.cases import Shape
from common.convolutions import layers
from common.variants import with_cudnn
from torch import Tensor
from torch.utils._pytree import tree_map_only

from deeplab_fast import DeepLabV3, dilated_conv2d
from deeplab_fast.backends import dispatch_table, registry, tuning
from deeplab_fast.backends.calls import Call, record, runner
from deeplab_fast.backends.dispatch_table import Row

SHAPES = (cases.VOC_OS16, cases.VOC_OS8, cases.CITYSCAPES_OS16, cases.CITYSCAPES_OS8)
BACKBONES = ("resnet50", "mobilenet_v2")


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
        (call, batch, dtype)
        for dtype in args.dtype
        for batch in args.batch
        for shape in cases.select(args, selected(args.shape))
        for call in calls(shape, batch, dtype, BACKBONES[args.tiny :])
    ]
    work.sort(key=lambda item: item[0].op.startswith("fused_conv2d"))  # the backbone's many last
    args.table.parent.mkdir(parents=True, exist_ok=True)
    for item in work:
        old = dispatch_table.read(args.table) if args.table.exists() else []
        dispatch_table.write(args.table, [*old, *measure(report, *item)])
    print(f"wrote {report.csv} and {args.table}")  # no plot: it would have hundreds of panels
    report.exit_if_failed()


def selected(names: Sequence[str] | None) -> list[Shape]:
    """The shapes with these names, or all."""
    return [shape for shape in SHAPES if names is None or shape.name in names]


def calls(shape: Shape, batch: int, dtype: str, backbones: Sequence[str] = BACKBONES) -> list[Call]:
    """Each distinct call, on the meta device, that DeepLab-v3 makes.

    Their tensors are converted to channels_last, as on a GPU; the meta device chooses other memory
    formats.
    """
    nhwc = {"memory_format": torch.channels_last}

    def run() -> None:
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

    with torch.device("meta"):
        recorded = record(run)
    for call in list(recorded):  # and the public op without the mean
        if call.op == "parallel_dilated_conv2d_and_mean":
            input, weights, dilations = call.arguments
            recorded.append(Call("parallel_dilated_conv2d", (input, weights, [], dilations)))
    distinct = {(call.op, call.shape): call for call in recorded}
    return [
        call._replace(arguments=tree_map_only(Tensor, _channels_last, call.arguments))
        for call in distinct.values()
    ]


def _channels_last(tensor: Tensor) -> Tensor:
    if tensor.dim() != 4:
        return tensor
    return tensor.contiguous(memory_format=torch.channels_last)


def measure(report: harness.Report, call: Call, batch: int, dtype: str) -> list[Row]:
    """Time all kernels that support a call, and cuDNN; a row for each correct kernel."""
    arguments = call.scratch_arguments(report.device)
    exact = tree_map_only(Tensor, Tensor.float, arguments)
    cudnn = runner(call.op, arguments, "reference")
    num_before = len(report.rows)
    with harness.tf32(dtype == "tf32"):
        kernels = registry.supporting_kernels(call.op, registry.arguments(call.op, *arguments))
        if not kernels:
            return []
        report.case(
            f"{call.op} {call.shape}",
            batch=batch,
            dtype=dtype,
            reference=runner(call.op, exact, "reference"),
            ours={kernel: runner(call.op, arguments, kernel) for kernel in kernels},
            baselines={
                tuning.CUDNN: cudnn,
                tuning.CUDNN_BENCHMARK: with_cudnn(cudnn, {"benchmark": True}),
            },
            tolerance=tuning.TOLERANCE[dtype],
        )
        times = {row["variant"]: row["median_ms"] for row in report.rows[num_before:]}
        return tuning.rows(call, times, report.device, report.header["commit"])


if __name__ == "__main__":
    main()
