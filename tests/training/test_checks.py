"""Checks of the labels before a run, class weights that balance them, and runs without labels."""

from __future__ import annotations

import json
import math
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from deeplab_fast.cli import datasets, main
from deeplab_fast.training import (
    Interrupted,
    Objective,
    Recipe,
    Scores,
    SegmentationData,
    TrainingError,
    balanced_class_weights,
    check_labels,
    checks,
    count_labels,
    distributed,
    evaluate,
    folder,
    label_counts,
    loop,
    train,
)
from deeplab_fast.training.checks import label_ids_text
from deeplab_fast.training.label_counts import frequency_table
from deeplab_fast.training.state import TrainingState
from deeplab_fast.training.step import TrainingStep

from ..support.runs import signal_in_update, small_network
from ..support.shapes import CLASSES, read_shapes, write_shapes
from .test_recipe import Tiny

TRAIN = ["--backbone", "mobilenet_v2", "--output-stride", "16", "--device", "cpu"]
TRAIN += ["--epochs", "1", "--batch-size", "2", "--crop-size", "32", "32", "--workers", "0"]
RECIPE = Recipe(epochs=2, batch_size=2, crop_size=(32, 32), learning_rate=0.05)

pytestmark = pytest.mark.usefixtures("one_thread")


def write(path: Path, *labels, size=None) -> SegmentationData:
    """Write label files from arrays, or bytes for other content, with an image for each."""
    pairs = []
    path.mkdir(parents=True, exist_ok=True)
    for index, values in enumerate(labels):
        label, image = path / f"{index}.png", path / f"{index}.jpg"
        if isinstance(values, bytes):
            label.write_bytes(values)
            shape = (4, 4)
        else:
            values = np.asarray(values, np.uint8)
            Image.fromarray(values).save(label)
            shape = values.shape[:2]
        Image.new("RGB", size or shape[::-1]).save(image)
        pairs.append((image, label))
    return SegmentationData(pairs, CLASSES)


def report(capsys, data: SegmentationData, recipe: Recipe | None = RECIPE, **others) -> list[str]:
    """Lines on standard error of a check, which must raise exactly if there are errors."""
    try:
        check_labels({"train": data, **others}, workers=0, quiet=True, recipe=recipe)
    except TrainingError as error:
        lines = capsys.readouterr().err.splitlines()
        count = sum(line.startswith("error: ") for line in lines)
        assert f"{count} problem{'s' * (count > 1)} in the labels" in str(error)
        assert "--no-check" in str(error) and "\n" not in str(error)
        kinds = [line.split(":")[0] for line in lines if not line.startswith(" ")]
        assert kinds == sorted(kinds, reverse=True)  # errors last
    else:
        lines = capsys.readouterr().err.splitlines()
        assert not [line for line in lines if not line.startswith("warning: ")]
    return lines


GOOD = [[0, 0, 1, 2], [0, 0, 1, 1]]


def test_counts_by_hand(tmp_path):
    data = write(tmp_path, [[0, 0, 2], [0, 7, 7]], [[255, 255]], [[2, 2, 2, 0]], b"")
    counts = count_labels(data, workers=0, quiet=True)
    assert counts.pixels.tolist() == [4, 0, 4]
    assert counts.images.tolist() == [2, 0, 2]
    found = {value: (where.files, where.pixels) for value, where in counts.values.items()}
    assert found == {0: ([0, 2], 4), 2: ([0, 2], 4), 7: ([0], 2), 255: ([1], 2)}
    assert (counts.unlabelled.files, counts.unlabelled.pixels) == ([1], 2)
    assert counts.unreadable == [f"{tmp_path}/3.png: the file is empty (expected {_KINDS})"]
    assert counts.largest == (2, 4)


_KINDS = "JPEG, PNG, WebP, TIFF, ..."


@pytest.mark.parametrize("dtype", [np.uint8, np.int32])
def test_histogram(dtype):
    random = np.random.default_rng(0)
    values = random.integers(0, 200, (30, 40)).astype(dtype).repeat(3, 1)
    values[:, :9] = values[0, 0]
    found, pixels = label_counts._histogram(values)
    assert dict(zip(found.tolist(), pixels.tolist())) == Counter(values.ravel().tolist())
    assert (np.diff(found) > 0).all() and pixels.dtype == np.int64


def test_histogram_of_a_photo_keeps_the_most_frequent_values():
    values = np.repeat(np.arange(1000), np.arange(1000) + 1)[None]
    found, pixels = label_counts._histogram(values)
    assert found.tolist() == list(range(1000 - 256, 1000))
    assert pixels.tolist() == (found + 1).tolist()


def test_workers_and_processes_count_the_same(shapes, tmp_path, monkeypatch):
    data = read_shapes(shapes)[0]
    data.pairs.append((tmp_path / "a.png", tmp_path / "gone.png"))
    expected = count_labels(data, workers=0, quiet=True)
    assert expected.images.tolist() == [6] * 3 and len(expected.unreadable) == 1
    by_workers = count_labels(data, workers=1, quiet=True)
    parts = []
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    for rank in (1, 0):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        monkeypatch.setattr(
            distributed, "gather", lambda value: value is None and [None] or _gather(parts, value)
        )
        by_processes = count_labels(data, workers=0, quiet=True)
    assert [len(part) for part in parts] == [4, 3]
    for counts in (by_workers, by_processes):
        assert counts.pixels.tolist() == expected.pixels.tolist()
        assert counts.values == expected.values
        assert counts.unreadable == expected.unreadable


def _gather(parts: list, value: list) -> list:
    parts.insert(0, value)
    return parts


def test_labels_without_problems(shapes, capsys):
    train_data, val_data = read_shapes(shapes)
    assert report(capsys, train_data, val=val_data) == []
    counts = check_labels({"a": train_data, "b": val_data}, workers=0, quiet=True)
    assert frequency_table(counts).splitlines() == [
        "class    a images   pixels  b images   pixels",
        *(
            f"{name:<7}         6  {x:>7.2%}         2  {y:>7.2%}"
            for name, x, y in zip(
                CLASSES, *(part.pixels / part.pixels.sum() for part in counts.values())
            )
        ),
    ]


def test_table_of_many_classes_is_one_line(tmp_path):
    data = replace(write(tmp_path, [[3, 99]]), classes=tuple(f"class {i}" for i in range(100)))
    counts = {"train": count_labels(data, workers=0, quiet=True)}
    assert frequency_table(counts) == "100 classes, of which occur 2 in train"


@pytest.mark.parametrize(
    "labels, recipe, expected",
    [
        # masks of 0 and 255
        (
            [[[0, 255]], [[0, 0]]],
            RECIPE,
            [
                "warning: train: classes in no file (2 of 3): red, blue",
                "error: train: labels are 0 and 255 only, and 255 means ignored (expected two "
                "classes: masks of 0 and 255 need --label-ids 0=0 255=1, in Python "
                "label_ids={0: 0, 255: 1})",
            ],
        ),
        # classes that are counted from 1
        (
            [[[1, 2, 3, 3]], [[3, 255, 255, 255]]],
            RECIPE,
            [
                "warning: train: classes in no file (1 of 3): nothing",
                "error: train: 1 label without a class",
                "  3: 2 files, 3 pixels (0.png, 1.png)",
                "  (expected classes of 0 to 2: if these are the 3 classes in order, "
                "--label-ids 1-3=0-2)",
            ],
        ),
        (
            [[[1, 3, 3, 3]]],
            RECIPE,
            [
                "warning: train: classes in no file (2 of 3): nothing, blue",
                "error: train: 1 label without a class",
                "  3: 1 file, 3 pixels (0.png)",
                "  (expected classes of 0 to 2: if these are the 3 classes in order, "
                "--label-ids 1-3=0-2)",
            ],
        ),
        # one class more than there are names, the most frequent label first
        (
            [[[0, 1, 2, 3]], [[4, 4, 4, 4]], [[4, 3, 0, 0]], [[4, 4, 4, 4]], [[4, 4, 4, 4]]],
            RECIPE,
            [
                "error: train: 2 labels without a class",
                "  4: 4 files, 13 pixels (1.png, 2.png, 3.png, ...)",
                "  3: 2 files, 2 pixels (0.png, 2.png)",
                "  (expected classes of 0 to 2: add names to classes.txt or --classes, or map "
                "labels with --label-ids, or --ignore them)",
            ],
        ),
        # grey values that stand for the classes
        (
            [[[0, 128, 255, 0]]],
            RECIPE,
            [
                "warning: train: classes in no file (2 of 3): red, blue",
                "error: train: 1 label without a class",
                "  128: 1 file, 1 pixel (0.png)",
                "  (expected classes of 0 to 2: if these are the 3 classes in order, --label-ids "
                "0=0 128=1 255=2)",
            ],
        ),
        # nothing to learn
        (
            [[[1, 1, 255]]],
            RECIPE,
            [
                "warning: train: classes in no file (2 of 3): nothing, blue",
                "error: train: only the class red occurs, so that there is nothing to learn "
                "(expected two)",
            ],
        ),
        (
            [[[255, 255]]],
            RECIPE,
            [
                "warning: train: 1 file without a labelled pixel: 0.png",
                "error: train: all pixels are ignored (expected labelled ones)",
            ],
        ),
        # an evaluation of one class is meaningful
        (
            [[[1, 1, 255]]],
            None,
            ["warning: train: classes in no file (2 of 3): nothing, blue"],
        ),
        (
            [[[255, 255]]],
            None,
            [
                "warning: train: 1 file without a labelled pixel: 0.png",
                "error: train: all pixels are ignored (expected labelled ones)",
            ],
        ),
        (
            [GOOD, *[np.full((2, 4), 255)] * 4],
            RECIPE,
            ["warning: train: 4 files without a labelled pixel: 1.png, 2.png, 3.png, ..."],
        ),
    ],
)
def test_problems_and_what_to_do(labels, recipe, expected, tmp_path, capsys):
    recipe = recipe and replace(recipe, crop_size=(1, 1))
    assert report(capsys, write(tmp_path, *labels), recipe) == expected


def test_labels_of_interpolated_masks(tmp_path, capsys):
    lines = report(capsys, write(tmp_path, np.arange(40)[None].repeat(2, 0)))
    assert lines[0] == "error: train: 37 labels without a class"
    assert lines[6:8] == [
        "  and 32 more",
        "  So many are left by JPEG, and by resizing other than to the nearest pixel",
    ]


def test_colours_without_a_class(tmp_path, capsys):
    colours = np.array([[[0, 0, 0], [128, 0, 0], [0, 9, 0]]], np.uint8)
    data = write(tmp_path, colours)
    data = replace(data, classes=("a", "b"), label_ids={(0, 0, 0): 0, (128, 0, 0): 1})
    assert report(capsys, data, replace(RECIPE, crop_size=(1, 1))) == [
        "error: train: 1 label without a class",
        "  (0, 9, 0): 1 file, 1 pixel (0.png)",
        "  (expected the colours of the classes: add lines name,red,green,blue to the file of "
        "--colors; lines of one name are one class, which --ignore can name)",
    ]


def test_all_unreadable_files_and_sizes_are_listed(tmp_path, capsys):
    data = write(tmp_path, GOOD, b"", b"no image", size=(4, 2))
    for index in (0, 1, 2):
        Image.new("RGB", (4, 3 + index)).save(tmp_path / "x.jpg")
        data.pairs.append((tmp_path / "x.jpg", tmp_path / "0.png"))
    data.pairs.append((tmp_path / "0.jpg", tmp_path / "gone.png"))
    lines = report(capsys, data)
    assert [line.split(" (")[0] for line in lines] == [
        "warning: crop_size 32 32 is larger than all images, so that at least 92% of a crop are "
        "padding",
        f"error: train: {tmp_path}/1.png: the file is empty",
        f"error: train: {tmp_path}/2.png: not an image",
        f"error: train: {tmp_path}/gone.png: no such file, or not a regular one",
        "error: train: 3 files not as large as the image, such as 4x2 pixels instead of 4x5: "
        "0.png, 0.png, 0.png",
    ]


def test_many_unreadable_files(tmp_path, capsys):
    data = write(tmp_path, GOOD)
    data.pairs.extend((tmp_path / "0.jpg", tmp_path / f"gone{index}.png") for index in range(23))
    lines = report(capsys, data, replace(RECIPE, crop_size=(1, 1)))
    assert len(lines) == 21 and lines[-1] == "error: train: 3 more files cannot be read"


def test_names_are_relative_to_the_folder_of_all_labels(tmp_path, capsys):
    first, second = (write(tmp_path / name, [[9, 0, 1, 2]]) for name in "ab")
    lines = report(capsys, replace(first, pairs=[*first.pairs, *second.pairs]))
    assert "  9: 2 files, 2 pixels (a/0.png, b/0.png)" in lines


@pytest.mark.parametrize("copied", [True, False])
def test_validation_images_that_are_trained_on(copied, shapes, tmp_path, capsys):
    train_data, val_data = read_shapes(shapes)
    assert report(capsys, train_data, val=val_data) == []
    image, label = train_data.pairs[3]
    if copied:
        shutil.copy(image, tmp_path)
        image = tmp_path / "3.png"
    val_data.pairs.append((image, label))
    (line,) = report(capsys, train_data, val=val_data)
    assert line.startswith("warning: val: images that are also in train (1 of 3), so that")


def test_crops_larger_than_all_images(shapes, capsys):
    data = read_shapes(shapes)[0]  # 72x56 pixels
    fits = replace(RECIPE, scale=(0.5, 1.5))
    for crop in ((84, 108), (84, 400), (400, 108)):
        assert report(capsys, data, replace(fits, crop_size=crop)) == []
    (line,) = report(capsys, data, replace(fits, crop_size=(168, 216)))
    assert "crop_size 168 216 is larger" in line and "at least 75% of a crop" in line
    assert line.endswith("(expected 84 108 or less)")


def test_runs_too_short_for_their_recipe(shapes, capsys):
    data = read_shapes(shapes)[0]  # 2 epochs of 3 updates
    assert report(capsys, data, replace(RECIPE, warmup_steps=6, ema_decay=0.72)) == []
    first, second = report(capsys, data, replace(RECIPE, warmup_steps=7, ema_decay=0.73))
    assert first.startswith("warning: warmup_steps 7 is more than the 6 updates of the run")
    assert "ema_decay 0.73" in second and "still has 21% of the first weights" in second


def test_photos_whose_orientation_is_unclear(tmp_path, capsys):
    data = write(tmp_path, GOOD, GOOD)
    exif = Image.Exif()
    exif[0x0112] = 3  # turned by 180 degrees
    Image.new("RGB", (4, 2)).save(tmp_path / "1.jpg", exif=exif)
    lines = report(capsys, data, replace(RECIPE, crop_size=(1, 1)))
    assert len(lines) == 1 and "1 photo whose labels fit" in lines[0] and "1.png" in lines[0]
    assert report(capsys, replace(data, exif="stored"), replace(RECIPE, crop_size=(1, 1))) == []


@pytest.mark.parametrize(
    "values, text", [([0, 255], "0=0 255=1"), ([1, 2, 3, 7, 9, 10], "1-3=0-2 7=3 9-10=4-5")]
)
def test_label_ids_on_the_command_line(values, text):
    assert label_ids_text(values) == text
    mapping: dict[int, int] = {}
    for part in text.split():
        mapping |= datasets._label_ids(part)
    assert mapping == {value: label for label, value in enumerate(values)}
    assert datasets._label_ids("7-9=255") == {7: 255, 8: 255, 9: 255}


@pytest.mark.parametrize("text", ["1", "a=1", "1=b", "1-3=0-1", "3-1=0", "1:0", "1=0=2"])
def test_malformed_label_ids(text, capsys):
    with pytest.raises(SystemExit):
        main(["train", "x", "--label-ids", "0=0", text])
    assert f"{text!r} (expected VALUE=CLASS, such as 255=1" in capsys.readouterr().err


def test_label_ids_that_contradict_each_other(capsys):
    assert main(["train", "x", "--label-ids", "0=0", "1-3=1", "2=0"]) == 2
    assert "--label-ids 2=1 2=0: expected one class for value 2" in capsys.readouterr().err


@pytest.fixture
def masks(tmp_path) -> Path:
    """A data set of two classes whose masks are 0 and 255."""
    root = write_shapes(tmp_path / "masks")
    for path in root.glob("labels/*/*.png"):
        values = np.asarray(Image.open(path))
        Image.fromarray(np.where(values == 1, 255, 0).astype(np.uint8)).save(path)
    (root / "classes.txt").write_text("background\nobject\n")
    return root


def test_command_rejects_masks_of_0_and_255(masks, tmp_path, capsys):
    """These used to train to a mean IoU of 100 %."""
    output = tmp_path / "run"
    arguments = ["train", str(masks), *TRAIN, "--output", str(output)]
    assert main(arguments) == 2
    lines = capsys.readouterr().err.splitlines()
    assert [line[:50] for line in lines if line.startswith("error: ")] == [
        "error: train: labels are 0 and 255 only, and 255 m",
        "error: val: labels are 0 and 255 only, and 255 mea",
    ]
    assert lines[-1].startswith("deeplab-fast: 2 problems in the labels (")
    assert not output.exists()
    assert main([*arguments, "--label-ids", "0=0", "255=1"]) == 0
    counts = count_labels(folder(masks, "val", label_ids={0: 0, 255: 1}), 0, True)
    best = json.loads((output / "log.jsonl").read_text().splitlines()[-1])
    assert counts.pixels.min() > 0 and best["val_iou/object"] is not None
    assert "object" in capsys.readouterr().out  # the table


def test_command_without_a_check(masks, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(label_counts, "_histogram", None)
    arguments = ["train", str(masks), *TRAIN, "--output", str(tmp_path / "run"), "--no-check"]
    assert main(arguments) == 0
    assert "error" not in capsys.readouterr().err


def test_evaluation_checks_labels(masks, tmp_path, capsys):
    weights = tmp_path / "model.safetensors"
    small_network(num_classes=2).save_pretrained(weights)
    arguments = ["evaluate", str(masks), "--weights", str(weights), "--device", "cpu"]
    arguments += ["--workers", "0"]
    assert main(arguments) == 2
    assert "error: val: labels are 0 and 255 only" in capsys.readouterr().err
    assert main([*arguments, "--no-check"]) == 0
    assert main([*arguments, "--label-ids", "0=0", "255=1"]) == 0


def test_resumed_run_is_not_checked_again(shapes, tmp_path, monkeypatch):
    train_data, val_data = read_shapes(shapes)
    options = {"workers": 0, "log_every": 1}
    calls = []
    original = checks.count_labels
    monkeypatch.setattr(
        checks, "count_labels", lambda data, *rest: (calls.append(data), original(data, *rest))[1]
    )
    once = replace(RECIPE, epochs=1, power=0)
    train(Tiny(), train_data, val_data, once, tmp_path, **options)
    assert calls == [train_data, val_data]
    more = replace(once, epochs=2)
    train(Tiny(), train_data, val_data, more, tmp_path, resume=True, **options)
    assert len(calls) == 2
    # A folder with a run is an error at once, not after the check.
    with pytest.raises(TrainingError, match="there is a run in that folder"):
        train(Tiny(), train_data, val_data, more, tmp_path, **options)
    assert len(calls) == 2


def test_resume_without_a_run_says_so(shapes, tmp_path, capsys):
    arguments = ["train", str(shapes), *TRAIN, "--output", str(tmp_path / "run"), "--resume"]
    assert main(arguments) == 0
    line = f"{tmp_path}/run: no run to resume (no last.pt), so this starts one"
    assert capsys.readouterr().err.splitlines().count(line) == 1
    assert main(arguments) == 0
    assert "no run to resume" not in capsys.readouterr().err


def test_labels_that_are_ignored_everywhere_end_the_run(tmp_path, capsys):
    """Such a run used to report "loss 0.000, mean IoU nan"."""
    data = write(tmp_path / "data", *[np.full((40, 40), 255)] * 4)
    options = {"workers": 0, "check": False}
    with pytest.raises(TrainingError, match="no pixel counted in the last 2 updates"):
        train(Tiny(), data, None, RECIPE, tmp_path / "run", **options)
    assert "loss 0.000" not in capsys.readouterr().out
    assert not (tmp_path / "run/last.pt").exists()
    with pytest.raises(TrainingError, match="no labelled pixel in 4 images"):
        evaluate(small_network(), data, workers=0, quiet=True)
    # The same for labels whose classes all have weight 0.
    data = write(tmp_path / "data", *[np.full((40, 40), 1)] * 4)
    recipe = replace(RECIPE, class_weights=(1.0, 0.0, 1.0), top_k_pixels=0.5)
    with pytest.raises(TrainingError, match="no pixel counted"):
        train(Tiny(), data, None, recipe, tmp_path / "other", **options)


def test_fewer_updates_than_an_epoch_may_have_no_labels():
    """The part of an epoch that is left after a resume may have none."""
    model = small_network()
    step = TrainingStep(TrainingState(model, RECIPE), RECIPE, 9)
    images = torch.zeros(2, 32, 32, 3, dtype=torch.uint8)
    ignored = torch.full((2, 32, 32), 255, dtype=torch.uint8)
    step.update([(images, ignored)])
    step.check_labelled(2)
    step.update([(images, ignored.clamp(max=1))])
    step.check_labelled(2)
    step.update([(images, ignored)])
    step.check_labelled(2)
    step.update([(images, ignored)])
    with pytest.raises(TrainingError, match="no pixel counted in the last 2 updates"):
        step.check_labelled(2)


def test_one_class_is_nothing_to_learn(shapes, tmp_path):
    data = replace(read_shapes(shapes)[0], classes=("road",), label_ids={0: 0, 1: 0, 2: 0})
    with pytest.raises(TrainingError, match="classes: expected two or more, .* road, got 1"):
        train(small_network(num_classes=1), data, None, RECIPE, tmp_path, check=False)


def test_balanced_class_weights():
    pixels = [700, 250, 0, 49, 1]
    weights = balanced_class_weights(pixels)
    shares = np.array(pixels) / 1000
    expected = np.where(shares > 0, 1 / np.log(1.02 + shares), 0)
    np.testing.assert_allclose(weights, expected / (shares * expected).sum(), rtol=6e-4)
    assert (shares * weights).sum() == pytest.approx(1, rel=1e-3)
    extreme = balanced_class_weights(np.array([10**15, 1]))
    assert 1 < extreme[1] / extreme[0] < math.log(2.02) / math.log(1.02) * 1.001
    assert balanced_class_weights([5, 5]) == (1.0, 1.0)
    with pytest.raises(TrainingError, match="class_weights: no pixel is labelled"):
        balanced_class_weights([0, 0])


@pytest.mark.parametrize("value", ["none", ("auto",), (1.0, "auto"), ("auto", 1.0, 2.0)])
def test_recipe_rejects_other_words_for_class_weights(value):
    with pytest.raises(TrainingError, match="class_weights: expected numbers of 0 or more, .*auto"):
        Recipe(class_weights=value)


def test_loss_needs_numbers_for_class_weights():
    with pytest.raises(TrainingError, match="class_weights: expected numbers, got 'auto'"):
        Objective(small_network(), Recipe(class_weights="auto"))


@pytest.mark.parametrize("check", [True, False])
def test_automatic_class_weights_are_those_of_the_labels(check, shapes, tmp_path):
    train_data, val_data = read_shapes(shapes)
    weights = balanced_class_weights(count_labels(train_data, 0, True).pixels)
    assert weights[0] < weights[2] < weights[1]
    runs = []
    for name, value in (("auto", "auto"), ("numbers", weights)):
        recipe = replace(RECIPE, epochs=1, class_weights=value)
        options = {"workers": 0, "check": check}
        train(Tiny(), train_data, val_data, recipe, tmp_path / name, **options)
        config = json.loads((tmp_path / name / "config.json").read_text())
        runs.append((config, torch.load(tmp_path / name / "last.pt", weights_only=True)["loss"]))
    assert runs[0] == runs[1] and runs[0][0]["recipe"]["class_weights"] == list(weights)


def test_run_with_automatic_class_weights_is_resumed(shapes, tmp_path, monkeypatch):
    data = read_shapes(shapes)[0]
    recipe = replace(RECIPE, class_weights="auto")
    options = {"workers": 0, "log_every": 1}
    train(Tiny(), data, None, recipe, tmp_path / "whole", **options)
    with monkeypatch.context() as patch:
        signal_in_update(patch, 2, 2)
        with pytest.raises(Interrupted):
            train(Tiny(), data, None, recipe, tmp_path / "part", **options)
    train(Tiny(), data, None, recipe, tmp_path / "part", resume=True, **options)
    whole, part = ((tmp_path / name / "log.jsonl").read_text() for name in ("whole", "part"))
    losses = [[json.loads(line)["loss"] for line in log.splitlines()] for log in (whole, part)]
    assert len(losses[0]) == 6 and losses[0] == losses[1]
    # Other labels are another run.
    other = replace(data, label_ids={0: 0, 1: 2, 2: 1})
    with pytest.raises(TrainingError, match="saved with class_weights"):
        train(Tiny(), other, None, recipe, tmp_path / "part", resume=True, **options)


def test_automatic_class_weights_on_the_command_line(shapes, tmp_path, monkeypatch, capsys):
    seen = []
    monkeypatch.setattr("deeplab_fast.cli.train.train", lambda *args, **kwargs: seen.append(args))
    arguments = ["train", str(shapes), *TRAIN, "--class-weights"]
    assert main([*arguments, "auto"]) == main([*arguments, "1", "2", "3"]) == 0
    assert [args[3].class_weights for args in seen] == ["auto", (1.0, 2.0, 3.0)]
    with pytest.raises(SystemExit):
        main([*arguments, "balanced"])
    assert "--class-weights: invalid weight value: 'balanced'" in capsys.readouterr().err


def test_prediction_of_one_class_only(shapes, tmp_path, capsys):
    confusion = np.array([[0, 5, 0], [0, 3, 0], [0, 0, 0]])
    assert Scores(confusion, CLASSES).only_prediction == "red"
    assert Scores(confusion.T, CLASSES).only_prediction is None
    assert Scores(np.diag([0, 3, 0]), CLASSES).only_prediction is None  # there is no other class
    assert Scores(np.eye(3, dtype=int), CLASSES).only_prediction is None
    weights, model = tmp_path / "model.safetensors", small_network()
    torch.nn.init.zeros_(model.classifier[-1].weight)
    model.classifier[-1].bias.data = torch.tensor([0.0, 1.0, 0.5])
    model.save_pretrained(weights)
    arguments = ["evaluate", str(shapes), "--weights", str(weights), "--device", "cpu"]
    assert main([*arguments, "--workers", "0"]) == 0
    assert capsys.readouterr().err.splitlines() == ["warning: all pixels are predicted as red"]
    recipe = replace(RECIPE, epochs=1, learning_rate=1e-9)
    train(model, *read_shapes(shapes), recipe, tmp_path / "run", workers=0)
    assert ", all pixels predicted as red\n" in capsys.readouterr().out


def test_counting_shows_its_progress(shapes, monkeypatch, capsys):
    bars = []
    original = label_counts.tqdm
    monkeypatch.setattr(
        label_counts, "tqdm", lambda **options: bars.append(options) or original(**options)
    )
    check_labels({"train": read_shapes(shapes)[0]}, workers=0)
    assert bars == [
        {"desc": "checking labels train", "total": 6, "unit": "file", "leave": False,
         "disable": None}
    ]  # fmt: skip
    assert loop.tqdm is original
