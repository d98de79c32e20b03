"""The runs of train_camvid.py: each trains one variant, in a process of its own."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import multiprocessing
import statistics
import tempfile
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

import deeplab_fast
from deeplab_fast.cli.allocator import keep_freed_memory
from deeplab_fast.models import DeepLabV3, Preprocessing
from deeplab_fast.nn import UpsampleCrossEntropyLoss
from deeplab_fast.training import Recipe, SegmentationData, evaluate, folder, train
from deeplab_fast.training.loader import batches, steps_per_epoch
from deeplab_fast.training.state import TrainingState
from deeplab_fast.training.step import TrainingStep

from .resources import OtherLoad, page_faults, peak_resident_mib

CLASSES = "Sky Building Pole Road Pavement Tree SignSymbol Fence Car Pedestrian Bicyclist".split()


class Run(NamedTuple):
    """Training run of one process.

    Args:
        variant: "deeplab_fast"; "reference", the same model with every op's reference in plain
            PyTorch; "pytorch", the same with F.interpolate and F.cross_entropy as its loss, which
            :func:`interleaved` takes only; or "torchvision", torchvision's model in a plain loop.
        weights: the model to fine-tune, or None to train a ResNet-50 from scratch.
        log_every: updates between two points of the loss curve.
        evaluate_every: epochs between two evaluations on "val", or None for none.
    """

    variant: str
    camvid: Path
    weights: str | None
    output_stride: int
    recipe: Recipe
    device: torch.device
    workers: int
    log_every: int
    evaluate_every: int | None

    def data(self, split: str) -> SegmentationData:
        return folder(self.camvid, split, CLASSES, ignore=[11])

    def backend(self) -> AbstractContextManager[Any]:
        """Context in which this variant computes."""
        if self.variant in ("reference", "pytorch"):
            return deeplab_fast.backend("reference")
        return contextlib.nullcontext()

    def model(self) -> DeepLabV3:
        """The model to train, whose new weights depend on the seed only."""
        torch.manual_seed(self.recipe.seed)
        if self.weights is None:
            model = DeepLabV3("resnet50", len(CLASSES), self.output_stride, aux_loss=True)
        else:
            model = DeepLabV3.from_pretrained(self.weights, output_stride=self.output_stride)
            last = model.classifier[-1]
            model.classifier[-1] = nn.Conv2d(last.in_channels, len(CLASSES), 1)
        return model.to(self.device)


class Training(NamedTuple):
    """A trained model, the loss of every ``log_every``-th update, and the validation curve."""

    model: nn.Module
    losses: list[float]
    seconds: float  # duration of all updates, with reading the images, without evaluation
    val_miou: list[tuple[int, float]]  # epoch, mean IoU


def ours(run: Run) -> Training:
    """Train our model in the loop of ``deeplab-fast train``."""
    recipe, model = run.recipe, run.model()
    train_data = run.data("train")
    val_data = None if run.evaluate_every is None else run.data("val")
    with tempfile.TemporaryDirectory() as output:
        train(
            model, train_data, val_data, recipe, output, workers=run.workers,
            evaluate_every=run.evaluate_every or recipe.epochs, log_every=run.log_every,
        )  # fmt: skip
        rows = list(map(json.loads, Path(output, "log.jsonl").read_text().splitlines()))
    updates = [row for row in rows if "loss" in row]
    steps = [0, *(row["step"] for row in updates)]
    seconds = sum(
        (step - before) * recipe.batch_size / row["images_per_second"]
        for before, step, row in zip(steps, steps[1:], updates)
    )
    per_epoch = steps_per_epoch(len(train_data), recipe)
    curve = [(row["step"] // per_epoch, row["val_miou"]) for row in rows if "val_miou" in row]
    return Training(model, [row["loss"] for row in updates], seconds, curve)


class Torchvision(nn.Module):
    """torchvision's model with the attributes that evaluate() needs; its logits have full size."""

    align_corners = False
    preprocessing = Preprocessing()

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def logits(self, images: Tensor) -> OrderedDict[str, Tensor]:
        return self.model(images)


def torchvision(run: Run) -> Training:
    """Train torchvision's model on our batches, in the loop of its references/segmentation."""
    from torchvision.models import segmentation

    recipe, device, data = run.recipe, run.device, run.data("train")
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
    loader = batches(data, recipe, 0, run.workers)
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
        if (step + 1) % run.log_every == 0 or step + 1 == steps:
            losses.append(loss.item())  # waits for the update
    return Training(Torchvision(model), losses, time.perf_counter() - start, [])


def measured(run: Run) -> dict[str, Any]:
    """Train and test: returns a row of measurements, the curves and the IoU of each class."""
    gpu = run.device.type == "cuda"
    load = OtherLoad()
    with run.backend():
        training = torchvision(run) if run.variant == "torchvision" else ours(run)
        peak = torch.cuda.max_memory_allocated(run.device) / 2**20 if gpu else peak_resident_mib()
        dtype = getattr(torch, run.recipe.dtype)
        data = run.data("test")
        scores = evaluate(training.model.eval(), data, dtype=dtype, workers=run.workers)
    row = {
        "test_miou": round(scores.miou, 5),
        "test_pixel_accuracy": round(scores.pixel_accuracy, 5),
        "updates": steps_per_epoch(len(run.data("train")), run.recipe) * run.recipe.epochs,
        "seconds_per_epoch": round(training.seconds / run.recipe.epochs, 3),
        "peak_mib": round(peak, 1),
        "other_load_percent": round(load.percent(), 1),
    }
    return {
        "run": row,
        "test_iou": scores.as_dict()["iou"],
        "val_miou": training.val_miou,
        "losses": training.losses,
    }


def in_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call a function in a new process, so that its memory is its own. It keeps freed memory."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context, initializer=keep_freed_memory) as pool:
        return pool.submit(function, *arguments).result()


class InterpolateCrossEntropyLoss(UpsampleCrossEntropyLoss):
    """The same loss as one writes it in PyTorch, with a gradient from autograd."""

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        logits = F.interpolate(
            logits, target.shape[1:], mode="bilinear", align_corners=self.align_corners
        )
        return F.cross_entropy(
            logits, target, self.weight, ignore_index=self.ignore_index, reduction=self.reduction,
            label_smoothing=self.label_smoothing,
        )  # fmt: skip


class Timed(NamedTuple):
    """Times of one variant."""

    seconds: list[float]  # per update, of each block
    page_faults: float  # per update, in the median block
    peak_mib: float


def interleaved(runs: list[Run], blocks: int, updates: int) -> dict[str, Timed]:
    """Time the updates of several variants, which take turns.

    Each variant trains in a process of its own. Only one of them computes at a time, for a block of
    updates, so that other load on the machine affects all alike. A first block is not timed.
    The processes keep freed memory: otherwise their times differ by page faults, whose number
    depends on what a process freed before.
    """
    with contextlib.ExitStack() as stack:
        pipes = {run.variant: stack.enter_context(_trainer(run)) for run in runs}

        def measured_block(variant: str) -> tuple[float, float]:
            pipes[variant].send(updates)
            return pipes[variant].recv()

        names = list(pipes)
        for name in names:
            measured_block(name)
        measured: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
        for block in range(blocks):
            for name in names if block % 2 == 0 else reversed(names):
                measured[name].append(measured_block(name))
        peaks = {}
        for name, pipe in pipes.items():
            pipe.send(0)
            peaks[name] = pipe.recv()
    times = {}
    for name in names:
        seconds, faults = map(list, zip(*measured[name]))
        times[name] = Timed(seconds, statistics.median(faults), peaks[name])
    return times


@contextlib.contextmanager
def _trainer(run: Run) -> Iterator[Any]:
    """A process that trains blocks of updates; the connection to it."""
    context = multiprocessing.get_context("spawn")
    connection, other = context.Pipe()
    process = context.Process(target=_train_blocks, args=(other, run))
    process.start()
    other.close()  # otherwise recv would wait for a process that has failed
    try:
        yield connection
    finally:
        connection.close()
        process.join()


def _train_blocks(connection: Any, run: Run) -> None:
    """Answer numbers of updates with seconds and page faults of each, 0 with the peak memory."""
    keep_freed_memory()
    recipe = dataclasses.replace(run.recipe, epochs=1000)  # more than will be timed
    data = run.data("train")
    state = TrainingState(run.model(), recipe)
    step = TrainingStep(state, recipe, steps_per_epoch(len(data), recipe) * recipe.epochs)
    state.train_mode()
    if run.variant == "pytorch":
        fused = step.objective.cross_entropy
        step.objective.cross_entropy = InterpolateCrossEntropyLoss(
            fused.weight, fused.ignore_index, fused.reduction, fused.label_smoothing,
            fused.align_corners,
        )  # fmt: skip
    loader: Any = batches(data, recipe, 0, run.workers)
    with run.backend(), contextlib.closing(loader):
        while updates := connection.recv():
            faults, start = page_faults(), time.perf_counter()
            for _ in range(updates):
                loss = step.update([next(loader)])
            loss.item()  # waits for the updates
            seconds = time.perf_counter() - start
            connection.send((seconds / updates, (page_faults() - faults) / updates))
        connection.send(peak_resident_mib())
