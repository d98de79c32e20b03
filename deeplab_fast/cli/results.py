"""Results of ``deeplab-fast segment``: computing and writing them."""

from __future__ import annotations

import io
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from .._io.legend import with_legend
from .._io.overlay import Painting, cutout, overlay
from .._io.palette import label_image
from ..models import InferenceModel
from .images import write_npz, write_png


class Kind(NamedTuple):
    """A kind of result: its name in file names, and the file's extension."""

    name: str
    extension: str = "png"


LABELS, OVERLAY, CUTOUT = Kind("labels"), Kind("overlay"), Kind("cutout")
CONFIDENCE, PROBABILITIES = Kind("confidence"), Kind("probabilities", "npz")

Result = Image.Image | dict[str, np.ndarray]


class Segmenter(NamedTuple):
    """Network that makes the results of one photo at a time.

    Attributes:
        model: the network.
        painting: how its classes are drawn.
        views: keyword arguments of ``model.segment``.
        kinds: the kinds of results.
        legend: True for a legend below the overlay.
    """

    model: InferenceModel
    painting: Painting
    views: dict[str, Any]
    kinds: list[Kind]
    legend: bool

    def __call__(self, photo: Image.Image) -> tuple[np.ndarray, dict[Kind, Result]]:
        """The labels of a photo, and the results of all kinds."""
        results: dict[Kind, Result] = {}
        painting = self.painting
        if CONFIDENCE in self.kinds or PROBABILITIES in self.kinds:
            labels, strips = self.model.segment_with_probabilities(photo, **self.views)
            results = self._from_probabilities(strips, labels.shape)
            labels = painting.keep_only(labels)
        else:
            labels = self.labels(photo)
        results[LABELS] = label_image(labels, painting.palette)
        if OVERLAY in self.kinds:
            picture = overlay(photo, labels, painting)
            results[OVERLAY] = with_legend(picture, labels, painting) if self.legend else picture
        if CUTOUT in self.kinds:
            results[CUTOUT] = cutout(photo, labels, painting)
        return labels, {kind: results[kind] for kind in self.kinds}

    def labels(self, photo: Image.Image) -> np.ndarray:
        """The labels of a photo, without the classes that are not asked for."""
        return self.painting.keep_only(self.model.segment(photo, **self.views))

    def _from_probabilities(
        self, strips: Iterator[np.ndarray], size: tuple[int, ...]
    ) -> dict[Kind, Result]:
        """The confidence, and the probabilities if they are asked for, from strips of rows."""
        only, names = self.painting.only, np.array(self.painting.names)
        classes = sorted(range(len(names)) if only is None else only)
        confidence = np.empty(size, np.uint8)
        keep = PROBABILITIES in self.kinds
        probabilities = np.empty((len(classes) if keep else 0, *size), np.float16)
        top = 0
        for strip in strips:
            rows = slice(top, top + strip.shape[1])
            confidence[rows] = np.round(255 * strip.max(0))
            if keep:
                probabilities[:, rows] = strip[classes]
            top = rows.stop
        return {
            CONFIDENCE: Image.fromarray(confidence),
            PROBABILITIES: {"probabilities": probabilities, "classes": names[classes]},
        }


def write(result: Result, path: Path) -> None:
    """Write a PNG or .npz file completely, or leave the previous file unchanged."""
    if isinstance(result, dict):
        write_npz(result, path)
    else:
        write_png(result, path)


def write_to_stdout(result: Result) -> None:
    """Write a PNG to standard output."""
    assert isinstance(result, Image.Image)
    buffer = io.BytesIO()
    result.save(buffer, format="PNG")
    sys.stdout.buffer.write(buffer.getvalue())
    sys.stdout.flush()
