"""DeepLab-v3 from images to labels: deeplab_fast against torchvision's model.

On a GPU and with --full also torch.compile; on a GPU also each of the kernels of convolutions in
every layer that it takes, where the automatic choice may pass it over, and at batch 1 everything
once more without CUDA graphs, Python's part included; with --full on the CPU also ONNX Runtime and
OpenVINO, where `pip install ".[peers]"` brought them.
"""

from __future__ import annotations

import copy

import cases
import harness
import peers
import torch
from cases import Shape
from torch import Tensor, nn

from deeplab_fast.backends import dispatch_table, registry
from deeplab_fast.models import DeepLabV3

# Of regret() against fp32.
TOLERANCE = {"fp32": 1e-6, "tf32": 1e-2, "fp16": 1e-2, "bf16": 1e-1}

DEFAULT = [
    ("resnet50", cases.VOC_OS8),
    ("resnet50", cases.VOC_OS16),
    ("mobilenet_v2", cases.VOC_OS16),
]
FULL = [*DEFAULT, ("resnet101", cases.VOC_OS8), ("resnet50", cases.CITYSCAPES_OS8)]
TINY = [("resnet50", cases.TINY)]


def main(argv: list[str] | None = None) -> None:
    args = harness.arguments(__doc__, argv)
    report = harness.Report("model", args)
    for backbone, shape in TINY if args.tiny else FULL if args.full else DEFAULT:
        model = trained_like(backbone, shape).to(report.device)
        for dtype in args.dtype:
            for batch in args.batch:
                inference(report, backbone, shape, dtype, batch, model)
    report.finish()


@torch.no_grad()
def inference(
    report: harness.Report, backbone: str, shape: Shape, dtype: str, batch: int, model: DeepLabV3
) -> None:
    """From normalised images in the dtype at hand to int64 labels of the same size."""
    images = torch.randn(batch, 3, *shape.image, device=report.device)
    nchw = images.to(harness.DTYPES[dtype])
    last = nchw.contiguous(memory_format=torch.channels_last)
    peer_name, twin = peers.model(model)
    peer = peers.Labels(twin).eval()
    baselines = {
        f"{peer_name} NCHW": peers.applied(peer, nchw),
        f"{peer_name} channels_last": peers.applied(peer, last),
    }
    gpu = report.device.type == "cuda"
    if gpu or report.args.full:
        baselines[f"{peer_name} compiled"] = peers.applied(peer, last, compile=True)
    if report.args.full and not gpu:
        baselines |= peers.engines(peer, images, dtype)
    prepared = model.prepare_for_inference(nchw.dtype)
    drop_in = copy.deepcopy(model).to(nchw.dtype, memory_format=torch.channels_last)
    ours = {
        "deeplab_fast prepared": lambda: prepared.predict(last),
        "deeplab_fast.DeepLabV3": lambda: drop_in.predict(last),
    }
    if gpu:
        for kernel in dispatch_table.KERNELS:
            if registry.unavailable_reason(kernel, "cuda") is None:
                name = f"deeplab_fast prepared, {kernel} where it can"
                ours[name] = harness.preferring(ours["deeplab_fast prepared"], kernel)
    for suffix, graphs in timings(report.device, batch).items():
        report.case(
            f"{backbone} {shape.name}{suffix}",
            batch=batch,
            dtype=dtype,
            reference=lambda: twin(images)["out"],
            ours=ours,
            baselines=baselines,
            error=regret,
            tolerance=TOLERANCE[dtype],
            flops=flops(model, shape, batch),
            graphs=graphs,
        )


def timings(device: torch.device, batch: int) -> dict[str, bool]:
    """Suffix of a case's name -> whether its variants are timed in CUDA graphs.

    Graphs hide what Python and the launches of some hundred kernels take, which at batch 1 can be
    longer than the kernels themselves. On a CPU all times include it.
    """
    if device.type == "cuda" and batch == 1:
        return {"": True, ", called from Python": False}
    return {"": True}


@torch.no_grad()
def trained_like(backbone: str, shape: Shape) -> DeepLabV3:
    """A network with random weights whose batch norms have seen data, as a trained one's have."""
    torch.manual_seed(0)
    model = DeepLabV3(backbone, shape.classes, shape.output_stride, shape.rates)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
    model.train()(torch.randn(8, 3, 33, 33))
    return model.eval()


def regret(labels: Tensor, logits: Tensor) -> float:
    """The mean gap between a pixel's best reference logit and that of its label.

    In units of the reference logits' standard deviation; labels at random have 1 or more. Two
    classes that tie to within rounding may be swapped, which the fraction of other labels would
    punish as much as a wrong one.
    """
    if labels.shape != logits[:, 0].shape:
        return float("inf")
    chosen = logits.gather(1, labels[:, None])
    return ((logits.amax(1, keepdim=True) - chosen).mean() / logits.std()).item()


def flops(model: DeepLabV3, shape: Shape, batch: int) -> int:
    """Exact operations of all convolutions; the pyramid's as in cases.aspp_flops."""
    pyramid = model.classifier[0].convs[0][0]
    total = cases.aspp_flops(
        shape._replace(in_channels=pyramid.in_channels, channels=pyramid.out_channels), batch
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

    counted = copy.deepcopy(model).to("meta")
    for part in (counted.backbone, *counted.classifier[1:]):
        for module in part.modules():
            if isinstance(module, nn.Conv2d):
                module.register_forward_hook(count)
    counted(torch.empty(batch, 3, *shape.image, device="meta"))
    return total


if __name__ == "__main__":
    main()
