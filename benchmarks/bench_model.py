"""Benchmark DeepLab-v3 and v3+ from images to labels against torchvision's or plain PyTorch's.

On a GPU or with --full, torch.compile of both models is timed too. On a GPU each convolution kernel
is also timed in every layer that it supports, whether automatic dispatch chooses it or not, and at
batch 1 all variants are timed a second time as called from Python. In that case the prepared model
captures CUDA graphs by itself, except in the rows with cuda_graphs=False. On a CPU, --full adds
ONNX Runtime and OpenVINO, in fp32 and in int8, if they are installed (pip install ".[peers]"): once
with the baseline exported by torch.onnx, once with our model exported by deeplab_fast.
"""

from __future__ import annotations

import argparse
import copy
from pathlib import Path

import torch
from common import cases, harness, peers
from common.cases import Shape
from common.timing import Run
from common.variants import compiled, preferring
from torch import Tensor, nn

from deeplab_fast.backends import dispatch_table, registry
from deeplab_fast.export import export_onnx
from deeplab_fast.models import DeepLab, DeepLabV3, DeepLabV3Plus
from deeplab_fast.nn import ASPP

# Largest regret() against fp32.
TOLERANCE = {"fp32": 1e-6, "tf32": 1e-2, "fp16": 1e-2, "bf16": 1e-1}
# These networks have random weights, which amplify the rounding to 8 bits: int8 has about 0.2, and
# random labels have 1 or more. `deeplab-fast export` prints what int8 changes in a trained network.
INT8_TOLERANCE = 0.5

DEFAULT = [
    (DeepLabV3, "resnet50", cases.VOC_OS8),
    (DeepLabV3, "resnet50", cases.VOC_OS16),
    (DeepLabV3, "mobilenet_v2", cases.VOC_OS16),
    (DeepLabV3Plus, "resnet50", cases.VOC_OS16),
    (DeepLabV3Plus, "mobilenet_v2", cases.VOC_OS16),
]
FULL = [
    *DEFAULT,
    (DeepLabV3, "resnet101", cases.VOC_OS8),
    (DeepLabV3, "resnet50", cases.CITYSCAPES_OS8),
]
TINY = [(DeepLabV3, "resnet50", cases.TINY), (DeepLabV3Plus, "mobilenet_v2", cases.TINY)]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument(
        "--only", nargs="+", metavar="TEXT", help="backbones whose names contain one of these texts"
    )
    args = harness.arguments(__doc__, argv, parents=[parser])
    networks = TINY if args.tiny else FULL if args.full else DEFAULT
    only = args.only or [""]
    chosen = [network for network in networks if any(text in network[1] for text in only)]
    if not chosen:
        names = ", ".join(dict.fromkeys(backbone for _, backbone, _ in networks))
        parser.error(f"--only: expected parts of {names}, got {' '.join(only)}")
    report = harness.Report("model", args)
    for kind, backbone, shape in chosen:
        model = trained_like(backbone, shape, kind).to(report.device)
        for dtype in args.dtype:
            for batch in args.batch:
                inference(report, shape, dtype, batch, model)
    report.finish()


@torch.no_grad()
def inference(report: harness.Report, shape: Shape, dtype: str, batch: int, model: DeepLab) -> None:
    """Cases from normalised images, in ``dtype``, to int64 labels of the same size."""
    images = torch.randn(batch, 3, *shape.image, device=report.device)
    nchw = images.to(harness.DTYPES[dtype])
    channels_last = nchw.contiguous(memory_format=torch.channels_last)
    peer_name, peer_model = peers.model(model)
    peer = peers.Labels(peer_model).eval()
    baselines = {
        f"{peer_name} NCHW": peers.applied(peer, nchw),
        f"{peer_name} channels_last": peers.applied(peer, channels_last),
    }
    gpu = report.device.type == "cuda"
    if gpu or report.args.full:
        baselines[f"{peer_name} compiled"] = peers.applied(peer, channels_last, compile=True)
    if report.args.full and not gpu:
        baselines |= peers.engines(peer, images, dtype)
    # The model must capture no graph while the timer captures one.
    prepared = model.prepare_for_inference(nchw.dtype, cuda_graphs=False)
    drop_in = copy.deepcopy(model).to(nchw.dtype, memory_format=torch.channels_last)
    ours: dict[str, Run] = {"deeplab_fast prepared": lambda: prepared.predict(channels_last)}
    if gpu or report.args.full:
        predict = compiled(prepared.predict, report.device)
        ours["deeplab_fast prepared, compiled"] = lambda: predict(channels_last)
    if report.args.full and not gpu:
        for engine, run in peers.engines(model, images, dtype, our_export).items():
            ours[f"deeplab_fast exported, {engine}"] = run
    ours[f"deeplab_fast.{type(model).__name__}"] = lambda: drop_in.predict(channels_last)
    if gpu:
        for kernel in dispatch_table.KERNELS:
            if registry.unavailable_reason(kernel, "cuda") is None:
                name = f"deeplab_fast prepared, prefer {kernel}"
                ours[name] = preferring(ours["deeplab_fast prepared"], kernel)
    name = f"{model.config['backbone']} {shape.name}"
    if not isinstance(model, DeepLabV3):
        name = f"{type(model).__name__} {name}"
    for suffix, graphs in timings(report.device, batch).items():
        report.case(
            f"{name}{suffix}",
            batch=batch,
            dtype=dtype,
            reference=lambda: peer_model(images)["out"],
            ours=ours if graphs else called_from_python(ours, model, channels_last),
            baselines=baselines,
            error=regret,
            tolerance=TOLERANCE[dtype],
            tolerances={
                variant: INT8_TOLERANCE
                for variant in (*ours, *baselines)
                if variant.endswith(peers.INT8)
            },
            flops=flops(model, shape, batch),
            graphs=graphs,
        )


def our_export(model: DeepLab, images: Tensor, path: Path) -> None:
    batch, _, *size = images.shape
    export_onnx(model, path, dtype=torch.uint8, size=tuple(size), batch=batch)


def timings(device: torch.device, batch: int) -> dict[str, bool]:
    """Whether variants are timed in CUDA graphs, by the suffix of the case's name.

    Graphs hide the time that Python and some hundred kernel launches take, which at batch 1 can be
    longer than the kernels. Times on a CPU always include it.
    """
    if device.type == "cuda" and batch == 1:
        return {"": True, ", called from Python": False}
    return {"": True}


def called_from_python(ours: dict[str, Run], model: DeepLab, images: Tensor) -> dict[str, Run]:
    """``ours``, with the prepared model as users get it: it captures CUDA graphs by itself."""
    prepared = model.prepare_for_inference(images.dtype)
    return {
        **ours,
        "deeplab_fast prepared": lambda: prepared.predict(images),
        "deeplab_fast prepared, cuda_graphs=False": ours["deeplab_fast prepared"],
    }


@torch.no_grad()
def trained_like(backbone: str, shape: Shape, kind: type[DeepLab] = DeepLabV3) -> DeepLab:
    """A network with random weights, but batch norm statistics from data as after training."""
    torch.manual_seed(0)
    model = kind(backbone, shape.classes, shape.output_stride, shape.atrous_rates)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
    model.train()(torch.randn(8, 3, 33, 33))
    return model.eval()


def regret(labels: Tensor, logits: Tensor) -> float:
    """Mean difference between a pixel's largest reference logit and the logit of its label.

    The unit is the standard deviation of the reference logits; random labels have 1 or more. Unlike
    the fraction of differing labels, it hardly grows when two classes that tie to within rounding
    are swapped.
    """
    if labels.shape != logits[:, 0].shape:
        return float("inf")
    label_logits = logits.gather(1, labels[:, None].long())
    return ((logits.amax(1, keepdim=True) - label_logits).mean() / logits.std()).item()


def flops(model: DeepLab, shape: Shape, batch: int) -> int:
    """Operations of all convolutions, without products with padding."""
    counted = copy.deepcopy(model).to("meta")
    (pyramid,) = (module for module in counted.modules() if isinstance(module, ASPP))
    conv = pyramid.convs[0][0]
    total = cases.aspp_flops(
        shape._replace(in_channels=conv.in_channels, channels=conv.out_channels), batch
    )

    def count(conv: nn.Conv2d, inputs: tuple[Tensor], output: Tensor) -> None:
        nonlocal total
        total += cases.conv_flops(
            batch,
            conv.in_channels // conv.groups,
            conv.out_channels,
            tuple(inputs[0].shape[2:]),
            conv.dilation[0],
            conv.kernel_size[0],
            conv.stride[0],
        )

    in_pyramid = set(pyramid.modules())
    for module in counted.modules():
        if isinstance(module, nn.Conv2d) and module not in in_pyramid:
            module.register_forward_hook(count)
    counted(torch.empty(batch, 3, *shape.image, device="meta"))
    return total


if __name__ == "__main__":
    main()
