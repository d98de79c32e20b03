"""COCO files: categories, polygons, run lengths, and the folders of annotation tools."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageDraw

from deeplab_fast.training import TrainingError, coco
from deeplab_fast.training.coco_labels import decode_counts, fill_polygon, from_run_lengths

SQUARE = [[1.0, 1, 3, 1, 3, 3, 1, 3]]  # pixels 1 and 2 of rows 1 and 2
SIZE = (6, 4)
COMPRESSED = {
    "5220;": [5, 2, 2, 2, 13],
    "0T3\\9QMle0S1c`1": [0, 100, 300, 5, 1000, 40, 2555],
    "h0": [24],
}


def content(objects: list[tuple[int, Any]], categories: Any = ((7, "cat"), (3, "dog"))) -> Any:
    """A COCO file with one image and objects (category id, segmentation)."""
    return {
        "images": [{"id": 40, "file_name": "a.jpg", "width": SIZE[0], "height": SIZE[1]}],
        "categories": [
            {"id": id, "name": name, "supercategory": "animal"} for id, name in categories
        ],
        "annotations": [
            {"id": i, "image_id": 40, "category_id": id, "segmentation": segmentation, "iscrowd": 0}
            for i, (id, segmentation) in enumerate(objects)
        ],
    }


def write(root: Path, value: Any, file: str = "annotations/instances_val2017.json") -> Path:
    (root / file).parent.mkdir(parents=True, exist_ok=True)
    (root / file).write_text(json.dumps(value))
    return root


def photo(root: Path, name: str = "val2017/a.jpg") -> None:
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", SIZE).save(root / name)


def labels_of(tmp_path: Path, objects: list[tuple[int, Any]], **options: Any) -> np.ndarray:
    photo(tmp_path)
    return coco(write(tmp_path, content(objects, **options)), "val").read(0)[1]


def test_polygons(tmp_path):
    """Categories are classes in the order of their ids, after the background."""
    dog = [[4.0, 0, 6, 0, 6, 1, 4, 1], [4, 3, 5, 3, 5, 4, 4, 4]]  # one object of two polygons
    labels = labels_of(tmp_path, [(7, SQUARE), (3, dog)])
    assert labels.dtype == np.uint8
    assert labels.tolist() == [
        [0, 0, 0, 0, 1, 1],
        [0, 2, 2, 0, 0, 0],
        [0, 2, 2, 0, 0, 0],
        [0, 0, 0, 0, 1, 0],
    ]
    data = coco(tmp_path, "val")
    assert data.classes == ("background", "dog", "cat")
    assert data.image_size(0) == data.label_size(0) == SIZE
    assert str(data.pairs[0][1]) == f"{tmp_path}/annotations/instances_val2017.json: a.jpg"


@pytest.mark.parametrize("counts", [[5, 2, 2, 2, 13], "5220;"])
def test_run_lengths(counts, tmp_path):
    """They go down the columns. Crowds have the class of their category, as all masks of CVAT."""
    value = content([(7, {"size": [4, 6], "counts": counts})])
    value["annotations"][0]["iscrowd"] = 1
    photo(tmp_path)
    labels = coco(write(tmp_path, value), "val").read(0)[1]
    expected = np.zeros((4, 6), int)
    expected[1:3, 1:3] = 2
    assert labels.tolist() == expected.tolist()


def test_small_objects_lie_on_large_ones(tmp_path):
    whole = [[0.0, 0, 6, 0, 6, 4, 0, 4]]
    for objects in ([(3, whole), (7, SQUARE)], [(7, SQUARE), (3, whole)]):
        labels = labels_of(tmp_path, objects)
        assert (labels == 2).sum() == 4 and (labels == 1).sum() == 20


def test_fill_polygon_matches_pillow_on_a_finer_grid():
    """The centre of a pixel is inside if it is inside at 32 times the resolution."""
    random = np.random.default_rng(0)
    for _ in range(30):
        points = random.uniform(-3, 23, (random.integers(3, 9), 2))
        filled = fill_polygon(points, (20, 15))
        fine = Image.new("1", (20 * 32, 15 * 32))
        ImageDraw.Draw(fine).polygon([tuple(point * 32) for point in points], fill=1)
        centres = np.asarray(fine)[16::32, 16::32]
        # Pillow also draws the edge, and rounds the corners.
        edge = Image.new("1", fine.size)
        closed = [tuple(point * 32) for point in (*points, points[0])]
        ImageDraw.Draw(edge).line(closed, fill=1, width=6)
        sure = ~np.asarray(edge)[16::32, 16::32]
        assert sure.mean() > 0.5 and np.array_equal(filled[sure], centres[sure])


def test_polygon_outside_of_the_image():
    whole = np.array([[-5.0, -5], [50, -5], [50, 50], [-5, 50]])
    assert fill_polygon(whole, SIZE).all()
    assert not fill_polygon(whole + 100, SIZE).any()
    assert not fill_polygon(whole[:2], SIZE).any()


def test_compressed_run_lengths():
    """Strings that pycocotools made of these run lengths."""
    for text, counts in COMPRESSED.items():
        assert decode_counts(text) == counts
    assert from_run_lengths([0, 1, 3], (2, 2)).tolist() == [[True, False], [False, False]]


def test_roboflow(tmp_path):
    """The root category, which no object has, is no class. The split "val" is in "valid"."""
    value = content([(1, SQUARE)], [(1, "cat"), (2, "dog")])
    value["categories"].insert(0, {"id": 0, "name": "animal", "supercategory": "none"})
    write(tmp_path, value, "valid/_annotations.coco.json")
    photo(tmp_path, "valid/a.jpg")
    data = coco(tmp_path, "val")
    assert data.classes == ("background", "cat", "dog") and data.read(0)[1].max() == 1
    value["annotations"][0]["category_id"] = 0  # a class after all
    write(tmp_path, value, "valid/_annotations.coco.json")
    assert coco(tmp_path, "val").classes == ("background", "animal", "cat", "dog")


@pytest.mark.parametrize(
    "file, name, image",
    [
        ("annotations/instances_default.json", "a.jpg", "images/default/a.jpg"),  # CVAT
        ("annotations/instances_default.json", "a.jpg", "images/a.jpg"),
        ("default/result.json", "images\\a.jpg", "default/images/a.jpg"),  # Label Studio
        ("annotations/instances_default2017.json", "a.jpg", "images/default2017/a.jpg"),
        ("default/_annotations.coco.json", "a.jpg", "default/a.jpg"),
    ],
)
def test_folders_of_annotation_tools(file, name, image, tmp_path):
    value = content([(7, SQUARE)])
    value["images"][0]["file_name"] = name
    write(tmp_path, value, file)
    photo(tmp_path, image)
    data = coco(tmp_path, "default")
    assert [path for path, _ in data.pairs] == [tmp_path / image]
    assert data.read(0)[1].max() == 2


def test_background_and_categories_of_one_name(tmp_path):
    categories = [(1, "Background"), (2, "cat"), (5, "cat")]
    labels = labels_of(
        tmp_path, [(1, SQUARE), (5, [[0.0, 0, 1, 0, 1, 1, 0, 1]])], categories=categories
    )
    assert coco(tmp_path, "val").classes == ("background", "cat")
    assert labels[0, 0] == 1 and labels.sum() == 1


def test_image_without_objects_is_background(tmp_path):
    assert not labels_of(tmp_path, []).any()


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda value: value.pop("categories"), r"KeyError\('categories'\) \(expected COCO's"),
        (lambda value: value.update(images=[]), "no images"),
        (lambda value: value["images"][0].update(width=None), "a.jpg: width None .*to 65535"),
        (lambda value: value["images"][0].update(height="4"), "a.jpg: height '4' "),
        (lambda value: value["images"][0].update(height=10**6), "a.jpg: height 1000000 "),
        (lambda value: value["images"][0].update(height=math.nan), "a.jpg: height nan "),
        (
            lambda value: value["annotations"][0].update(segmentation=[]),
            r"1 of 2 annotations have no segmentation \(expected polygons or run lengths; boxes",
        ),
        (
            lambda value: value["annotations"][0].update(category_id=9),
            r"category 9 \(expected",
        ),
        (lambda value: value["images"][0].update(file_name="b.jpg"), "b.jpg is in none of the"),
        (
            lambda value: value["images"].append({**value["images"][0], "id": 1, "file_name": "c"}),
            r"val2017/c: no such file \(expected all images",
        ),
    ],
)
def test_malformed_files(change, message, tmp_path):
    photo(tmp_path)
    value = content([(7, SQUARE), (3, SQUARE)])
    change(value)
    with pytest.raises(TrainingError, match=message):
        coco(write(tmp_path, value), "val")


@pytest.mark.parametrize(
    "segmentation",
    [
        [[1.0, 2, 3]],
        [["x", "y"]],
        [[]],
        [[float("nan"), 1, 3, 1, 3, 3]],
        [[-1e308, 1, 1e308, 1, 3, 3]],
        {"size": [6, 4], "counts": [24]},
        {"size": [4, 6], "counts": [25]},
        {"size": [4, 6], "counts": [30, -6]},
        {"counts": [24]},
    ],
    ids=str,
)
def test_malformed_segmentation(segmentation, tmp_path):
    with pytest.raises(TrainingError, match=r"val2017.json: a.jpg: a malformed segmentation \(exp"):
        labels_of(tmp_path, [(7, segmentation)])


def test_missing_files(tmp_path):
    with pytest.raises(TrainingError, match=r"no COCO file .*'val' \(expected annotations/inst"):
        coco(tmp_path, "val")
    write(tmp_path, [1])
    with pytest.raises(TrainingError, match="instances_val2017.json: TypeError"):
        coco(tmp_path, "val")
    for text in ("{", "[" * 100_000):
        (tmp_path / "annotations/instances_val2017.json").write_text(text)
        with pytest.raises(TrainingError, match=r"instances_val2017.json: .* \(expected JSON\)"):
            coco(tmp_path, "val")


def test_size_that_is_not_the_images(tmp_path):
    value = content([(7, SQUARE)])
    value["images"][0]["width"] = 5
    photo(tmp_path)
    data = coco(write(tmp_path, value), "val")
    with pytest.raises(TrainingError, match=r"json: a.jpg: 5x4 pixels \(expected 6x4, the size of"):
        data.read(0)
