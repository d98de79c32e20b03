"""Data sets, augmentation, order: what a network gets to see."""

from __future__ import annotations

import multiprocessing
import re
import signal
import subprocess
from pathlib import Path

import numpy as np
import pytest
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
from deeplab_fast.training.loader import Samples, batches, keys, steps_per_epoch
from deeplab_fast.training.transforms import augment

from .shapes import CLASSES, read_shapes, write_shapes


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

    # SBD's labels are in a folder of their own; lists of them come with names or with paths.
    for name in ("2007_1", "2007_2"):
        labels(tmp_path / f"SegmentationClassAug/{name}.png", [3])
    (lists / "trainaug.txt").write_text("2007_1\n2007_2\n")
    assert [np.unique(voc(tmp_path, "trainaug").read(i)[1]).tolist() for i in (0, 1)] == [[3], [3]]
    (lists / "paths.txt").write_text("/JPEGImages/2007_2.jpg /SegmentationClassAug/2007_2.png\n")
    assert voc(tmp_path, "paths").pairs == voc(tmp_path, "trainaug").pairs[1:]


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
        case "colours":
            Image.new("RGB", (8, 6)).save(label)
    return SegmentationData([(image, label)], ("road", "sky"))


@pytest.mark.parametrize(
    "case, name, message",
    [
        ("truncated", "a.jpg", r"(?i:truncated) .*\(expected a readable image\)"),
        ("text", "a.jpg", r"cannot identify image file \(expected a readable image\)"),
        ("gone", "a.jpg", r"No such file or directory \(expected a readable image\)"),
        ("label", "a.png", r"label 2, 7 is no class \(expected 0-1, or 255"),
        ("size", "a.png", r"6x8 pixels \(expected 8x6, the size of .*a.jpg\)"),
        ("colours", "a.png", r"mode RGB \(expected class numbers"),
    ],
)
@pytest.mark.parametrize("workers", [0, 1])
def test_a_file_that_cannot_be_used_is_named_in_one_line(case, name, message, workers, tmp_path):
    data = broken(tmp_path, case)
    with pytest.raises(TrainingError) as caught:
        next(batches(data, Recipe(epochs=1, batch_size=1, crop=(4, 4)), workers=workers))
    assert re.match(rf"{re.escape(str(tmp_path / name))}: .*{message}", str(caught.value))
    assert "\n" not in str(caught.value)


def test_images_are_seen_as_segment_sees_them(tmp_path):
    """16 bits are scaled, transparent pixels are white."""
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
        (lambda root: folder(root, "none", ["a"]), "images/none: names no image"),
        (lambda root: folder(root, "bare", ["a"]), "labels/bare/x.png: no such file"),
        (lambda root: folder(root, "bare"), "classes.txt: No such file .*, or `classes`"),
        (lambda root: folder(root, "bare", ["a", "a"]), r"classes: .* differ, got \('a', 'a'\)"),
        (lambda root: voc(root, "val"), "ImageSets/Segmentation/val.txt: No such file"),
        (lambda root: voc(root, "odd"), r"odd.txt: 'a b c' \(expected an image's name"),
        (lambda root: cityscapes(root, "val"), "leftImg8bit/val: no such folder"),
        (lambda root: SegmentationData([], ("a",), {3: 1}), "label_ids: .*got 3: 1"),
        (lambda root: SegmentationData([], ()), "classes: expected 1 to 255, got 0"),
    ],
)
def test_a_data_set_that_is_not_there(make, message, tmp_path):
    photo(tmp_path / "images/bare/x.jpg")
    (tmp_path / "images/none").mkdir()
    (tmp_path / "ImageSets/Segmentation").mkdir(parents=True)
    (tmp_path / "ImageSets/Segmentation/odd.txt").write_text("a b c\n")
    with pytest.raises(TrainingError, match=message):
        make(tmp_path)


def gradient_image(width: int, height: int) -> tuple[Image.Image, np.ndarray]:
    """Red tells the column and green the row, labels the quarter."""
    rows, columns = np.mgrid[:height, :width]
    pixels = np.stack([columns * 2, rows * 2, np.zeros_like(rows)], -1).astype(np.uint8)
    quarter = (rows >= height // 2) * 2 + (columns >= width // 2)
    return Image.fromarray(pixels), quarter.astype(np.uint8)


@pytest.mark.parametrize("scale", [0.5, 1.0, 1.7])
@pytest.mark.parametrize("flip", [0.0, 1.0])
def test_image_and_labels_stay_together(scale, flip):
    image, truth = gradient_image(100, 80)
    recipe = Recipe(crop=(60, 70), scale=(scale, scale), flip=flip, jitter=0)
    for seed in range(5):
        pixels, classes = augment(image, truth, recipe, np.random.default_rng(seed))
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
    image, truth = gradient_image(40, 30)
    recipe = Recipe(crop=(30, 40), scale=(1, 1), flip=0, jitter=0)
    pixels, classes = augment(image, truth, recipe, np.random.default_rng(0))
    assert np.array_equal(pixels, np.asarray(image)) and np.array_equal(classes, truth)


def test_padding_is_ignored_and_mean():
    image, truth = gradient_image(10, 10)
    recipe = Recipe(crop=(20, 20), scale=(1, 1), flip=0, jitter=0.5)
    pixels, classes = augment(image, truth, recipe, np.random.default_rng(0))
    assert (classes[10:] == IGNORE).all() and (classes[:, 10:] == IGNORE).all()
    assert (pixels[10:] == (124, 116, 104)).all()


def test_jitter_changes_colours_only():
    image, truth = gradient_image(40, 30)
    plain = dict(crop=(30, 40), scale=(1, 1), flip=0.0)
    results = [
        augment(image, truth, Recipe(**plain, jitter=0.4), np.random.default_rng(i))
        for i in range(4)
    ]
    assert all(np.array_equal(classes, truth) for _, classes in results)
    assert len({pixels.tobytes() for pixels, _ in results}) == 4


def test_order_covers_every_image_each_epoch_and_shares_it_out():
    recipe = Recipe(epochs=2, batch_size=4, accumulate=2)
    whole = list(keys(10, recipe, 0, 0, 1))
    assert steps_per_epoch(10, recipe) == 3
    assert [len(part) for part in whole] == [2] * 12
    epochs = [sum(whole[:6], []), sum(whole[6:], [])]
    for number, epoch in enumerate(epochs):
        assert {index for _, index in epoch} == set(range(10))
        assert {e for e, _ in epoch} == {number}
    assert [i for _, i in epochs[0]] != [i for _, i in epochs[1]]
    # Later starts and several processes see parts of the same.
    assert list(keys(10, recipe, 4, 0, 1)) == whole[8:]
    one = Recipe(epochs=2, batch_size=4)
    ranks = [list(keys(10, one, 0, rank, 2)) for rank in (0, 1)]
    together = [sorted(a + b) for a, b in zip(*ranks)]
    assert together == [sorted(part) for part in keys(10, one, 0, 0, 1)]


def test_more_images_a_batch_than_there_are():
    assert [len(part) for part in keys(3, Recipe(epochs=2, batch_size=8), 0, 0, 1)] == [8, 8]


def test_samples_do_not_depend_on_workers(tmp_path):
    data, _ = read_shapes(write_shapes(tmp_path / "shapes"))
    recipe = Recipe(epochs=2, batch_size=3, crop=(32, 32))
    runs = [
        [(x.numpy().tobytes(), y.numpy().tobytes()) for x, y in batches(data, recipe, 0, workers)]
        for workers in (0, 2)
    ]
    assert runs[0] == runs[1] and len(runs[0]) == 4
    assert len(set(runs[0])) == 4  # each epoch is augmented anew
    assert data.classes == CLASSES
    first = Samples(data, recipe)[0, 3]
    other = Samples(data, Recipe(seed=1, crop=(32, 32)))[0, 3]
    assert not np.array_equal(first[0], other[0])


def test_a_worker_obeys_its_parent_only(tmp_path):
    """What Ctrl-C or torchrun send to a whole group does not keep the parent from saving."""
    data, _ = read_shapes(write_shapes(tmp_path / "shapes"))
    loader = batches(data, Recipe(epochs=4, batch_size=1, crop=(32, 32)), workers=1)
    next(loader)
    (worker,) = multiprocessing.active_children()
    for name in ("INT", "TERM"):
        subprocess.run(["kill", f"-{name}", str(worker.pid)], check=True)
    for _ in range(5):  # more than are read ahead
        next(loader)
    loader.close()
    worker.join(5)
    assert worker.exitcode == 0


def test_a_killed_worker_is_noticed_between_updates(tmp_path):
    data, _ = read_shapes(write_shapes(tmp_path / "shapes"))
    loader = batches(data, Recipe(epochs=4, batch_size=1, crop=(32, 32)), workers=1)
    next(loader)
    (worker,) = multiprocessing.active_children()
    worker.kill()
    worker.join(5)  # an exception would come here
    with pytest.raises(TrainingError, match="a process that reads images was killed"):
        list(loader)
    assert signal.getsignal(signal.SIGCHLD) is not signal.SIG_DFL  # PyTorch's is back


@pytest.mark.parametrize(
    "values",
    [
        {"epochs": 0},
        {"batch_size": 0},
        {"accumulate": 0},
        {"crop": (0, 5)},
        {"scale": (2.0, 0.5)},
        {"flip": 1.5},
        {"jitter": -0.1},
        {"learning_rate": 0.0},
        {"head_learning_rate": -1.0},
        {"warmup": -1},
        {"power": -1.0},
        {"momentum": 1.0},
        {"weight_decay": -1e-4},
        {"aux_weight": -0.5},
        {"class_weights": (1.0, -1.0)},
        {"class_weights": (0.0, 0.0)},
        {"label_smoothing": 2.0},
        {"hard_pixels": 0.0},
        {"ema": 1.0},
        {"dtype": "int8"},
        {"seed": -1},
    ],
    ids=str,
)
def test_recipe_refuses(values):
    (name,) = values
    with pytest.raises(TrainingError, match=f"^{name}: expected .*, got"):
        Recipe(**values)


def test_learning_rate():
    recipe = Recipe(warmup=10)
    factors = [recipe.learning_rate_factor(step, 100) for step in range(100)]
    assert factors[0] == pytest.approx(0.1)
    assert factors[10:] == [(1 - step / 100) ** 0.9 for step in range(10, 100)]
    assert max(factors) == factors[9] or max(factors) == factors[10]
    assert 0 < factors[99] < 0.02
