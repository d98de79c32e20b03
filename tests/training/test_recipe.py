"""Every setting of a recipe against the same training in plain PyTorch; checkpoints and resume."""

from __future__ import annotations

import json
import math
import os
import random
import signal
import sys
import threading
import types
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.testing import assert_close

from deeplab_fast._io.overlay import overlay, painting_of
from deeplab_fast.models import Preprocessing
from deeplab_fast.models.segmentation import SegmentationModel
from deeplab_fast.training import (
    Interrupted,
    Objective,
    Recipe,
    Scores,
    SegmentationData,
    TrainingError,
    checkpoint,
    distributed,
    evaluate,
    loop,
    report,
    train,
)
from deeplab_fast.training.loader import batches
from deeplab_fast.training.run_folder import RunFolder, resume_settings
from deeplab_fast.training.state import TrainingState
from deeplab_fast.training.step import TrainingStep

from ..support.runs import signal_in_update
from ..support.shapes import CLASSES, read_shapes, write_shapes

UPDATES_PER_EPOCH = 3  # 6 images in batches of 2
BASE = Recipe(epochs=2, batch_size=2, crop_size=(24, 32), learning_rate=0.2)


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def shapes(tmp_path_factory) -> tuple[SegmentationData, SegmentationData]:
    return read_shapes(write_shapes(tmp_path_factory.mktemp("data") / "shapes", size=(40, 32)))


class Pointwise(nn.Linear):
    """A 1x1 convolution as a matrix product.

    torch.nn.Conv2d has wrong gradients in bfloat16 on some CPUs.
    """

    @property
    def out_channels(self) -> int:
        return self.out_features

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input.movedim(1, 3)).movedim(3, 1)


class Features(nn.Module):
    """A backbone of two layers and a batch norm, which records modes, dtypes and formats."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = Pointwise(3 * 4 * 4, 4)
        self.norm = nn.BatchNorm2d(4)
        self.body = Pointwise(4, 6)
        self.seen: list[Any] = []

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        aux = self.norm(self.stem(F.pixel_unshuffle(images, 4))).relu()
        out = self.body(aux).tanh()
        channels_last = images.is_contiguous(memory_format=torch.channels_last)
        self.seen.append((self.training, out.dtype, channels_last))
        return {"aux": aux, "out": out}


class Tiny(SegmentationModel):
    """The smallest network with everything that a recipe acts on."""

    def __init__(self, aux: bool = True, align_corners: bool = False) -> None:
        torch.manual_seed(0)
        head = nn.Sequential(nn.Dropout(0.3), Pointwise(6, 3))
        preprocessing = Preprocessing(mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4))
        aux_head = Pointwise(4, 3) if aux else None
        super().__init__(Features(), head, aux_head, align_corners, preprocessing, None)
        self.config = {"backbone": "tiny"}

    def save_pretrained(self, path: Path) -> None:
        save_file({name: value.contiguous() for name, value in self.state_dict().items()}, path)


class Run(NamedTuple):
    model: Any
    state: dict[str, Any]  # content of last.pt
    rows: list[dict[str, Any]]  # lines of log.jsonl
    folder: Path

    def column(self, name: str) -> list[float]:
        return [row[name] for row in self.rows if name in row]


def run(data, folder: Path, recipe: Recipe, model: Tiny | None = None, **options) -> Run:
    options = {"workers": 0, "log_every": 1, "evaluate_every": 99} | options
    model = train(model or Tiny(), *data, recipe, folder, **options)
    return read(model, folder)


def read(model: Any, folder: Path) -> Run:
    rows = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return Run(model, torch.load(folder / "last.pt", weights_only=True), rows, folder)


class Expected(NamedTuple):
    losses: list[float]
    rates: list[float]  # learning rates of the backbone
    weights: list[dict[str, Tensor]]  # state dict after each update
    averages: list[dict[str, Tensor]]


def loss_by_hand(
    recipe: Recipe, logits: list[dict[str, Tensor]], targets: list[Tensor], align_corners: bool
) -> Tensor:
    """Loss of an update from the full-size logits of its micro-batches."""
    weights = None if recipe.class_weights is None else torch.tensor(recipe.class_weights)
    total = torch.zeros(())
    for name, factor in (("out", 1.0), ("aux", recipe.aux_weight)):
        if name not in logits[0]:
            continue
        full = [
            F.interpolate(
                micro_batch[name].float(),
                target.shape[1:],
                mode="bilinear",
                align_corners=align_corners,
            )
            for micro_batch, target in zip(logits, targets)
        ]
        options: Any = dict(
            weight=weights, ignore_index=255, label_smoothing=recipe.label_smoothing
        )
        if recipe.top_k_pixels is None:
            loss = F.cross_entropy(torch.cat(full), torch.cat(targets), **options)
        else:
            loss = torch.zeros(())
            for pixels, target in zip(full, targets):
                losses = F.cross_entropy(pixels, target, reduction="none", **options).flatten()
                count = int(recipe.top_k_pixels * len(losses))
                loss = loss + losses.sort(descending=True).values[:count].mean() / len(full)
        total = total + factor * loss
    return total


def train_by_hand(data: SegmentationData, recipe: Recipe, model: Tiny | None = None) -> Expected:
    """The same training in plain PyTorch, with the model and the batches of the package."""
    model = model or Tiny()
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in ((0.5, 0.4, 0.3), (0.2, 0.3, 0.4)))
    steps = recipe.epochs * -(-len(data) // recipe.batch_size)
    model.train()
    if recipe.freeze_batch_norm:
        model.backbone.norm.eval()
    velocity: dict[str, Tensor] = {}
    expected = Expected([], [], [], [])
    dtype = getattr(torch, recipe.dtype)
    torch.manual_seed(recipe.seed)
    for step, (images, labels) in enumerate(batches(data, replace(recipe, grad_accum_steps=1))):
        pixels = (images.permute(0, 3, 1, 2).float() / 255 - mean) / std
        micro_batches = pixels.chunk(recipe.grad_accum_steps)
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            logits = [model.logits(images) for images in micro_batches]
        targets = [target.long() for target in labels.chunk(recipe.grad_accum_steps)]
        loss = loss_by_hand(recipe, logits, targets, model.align_corners)
        model.zero_grad()
        scale = 1024.0 if dtype == torch.float16 else 1.0  # any loss scale without overflow
        (loss * scale).backward()
        factor = (1 - step / steps) ** recipe.power
        if step < recipe.warmup_steps:
            factor *= (step + 1) / recipe.warmup_steps
        rates = {"backbone": factor * recipe.learning_rate}
        rates["head"] = factor * (recipe.head_learning_rate or recipe.learning_rate)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if recipe.freeze_batch_norm and "norm" in name:
                    continue
                gradient = parameter.grad / scale + recipe.weight_decay * parameter
                velocity[name] = recipe.momentum * velocity.get(name, 0) + gradient
                rate = rates["backbone" if name.startswith("backbone") else "head"]
                parameter -= rate * velocity[name]
        weights = {name: value.clone() for name, value in model.state_dict().items()}
        average = weights
        if recipe.ema_decay is not None and step > 0:
            average = {
                name: recipe.ema_decay * before + (1 - recipe.ema_decay) * weights[name]
                for name, before in expected.averages[-1].items()
            }
        expected.losses.append(loss.item())
        expected.rates.append(rates["backbone"])
        expected.weights.append(weights)
        expected.averages.append(average)
    return expected


def floats(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The floating-point entries: not batch norm's counts, whose average torch rounds down."""
    return {name: value for name, value in state.items() if value.is_floating_point()}


OPTIONS: list[dict[str, Any]] = [
    {},
    {"epochs": 1},
    {"batch_size": 3},
    {"batch_size": 4, "grad_accum_steps": 2},
    {"batch_size": 4, "grad_accum_steps": 2, "class_weights": (0.5, 4.0, 0.1)},
    {"crop_size": (40, 56)},  # padded
    {"scale": (1.5, 1.6), "flip": 0.0, "color_jitter": 0.0},
    {"learning_rate": 0.02},
    {"head_learning_rate": 0.7},
    {"warmup_steps": 4},
    {"power": 0.0},
    {"power": 2.0},
    {"momentum": 0.0},
    {"momentum": 0.5},
    {"weight_decay": 0.2},
    {"aux_weight": 0.0},
    {"aux_weight": 2.0},
    {"class_weights": (0.5, 4.0, 0.1)},
    {"label_smoothing": 0.3},
    {"label_smoothing": 0.3, "class_weights": (0.5, 4.0, 0.1)},
    {"top_k_pixels": 0.1},
    {"top_k_pixels": 0.1, "batch_size": 4, "grad_accum_steps": 2},
    {"freeze_batch_norm": True, "weight_decay": 0.2},
    {"freeze_batch_norm": True, "batch_size": 2, "grad_accum_steps": 2},  # one image at a time
    {"ema_decay": 0.6},
    {"seed": 5},
]


@pytest.fixture(scope="module")
def plain(shapes) -> Expected:
    return train_by_hand(shapes[0], BASE)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_training_matches_plain_pytorch(options, plain, shapes, tmp_path):
    """The same losses, learning rates, weights, batch norm statistics and moving average."""
    recipe = replace(BASE, **options)
    expected = train_by_hand(shapes[0], recipe)
    name = "classifier.1.weight"
    difference = (expected.averages[-1][name] - plain.averages[-1][name]).abs().max()
    assert difference > 1e-3 or not options  # ignoring the option would fail the test
    actual = run((shapes[0], None), tmp_path, recipe)
    assert actual.column("loss") == pytest.approx(expected.losses, rel=1e-5)
    assert actual.column("learning_rate") == pytest.approx(expected.rates)
    assert actual.state["model"].keys() == expected.weights[-1].keys()
    assert_close(actual.state["model"], expected.weights[-1], rtol=1e-4, atol=1e-5)
    result = floats(actual.model.state_dict())
    average = {name: expected.averages[-1][name] for name in result}
    assert_close(result, average, rtol=1e-4, atol=1e-5)
    if recipe.ema_decay is None:
        assert actual.state["average"] is None
    else:
        saved = {name: actual.state["average"][f"module.{name}"] for name in result}
        assert_close(saved, average, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("options", [{"aux": False}, {"align_corners": True}], ids=str)
def test_training_of_other_models_matches_plain_pytorch(options, shapes, tmp_path):
    expected = train_by_hand(shapes[0], BASE, Tiny(**options))
    actual = run((shapes[0], None), tmp_path, BASE, Tiny(**options))
    assert actual.column("loss") == pytest.approx(expected.losses, rel=1e-5)
    assert_close(actual.state["model"], expected.weights[-1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_networks_run_in_the_dtype_of_the_recipe(dtype, shapes, tmp_path):
    recipe = replace(BASE, epochs=1, dtype=dtype)
    expected = train_by_hand(shapes[0], recipe)
    model = Tiny()
    start = {name: value.clone() for name, value in floats(model.state_dict()).items()}
    actual = run(shapes, tmp_path, recipe, model)
    seen = model.backbone.seen
    # Three updates in training mode, then two images in evaluation mode; all in channels last.
    assert (
        seen
        == [(True, getattr(torch, dtype), True)] * 3 + [(False, getattr(torch, dtype), True)] * 2
    )
    # Both round alike, except for the loss: ours is computed from low-resolution logits.
    assert actual.column("loss") == pytest.approx(expected.losses, rel=2**-6)
    for name, value in start.items():
        moved = (expected.weights[-1][name] - value).norm()
        error = (actual.state["model"][name] - expected.weights[-1][name]).norm()
        assert error <= 2**-5 * moved + 1e-6, name
    assert actual.state["model"]["classifier.1.weight"].dtype == torch.float32
    is_scaled = dtype == "float16"
    assert actual.state["scaler"].get("scale") == (2.0**16 if is_scaled else None)


class Loud(Tiny):
    """A network whose gradients overflow in float16 with a loss scale of 2^16."""

    def logits(self, images: Tensor) -> Any:
        features = self._features(images)
        return {"out": self.classifier(300 * features["out"])}


def test_update_that_overflows_in_float16_is_skipped(shapes, tmp_path):
    recipe = replace(BASE, epochs=1, dtype="float16", batch_size=6)
    before = floats(Loud(aux=False).state_dict())
    after = run((shapes[0], None), tmp_path, recipe, Loud(aux=False)).state
    assert after["scaler"]["scale"] == 2.0**15
    for name, value in before.items():
        assert torch.equal(after["model"][name], value) == ("running" not in name), name


def test_defaults():
    """Defaults are those of Chen et al. 2017 and torchvision's references; options are off."""
    assert asdict(Recipe()) == {
        "epochs": 50, "batch_size": 16, "grad_accum_steps": 1, "crop_size": (513, 513),
        "scale": (0.5, 2.0), "flip": 0.5, "color_jitter": 0.2, "learning_rate": 0.01,
        "head_learning_rate": None, "warmup_steps": 0, "power": 0.9, "momentum": 0.9,
        "weight_decay": 1e-4, "aux_weight": 0.5, "class_weights": None, "label_smoothing": 0.0,
        "top_k_pixels": None,
        "freeze_batch_norm": False, "ema_decay": None, "dtype": "float32", "seed": 0,
    }  # fmt: skip


@pytest.mark.parametrize(
    "values",
    [
        {"flip": 0.0, "color_jitter": 0.0, "power": 0.0, "momentum": 0.0, "weight_decay": 0.0},
        {"flip": 1.0, "color_jitter": 1.0, "label_smoothing": 1.0, "top_k_pixels": 1.0},
        {"scale": (1.0, 1.0), "aux_weight": 0.0, "class_weights": (0.0, 1.0), "crop_size": (1, 1)},
        {"epochs": 1, "batch_size": 1, "grad_accum_steps": 1, "seed": 0, "warmup_steps": 0},
    ],
    ids=str,
)
def test_recipe_accepts_the_bounds_of_its_ranges(values):
    assert asdict(Recipe(**values)).items() >= values.items()


@pytest.mark.parametrize(
    "values",
    [
        {"crop_size": (5, 0)},
        {"scale": (0.0, 1.0)},
        {"scale": (0.5, math.inf)},
        {"learning_rate": math.inf},
        {"learning_rate": 1e39},
        {"seed": 2**63},
        {"flip": -0.1},
        {"color_jitter": 1.1},
        {"head_learning_rate": 0.0},
        {"head_learning_rate": math.inf},
        {"momentum": -0.1},
        {"class_weights": ()},
        {"class_weights": (1.0, math.nan)},
        {"class_weights": (1.0, math.inf)},
        {"label_smoothing": -0.1},
        {"top_k_pixels": 1.1},
        {"ema_decay": 0.0},
        {"ema_decay": 1.5},
    ],
    ids=str,
)
def test_recipe_rejects_values_just_out_of_range(values):
    (name,) = values
    with pytest.raises(TrainingError, match=f"^{name}: expected .*, got"):
        Recipe(**values)


@pytest.mark.parametrize("options", [{"workers": -1}, {"evaluate_every": 0}, {"log_every": 0}])
def test_train_rejects_options_out_of_range(options, shapes, tmp_path):
    ((name, value),) = options.items()
    with pytest.raises(TrainingError, match=f"^{name}: expected {value + 1} or more, got {value}"):
        run(shapes, tmp_path / "run", BASE, **options)
    assert not (tmp_path / "run").exists()


def test_batch_size_must_divide_among_processes(shapes, tmp_path, monkeypatch):
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    with pytest.raises(TrainingError, match=r"multiple of 2 \(2 processes, 1 micro-.*\), got 3"):
        run(shapes, tmp_path, replace(BASE, batch_size=3))
    with pytest.raises(TrainingError, match="at least 2 images at a time .*, got 1$"):
        run(shapes, tmp_path, replace(BASE, batch_size=2))
    with pytest.raises(TrainingError, match="at least 2 images at a time .*, got 1$"):
        run(shapes, tmp_path, replace(BASE, batch_size=4, grad_accum_steps=2))


def test_model_and_data_must_have_the_same_classes(shapes, tmp_path):
    train_data, val_data = shapes
    other = replace(train_data, classes=("a", "b"), label_ids={0: 0, 1: 1, 2: 255})
    with pytest.raises(TrainingError, match="^model: expected 2 classes as in the data, got 3"):
        run((other, None), tmp_path, BASE)
    one, two, three = train_data.classes
    for classes, difference in (
        ((one, "b", three), f"b instead of {two} as class 1"),
        ((one, two, three, "d"), "d instead of none as class 3"),
    ):
        renamed = replace(val_data, classes=classes)
        message = f"^val_data: expected the classes of train_data, got {difference}"
        with pytest.raises(TrainingError, match=message):
            run((train_data, renamed), tmp_path, BASE)


# Evaluation, saved models and logs


class Judge:
    """A stand-in for evaluate() that returns given scores in turn and records its arguments."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *mious: float) -> None:
        self.mious: Iterator[float] = iter(mious)
        self.weights: list[dict[str, Tensor]] = []
        self.options: list[dict[str, Any]] = []
        monkeypatch.setattr(loop, "evaluate", self)

    def __call__(self, model: Any, data: SegmentationData, **options: Any) -> Scores:
        self.weights.append({name: x.clone() for name, x in floats(model.state_dict()).items()})
        self.options.append(options)
        hits = round(1000 * next(self.mious))
        return Scores(np.array([[hits, 1000 - hits], [0, 0]]), ("a", "b"))


@pytest.mark.parametrize("ema_decay", [None, 0.6])
def test_moving_average_is_evaluated_and_saved(ema_decay, shapes, tmp_path, monkeypatch):
    """The best model is the first one with the highest mean IoU."""
    recipe = replace(BASE, epochs=4, ema_decay=ema_decay)
    averages = train_by_hand(shapes[0], recipe).averages
    judge = Judge(monkeypatch, 0.3, 0.6, 0.6, 0.5)  # the mean IoU is half of these
    actual = run(shapes, tmp_path, recipe, evaluate_every=1)
    expected = [averages[i] for i in (2, 5, 8, 11)]
    for weights, average in zip(judge.weights, expected, strict=True):
        assert_close(weights, {name: average[name] for name in weights}, rtol=1e-4, atol=1e-5)
    for name, index in (("best", 1), ("last", 3)):
        kept = load_file(tmp_path / f"{name}.safetensors")
        assert_close(floats(kept), judge.weights[index], rtol=0, atol=0)
    assert_close(floats(actual.model.state_dict()), judge.weights[3], rtol=0, atol=0)
    assert not actual.model.training and actual.model.categories == CLASSES
    assert actual.state["best_miou"] == pytest.approx(0.3)
    assert actual.column("val_miou") == pytest.approx([0.15, 0.3, 0.3, 0.25])


@pytest.mark.parametrize("freeze", [False, True])
def test_training_continues_in_training_mode_after_an_evaluation(freeze, shapes, tmp_path):
    """Batch norm is frozen after an evaluation if it was before."""
    recipe = replace(BASE, freeze_batch_norm=freeze)
    expected = train_by_hand(shapes[0], recipe)
    actual = run(shapes, tmp_path, recipe, evaluate_every=1)
    assert_close(actual.state["model"], expected.weights[-1], rtol=1e-4, atol=1e-5)


def test_model_is_trained_in_place(shapes, tmp_path):
    model = Tiny()
    assert run(shapes, tmp_path / "a", BASE, model).model is model
    model = Tiny()
    average = run(shapes, tmp_path / "b", replace(BASE, ema_decay=0.5), model)
    assert average.model is not model
    assert_close(model.state_dict(), average.state["model"], rtol=0, atol=0)


def test_evaluation_and_checkpoint_intervals(shapes, tmp_path, monkeypatch):
    """The checkpoint is saved with each evaluation, and at the end."""
    saved: list[int] = []
    save = checkpoint.save

    def recorded(path: Path, state: dict[str, Any]) -> None:
        saved.append(state["step"])
        save(path, state)

    monkeypatch.setattr(checkpoint, "save", recorded)
    Judge(monkeypatch, 0.1, 0.2, 0.3)
    actual = run(shapes, tmp_path, replace(BASE, epochs=5), evaluate_every=2)
    rows = [row["step"] for row in actual.rows if "val_miou" in row]
    assert rows == [6, 12, 15] and sorted(set(saved)) == [6, 12, 15]
    assert actual.state["evaluated"] == 15


def test_options_reach_the_loader_and_the_evaluation(shapes, tmp_path, monkeypatch):
    judge = Judge(monkeypatch, 0.1)
    workers: list[int] = []

    def recorded(data, recipe, step, number, rank, processes):
        workers.append(number)
        return batches(data, recipe, step, 0, rank, processes)

    monkeypatch.setattr(loop, "batches", recorded)
    run(shapes, tmp_path, replace(BASE, dtype="bfloat16"), workers=3)
    assert workers == [3]
    assert judge.options == [{"dtype": torch.bfloat16, "workers": 3, "quiet": False}]


def test_log_interval_and_images_per_second(shapes, tmp_path, monkeypatch):
    """The speed is that of the updates since the last line, without evaluations."""
    losses = train_by_hand(shapes[0], BASE).losses
    now = [0.0]
    monkeypatch.setattr(report, "time", types.SimpleNamespace(perf_counter=lambda: now[0]))
    update = TrainingStep.update

    def slow(self, micro_batches):
        now[0] += 4.0
        return update(self, micro_batches)

    monkeypatch.setattr(TrainingStep, "update", slow)
    judge = Judge(monkeypatch, 0.1, 0.2)

    def slow_evaluation(*arguments, **options):
        now[0] += 1000.0
        return judge(*arguments, **options)

    monkeypatch.setattr(loop, "evaluate", slow_evaluation)
    actual = run(shapes, tmp_path, BASE, log_every=2, evaluate_every=1)
    steps = [2, 3, 4, 6]  # every second one, and those with an evaluation
    assert [row["step"] for row in actual.rows if "loss" in row] == steps
    assert actual.column("loss") == pytest.approx([losses[step - 1] for step in steps], rel=1e-5)
    assert actual.column("images_per_second") == [0.5] * 4


def test_terminal_output(shapes, tmp_path, monkeypatch, capsys):
    Judge(monkeypatch, 0.5, 0.25)
    actual = run(shapes, tmp_path, BASE, evaluate_every=1, check=False)
    losses = actual.column("loss")
    assert capsys.readouterr().out.splitlines() == [
        f"epoch 1 of 2: loss {losses[2]:.3f}, mean IoU 25.00 %, pixel accuracy 50.00 %",
        f"epoch 2 of 2: loss {losses[5]:.3f}, mean IoU 12.50 %, pixel accuracy 25.00 %",
        f"finished: models in {tmp_path}, best mean IoU 25.00 %",
    ]


def test_scores_are_logged_and_settings_written(shapes, tmp_path):
    actual = run(shapes, tmp_path, BASE)
    scores = evaluate(actual.model, shapes[1], workers=0, quiet=True)
    row, by_class = [row for row in actual.rows if "loss" not in row]
    assert row == {
        "step": 6,
        "val_miou": pytest.approx(scores.miou),
        "val_pixel_accuracy": pytest.approx(scores.pixel_accuracy),
        "val_mean_accuracy": pytest.approx(scores.mean_accuracy),
        "val_frequency_weighted_iou": pytest.approx(scores.frequency_weighted_iou),
    }
    ious = {f"val_iou/{name}": pytest.approx(x) for name, x in scores.as_dict()["iou"].items()}
    assert by_class == {"step": 6, **ious}
    config = json.loads((tmp_path / "config.json").read_text())
    assert config == {
        "architecture": {
            "model": "Tiny",
            "backbone": "tiny",
            "num_classes": 3,
            "aux_loss": True,
        },
        "classes": ["nothing", "red", "blue"],
        "images": 6,
        "recipe": json.loads(json.dumps(asdict(BASE))),
        "processes": 1,
    }


class Writer:
    """A stand-in for TensorBoard's SummaryWriter, whose import takes seconds."""

    def __init__(self, folder: str, purge_step: int) -> None:
        self.folder, self.purge_step = folder, purge_step
        self.scalars: list[tuple[str, float, int]] = []
        self.pictures: dict[str, tuple[Any, int, str]] = {}
        self.closed = False

    def add_scalar(self, name: str, value: float, step: int) -> None:
        self.scalars.append((name, value, step))

    def add_image(self, name: str, image: Any, step: int, dataformats: str) -> None:
        self.pictures[name] = image, step, dataformats

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def writers(monkeypatch) -> list[Writer]:
    made: list[Writer] = []

    def make(*arguments: Any, **options: Any) -> Writer:
        made.append(Writer(*arguments, **options))
        return made[-1]

    module = types.SimpleNamespace(SummaryWriter=make)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    return made


@pytest.mark.parametrize("ema_decay", [None, 0.6])
def test_tensorboard_gets_scalars_and_pictures(ema_decay, writers, shapes, tmp_path):
    """A picture is the image, the prediction and the ground truth, for at most four images."""
    train_data, val_data = shapes
    five = replace(val_data, pairs=train_data.pairs[:5])
    recipe = replace(BASE, ema_decay=ema_decay)
    actual = run((train_data, five), tmp_path, recipe, evaluate_every=1)
    (writer,) = writers
    assert (writer.folder, writer.purge_step, writer.closed) == (str(tmp_path), 1, True)
    expected = [
        (name.replace("val_", "val/"), value, row["step"])
        for row in actual.rows
        for name, value in row.items()
        if name != "step"
    ]
    assert writer.scalars == expected
    assert {name for name, _, _ in expected} >= {"loss", "val/miou", "val/iou/red"}
    assert list(writer.pictures) == [f"val/{i} image, prediction, ground truth" for i in range(4)]
    for index, (picture, step, order) in enumerate(writer.pictures.values()):
        image, ground_truth = five.read(index)
        pixels = actual.model.preprocessing(image)[None]
        with torch.no_grad():
            prediction = actual.model(pixels)["out"].argmax(1)[0].byte().numpy()
        painting = painting_of(five.classes, len(five.classes))
        drawn = np.concatenate(
            [image, *(overlay(image, x, painting) for x in (prediction, ground_truth))], axis=1
        )
        assert (step, order, picture.shape) == (6, "HWC", drawn.shape)
        assert (picture == drawn).all(2).mean() > 0.99  # a pixel may tie
    # Training continued in training mode after the pictures of the first epoch.
    if ema_decay is None:
        assert_close(
            actual.state["model"],
            train_by_hand(train_data, recipe).weights[-1], rtol=1e-4, atol=1e-5,
        )  # fmt: skip


# Stop and resume


def stopped_and_resumed(
    data, folder: Path, recipe: Recipe, update: int, model: type[Tiny] = Tiny, **options
) -> Run:
    """A run that is interrupted during an update, and then resumed with a new model."""
    with pytest.MonkeyPatch.context() as patch:
        signal_in_update(patch, update, signal.SIGINT)
        with pytest.raises(Interrupted, match=f"interrupted after update {update} of "):
            run(data, folder, recipe, model(), **options)
    fresh = model()
    with torch.no_grad():
        for value in floats(fresh.state_dict()).values():
            value.fill_(0.5)  # the weights given must not matter
    torch.rand(5)
    return run(data, folder, recipe, fresh, resume=True, **options)


def assert_same_run(actual: Run, expected: Run) -> None:
    """Assert equal progress and random states, and equal tensors to within rounding."""
    for name in ("step", "evaluated", "scaler", "random"):
        assert_close(actual.state[name], expected.state[name], rtol=0, atol=0)
    assert [row["step"] for row in actual.rows] == [row["step"] for row in expected.rows]
    assert actual.column("learning_rate") == expected.column("learning_rate")
    assert actual.column("loss") == pytest.approx(expected.column("loss"), rel=1e-5)
    assert actual.state["best_miou"] == pytest.approx(expected.state["best_miou"], abs=1e-3)
    for name in ("model", "average", "optimizer"):
        assert_close(actual.state[name], expected.state[name], rtol=1e-4, atol=1e-5)
    assert_close(actual.model.state_dict(), expected.model.state_dict(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"ema_decay": 0.6},
        {"momentum": 0.99, "weight_decay": 0.1},
        {"warmup_steps": 5, "head_learning_rate": 0.5},
        {"batch_size": 4, "grad_accum_steps": 2},
        {"freeze_batch_norm": True},
        {"dtype": "bfloat16"},
    ],
    ids=str,
)
@pytest.mark.parametrize("update", [2, 4])
def test_resumed_run_equals_the_uninterrupted_one(options, update, shapes, tmp_path):
    recipe = replace(BASE, **options)
    whole = run(shapes, tmp_path / "whole", recipe, evaluate_every=1)
    resumed = stopped_and_resumed(shapes, tmp_path / "stopped", recipe, update, evaluate_every=1)
    assert_same_run(resumed, whole)


def test_resumed_run_with_workers_equals_the_uninterrupted_one(shapes, tmp_path):
    """Images that were read ahead when the run was stopped are used after it."""
    recipe = replace(
        BASE, dtype="bfloat16", batch_size=4, grad_accum_steps=2, warmup_steps=3, top_k_pixels=0.3,
        class_weights=(1.0, 2.0, 3.0), label_smoothing=0.1, ema_decay=0.9,
    )  # fmt: skip
    whole = run(shapes, tmp_path / "whole", recipe)
    resumed = stopped_and_resumed(shapes, tmp_path / "stopped", recipe, 3, workers=2)
    assert_same_run(resumed, whole)


def test_run_killed_during_an_evaluation_resumes(shapes, tmp_path):
    """The evaluation is repeated, and is in the log once."""
    recipe = replace(BASE, ema_decay=0.6)
    whole = run(shapes, tmp_path / "whole", recipe, evaluate_every=1)
    stopped = tmp_path / "stopped"

    def end(*arguments):
        raise KeyboardInterrupt  # the second Ctrl-C

    with pytest.MonkeyPatch.context() as patch:
        signal_in_update(patch, 3, signal.SIGTERM)
        with pytest.raises(Interrupted, match="after update 3"):  # before the first evaluation
            run(shapes, stopped, recipe, evaluate_every=1)
    assert read(None, stopped).column("val_miou") == []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RunFolder, "save_model", end)
        with pytest.raises(KeyboardInterrupt):
            run(shapes, stopped, recipe, resume=True, evaluate_every=1)
    assert len(read(None, stopped).column("val_miou")) == 1
    resumed = run(shapes, stopped, recipe, resume=True, evaluate_every=1)
    assert_same_run(resumed, whole)


def test_loss_scale_is_resumed(shapes, tmp_path):
    recipe = replace(BASE, dtype="float16", aux_weight=0.0)
    whole = run((shapes[0], None), tmp_path / "whole", recipe, Loud())
    assert whole.state["scaler"]["scale"] < 2.0**15  # it was halved more than once
    resumed = stopped_and_resumed((shapes[0], None), tmp_path / "stopped", recipe, 2, Loud)
    assert resumed.state["scaler"] == whole.state["scaler"]


def test_best_score_is_resumed(shapes, tmp_path, monkeypatch):
    """A model that is worse than the best one before the interruption does not replace it."""
    judge = Judge(monkeypatch, 0.8, 0.5)
    resumed = stopped_and_resumed(shapes, tmp_path, BASE, 4, evaluate_every=1)
    assert len(judge.weights) == 2  # no evaluation is repeated
    best = load_file(tmp_path / "best.safetensors")
    assert_close(floats(best), judge.weights[0], rtol=0, atol=0)
    assert resumed.state["best_miou"] == pytest.approx(0.4)
    assert resumed.column("val_miou") == pytest.approx([0.4, 0.25])


def test_logged_loss_is_resumed(shapes, tmp_path, monkeypatch, capsys):
    """An evaluation after the resume prints the loss of the update before it."""
    Judge(monkeypatch, 0.8, 0.5)
    resumed = stopped_and_resumed(shapes, tmp_path, BASE, 3, evaluate_every=1)
    line = f"epoch 1 of 2: loss {resumed.column('loss')[2]:.3f}, mean IoU 40.00 %"
    assert line in capsys.readouterr().out


def test_tensorboard_curves_are_resumed(writers, shapes, tmp_path):
    stopped_and_resumed(shapes, tmp_path, BASE, 4)
    assert [writer.purge_step for writer in writers] == [1, 5]
    steps = [[step for name, _, step in w.scalars if name == "loss"] for w in writers]
    assert steps == [[1, 2, 3, 4], [5, 6]]


def pretend_processes(monkeypatch: pytest.MonkeyPatch, rank: int, world_size: int) -> None:
    """Pretend that this is one of several processes with equal values."""
    monkeypatch.setattr(distributed, "rank", lambda: rank)
    monkeypatch.setattr(distributed, "world_size", lambda: world_size)
    monkeypatch.setattr(distributed, "gather", lambda value: [value] * world_size)


def start_or_resume(data, folder: Path, recipe: Recipe) -> None:
    model = Tiny()
    settings = resume_settings(model, data[0], recipe)
    RunFolder(folder, settings).start_or_resume(TrainingState(model, recipe), recipe.seed)


def test_each_process_restores_its_own_random_state(shapes, tmp_path, monkeypatch):
    torch.manual_seed(1)
    one = checkpoint.random_state(torch.device("cpu"))
    torch.manual_seed(2)
    other = checkpoint.random_state(torch.device("cpu"))
    state = run((shapes[0], None), tmp_path, replace(BASE, epochs=1)).state
    torch.save({**state, "random": [one, other]}, tmp_path / "last.pt")
    for rank, expected in enumerate((one, other)):
        pretend_processes(monkeypatch, rank, 2)
        start_or_resume(shapes, tmp_path, replace(BASE, epochs=1))
        assert torch.equal(torch.get_rng_state(), expected["torch"])
    # A run of one process cannot restore the random states of two.
    pretend_processes(monkeypatch, 0, 1)
    start_or_resume(shapes, tmp_path, replace(BASE, epochs=1))
    assert torch.initial_seed() == BASE.seed
    assert not torch.equal(torch.get_rng_state(), one["torch"])


def test_each_process_has_its_own_dropout_seed(shapes, tmp_path, monkeypatch):
    for rank in (0, 1):
        pretend_processes(monkeypatch, rank, 2)
        start_or_resume(shapes, tmp_path, replace(BASE, seed=7))
        assert torch.initial_seed() == 7 + rank


def test_all_processes_must_see_the_checkpoint(shapes, tmp_path, monkeypatch):
    monkeypatch.setattr(distributed, "gather", lambda value: [value, 3])
    with pytest.raises(TrainingError, match="last.pt: not there for all processes"):
        start_or_resume(shapes, tmp_path, BASE)


def test_random_states_of_all_generators_are_restored():
    cpu = torch.device("cpu")
    state = checkpoint.random_state(cpu)

    def draw() -> tuple[float, float, float]:
        return torch.rand(1).item(), np.random.random(), random.random()

    first = draw()
    assert all(a != b for a, b in zip(draw(), first))
    checkpoint.set_random_state(state, cpu)
    assert draw() == first


def test_cached_normal_deviate_of_numpy_is_restored():
    cpu = torch.device("cpu")
    np.random.normal()  # NumPy draws two and caches one
    state = checkpoint.random_state(cpu)
    first = np.random.normal()
    np.random.seed(3)
    checkpoint.set_random_state(state, cpu)
    assert np.random.normal() == first


CHANGES: dict[str, Any] = {
    "epochs": 3, "batch_size": 4, "crop_size": (24, 40), "scale": (0.5, 1.0), "flip": 0.1,
    "color_jitter": 0.1, "learning_rate": 0.1, "head_learning_rate": 0.1, "warmup_steps": 1,
    "power": 1.0, "momentum": 0.5, "weight_decay": 0.1, "aux_weight": 0.1,
    "class_weights": (1.0, 2.0, 3.0), "label_smoothing": 0.1, "top_k_pixels": 0.1,
    "freeze_batch_norm": True, "ema_decay": 0.5,
    "dtype": "bfloat16", "seed": 1,
}  # fmt: skip


def test_resume_needs_the_same_recipe(shapes, tmp_path):
    run((shapes[0], None), tmp_path, replace(BASE, epochs=1))
    assert {*CHANGES, "grad_accum_steps"} == set(asdict(BASE))
    for name, value in CHANGES.items():
        other = replace(BASE, **{"epochs": 1, name: value})
        with pytest.raises(TrainingError, match=f"last.pt: saved with {name} .*, not "):
            run((shapes[0], None), tmp_path, other, resume=True)


@pytest.mark.parametrize("group, old", [("recipe", "hard_pixels"), ("architecture", "rates")])
def test_resume_rejects_a_run_of_another_version(group, old, shapes, tmp_path):
    """The error has one line and names the setting that this version does not have."""
    state = run((shapes[0], None), tmp_path, replace(BASE, epochs=1)).state
    torch.save({**state, group: {**state[group], old: None}}, tmp_path / "last.pt")
    with pytest.raises(TrainingError) as caught:
        run((shapes[0], None), tmp_path, replace(BASE, epochs=1), resume=True)
    assert str(caught.value) == (
        f"{tmp_path}/last.pt: saved with the setting {old!r}, which this version does not have "
        "(expected a checkpoint of this version, or a new run in another folder)"
    )
    del state["architecture"]["model"]
    torch.save(state, tmp_path / "last.pt")
    message = "saved without the setting 'model', which this version has "
    with pytest.raises(TrainingError, match=f"last.pt: {message}"):
        run((shapes[0], None), tmp_path, replace(BASE, epochs=1), resume=True)


def test_resume_needs_the_same_data(shapes, tmp_path):
    train_data, _ = shapes
    run((train_data, None), tmp_path, replace(BASE, epochs=1))
    fewer = replace(train_data, pairs=train_data.pairs[:5])
    renamed = replace(train_data, classes=("a", "b", "c"))
    for data, message in ((fewer, "images 6, not 5"), (renamed, r"classes \['nothing'.*'c'\]")):
        with pytest.raises(TrainingError, match=f"last.pt: saved with {message}"):
            run((data, None), tmp_path, replace(BASE, epochs=1), resume=True)


@pytest.mark.parametrize(
    "name",
    [
        "step", "evaluated", "loss", "best_miou", "model", "average", "optimizer", "scaler",
        "random", "images",
    ],
)  # fmt: skip
def test_incomplete_checkpoint_is_rejected(name, tmp_path):
    entries = "step evaluated loss best_miou model average optimizer scaler random images"
    state = dict.fromkeys(entries.split(), 1)
    path = tmp_path / "last.pt"
    checkpoint.save(path, state)
    assert checkpoint.load(path, {"images": 1}) == state
    del state[name]
    checkpoint.save(path, state)
    with pytest.raises(TrainingError, match="last.pt: not a checkpoint of deeplab-fast train"):
        checkpoint.load(path, {"images": 1})


def test_missing_checkpoint_is_an_error(tmp_path):
    with pytest.raises(TrainingError, match="last.pt: No such file .*expected a checkpoint"):
        checkpoint.load(tmp_path / "last.pt", {})


def test_files_are_flushed_before_they_are_renamed(tmp_path, monkeypatch):
    """A crash must not leave the new name without the data."""
    calls = []
    for name in ("fsync", "replace"):
        function = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *a, f=function, n=name: (calls.append(n), f(*a)))
    checkpoint.write(tmp_path / "a", b"content")
    assert calls == ["fsync", "replace"] and (tmp_path / "a").read_bytes() == b"content"


def test_signal_during_an_evaluation_ends_the_run_after_it(shapes, tmp_path, monkeypatch):
    judge = Judge(monkeypatch, 0.8, 0.5)

    def signalled(*arguments, **options):
        signal.raise_signal(signal.SIGTERM)
        return judge(*arguments, **options)

    monkeypatch.setattr(loop, "evaluate", signalled)
    with pytest.raises(Interrupted, match="interrupted after update 3 of 6, saved .*last.pt"):
        run(shapes, tmp_path, BASE, evaluate_every=1)
    state = read(None, tmp_path).state
    assert (state["step"], state["evaluated"]) == (3, 3)
    assert state["best_miou"] == pytest.approx(0.4)


def test_signal_handlers_are_restored(shapes, tmp_path):
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    run((shapes[0], None), tmp_path, replace(BASE, epochs=1))
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_second_signal_ends_a_run_at_once(number, shapes, tmp_path, monkeypatch):
    signal_in_update(monkeypatch, 1, number, number)
    with pytest.raises(KeyboardInterrupt):
        run((shapes[0], None), tmp_path, BASE)
    assert not (tmp_path / "last.pt").exists()


def test_train_works_in_a_thread(shapes, tmp_path):
    """Signals can be handled in the main thread only."""
    results: list[Run] = []
    thread = threading.Thread(
        target=lambda: results.append(run((shapes[0], None), tmp_path, replace(BASE, epochs=1)))
    )
    thread.start()
    thread.join()
    assert results[0].state["step"] == UPDATES_PER_EPOCH


# Several processes


def test_on_rank_zero_runs_on_rank_zero_only(monkeypatch):
    done: list[int] = []
    for rank in (0, 1):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        distributed.on_rank_zero(lambda rank=rank: done.append(rank))
    assert done == [0]


def test_error_of_one_process_is_raised_on_all(monkeypatch):
    monkeypatch.setattr(distributed, "gather", lambda value: [value, "a.png: damaged"])
    with pytest.raises(TrainingError, match="^a.png: damaged$"):
        distributed.raise_on_all_ranks(None)
    monkeypatch.setattr(distributed, "gather", lambda value: [value, None])
    distributed.raise_on_all_ranks(None)
    error = TrainingError("b.png: damaged")
    with pytest.raises(TrainingError, match="^b.png: damaged$") as caught:
        distributed.raise_on_all_ranks(error)
    assert caught.value.__cause__ is error


def test_without_torchrun_there_is_one_process(monkeypatch):
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    cpu = torch.device("cpu")
    assert distributed.start(cpu) == cpu
    assert (distributed.rank(), distributed.world_size()) == (0, 1)
    assert distributed.gather("a") == ["a"]
    assert distributed.any_process(True) and not distributed.any_process(False)
    assert distributed.sum_over_processes(torch.tensor(3.0)) == 3.0


# Loss


def test_loss_normalizer_is_the_weight_of_the_labels():
    """The number of labels, or the sum of their class weights, without ignored pixels."""
    target = torch.tensor([[[0, 1, 2, 255], [2, 2, 255, 255]]])
    assert Objective(Tiny(), Recipe()).loss_normalizer(target) == 5
    weighted = Objective(Tiny(), Recipe(class_weights=(0.5, 4.0, 10.0)))
    assert weighted.loss_normalizer(target) == 0.5 + 4.0 + 30.0


def test_top_k_keeps_at_least_one_pixel():
    model, images = Tiny(aux=False).eval(), torch.randn(1, 3, 8, 8)
    target = torch.randint(3, (1, 8, 8))
    objective = Objective(model, Recipe(top_k_pixels=1e-6))
    losses = F.cross_entropy(model(images)["out"], target, reduction="none")
    assert_close(objective(images, target, objective.loss_normalizer(target)), losses.max())
