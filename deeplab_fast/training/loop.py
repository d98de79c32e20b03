"""Training."""

from __future__ import annotations

import contextlib
import json
import math
import os
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

from .._io.palette import overlay
from ..models.sliding_window import predict_labels
from . import checkpoint, distributed
from .data import SegmentationData
from .errors import Interrupted, TrainingError
from .evaluation import evaluate, network_input
from .loader import batches, steps_per_epoch
from .log import Log
from .metrics import Scores
from .objective import Objective
from .recipe import Recipe

_PICTURES = 4  # of the validation images, drawn after each evaluation


def train(
    model: Any,
    train_data: SegmentationData,
    val_data: SegmentationData | None = None,
    recipe: Recipe | None = None,
    output: str | os.PathLike[str] = "run",
    *,
    resume: bool = False,
    workers: int = 2,
    evaluate_every: int = 1,
    log_every: int = 10,
) -> Any:
    """Train a model; it is changed in place, and returned in evaluation mode.

    Written to ``output``: ``last.pt``, the state of the run; ``best.safetensors``, the model with
    the highest mean IoU on ``val_data``, and at the end ``last.safetensors``, both for
    ``DeepLabV3.from_pretrained``; ``config.json``, ``log.jsonl`` and, where it is installed, the
    event files of TensorBoard. Models and state appear complete or not at all.

    A run that was stopped and goes on with ``resume`` computes what it would have computed: order,
    augmentation, dropout, optimizer, average and loss scale are those of an uninterrupted one. On
    a GPU that is exact as far as the kernels are. Its recipe must be the same but for
    ``grad_accum_steps`` and, if ``power`` is 0, ``epochs``; the number of processes may change.

    Where several processes run (torchrun), each computes its share of every batch, with
    DistributedDataParallel and, on GPUs, SyncBatchNorm: what comes out is what one would compute,
    apart from dropout.

    Args:
        model: a :class:`deeplab_fast.DeepLabV3` on the device to train on.
        train_data, val_data: images and labels; nothing is evaluated without the second.
        recipe: the numbers; ``Recipe()`` by default.
        output: folder of the results.
        resume: go on with what is in ``output``, or start if that is nothing.
        workers: processes that read images, for each process that trains.
        evaluate_every: epochs from one evaluation and saved state to the next.
        log_every: updates from one line in the log to the next.

    Raises:
        TrainingError: a file cannot be used or written, ``output`` has another run, or the loss is
            no longer a number. What was written before is whole, and after a file that cannot be
            read the state is saved.
        Interrupted: SIGINT or SIGTERM came; the state was saved after the update it came in. The
            second one raises KeyboardInterrupt at once.

    >>> train(DeepLabV3("resnet50", 11), train_data, val_data, Recipe(epochs=100), "run")
    """
    for name, value, least in (
        ("workers", workers, 0),
        ("evaluate_every", evaluate_every, 1),
        ("log_every", log_every, 1),
    ):
        if value < least:
            raise TrainingError(f"{name}: expected {least} or more, got {value}")
    run = _Run(model, train_data, val_data, recipe or Recipe(), Path(output))
    run.workers, run.evaluate_every, run.log_every = workers, evaluate_every, log_every
    run.start(resume)
    return run.go()


class _Run:
    """The parts of a run, and what it knows at update ``step``."""

    def __init__(
        self,
        model: Any,
        train_data: SegmentationData,
        val_data: SegmentationData | None,
        recipe: Recipe,
        output: Path,
    ) -> None:
        self.train_data, self.val_data = train_data, val_data
        self.recipe, self.output = recipe, output
        self.workers = self.evaluate_every = self.log_every = 1
        self.rank, self.processes = distributed.rank(), distributed.world_size()
        self.device = next(model.parameters()).device
        self.steps_per_epoch = steps_per_epoch(len(train_data), recipe)
        self.steps = self.steps_per_epoch * recipe.epochs
        self.step = 0
        self.evaluated = 0  # the last update after which the model was evaluated
        self.loss: float | None = None
        self.best_miou: float | None = None
        self.log: Log | None = None
        self.settings = {
            "architecture": {
                **model.config,
                "num_classes": model.classifier[-1].out_channels,
                "aux_loss": model.aux_classifier is not None,
            },
            "classes": list(train_data.classes),
            "images": len(train_data),
            "recipe": _decisive(recipe),
        }
        self._check(model)

        model.categories = train_data.classes
        model.to(memory_format=torch.channels_last)
        if self.processes > 1 and self.device.type == "cuda":  # it has no code for a CPU
            model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
        if recipe.freeze_batch_norm:
            for norm in _batch_norms(model):
                norm.requires_grad_(False)
        self.model = model
        self.objective = Objective(model, recipe).to(self.device)
        self.parallel: Any = self.objective
        if self.processes > 1:
            ids = [self.device.index] if self.device.type == "cuda" else None
            self.parallel = DistributedDataParallel(self.objective, device_ids=ids)
        self.optimizer = recipe.optimizer(model)
        self.dtype = getattr(torch, recipe.dtype)
        self.scaler = torch.amp.GradScaler(
            self.device.type, enabled=self.dtype == torch.float16, init_scale=2.0**16
        )
        self.average = None
        if recipe.ema_decay is not None:
            decay: Any = get_ema_multi_avg_fn(recipe.ema_decay)
            self.average = AveragedModel(model, multi_avg_fn=decay, use_buffers=True)
        mean, std = model.preprocessing.mean, model.preprocessing.std
        self.mean = torch.tensor(mean, device=self.device).view(3, 1, 1)
        self.std = torch.tensor(std, device=self.device).view(3, 1, 1)

    def start(self, resume: bool) -> None:
        """Take up the run that is in the output folder, or begin one."""
        self.path, log = self.output / "last.pt", self.output / "log.jsonl"
        torch.manual_seed(self.recipe.seed + self.rank)
        saved = self.path.exists()
        if not resume and (saved or log.exists() and log.stat().st_size):
            raise TrainingError(
                f"{self.output}: there is a run in that folder (expected resume, or another output)"
            )
        if saved:
            self._restore()
        if len(set(distributed.gather(self.step))) > 1:
            raise TrainingError(
                f"{self.path}: not there for all processes (expected a folder that they share)"
            )

    def _check(self, model: Any) -> None:
        for name, data in (("train_data", self.train_data), ("val_data", self.val_data)):
            if data is not None and not len(data):
                raise TrainingError(f"{name}: expected images, got none")
        recipe, shares = self.recipe, self.processes * self.recipe.grad_accum_steps
        if recipe.batch_size % shares:
            raise TrainingError(
                f"batch_size: expected a multiple of {shares} ({self.processes} processes, "
                f"{recipe.grad_accum_steps} accumulated parts), got {recipe.batch_size}"
            )
        # A batch of one leaves batch norm one value per channel after image pooling, unless
        # SyncBatchNorm adds those of other processes.
        alone = recipe.batch_size // recipe.grad_accum_steps
        if self.device.type != "cuda":
            alone //= self.processes
        if alone < 2 and not recipe.freeze_batch_norm:
            raise TrainingError(
                "batch_size: expected at least 2 images at a time for batch norm (or "
                f"freeze_batch_norm), got {alone}"
            )
        weights, classes = recipe.class_weights, len(self.train_data.classes)
        outputs = model.classifier[-1].out_channels
        if outputs != classes:
            raise TrainingError(f"model: expected {classes} classes as in the data, got {outputs}")
        if weights is not None and len(weights) != classes:
            raise TrainingError(f"class_weights: expected {classes} numbers, got {len(weights)}")
        if self.val_data is not None and self.val_data.classes != self.train_data.classes:
            raise TrainingError("val_data: expected the classes of train_data")

    def _open(self) -> None:
        """The folder and the log."""
        try:
            self.output.mkdir(parents=True, exist_ok=True)
            for partial in self.output.glob(".*.partial"):  # of a run that was killed as it wrote
                partial.unlink()
        except OSError as error:
            raise TrainingError(f"{self.output}: {error.strerror} (expected a folder)") from error
        config = {**self.settings, "recipe": asdict(self.recipe), "processes": self.processes}
        text = json.dumps(config, indent=2)
        checkpoint.write(self.output / "config.json", text.encode() + b"\n")
        self.log = Log(self.output, self.step, self.evaluated)

    def go(self) -> Any:
        distributed.on_rank_zero(self._open)
        with contextlib.ExitStack() as stack:
            if self.log is not None:
                stack.callback(self.log.close)
            stopped = stack.enter_context(_signals())
            bar = stack.enter_context(
                tqdm(
                    desc="training",
                    total=self.steps,
                    initial=self.step,
                    unit="update",
                    dynamic_ncols=True,
                    disable=None if self.rank == 0 else True,
                )
            )
            loader: Any = batches(
                self.train_data, self.recipe, self.step, self.workers, self.rank, self.processes
            )
            stack.callback(loader.close)
            self._loop(loader, bar, stopped)
        self._save_model("last.safetensors")
        if self.rank == 0:
            best = "" if self.best_miou is None else f", best mean IoU {100 * self.best_miou:.2f} %"
            tqdm.write(f"finished: models in {self.output}{best}")
        return self._result().eval()

    def _loop(self, loader: Any, bar: Any, stopped: threading.Event) -> None:
        self._train_mode()
        clock, logged = time.perf_counter(), self.step
        stop = False
        while True:
            # First, for a run that goes on may have been stopped before it was evaluated.
            if self._is_pause() and self.evaluated < self.step and not stop:
                self._evaluate()
                stop = distributed.any_process(stopped.is_set())
                clock = time.perf_counter()
            if self.step >= self.steps and self.evaluated == self.step:
                return
            if stop:
                raise Interrupted(
                    f"interrupted after update {self.step} of {self.steps}, saved {self.path} "
                    "(resume goes on from there)"
                )
            loss = self._update(self._next_parts(loader))
            self.step += 1
            bar.update()
            log = self._is_pause() or self.step % self.log_every == 0
            stop = distributed.any_process(stopped.is_set())
            if log or stop:
                self.loss = self._checked(loss)
                seconds, updates = time.perf_counter() - clock, self.step - logged
                speed = updates * self.recipe.batch_size / seconds
                bar.set_postfix_str(f"loss {self.loss:.3f}, {speed:.1f} images/s")
                rate = self.optimizer.param_groups[0]["lr"]
                self._log(loss=self.loss, learning_rate=rate, images_per_second=speed)
                clock, logged = time.perf_counter(), self.step
            if self._is_pause() or stop:
                self._save()

    def _is_pause(self) -> bool:
        """Whether the model is evaluated after this update, and the state saved."""
        every = self.steps_per_epoch * self.evaluate_every
        return self.step % every == 0 or self.step >= self.steps

    def _next_parts(self, loader: Any) -> list[tuple[Tensor, Tensor]]:
        parts, error = [], None
        try:
            parts = [next(loader) for _ in range(self.recipe.grad_accum_steps)]
        except TrainingError as caught:
            error = caught
        if distributed.any_process(error is not None):
            if self.step:  # once the file is put right the run goes on from here
                self._save()
            distributed.raise_on_all_ranks(error)
        return parts

    def _update(self, parts: list[tuple[Tensor, Tensor]]) -> Tensor:
        """One step of the optimizer; this process's share of the loss."""
        self.recipe.set_learning_rates(self.optimizer, self.step, self.steps)
        batch = [self._to_device(*part) for part in parts]
        weight = torch.stack([self.objective.loss_normalizer(target) for _, target in batch]).sum()
        # Each share is divided by the weight of all; DistributedDataParallel divides by processes.
        weight = distributed.sum_over_processes(weight) / self.processes
        total = torch.zeros((), device=self.device)
        for index, (images, target) in enumerate(batch):
            last = index == len(batch) - 1
            together = last or self.processes == 1
            with contextlib.nullcontext() if together else self.parallel.no_sync():
                with torch.autocast(
                    self.device.type, self.dtype, enabled=self.dtype != torch.float32
                ):
                    loss = self.parallel(images, target, weight)
                self.scaler.scale(loss).backward()
            total += loss.detach()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        if self.average is not None:
            self.average.update_parameters(self.model)
        return total / self.processes

    def _to_device(self, images: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        images = images.to(self.device, non_blocking=True).permute(0, 3, 1, 2)  # channels_last
        images = (images / 255 - self.mean) / self.std
        return images, target.to(self.device, non_blocking=True).long()

    def _train_mode(self) -> None:
        self.model.train()
        if self.recipe.freeze_batch_norm:
            for norm in _batch_norms(self.model):
                norm.eval()

    def _checked(self, loss: Tensor) -> float:
        value = distributed.sum_over_processes(loss.clone()).item()
        if not math.isfinite(value):
            raise self._diverged(f"the loss is {value}")
        return value

    def _diverged(self, what: str) -> TrainingError:
        return TrainingError(
            f"{what} at update {self.step} (expected a number: try a lower learning rate or a "
            f"longer warm-up). {self.output} keeps what was saved before"
        )

    def _result(self) -> Any:
        return self.model if self.average is None else self.average.module

    def _evaluate(self) -> None:
        epoch = self.step // self.steps_per_epoch
        line = f"epoch {epoch} of {self.recipe.epochs}: loss {self.loss:.3f}"
        self.evaluated = self.step
        if self.val_data is not None:
            model = self._result()
            scores = evaluate(
                model, self.val_data, dtype=self.dtype, workers=self.workers, quiet=self.rank > 0
            )
            self._train_mode()
            if self.rank == 0:
                self._log_scores(scores)
            if self.best_miou is None or scores.miou > self.best_miou:
                self.best_miou = scores.miou
                self._save_model("best.safetensors")
            self._save()
            line += (
                f", mean IoU {100 * scores.miou:.2f} %, "
                f"pixel accuracy {100 * scores.pixel_accuracy:.2f} %"
            )
        if self.rank == 0:
            tqdm.write(line)

    def _log(self, **values: float | None) -> None:
        if self.log is not None:
            self.log.scalars(self.step, **values)

    def _log_scores(self, scores: Scores) -> None:
        values = scores.as_dict()
        names = ("miou", "pixel_accuracy", "mean_accuracy", "frequency_weighted_iou")
        self._log(**{f"val_{name}": values[name] for name in names})
        self._log(**{f"val_iou/{name}": value for name, value in values["iou"].items()})
        if self.log is None or self.log.writer is None or self.val_data is None:
            return
        model = self._result().eval()
        for index in range(min(_PICTURES, len(self.val_data))):
            image, truth = self.val_data.read(index)
            found = self._labels(model, image)
            drawn = [image, overlay(image, found), overlay(image, truth)]
            self.log.picture(self.step, f"val/{index} image, found, true", drawn)
        self._train_mode()

    def _labels(self, model: Any, image: Image.Image) -> Any:
        pixels = network_input(image, model.preprocessing, model.align_corners).to(self.device)
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            return predict_labels(model, pixels, (image.height, image.width)).cpu().numpy()

    def _save_model(self, name: str) -> None:
        path = self.output / name

        def write() -> None:
            try:
                self._result().save_pretrained(path)
            except (OSError, SafetensorError) as error:
                raise checkpoint.cannot_write(path, error) from error

        distributed.on_rank_zero(write)

    def _save(self) -> None:
        values = self.model.state_dict().values()
        if not torch.stack([value.isfinite().all() for value in values]).all():
            raise self._diverged("a weight is not finite")
        state = {
            **self.settings,
            "step": self.step,
            "evaluated": self.evaluated,
            "loss": self.loss,
            "best_miou": self.best_miou,
            "model": self.model.state_dict(),
            "average": None if self.average is None else self.average.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "random": distributed.gather(checkpoint.random_state(self.device)),
        }
        distributed.on_rank_zero(lambda: checkpoint.save(self.path, state))

    def _restore(self) -> None:
        state = checkpoint.load(self.path, self.settings)
        self.model.load_state_dict(state["model"])
        if self.average is not None:
            self.average.load_state_dict(state["average"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        for name in ("step", "evaluated", "loss", "best_miou"):
            setattr(self, name, state[name])
        if len(state["random"]) == self.processes:  # or dropout is drawn anew
            checkpoint.set_random_state(state["random"][self.rank], self.device)


def _decisive(recipe: Recipe) -> dict[str, Any]:
    """What a run that goes on must share with itself before, as JSON has it.

    That is all but the parts of an update, a matter of memory, and the end of the training where
    the learning rate does not depend on it.
    """
    values = json.loads(json.dumps(asdict(recipe)))
    del values["grad_accum_steps"]
    if recipe.power == 0:
        del values["epochs"]
    return values


def _batch_norms(model: nn.Module) -> Iterator[nn.Module]:
    for module in model.modules():
        if isinstance(module, (nn.BatchNorm2d, nn.SyncBatchNorm)):
            yield module


@contextlib.contextmanager
def _signals() -> Iterator[threading.Event]:
    """An event that the first SIGINT or SIGTERM sets; a second one interrupts at once."""
    stopped = threading.Event()

    def stop(number: int, frame: Any) -> None:
        if stopped.is_set():
            raise KeyboardInterrupt
        stopped.set()

    if threading.current_thread() is not threading.main_thread():
        yield stopped  # signals are the main thread's
        return
    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stopped
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
