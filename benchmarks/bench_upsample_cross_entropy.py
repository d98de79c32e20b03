"""Benchmark the loss of low-resolution logits and its gradient against PyTorch.

PyTorch's version is F.cross_entropy of F.interpolate. On a GPU or with --full, torch.compile of it
is timed too.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from common import cases, harness, variants
from common.cases import Shape
from torch import Tensor

import deeplab_fast

IGNORE_INDEX = 255

# Largest harness.relative_error of loss and gradient against fp32.
TOLERANCE = {"fp32": 1e-5, "tf32": 1e-5, "fp16": 1e-3, "bf16": 8e-3}


def main(argv: list[str] | None = None) -> None:
    args = harness.arguments(__doc__, argv)
    report = harness.Report("upsample_cross_entropy", args)
    gpu = args.device.type == "cuda"
    default = [cases.VOC_OS8, cases.ADE_OS8] + [cases.CITYSCAPES_OS8] * gpu
    for shape in cases.select(args, default):
        for dtype in args.dtype:
            for batch in args.batch:
                torch.manual_seed(0)
                step(report, shape, dtype, batch, compile=args.full or gpu)
    report.finish()


def step(report: harness.Report, shape: Shape, dtype: str, batch: int, compile: bool) -> None:
    """A case of the loss, forward and backward, as in training."""
    nchw = 3 * torch.randn(batch, shape.classes, *shape.feature, device=report.device)
    nchw = nchw.to(harness.DTYPES[dtype])
    channels_last = nchw.contiguous(memory_format=torch.channels_last)
    target = labels(shape, batch, report.device)

    def ours(logits: Tensor) -> Tensor:
        return deeplab_fast.upsample_cross_entropy(logits, target, ignore_index=IGNORE_INDEX)

    def theirs(logits: Tensor) -> Tensor:
        upsampled = F.interpolate(logits.float(), target.shape[1:], mode="bilinear")
        return F.cross_entropy(upsampled, target, ignore_index=IGNORE_INDEX)

    baselines = {
        "PyTorch NCHW": with_gradient(theirs, nchw),
        "PyTorch channels_last": with_gradient(theirs, channels_last),
    }
    if compile:
        compiled = variants.compiled(theirs, report.device)
        baselines["PyTorch compiled"] = with_gradient(compiled, nchw)
    report.case(
        shape.name,
        batch=batch,
        dtype=dtype,
        reference=with_gradient(theirs, nchw.float()),
        ours=variants.with_triton(
            {
                "deeplab_fast NCHW": with_gradient(ours, nchw),
                "deeplab_fast channels_last": with_gradient(ours, channels_last),
            },
            report.device,
        ),
        baselines=baselines,
        tolerance=TOLERANCE[dtype],
        bytes=2 * nchw.nbytes + target.nbytes,
    )


def labels(shape: Shape, batch: int, device: torch.device) -> Tensor:
    """Random targets [N, H, W], constant over patches; some are IGNORE_INDEX."""
    target = torch.randint(shape.classes + 1, (batch, 1, *shape.feature), device=device)
    target[target == shape.classes] = IGNORE_INDEX
    return F.interpolate(target.double(), shape.image).long().squeeze(1)


def with_gradient(loss_of: Callable[[Tensor], Tensor], logits: Tensor) -> Callable[[], tuple]:
    """A call that computes the loss of ``logits`` and its gradient."""
    leaf = logits.detach().requires_grad_()

    def run() -> tuple[Tensor, Tensor]:
        loss = loss_of(leaf)
        (grad,) = torch.autograd.grad(loss, leaf)
        return loss.detach(), grad

    return run


if __name__ == "__main__":
    main()
