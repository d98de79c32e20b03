"""Benchmark upsampling fused with argmax against PyTorch's interpolate and argmax.

The speed depends on the logits. In most cells between four low-resolution pixels of a trained
network's logits a single class wins everywhere; in few cells of random logits one does. Both kinds
are timed, and the line above each table says how many classes can win. By default smooth random
regions stand in for a trained network's logits ("trained-like logits"); pass real ones with
--logits ("trained logits").

On a GPU or with --full, torch.compile of PyTorch's version is timed too.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from common import cases, harness, variants
from common.cases import Shape
from torch import Tensor

import deeplab_fast

# Largest regret().
TOLERANCE = {"fp32": 1e-4, "tf32": 1e-4, "fp16": 2e-3, "bf16": 2e-2}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument(
        "--logits",
        type=Path,
        metavar="FILE.npz",
        help="array 'logits' [N, C, H, W] of a trained network, instead of generated ones; it is "
        "reflected or cropped, and classes are added or dropped, to fit each shape",
    )
    args = harness.arguments(__doc__, argv, parents=[parser])
    trained = None if args.logits is None else load(parser, args.logits)
    report = harness.Report("upsample_argmax", args)
    if args.logits is not None:
        report.header["trained logits"] = args.logits.name
    default = [cases.VOC_OS8, cases.ADE_OS8, cases.CITYSCAPES_OS8]
    for shape in cases.select(args, default):
        for dtype in args.dtype:
            for batch in args.batch:
                torch.manual_seed(0)
                if trained is None:
                    logits = trained_like(shape, batch)
                    measure(report, shape, dtype, "trained-like logits", logits)
                else:
                    logits = fitted(trained, shape, batch)
                    measure(report, shape, dtype, "trained logits", logits)
                logits = torch.randn(batch, shape.classes, *shape.feature)
                measure(report, shape, dtype, "random logits", logits)
    report.finish()


def measure(report: harness.Report, shape: Shape, dtype: str, kind: str, logits: Tensor) -> None:
    mean, single = candidates(logits[0])
    statistics = f"{mean:.2f} classes per cell can win on average, 1 class in {single:.0%} of cells"
    print(f"\n{shape.name}, {kind}: {statistics}")
    report.header[f"{shape.name} {kind}"] = statistics
    nchw = logits.to(report.device, harness.DTYPES[dtype])
    channels_last = nchw.contiguous(memory_format=torch.channels_last)

    def theirs(logits: Tensor) -> Tensor:
        return F.interpolate(logits, shape.image, mode="bilinear").argmax(1)

    def ours(logits: Tensor, dtype: torch.dtype = torch.int64) -> Tensor:
        return deeplab_fast.upsample_argmax(logits, shape.image, dtype=dtype)

    baselines = {
        "PyTorch NCHW": lambda: theirs(nchw),
        "PyTorch channels_last": lambda: theirs(channels_last),
    }
    if report.args.full or report.device.type == "cuda":
        compiled = variants.compiled(theirs, report.device)
        baselines["PyTorch compiled"] = lambda: compiled(nchw)
    report.case(
        f"{shape.name}, {kind}",
        batch=len(nchw),
        dtype=dtype,
        reference=lambda: F.interpolate(nchw.float(), shape.image, mode="bilinear"),
        ours=variants.with_triton(
            {
                "deeplab_fast NCHW": lambda: ours(nchw),
                "deeplab_fast channels_last": lambda: ours(channels_last),
                "deeplab_fast uint8 labels": lambda: ours(channels_last, torch.uint8),
            },
            report.device,
        ),
        baselines=baselines,
        error=regret,
        tolerance=TOLERANCE[dtype],
        bytes=nchw.nbytes + 8 * len(nchw) * shape.image[0] * shape.image[1],
    )


def regret(labels: Tensor, upsampled: Tensor) -> float:
    """Largest difference of a pixel's best logit and its label's logit, over the largest |logit|.

    The fraction of differing labels would not do: where two classes tie to within rounding,
    PyTorch's own labels depend on the memory format.
    """
    if labels.shape != upsampled[:, 0].shape:
        return float("inf")
    label_logits = upsampled.gather(1, labels.long()[:, None])
    gap = (upsampled.amax(1, keepdim=True) - label_logits).max()
    return (gap / upsampled.abs().max()).item()


def trained_like(shape: Shape, batch: int) -> Tensor:
    """Smooth regions of a few classes, with all other classes far below."""

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
    except (OSError, KeyError, ValueError, IndexError) as error:
        parser.error(f"--logits: expected an .npz file with an array 'logits', {path}: {error}")
    if logits.ndim != 4:
        parser.error(f"--logits: expected an array [N, C, H, W], got shape {logits.shape}")
    return torch.from_numpy(logits).float()


def fitted(logits: Tensor, shape: Shape, batch: int) -> Tensor:
    """A network's logits in another shape.

    Missing classes are filled with lowered, perturbed copies of those that are there.
    """
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
    """Mean number of classes that can win in a cell of [C, H, W]; the fraction of cells with one.

    A class cannot win in a cell if another class is greater at all four corners.
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
