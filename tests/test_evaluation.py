"""Scores against definitions written out, and labels against full-size maps of all classes."""

from __future__ import annotations

import json
from collections import OrderedDict

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from deeplab_fast.cli import main
from deeplab_fast.models import DeepLabV3, Preprocessing
from deeplab_fast.training import (
    Scores,
    TrainingError,
    confusion_matrix,
    evaluate,
    predict_labels,
)

from .shapes import CLASSES, read_shapes, write_shapes


def scores_of(target: np.ndarray, prediction: np.ndarray, classes: int) -> Scores:
    matrix = confusion_matrix(torch.from_numpy(target), torch.from_numpy(prediction), classes)
    return Scores(matrix.numpy(), tuple(map(str, range(classes))))


def test_scores_are_their_definitions():
    random = np.random.default_rng(0)
    target = random.integers(0, 6, (3, 40, 50)).astype(np.uint8)
    prediction = np.where(random.random(target.shape) < 0.6, target, random.integers(0, 6))
    target[random.random(target.shape) < 0.1] = 255
    target[target == 4] = 2  # class 4 is predicted only, class 7 is nowhere
    scores = scores_of(target, prediction.astype(np.uint8), 8)

    seen = target != 255
    ious, accuracies, weighted = {}, {}, 0.0
    for label in range(8):
        is_it, said_so = (target == label) & seen, (prediction == label) & seen
        union = (is_it | said_so).sum()
        if union:
            ious[label] = (is_it & said_so).sum() / union
            weighted += is_it.sum() / seen.sum() * ious[label]
        if is_it.sum():
            accuracies[label] = (is_it & said_so).sum() / is_it.sum()
    assert 7 not in ious and 4 in ious and 4 not in accuracies
    assert scores.iou[list(ious)] == pytest.approx(list(ious.values()))
    assert np.isnan(scores.iou[7])
    assert scores.miou == pytest.approx(np.mean(list(ious.values())))
    assert scores.mean_accuracy == pytest.approx(np.mean(list(accuracies.values())))
    assert scores.pixel_accuracy == pytest.approx((target == prediction)[seen].mean())
    assert scores.frequency_weighted_iou == pytest.approx(weighted)
    assert scores.confusion.sum() == seen.sum()
    found = json.loads(json.dumps(scores.as_dict(), allow_nan=False))
    assert found["iou"]["7"] is None and found["miou"] == pytest.approx(scores.miou)
    lines = scores.table().splitlines()
    assert lines[1].split() == ["0", f"{100 * scores.iou[0]:.2f}", f"{100 * accuracies[0]:.2f}"]
    assert lines[8].split() == ["7", "-", "-"]
    assert lines[10].split() == ["mean", "IoU", f"{100 * scores.miou:.2f}"]


def test_perfect_nothing_and_ignored():
    target = np.arange(12).reshape(3, 4) % 3
    perfect = scores_of(target, target, 3)
    assert (perfect.miou, perfect.pixel_accuracy, perfect.frequency_weighted_iou) == (1, 1, 1)
    assert scores_of(target, (target + 1) % 3, 3).miou == 0
    nothing = scores_of(np.full((2, 2), 255), np.zeros((2, 2), int), 3)
    assert np.isnan([nothing.miou, nothing.pixel_accuracy, nothing.mean_accuracy]).all()


class Local(nn.Module):
    """Logits that depend on nothing beyond their own 8x8 pixels: windows change nothing."""

    def __init__(self, classes: int = 5, align_corners: bool = False) -> None:
        super().__init__()
        # With aligned corners 8 k + 1 pixels have k + 1 features, each at a pixel.
        self.conv = nn.Conv2d(3, classes, 1 if align_corners else 8, 8, bias=False)
        self.align_corners = align_corners
        self.preprocessing = Preprocessing()

    def logits(self, images: Tensor) -> OrderedDict[str, Tensor]:
        return OrderedDict(out=self.conv(images))


@pytest.mark.parametrize("extra", [0, 1], ids=["", "align_corners"])
@pytest.mark.parametrize("size", [(96, 160), (64, 64), (80, 272)], ids=str)
def test_windows_find_what_the_whole_image_does(size, extra):
    torch.manual_seed(0)
    model = Local(align_corners=bool(extra))
    image = torch.randn(1, 3, size[0] + extra, size[1] + extra)
    whole = predict_labels(model, image)
    assert len(whole.unique()) == 5
    labels = predict_labels(model, image, window=(64 + extra, 48 + extra))
    assert (labels == whole).float().mean() > 0.9999  # averages round


def test_windows_cover_sizes_that_are_no_multiples():
    torch.manual_seed(0)
    model = Local()
    image = torch.randn(1, 3, 75, 101)
    labels = predict_labels(model, image, window=(32, 64))
    assert labels.shape == (75, 101)
    padded = predict_labels(model, F.pad(image, (0, 112 - 101, 0, 80 - 75)))
    assert torch.equal(labels, padded[:75, :101])


def reference(model: Local, image: Tensor, size, scales, flip: bool) -> Tensor:
    """Mean of probabilities at full size, the way everybody writes it."""
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
    assert labels.shape == expected.shape[1:]
    best = expected.amax(0)
    found = expected.gather(0, labels[None].long())[0]
    assert (best - found).max() < 1e-5  # two classes may tie to within rounding
    assert (labels == expected.argmax(0)).float().mean() > 0.999


def test_mirrored_windows_are_padded_on_the_other_side():
    torch.manual_seed(0)
    model = Local()
    image = F.interpolate(torch.randn(1, 3, 5, 7), (75, 101), mode="bicubic")
    labels = predict_labels(model, image, flip=True, window=(32, 64))
    image = F.pad(image, (0, 112 - 101, 0, 80 - 75))
    total = 0
    # What is padded is on the right in both views.
    for mirrored in (False, True):
        view = torch.cat([image[..., :101].flip(3), image[..., 101:]], 3) if mirrored else image
        logits = F.interpolate(model.logits(view)["out"], (80, 112), mode="bilinear")[
            ..., :75, :101
        ]
        total = total + (logits.flip(3) if mirrored else logits).softmax(1)
    assert (labels == total.argmax(1)[0]).float().mean() > 0.999


@pytest.mark.parametrize("options", [{"window": (64, 64)}, {"scales": (0.5, 1.0), "flip": True}])
def test_no_full_size_map_of_all_classes_exists(options):
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
        ({"window": (64, 65)}, r"window: expected a height and width of 16 k \+ 0, got \(64, 65\)"),
        ({"window": (0, 64)}, "window: expected"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(TrainingError, match=message):
        predict_labels(Local(), torch.randn(1, 3, 64, 64), **options)


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    return write_shapes(tmp_path_factory.mktemp("data") / "shapes")


def test_evaluate_compares_whole_images(shapes):
    _, data = read_shapes(shapes)

    class Oracle(Local):
        """Knows the colours."""

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
    with pytest.raises(TrainingError, match="model found class 4, the data have 3 classes"):
        evaluate(Local(classes=5), data, workers=0, quiet=True)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "model.safetensors"
    DeepLabV3("mobilenet_v2", 3, 16, rates=(), head_conv=False).save_pretrained(path)
    return str(path)


def test_command(shapes, weights, tmp_path, capsys):
    options = ["--weights", weights, "--workers", "0", "--device", "cpu"]
    results = tmp_path / "results.json"
    assert main(["evaluate", str(shapes), *options, "--json", str(results)]) == 0
    out = capsys.readouterr().out
    found = json.loads(results.read_text())
    model = DeepLabV3.from_pretrained(weights)
    scores = evaluate(model, read_shapes(shapes)[1], workers=0, quiet=True)
    assert found["iou"] == pytest.approx(scores.as_dict()["iou"], abs=1e-3)
    assert found["images"] == 2 and found["weights"] == weights and found["split"] == "val"
    assert "mean IoU" in out and out.splitlines()[2].startswith("red ")
    more = ["--scales", "0.5", "1", "--flip", "--window", "32", "48", "--split", "train"]
    assert main(["evaluate", str(shapes), *options, *more]) == 0


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
