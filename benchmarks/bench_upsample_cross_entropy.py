"""Loss and gradient of low-resolution logits, against PyTorch's interpolate and cross_entropy.

On a GPU and with --full also torch.compile of PyTorch's.
"""

from __future__ import annotations

from collections.abc import Callable

import cases
import harness
import torch
import torch.nn.functional as F
from cases import Shape
from torch import Tensor

import deeplab_fast

IGNORED = 255

# Of harness.relative_error against fp32, of loss and gradient.
TOLERANCE = {"fp32": 1e-5, "tf32": 1e-5, "fp16": 1e-3, "bf16": 8e-3}


def main(argv: list[str] | None = None) -> None:
    args = harness.arguments(__doc__, argv)
    report = harness.Report("upsample_cross_entropy", args)
    gpu = args.device.type == "cuda"
    more = args.full or gpu
    default = [cases.VOC_OS8, cases.ADE_OS8] + [cases.CITYSCAPES_OS8] * gpu
    for shape in cases.select(args, default):
        for dtype in args.dtype:
            for batch in args.batch:
                torch.manual_seed(0)
                step(report, shape, dtype, batch, compile=more)
    report.finish()


def step(report: harness.Report, shape: Shape, dtype: str, batch: int, compile: bool) -> None:
    """Forward and backward of the loss, as training does them."""
    nchw = 3 * torch.randn(batch, shape.classes, *shape.feature, device=report.device)
    nchw = nchw.to(harness.DTYPES[dtype])
    last = nchw.contiguous(memory_format=torch.channels_last)
    target = labels(shape, batch, report.device)

    def ours(logits: Tensor) -> Tensor:
        return deeplab_fast.upsample_cross_entropy(logits, target, ignore_index=IGNORED)

    def theirs(logits: Tensor) -> Tensor:
        upsampled = F.interpolate(logits.float(), target.shape[1:], mode="bilinear")
        return F.cross_entropy(upsampled, target, ignore_index=IGNORED)

    baselines = {
        "PyTorch NCHW": trained(theirs, nchw),
        "PyTorch channels_last": trained(theirs, last),
    }
    if compile:
        compiled = harness.compiled(theirs, report.device)
        baselines["PyTorch compiled"] = trained(compiled, nchw)
    report.case(
        shape.name,
        batch=batch,
        dtype=dtype,
        reference=trained(theirs, nchw.float()),
        ours=harness.with_triton(
            {
                "deeplab_fast NCHW": trained(ours, nchw),
                "deeplab_fast channels_last": trained(ours, last),
            },
            report.device,
        ),
        baselines=baselines,
        tolerance=TOLERANCE[dtype],
        bytes=2 * nchw.nbytes + target.nbytes,
    )


def labels(shape: Shape, batch: int, device: torch.device) -> Tensor:
    """Patches of classes, some of them ignored."""
    target = torch.randint(shape.classes + 1, (batch, 1, *shape.feature), device=device)
    target[target == shape.classes] = IGNORED
    return F.interpolate(target.double(), shape.image).long().squeeze(1)


def trained(loss_of: Callable[[Tensor], Tensor], logits: Tensor) -> Callable[[], tuple]:
    leaf = logits.detach().requires_grad_()

    def run() -> tuple[Tensor, Tensor]:
        loss = loss_of(leaf)
        (grad,) = torch.autograd.grad(loss, leaf)
        return loss.detach(), grad

    return run


if __name__ == "__main__":
    main()
