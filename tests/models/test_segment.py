"""``model.segment``: the labels of the command, from images, paths and arrays."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from deeplab_fast.cli import main
from deeplab_fast.models import DeepLabV3, DeepLabV3Plus, Preprocessing

from ..support.segment import photo

pytestmark = pytest.mark.usefixtures("one_thread")


def normalised(model: nn.Module) -> nn.Module:
    """``model`` with statistics and biases such that photo() has several classes."""
    images = model.preprocessing(photo())[None]
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
    model(torch.cat([images, images.flip(2, 3)]))
    logits = model.eval().logits(images)["out"].detach()
    model.classifier[-1].bias.data -= logits.mean((0, 2, 3))
    return model


@pytest.fixture(scope="module")
def models() -> dict[str, nn.Module]:
    torch.manual_seed(0)
    plain = DeepLabV3("mobilenet_v2", 5, 16, atrous_rates=(), head_conv=False, norm_eps=0.1)
    plain.preprocessing = Preprocessing(resize=64)
    aligned = DeepLabV3Plus(
        "mobilenet_v2", 5, atrous_rates=(), aspp_channels=8, align_corners=True, norm_eps=0.1
    )
    aligned.preprocessing = Preprocessing(resize=65)
    return {"DeepLabV3": normalised(plain), "DeepLabV3Plus": normalised(aligned)}


@pytest.fixture(scope="module")
def by_command(models, tmp_path_factory) -> dict[str, np.ndarray]:
    """The labels of a turned photo that the command writes."""
    folder = tmp_path_factory.mktemp("command")
    save_turned(folder / "photo.png")
    labels = {}
    for name, model in models.items():
        model.save_pretrained(folder / f"{name}.safetensors")
        arguments = [str(folder / "photo.png"), "--weights", str(folder / f"{name}.safetensors")]
        assert main(["segment", *arguments, "--output", str(folder), "--device", "cpu"]) == 0
        labels[name] = np.asarray(Image.open(folder / "photo_labels.png"))
        assert labels[name].shape == (72, 96) and len(np.unique(labels[name])) > 2
    return labels


def save_turned(path: Path) -> None:
    """Write photo() as a camera does that was turned."""
    exif = Image.Exif()
    exif[0x0112] = 6
    photo().transpose(Image.Transpose.ROTATE_90).save(path, exif=exif)


@pytest.mark.parametrize("name", ["DeepLabV3", "DeepLabV3Plus"])
def test_labels_are_those_of_the_command(name, models, by_command, tmp_path):
    save_turned(tmp_path / "photo.png")
    with Image.open(tmp_path / "photo.png") as turned:
        images = [
            tmp_path / "photo.png",
            str(tmp_path / "photo.png"),
            turned,
            photo(),
            photo().convert("RGBA"),
            np.asarray(photo()),
            np.asarray(photo())[:, :, ::-1][:, :, ::-1],  # negative strides, as from OpenCV's BGR
        ]
        prepared = models[name].prepare_for_inference()
        for image in images:
            labels = prepared.segment(image)
            assert labels.dtype == np.uint8
            assert np.array_equal(labels, by_command[name])
    plain = models[name].segment(photo())  # without folded batch norms, it rounds elsewhere
    assert (plain == by_command[name]).mean() > 0.99


def test_real_weights(shared_data, tmp_path):
    """The published network, at a quarter of its resolution."""
    weights = shared_data / "deeplabv3_mobilenet_v2_voc"
    with np.load(weights / "reference.npz") as reference:
        pixels = reference["images"][0]
    image = Image.fromarray(pixels).resize((300, 200))
    image.save(tmp_path / "photo.png")
    model = DeepLabV3.from_pretrained(weights)
    assert model.align_corners
    model.preprocessing = dataclasses.replace(model.preprocessing, resize=129)
    model.save_pretrained(tmp_path / "model")
    arguments = ["segment", str(tmp_path / "photo.png"), "--weights", str(tmp_path / "model")]
    assert main([*arguments, "--output", str(tmp_path), "--device", "cpu"]) == 0
    labels = np.asarray(Image.open(tmp_path / "photo_labels.png"))
    assert (labels == 1).mean() > 0.05  # an aeroplane
    assert np.array_equal(model.prepare_for_inference().segment(image), labels)
    assert (model.segment(image) == labels).mean() > 0.999

    resized = image.resize((193, 129), Image.Resampling.BILINEAR)  # 16 k + 1
    logits = model.logits(
        dataclasses.replace(model.preprocessing, resize=None, crop=None)(resized)[None]
    )["out"]
    full = F.interpolate(logits, labels.shape, mode="bilinear", align_corners=True)
    assert (full.argmax(1)[0].numpy() == labels).mean() > 0.999


@pytest.mark.parametrize("name", ["DeepLabV3", "DeepLabV3Plus"])
@pytest.mark.parametrize("views", [{}, {"scales": [0.5, 1.0], "flip": True}, {"window": 32}])
def test_probabilities(name, views, models):
    model = models[name]
    if "window" in views:
        views = {"window": (views["window"] + int(model.align_corners),) * 2}
    labels = model.segment(photo(), **views)
    same, strips = model.segment_with_probabilities(photo(), **views)
    strips = list(strips)
    assert {strip.shape[1] for strip in strips} == {64, 8}
    probabilities = np.concatenate(strips, axis=1)
    assert (probabilities.dtype, probabilities.shape) == (np.float32, (5, 72, 96))
    assert np.array_equal(same, labels)
    assert np.abs(probabilities.sum(0) - 1).max() < 1e-5
    ordered = np.sort(probabilities, axis=0)
    clear = ordered[-1] - ordered[-2] > 1e-5
    assert clear.mean() > 0.99
    assert np.array_equal(probabilities.argmax(0)[clear], labels[clear])


def test_probabilities_equal_those_at_full_size(models):
    model = models["DeepLabV3"]
    pixels = model.preprocessing(photo())[None]
    logits = [model.logits(x)["out"] for x in (pixels, pixels.flip(3))]
    full = [F.interpolate(x, (72, 96), mode="bilinear").softmax(1)[0] for x in logits]
    expected = (full[0] + full[1].flip(2)) / 2
    _, strips = model.segment_with_probabilities(photo(), flip=True)
    assert np.abs(np.concatenate(list(strips), 1) - expected.detach().numpy()).max() < 1e-5


def test_more_than_256_classes_are_int32(models):
    model = DeepLabV3("mobilenet_v2", 300, 16, atrous_rates=(), head_conv=False).eval()
    model.classifier[-1].bias.data[299] = 1000.0
    for views in ({}, {"flip": True}):
        labels = model.segment(photo(32, 32), **views)
        assert labels.dtype == np.int32 and (labels == 299).all()


def test_weights_in_another_dtype(models):
    labels = models["DeepLabV3"].segment(photo())
    double = copy.deepcopy(models["DeepLabV3"]).double().segment(photo())
    assert (double == labels).mean() > 0.99


def test_grey_image(models):
    grey = photo().convert("L")
    labels = models["DeepLabV3"].segment(grey.convert("RGB"))
    assert np.array_equal(models["DeepLabV3"].segment(np.asarray(grey)), labels)
    assert np.array_equal(models["DeepLabV3"].segment(grey), labels)


PHOTO = "a PIL image, a path or a uint8 array"


@pytest.mark.parametrize(
    "image, options, error, message",
    [
        (
            np.zeros((4, 4, 3), np.float32),
            {},
            TypeError,
            "image: expected .* uint8, from 0 to 255, got float32",
        ),
        (np.zeros((4, 4), np.int64), {}, TypeError, "image: expected .* uint8, .* got int64"),
        (torch.zeros(3, 4, 4), {}, TypeError, f"image: expected {PHOTO} .*, got a Tensor"),
        (None, {}, TypeError, f"image: expected {PHOTO} .*, got None"),
        ([[1, 2]], {}, TypeError, f"image: expected {PHOTO} .*, got a list"),
        (b"bytes", {}, TypeError, f"image: expected {PHOTO} .*, got a bytes"),
        (np.zeros((3, 4, 4), np.uint8), {}, ValueError, r"image: expected .*, got \(3, 4, 4\)"),
        (np.zeros((1, 4, 4, 3), np.uint8), {}, ValueError, r"image: expected .*\[H, W, 3\]"),
        (np.zeros((0, 4, 3), np.uint8), {}, ValueError, r"image: expected .*, got \(0, 4, 3\)"),
        (Image.new("F", (4, 4)), {}, ValueError, "image: 32 bits per channel, mode F"),
        ("nowhere.png", {}, ValueError, "nowhere.png: no such file"),
        (Path(__file__), {}, ValueError, "test_segment.py: not an image"),
        (photo(), {"scales": 2.0}, TypeError, "scales: expected a list of numbers, got 2.0"),
        (photo(), {"scales": ["2"]}, TypeError, "scales: expected a number, got '2'"),
        (photo(), {"scales": []}, ValueError, r"scales: expected positive numbers, got \(\)"),
        (photo(), {"flip": 1}, TypeError, "flip: expected True or False, got 1"),
        (photo(), {"window": 64}, TypeError, "window: expected a list of ints, got 64"),
        (photo(), {"window": (65, 64)}, ValueError, r"window: .* multiples of 16, got \(65, 64\)"),
        (photo(), {"window": (64,)}, ValueError, r"window: expected a height and width"),
    ],
)
def test_wrong_arguments(image, options, error, message, models):
    for method in ("segment", "segment_with_probabilities"):
        with pytest.raises(error, match=message):
            getattr(models["DeepLabV3"], method)(image, **options)


def test_training_mode_and_other_channels(models):
    model = DeepLabV3("mobilenet_v2", 2, 16, atrous_rates=(), head_conv=False, in_channels=4)
    with pytest.raises(RuntimeError, match=r"segment: expected evaluation mode: call model.eval"):
        model.train().segment(photo())
    with pytest.raises(
        ValueError, match="image: expected a network of 1 or 3 channels, got one of"
    ):
        model.eval().segment(photo())
