"""Comparison of an exported model with the model it was made from.

Two engines that compute the same network in fp32 round differently, so their logits differ by up
to some d. If one engine prefers class i and the other class j, then ``x_i - x_j <= 2 d`` holds in
either engine, because each of the two logits has moved by at most d. So labels must be equal
wherever no other class comes within 2 d of the best one, and elsewhere the label must be one of
the classes that do.

d is not measured on the exported model: its labels are the argmax of its own logits, so a measured
d would allow for any error at all. Instead d is the difference that rounding explains, a fixed
fraction of the largest logit.

Many trained models see nothing but background in random images, and then any constant has the right
labels. So the logits of which the labels are the argmax are compared as well, where the exported
model has them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

Result = Literal["labels", "logits"]

# Largest difference of logits that rounding in fp32 explains, as a fraction of the largest logit.
# Networks of 20 to 100 layers differ by 1e-6 to 1e-5 between engines; computing in tf32 or bf16, or
# with another convention of the resize, gives 1e-3 or more.
LARGEST_DIFFERENCE = 1e-4


class CheckFailed(RuntimeError):
    """An exported model computes something else than the model it was made from."""


class Comparison(NamedTuple):
    """Result of a check that succeeded.

    Attributes:
        shapes: shapes of the images.
        labels: number of labels compared.
        differing: number of labels that differ, all of them between classes that nearly tie.
        largest_difference: largest difference of the logits as a fraction of the largest one, or
            None if only labels were compared.
    """

    shapes: tuple[tuple[int, ...], ...]
    labels: int
    differing: int
    largest_difference: float | None

    def __str__(self) -> str:
        sizes = ", ".join("x".join(map(str, shape)) for shape in self.shapes)
        counts = f"{self.differing} of {self.labels} labels differ"
        if self.differing:
            counts += ", between classes that nearly tie"
        if self.largest_difference is not None:
            counts += f"; largest difference of logits {self.largest_difference:.1e} of the largest"
        return f"{counts} (images of {sizes})"


def compare(
    engine: Callable[[np.ndarray], np.ndarray],
    logits_of: Callable[[Tensor], Tensor],
    result: Result,
    shapes: Sequence[tuple[int, ...]],
    threshold: float = 0.0,
) -> Comparison:
    """Run an exported model and the model on images of these shapes, and compare the results.

    Args:
        engine: the exported model, from float32 images [N, C, H, W] to labels [N, H, W] or logits
            [N, K, H, W].
        logits_of: the model, from the same images to logits [N, K, H, W].
        result: what ``engine`` returns.
        shapes: shapes of the images.
        threshold: output above which the label of a model with one output channel is 1.

    Raises:
        CheckFailed: the results differ by more than rounding explains, or the exported model runs
            with images of the first shape only; the message says where.
    """
    labels = differing = 0
    largest = 0.0
    for shape in shapes:
        images = images_of(shape)
        with torch.no_grad():
            expected = logits_of(images)
        try:
            output = engine(images.numpy())
        except Exception as error:  # engines have exceptions of their own
            if shape == shapes[0] or isinstance(error, MemoryError):
                raise
            raise CheckFailed(
                f"images of {'x'.join(map(str, shape))}: cannot be run, though those of "
                f"{'x'.join(map(str, shapes[0]))} can. If the model makes a Python number of the "
                "size of its images, export it for one size"
            ) from error
        got = torch.from_numpy(np.array(output))
        if result == "logits":
            largest = max(largest, check_logits(got, expected))
            got = labels_of(got, threshold)
        differing += check_labels(got, expected, threshold)
        labels += got.numel()
    return Comparison(tuple(shapes), labels, differing, largest if result == "logits" else None)


def images_of(shape: tuple[int, ...]) -> Tensor:
    """Random smooth images, always the same ones: noise alone looks like no class at all."""
    generator = torch.Generator().manual_seed(0)
    batch, channels, height, width = shape
    coarse = torch.randn(batch, channels, -(-height // 8), -(-width // 8), generator=generator)
    smooth = F.interpolate(coarse, (height, width), mode="bilinear", align_corners=False)
    return 1.5 * smooth + 0.1 * torch.randn(shape, generator=generator)


def labels_of(logits: Tensor, threshold: float = 0.0) -> Tensor:
    """Labels [N, H, W] of logits; those of one channel are 1 where it is above ``threshold``."""
    return logits[:, 0] > threshold if logits.size(1) == 1 else logits.argmax(1)


def check_logits(got: Tensor, expected: Tensor) -> float:
    """The largest difference of logits, as a fraction of the largest one.

    Raises:
        CheckFailed: it is more than rounding explains.
    """
    if got.shape != expected.shape:
        raise CheckFailed(f"logits: expected shape {tuple(expected.shape)}, got {tuple(got.shape)}")
    scale = float(expected.abs().max())
    difference = float((got.double() - expected.double()).abs().max()) / (scale or 1.0)
    if not difference <= LARGEST_DIFFERENCE:  # NaN fails, too
        raise CheckFailed(
            f"logits: expected a difference of at most {LARGEST_DIFFERENCE:.0e} of the largest "
            f"logit, which rounding explains, got {difference:.1e} for images of "
            f"{expected.size(2)}x{expected.size(3)}"
        )
    return difference


def check_labels(got: Tensor, logits: Tensor, threshold: float = 0.0) -> int:
    """The number of labels that differ from those of ``logits``.

    Args:
        got: [N, H, W], of any dtype.
        logits: logits of the model, [N, K, H, W].
        threshold: see :func:`compare`.

    Raises:
        CheckFailed: a label is of a class that does not nearly tie with the best one.
    """
    shape = (logits.size(0), *logits.shape[2:])
    if got.shape != shape:
        raise CheckFailed(f"labels: expected shape {shape}, got {tuple(got.shape)}")
    got, expected = got.long(), labels_of(logits, threshold).long()
    allowed = LARGEST_DIFFERENCE * float(logits.abs().max())
    if logits.size(1) == 1:  # the other class is the threshold, which does not move
        logits, allowed = torch.cat([torch.full_like(logits, threshold), logits], 1), allowed / 2
    if not bool(((got >= 0) & (got < logits.size(1))).all()):
        raise CheckFailed(f"labels: expected 0 to {logits.size(1) - 1}, got others")
    gap = (logits.gather(1, expected[:, None]) - logits.gather(1, got[:, None]))[:, 0]
    wrong = int((~(gap <= 2 * allowed)).sum())  # NaN is wrong, too
    if wrong:
        raise CheckFailed(
            f"labels: {wrong} of {got.numel()} differ by more than rounding explains for images of "
            f"{logits.size(2)}x{logits.size(3)}"
        )
    return int((got != expected).sum())
