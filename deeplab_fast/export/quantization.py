"""Post-training quantisation of OpenVINO models to int8 by NNCF."""

from __future__ import annotations

import contextlib
import io
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from ..models.photos import photo_of_argument
from ..models.preprocessing import network_input
from ..models.segmentation import SegmentationModel
from .check import Result, labels_of
from .optional import needs, not_installed

_T = TypeVar("_T")

_MOST_CALIBRATED = 300  # NNCF's default; ranges change little with more photos
_MOST_COMPARED = 100
_FEWEST_TO_HOLD_OUT = 10  # with fewer photos, all are needed for calibration
_RARE = 1e-3  # share of the pixels below which a class does not count


class Agreement(NamedTuple):
    """How well the labels of an int8 model agree with those of the fp32 model.

    Attributes:
        miou: mean over classes of the intersection of the two models' pixels divided by their
            union, all photos together, from 0 to 1. Classes that cover less than 0.1 % of the
            pixels in both models do not count: a few pixels decide their ratio.
        rare: number of classes that do not count.
        equal: share of the pixels with equal labels.
        photos: number of photos compared.
        calibrated: number of photos used for calibration.
        held_out: whether the photos compared were left out of the calibration. With fewer than 10
            photos they are the same.
    """

    miou: float
    rare: int
    equal: float
    photos: int
    calibrated: int
    held_out: bool

    def __str__(self) -> str:
        compared = (
            _photos(self.photos, "other") if self.held_out else f"the same {_photos(self.photos)}"
        )
        plural = "es" * (self.rare != 1)
        without = f" without {self.rare} class{plural} of less than {_RARE:.1%} of the pixels"
        return (
            f"int8 calibrated on {_photos(self.calibrated)}; labels compared with fp32 on "
            f"{compared}: mean IoU {self.miou:.1%}"
            f"{without if self.rare else ''}, {self.equal:.2%} equal"
        )

    @property
    def warning(self) -> str | None:
        """Advice if the labels agree poorly, or None."""
        if self.miou >= 0.9:
            return None
        return (
            f"int8 changes many labels: mean IoU with fp32 {self.miou:.1%} (expected 90 % or "
            "more). Calibrate on more photos, of the kind that the model will see, or export "
            "without --int8"
        )


class Photos:
    """The inputs of a network for photos, split into those to calibrate on and those to compare.

    A fifth of the photos, at most 100 and evenly spread, are held out of the calibration and
    compared. At most 300 of the others, evenly spread, are calibrated on. Fewer than 10 photos are
    used for both.

    Args:
        paths: of image files.
        model: its preprocessing is that of the photos.
        size: (height, width) to which photos are resized; None for that of ``segment``.

    Raises:
        ValueError: there are no photos, or the model takes none.
    """

    def __init__(self, paths: Sequence[Path], model: Any, size: tuple[int, int] | None) -> None:
        if not paths:
            raise ValueError("calibration: expected at least one photo, got none")
        if not isinstance(model, SegmentationModel):
            raise ValueError("calibration: expected a model with preprocessing")
        model.preprocessing.check_takes_photos()
        self._model, self._size = model, size
        self.held_out = len(paths) >= _FEWEST_TO_HOLD_OUT
        self.to_compare = list(paths)
        rest = list(paths)
        if self.held_out:
            self.to_compare = evenly_spread(paths, len(paths) // 5)
            rest = [path for path in paths if path not in set(self.to_compare)]
        self.to_compare = evenly_spread(self.to_compare, _MOST_COMPARED)
        self.to_calibrate = evenly_spread(rest, _MOST_CALIBRATED)

    def input(self, path: Path) -> np.ndarray:
        """The input of the network for a photo, as ``segment`` makes it: [1, C, H, W].

        Raises:
            ValueError: the photo cannot be read.
        """
        photo, preprocessing = photo_of_argument(path), self._model.preprocessing
        if self._size is None:
            pixels = network_input(photo, preprocessing, self._model.align_corners)
        else:
            height, width = self._size
            photo = photo.resize((width, height), Image.Resampling.BILINEAR)
            pixels = replace(preprocessing, resize=None, crop=None)(photo)[None]
        return pixels.contiguous().numpy()


def evenly_spread(items: Sequence[_T], count: int) -> list[_T]:
    """``count`` of the items at equal distances, or all if there are not more.

    >>> evenly_spread("abcdef", 3)
    ['a', 'c', 'e']
    """
    count = min(count, len(items))
    return [items[index * len(items) // count] for index in range(count)]


def quantize(network: Any, items: Sequence[_T], input_of: Callable[[_T], np.ndarray]) -> Any:
    """An ``openvino.Model`` with convolutions in int8.

    NNCF chooses what to quantise: convolutions and the sums between them, not the logits, their
    resize and the argmax. It measures the range of each activation on the items and corrects the
    biases by the mean error of each channel (Nagel et al. 2019, "Data-free quantization through
    weight equalization and bias correction", section 4.2). Depthwise convolutions in fp32 would be
    more accurate, but slower.

    Args:
        network: changed in place.
        items: what to calibrate on, at least one.
        input_of: makes an input of the network from an item.

    Raises:
        ImportError: NNCF is not installed.
    """
    nncf = import_nncf()
    # NNCF does not recognise biases and depthwise weights that are reshaped constants, as in a
    # network read from ONNX: it would correct no bias and leave depthwise convolutions in fp32.
    from openvino.passes import ConstantFolding, Manager

    passes = Manager()
    passes.register_pass(ConstantFolding())
    passes.run_passes(network)
    with tqdm(total=len(items), desc="calibrating", leave=False, disable=None) as bar:

        def next_input(item: _T) -> np.ndarray:
            bar.update()
            return input_of(item)

        with _quiet(), not_installed("nncf.torch"):  # it takes seconds, and is for other models
            return nncf.quantize(
                network,
                nncf.Dataset(items, next_input),
                # Asymmetric activations are more accurate and no slower on CPUs.
                preset=nncf.QuantizationPreset.MIXED,
                subset_size=len(items),
            )


def agreement(
    fp32: Callable[[np.ndarray], np.ndarray],
    int8: Callable[[np.ndarray], np.ndarray],
    photos: Photos,
    result: Result,
) -> Agreement:
    """Compare the labels of two engines on ``photos.to_compare``."""
    counts = np.zeros((3, 2**16), dtype=np.int64)  # by class: intersection, fp32, int8
    for path in tqdm(photos.to_compare, desc="comparing", leave=False, disable=None):
        images = photos.input(path)
        expected, got = (_labels(engine(images), result) for engine in (fp32, int8))
        for row, labels in zip(counts, (expected[expected == got], expected, got)):
            row += np.bincount(labels.ravel(), minlength=row.size)
    intersection, *totals = counts
    union = sum(totals) - intersection
    pixels = totals[0].sum()
    occurs = union > 0
    common = np.maximum(*totals) >= _RARE * pixels
    return Agreement(
        miou=float((intersection[common] / union[common]).mean()),
        rare=int((occurs & ~common).sum()),
        equal=float(intersection.sum() / pixels),
        photos=len(photos.to_compare),
        calibrated=len(photos.to_calibrate),
        held_out=photos.held_out,
    )


def _labels(output: np.ndarray, result: Result) -> np.ndarray:
    if result == "logits":
        output = labels_of(torch.from_numpy(output)).numpy()
    return output.astype(np.int64)


def import_nncf() -> Any:
    """The module ``nncf``, imported so that it reports nothing to its makers.

    Raises:
        ImportError: it is not installed.
    """
    with needs("nncf", extra="int8"), not_installed("openvino_telemetry"):
        import nncf

        return nncf


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep NNCF's progress bars and messages off standard output."""
    logger = logging.getLogger("nncf")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logger.setLevel(level)


def _photos(count: int, which: str = "") -> str:
    return f"{count} {which} photo{'s' * (count != 1)}".replace("  ", " ")
