"""Checks of all label files before a run."""

from __future__ import annotations

import filecmp
import math
import os
import sys
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from tqdm import tqdm

from . import distributed
from .data import IGNORE, SegmentationData
from .errors import TrainingError
from .label_counts import LabelCounts, count_labels
from .loader import steps_per_epoch
from .recipe import Recipe

_MAX_NAMES = 3  # file names in a message
_MAX_LINES = 20  # lines about unreadable files
_MAX_LABELS = 5  # labels that are no class, with a line each
_MAX_FIRST = 0.2  # share of the first weights in the moving average of a run
_MANY_LABELS = 16  # number of labels that are no class from which on they look like artefacts


def check_labels(
    data: Mapping[str, SegmentationData],
    workers: int = 2,
    quiet: bool = False,
    recipe: Recipe | None = None,
) -> dict[str, LabelCounts]:
    """Check all label files, and print what is wrong with them and how to correct it.

    Errors are files that are missing, damaged or not as large as their image, labels that are no
    class, and labels from which nothing can be learnt or computed. Warnings are classes that occur
    in no file, files without a labelled pixel, images that are in two of the data sets, photos
    whose EXIF orientation cannot be checked, crops that are larger than all images, and a warm-up
    or a moving average that is longer than the run.

    Args:
        data: name of each data set and the data.
        workers, quiet: as in :func:`count_labels`.
        recipe: recipe of a run that trains on the first data set, or None for an evaluation.

    Returns:
        The counts of each data set.

    Raises:
        TrainingError: there are errors; standard error has the lines about each.

    >>> check_labels({"train": train_data, "val": val_data}, recipe=Recipe())
    """
    counts = {name: count_labels(part, workers, quiet, name) for name, part in data.items()}
    warnings, errors = [], []
    for name, part in counts.items():
        trains = recipe is not None and name == next(iter(counts))
        warnings += [f"{name}: {text}" for text in _warnings(part)]
        errors += [f"{name}: {text}" for text in _errors(part, trains)]
    if distributed.rank() == 0:
        first, *others = data
        warnings += [text for name in others for text in _shared_images(data, first, name)]
        if recipe is not None:
            warnings += [*_padded_crops(counts[first], recipe), *_short_run(data[first], recipe)]
        for kind, texts in (("warning", warnings), ("error", errors)):
            for text in texts:
                tqdm.write(f"{kind}: {text}", file=sys.stderr)
    if errors:
        raise TrainingError(
            f"{_count(len(errors), 'problem')} in the labels (expected none, see above; "
            "--no-check, in Python check=False, skips this check)"
        )
    return counts


def _warnings(counts: LabelCounts) -> Iterator[str]:
    data = counts.data
    absent = [name for name, images in zip(data.classes, counts.images) if not images]
    if absent and counts.pixels.any():
        shown = ", ".join(absent[:10]) + (", ..." if len(absent) > 10 else "")
        yield f"classes in no file ({len(absent)} of {len(data.classes)}): {shown}"
    if files := counts.unlabelled.files:
        yield f"{_count(len(files), 'file')} without a labelled pixel: {_names(data, files)}"
    if files := counts.unclear_turns:
        yield (
            f"{_count(len(files), 'photo')} whose labels fit the stored image as well as the one "
            "that is turned upright by its EXIF orientation; the upright one is used (expected "
            f"--exif stored if the labels were drawn on the stored one): {_names(data, files)}"
        )


def _errors(counts: LabelCounts, trains: bool) -> Iterator[str]:
    """Problems that make a run fail, or its results meaningless."""
    data = counts.data
    more = len(counts.unreadable) - _MAX_LINES
    yield from counts.unreadable[:_MAX_LINES]
    if more > 0:
        yield f"{_count(more, 'more file')} cannot be read"
    if counts.sizes:
        labels, image = next(iter(counts.sizes.values()))
        yield (
            f"{_count(len(counts.sizes), 'file')} not as large as the image, such as "
            f"{labels[0]}x{labels[1]} pixels instead of {image[0]}x{image[1]}: "
            f"{_names(data, list(counts.sizes))}"
        )
    values = sorted(counts.values)
    classes = data.classes_of(np.array(values, np.int64))
    if (classes < 0).any():
        yield _no_classes(counts, values, classes)
    elif values == [0, IGNORE] and classes.tolist() == [0, IGNORE]:
        yield (
            "labels are 0 and 255 only, and 255 means ignored (expected two classes: masks of 0 "
            "and 255 need --label-ids 0=0 255=1, in Python label_ids={0: 0, 255: 1})"
        )
    elif values and not counts.pixels.any():
        yield "all pixels are ignored (expected labelled ones)"
    elif trains and np.count_nonzero(counts.pixels) == 1:
        name = data.classes[int(counts.pixels.argmax())]
        yield f"only the class {name} occurs, so that there is nothing to learn (expected two)"


def _no_classes(counts: LabelCounts, values: list[int], classes: np.ndarray) -> str:
    """Several lines about the labels that are no class, the most frequent first."""
    data = counts.data
    unknown = [value for value, label in zip(values, classes) if label < 0]
    lines = [f"{_count(len(unknown), 'label')} without a class"]
    for value in sorted(unknown, key=lambda value: -counts.values[value].pixels)[:_MAX_LABELS]:
        found = counts.values[value]
        lines.append(
            f"  {data.value_name(value)}: {_count(len(found.files), 'file')}, "
            f"{_count(found.pixels, 'pixel')} ({_names(data, found.files)})"
        )
    if len(unknown) > _MAX_LABELS:
        lines.append(f"  and {len(unknown) - _MAX_LABELS} more")
    if len(unknown) >= _MANY_LABELS:
        lines.append("  So many are left by JPEG, and by resizing other than to the nearest pixel")
    return "\n".join([*lines, f"  {_way_out(data, values, unknown)}"])


def _way_out(data: SegmentationData, values: list[int], unknown: list[int]) -> str:
    """Advice about labels that are no class."""
    count = len(data.classes)
    if data.by_color:
        return (
            "(expected the colours of the classes: add lines name,red,green,blue to the file of "
            "--colors; lines of one name are one class, which --ignore can name)"
        )
    mapping: list[int] = []
    if unknown == [count] and 0 not in values:
        mapping = list(range(1, count + 1))  # classes that are counted from 1
    elif max(values) <= IGNORE:
        without = [value for value in values if value != IGNORE]
        mapping = next((found for found in (without, values) if len(found) == count), [])
    if mapping:
        return (
            f"(expected classes of 0 to {count - 1}: if these are the {count} classes in order, "
            f"--label-ids {label_ids_text(mapping)})"
        )
    return (
        f"(expected classes of 0 to {count - 1}: add names to classes.txt or --classes, or map "
        "labels with --label-ids, or --ignore them)"
    )


def label_ids_text(values: Sequence[int]) -> str:
    """Arguments of --label-ids that map ascending values to the classes from 0 on.

    >>> label_ids_text([1, 2, 3, 7])
    '1-3=0-2 7=3'
    """
    runs: list[list[int]] = []  # first and last position of consecutive values
    for position, value in enumerate(values):
        if runs and value == values[position - 1] + 1:
            runs[-1][1] = position
        else:
            runs.append([position, position])
    return " ".join(
        f"{values[first]}={first}"
        if first == last
        else f"{values[first]}-{values[last]}={first}-{last}"
        for first, last in runs
    )


def _shared_images(data: Mapping[str, SegmentationData], first: str, name: str) -> Iterator[str]:
    """A warning of images that are in two data sets, as the same file or as a copy of it."""
    paths = {str(image) for image, _ in data[first].pairs}
    by_name = {os.path.basename(path): path for path in paths}
    shared = []
    for index, (image, _) in enumerate(data[name].pairs):
        twin = by_name.get(os.path.basename(image))
        if str(image) in paths or twin is not None and _are_copies(twin, str(image)):
            shared.append(index)
    if shared:
        yield (
            f"{name}: images that are also in {first} ({len(shared)} of {len(data[name])}), so "
            f"that scores say less about new ones: {_names(data[name], shared)}"
        )


def _are_copies(first: str, second: str) -> bool:
    try:
        return filecmp.cmp(first, second, shallow=False)
    except OSError:  # a file that cannot be read is an error already
        return False


def _padded_crops(counts: LabelCounts, recipe: Recipe) -> Iterator[str]:
    """A warning of crops that are larger than all images, however these are scaled."""
    height, width = (math.ceil(side * recipe.scale[1]) for side in counts.largest)
    crop = recipe.crop_size
    if 0 < height < crop[0] and 0 < width < crop[1]:
        padding = 1 - height * width / (crop[0] * crop[1])
        yield (
            f"crop_size {crop[0]} {crop[1]} is larger than all images, so that at least "
            f"{padding:.0%} of a crop are padding (expected {height} {width} or less)"
        )


def _short_run(data: SegmentationData, recipe: Recipe) -> Iterator[str]:
    """Warnings of a warm-up and of a moving average that are longer than the run."""
    updates = steps_per_epoch(len(data), recipe) * recipe.epochs
    if recipe.warmup_steps > updates:
        yield (
            f"warmup_steps {recipe.warmup_steps} is more than the {_count(updates, 'update')} of "
            "the run, so that the learning rate never reaches its value (expected fewer)"
        )
    # The moving average begins with the weights after the first update.
    first = 0.0 if recipe.ema_decay is None else recipe.ema_decay ** (updates - 1)
    if first > _MAX_FIRST:
        yield (
            f"ema_decay {recipe.ema_decay} is slow for a run of {_count(updates, 'update')}: the "
            f"average still has {first:.0%} of the first weights (expected a smaller decay)"
        )


def _names(data: SegmentationData, indices: Sequence[int]) -> str:
    """The first label files, relative to the folder of all of them."""
    labels = [str(label) for _, label in data.pairs]
    folder = os.path.commonpath([os.path.dirname(label) for label in labels])
    names = [os.path.relpath(labels[index], folder or ".") for index in indices[:_MAX_NAMES]]
    return ", ".join(names) + (", ..." if len(indices) > _MAX_NAMES else "")


def _count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"
