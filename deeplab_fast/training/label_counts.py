"""Class frequencies of a data set, counted in one pass over all its label files."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

import numpy as np
from tqdm import tqdm

from . import distributed
from .data import IGNORE, SegmentationData
from .errors import TrainingError
from .loader import in_workers

_CHUNK = 8  # files that a worker reads at a time
_MAX_VALUES = 256  # values of a file that are counted; photos in place of labels have thousands
_MAX_ROWS = 25  # classes that a table may have


@dataclass
class Occurrence:
    """Label files in which something occurs, by their index, and its pixels in all of them."""

    files: list[int] = field(default_factory=list)
    pixels: int = 0

    def add(self, index: int, pixels: int) -> None:
        self.files.append(index)
        self.pixels += pixels


@dataclass(frozen=True)
class LabelCounts:
    """Contents of all label files of a data set, see :func:`count_labels`.

    Args:
        data: the data set.
        pixels, images: int64 [C], pixels of each class and images in which it occurs.
        values: where each of the values in the label files occurs.
        unlabelled: files in which all pixels are ignored.
        unclear_turns: indices of photos of which it is unclear whether to turn them upright.
        sizes: sizes (width, height) of labels and image, for each index where they differ.
        unreadable: one line for each pair with a file that is missing or damaged.
        largest: largest height and largest width of the images.
    """

    data: SegmentationData
    pixels: np.ndarray
    images: np.ndarray
    values: dict[int, Occurrence] = field(default_factory=dict)
    unlabelled: Occurrence = field(default_factory=Occurrence)
    unclear_turns: list[int] = field(default_factory=list)
    sizes: dict[int, tuple[tuple[int, int], tuple[int, int]]] = field(default_factory=dict)
    unreadable: list[str] = field(default_factory=list)
    largest: tuple[int, int] = (0, 0)


@dataclass(frozen=True)
class _File:
    """Contents of one pair of files: a line about an error, or sizes, values and their pixels."""

    index: int
    error: str = ""
    size: tuple[int, int] = (0, 0)
    image_size: tuple[int, int] = (0, 0)
    unclear_turn: bool = False
    values: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    pixels: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))


def count_labels(
    data: SegmentationData, workers: int = 2, quiet: bool = False, name: str = ""
) -> LabelCounts:
    """Read all label files, and count the pixels and files of each value and each class.

    Of the images only the headers are read. With several processes (torch.distributed) each reads a
    part of the files, and all return the counts of the whole.

    Args:
        data: images and their labels.
        workers: processes that read files, per training process; 0 reads in this one.
        quiet: show no progress bar. Otherwise a progress bar is shown on a terminal.
        name: name of the data in the progress bar.

    Raises:
        TrainingError: a worker was killed. Files that cannot be read raise no error, but are in
            ``unreadable``.

    >>> count_labels(data).pixels
    array([1302, 611, 98])
    """
    indices = range(distributed.rank(), len(data), distributed.world_size())
    chunks = [list(indices[start : start + _CHUNK]) for start in range(0, len(indices), _CHUNK)]
    files: list[_File] = []
    caught = None
    with tqdm(
        desc=f"checking labels {name}".rstrip(),
        total=len(indices),
        unit="file",
        leave=False,
        disable=quiet or None,
    ) as bar:
        try:
            for chunk in in_workers(_Files(data), chunks, workers, list):
                files += chunk
                bar.update(len(chunk))
        except TrainingError as error:
            caught = error
    distributed.raise_on_all_ranks(caught)
    whole = [file for part in distributed.gather(files) for file in part]
    return _summary(data, sorted(whole, key=lambda file: file.index))


class _Files:
    """The contents of each pair of files of a data set."""

    def __init__(self, data: SegmentationData) -> None:
        self.data = data

    def __getitem__(self, index: int) -> _File:
        try:
            values = self.data.label_values(index)
            image_size = self.data.image_size(index)
            unclear = self.data.turn_is_unclear(index)
        except TrainingError as error:
            return _File(index, str(error))
        size = values.shape[1], values.shape[0]
        return _File(index, "", size, image_size, unclear, *_histogram(values))


def _histogram(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The most frequent values, in ascending order, and the pixels of each, int64."""
    flat = values.ravel()
    # Labels have long runs of one value, so sorting the runs is faster than sorting the pixels.
    starts = np.flatnonzero(np.concatenate(([True], flat[1:] != flat[:-1])))
    found, runs = np.unique(flat[starts], return_inverse=True)
    lengths = np.diff(starts, append=flat.size)
    pixels = np.bincount(runs.ravel(), lengths, len(found)).astype(np.int64)
    kept = np.sort(np.argsort(-pixels, kind="stable")[:_MAX_VALUES])
    return found[kept], pixels[kept]


def _summary(data: SegmentationData, files: Iterable[_File]) -> LabelCounts:
    pixels, images = np.zeros((2, len(data.classes)), np.int64)
    counts = LabelCounts(data, pixels, images)
    largest = (0, 0)
    for file in files:
        if file.error:
            counts.unreadable.append(file.error)
            continue
        largest = max(largest[0], file.image_size[1]), max(largest[1], file.image_size[0])
        if file.size != file.image_size:
            counts.sizes[file.index] = file.size, file.image_size
        if file.unclear_turn:
            counts.unclear_turns.append(file.index)
        classes = data.classes_of(file.values)
        for label in set(classes.tolist()) - {-1, IGNORE}:
            pixels[label] += file.pixels[classes == label].sum()
            images[label] += 1
        if (classes == IGNORE).all():
            counts.unlabelled.add(file.index, int(file.pixels.sum()))
        for value, number in zip(file.values.tolist(), file.pixels.tolist()):
            counts.values.setdefault(value, Occurrence()).add(file.index, number)
    return replace(counts, largest=largest)


def balanced_class_weights(pixels: Iterable[int]) -> tuple[float, ...]:
    """Weights in the loss that raise rare classes: ``1 / log(1.02 + p)``, p the share of pixels.

    The formula is that of Paszke et al. 2016 (ENet). However rare a class is, its weight is at most
    36 times the smallest one. The weights are scaled so that their mean over all labelled pixels is
    1, and rounded to four digits. A class without pixels gets 0.

    Args:
        pixels: number of pixels of each class, such as ``count_labels(data).pixels``.

    Raises:
        TrainingError: no class has pixels.

    >>> balanced_class_weights([98, 2])
    (0.7499, 13.25)
    """
    counts = [int(count) for count in pixels]
    total = sum(counts)
    if not total:
        raise TrainingError("class_weights: no pixel is labelled (expected some, to balance them)")
    shares = [count / total for count in counts]
    weights = [1 / math.log(1.02 + share) if share else 0.0 for share in shares]
    mean = sum(share * weight for share, weight in zip(shares, weights))
    return tuple(float(f"{weight / mean:.4g}") for weight in weights)


def frequency_table(counts: Mapping[str, LabelCounts]) -> str:
    """A table of the images and the share of the pixels of each class.

    Args:
        counts: name of each data set and its counts, all of the same classes. If these are more
            than fit on a screen, the table says only how many there are.
    """
    names, classes = list(counts), next(iter(counts.values())).data.classes
    if len(classes) > _MAX_ROWS:
        occurring = [f"{np.count_nonzero(counts[name].images)} in {name}" for name in names]
        return f"{len(classes)} classes, of which occur {', '.join(occurring)}"
    width = max(map(len, ("class", *classes)))
    heads = [f"{name} images" for name in names]
    lines = [f"{'class':<{width}}" + "".join(f"  {head}   pixels" for head in heads)]
    for index, label in enumerate(classes):
        line = f"{label:<{width}}"
        for name, head in zip(names, heads):
            share = counts[name].pixels[index] / max(1, counts[name].pixels.sum())
            line += f"  {counts[name].images[index]:>{len(head)}}  {share:>7.2%}"
        lines.append(line)
    return "\n".join(lines)
