"""Images in an order that depends on nothing but the seed, read by worker processes."""

from __future__ import annotations

import signal
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
        part = len(chosen) // recipe.accumulate
        yield from (chosen[i * part : (i + 1) * part] for i in range(recipe.accumulate))


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
    """``dataset[key]``, or for a list of keys ``collate`` of them, in order, read ahead."""
    caught: Any = _Caught(dataset, collate)
    loader: Any = DataLoader(
        caught,
        batch_size=None,
        sampler=order,
        num_workers=workers,
        pin_memory=torch.cuda.is_available(),
        worker_init_fn=_ignore_interrupt,
        generator=torch.Generator(),  # or it would draw from the one that dropout draws from
    )
    for item in loader:
        if isinstance(item, TrainingError):
            raise item
        yield item


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


def _ignore_interrupt(worker: int) -> None:
    # Ctrl-C reaches every process of the terminal; the parent saves, and then ends its workers.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
