"""Atrous spatial pyramid pooling in inference: deeplab_fast against torchvision's.

On a GPU and with --full also torch.compile, and each of the convolutions alone: forward, gradient
of the input (dgrad) and of the weight (wgrad), in NCHW and channels_last, on a GPU with cuDNN's
algorithm chosen by heuristics, by search (cudnn.benchmark) or among the deterministic ones.
"""

from __future__ import annotations

import cases
import harness
import peers
import torch
from cases import Shape
from convolutions import branches, convolutions, ours_by_name
from torch import nn

from deeplab_fast.models.inference import FoldedASPP
from deeplab_fast.nn import ASPP

# Of harness.relative_error against fp32; a wrong kernel is off by about 1.
TOLERANCE = {"fp32": 1e-5, "tf32": 5e-3, "fp16": 5e-3, "bf16": 3e-2}


def main(argv: list[str] | None = None) -> None:
    args = harness.arguments(__doc__, argv, gpu_dtypes=("bf16", "fp16", "tf32"))
    report = harness.Report("aspp", args)
    more = args.full or args.device.type == "cuda"
    for shape in cases.select(args, [cases.VOC_OS16, cases.VOC_OS8]):
        for dtype in args.dtype:
            for batch in args.batch:
                torch.manual_seed(0)
                inference(report, shape, dtype, batch, compile=more)
                if more or args.tiny:
                    branches(report, shape, dtype, batch)
                    convolutions(report, shape, dtype, batch)
    report.finish()


@torch.no_grad()
def inference(report: harness.Report, shape: Shape, dtype: str, batch: int, compile: bool) -> None:
    """The whole module in evaluation mode, from the backbone's features to 256 channels."""
    module = ASPP(shape.in_channels, shape.rates, shape.channels).eval()
    randomize_norms(module)
    module.to(report.device)
    peer_name, peer = peers.aspp(module)
    nchw = cases.features(shape, batch, harness.DTYPES[dtype], report.device)
    last = nchw.contiguous(memory_format=torch.channels_last)
    baselines = {
        f"{peer_name} NCHW": peers.applied(peer, nchw),
        f"{peer_name} channels_last": peers.applied(peer, last),
    }
    folded = FoldedASPP(module).to(last.dtype)
    ours = {
        f"{name.replace('fast', 'fast.aspp')}, folded": harness.forced(
            peers.applied(folded, last), backend
        )
        for name, backend in ours_by_name(dtype, "aspp", last, *folded.operands()).items()
    }
    ours["deeplab_fast.ASPP channels_last"] = peers.applied(module, last)
    ours["deeplab_fast.ASPP NCHW"] = peers.applied(module, nchw)
    if compile:
        baselines[f"{peer_name} compiled"] = peers.applied(peer, last, compile=True)
    report.case(
        shape.name,
        batch=batch,
        dtype=dtype,
        reference=lambda: peers.PlainASPP(module)(nchw.float()),
        ours=ours,
        baselines=baselines,
        tolerance=TOLERANCE[dtype],
        flops=cases.aspp_flops(shape, batch),
    )


def randomize_norms(module: nn.Module) -> None:
    """Batch norms that do something, as trained ones do."""
    for norm in module.modules():
        if isinstance(norm, nn.BatchNorm2d):
            for positive in (norm.weight, norm.running_var):
                positive.data.uniform_(0.5, 1.5)
            for signed in (norm.bias, norm.running_mean):
                signed.data.normal_(0, 0.1)


if __name__ == "__main__":
    main()
