"""Labels from low-resolution logits, against PyTorch's interpolate and argmax.

How fast that can be depends on the logits: most cells between four low-resolution pixels have one
class that wins everywhere in them if a trained network made the logits, and few if they are white
noise. Both are measured; the lines above the tables say how many classes can win. The trained-like
logits are generated, smooth random regions; real ones come with --logits.

On a GPU and with --full also torch.compile of PyTorch's.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import cases
import harness
import numpy as np
import torch
import torch.nn.functional as F
from cases import Shape
from torch import Tensor

import deeplab_fast

# Of regret().
TOLERANCE = {"fp32": 1e-4, "tf32": 1e-4, "fp16": 2e-3, "bf16": 2e-2}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument(
        "--logits",
        type=Path,
        metavar="FILE.npz",
        help="an array 'logits' [N, C, H, W] of a trained network, instead of the generated ones; "
        "mirrored or cropped, and classes added or left out, where a shape is another",
    )
    args = harness.arguments(__doc__, argv, parents=[parser])
    real = None if args.logits is None else load(parser, args.logits)
    report = harness.Report("upsample_argmax", args)
    default = [cases.VOC_OS8, cases.ADE_OS8, cases.CITYSCAPES_OS8]
    for shape in cases.select(args, default):
        for dtype in args.dtype:
            for batch in args.batch:
                torch.manual_seed(0)
                if real is None:
                    measure(report, shape, dtype, "trained-like", trained_like(shape, batch))
                else:
                    measure(report, shape, dtype, args.logits.stem, fitted(real, shape, batch))
                noise = torch.randn(batch, shape.classes, *shape.feature)
                measure(report, shape, dtype, "white noise", noise)
    report.finish()


def measure(report: harness.Report, shape: Shape, dtype: str, kind: str, logits: Tensor) -> None:
    mean, single = candidates(logits[0])
    statistics = f"{mean:.2f} classes can win in a cell on average, one in {single:.0%} of cells"
    print(f"\n{shape.name}, {kind} logits: {statistics}")
    report.header[f"{shape.name} {kind}"] = statistics
    nchw = logits.to(report.device, harness.DTYPES[dtype])
    last = nchw.contiguous(memory_format=torch.channels_last)

    def theirs(logits: Tensor) -> Tensor:
        return F.interpolate(logits, shape.image, mode="bilinear").argmax(1)

    def ours(logits: Tensor, dtype: torch.dtype = torch.int64) -> Tensor:
        return deeplab_fast.upsample_argmax(logits, shape.image, dtype=dtype)

    baselines = {
        "PyTorch NCHW": lambda: theirs(nchw),
        "PyTorch channels_last": lambda: theirs(last),
    }
    if report.args.full or report.device.type == "cuda":
        compiled = harness.compiled(theirs, report.device)
        baselines["PyTorch compiled"] = lambda: compiled(nchw)
    report.case(
        f"{shape.name}, {kind}",
        batch=len(nchw),
        dtype=dtype,
        reference=lambda: F.interpolate(nchw.float(), shape.image, mode="bilinear"),
        ours=harness.with_triton(
            {
                "deeplab_fast NCHW": lambda: ours(nchw),
                "deeplab_fast channels_last": lambda: ours(last),
                "deeplab_fast uint8 labels": lambda: ours(last, torch.uint8),
            },
            report.device,
        ),
        baselines=baselines,
        error=regret,
        tolerance=TOLERANCE[dtype],
        bytes=nchw.nbytes + 8 * len(nchw) * shape.image[0] * shape.image[1],
    )


def regret(labels: Tensor, upsampled: Tensor) -> float:
    """How far a pixel's label is below its best class, at worst, over the largest |logit|.

    Not the fraction of other labels: where two classes tie to within rounding, PyTorch's answers in
    different memory formats differ too.
    """
    if labels.shape != upsampled[:, 0].shape:
        return float("inf")
    chosen = upsampled.gather(1, labels.long()[:, None])
    gap = (upsampled.amax(1, keepdim=True) - chosen).max()
    return (gap / upsampled.abs().max()).item()


def trained_like(shape: Shape, batch: int) -> Tensor:
    """Logits of an imagined image: smooth regions of a few classes, all others far below."""

    def smooth(classes: int, grain: int) -> Tensor:
        height, width = (-(-side // grain) + 1 for side in shape.feature)
        coarse = torch.randn(batch, classes, height, width)
        return F.interpolate(coarse, shape.feature, mode="bicubic", align_corners=True)

    logits = 2 * smooth(shape.classes, 8) - 5
    present = torch.randperm(shape.classes)[:4]
    logits[:, present] = 8 * smooth(len(present), 24) + smooth(len(present), 4)
    return logits


def load(parser: argparse.ArgumentParser, path: Path) -> Tensor:
    try:
        logits = np.load(path)["logits"]
    except (OSError, KeyError, ValueError, IndexError) as problem:
        parser.error(f"--logits: expected an .npz file with an array 'logits', {path}: {problem}")
    if logits.ndim != 4:
        parser.error(f"--logits: expected [N, C, H, W], got shape {logits.shape}")
    return torch.from_numpy(logits).float()


def fitted(logits: Tensor, shape: Shape, batch: int) -> Tensor:
    """Real logits in another shape; classes that they lack are lowered, uneven copies of theirs."""
    logits = logits[torch.arange(batch) % len(logits)]
    for dim, size in zip((2, 3), shape.feature):
        while logits.size(dim) < size:
            logits = torch.cat([logits, logits.flip(dim)], dim)
        logits = logits.narrow(dim, 0, size)
    missing = shape.classes - logits.size(1)
    if missing > 0:
        copies = logits[:, torch.randint(logits.size(1), (missing,))]
        copies += 0.3 * torch.randn(copies.shape) - 1 - 2 * torch.rand(missing, 1, 1)
        logits = torch.cat([logits, copies], dim=1)
    return logits[:, : shape.classes].contiguous()


def candidates(logits: Tensor) -> tuple[float, float]:
    """Over all cells of [C, H, W]: the mean number of classes that can win in one, and the fraction
    of cells with only one.

    A class cannot win where another is greater at all four corners.
    """
    corners = torch.stack(
        [logits[:, :-1, :-1], logits[:, :-1, 1:], logits[:, 1:, :-1], logits[:, 1:, 1:]]
    )
    count = torch.zeros(corners.shape[2:])
    for c in range(len(logits)):
        count += ~(corners > corners[:, c : c + 1]).all(0).any(0)
    return count.mean().item(), (count == 1).float().mean().item()


if __name__ == "__main__":
    main()
