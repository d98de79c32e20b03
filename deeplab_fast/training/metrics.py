"""Segmentation metrics, computed from the confusion matrix."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor


def confusion_matrix(target: Tensor, prediction: Tensor, num_classes: int) -> Tensor:
    """Number of pixels of class i predicted as class j, int64 [num_classes, num_classes].

    Pixels whose target is not a class, such as 255, do not count.

    Args:
        target, prediction: integer tensors of one shape.
    """
    counts = target < num_classes
    pairs = target[counts].long() * num_classes + prediction[counts].long()
    return torch.bincount(pairs, minlength=num_classes**2).view(num_classes, num_classes)


@dataclass(frozen=True)
class Scores:
    """Metrics of Long et al. 2015 (section 5), as fractions.

    A class that is neither in the ground truth nor in the predictions has no IoU (NaN) and does not
    count in the mean IoU. A class that is not in the ground truth has no recall and does not count
    in the mean accuracy.

    Args:
        confusion: int64 [C, C], rows are ground truth and columns predictions.
        classes: names of the C classes.
    """

    confusion: np.ndarray
    classes: tuple[str, ...]

    @property
    def iou(self) -> np.ndarray:
        """Intersection over union of each class, float64 [C]."""
        hits = np.diag(self.confusion)
        return _divide(hits, self.confusion.sum(0) + self.confusion.sum(1) - hits)

    @property
    def accuracy(self) -> np.ndarray:
        """Recall of each class, float64 [C]."""
        return _divide(np.diag(self.confusion), self.confusion.sum(1))

    @property
    def miou(self) -> float:
        """Mean IoU."""
        return _mean(self.iou)

    @property
    def mean_accuracy(self) -> float:
        """Mean recall of the classes."""
        return _mean(self.accuracy)

    @property
    def pixel_accuracy(self) -> float:
        """Fraction of the pixels that are predicted correctly."""
        return float(_divide(np.diag(self.confusion).sum(), self.confusion.sum()))

    @property
    def frequency_weighted_iou(self) -> float:
        """Mean of the IoU weighted by the number of pixels of each class."""
        frequency = _divide(self.confusion.sum(1), self.confusion.sum())
        return float(np.where(frequency == 0, 0, frequency * self.iou).sum())

    @property
    def only_prediction(self) -> str | None:
        """The class that is predicted for all pixels, although others are in the ground truth."""
        (predicted,), (present,) = (self.confusion.any(axis).nonzero() for axis in (0, 1))
        return self.classes[predicted[0]] if len(predicted) == 1 < len(present) else None

    def as_dict(self) -> dict[str, Any]:
        """The metrics for JSON, with None in place of NaN."""
        return {
            "miou": _number(self.miou),
            "pixel_accuracy": _number(self.pixel_accuracy),
            "mean_accuracy": _number(self.mean_accuracy),
            "frequency_weighted_iou": _number(self.frequency_weighted_iou),
            "iou": {name: _number(value) for name, value in zip(self.classes, self.iou)},
            "accuracy": {name: _number(value) for name, value in zip(self.classes, self.accuracy)},
            "confusion": self.confusion.tolist(),
        }

    def table(self) -> str:
        """A table with one line per class and per metric, in percent."""
        width = max(map(len, (*self.classes, "frequency-weighted IoU")))
        lines = [f"{'class':<{width}}  {'IoU':>6}  {'recall':>6}"]
        for name, iou, accuracy in zip(self.classes, self.iou, self.accuracy):
            lines.append(f"{name:<{width}}  {_percent(iou)}  {_percent(accuracy)}")
        lines.append("")
        for name, value in (
            ("mean IoU", self.miou),
            ("pixel accuracy", self.pixel_accuracy),
            ("mean accuracy", self.mean_accuracy),
            ("frequency-weighted IoU", self.frequency_weighted_iou),
        ):
            lines.append(f"{name:<{width}}  {_percent(value)}")
        return "\n".join(lines)


def _divide(numerator: Any, denominator: Any) -> np.ndarray:
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.asarray(numerator, np.float64) / np.asarray(denominator, np.float64)


def _mean(values: np.ndarray) -> float:
    known = values[~np.isnan(values)]
    return float(known.mean()) if known.size else float("nan")


def _number(value: float) -> float | None:
    return None if np.isnan(value) else float(value)


def _percent(value: float) -> str:
    return "     -" if np.isnan(value) else f"{100 * value:6.2f}"
