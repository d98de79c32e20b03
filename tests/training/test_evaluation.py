"""Scores against their definitions, and labels against full-size maps of all classes."""

from __future__ import annotations

import json
import re
import sys
from collections import OrderedDict
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from deeplab_fast.cli import main
from deeplab_fast.models import DeepLabV3, DeepLabV3Plus, Preprocessing
from deeplab_fast.models.preprocessing import network_input
from deeplab_fast.models.sliding_window import _starts
from deeplab_fast.training import (
    Scores,
    SegmentationData,
    TrainingError,
    confusion_matrix,
    distributed,
    evaluate,
    predict_labels,
)

from ..support.runs import small_network
from ..support.shapes import CLASSES, read_shapes

pytestmark = pytest.mark.usefixtures("one_thread")


def scores_of(target: np.ndarray, prediction: np.ndarray, classes: int) -> Scores:
    matrix = confusion_matrix(torch.from_numpy(target), torch.from_numpy(prediction), classes)
    return Scores(matrix.numpy(), tuple(map(str, range(classes))))


def test_scores_match_their_definitions():
    random = np.random.default_rng(0)
    target = random.integers(0, 6, (3, 40, 50)).astype(np.uint8)
    prediction = np.where(random.random(target.shape) < 0.6, target, random.integers(0, 6))
    target[random.random(target.shape) < 0.1] = 255
    target[target == 4] = 2  # class 4 is in the predictions only, class 7 is nowhere
    scores = scores_of(target, prediction.astype(np.uint8), 8)

    seen = target != 255
    ious, accuracies, weighted = {}, {}, 0.0
    for label in range(8):
        is_label, is_predicted = (target == label) & seen, (prediction == label) & seen
        union = (is_label | is_predicted).sum()
        if union:
            ious[label] = (is_label & is_predicted).sum() / union
            weighted += is_label.sum() / seen.sum() * ious[label]
        if is_label.sum():
            accuracies[label] = (is_label & is_predicted).sum() / is_label.sum()
    assert 7 not in ious and 4 in ious and 4 not in accuracies
    assert scores.iou[list(ious)] == pytest.approx(list(ious.values()))
    assert np.isnan(scores.iou[7])
    assert scores.miou == pytest.approx(np.mean(list(ious.values())))
    assert scores.mean_accuracy == pytest.approx(np.mean(list(accuracies.values())))
    assert scores.pixel_accuracy == pytest.approx((target == prediction)[seen].mean())
    assert scores.frequency_weighted_iou == pytest.approx(weighted)
    assert scores.confusion.sum() == seen.sum()
    stored = json.loads(json.dumps(scores.as_dict(), allow_nan=False))
    assert stored["iou"]["7"] is None and stored["miou"] == pytest.approx(scores.miou)
    lines = scores.table().splitlines()
    assert lines[1].split() == ["0", f"{100 * scores.iou[0]:.2f}", f"{100 * accuracies[0]:.2f}"]
    assert lines[8].split() == ["7", "-", "-"]
    assert lines[10].split() == ["mean", "IoU", f"{100 * scores.miou:.2f}"]


def test_confusion_matrix_by_hand():
    """Rows are ground truth, columns predictions; labels beyond the classes do not count."""
    target = torch.tensor([[0, 0, 0, 1], [2, 2, 255, 3]], dtype=torch.uint8)
    prediction = torch.tensor([[0, 1, 1, 1], [0, 2, 2, 2]], dtype=torch.uint8)
    matrix = confusion_matrix(target, prediction, 3)
    assert matrix.tolist() == [[1, 2, 0], [0, 1, 0], [1, 0, 1]]
    assert matrix.dtype == torch.int64
    many = torch.full((1, 300), 254, dtype=torch.uint8)  # 255 classes overflow bytes
    assert confusion_matrix(many, many, 255)[254, 254] == 300


def test_all_metrics_of_one_confusion_matrix():
    """Class c is in the predictions only, class d nowhere."""
    matrix = np.array([[6, 2, 0, 0], [1, 3, 4, 0], [0, 0, 0, 0], [0, 0, 0, 0]])
    scores = Scores(matrix, ("a", "b", "c", "d"))
    a, b = 6 / (8 + 7 - 6), 3 / (8 + 5 - 3)
    assert scores.as_dict() == {
        "miou": pytest.approx((a + b + 0) / 3),
        "pixel_accuracy": pytest.approx(9 / 16),
        "mean_accuracy": pytest.approx((6 / 8 + 3 / 8) / 2),
        "frequency_weighted_iou": pytest.approx(a / 2 + b / 2),
        "iou": {"a": pytest.approx(a), "b": pytest.approx(b), "c": 0.0, "d": None},
        "accuracy": {"a": 0.75, "b": 0.375, "c": None, "d": None},
        "confusion": matrix.tolist(),
    }
    assert [line.split() for line in scores.table().splitlines()] == [
        ["class", "IoU", "recall"],
        ["a", "66.67", "75.00"],
        ["b", "30.00", "37.50"],
        ["c", "0.00", "-"],
        ["d", "-", "-"],
        [],
        ["mean", "IoU", "32.22"],
        ["pixel", "accuracy", "56.25"],
        ["mean", "accuracy", "56.25"],
        ["frequency-weighted", "IoU", "48.33"],
    ]
    widths = {len(line) for line in scores.table().splitlines()[:5]}
    assert len(widths) == 1  # columns


def test_perfect_wrong_and_ignored_predictions():
    target = np.arange(12).reshape(3, 4) % 3
    perfect = scores_of(target, target, 3)
    assert (perfect.miou, perfect.pixel_accuracy, perfect.frequency_weighted_iou) == (1, 1, 1)
    assert scores_of(target, (target + 1) % 3, 3).miou == 0
    nothing = scores_of(np.full((2, 2), 255), np.zeros((2, 2), int), 3)
    assert np.isnan([nothing.miou, nothing.pixel_accuracy, nothing.mean_accuracy]).all()


class Local(nn.Module):
    """A model whose logits depend on their own 8x8 pixels only, so that windows change nothing."""

    def __init__(self, classes: int = 5, align_corners: bool = False) -> None:
        super().__init__()
        # With aligned corners 8 k + 1 pixels have k + 1 features, each at a pixel.
        self.conv = nn.Conv2d(3, classes, 1 if align_corners else 8, 8, bias=False)
        self.align_corners = align_corners
        self.preprocessing = Preprocessing()

    def logits(self, images: Tensor) -> OrderedDict[str, Tensor]:
        return OrderedDict(out=self.conv(images))


def assert_best(labels: Tensor, values: Tensor) -> None:
    """Assert that the labels are those of the largest values [C, H, W], except for ties."""
    assert labels.shape == values.shape[1:]
    best, chosen = values.amax(0), values.gather(0, labels[None].long())[0]
    assert (best - chosen).max() < 1e-5
    assert (labels == values.argmax(0)).float().mean() > 0.999


@pytest.mark.parametrize("extra", [0, 1], ids=["", "align_corners"])
@pytest.mark.parametrize("size", [(96, 160), (64, 64), (80, 272)], ids=str)
def test_windows_predict_the_labels_of_the_whole_image(size, extra):
    torch.manual_seed(0)
    model = Local(align_corners=bool(extra))
    image = torch.randn(1, 3, size[0] + extra, size[1] + extra)
    whole = predict_labels(model, image)
    assert len(whole.unique()) == 5
    labels = predict_labels(model, image, window=(64 + extra, 48 + extra))
    assert (labels == whole).float().mean() > 0.9999  # averages are rounded


def test_windows_cover_sizes_that_are_not_multiples():
    torch.manual_seed(0)
    model = Local()
    image = torch.randn(1, 3, 75, 101)
    labels = predict_labels(model, image, window=(32, 64))
    assert labels.shape == (75, 101)
    padded = F.pad(image, (0, 112 - 101, 0, 80 - 75))
    expected = F.interpolate(model.logits(padded)["out"], (80, 112), mode="bilinear")
    assert_best(labels, expected[0, :, :75, :101])


def reference(model: Any, image: Tensor, size, scales, flip: bool) -> Tensor:
    """Mean of the probabilities at full size, in plain PyTorch."""
    total = torch.zeros(())
    for scale in scales:
        scaled = [round(side * scale) for side in image.shape[2:]]
        seen = F.interpolate(image, scaled, mode="bilinear", antialias=True)
        for mirrored in (False, True) if flip else (False,):
            view = seen.flip(3) if mirrored else seen
            logits = F.interpolate(
                model.logits(view)["out"], size, mode="bilinear", align_corners=model.align_corners
            )
            total = total + (logits.flip(3) if mirrored else logits).softmax(1)
    return total[0]


@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize(
    "scales, flip", [((1.0,), True), ((0.5, 1.0, 1.75), True), ((0.6,), False)]
)
@pytest.mark.parametrize("size", [(96, 160), (150, 130)], ids=str)
def test_scales_and_mirroring_against_full_size_maps(scales, flip, size, align_corners):
    torch.manual_seed(0)
    model = Local(align_corners=align_corners)
    image = torch.randn(1, 3, 96, 160)
    labels = predict_labels(model, image, size, scales, flip)
    expected = reference(model, image, size, scales, flip)
    assert_best(labels, expected)


def test_mirrored_windows_are_padded_on_the_other_side():
    torch.manual_seed(0)
    model = Local()
    image = F.interpolate(torch.randn(1, 3, 5, 7), (75, 101), mode="bicubic")
    labels = predict_labels(model, image, flip=True, window=(32, 64))
    image = F.pad(image, (0, 112 - 101, 0, 80 - 75))
    total = 0
    # The padding is on the right in both views.
    for mirrored in (False, True):
        view = torch.cat([image[..., :101].flip(3), image[..., 101:]], 3) if mirrored else image
        logits = F.interpolate(model.logits(view)["out"], (80, 112), mode="bilinear")[
            ..., :75, :101
        ]
        total = total + (logits.flip(3) if mirrored else logits).softmax(1)
    assert (labels == total.argmax(1)[0]).float().mean() > 0.999


class Global(Local):
    """A model whose logits depend on the whole input, so that overlapping windows differ."""

    def logits(self, images: Tensor) -> OrderedDict[str, Tensor]:
        every = images.mean((2, 3), keepdim=True) * 20
        return OrderedDict(out=self.conv(images) + F.pad(every, (0, 0, 0, 0, 0, 2)))


def low_resolution_by_hand(model: Local, image: Tensor, window, tops, lefts) -> Tensor:
    """Logits [C, h, w] of windows at the given offsets, averaged where they overlap."""
    extra = int(model.align_corners)
    height, width = image.shape[2:]
    covered = tops[-1] + window[0], lefts[-1] + window[1]
    image = F.pad(image, (0, covered[1] - width, 0, covered[0] - height))
    stride = 8
    grid = [(side - extra) // stride + extra for side in covered]
    total, count = torch.zeros(model.conv.out_channels, *grid), torch.zeros(grid)
    for top in tops:
        for left in lefts:
            logits = model.logits(image[:, :, top:, left:][:, :, : window[0], : window[1]])["out"]
            y, x = top // stride, left // stride
            total[:, y : y + logits.size(2), x : x + logits.size(3)] += logits[0]
            count[y : y + logits.size(2), x : x + logits.size(3)] += 1
    return total / count


def windows_by_hand(model: Local, image: Tensor, window, tops, lefts, mirrored: bool) -> Tensor:
    """Logits of windows upsampled to the size of the image, optionally of the mirrored image."""
    low = low_resolution_by_hand(model, image.flip(3) if mirrored else image, window, tops, lefts)
    covered = tops[-1] + window[0], lefts[-1] + window[1]
    full = F.interpolate(low[None], covered, mode="bilinear", align_corners=model.align_corners)
    full = full[0, :, : image.size(2), : image.size(3)]
    return full.flip(2) if mirrored else full


WINDOWS = [
    # (image, window, offsets): multiples of 16, and windows overlap by at least a third.
    ((96, 64), (64, 64), [0, 32], [0]),
    ((80, 144), (48, 48), [0, 32], [0, 32, 64, 96]),
    ((75, 101), (32, 64), [0, 16, 32, 48], [0, 16, 48]),
    ((40, 30), (64, 48), [0], [0]),  # padded to one window
    ((16, 48), (16, 16), [0], [0, 16, 32]),  # too small to overlap
]


@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize("size, window, tops, lefts", WINDOWS, ids=str)
def test_overlapping_windows_are_averaged(size, window, tops, lefts, align_corners):
    torch.manual_seed(0)
    model = Global(align_corners=align_corners)
    extra = int(align_corners)
    image = torch.randn(1, 3, size[0] + extra, size[1] + extra) + torch.linspace(-1, 1, 3)[
        :, None, None
    ] * torch.linspace(-2, 2, size[1] + extra)
    window = window[0] + extra, window[1] + extra
    labels = predict_labels(model, image, window=window)
    expected = windows_by_hand(model, image, window, tops, lefts, mirrored=False)
    assert_best(labels, expected)
    other = windows_by_hand(model, image, window, tops, lefts, mirrored=True)
    both = expected.softmax(0) + other.softmax(0)
    assert_best(predict_labels(model, image, flip=True, window=window), both)


@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize("size", [(61, 90), (150, 202), (1, 1)], ids=str)
def test_windows_at_another_size_of_labels(size, align_corners):
    """The labels cover the image, and not its padding."""
    torch.manual_seed(0)
    model = Global(align_corners=align_corners)
    extra = int(align_corners)
    image = torch.randn(1, 3, 75, 101)
    window = 32 + extra, 64 + extra
    tops, lefts = [0, 16, 32, 48], [0, 16, 48]
    labels = predict_labels(model, image, size, window=window)
    # grid_sample samples the logits, at 1/8 of the resolution, at the pixels of the labels.
    low = low_resolution_by_hand(model, image, window, tops, lefts)
    axes = []
    for side, seen, cells in zip(size, (75, 101), low.shape[1:]):
        pixels = torch.arange(side).double()
        if align_corners:
            position = pixels * (seen - 1) / max(side - 1, 1) / 8  # features lie on pixels 8 k
        else:
            position = (pixels + 0.5) * seen / side / 8 - 0.5
        axes.append(position / (cells - 1) * 2 - 1)
    rows, columns = torch.meshgrid(*axes, indexing="ij")
    expected = F.grid_sample(
        low[None].double(), torch.stack([columns, rows], -1)[None], align_corners=True,
        padding_mode="border",
    )  # fmt: skip
    assert_best(labels, expected[0].float())


class Patches(nn.Module):
    """A backbone whose features depend on their own 4x4 or 16x16 pixels only."""

    def __init__(self, align_corners: bool) -> None:
        super().__init__()
        # With aligned corners 16 k + 1 pixels have features at pixels, the first and last included.
        self.low, self.out = (
            nn.Conv2d(3, channels, 1 if align_corners else stride, stride)
            for channels, stride in ((24, 4), (320, 16))
        )

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        return {"low": self.low(images), "out": self.out(images)}


@torch.no_grad()
def local_deeplabv3plus(align_corners: bool) -> DeepLabV3Plus:
    """A DeepLab-v3+ in which only the upsampling to stride 4 mixes pixels."""
    torch.manual_seed(0)
    model = DeepLabV3Plus(
        "mobilenet_v2", 5, atrous_rates=(), align_corners=align_corners, aspp_channels=8
    ).eval()
    model.backbone = Patches(align_corners)
    decoder = model.classifier[0]
    decoder.aspp.project[0].weight[:, 8:] = 0  # of the pooled branch
    for conv, _, _ in decoder.convs:
        centre = conv.weight[:, :, 1, 1].clone()
        conv.weight.zero_()
        conv.weight[:, :, 1, 1] = centre
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_var.fill_(0.05)
    average = model.logits(torch.randn(1, 3, 65, 65))["out"].mean((0, 2, 3))
    model.classifier[1].bias -= average  # so that no class is everywhere
    return model


@pytest.mark.parametrize("align_corners", [False, True])
def test_windows_of_deeplabv3plus_predict_the_labels_of_the_whole_image(align_corners):
    """Its logits have stride 4. Without aligned corners, pixels near a window's edge differ."""
    model = local_deeplabv3plus(align_corners)
    extra = int(align_corners)
    image = torch.randn(1, 3, 160 + extra, 192 + extra)
    whole = predict_labels(model, image)
    assert len(whole.unique()) == 5
    labels = predict_labels(model, image, window=(96 + extra, 128 + extra))
    assert labels.shape == whole.shape
    equal = labels == whole
    if align_corners:
        assert equal.float().mean() > 0.999  # averages are rounded
        return
    assert 0.8 < equal.float().mean() < 1
    far = [torch.ones(side, dtype=torch.bool) for side in equal.shape]
    for axis, window in ((0, 96), (1, 128)):
        side = equal.size(axis)
        for edge in {e for start in _starts(side, window) for e in (start, start + window)}:
            if 0 < edge < side:
                far[axis][edge - 16 : edge + 16] = False
    inside = far[0][:, None] & far[1]
    assert inside.float().mean() > 0.2
    assert equal[inside].float().mean() > 0.999


@pytest.mark.parametrize("align_corners", [False, True])
def test_scales_and_mirroring_of_deeplabv3plus(align_corners):
    model = local_deeplabv3plus(align_corners)
    image = torch.randn(1, 3, 64 + align_corners, 96 + align_corners)
    labels = predict_labels(model, image, (50, 70), (0.5, 1.0), True)
    assert_best(labels, reference(model, image, (50, 70), (0.5, 1.0), True))


@pytest.mark.parametrize("side", range(16, 400, 16))
@pytest.mark.parametrize("window", [16, 32, 48, 64, 112, 160])
def test_windows_are_spread_evenly(side, window):
    if side < window:
        return
    starts = _starts(side, window)
    steps = np.diff(starts)
    assert starts[0] == 0 and starts[-1] == side - window
    assert all(start % 16 == 0 for start in starts)
    # Windows overlap by at least a third, unless they are too small. There are no more windows
    # than necessary, and their distances differ by at most 16.
    most = max(16, window * 2 // 3 // 16 * 16)
    assert len(starts) == 1 + -(-(side - window) // most)
    assert all(0 < step <= most for step in steps)
    assert len(steps) == 0 or max(steps) - min(steps) <= 16


@pytest.mark.parametrize("classes, dtype", [(256, torch.uint8), (257, torch.int32)])
@pytest.mark.parametrize("flip", [False, True])
def test_labels_of_many_classes(classes, dtype, flip):
    model = Local(classes=classes)
    with torch.no_grad():
        model.conv.weight.zero_()
        model.conv.weight[-1] = 1.0
    labels = predict_labels(model, torch.ones(1, 3, 16, 16), flip=flip)
    assert labels.dtype == dtype and labels.shape == (16, 16)
    assert (labels == classes - 1).all()


@pytest.mark.parametrize("window", [None, (32, 32)])
def test_logits_in_bfloat16_are_averaged_in_float32(window):
    class Rounded(Local):
        def logits(self, images: Tensor) -> OrderedDict[str, Tensor]:
            logits = super().logits(images)["out"].bfloat16()
            return OrderedDict(out=logits.to(self.dtype))

    torch.manual_seed(0)
    model, image = Rounded(), torch.randn(1, 3, 64, 96)
    labels = []
    for model.dtype in (torch.float32, torch.bfloat16):
        labels.append(predict_labels(model, image, flip=True, window=window))
    assert (labels[0] == labels[1]).float().mean() > 0.999


def test_strips_of_rows_are_joined():
    """Sizes: one strip, one row more, and a shorter last strip."""
    torch.manual_seed(0)
    model = Local()
    image = torch.randn(1, 3, 32, 32)
    for height in (64, 65, 130):
        labels = predict_labels(model, image, (height, 20), flip=True)
        assert_best(labels, reference(model, image, (height, 20), (1.0,), True))


@pytest.mark.parametrize("options", [{"window": (64, 64)}, {"scales": (0.5, 1.0), "flip": True}])
def test_no_full_size_map_of_all_classes_is_allocated(options):
    largest = 0

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            output = function(*args, **(kwargs or {}))
            if isinstance(output, Tensor):
                largest = max(largest, output.numel())
            return output

    model = Local(classes=40)
    image = torch.randn(1, 3, 512, 256)
    with Sizes():
        labels = predict_labels(model, image, **options)
    assert labels.shape == (512, 256)
    assert largest < 40 * 512 * 256 / 4


@pytest.mark.parametrize(
    "options, message",
    [
        ({"scales": ()}, "scales: expected positive"),
        ({"scales": (1.0, 0.0)}, "scales: expected positive"),
        ({"scales": (float("nan"),)}, "scales: expected positive"),
        ({"scales": (float("inf"),)}, "scales: expected positive"),
        ({"window": (64, 65)}, r"window: .* in multiples of 16, got \(64, 65\)"),
        ({"window": (0, 64)}, "window: expected"),
    ],
)
def test_options_out_of_range(options, message, shapes):
    with pytest.raises(ValueError, match=message):
        predict_labels(Local(), torch.randn(1, 3, 64, 64), **options)
    with pytest.raises(TrainingError, match=message):
        evaluate(Local(classes=3), read_shapes(shapes)[1], workers=0, quiet=True, **options)


def test_evaluate_compares_whole_images(shapes):
    _, data = read_shapes(shapes)

    class Oracle(Local):
        """A model that knows the colours of the classes."""

        def logits(self, images: Tensor) -> OrderedDict[str, Tensor]:
            std, mean = (
                torch.tensor(x).view(3, 1, 1)
                for x in (self.preprocessing.std, self.preprocessing.mean)
            )
            red, _, blue = (images * std + mean)[0]
            nothing = torch.full_like(red, 0.3)
            return OrderedDict(out=torch.stack([nothing, red - blue, blue - red])[None])

    model = Oracle()
    model.train()
    for workers in (0, 1):
        scores = evaluate(model, data, workers=workers, quiet=True)
        assert scores.miou > 0.99
        assert scores.confusion.sum() == sum((data.read(i)[1] != 255).sum() for i in range(2))
    assert scores.classes == CLASSES
    assert model.training
    for classes in (4, 5):
        message = f"model: expected .* the 3 classes in the data, got class {classes - 1}"
        with pytest.raises(TrainingError, match=message):
            evaluate(Local(classes), data, workers=0, quiet=True)


def confusion_by_hand(model: Local, data: SegmentationData, probabilities) -> np.ndarray:
    total = np.zeros((len(data.classes),) * 2, int)
    for index in range(len(data)):
        image, ground_truth = data.read(index)
        labels = probabilities(model, model.preprocessing(image)[None], ground_truth.shape).argmax(
            0
        )
        for label, prediction in zip(ground_truth.ravel(), labels.numpy().ravel()):
            if label != 255:
                total[label, prediction] += 1
    return total


@pytest.mark.parametrize(
    "options, probabilities",
    [
        ({}, lambda m, x, size: reference(m, x, size, (1.0,), False)),
        ({"scales": (0.75, 1.5)}, lambda m, x, size: reference(m, x, size, (0.75, 1.5), False)),
        ({"flip": True}, lambda m, x, size: reference(m, x, size, (1.0,), True)),
        (
            {"window": (32, 48)},
            lambda m, x, size: windows_by_hand(m, x, (32, 48), [0, 16, 32], [0, 32], False),
        ),
    ],
    ids=["", "scales", "flip", "window"],
)
def test_evaluation_with_its_options_by_hand(options, probabilities, shapes):
    torch.manual_seed(1)
    _, data = read_shapes(shapes)
    model = Global(classes=3).eval()
    model.logits = lambda images: OrderedDict(  # so that the largest class depends on the options
        out=model.conv(images) + images.mean((2, 3), keepdim=True)
    )
    with torch.no_grad():
        expected = confusion_by_hand(model, data, probabilities)
    scores = evaluate(model, data, workers=0, quiet=True, **options)
    assert abs(scores.confusion - expected).sum() <= 4  # a pixel may tie
    plain = evaluate(model, data, workers=0, quiet=True).confusion
    assert not options or abs(plain - expected).sum() > 40
    assert model.training is False


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_evaluate_uses_eval_mode_autocast_and_channels_last(dtype, shapes):
    _, data = read_shapes(shapes)
    seen = []

    class Watched(Local):
        def logits(self, images: Tensor) -> OrderedDict[str, Tensor]:
            logits = super().logits(images)
            channels_last = images.is_contiguous(memory_format=torch.channels_last)
            state = (self.training, logits["out"].requires_grad, channels_last, tuple(images.shape))
            seen.append((*state, logits["out"].dtype))
            return logits

    model = Watched(classes=3).train()
    evaluate(model, data, dtype=dtype, workers=0, quiet=True)
    assert seen == [(False, False, True, (1, 3, 56, 72), dtype)] * 2
    assert model.training
    evaluate(model.eval(), data, workers=0, quiet=True)
    assert not model.training


def test_evaluate_restores_the_mode_after_an_error(shapes):
    model = Local(classes=5).train()
    with pytest.raises(TrainingError, match="model: expected predictions of the 3 classes"):
        evaluate(model, read_shapes(shapes)[1], workers=0, quiet=True)
    assert model.training


@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize("resize", [None, 28, 112])
def test_network_input_is_resized_and_normalised(resize, align_corners):
    """The shorter side is `resize`; aligned corners need 16 k + 1 pixels; nothing is cropped."""
    random = np.random.default_rng(0)
    image = Image.fromarray(random.integers(0, 256, (56, 72, 3)).astype(np.uint8))
    preprocessing = Preprocessing((0.5, 0.4, 0.3), (0.2, 0.3, 0.4), resize, crop=(8, 8))
    width, height = {None: (72, 56), 28: (36, 28), 112: (144, 112)}[resize]
    if align_corners:
        # The nearest 16 k + 1; of two, the larger one.
        width = {72: 65, 36: 33, 144: 145}[width]
        height = {56: 49, 28: 33, 112: 113}[height]
    pixels = network_input(image, preprocessing, align_corners)
    planes = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].double() / 255
    expected = F.interpolate(planes, (height, width), mode="bilinear", antialias=True)
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in ((0.5, 0.4, 0.3), (0.2, 0.3, 0.4)))
    assert pixels.shape == (1, 3, height, width) and pixels.dtype == torch.float32
    assert pixels.is_contiguous(memory_format=torch.channels_last)
    assert ((pixels - (expected - mean) / std).abs() <= 1.5 / 255 / std).all()  # Pillow rounds


def test_resized_images_are_evaluated_at_full_size(shapes):
    _, data = read_shapes(shapes)
    torch.manual_seed(0)
    model = Local(classes=3)
    model.preprocessing = Preprocessing(resize=28)
    scores = evaluate(model, data, workers=0, quiet=True)
    labelled = sum((data.read(i)[1] != 255).sum() for i in range(2))
    assert scores.confusion.sum() == labelled
    total = np.zeros((3, 3), int)
    for index in range(2):
        image, ground_truth = data.read(index)
        pixels = model.preprocessing(image)[None]
        logits = F.interpolate(model.logits(pixels)["out"], (56, 72), mode="bilinear")
        counts = ground_truth < 3
        np.add.at(total, (ground_truth[counts], logits.argmax(1)[0].numpy()[counts]), 1)
    assert abs(scores.confusion - total).sum() <= 4


def test_processes_share_the_images(shapes, monkeypatch):
    """Two processes take alternate images; counts are summed; errors are raised on both."""
    train_data, _ = read_shapes(shapes)
    torch.manual_seed(0)
    model = Local(classes=3)
    whole = evaluate(model, train_data, workers=0, quiet=True).confusion
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    monkeypatch.setattr(distributed, "gather", lambda value: [value, None])
    monkeypatch.setattr(distributed, "sum_over_processes", lambda tensor: tensor)
    shares = []
    for rank in (0, 1):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        shares.append(evaluate(model, train_data, workers=0, quiet=True).confusion)
    assert np.array_equal(shares[0] + shares[1], whole)
    labelled = [(train_data.read(index)[1] != 255).sum() for index in range(6)]
    assert [share.sum() for share in shares] == [sum(labelled[::2]), sum(labelled[1::2])]
    monkeypatch.setattr(distributed, "sum_over_processes", lambda tensor: tensor * 2)
    assert np.array_equal(evaluate(model, train_data, workers=0).confusion, 2 * shares[1])
    monkeypatch.setattr(distributed, "gather", lambda value: [value, "a.png: damaged"])
    with pytest.raises(TrainingError, match="a.png: damaged"):
        evaluate(model, train_data, workers=0, quiet=True)


@pytest.mark.parametrize("quiet", [False, True])
def test_progress_is_shown_unless_quiet(quiet, shapes, monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    evaluate(Local(classes=3), read_shapes(shapes)[1], workers=0, quiet=quiet)
    assert ("evaluating" in capsys.readouterr().err) is not quiet


def test_evaluate_rejects_negative_workers(shapes):
    with pytest.raises(TrainingError, match="workers: expected 0 or more, got -1"):
        evaluate(Local(classes=3), read_shapes(shapes)[1], workers=-1, quiet=True)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "model.safetensors"
    small_network().save_pretrained(path)
    return str(path)


def test_command(shapes, weights, tmp_path, capsys):
    options = ["--weights", weights, "--workers", "0", "--device", "cpu"]
    results = tmp_path / "results.json"
    assert main(["evaluate", str(shapes), *options, "--json", str(results)]) == 0
    out = capsys.readouterr().out
    stored = json.loads(results.read_text())
    model = DeepLabV3.from_pretrained(weights)
    scores = evaluate(model, read_shapes(shapes)[1], workers=0, quiet=True)
    assert stored["iou"] == pytest.approx(scores.as_dict()["iou"], abs=1e-3)
    assert stored["images"] == 2 and stored["weights"] == weights and stored["split"] == "val"
    assert "mean IoU" in out and out.splitlines()[2].startswith("red ")
    more = ["--scales", "0.5", "1", "--flip", "--window", "32", "48", "--split", "train"]
    assert main(["evaluate", str(shapes), *options, *more]) == 0


@pytest.mark.parametrize(
    "names, warning",
    [
        (("Nothing", "_red_", "blue"), None),
        (None, None),
        (("nothing", "blue", "red"), "2 of 3 classes .*: class 1 is blue in --weights and red in"),
    ],
)
def test_command_warns_of_classes_with_other_names(names, warning, shapes, tmp_path, capsys):
    network = small_network()
    network.categories = names
    network.save_pretrained(tmp_path / "model.safetensors")
    options = ["--weights", str(tmp_path / "model.safetensors"), "--workers", "0", "--no-check"]
    assert main(["evaluate", str(shapes), "--device", "cpu", *options]) == 0
    message = capsys.readouterr().err
    assert re.search(f"^warning: {warning}", message, re.M) if warning else "names" not in message


def test_command_evaluates_deeplabv3plus(shapes, tmp_path):
    """Prepared for inference, on several scales, mirrored and in windows."""
    torch.manual_seed(0)
    model = DeepLabV3Plus("mobilenet_v2", 3, atrous_rates=(1,), aspp_channels=8).eval()
    weights, results = tmp_path / "plus.safetensors", tmp_path / "results.json"
    model.save_pretrained(weights)
    options = ["--weights", str(weights), "--workers", "0", "--device", "cpu"]
    options += ["--scales", "0.5", "1", "--flip", "--window", "32", "48", "--json", str(results)]
    assert main(["evaluate", str(shapes), *options]) == 0
    data = read_shapes(shapes)[1]
    scores = evaluate(model, data, (0.5, 1.0), True, (32, 48), workers=0, quiet=True)
    stored = json.loads(results.read_text())
    assert stored["iou"] == pytest.approx(scores.as_dict()["iou"], abs=1e-3)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["{shapes}", "--weights", "none.pth"], "--weights: none.pth: no such file"),
        (["nowhere", "--weights", "{weights}"], "nowhere/images/val: no such folder"),
        (["{shapes}", "--weights", "{weights}", "--workers", "-1"], "workers: expected 0 or more"),
        (
            ["{shapes}", "--weights", "{weights}", "--classes", "a,b"],
            "{weights} has 3 classes (expected 2, as the data)",
        ),
        (["{shapes}", "--weights", "{weights}", "--window", "30", "32"], "window: expected"),
        (["{shapes}", "--weights", "{weights}", "--split", "x"], "images/x: no such folder"),
        (
            ["{shapes}", "--weights", "{weights}", "--json", "nowhere/x.json"],
            "--json: nowhere: no such folder",
        ),
    ],
)
def test_wrong_arguments_take_one_line(arguments, message, shapes, weights, capsys):
    names = {"shapes": shapes, "weights": weights}
    arguments = [argument.format(**names) for argument in arguments]
    assert main(["evaluate", "--workers", "0", "--device", "cpu", *arguments]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("deeplab-fast: ")
    assert message.format(**names) in lines[0]
