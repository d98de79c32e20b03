"""Images in an order that depends on nothing but the seed, read by worker processes."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from .data import SegmentationData
from .errors import TrainingError
from .recipe import Recipe
from .transforms import augment


class Samples:
    """Augmented images. Sample ``(epoch, index)`` is the same whenever and wherever it is made."""

    def __init__(self, data: SegmentationData, recipe: Recipe) -> None:
        self.data, self.recipe = data, recipe

    def __getitem__(self, key: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
        image, labels = self.data.read(key[1])
        random = np.random.default_rng([self.recipe.seed, *key])
        return augment(image, labels, self.recipe, random)


def steps_per_epoch(images: int, recipe: Recipe) -> int:
    """Updates in which every image is seen once; the last one is filled up with the first ones."""
    return -(-images // recipe.batch_size)


def keys(
    images: int, recipe: Recipe, first_step: int, rank: int, world_size: int
) -> Iterator[list[tuple[int, int]]]:
    """The (epoch, index) of each batch that a process computes from update ``first_step`` on.

    The processes take turns in an update's images, and an update's parts follow one another.
    """
    steps = steps_per_epoch(images, recipe)
    for step in range(first_step, steps * recipe.epochs):
        epoch, within = divmod(step, steps)
        order = np.random.default_rng([recipe.seed, epoch]).permutation(images)
        places = np.arange(within * recipe.batch_size, (within + 1) * recipe.batch_size)
        chosen = [(epoch, int(index)) for index in order[places % images]][rank::world_size]
        part = len(chosen) // recipe.grad_accum_steps
        yield from (chosen[i * part : (i + 1) * part] for i in range(recipe.grad_accum_steps))


def batches(
    data: SegmentationData,
    recipe: Recipe,
    first_step: int = 0,
    workers: int = 0,
    rank: int = 0,
    world_size: int = 1,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Training batches from update ``first_step`` to the last: uint8 [N, H, W, 3] and [N, H, W].

    Raises:
        TrainingError: a file cannot be used, naming it.
    """
    order = keys(len(data), recipe, first_step, rank, world_size)
    return in_workers(Samples(data, recipe), order, workers, _stack)


def in_workers(
    dataset: Any, order: Iterable[Any], workers: int, collate: Any = None
) -> Iterator[Any]:
    """``dataset[key]``, or for a list of keys ``collate`` of them, in order, read ahead.

    Raises:
        TrainingError: a file cannot be used, naming it, or a worker was killed.
    """
    if workers < 0:
        raise TrainingError(f"workers: expected 0 or more, got {workers}")
    caught: Any = _Caught(dataset, collate)
    loader: Any = DataLoader(
        caught,
        batch_size=None,
        sampler=order,
        num_workers=workers,
        pin_memory=torch.cuda.is_available(),
        worker_init_fn=_obey_the_parent_only,
        generator=torch.Generator(),  # or it would draw from the one that dropout draws from
    )
    for item in _whole_updates(iter(loader)):
        if isinstance(item, TrainingError):
            raise item
        yield item


def _whole_updates(items: Iterator[Any]) -> Iterator[Any]:
    """``items`` of a DataLoader, which fails where the next one is asked for and nowhere else.

    It handles SIGCHLD and would raise wherever the parent is when a worker dies, in the middle of
    an update too. Without, it finds out within seconds, when it waits for that worker.
    """
    main = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGCHLD, signal.SIG_DFL) if main else None
    try:
        yield from items
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise TrainingError(
            "a process that reads images was killed (expected enough memory, also in /dev/shm: try "
            "fewer workers)"
        ) from error
    finally:
        if main:
            signal.signal(signal.SIGCHLD, before)


class _Caught:
    """A data set that returns errors: a worker would wrap them up in its traceback."""

    def __init__(self, dataset: Any, collate: Any) -> None:
        self.dataset, self.collate = dataset, collate

    def __getitem__(self, key: Any) -> Any:
        try:
            if self.collate is None:
                return self.dataset[key]
            return self.collate([self.dataset[one] for one in key])
        except TrainingError as error:
            return error


def _stack(samples: list[tuple[np.ndarray, np.ndarray]]) -> tuple[Tensor, Tensor]:
    images, labels = zip(*samples)
    return torch.from_numpy(np.stack(images)), torch.from_numpy(np.stack(labels))


def _obey_the_parent_only(worker: int) -> None:
    """Signals to all processes, of Ctrl-C or torchrun, are the parent's: it saves, then ends us."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})

    def wait() -> None:
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
            pass
        os._exit(0)

    threading.Thread(target=wait, daemon=True).start()
