"""One rule for photos that are stored turned: they are read as their labels are."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from deeplab_fast._io.images import decode, read_header
from deeplab_fast.models.preprocessing import Preprocessing
from deeplab_fast.training import (
    Recipe,
    SegmentationData,
    TrainingError,
    evaluate,
    evaluation,
    folder,
)
from deeplab_fast.training.loader import batches

from ..support.shapes import CLASSES, write_shapes

# EXIF orientation -> the upright image as it is stored (Exif 2.32, tag 0x0112: where its row 0 and
# its column 0 are)
STORED: dict[int, Any] = {
    1: lambda upright: upright,
    2: lambda upright: upright[:, ::-1],
    3: lambda upright: upright[::-1, ::-1],
    4: lambda upright: upright[::-1],
    5: lambda upright: upright.swapaxes(0, 1),
    6: lambda upright: upright.swapaxes(0, 1)[::-1],
    7: lambda upright: upright.swapaxes(0, 1)[::-1, ::-1],
    8: lambda upright: upright.swapaxes(0, 1)[:, ::-1],
}
PIXELS = np.arange(6 * 9 * 3, dtype=np.uint8).reshape(6, 9, 3)


def save_turned(path: Path, upright: np.ndarray, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"lossless": True} if path.suffix == ".webp" else {}
    Image.fromarray(np.ascontiguousarray(STORED[orientation](upright))).save(
        path, exif=exif, **options
    )


def data_of(
    tmp_path: Path, orientation: int, labels: np.ndarray, extension: str = "png", **options
):
    save_turned(tmp_path / f"photo.{extension}", options.pop("pixels", PIXELS), orientation)
    Image.fromarray(labels.astype(np.uint8)).save(tmp_path / "labels.png")
    pairs = [(tmp_path / f"photo.{extension}", tmp_path / "labels.png")]
    return SegmentationData(pairs, ("a", "b"), **options)


@pytest.mark.parametrize("extension", ["png", "webp", "tif"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_photo_is_read_as_its_labels_are(orientation, extension, tmp_path):
    upright_labels, stored_labels = np.zeros((6, 9)), STORED[orientation](np.zeros((6, 9)))
    stored = STORED[orientation](PIXELS)
    for labels, pixels in ((upright_labels, PIXELS), (stored_labels, stored)):
        data = data_of(tmp_path, orientation, labels, extension)
        unclear = orientation in (2, 3, 4)
        image, classes = data.read(0)
        # The size does not tell where the photo is mirrored or turned by 180 degrees.
        assert np.array_equal(np.asarray(image), PIXELS if unclear else pixels)
        assert classes.shape == labels.shape and data.turn_is_unclear(0) == unclear
        assert data.image_size(0) == image.size and data.label_size(0) == image.size
        for copy in (image, image.copy()):  # nothing turns it again
            assert copy.getexif().get(0x0112, 1) == 1


@pytest.mark.parametrize("orientation", range(2, 9))
def test_option(orientation, tmp_path):
    """For a square photo the labels do not tell, so that it is turned unless told otherwise."""
    pixels = PIXELS[:, :6]
    data = data_of(tmp_path, orientation, np.zeros((6, 6)), pixels=pixels)
    assert data.turn_is_unclear(0)
    assert np.array_equal(np.asarray(data.read(0)[0]), pixels)
    for exif, expected in (("upright", pixels), ("stored", STORED[orientation](pixels))):
        data = replace(data, exif=exif)
        assert not data.turn_is_unclear(0)
        assert np.array_equal(np.asarray(data.read(0)[0]), expected)
    with pytest.raises(TrainingError, match="exif: expected auto, upright or stored, got 'no'"):
        replace(data, exif="no")


def test_sizes_that_fit_neither(tmp_path):
    """The error names both sizes, or the one that `exif` asks for."""
    data = data_of(tmp_path, 6, np.zeros((6, 8)))
    message = r"labels.png: 8x6 pixels \(expected 9x6 upright or 6x9 as stored, the size of .*png"
    with pytest.raises(TrainingError, match=message):
        data.read(0)
    data = data_of(tmp_path, 6, np.zeros((6, 9)), exif="stored")
    assert data.image_size(0) == (6, 9)
    with pytest.raises(TrainingError, match=r"9x6 pixels \(expected 6x9, the size of"):
        data.read(0)
    data = data_of(tmp_path, 6, np.zeros((9, 6)), exif="upright")
    assert data.image_size(0) == (9, 6)
    with pytest.raises(TrainingError, match=r"6x9 pixels \(expected 9x6, the size of"):
        data.read(0)


@pytest.mark.parametrize("extension", ["png", "jpg", "webp", "tif"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_header(orientation, extension, tmp_path):
    """It says what the decoded image says, without the pixels."""
    path = tmp_path / f"photo.{extension}"
    save_turned(path, PIXELS, orientation)
    header, image = read_header(path), decode(path)
    stored = STORED[orientation](PIXELS)
    assert header.orientation == image.getexif().get(0x0112, 1) == orientation
    assert header.size == image.size == stored.shape[1::-1] and header.upright_size == (9, 6)
    if extension != "jpg":
        assert np.array_equal(np.asarray(image), stored)
    content = path.read_bytes()
    path.write_bytes(content[: len(content) * 9 // 10])
    if extension == "png":
        assert read_header(path) == header


def test_exif_data_behind_the_pixels_of_a_png(tmp_path):
    """exiftool writes them there."""
    save_turned(tmp_path / "photo.png", PIXELS, 6)
    content = (tmp_path / "photo.png").read_bytes()
    start = content.index(b"eXIf") - 4
    end = start + 12 + int.from_bytes(content[start : start + 4], "big")
    rest, last = content[:start] + content[end:], len(b"....IEND....")
    (tmp_path / "photo.png").write_bytes(rest[:-last] + content[start:end] + rest[-last:])
    assert read_header(tmp_path / "photo.png") == ((6, 9), 6)
    assert decode(tmp_path / "photo.png").getexif()[0x0112] == 6


def turned_copy(upright: SegmentationData, root: Path, orientations: tuple[int, ...]) -> None:
    """Write the photos of a data set turned, with their labels as they were."""
    for index, (image, labels) in enumerate(upright.pairs):
        for kind, path in (("images", Path(image)), ("labels", Path(str(labels)))):
            (root / kind / path.parent.name).mkdir(parents=True, exist_ok=True)
            pixels = np.asarray(Image.open(path))
            turned = orientations[index % len(orientations)] if kind == "images" else 1
            save_turned(root / kind / path.parent.name / path.name, pixels, turned)


class Colors(torch.nn.Module):
    """A network for write_shapes: what is red or blue."""

    preprocessing = Preprocessing(mean=(0, 0, 0), std=(1, 1, 1))
    align_corners = False
    config = {"output_stride": 16}

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor([[0.0, 0, 0], [2, -1, -1], [-1, -1, 2]]))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        bias = torch.tensor([0.6, 0, 0])[:, None, None]
        return torch.einsum("cd,ndhw->nchw", self.weight, images) + bias


@pytest.mark.parametrize("size", [(72, 56), (64, 64)], ids=["oblong", "square"])
def test_turned_photos_train_and_evaluate_as_upright_ones(size, tmp_path, monkeypatch):
    """Labels are as annotation tools make them, as large as the upright photo."""

    def predict(model: Colors, pixels: torch.Tensor, *options: Any) -> torch.Tensor:
        return model(pixels)[0].argmax(0)

    monkeypatch.setattr(evaluation, "predict_labels", predict)
    monkeypatch.setattr(evaluation, "check_views", lambda *arguments: None)
    write_shapes(tmp_path / "upright", train=7, val=4, size=size)
    for split, orientations in (("train", tuple(range(2, 9))), ("val", (6, 3, 5, 2))):
        upright = folder(tmp_path / "upright", split, CLASSES)
        turned_copy(upright, tmp_path / "turned", orientations)
        turned = folder(tmp_path / "turned", split, CLASSES)
        scores = [evaluate(Colors(), data, workers=0, quiet=True) for data in (upright, turned)]
        assert scores[0].miou > 0.9
        assert np.array_equal(scores[0].confusion, scores[1].confusion)
        recipe = Recipe(epochs=1, batch_size=len(turned), crop_size=(48, 48))
        for expected, actual in zip(next(batches(upright, recipe)), next(batches(turned, recipe))):
            assert torch.equal(expected, actual)
    if size[0] == size[1]:
        stored = replace(turned, exif="stored")
        assert evaluate(Colors(), stored, workers=0, quiet=True).miou < 0.7


def test_too_large_is_not_damaged(tmp_path, monkeypatch):
    """Pillow refuses images of more than twice its limit."""
    data = data_of(tmp_path, 1, np.zeros((6, 9)))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 20)
    message = r"photo.png: too large: .*54 pixels"
    for read in (data.read, data.image_size):
        with pytest.raises(TrainingError, match=message):
            read(0)
    with pytest.raises(TrainingError, match="labels.png: too large: "):
        data.label_values(0)
