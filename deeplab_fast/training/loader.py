"""Training batches in an order that depends only on the seed, read by worker processes."""

from __future__ import annotations

import functools
import os
import signal
import threading
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader

from .data import SegmentationData
from .errors import TrainingError
from .recipe import Recipe
from .transforms import augment


class Samples:
    """Augmented images and labels. Sample ``(epoch, index)`` depends only on the seed."""

    def __init__(self, data: SegmentationData, recipe: Recipe) -> None:
        self.data, self.recipe = data, recipe

    def __getitem__(self, key: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
        image, labels = self.data.read(key[1])
        random = np.random.default_rng([self.recipe.seed, *key])
        return augment(image, labels, self.recipe, random)


def steps_per_epoch(images: int, recipe: Recipe) -> int:
    """Updates per epoch. The first images of the epoch complete the last batch."""
    return -(-images // recipe.batch_size)


def keys(
    images: int, recipe: Recipe, first_step: int, rank: int, world_size: int
) -> Iterator[list[tuple[int, int]]]:
    """Micro-batches of a process, from ``first_step`` on, as lists of (epoch, index) of the images.

    The images of an update are distributed to the processes in turn. The micro-batches of an update
    are consecutive.
    """
    steps = steps_per_epoch(images, recipe)
    for step in range(first_step, steps * recipe.epochs):
        epoch, within = divmod(step, steps)
        order = np.random.default_rng([recipe.seed, epoch]).permutation(images)
        places = np.arange(within * recipe.batch_size, (within + 1) * recipe.batch_size)
        chosen = [(epoch, int(index)) for index in order[places % images]][rank::world_size]
        size = len(chosen) // recipe.grad_accum_steps
        yield from (chosen[i * size : (i + 1) * size] for i in range(recipe.grad_accum_steps))


def batches(
    data: SegmentationData,
    recipe: Recipe,
    first_step: int = 0,
    workers: int = 0,
    rank: int = 0,
    world_size: int = 1,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Micro-batches from update ``first_step`` to the last: uint8 [N, H, W, 3] and [N, H, W].

    Raises:
        TrainingError: a file cannot be read; the message names it.
    """
    order = keys(len(data), recipe, first_step, rank, world_size)
    return in_workers(Samples(data, recipe), order, workers, _stack)


def in_workers(
    dataset: Any, order: Iterable[Any], workers: int, collate: Any = None
) -> Iterator[Any]:
    """Items of a data set in a given order, read ahead by worker processes.

    Args:
        dataset: has ``dataset[key]``.
        order: keys, or lists of keys if ``collate`` is given.
        workers: number of processes; 0 reads in this one.
        collate: function that makes a batch of the items of a list of keys.

    Raises:
        TrainingError: a file cannot be read, and the message names it; or a worker was killed.
    """
    if workers < 0:
        raise TrainingError(f"workers: expected 0 or more, got {workers}")
    errors_returned: Any = _ReturnsErrors(dataset, collate)
    loader: Any = DataLoader(
        errors_returned,
        batch_size=None,
        sampler=order,
        num_workers=workers,
        pin_memory=torch.cuda.is_available(),
        worker_init_fn=functools.partial(_start_worker, Image.MAX_IMAGE_PIXELS),
        generator=torch.Generator(),  # the default generator is used by dropout
    )
    for item in _without_sigchld(_with_sigterm_blocked(loader)):
        if isinstance(item, TrainingError):
            raise item
        yield item


def _with_sigterm_blocked(loader: Any) -> Iterator[Any]:
    """An iterator over a DataLoader, whose workers block SIGTERM in all their threads.

    Some of the threads start before :func:`_start_worker`.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    try:
        return iter(loader)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _without_sigchld(items: Iterator[Any]) -> Iterator[Any]:
    """Items of a DataLoader, which raises its error for a killed worker only between two items.

    DataLoader's handler of SIGCHLD raises the error in the parent at any point, even in the middle
    of an update. Without the handler DataLoader detects a killed worker within seconds, while it
    waits for an item.
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


class _ReturnsErrors:
    """A data set that returns TrainingErrors: to raised errors DataLoader would add a traceback."""

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


def _start_worker(max_image_pixels: int | None, worker: int) -> None:
    Image.MAX_IMAGE_PIXELS = max_image_pixels  # a started process would have Pillow's own limit
    _ignore_foreign_signals()


def _ignore_foreign_signals() -> None:
    """Ignore SIGINT, and SIGTERM unless the parent sent it.

    Ctrl-C and torchrun send signals to all processes, but the parent needs its workers until it has
    saved the state.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # Once more, since a process that a fork server starts does not inherit the mask of its parent.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})

    def wait() -> None:
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
            pass
        os._exit(0)

    threading.Thread(target=wait, daemon=True).start()
