"""Data sets, augmentation, order of the images, worker processes and recipes."""

from __future__ import annotations

import multiprocessing
import re
import signal
import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from deeplab_fast.training import (
    IGNORE,
    Recipe,
    SegmentationData,
    TrainingError,
    cityscapes,
    folder,
    voc,
)
from deeplab_fast.training.layouts import VOC_CLASSES
from deeplab_fast.training.loader import Samples, batches, in_workers, keys, steps_per_epoch
from deeplab_fast.training.transforms import augment

from ..support.shapes import CLASSES, read_shapes


def photo(path: Path, width: int = 8, height: int = 6) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (width, height), (10, 20, 30)).save(path)


def labels(path: Path, values: list[int], palette: bool = False) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(np.resize(np.array(values, np.uint8), (6, 8)))
    if palette:
        image.putpalette(list(range(256)) * 3)
    image.save(path)


def test_voc(tmp_path):
    for name in ("2007_1", "2007_2"):
        photo(tmp_path / f"JPEGImages/{name}.jpg")
    labels(tmp_path / "SegmentationClass/2007_1.png", [0, 20, 255], palette=True)
    lists = tmp_path / "ImageSets/Segmentation"
    lists.mkdir(parents=True)
    (lists / "val.txt").write_text("2007_1\n\n")
    data = voc(tmp_path, "val")
    assert len(data) == 1
    assert (len(data.classes), data.classes[15]) == (21, "person")
    assert set(np.unique(data.read(0)[1])) == {0, 20, 255}

    # SBD's labels have a folder of their own; its lists have names or paths.
    for name in ("2007_1", "2007_2"):
        labels(tmp_path / f"SegmentationClassAug/{name}.png", [3])
    (lists / "trainaug.txt").write_text("2007_1\n2007_2\n")
    assert [np.unique(voc(tmp_path, "trainaug").read(i)[1]).tolist() for i in (0, 1)] == [[3], [3]]
    for split in ("train", "val", "trainval", "test"):
        (lists / f"{split}.txt").write_text("2007_1\n")
        assert set(np.unique(voc(tmp_path, split).read(0)[1])) == {0, 20, 255}
    (lists / "paths.txt").write_text("/JPEGImages/2007_2.jpg /SegmentationClassAug/2007_2.png\n")
    assert voc(tmp_path, "paths").pairs == voc(tmp_path, "trainaug").pairs[1:]


def test_voc_classes_are_in_the_order_of_the_development_kit():
    """The classes of PASCAL VOC are in alphabetical order, after the background."""
    assert VOC_CLASSES[0] == "background" and len(set(VOC_CLASSES)) == 21
    assert list(VOC_CLASSES[1:]) == sorted(VOC_CLASSES[1:])


def test_cityscapes_classes_match_torchvision(tmp_path):
    """The mapping of all labels is that of torchvision's table."""
    datasets = pytest.importorskip("torchvision.datasets")
    table = [c for c in datasets.Cityscapes.classes if c.id >= 0]
    photo(tmp_path / "leftImg8bit/val/ulm/ulm_1_leftImg8bit.png")
    labels(tmp_path / "gtFine/val/ulm/ulm_1_gtFine_labelIds.png", [c.id for c in table])
    data = cityscapes(tmp_path, "val")
    seen = data.read(0)[1].ravel()[: len(table)].tolist()
    assert seen == [255 if c.ignore_in_eval else c.train_id for c in table]
    assert list(data.classes) == [c.name for c in table if not c.ignore_in_eval]


def test_cityscapes_of_several_cities_in_order(tmp_path):
    for city, number in (("zurich", 1), ("aachen", 2), ("aachen", 1)):
        photo(tmp_path / f"leftImg8bit/train/{city}/{city}_{number}_leftImg8bit.png")
        labels(tmp_path / f"gtFine/train/{city}/{city}_{number}_gtFine_labelIds.png", [7])
    photo(tmp_path / "leftImg8bit/train/aachen/aachen_3_other.png")
    pairs = cityscapes(tmp_path, "train").pairs
    assert [image.name.removesuffix("_leftImg8bit.png") for image, _ in pairs] == [
        "aachen_1", "aachen_2", "zurich_1",
    ]  # fmt: skip
    assert all(label.name.startswith(label.parent.name) for _, label in pairs)


def test_cityscapes(tmp_path):
    photo(tmp_path / "leftImg8bit/val/ulm/ulm_000000_000019_leftImg8bit.png")
    labels(
        tmp_path / "gtFine/val/ulm/ulm_000000_000019_gtFine_labelIds.png",
        [0, 7, 8, 11, 18, 19, 26, 29, 31, 33],
    )
    data = cityscapes(tmp_path, "val")
    assert len(data.classes) == 19
    seen = data.read(0)[1].ravel()[:10].tolist()
    # trainId of each labelId, from the table on cityscapes-dataset.com
    assert seen == [255, 0, 1, 2, 255, 6, 13, 255, 16, 18]
    assert [data.classes[i] for i in (0, 6, 13, 18)] == ["road", "traffic light", "car", "bicycle"]


def test_folder_with_subfolders_and_ignored_labels(tmp_path):
    photo(tmp_path / "images/train/b.png")
    photo(tmp_path / "images/train/day/a.jpg")
    labels(tmp_path / "labels/train/b.png", [0, 1, 11])
    labels(tmp_path / "labels/train/day/a.png", [1])
    data = folder(tmp_path, "train", ["road", "sky"], ignore=[11])
    assert [Path(image).name for image, _ in data.pairs] == ["b.png", "a.jpg"]
    assert set(np.unique(data.read(0)[1])) == {0, 1, IGNORE}
    (tmp_path / "classes.txt").write_text("road\nsky\n")
    assert folder(tmp_path, "train", ignore=[11]) == data


def test_folder_finds_all_image_formats_in_order(tmp_path):
    names = ["d.jpeg", "b.PNG", "c.webp", "a.bmp", "e.tif", "f.tiff", "day/a.jpg", "day/A.JPG"]
    for name in names:
        photo(tmp_path / "images/val" / name)
        labels((tmp_path / "labels/val" / name).with_suffix(".png"), [0])
    for other in (".hidden.png", "notes.txt", "day/._a.jpg"):
        (tmp_path / "images/val" / other).write_text("no image")
    pairs = folder(tmp_path, "val", ["a"]).pairs
    root = tmp_path / "images/val"
    assert [image for image, _ in pairs] == sorted(root / name for name in names)
    for image, label in pairs:
        expected = tmp_path / "labels/val" / image.relative_to(root)
        assert label == expected.with_suffix(".png")


def test_labels_of_a_folder(tmp_path):
    """Ignored values may be classes; 255 is always ignored; other values are errors."""
    photo(tmp_path / "images/val/a.png")
    label = tmp_path / "labels/val/a.png"
    labels(label, [0, 1, 2, 7, 255])
    data = folder(tmp_path, "val", ["road", "sky", "tree"], ignore=[7, 1])
    assert data.classes == ("road", "sky", "tree")
    assert data.read(0)[1].ravel()[:5].tolist() == [0, 255, 2, 255, 255]
    assert data.read(0)[1].dtype == np.uint8
    labels(label, [0, 3, 4, 5, 6, 8, 9])
    with pytest.raises(TrainingError, match=r"label 3, 4, 5, 6, 8 is no class \(expected 0-2, 7,"):
        data.read(0)


def test_label_ids(tmp_path):
    photo(tmp_path / "a.png")
    labels(tmp_path / "l.png", [9, 4, 200, 255])
    ids = {9: 1, 4: 0, 200: IGNORE, 255: 0}  # 255 may be a class
    data = SegmentationData([(tmp_path / "a.png", tmp_path / "l.png")], ("x", "y"), ids)
    assert data.read(0)[1].ravel()[:4].tolist() == [1, 0, 255, 0]
    for wrong in ({2**24: 0}, {-1: 0}, {(0, 0): 0}, {(0, 0, 256): 0}, {(0, 0, 0): 0, 1: 1}):
        with pytest.raises(TrainingError, match="label_ids: expected numbers of 0 to 16777215 or"):
            SegmentationData([], ("x", "y"), wrong)
    for wrong in ({0: 2}, {0: -1}):
        with pytest.raises(TrainingError, match="label_ids: expected classes of 0 to 1 or 255"):
            SegmentationData([], ("x", "y"), wrong)


def test_at_most_255_classes():
    SegmentationData([], tuple(map(str, range(255))))
    with pytest.raises(TrainingError, match="classes: expected 1 to 255, got 256"):
        SegmentationData([], tuple(map(str, range(256))))
    with pytest.raises(
        TrainingError, match=r"classes: expected names that differ, got \('a', ''\)"
    ):
        SegmentationData([], ("a", ""))


def test_images_are_read_as_they_are_stored(tmp_path):
    """EXIF orientation is not applied, because labels have none."""
    rows = np.arange(6 * 8 * 3, dtype=np.uint8).reshape(6, 8, 3)
    exif = Image.Exif()
    exif[0x0112] = 6  # rotated by 90 degrees
    Image.fromarray(rows).save(tmp_path / "a.png", exif=exif)
    labels(tmp_path / "l.png", [0, 1])
    data = SegmentationData([(tmp_path / "a.png", tmp_path / "l.png")], ("x", "y"))
    image, classes = data.read(0)
    assert np.array_equal(np.asarray(image), rows) and classes.shape == (6, 8)


def broken(tmp_path: Path, case: str) -> SegmentationData:
    image, label = tmp_path / "a.jpg", tmp_path / "a.png"
    photo(image)
    labels(label, [0, 1])
    match case:
        case "truncated":
            image.write_bytes(image.read_bytes()[:300])
        case "text":
            image.write_text("hello")
        case "gone":
            image.unlink()
        case "label":
            labels(label, [0, 2, 7])
        case "size":
            Image.fromarray(np.zeros((8, 6), np.uint8)).save(label)
        case "height":
            Image.fromarray(np.zeros((5, 8), np.uint8)).save(label)
        case "colours":
            Image.new("RGB", (8, 6), (0, 0, 9)).save(label)
    return SegmentationData([(image, label)], ("road", "sky"))


@pytest.mark.parametrize(
    "case, name, message",
    [
        ("truncated", "a.jpg", r"damaged: .*(?i:truncated) .*\(expected a complete image\)"),
        ("text", "a.jpg", r"not an image \(expected JPEG, PNG, WebP, TIFF, ...\)"),
        ("gone", "a.jpg", r"no such file, or not a regular one \(expected an image\)"),
        ("label", "a.png", r"label 2, 7 is no class \(expected 0-1, or 255"),
        ("size", "a.png", r"6x8 pixels \(expected 8x6, the size of .*a.jpg\)"),
        ("height", "a.png", r"8x5 pixels \(expected 8x6, the size of .*a.jpg\)"),
        ("colours", "a.png", r"in colours, \(0, 0, 9\) 100.0 % \(expected class numbers"),
    ],
)
@pytest.mark.parametrize("workers", [0, 1])
def test_unusable_file_is_named_in_one_line(case, name, message, workers, tmp_path):
    data = broken(tmp_path, case)
    with pytest.raises(TrainingError) as caught:
        next(batches(data, Recipe(epochs=1, batch_size=1, crop_size=(4, 4)), workers=workers))
    assert re.match(rf"{re.escape(str(tmp_path / name))}: .*{message}", str(caught.value))
    assert "\n" not in str(caught.value)


def test_deep_and_transparent_images_are_converted(tmp_path):
    """16 bits are scaled to 8; transparent pixels become white."""
    labels(tmp_path / "l.png", [0])
    Image.fromarray(np.full((6, 8), 257 * 100, np.uint16)).save(tmp_path / "deep.png")
    Image.new("RGBA", (8, 6), (9, 9, 9, 0)).save(tmp_path / "clear.png")
    Image.fromarray(np.ones((6, 8), np.float32)).save(tmp_path / "float.tif")
    pairs = [(tmp_path / name, tmp_path / "l.png") for name in ("deep.png", "clear.png")]
    data = SegmentationData([*pairs, (tmp_path / "float.tif", tmp_path / "l.png")], ("a",))
    assert [data.read(index)[0].getpixel((0, 0)) for index in (0, 1)] == [(100,) * 3, (255,) * 3]
    with pytest.raises(TrainingError, match=r"float.tif: 32 bits .* \(expected 8 or 16\)"):
        data.read(2)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda root: folder(root, "train", ["a"]), "images/train: no such folder"),
        (lambda root: folder(root, "none", ["a"]), "images/none: no images"),
        (lambda root: folder(root, "bare", ["a"]), "labels/bare/x.png: no such file"),
        (lambda root: folder(root, "bare"), "classes.txt: No such file .*, or `classes`"),
        (lambda root: folder(root, "bare", ["a", "a"]), r"classes: .* differ, got \('a', 'a'\)"),
        (lambda root: voc(root, "val"), "ImageSets/Segmentation/val.txt: No such file"),
        (lambda root: voc(root, "odd"), r"odd.txt: 'a b c' \(expected an image's name"),
        (lambda root: cityscapes(root, "val"), "leftImg8bit/val: no such folder"),
        (lambda root: voc(root, "empty"), "empty.txt: no images"),
        (lambda root: voc(root, "gone"), "JPEGImages/x.jpg: no such file"),
        (lambda root: SegmentationData([], ("a",), {3: 1}), "label_ids: .*got 3: 1"),
        (lambda root: SegmentationData([], ()), "classes: expected 1 to 255, got 0"),
    ],
)
def test_missing_data_sets_are_errors(make, message, tmp_path):
    photo(tmp_path / "images/bare/x.jpg")
    (tmp_path / "images/none").mkdir()
    (tmp_path / "ImageSets/Segmentation").mkdir(parents=True)
    (tmp_path / "ImageSets/Segmentation/odd.txt").write_text("a b c\n")
    (tmp_path / "ImageSets/Segmentation/empty.txt").write_text("\n")
    (tmp_path / "ImageSets/Segmentation/gone.txt").write_text("x\n")
    with pytest.raises(TrainingError, match=message):
        make(tmp_path)


def gradient_image(width: int, height: int) -> tuple[Image.Image, np.ndarray]:
    """An image whose red is the column and green the row; its labels are the quadrants."""
    rows, columns = np.mgrid[:height, :width]
    pixels = np.stack([columns * 2, rows * 2, np.zeros_like(rows)], -1).astype(np.uint8)
    quarter = (rows >= height // 2) * 2 + (columns >= width // 2)
    return Image.fromarray(pixels), quarter.astype(np.uint8)


@pytest.mark.parametrize("scale", [0.5, 1.0, 1.7])
@pytest.mark.parametrize("flip", [0.0, 1.0])
def test_image_and_labels_are_augmented_alike(scale, flip):
    image, ground_truth = gradient_image(100, 80)
    recipe = Recipe(crop_size=(60, 70), scale=(scale, scale), flip=flip, color_jitter=0)
    for seed in range(5):
        pixels, classes = augment(image, ground_truth, recipe, np.random.default_rng(seed))
        assert pixels.shape == (60, 70, 3) and classes.shape == (60, 70)
        inside = classes != IGNORE
        height, width = inside.any(1).sum(), inside.any(0).sum()
        assert (height, width) == (min(60, round(80 * scale)), min(70, round(100 * scale)))
        column, row = pixels[..., 0] / 2.0, pixels[..., 1] / 2.0
        expected = (row >= 39.5) * 2 + (column >= 49.5)
        sure = inside & (abs(row - 39.5) > 1.5) & (abs(column - 49.5) > 1.5)
        assert sure.mean() > 0.2
        assert np.array_equal(classes[sure], expected[sure])
        steps = np.diff(column[0][inside[0]])
        assert np.sign(np.median(steps)) == (-1 if flip else 1)
        assert abs(np.mean(abs(steps)) - 1 / scale) < 0.1


def test_whole_image_at_scale_one_is_unchanged():
    image, ground_truth = gradient_image(40, 30)
    recipe = Recipe(crop_size=(30, 40), scale=(1, 1), flip=0, color_jitter=0)
    pixels, classes = augment(image, ground_truth, recipe, np.random.default_rng(0))
    assert np.array_equal(pixels, np.asarray(image)) and np.array_equal(classes, ground_truth)


def test_padding_is_ignored_and_has_the_mean_colour():
    image, ground_truth = gradient_image(10, 10)
    recipe = Recipe(crop_size=(20, 20), scale=(1, 1), flip=0, color_jitter=0.5)
    pixels, classes = augment(image, ground_truth, recipe, np.random.default_rng(0))
    assert (classes[10:] == IGNORE).all() and (classes[:, 10:] == IGNORE).all()
    assert (pixels[10:] == (124, 116, 104)).all()


def test_color_jitter_changes_colours_only():
    image, ground_truth = gradient_image(40, 30)
    plain = dict(crop_size=(30, 40), scale=(1, 1), flip=0.0)
    results = [
        augment(image, ground_truth, Recipe(**plain, color_jitter=0.4), np.random.default_rng(i))
        for i in range(4)
    ]
    assert all(np.array_equal(classes, ground_truth) for _, classes in results)
    assert len({pixels.tobytes() for pixels, _ in results}) == 4


class Scripted:
    """A stand-in for a random generator that returns given values and records their ranges."""

    def __init__(self, scale: float, corner: tuple[int, int], factors=(), flip: float = 0.9):
        self.uniforms = [scale, *factors]
        self.corner = list(corner)
        self.flip = flip
        self.ranges: list[tuple[float, float]] = []
        self.limits: list[int] = []

    def uniform(self, low: float, high: float) -> float:
        self.ranges.append((low, high))
        return self.uniforms.pop(0)

    def integers(self, limit: int) -> int:
        self.limits.append(limit)
        return self.corner.pop(0)

    def random(self) -> float:
        return self.flip


def test_crop_is_a_region_of_the_image():
    image, ground_truth = gradient_image(20, 16)
    pixels, classes = augment(
        image, ground_truth, Recipe(crop_size=(5, 7), color_jitter=0), Scripted(1.0, corner=(11, 3))
    )
    assert np.array_equal(pixels, np.asarray(image)[3:8, 11:18])
    assert np.array_equal(classes, ground_truth[3:8, 11:18])


@pytest.mark.parametrize("flip", [0.0, 0.3, 1.0])
def test_random_numbers_have_the_ranges_of_the_recipe(flip):
    """Images and labels are mirrored with the given probability."""
    image, ground_truth = gradient_image(20, 16)
    recipe = Recipe(crop_size=(10, 12), scale=(0.5, 3.0), flip=flip, color_jitter=0.25)
    for drawn in (0.0, 0.29, 0.3, 0.99):
        script = Scripted(2.0, corner=(4, 6), factors=(1.0, 1.0, 1.0), flip=drawn)
        pixels, classes = augment(image, ground_truth, recipe, script)
        assert script.ranges == [(0.5, 3.0)] + [(0.75, 1.25)] * 3
        assert script.limits == [40 - 12 + 1, 32 - 10 + 1]
        plain = augment(
            image, ground_truth, replace(recipe, flip=0.0), Scripted(2.0, (4, 6), [1.0] * 3)
        )
        side = -1 if drawn < flip else 1
        assert np.array_equal(pixels, plain[0][:, ::side])
        assert np.array_equal(classes, plain[1][:, ::side])


@pytest.mark.parametrize("scale", [0.5, 0.8, 2.0])
def test_resized_crop_equals_a_crop_of_the_resized_image(scale):
    """Images are resized bilinearly with antialiasing, labels to the nearest pixel."""
    random = np.random.default_rng(0)
    pixels = random.integers(0, 256, (20, 30, 3)).astype(np.uint8)
    ground_truth = random.integers(0, 9, (20, 30)).astype(np.uint8)
    height, width = round(20 * scale), round(30 * scale)
    planes = torch.from_numpy(pixels).permute(2, 0, 1)[None].double()
    resized = F.interpolate(planes, (height, width), mode="bilinear", antialias=True)[0]
    rows = ((np.arange(height) + 0.5) / scale).astype(int)
    columns = ((np.arange(width) + 0.5) / scale).astype(int)
    recipe = Recipe(crop_size=(7, 9), color_jitter=0)
    for left, top in ((0, 0), (width - 9, height - 7), (3, 2)):
        script = Scripted(scale, (left, top))
        resized_crop, classes = augment(Image.fromarray(pixels), ground_truth, recipe, script)
        expected = resized[:, top : top + 7, left : left + 9].permute(1, 2, 0).numpy()
        assert abs(resized_crop - expected).max() <= 1.5  # Pillow rounds twice
        assert np.array_equal(
            classes, ground_truth[rows][:, columns][top : top + 7, left : left + 9]
        )


def test_sides_are_rounded():
    image, ground_truth = gradient_image(13, 9)
    _, classes = augment(
        image, ground_truth, Recipe(crop_size=(9, 9), color_jitter=0), Scripted(0.6, (0, 0))
    )
    inside = classes != IGNORE
    assert (inside.any(0).sum(), inside.any(1).sum()) == (8, 5)  # 7.8 and 5.4 rounded


def test_sides_are_never_empty():
    image, ground_truth = gradient_image(40, 3)
    recipe = Recipe(crop_size=(4, 4), color_jitter=0)
    _, classes = augment(image, ground_truth, recipe, Scripted(0.1, (0, 0)))
    assert (classes != IGNORE).sum() == 1 * 4


@pytest.mark.parametrize("factor", [0.6, 1.4])
@pytest.mark.parametrize("change", ["brightness", "contrast", "saturation"])
def test_color_jitter_is_brightness_contrast_and_saturation(change, factor):
    """Each scales the distance to black, to the mean grey, or to the grey of the pixel."""
    random = np.random.default_rng(0)
    pixels = random.integers(60, 180, (16, 20, 3)).astype(np.uint8)
    factors = [factor if change == name else 1.0 for name in ("brightness", "contrast")]
    factors.append(factor if change == "saturation" else 1.0)
    grey = pixels @ np.array([0.299, 0.587, 0.114])
    base = {"brightness": 0.0, "contrast": grey.mean(), "saturation": grey[..., None]}[change]
    expected = np.clip(base + factor * (pixels - base), 0, 255)
    changed, _ = augment(
        Image.fromarray(pixels), np.zeros((16, 20), np.uint8), Recipe(crop_size=(16, 20)),
        Scripted(1.0, (0, 0), factors),
    )  # fmt: skip
    assert abs(changed - expected).max() <= 2


def test_random_scales_crops_and_brightness_cover_their_ranges():
    image = Image.new("RGB", (20, 10), (100, 100, 100))
    ground_truth = np.zeros((10, 20), np.uint8)
    recipe = Recipe(crop_size=(30, 60), scale=(0.5, 2.5), color_jitter=0.4)
    scales, brightness = [], []
    for seed in range(200):
        pixels, classes = augment(image, ground_truth, recipe, np.random.default_rng(seed))
        scales.append((classes != IGNORE).any(0).sum() / 20)
        brightness.append(int(pixels[classes != IGNORE][0][0]))
    assert 0.5 <= min(scales) < 0.6 and 2.4 < max(scales) <= 2.5
    assert np.mean(scales) == pytest.approx(1.5, abs=0.1)
    # Contrast and saturation do not change an image of one grey.
    assert 59 <= min(brightness) < 64 and 136 < max(brightness) <= 141
    assert np.mean(brightness) == pytest.approx(100, abs=4)

    image, ground_truth = gradient_image(8, 6)
    recipe = Recipe(crop_size=(5, 6), scale=(1, 1), color_jitter=0, flip=0)
    corners = set()
    for seed in range(60):
        pixels, _ = augment(image, ground_truth, recipe, np.random.default_rng(seed))
        corners.add((pixels[0, 0, 0] // 2, pixels[0, 0, 1] // 2))
    assert corners == {(x, y) for x in range(3) for y in range(2)}


def test_flip_probability():
    image, ground_truth = gradient_image(8, 6)
    recipe = Recipe(crop_size=(6, 8), scale=(1, 1), color_jitter=0, flip=0.25)
    results = [augment(image, ground_truth, recipe, np.random.default_rng(i)) for i in range(400)]
    assert np.mean([pixels[0, 0, 0] > 0 for pixels, _ in results]) == pytest.approx(0.25, abs=0.06)


def test_augmented_images_are_writeable_and_contiguous():
    """torch.from_numpy warns about read-only arrays and rejects negative strides."""
    image, ground_truth = gradient_image(8, 6)
    for array in augment(
        image, ground_truth, Recipe(crop_size=(6, 8), flip=1.0), np.random.default_rng(0)
    ):
        assert array.flags.writeable and array.flags.c_contiguous


def test_sample_depends_on_seed_epoch_and_image(tmp_path):
    photo_like = np.random.default_rng(0).integers(0, 256, (20, 20, 3)).astype(np.uint8)
    for name in "ab":
        Image.fromarray(photo_like).save(tmp_path / f"{name}.png")
        Image.fromarray(np.zeros((20, 20), np.uint8)).save(tmp_path / f"{name}_.png")
    pairs = [(tmp_path / f"{name}.png", tmp_path / f"{name}_.png") for name in "ab"]
    data = SegmentationData(pairs, ("x",))
    recipe = Recipe(crop_size=(12, 12))
    samples = [
        Samples(data, other)[key][0].tobytes()
        for other in (recipe, replace(recipe, seed=1))
        for key in ((0, 0), (0, 1), (1, 0), (1, 1))
    ]
    assert len(set(samples)) == 8
    assert Samples(data, recipe)[1, 0][0].tobytes() == samples[2]


def test_order_depends_on_seed_and_epoch():
    def order(seed: int) -> list[list[int]]:
        recipe = Recipe(epochs=3, batch_size=2, seed=seed)
        flat = [index for batch in keys(10, recipe, 0, 0, 1) for _, index in batch]
        return [flat[:10], flat[10:20], flat[20:]]

    assert order(0) == order(0)
    orders = [*order(0), *order(1)]
    assert all(sorted(one) == list(range(10)) for one in orders)
    assert len(set(map(tuple, orders))) == 6


@pytest.mark.parametrize(
    "images, batch_size, expected", [(6, 2, 3), (7, 2, 4), (1, 4, 1), (8, 8, 1), (9, 8, 2)]
)
def test_steps_per_epoch(images, batch_size, expected):
    recipe = Recipe(epochs=2, batch_size=batch_size)
    assert steps_per_epoch(images, recipe) == expected
    all_batches = list(keys(images, recipe, 0, 0, 1))
    assert [len(batch) for batch in all_batches] == [batch_size] * (2 * expected)
    # The first images of the epoch fill up the last batch.
    flat = [index for batch in all_batches[:expected] for _, index in batch]
    assert flat == [flat[i % images] for i in range(len(flat))]


def test_processes_share_the_micro_batches_of_an_update():
    recipe = Recipe(epochs=1, batch_size=8, grad_accum_steps=2)
    ranks = [list(keys(16, recipe, 0, rank, 2)) for rank in (0, 1)]
    assert [len(micro_batch) for micro_batch in ranks[0]] == [2] * 4
    whole = list(keys(16, replace(recipe, grad_accum_steps=1), 0, 0, 1))
    for update in (0, 1):
        update_ranks = [rank[2 * update : 2 * update + 2] for rank in ranks]
        assert sorted(sum(update_ranks[0] + update_ranks[1], [])) == sorted(whole[update])
        assert sum(update_ranks[1], []) == whole[update][1::2]  # alternate images
    # A later start is at an update, and not at a micro-batch.
    assert list(keys(16, recipe, 1, 1, 2)) == ranks[1][2:]


def test_batches_are_samples_in_order(shapes):
    data, _ = read_shapes(shapes)
    recipe = Recipe(epochs=2, batch_size=4, grad_accum_steps=2, crop_size=(16, 24))
    samples = Samples(data, recipe)
    for first, rank, processes in ((0, 0, 1), (3, 1, 2)):
        order = list(keys(6, recipe, first, rank, processes))
        loaded = list(batches(data, recipe, first, 0, rank, processes))
        assert len(loaded) == len(order)
        for (images, classes), micro_batch in zip(loaded, order):
            assert images.dtype == classes.dtype == torch.uint8
            assert np.array_equal(images, np.stack([samples[key][0] for key in micro_batch]))
            assert np.array_equal(classes, np.stack([samples[key][1] for key in micro_batch]))


def test_loader_does_not_use_the_generator_of_dropout(shapes):
    data, _ = read_shapes(shapes)
    before = torch.get_rng_state()
    for workers in (0, 1):
        list(batches(data, Recipe(epochs=1, batch_size=6, crop_size=(8, 8)), workers=workers))
    assert torch.equal(torch.get_rng_state(), before)


def test_in_workers_keeps_the_order_of_the_keys():
    """Without `collate` an item has one key, with it a list of keys."""
    assert list(in_workers([10, 20, 30], [2, 0, 1], 0)) == [30, 10, 20]
    assert list(in_workers([10, 20, 30], [[2, 0], [1]], 0, sum)) == [40, 20]
    assert list(in_workers(list(range(9)), range(8, -1, -1), 2)) == list(range(8, -1, -1))
    with pytest.raises(TrainingError, match="workers: expected 0 or more, got -1"):
        next(in_workers([1], [0], -1))


def test_other_errors_of_workers_are_raised():
    class Broken:
        def __getitem__(self, key):
            raise RuntimeError("a bug")

    with pytest.raises(RuntimeError, match="a bug"):
        next(in_workers(Broken(), [0], 0))


def test_every_epoch_covers_every_image():
    recipe = Recipe(epochs=2, batch_size=4, grad_accum_steps=2)
    whole = list(keys(10, recipe, 0, 0, 1))
    assert steps_per_epoch(10, recipe) == 3
    assert [len(micro_batch) for micro_batch in whole] == [2] * 12
    epochs = [sum(whole[:6], []), sum(whole[6:], [])]
    for number, epoch in enumerate(epochs):
        assert {index for _, index in epoch} == set(range(10))
        assert {e for e, _ in epoch} == {number}
    assert [i for _, i in epochs[0]] != [i for _, i in epochs[1]]
    # Later starts and several processes have the same order.
    assert list(keys(10, recipe, 4, 0, 1)) == whole[8:]
    one = Recipe(epochs=2, batch_size=4)
    ranks = [list(keys(10, one, 0, rank, 2)) for rank in (0, 1)]
    together = [sorted(a + b) for a, b in zip(*ranks)]
    assert together == [sorted(batch) for batch in keys(10, one, 0, 0, 1)]


def test_batch_larger_than_the_data_set():
    assert [len(batch) for batch in keys(3, Recipe(epochs=2, batch_size=8), 0, 0, 1)] == [8, 8]


def test_samples_do_not_depend_on_workers(shapes):
    data, _ = read_shapes(shapes)
    recipe = Recipe(epochs=2, batch_size=3, crop_size=(32, 32))
    runs = [
        [(x.numpy().tobytes(), y.numpy().tobytes()) for x, y in batches(data, recipe, 0, workers)]
        for workers in (0, 2)
    ]
    assert runs[0] == runs[1] and len(runs[0]) == 4
    assert len(set(runs[0])) == 4  # augmentation differs between epochs
    assert data.classes == CLASSES
    first = Samples(data, recipe)[0, 3]
    other = Samples(data, Recipe(seed=1, crop_size=(32, 32)))[0, 3]
    assert not np.array_equal(first[0], other[0])


def test_worker_ignores_signals_of_others_than_its_parent(shapes):
    """Ctrl-C and torchrun signal all processes, and the parent has to save with its workers.

    A worker starts threads before our code runs in it, if torch has been told how many to use.
    """
    code = textwrap.dedent("""
        import multiprocessing, subprocess
        import torch
        torch.set_num_threads(4)
        from deeplab_fast.training import Recipe, folder
        from deeplab_fast.training.loader import batches

        recipe = Recipe(epochs=4, batch_size=1, crop_size=(32, 32))
        loader = batches(folder(".", "train"), recipe, workers=1)
        next(loader)
        (worker,) = multiprocessing.active_children()
        for name in ("INT", "TERM"):
            subprocess.run(["kill", f"-{name}", str(worker.pid)], check=True)
        for _ in range(5):  # more than DataLoader reads ahead
            next(loader)
        loader.close()
        worker.join(5)
        print(worker.exitcode)
    """)
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=shapes, capture_output=True, text=True, timeout=300)
    assert done.stdout == "0\n", done.stderr


def test_killed_worker_is_detected_between_updates(shapes):
    data, _ = read_shapes(shapes)
    loader = batches(data, Recipe(epochs=4, batch_size=1, crop_size=(32, 32)), workers=1)
    next(loader)
    (worker,) = multiprocessing.active_children()
    worker.kill()
    worker.join(5)  # the exception must not be raised here
    with pytest.raises(TrainingError, match="a process that reads images was killed"):
        list(loader)
    assert signal.getsignal(signal.SIGCHLD) is not signal.SIG_DFL  # PyTorch's handler is restored


@pytest.mark.parametrize(
    "values",
    [
        {"epochs": 0},
        {"batch_size": 0},
        {"grad_accum_steps": 0},
        {"crop_size": (0, 5)},
        {"scale": (2.0, 0.5)},
        {"flip": 1.5},
        {"color_jitter": -0.1},
        {"learning_rate": 0.0},
        {"head_learning_rate": -1.0},
        {"warmup_steps": -1},
        {"power": -1.0},
        {"momentum": 1.0},
        {"weight_decay": -1e-4},
        {"aux_weight": -0.5},
        {"class_weights": (1.0, -1.0)},
        {"class_weights": (0.0, 0.0)},
        {"label_smoothing": 2.0},
        {"top_k_pixels": 0.0},
        {"ema_decay": 1.0},
        {"dtype": "int8"},
        {"seed": -1},
    ],
    ids=str,
)
def test_recipe_rejects_values_out_of_range(values):
    (name,) = values
    with pytest.raises(TrainingError, match=f"^{name}: expected .*, got"):
        Recipe(**values)


def test_learning_rate_factors():
    recipe = Recipe(warmup_steps=10)
    factors = [recipe.learning_rate_factor(step, 100) for step in range(100)]
    assert factors[0] == pytest.approx(0.1)
    assert factors[10:] == [(1 - step / 100) ** 0.9 for step in range(10, 100)]
    assert max(factors) == factors[9] or max(factors) == factors[10]
    assert 0 < factors[99] < 0.02


def test_warm_up_multiplies_the_schedule():
    recipe = Recipe(warmup_steps=4, power=1.0)
    factors = [recipe.learning_rate_factor(step, 10) for step in range(10)]
    assert factors == pytest.approx([0.25, 0.45, 0.6, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1])
    assert Recipe(power=0.0).learning_rate_factor(9, 10) == 1.0
