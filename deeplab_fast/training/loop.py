"""Training loop."""

from __future__ import annotations

import contextlib
import math
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from . import distributed
from .compatibility import check_compatible
from .data import SegmentationData
from .errors import Interrupted, TrainingError, diverged
from .evaluation import evaluate
from .loader import batches, steps_per_epoch
from .recipe import Recipe
from .report import Report
from .run_folder import RunFolder, resume_settings
from .schedule import Schedule
from .signals import stop_requested
from .state import TrainingState
from .step import TrainingStep

MicroBatch = tuple[Tensor, Tensor]  # images uint8 [N, H, W, 3], labels uint8 [N, H, W]


class _Run(NamedTuple):
    """The components of a run."""

    state: TrainingState
    step: TrainingStep
    schedule: Schedule
    folder: RunFolder
    report: Report
    val_data: SegmentationData | None
    workers: int


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
    """Train a model in place, and return it, or its moving average, in evaluation mode.

    ``output`` receives ``last.pt``, the checkpoint of the run; ``best.safetensors``, the model with
    the highest mean IoU on ``val_data``, and at the end ``last.safetensors``, both for
    ``from_pretrained``; ``config.json``, ``log.jsonl`` and, if TensorBoard is installed,
    its event files. Checkpoint and models are written completely or not at all.

    A run that was stopped resumes bit for bit with ``resume``: image order, augmentation, dropout,
    optimizer, moving average and loss scale are those of an uninterrupted run. (On a GPU, some of
    PyTorch's own kernels are not deterministic.) The recipe must be the same, except for
    ``grad_accum_steps`` and, if ``power`` is 0, ``epochs``. The number of processes may change.

    With several processes (torchrun) each computes a part of every batch, with
    DistributedDataParallel and, on GPUs, SyncBatchNorm. Apart from dropout, the result is that of
    one process.

    Args:
        model: a :class:`deeplab_fast.DeepLabV3` or :class:`deeplab_fast.DeepLabV3Plus` on the
            device to train on.
        train_data: images and labels to train on.
        val_data: images and labels to evaluate on, or None for no evaluation.
        recipe: hyperparameters; ``Recipe()`` by default.
        output: folder of the results.
        resume: resume the run in ``output``, or start one if there is none.
        workers: processes that read images, per training process.
        evaluate_every: epochs from one evaluation and checkpoint to the next.
        log_every: updates from one line in the log to the next.

    Raises:
        TrainingError: a file cannot be read or written, ``output`` contains another run, or the
            loss is not finite. Files that were written before stay complete. If an image cannot be
            read, the state is saved first.
        Interrupted: the process got SIGINT or SIGTERM, and the state was saved after the current
            update. A second signal raises KeyboardInterrupt at once.

    >>> train(DeepLabV3("resnet50", 11), train_data, val_data, Recipe(epochs=100), "run")
    """
    for name, value, least in (
        ("workers", workers, 0),
        ("evaluate_every", evaluate_every, 1),
        ("log_every", log_every, 1),
    ):
        if value < least:
            raise TrainingError(f"{name}: expected {least} or more, got {value}")
    recipe = recipe or Recipe()
    check_compatible(model, train_data, val_data, recipe)
    is_binary = model.classifier[-1].out_channels == 1
    model.categories = train_data.classes[is_binary:]
    folder = RunFolder(Path(output), resume_settings(model, train_data, recipe))
    state = TrainingState(model, recipe)
    folder.start_or_resume(state, recipe.seed, resume)
    schedule = Schedule(
        steps_per_epoch(len(train_data), recipe), recipe.epochs, evaluate_every, log_every
    )
    step = TrainingStep(state, recipe, schedule.num_steps)
    report = Report(state, schedule, recipe.batch_size)

    def open_output() -> None:
        folder.create(recipe)
        report.open_log(folder)

    distributed.on_rank_zero(open_output)
    run = _Run(state, step, schedule, folder, report, val_data, workers)
    rank, processes = distributed.rank(), distributed.world_size()
    loader: Any = batches(train_data, recipe, state.step, workers, rank, processes)
    with report, stop_requested() as stopped, contextlib.closing(loader):
        _loop(run, loader, stopped)
    folder.save_model(state, "last.safetensors")
    report.finished(folder)
    return state.result.eval()


def _loop(run: _Run, loader: Iterator[MicroBatch], stopped: threading.Event) -> None:
    """Update, log, save and evaluate until the last update is evaluated or a signal arrives."""
    state, schedule, folder, report = run.state, run.schedule, run.folder, run.report
    state.train_mode()
    report.restart_clock()
    stop = False
    while True:
        # Evaluate first: a run may have been stopped between an update and its evaluation.
        if schedule.evaluates_after(state.step) and state.evaluated < state.step and not stop:
            _evaluate(run)
            stop = distributed.any_process(stopped.is_set())
            report.restart_clock()
        if state.step >= schedule.num_steps and state.evaluated == state.step:
            return
        if stop:
            raise Interrupted(
                f"interrupted after update {state.step} of {schedule.num_steps}, saved "
                f"{folder.checkpoint} (resume continues from there)"
            )
        loss = run.step.update(_next_micro_batches(run, loader))
        report.advance()
        stop = distributed.any_process(stopped.is_set())
        if schedule.logs_after(state.step) or stop:
            state.loss = distributed.sum_over_processes(loss).item()
            if not math.isfinite(state.loss):
                raise diverged(f"the loss is {state.loss}", state.step, folder.path)
            report.loss()
        if schedule.evaluates_after(state.step) or stop:
            folder.save(state)


def _next_micro_batches(run: _Run, loader: Iterator[MicroBatch]) -> list[MicroBatch]:
    """The micro-batches of the next update.

    Raises:
        TrainingError: on all ranks, if an image of one rank cannot be read. The state is saved, so
            that the run can be resumed once the file is corrected.
    """
    micro_batches, error = [], None
    try:
        micro_batches = [next(loader) for _ in range(run.step.recipe.grad_accum_steps)]
    except TrainingError as caught:
        error = caught
    if distributed.any_process(error is not None):
        if run.state.step:
            run.folder.save(run.state)
        distributed.raise_on_all_ranks(error)
    return micro_batches


def _evaluate(run: _Run) -> None:
    """Evaluate the model, report its scores, and keep it if it is the best so far."""
    state, folder, data = run.state, run.folder, run.val_data
    state.evaluated = state.step
    scores = None
    if data is not None:
        quiet = distributed.rank() > 0
        scores = evaluate(state.result, data, dtype=state.dtype, workers=run.workers, quiet=quiet)
        state.train_mode()
        run.report.scores(scores, data)
        if state.best_miou is None or scores.miou > state.best_miou:
            state.best_miou = scores.miou
            folder.save_model(state, "best.safetensors")
        folder.save(state)
    run.report.epoch(scores)
