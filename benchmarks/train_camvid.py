"""Train DeepLabV3-ResNet50 on CamVid with deeplab_fast, and torchvision's model in plain PyTorch.

Both train from scratch (no ImageNet weights) with the same recipe: equal batches, augmentation,
learning rates and, for each seed, initial weights. Neither is evaluated during training. The time
is that of all updates, including reading the images.

    python benchmarks/train_camvid.py CAMVID          # three seeds of each, one after the other
    python benchmarks/train_camvid.py CAMVID --tiny   # smoke test

Each run writes its scores and losses to --output as VARIANT-SEED.json. Runs whose file exists are
skipped, so an interrupted command can be repeated, and the work can be split; the table (CSV) and
the plot show all runs in the folder:

    python benchmarks/train_camvid.py CAMVID --output results --variants torchvision --seeds 0
    python benchmarks/train_camvid.py CAMVID --output results --variants deeplab_fast --seeds 0 1

CAMVID holds images/{train,val,test} and labels/{train,val,test}, with classes 0 to 10 and 11 for
pixels to ignore.
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

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from common.environment import commit, device_name, write_atomically
from matplotlib.figure import Figure
from torch import Tensor, nn
from torchvision.models import segmentation
from tqdm import tqdm

from deeplab_fast.models import DeepLabV3, Preprocessing
from deeplab_fast.training import Recipe, SegmentationData, evaluate, folder, train
from deeplab_fast.training.loader import batches, steps_per_epoch

LOG_EVERY = 10  # updates between two points of a loss curve
CLASSES = "Sky Building Pole Road Pavement Tree SignSymbol Fence Car Pedestrian Bicyclist".split()


class Torchvision(nn.Module):
    """torchvision's model with the attributes that evaluate() needs; its logits have full size."""

    align_corners = False
    preprocessing = Preprocessing()

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def logits(self, images: Tensor) -> OrderedDict[str, Tensor]:
        return self.model(images)


def ours(
    data: SegmentationData, recipe: Recipe, device: torch.device, workers: int
) -> tuple[nn.Module, list[float], float]:
    """Train our model: returns it, the loss of every tenth update and the total seconds."""
    torch.manual_seed(recipe.seed)
    model = DeepLabV3("resnet50", len(CLASSES), aux_loss=True).to(device)
    with tempfile.TemporaryDirectory() as folder:
        train(
            model, data, None, recipe, folder, workers=workers, evaluate_every=recipe.epochs,
            log_every=LOG_EVERY,
        )  # fmt: skip
        rows = list(map(json.loads, Path(folder, "log.jsonl").read_text().splitlines()))
    steps = [0, *(row["step"] for row in rows)]
    seconds = sum(
        (step - before) * recipe.batch_size / row["images_per_second"]
        for before, step, row in zip(steps, steps[1:], rows)
    )
    return model, [row["loss"] for row in rows], seconds


def theirs(
    data: SegmentationData, recipe: Recipe, device: torch.device, workers: int
) -> tuple[nn.Module, list[float], float]:
    """Train torchvision's model on our batches, in the loop of its references/segmentation."""
    torch.manual_seed(recipe.seed)  # gives the same initial weights as DeepLabV3
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
    start = time.perf_counter()
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
        if (step + 1) % LOG_EVERY == 0 or step + 1 == steps:
            losses.append(loss.item())  # waits for the update
    return Torchvision(model), losses, time.perf_counter() - start


VARIANTS = {"deeplab_fast": ours, "torchvision": theirs}


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=Path, metavar="CAMVID")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=100)
    parser.add_argument("--workers", type=int, default=min(8, len(os.sched_getaffinity(0))))
    parser.add_argument(
        "--output", type=Path, default=Path(__file__).parent / "results/local/train_camvid"
    )
    parser.add_argument(
        "--tiny", action="store_true", help="one epoch of tiny crops, as a smoke test"
    )
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = arguments(argv)
    device = torch.device(args.device)
    # A learning rate of 0.01 for 8 images is torchvision's; the others are defaults of Recipe.
    recipe = Recipe(
        epochs=args.epochs, batch_size=8, crop_size=(360, 480), learning_rate=0.01,
        warmup_steps=100,
        dtype="bfloat16" if device.type == "cuda" else "float32",
    )  # fmt: skip
    if args.tiny:
        recipe = dataclasses.replace(recipe, epochs=1, batch_size=2, crop_size=(33, 33))
    header = {
        "benchmark": "train_camvid, from scratch (no ImageNet weights)",
        "device": device_name(device),
        "versions": f"torch {torch.__version__}, torchvision {torchvision.__version__}",
        "recipe": str(recipe),
    }
    train_data, test_data = (
        folder(args.data, split, CLASSES, ignore=[11]) for split in ("train", "test")
    )
    results(args.output, header)
    for seed in args.seeds:
        for variant in args.variants if seed % 2 == 0 else reversed(args.variants):
            path = args.output / f"{variant}-{seed}.json"
            if not path.exists():
                row, losses = measured(
                    VARIANTS[variant], train_data, test_data,
                    dataclasses.replace(recipe, seed=seed), device, args.workers,
                )  # fmt: skip
                run = {"variant": variant, "seed": seed, **row, "commit": commit(), "date": now()}
                content = {"header": header, "run": run, "losses": losses}
                write_atomically(path, json.dumps(content).encode())
    summarize(args.output, header)


def results(output: Path, header: dict[str, str]) -> list[dict[str, Any]]:
    """The runs in ``output``, which must all have the same header."""
    contents = []
    for path in sorted(output.glob("*-*.json")):
        contents.append(json.loads(path.read_text()))
        for key, value in contents[-1]["header"].items():
            if value != header.get(key):
                raise SystemExit(
                    f"{path}: {key}: expected {header.get(key)!r}, got {value!r}; "
                    "choose another --output"
                )
    return contents


def summarize(output: Path, header: dict[str, str]) -> None:
    """Write the table and the plot of all runs in ``output``, and print their means."""
    contents = results(output, header)
    runs = [content["run"] for content in contents]
    for run in runs:
        print(", ".join(f"{key} {value}" for key, value in run.items()))
    text = io.StringIO()
    for key, value in header.items():
        print(f"# {key}: {value}", file=text)
    writer = csv.DictWriter(text, runs[0])
    writer.writeheader()
    writer.writerows(runs)
    write_atomically(output / "train_camvid.csv", text.getvalue().encode())
    write_atomically(output / "train_camvid.png", plot(header, contents))
    for variant in VARIANTS:
        scores = [run["test_miou"] for run in runs if run["variant"] == variant]
        if scores:
            deviation = f", standard deviation {statistics.stdev(scores):.4f}" if scores[1:] else ""
            print(
                f"{variant}: mean test mIoU {statistics.mean(scores):.4f} of {len(scores)} seeds, "
                f"{min(scores):.4f} to {max(scores):.4f}{deviation}"
            )
    print(f"written to {output}/train_camvid.csv and .png")


def now() -> str:
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")


def measured(
    run: Any,
    train_data: SegmentationData,
    test_data: SegmentationData,
    recipe: Recipe,
    device: torch.device,
    workers: int,
) -> tuple[dict[str, float], list[float]]:
    """Train and test one variant: returns the measurements and the losses."""
    gpu = device.type == "cuda"
    if gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    model, losses, seconds = run(train_data, recipe, device, workers)
    peak = torch.cuda.max_memory_allocated(device) / 2**20 if gpu else float("nan")
    dtype = getattr(torch, recipe.dtype)
    scores = evaluate(model.eval(), test_data, dtype=dtype, workers=workers)
    return {
        "test_miou": round(scores.miou, 5),
        "test_pixel_accuracy": round(scores.pixel_accuracy, 5),
        "seconds_per_epoch": round(seconds / recipe.epochs, 3),
        "peak_mib": round(peak, 1),
    }, losses


def plot(header: dict[str, str], contents: list[dict[str, Any]]) -> bytes:
    """A PNG of the smoothed training loss of every run and its test mIoU."""
    figure = Figure(figsize=(10, 4.5), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(3, 1))
    for content in contents:
        losses, variant = content["losses"], content["run"]["variant"]
        label = f"{variant}, seed {content['run']['seed']}"
        color = f"C{list(VARIANTS).index(variant)}"
        window = max(1, len(losses) // 50)  # points averaged
        smooth = np.convolve(losses, np.full(window, 1 / window), "valid")
        updates = LOG_EVERY * (np.arange(len(smooth)) + window)
        left.plot(updates, smooth, color=color, linewidth=1, label=label)
        right.plot(variant, content["run"]["test_miou"], "o", color=color, alpha=0.7)
    left.set_xlabel("update")
    left.set_ylabel("training loss")
    left.legend(fontsize=8)
    right.set_ylabel("test mIoU")
    right.margins(x=0.5)
    figure.suptitle(f"{header['benchmark']}\n{header['device']}", fontsize=9)
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=120)
    return content.getvalue()


if __name__ == "__main__":
    main()
