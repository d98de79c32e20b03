"""Folder layouts: patterns of names, text files, ADE20K and COCO-Stuff; their options."""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from deeplab_fast.cli.datasets import add_arguments, open_split
from deeplab_fast.cli.errors import UserError
from deeplab_fast.training import IGNORE, TrainingError, ade20k, coco_stuff, folder


def write(root: Path, *names: str, values: tuple[int, ...] = (0, 1)) -> None:
    """Write images of one row."""
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        image = Image.fromarray(np.array([values], np.uint8))
        image.convert("RGB" if name.endswith(".jpg") else "L").save(root / name)


def names_of(root: Path, **patterns: str) -> list[tuple[str, ...]]:
    """The pairs of the split "train" as paths below ``root``."""
    pairs = folder(root, "train", ["a", "b"], **patterns).pairs
    return [tuple(str(path.relative_to(root)) for path in pair) for pair in pairs]


@pytest.mark.parametrize(
    "images, labels, pairs",
    [
        (
            "images/{split}/{name}.jpg",
            "labels/{split}/{name}_mask.png",
            [
                ("images/train/a.jpg", "labels/train/a_mask.png"),
                ("images/train/sub/b.jpg", "labels/train/sub/b_mask.png"),
            ],
        ),
        (  # Kaggle's CamVid
            "{split}/{name}.png",
            "{split}_labels/{name}_L.png",
            [("train/a.png", "train_labels/a_L.png"), ("train/b.png", "train_labels/b_L.png")],
        ),
        (  # Cityscapes
            "leftImg8bit/{split}/{name}_leftImg8bit.png",
            "gtFine/{split}/{name}_gtFine_labelIds.png",
            [
                (
                    "leftImg8bit/train/ulm/ulm_1_leftImg8bit.png",
                    "gtFine/train/ulm/ulm_1_gtFine_labelIds.png",
                )
            ],
        ),
        (  # one folder
            "{split}/{name}",
            "{split}/{name}_mask.png",
            [("train/a.jpg", "train/a_mask.png"), ("train/b.png", "train/b_mask.png")],
        ),
        (  # the same extension and folder, labels in a subfolder
            "{split}/{name}.png",
            "{split}/masks/{name}.png",
            [("train/a.png", "train/masks/a.png"), ("train/sub/b.png", "train/masks/sub/b.png")],
        ),
        (  # one folder per image
            "{split}/{name}/image.jpg",
            "{split}/{name}/mask.tif",
            [("train/a/image.jpg", "train/a/mask.tif")],
        ),
        ("{name}/{name}.jpg", "{name}/m{name}.bmp", [("a/a.jpg", "a/ma.bmp")]),
    ],
)
def test_patterns(images, labels, pairs, tmp_path):
    write(tmp_path, *(name for pair in pairs for name in pair), "a/b.jpg")
    assert names_of(tmp_path, images=images, labels=labels) == pairs
    assert folder(tmp_path, "train", ["a", "b"], images=images, labels=labels).read(0)


def test_patterns_match_extensions_in_any_case(tmp_path):
    write(tmp_path, "images/train/a.jpg", "labels/train/a.png")
    (tmp_path / "images/train/a.jpg").rename(tmp_path / "images/train/a.JPG")
    expected = [("images/train/a.JPG", "labels/train/a.png")]
    assert names_of(tmp_path) == names_of(tmp_path, images="images/{split}/{name}.jpg") == expected


@pytest.mark.parametrize(
    "patterns, message",
    [
        ({"images": "images/{split}"}, r"images: expected a pattern such as 'masks/\{split\}/"),
        ({"labels": "{split}/{stem}.png"}, r"labels: expected a pattern .*, got '\{split\}/\{st"),
        ({"labels": "labels/{name}"}, "labels: expected a file extension, got"),
        ({"images": "{name}.png", "labels": "{name}.png"}, "labels: expected another pattern"),
        ({"images": "photos/{name}.jpg"}, r"photos: no such folder \(expected images; `images`"),
        ({"images": "images/{name}.bmp"}, r"images: no images like images/\{name\}.bmp \("),
    ],
)
def test_wrong_patterns(patterns, message, tmp_path):
    write(tmp_path, "images/train/a.jpg", "labels/train/a.png")
    with pytest.raises(TrainingError, match=message):
        names_of(tmp_path, **patterns)


@pytest.mark.parametrize(
    "files, proposal",
    [
        (["labels/train/a_mask.png", "labels/train/a1.png"], "labels/{split}/{name}_mask.png"),
        (["labels/train/a_gtFine_labelIds.png"], "labels/{split}/{name}_gtFine_labelIds.png"),
        (["labels/train/a.tif"], "labels/{split}/{name}.tif"),
        (["images/train/a_L.png"], "images/{split}/{name}_L.png"),
        (["images/train/a.png"], "images/{split}/{name}.png"),
    ],
)
def test_missing_labels_propose_a_pattern(files, proposal, tmp_path):
    """Labels of another name are not taken silently: the error names the pattern that has them."""
    write(tmp_path, "images/train/a.jpg", *files)
    with pytest.raises(TrainingError) as caught:
        names_of(tmp_path, images="images/{split}/{name}.jpg")
    message = f"{tmp_path}/labels/train/a.png: no such file (expected `labels` as {proposal!r})"
    assert str(caught.value) == message
    pattern = str(caught.value).split("'")[1]
    pairs = names_of(tmp_path, images="images/{split}/{name}.jpg", labels=pattern)
    assert pairs == [("images/train/a.jpg", files[0])]


def test_an_image_is_not_proposed_as_its_labels(tmp_path):
    write(tmp_path, "images/train/a.png")
    with pytest.raises(TrainingError, match=r"a.png: .* \(expected labels for each image\)$"):
        names_of(tmp_path)


def test_images_that_cannot_be_read_are_not_left_out(tmp_path):
    write(tmp_path, "images/train/a.jpg", "labels/train/a.png", "labels/train/b.png")
    (tmp_path / "images/train/b.HEIC").write_bytes(b"")
    with pytest.raises(
        TrainingError, match=r"b.HEIC: not readable, as 1 of 2 images \(expected JP"
    ):
        names_of(tmp_path)
    patterns = {"images": "images/{split}/{name}.jpg"}
    assert len(names_of(tmp_path, **patterns)) == 1


def test_missing_labels_are_counted(tmp_path):
    write(tmp_path, *(f"images/train/{name}.jpg" for name in "abcdefgh"), "labels/train/a.png")
    message = (
        r"train/b.png: no such file \(expected labels for each image\); 7 of 8 images have no "
        r"labels: b.jpg, c.jpg, d.jpg, e.jpg, f.jpg, ...$"
    )
    with pytest.raises(TrainingError, match=message):
        names_of(tmp_path)


def test_symbolic_links_are_followed(tmp_path):
    """A link to a folder above, and two folders with links to each other, do not loop."""
    write(tmp_path, "elsewhere/a.jpg", "images/train/b.jpg", "more/c.jpg")
    write(tmp_path, *(f"labels/train/{name}.png" for name in ("b", "day/a", "day/more/c")))
    (tmp_path / "images/train/day").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere/more").symlink_to(tmp_path / "more")
    (tmp_path / "more/back").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "images/train/loop").symlink_to(tmp_path / "images")
    write(tmp_path, "images/val/d.jpg", "labels/train/loop/val/d.png")  # of another split
    (tmp_path / "images/train/itself").symlink_to("itself")
    write(tmp_path, "images/train/.hidden/x.jpg")
    assert [image for image, _ in names_of(tmp_path)] == [
        "images/train/b.jpg", "images/train/day/a.jpg", "images/train/day/more/c.jpg",
    ]  # fmt: skip


@pytest.mark.parametrize(
    "content",
    ["road\nsky\n", "\ufeffroad\r\nsky\r\n", "road\r\n\r\n  sky"],
    ids=["plain", "Windows", "no last line end"],
)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-16"])
def test_text_of_other_systems(content, encoding, tmp_path):
    write(tmp_path, "images/train/a.jpg", "labels/train/a.png")
    text = content.lstrip("\ufeff") if encoding == "utf-16" else content
    (tmp_path / "classes.txt").write_bytes(text.encode(encoding))
    assert folder(tmp_path, "train").classes == ("road", "sky")


@pytest.mark.parametrize(
    "content", [b"stra\xdfe\nsky\n", "road\nsky\n".encode("utf-16-le")], ids=["Latin-1", "no BOM"]
)
def test_text_in_an_unknown_encoding(content, tmp_path):
    write(tmp_path, "images/train/a.jpg", "labels/train/a.png")
    (tmp_path / "classes.txt").write_bytes(content)
    with pytest.raises(TrainingError, match=r"classes.txt: no.* UTF-8.* \(expected a text file, "):
        folder(tmp_path, "train")


def test_ade20k(tmp_path):
    """Value 0 is ignored, and value n is class n - 1."""
    write(tmp_path, "images/training/a.jpg", "images/validation/b.jpg", values=(0, 0, 0))
    write(tmp_path, "annotations/training/a.png", values=(0, 1, 3))
    write(tmp_path, "annotations/validation/b.png", values=(2, 2, 2))
    (tmp_path / "objectInfo150.txt").write_text(
        "Idx\tRatio\tTrain\tVal\tName\n1\t0.1\t1\t1\twall\n2\t0.1\t1\t1\tbuilding, edifice\n"
        "3 \t0.1\t1\t1\tbed \n"
    )
    data = ade20k(tmp_path, "train")
    assert data.classes == ("wall", "building", "bed")
    assert data.read(0)[1].tolist() == [[IGNORE, 0, 2]]
    assert ade20k(tmp_path, "training") == data
    assert ade20k(tmp_path, "val").read(0)[1].tolist() == [[1, 1, 1]]
    write(tmp_path, "annotations/training/a.png", values=(0, 1, 4))
    with pytest.raises(TrainingError, match="label 4 is no class"):
        data.read(0)
    (tmp_path / "objectInfo150.txt").unlink()
    with pytest.raises(TrainingError, match=r"objectInfo150.txt: .*\(expected the classes of ADE"):
        ade20k(tmp_path, "val")


@pytest.mark.parametrize("images", ["train2017", "images/train2017"])
@pytest.mark.parametrize("labels", ["stuffthingmaps/train2017", "annotations/train2017"])
def test_coco_stuff(images, labels, tmp_path):
    """Value n is the class with id n + 1. 11 of the 182 ids are not used."""
    write(tmp_path, f"{images}/1.jpg", values=(0, 0, 0, 0, 0))
    write(tmp_path, f"{labels}/1.png", values=(0, 12, 91, 181, 255))
    write(tmp_path, f"{labels}/1_labelTrainIds.png")
    data = coco_stuff(tmp_path, "train")
    assert "door-stuff" in data.classes and "fire hydrant" in data.classes
    assert not any("- " in name for name in data.classes)  # names that a line ends within
    assert len(data) == 1 and len(data.classes) == 171
    seen = data.read(0)[1][0].tolist()
    # Ids 1, 13, 92 and 182; "street sign", 12, and ten more below 92 are not used.
    assert seen == [0, 11, 80, 170, IGNORE]
    names = [data.classes[label] for label in seen[:4]]
    assert names == ["person", "stop sign", "banner", "wood"]
    assert data.classes_of(np.array([11, 25, 65], np.uint8)).tolist() == [-1, -1, -1]
    with pytest.raises(TrainingError, match="val2017 .*expected"):
        coco_stuff(tmp_path, "val")


def arguments(*argv: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return parser.parse_args(argv)


def test_options(tmp_path):
    write(tmp_path, "train/a.jpg", values=(0, 1, 2))
    write(tmp_path, "train/a_m.png", values=(0, 1, 2))
    patterns = ["--images", "{split}/{name}.jpg", "--labels", "{split}/{name}_m.png"]
    argv = [str(tmp_path), *patterns, "--classes", "a,b", "--ignore", "2", "--exif", "stored"]
    data = open_split(arguments(*argv), "train")
    assert data.classes == ("a", "b") and data.exif == "stored"
    assert data.read(0)[1].tolist() == [[0, 1, IGNORE]]
    (tmp_path / "colors.txt").write_text("x,0,0,0\ny,1,1,1\nz,2,2,2\n")
    argv = [str(tmp_path), *patterns, "--colors", str(tmp_path / "colors.txt"), "--ignore", "y"]
    data = open_split(arguments(*argv), "train")
    assert data.classes == ("x", "z") and data.read(0)[1].tolist() == [[0, IGNORE, 1]]


@pytest.mark.parametrize(
    "option", [["--classes", "a"], ["--ignore", "1"], ["--images", "{name}"], ["--colors", "x"]]
)
@pytest.mark.parametrize("layout", ["cityscapes", "coco", "coco-stuff", "ade20k"])
def test_options_that_a_layout_does_not_take(option, layout, tmp_path):
    given = arguments(str(tmp_path), "--layout", layout, *option)
    with pytest.raises(UserError, match=rf"{option[0]}: not for the layout {layout} \(expected no"):
        open_split(given, "train")
