"""Benchmark atrous spatial pyramid pooling (ASPP) in inference against torchvision's.

On a GPU or with --full, torch.compile is timed too, and so is each convolution alone: forward,
gradient of the input (dgrad) and of the weight (wgrad), in NCHW and channels_last. On a GPU cuDNN
chooses its algorithm by heuristics, by timing all (cudnn.benchmark), or among deterministic ones.
"""

from __future__ import annotations

import torch
from common import cases, harness, peers
from common.cases import Shape
from common.convolutions import branches, convolutions, ours_by_name
from common.variants import forced
from torch import nn

from deeplab_fast.models.fusion import FoldedASPP
from deeplab_fast.nn import ASPP

# Largest harness.relative_error against fp32; that of a wrong kernel is about 1.
TOLERANCE = {"fp32": 1e-5, "tf32": 5e-3, "fp16": 5e-3, "bf16": 3e-2}


def main(argv: list[str] | None = None) -> None:
    args = harness.arguments(__doc__, argv, gpu_dtypes=("bf16", "fp16", "tf32"))
    report = harness.Report("aspp", args)
    thorough = args.full or args.device.type == "cuda"
    for shape in cases.select(args, [cases.VOC_OS16, cases.VOC_OS8]):
        for dtype in args.dtype:
            for batch in args.batch:
                torch.manual_seed(0)
                inference(report, shape, dtype, batch, compile=thorough)
                if thorough or args.tiny:
                    branches(report, shape, dtype, batch)
                    convolutions(report, shape, dtype, batch)
    report.finish()


@torch.no_grad()
def inference(report: harness.Report, shape: Shape, dtype: str, batch: int, compile: bool) -> None:
    """A case for the whole module in eval mode, from the backbone's features to 256 channels."""
    module = ASPP(shape.in_channels, shape.atrous_rates, shape.channels).eval()
    randomize_norms(module)
    module.to(report.device)
    peer_name, peer = peers.aspp(module)
    nchw = cases.features(shape, batch, harness.DTYPES[dtype], report.device)
    channels_last = nchw.contiguous(memory_format=torch.channels_last)
    baselines = {
        f"{peer_name} NCHW": peers.applied(peer, nchw),
        f"{peer_name} channels_last": peers.applied(peer, channels_last),
    }
    folded = FoldedASPP(module).to(channels_last.dtype)
    ours = {
        f"{name.replace('fast', 'fast.aspp')}, folded": forced(
            peers.applied(folded, channels_last), backend
        )
        for name, backend in ours_by_name(dtype, "aspp", channels_last, *folded.operands()).items()
    }
    ours["deeplab_fast.ASPP channels_last"] = peers.applied(module, channels_last)
    ours["deeplab_fast.ASPP NCHW"] = peers.applied(module, nchw)
    if compile:
        baselines[f"{peer_name} compiled"] = peers.applied(peer, channels_last, compile=True)
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
    """Give batch norms weights and statistics that change their input, as after training."""
    for norm in module.modules():
        if isinstance(norm, nn.BatchNorm2d):
            for positive in (norm.weight, norm.running_var):
                positive.data.uniform_(0.5, 1.5)
            for signed in (norm.bias, norm.running_mean):
                signed.data.normal_(0, 0.1)


if __name__ == "__main__":
    main()
