"""Label images of all kinds: colours, palettes, 1 and 16 bits, alpha channels."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from deeplab_fast.training import IGNORE, SegmentationData, TrainingError, folder, read_colors, voc

SKY, ROAD, VOID = (128, 128, 128), (128, 64, 128), (0, 0, 0)


def data_of(tmp_path: Path, label: Image.Image, **arguments) -> SegmentationData:
    """A data set of one image, with the classes a, b and c, and ``label`` as PNG."""
    Image.new("RGB", label.size).save(tmp_path / "image.png")
    label.save(tmp_path / "label.png")
    classes = arguments.pop("classes", ("a", "b", "c"))
    return SegmentationData(
        [(tmp_path / "image.png", tmp_path / "label.png")], classes, **arguments
    )


def image_in_colors(colors: list[tuple[int, ...]]) -> Image.Image:
    return Image.fromarray(np.array([colors], np.uint8))


def read_row(data: SegmentationData) -> list[int]:
    return data.read(0)[1][0].tolist()


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P"])
def test_colors_mean_classes(mode, tmp_path):
    label = image_in_colors([SKY, ROAD, VOID, SKY])
    label = label.quantize(3) if mode == "P" else label.convert(mode)
    data = data_of(tmp_path, label, classes=("sky", "road"), label_ids={SKY: 0, ROAD: 1, VOID: 255})
    assert read_row(data) == [0, 1, IGNORE, 0]
    values = data.label_values(0)
    assert [data.value_name(value) for value in values[0, :2]] == [str(SKY), str(ROAD)]
    assert data.classes_of(values).tolist() == [[0, 1, IGNORE, 0]]


def test_blue_is_not_ignored(tmp_path):
    """(0, 0, 255), packed into a number, is 255, which is ignored only among numbers."""
    label = image_in_colors([(0, 0, 255), (0, 0, 0)])
    data = data_of(tmp_path, label, classes=("a", "b"), label_ids={(0, 0, 255): 1, VOID: 0})
    assert read_row(data) == [1, 0]
    with pytest.raises(TrainingError, match=r"label \(0, 0, 255\) is no class"):
        replace(data, label_ids={VOID: 0}).read(0)


def test_color_without_a_class(tmp_path):
    label = image_in_colors([SKY, ROAD, (1, 2, 3), (255, 255, 255)])
    data = data_of(tmp_path, label, classes=("sky", "road"), label_ids={SKY: 0, ROAD: 1})
    assert data.classes_of(data.label_values(0)).tolist() == [[0, 1, -1, -1]]
    message = (
        r"label.png: label \(1, 2, 3\), \(255, 255, 255\) is no class \(expected \(128, 64, 128\), "
        r"\(128, 128, 128\), the colours of `colors`\)"
    )
    with pytest.raises(TrainingError, match=message):
        data.read(0)


def test_label_image_in_colors_without_a_table(tmp_path):
    """The error lists the most frequent colours, and names the way out."""
    colors = [SKY] * 6 + [ROAD] * 3 + [VOID]
    message = (
        r"label.png: an image in colours, \(128, 128, 128\) 60.0 %, \(128, 64, 128\) 30.0 %, "
        r"\(0, 0, 0\) 10.0 % \(expected class numbers .* `colors`: a file with the lines"
    )
    with pytest.raises(TrainingError, match=message):
        data_of(tmp_path, image_in_colors(colors)).read(0)
    many = image_in_colors([(i, 0, 0) for i in range(20)])
    with pytest.raises(TrainingError, match=r"\(7, 0, 0\) 5.0 % and 12 more \(expected"):
        data_of(tmp_path, many).read(0)


def numbers(dtype: type) -> np.ndarray:
    return np.array([[0, 2, 1, 255]], dtype)


@pytest.mark.parametrize(
    "label",
    [
        Image.fromarray(numbers(np.uint8)),
        Image.fromarray(numbers(np.uint16)),
        Image.fromarray(np.stack([numbers(np.uint8)] * 3, -1)),
        Image.merge("RGBA", [*[Image.fromarray(numbers(np.uint8))] * 3, Image.new("L", (4, 1), 9)]),
        Image.merge("LA", [Image.fromarray(numbers(np.uint8)), Image.new("L", (4, 1), 0)]),
    ],
    ids=lambda image: image.mode,
)
def test_class_numbers(label, tmp_path):
    """An alpha channel does not change them, not even where it is transparent."""
    data = data_of(tmp_path, label)
    assert Image.open(tmp_path / "label.png").mode == label.mode
    assert read_row(data) == [0, 2, 1, IGNORE]
    assert data.value_name(data.label_values(0)[0, 1]) == "2"
    assert read_row(replace(data, label_ids={0: 0, 1: 1, 2: IGNORE, 255: 2})) == [0, IGNORE, 1, 2]


def test_class_numbers_of_32_bits(tmp_path):
    data = data_of(tmp_path, Image.fromarray(numbers(np.uint8)))
    Image.fromarray(numbers(np.int32)).save(tmp_path / "label.tif")
    data = replace(data, pairs=[(tmp_path / "image.png", tmp_path / "label.tif")])
    assert Image.open(tmp_path / "label.tif").mode == "I"
    assert read_row(data) == [0, 2, 1, IGNORE]
    Image.fromarray(np.array([[-1, 0, 1, 2]], np.int32)).save(tmp_path / "label.tif")
    assert data.classes_of(data.label_values(0)).tolist() == [[-1, 0, 1, 2]]
    with pytest.raises(TrainingError, match="label -1 is no class"):
        data.read(0)


def test_numbers_of_16_bits_are_not_cut_to_8(tmp_path):
    """256 and 7000 are no 0 and 88; `label_ids` takes them."""
    label = Image.fromarray(np.array([[0, 256, 7000, 65535]], np.uint16))
    data = data_of(tmp_path, label)
    with pytest.raises(TrainingError, match="label 256, 7000, 65535 is no class"):
        data.read(0)
    data = replace(data, label_ids={0: 0, 256: 1, 7000: 2, 65535: IGNORE})
    assert read_row(data) == [0, 1, 2, IGNORE]


def test_one_bit(tmp_path):
    label = Image.fromarray(np.array([[False, True, True, False]]))
    data = data_of(tmp_path, label)
    assert Image.open(tmp_path / "label.png").mode == "1"
    assert read_row(data) == [0, 1, 1, 0] and data.label_values(0).dtype == np.uint8


def test_palette_is_numbers_unless_colors_are_given(tmp_path):
    label = Image.fromarray(np.array([[0, 1, 2, 1]], np.uint8))
    label.putpalette([*SKY, *ROAD, *VOID])
    data = data_of(tmp_path, label)
    assert read_row(data) == [0, 1, 2, 1]
    assert read_row(replace(data, label_ids={SKY: 2, ROAD: 0, VOID: 1})) == [2, 0, 1, 0]


@pytest.mark.parametrize("by_color", [False, True])
def test_labels_in_a_jpeg_file(by_color, tmp_path):
    """The name does not matter: lossy compression does."""
    data = data_of(tmp_path, Image.fromarray(numbers(np.uint8)))
    Image.fromarray(numbers(np.uint8)).save(tmp_path / "label.png", format="JPEG")
    if by_color:
        data = replace(data, label_ids={SKY: 0})
    with pytest.raises(TrainingError, match=r"label.png: labels in a JPEG file.*\(expected PNG"):
        data.read(0)


def test_images_without_class_numbers(tmp_path):
    data = data_of(tmp_path, Image.fromarray(numbers(np.uint8)))
    Image.fromarray(numbers(np.float32)).save(tmp_path / "label.tif")
    data = replace(data, pairs=[(tmp_path / "image.png", tmp_path / "label.tif")])
    with pytest.raises(TrainingError, match=r"of mode F \(expected class numbers in a grey,"):
        data.read(0)
    Image.fromarray(numbers(np.uint16)).save(tmp_path / "label.tif")
    with pytest.raises(TrainingError, match="I;16 has no colours"):
        replace(data, label_ids={SKY: 0}).read(0)


@pytest.mark.parametrize(
    "text",
    [
        "name,r,g,b\nAnimal,64,128,64\nCar Luggage Pram,64,0,192\n",  # Kaggle's CamVid
        '\ufeffname, r, g, b\r\n"Animal", 64, 128, 64\r\n\r\nCar Luggage Pram, 64, 0, 192\r\n',
        "Animal,64,128,64,1\nCar Luggage Pram,64,0,192,0",  # another column
        "64 128 64\tAnimal\n64 0 192\t\tCar Luggage Pram\n",  # CamVid
        # CVAT
        "# label:color_rgb:parts:actions\nAnimal:64,128,64::\nCar Luggage Pram:64,0,192::\n",
        "Animal;64;128;64\nCar Luggage Pram;64;0;192\n",
    ],
)
def test_read_colors(text, tmp_path):
    (tmp_path / "colors.csv").write_bytes(text.encode())
    expected = {(64, 128, 64): "Animal", (64, 0, 192): "Car Luggage Pram"}
    assert read_colors(tmp_path / "colors.csv") == expected
    assert list(read_colors(tmp_path / "colors.csv")) == list(expected)
    (tmp_path / "colors.csv").write_bytes(text.lstrip("\ufeff").encode("utf-16"))
    assert read_colors(tmp_path / "colors.csv") == expected


def test_read_colors_of_names_with_numbers(tmp_path):
    (tmp_path / "colors.csv").write_text("lane 2,10,20,30\n3,40,50,60\n70,80,90,4 lanes\n")
    expected = {(10, 20, 30): "lane 2", (40, 50, 60): "3", (70, 80, 90): "4 lanes"}
    assert read_colors(tmp_path / "colors.csv") == expected


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "colors.csv: no colours"),
        ("name,r,g,b\n", "colors.csv: no colours"),
        ("a,1,2\n", r"colors.csv: 'a,1,2' \(expected name,red,green,blue\)"),
        ("a,1,2,3\nb\n", r"colors.csv: 'b' \(expected"),
        ("a,1,2,256\n", r"colors.csv: 'a,1,2,256' \(expected colours of 0 to 255"),
        ("a,1,2,3\nb,1,2,3\n", "colors.csv: 'b,1,2,3' .* each with one class"),
    ],
)
def test_malformed_tables_of_colors(text, message, tmp_path):
    (tmp_path / "colors.csv").write_text(text)
    with pytest.raises(TrainingError, match=message):
        read_colors(tmp_path / "colors.csv")


def test_class_dict_of_a_folder(tmp_path):
    """Colours with one name are one class; a name in `ignore` is none."""
    for kind in ("images", "labels"):
        (tmp_path / kind / "train").mkdir(parents=True)
        image_in_colors([VOID, SKY, ROAD, (1, 1, 1)]).save(tmp_path / kind / "train/a.png")
    (tmp_path / "class_dict.csv").write_text(
        "name,r,g,b\nVoid,0,0,0\nroad,128,64,128\nsky,128,128,128\nroad,1,1,1\n"
    )
    data = folder(tmp_path, "train", ignore=["Void"])
    assert data.classes == ("road", "sky") and read_row(data) == [255, 1, 0, 0]
    data = folder(tmp_path, "train", colors={VOID: "a", SKY: "b", ROAD: "c", (1, 1, 1): "d"})
    assert data.classes == ("a", "b", "c", "d") and read_row(data) == [0, 1, 2, 3]
    with pytest.raises(TrainingError, match=r"ignore: .* \(Void, road, sky\), got 'void'"):
        folder(tmp_path, "train", ignore=["void"])
    with pytest.raises(TrainingError, match="classes: expected none, because `colors` has the"):
        folder(tmp_path, "train", ["a"], colors=tmp_path / "class_dict.csv")
    with pytest.raises(TrainingError, match="label_ids: expected none, because"):
        folder(tmp_path, "train", label_ids={0: 0})
    with pytest.raises(TrainingError, match="ignore: expected numbers .*, got 'Void'"):
        folder(tmp_path, "train", ["a"], ignore=["Void"])
    (tmp_path / "classes.txt").write_text("x\ny\n")  # then the labels are numbers
    assert not folder(tmp_path, "train").by_color


@pytest.mark.parametrize("extension", ["jpg", "png", "PNG"])
def test_voc_with_other_colors(extension, tmp_path):
    """CVAT's export "Segmentation mask" has the folders of VOC, and other classes and images."""
    for name in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"):
        (tmp_path / name).mkdir(parents=True)
    image_in_colors([VOID, SKY]).save(tmp_path / "SegmentationClass/a.b.png")
    Image.new("RGB", (2, 1)).save(tmp_path / f"JPEGImages/a.b.{extension}", format="PNG")
    (tmp_path / "ImageSets/Segmentation/default.txt").write_text("a.b\n")
    (tmp_path / "labelmap.txt").write_text(
        "# label:color_rgb:parts:actions\nbackground:0,0,0::\nsky:128,128,128::\n"
    )
    data = voc(tmp_path, "default", colors=tmp_path / "labelmap.txt")
    assert data.classes == ("background", "sky") and read_row(data) == [0, 1]
