"""The comparison of labels and logits of two engines."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from deeplab_fast.export import check
from deeplab_fast.export.check import LARGEST_DIFFERENCE, CheckFailed

D = LARGEST_DIFFERENCE


def pixels(*logits: tuple[float, ...]) -> torch.Tensor:
    """Logits [1, K, 1, W] of these pixels."""
    return torch.tensor(logits).t()[None, :, None]


def labels(*values: int) -> torch.Tensor:
    return torch.tensor(values)[None, None]


def test_labels_may_differ_where_classes_nearly_tie():
    logits = pixels((1.0, 1 - 1.9 * D, 0.5), (0.2, 1.0, 0.9))
    assert check.check_labels(labels(0, 1), logits) == 0
    assert check.check_labels(labels(1, 1), logits) == 1


def test_labels_of_other_classes_fail():
    logits = pixels((1.0, 1 - 2.1 * D, 1 - 1.9 * D), (0.2, 1.0, 0.9))
    assert check.check_labels(labels(2, 1), logits) == 1
    for wrong in ((1, 1), (2, 2)):
        with pytest.raises(CheckFailed, match="labels: 1 of 2 differ"):
            check.check_labels(labels(*wrong), logits)


def test_the_scale_is_that_of_the_largest_logit():
    logits = pixels((1.0, 1 - 9 * D), (-5.0, -5.0))
    assert check.check_labels(labels(1, 0), logits) == 1
    with pytest.raises(CheckFailed):
        check.check_labels(labels(1, 0), logits[..., :1].expand(1, 2, 1, 2))


@pytest.mark.parametrize("value", [-1, 3, 255])
def test_labels_outside_the_classes_fail(value):
    with pytest.raises(CheckFailed, match="expected 0 to 2"):
        check.check_labels(labels(value), pixels((1.0, 0.0, 0.0)))


def test_shapes_are_compared():
    logits = pixels((1.0, 0.0), (1.0, 0.0))
    with pytest.raises(CheckFailed, match=r"expected shape \(1, 1, 2\), got \(1, 2, 1\)"):
        check.check_labels(labels(0, 0).mT, logits)
    with pytest.raises(CheckFailed, match=r"expected shape \(1, 2, 1, 2\)"):
        check.check_logits(logits.mT, logits)


def test_nan_fails():
    logits = pixels((1.0, torch.nan))
    with pytest.raises(CheckFailed):
        check.check_labels(labels(0), logits)
    with pytest.raises(CheckFailed):
        check.check_logits(logits, pixels((1.0, 0.0)))
    with pytest.raises(CheckFailed):
        check.check_logits(logits, logits)


def test_logits_may_differ_by_rounding():
    logits = torch.randn(1, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    step = D * logits.abs().max()
    assert check.check_logits(logits + 0.9 * step, logits) == pytest.approx(0.9 * D, rel=0.1)
    with pytest.raises(CheckFailed, match="expected a difference of at most 1e-04"):
        check.check_logits(logits + 1.1 * step, logits)


def test_one_channel_is_compared_with_a_threshold():
    logits = pixels((0.5 + 0.9 * D,), (0.5,), (-1.0,))
    assert check.check_labels(labels(1, 0, 0), logits, threshold=0.5) == 0
    assert check.check_labels(labels(0, 0, 0), logits, threshold=0.5) == 1
    with pytest.raises(CheckFailed):
        check.check_labels(labels(1, 0, 1), logits, threshold=0.5)
    with pytest.raises(CheckFailed):  # the threshold does not move, so d is allowed and not 2 d
        check.check_labels(labels(0, 0, 0), logits + 0.6 * D, threshold=0.5)
    with pytest.raises(CheckFailed):
        check.check_labels(labels(1, 0, 0), logits + 0.01, threshold=0.6)


def coarse(images: torch.Tensor) -> torch.Tensor:
    """Some logits of images, of a quarter of the size."""
    return F.avg_pool2d(images, 4)


def upsampled(images: torch.Tensor, align_corners: bool = False) -> torch.Tensor:
    size = images.shape[2:]
    return F.interpolate(coarse(images), size, mode="bilinear", align_corners=align_corners)


SHAPES = [(1, 3, 33, 41), (2, 3, 24, 17)]


@pytest.mark.parametrize("result", ["labels", "logits"])
def test_engines_are_compared_on_all_shapes(result):
    seen = []

    def engine(images: np.ndarray) -> np.ndarray:
        seen.append((images.shape, images.dtype))
        logits = upsampled(torch.from_numpy(images))
        return (logits if result == "logits" else logits.argmax(1)).numpy()

    comparison = check.compare(engine, upsampled, result, SHAPES)
    assert seen == [(shape, np.float32) for shape in SHAPES]
    assert comparison.labels == 33 * 41 + 2 * 24 * 17 and comparison.differing == 0
    assert comparison.largest_difference == (0 if result == "logits" else None)
    assert "0 of 2169 labels differ" in str(comparison) and "2x3x24x17" in str(comparison)


@pytest.mark.parametrize("result", ["labels", "logits"])
def test_another_convention_of_the_resize_fails(result):
    def engine(images: np.ndarray) -> np.ndarray:
        logits = upsampled(torch.from_numpy(images), align_corners=True)
        return (logits if result == "logits" else logits.argmax(1)).numpy()

    with pytest.raises(CheckFailed, match=result):
        check.compare(engine, upsampled, result, SHAPES)


def test_precision_of_bfloat16_fails():
    def engine(images: np.ndarray) -> np.ndarray:
        return upsampled(torch.from_numpy(images)).bfloat16().float().numpy()

    with pytest.raises(CheckFailed, match="rounding"):
        check.compare(engine, upsampled, "logits", SHAPES)


def test_images_are_repeatable_and_show_several_labels():
    images = check.images_of((2, 3, 65, 81))
    assert images.equal(check.images_of((2, 3, 65, 81)))
    counts = upsampled(images).argmax(1).flatten().bincount()
    assert counts.min() > 0.1 * counts.sum()


def test_engines_that_run_one_size_only_fail():
    """Such engines come from models that compute with the size as a Python number."""

    def engine(images: np.ndarray) -> np.ndarray:
        if images.shape != works:
            raise AssertionError("requested shape: {-1,2,6,2}")
        return upsampled(torch.from_numpy(images)).argmax(1).numpy()

    works = SHAPES[0]
    with pytest.raises(CheckFailed, match="images of 2x3x24x17: cannot be run, .* 1x3x33x41 can"):
        check.compare(engine, upsampled, "labels", SHAPES)
    works = SHAPES[1]
    with pytest.raises(AssertionError, match="requested shape"):
        check.compare(engine, upsampled, "labels", SHAPES)
