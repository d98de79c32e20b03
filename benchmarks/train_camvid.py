"""DeepLabV3-ResNet50 on CamVid: this trainer, and torchvision's model in plain PyTorch.

Both train from scratch (no ImageNet weights) with one recipe: batches, augmentation, schedule and,
for each seed, initial weights are the same. Written are the test scores, the time per epoch and the
peak memory of each run as CSV, the curves as JSON and PNG. The time is that of the whole training,
reading of images included; neither model is evaluated meanwhile.

    python benchmarks/train_camvid.py CAMVID                     # three seeds; hours on one GPU
    python benchmarks/train_camvid.py CAMVID --tiny              # only to see that the code runs

CAMVID has images/{train,val,test} and labels/{train,val,test}, 11 classes and 11 to ignore.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import datetime
import io
import json
import os
import statistics
import tempfile
import time
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import torchvision
from harness import commit, device_name, write_atomically
from matplotlib.figure import Figure
from torch import Tensor, nn
from torchvision.models import segmentation
from tqdm import tqdm

from deeplab_fast.models import DeepLabV3, Preprocessing
from deeplab_fast.training import Recipe, SegmentationData, evaluate, folder, train
from deeplab_fast.training.loader import batches, steps_per_epoch

CLASSES = "Sky Building Pole Road Pavement Tree SignSymbol Fence Car Pedestrian Bicyclist".split()


class Torchvision(nn.Module):
    """torchvision's model with what evaluate() asks for; it upsamples to full size itself."""

    align_corners = False
    preprocessing = Preprocessing()

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def logits(self, images: Tensor) -> OrderedDict[str, Tensor]:
        return self.model(images)


def ours(
    data: SegmentationData, recipe: Recipe, device: torch.device, workers: int
) -> tuple[nn.Module, list[float]]:
    """The trained model, and the loss of every tenth update."""
    torch.manual_seed(recipe.seed)
    model = DeepLabV3("resnet50", len(CLASSES), aux_loss=True).to(device)
    with tempfile.TemporaryDirectory() as folder:
        train(
            model, data, None, recipe, folder, workers=workers, evaluate_every=recipe.epochs
        )  # fmt: skip
        rows = map(json.loads, Path(folder, "log.jsonl").read_text().splitlines())
        return model, [row["loss"] for row in rows]


def theirs(
    data: SegmentationData, recipe: Recipe, device: torch.device, workers: int
) -> tuple[nn.Module, list[float]]:
    """The same with the loop of torchvision's references/segmentation, and our batches."""
    torch.manual_seed(recipe.seed)  # the same weights: see DeepLabV3
    model = segmentation.deeplabv3_resnet50(
        weights=None, weights_backbone=None, num_classes=len(CLASSES), aux_loss=True
    )
    model.to(device, memory_format=torch.channels_last).train()
    optimizer = recipe.optimizer(model)
    dtype = getattr(torch, recipe.dtype)
    mean, std = (
        torch.tensor(x, device=device).view(3, 1, 1)
        for x in (Preprocessing().mean, Preprocessing().std)
    )
    steps = steps_per_epoch(len(data), recipe) * recipe.epochs
    torch.manual_seed(recipe.seed)
    losses = []
    loader = batches(data, recipe, 0, workers)
    for step, (pixels, target) in enumerate(tqdm(loader, "torchvision", steps, disable=None)):
        recipe.set_learning_rates(optimizer, step, steps)
        images = pixels.to(device, non_blocking=True).permute(0, 3, 1, 2)
        images = (images / 255 - mean) / std
        target = target.to(device, non_blocking=True).long()
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            out, aux = (
                F.cross_entropy(logits, target, ignore_index=255)
                for logits in model(images).values()
            )
            loss = out + recipe.aux_weight * aux
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        if (step + 1) % 10 == 0 or step + 1 == steps:
            losses.append(loss.item())
    return Torchvision(model), losses


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=Path, metavar="CAMVID")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=100)
    parser.add_argument("--workers", type=int, default=min(8, len(os.sched_getaffinity(0))))
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "local")
    parser.add_argument("--tiny", action="store_true", help="one epoch of toy crops, one seed")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = arguments(argv)
    device = torch.device(args.device)
    # 0.01 for 8 images is torchvision's; the rest are Recipe's defaults.
    recipe = Recipe(
        epochs=args.epochs, batch_size=8, crop=(360, 480), learning_rate=0.01, warmup=100,
        dtype="bfloat16" if device.type == "cuda" else "float32",
    )  # fmt: skip
    if args.tiny:
        recipe = dataclasses.replace(recipe, epochs=1, batch_size=2, crop=(33, 33))
    train_data, test_data = (
        folder(args.data, split, CLASSES, ignore=[11]) for split in ("train", "test")
    )
    rows: list[dict[str, Any]] = []
    curves: dict[str, list[float]] = {}
    for seed in args.seeds[:1] if args.tiny else args.seeds:
        for run in (ours, theirs) if seed % 2 == 0 else (theirs, ours):
            name = "deeplab_fast" if run is ours else "torchvision"
            row, losses = measured(
                run, train_data, test_data, dataclasses.replace(recipe, seed=seed), device,
                args.workers,
            )  # fmt: skip
            rows.append({"variant": name, "seed": seed, **row})
            curves[f"{name}, seed {seed}"] = losses
            print(", ".join(f"{key} {value}" for key, value in rows[-1].items()))
    now = datetime.datetime.now(datetime.timezone.utc)
    header = {
        "benchmark": "train_camvid, from scratch (no ImageNet weights)",
        "device": device_name(device),
        "versions": f"torch {torch.__version__}, torchvision {torchvision.__version__}",
        "commit": commit(),
        "date": now.isoformat(timespec="seconds"),
        "recipe": str(recipe),
    }
    args.output.mkdir(parents=True, exist_ok=True)
    stem = args.output / f"train_camvid-{now:%Y%m%d-%H%M%S}"
    text = io.StringIO()
    for key, value in header.items():
        print(f"# {key}: {value}", file=text)
    writer = csv.DictWriter(text, rows[0])
    writer.writeheader()
    writer.writerows(rows)
    write_atomically(stem.with_suffix(".csv"), text.getvalue().encode())
    write_atomically(stem.with_suffix(".json"), json.dumps(curves).encode())
    write_atomically(stem.with_suffix(".png"), picture(header, curves))
    for name in ("deeplab_fast", "torchvision"):
        scores = [row["test_miou"] for row in rows if row["variant"] == name]
        spread = f" (standard deviation {statistics.stdev(scores):.4f})" if scores[1:] else ""
        print(f"{name}: mean test mIoU {statistics.mean(scores):.4f}{spread}")
    print(f"written to {stem}.csv, .json and .png")


def measured(
    run: Any,
    train_data: SegmentationData,
    test_data: SegmentationData,
    recipe: Recipe,
    device: torch.device,
    workers: int,
) -> tuple[dict[str, float], list[float]]:
    """Train and test: what is measured, and the losses."""
    gpu = device.type == "cuda"
    if gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    start = time.perf_counter()
    model, losses = run(train_data, recipe, device, workers)
    if gpu:
        torch.cuda.synchronize(device)
    seconds = time.perf_counter() - start
    peak = torch.cuda.max_memory_allocated(device) / 2**20 if gpu else float("nan")
    dtype = getattr(torch, recipe.dtype)
    scores = evaluate(model.eval(), test_data, dtype=dtype, workers=workers)
    return {
        "test_miou": round(scores.miou, 5),
        "test_pixel_accuracy": round(scores.pixel_accuracy, 5),
        "seconds_per_epoch": round(seconds / recipe.epochs, 3),
        "peak_mib": round(peak, 1),
    }, losses


def picture(header: dict[str, str], curves: dict[str, list[float]]) -> bytes:
    figure = Figure(figsize=(9, 5), layout="constrained")
    axes = figure.subplots()
    for name, losses in curves.items():
        axes.plot(losses, label=name, linestyle="-" if name.startswith("deeplab_fast") else ":")
    axes.set_xlabel("every tenth update")
    axes.set_ylabel("training loss")
    axes.set_title(f"{header['benchmark']}\n{header['device']}", fontsize=9)
    axes.legend(fontsize=8)
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=120)
    return content.getvalue()


if __name__ == "__main__":
    main()
