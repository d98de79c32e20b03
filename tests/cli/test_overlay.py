"""Overlays, cut-outs, legends and palettes."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from deeplab_fast._io.legend import class_shares, with_legend
from deeplab_fast._io.overlay import background_classes, cutout, overlay, painting_of
from deeplab_fast._io.palette import label_image, palette_of, voc_palette
from deeplab_fast._io.palette_file import PaletteError, read_palette

VOC = ("background", *(f"class {i}" for i in range(1, 21)))
GREY = Image.new("RGB", (7, 2), (100, 100, 100))
LABELS = np.array([[0, 0, 1, 1, 15, 15, 15]] * 2, dtype=np.uint8)
PLAIN, WHITE, RED, PINK = [100] * 3, [255] * 3, [117, 40, 40], [155, 117, 117]


def rows_of(painting, labels=LABELS, photo=GREY) -> np.ndarray:
    return np.asarray(overlay(photo, labels, painting)).astype(int)


def test_overlay():
    expected = [PLAIN, PLAIN, WHITE, RED, WHITE, PINK, PINK]
    painting = painting_of(VOC, 21)
    assert np.abs(rows_of(painting) - [expected] * 2).max() <= 1
    turned = rows_of(painting, LABELS.T, GREY.transpose(Image.Transpose.TRANSPOSE))
    assert np.abs(turned - [[colour] * 2 for colour in expected]).max() <= 1


def test_a_real_class_0_is_painted():
    light_blue = [(0.4 * 100 + 0.6 * x) for x in (32, 240, 240)]
    expected = [light_blue, light_blue, WHITE, RED, WHITE, PINK, PINK]
    painting = painting_of(("road", *VOC[1:]), 21)
    assert np.abs(rows_of(painting) - [expected] * 2).max() <= 1


@pytest.mark.parametrize(
    "categories, num_classes, background",
    [
        (("background", "cat"), 2, {0}),
        (("__background__", "cat"), 2, {0}),
        (("BG", "cat"), 2, {0}),
        (("wall", "building", "sky"), 3, set()),  # ADE20K
        (("road", "sidewalk"), 2, set()),  # Cityscapes
        (("Sky", "Road", "Unlabelled"), 3, {2}),  # CamVid
        (("road", "other"), 2, set()),
        (None, 2, {0}),
        (None, 21, {0}),
        (None, 19, set()),
        (None, 150, set()),
    ],
)
def test_background(categories, num_classes, background):
    assert background_classes(categories, num_classes) == background


def test_alpha():
    assert np.abs(rows_of(painting_of(VOC, 21, alpha=1))[0, 3] - [128, 0, 0]).max() == 0
    assert np.abs(rows_of(painting_of(VOC, 21, alpha=0))[0, 3] - PLAIN).max() == 0
    assert rows_of(painting_of(VOC, 21, alpha=0))[0, 2].tolist() == WHITE  # the outline stays


def test_only_some_classes():
    painting = painting_of(VOC, 21, only=[15])
    expected = [[PLAIN, PLAIN, PLAIN, PLAIN, WHITE, PINK, PINK]] * 2
    turned = GREY.transpose(Image.Transpose.TRANSPOSE)
    for labels in (LABELS, painting.keep_only(LABELS)):
        assert np.abs(rows_of(painting, labels) - expected).max() <= 1
        columns = rows_of(painting, labels.T, turned).transpose(1, 0, 2)
        assert np.abs(columns - expected).max() <= 1
    background = painting_of(VOC, 21, only=[0])
    colours = rows_of(background)[0]
    assert np.abs(colours[:2] - 40).max() <= 1  # black, because it is asked for
    assert (colours[3:] == PLAIN).all()


@pytest.mark.parametrize(
    "categories, num_classes, only, other, dtype",
    [
        (VOC, 21, [15], 0, np.uint8),
        (VOC, 21, [0, 15], 255, np.uint8),
        (("road", "car"), 2, [1], 255, np.uint8),
        (None, 255, [1], 255, np.uint8),
        (None, 256, [1], 65535, np.int32),
        (None, 300, [1], 65535, np.int32),
    ],
)
def test_labels_of_other_classes(categories, num_classes, only, other, dtype):
    labels = np.arange(num_classes, dtype=np.uint8 if num_classes <= 256 else np.int32)[None]
    kept = painting_of(categories, num_classes, only=only).keep_only(labels)
    assert kept.dtype == dtype
    assert kept[0].tolist() == [x if x in only else other for x in range(num_classes)]
    stored = np.asarray(label_image(kept, voc_palette()))
    assert np.array_equal(stored, kept)


def test_all_labels_are_kept_by_default():
    assert painting_of(VOC, 21).keep_only(LABELS) is LABELS


def test_cutout():
    photo = Image.fromarray(np.arange(42, dtype=np.uint8).reshape(2, 7, 3))
    for painting, opaque in (
        (painting_of(VOC, 21), LABELS != 0),
        (painting_of(VOC, 21, only=[15]), LABELS == 15),
        (painting_of(("road", *VOC[1:]), 21), LABELS >= 0),
    ):
        cut = cutout(photo, LABELS, painting)
        assert cut.mode == "RGBA"
        assert np.array_equal(np.asarray(cut)[..., 3], 255 * opaque)
        expected = np.where(opaque[..., None], np.asarray(photo), 0)  # nothing of the rest
        assert np.array_equal(np.asarray(cut)[..., :3], expected)


def test_palette():
    palette = voc_palette()  # the devkit's background, aeroplane, bird, person, tvmonitor and void
    assert palette[[0, 1, 3, 15, 20, 255]].tolist() == [
        [0, 0, 0],
        [128, 0, 0],
        [128, 128, 0],
        [192, 128, 128],
        [0, 64, 128],
        [224, 224, 192],
    ]
    for colours in (palette, palette_of(False)):
        assert len(np.unique(colours, axis=0)) == 256
    assert np.array_equal(palette_of(True), palette)
    assert np.array_equal(palette_of(False)[1:], palette[1:])


def test_more_classes_than_a_palette_has(tmp_path):
    labels = np.array([[0, 1, 255, 256, 511, 65535]], dtype=np.int32)
    label_image(labels, voc_palette()).save(tmp_path / "labels.png")
    assert np.array_equal(np.asarray(Image.open(tmp_path / "labels.png")), labels)
    small = np.array([[0, 1, 255, 1, 1, 255]], dtype=np.uint8)
    large, small = (
        np.repeat(x, 2, axis=1) for x in (labels, small)
    )  # so that there are pixels beside outlines
    black = Image.new("RGB", (12, 1))
    painting = painting_of(None, 2**16)
    colours = np.asarray(overlay(black, large, painting))[0, 1::2]
    assert np.array_equal(colours, np.asarray(overlay(black, small, painting))[0, 1::2])


def test_class_shares():
    assert class_shares(np.array([[0, 3, 3, 3], [9, 0, 3, 9]])) == [(3, 0.5), (0, 0.25), (9, 0.25)]


@pytest.mark.parametrize("size", [(7, 2), (300, 200), (2000, 40)])
def test_legend_lies_below_the_picture(size):
    photo = GREY.resize(size)
    labels = np.asarray(Image.fromarray(LABELS).resize(size, Image.Resampling.NEAREST))
    painting = painting_of(VOC, 21)
    picture = overlay(photo, labels, painting)
    result = with_legend(picture, labels, painting)
    assert result.width >= size[0] and result.height > size[1]
    assert np.array_equal(np.asarray(result.crop((0, 0, *size))), np.asarray(picture))
    strip = np.asarray(result)[size[1] :]
    flat = strip.reshape(-1, 3)
    for colour in ((128, 0, 0), (192, 128, 128)):
        assert (flat == colour).all(1).sum() > 100  # a field
    assert (flat < 90).all(1).sum() > 50  # text
    assert (strip[:, -1] == 255).all()  # no text is cut off


def test_legend_of_selected_classes_and_long_names():
    painting = painting_of((*VOC[:15], "x" * 500, *VOC[16:]), 21, only=[15])
    labels = painting.keep_only(LABELS)
    long = with_legend(GREY, labels, painting)
    short = with_legend(GREY, labels, painting_of(VOC, 21, only=[15]))
    assert short.width < long.width < 500
    assert (np.asarray(short) == (128, 0, 0)).all(2).sum() == 0


def test_legend_of_names_in_other_scripts(monkeypatch):
    """Letters that no font has are drawn as boxes, which say nothing."""
    matplotlib = pytest.importorskip("matplotlib", reason="it brings a font")
    labels = np.zeros((4, 4), np.uint8)

    def legend(name: str) -> np.ndarray:
        return np.asarray(with_legend(GREY, labels, painting_of((name,), 1)))

    monkeypatch.setattr("deeplab_fast._io.legend._SYSTEM_FONTS", ("none.ttf",))
    assert np.array_equal(legend("человек"), legend("class 0"))
    assert np.array_equal(legend("two\nlines"), legend("two lines"))
    font = Path(matplotlib.get_data_path(), "fonts/ttf/DejaVuSans.ttf")
    monkeypatch.setattr("deeplab_fast._io.legend._SYSTEM_FONTS", (str(font),))
    assert not np.array_equal(legend("человек"), legend("class 0"))
    assert np.array_equal(legend("a 猫"), legend("class 0"))


TEN = [(10 * i, i, 255 - i) for i in range(10)]
NAMES = tuple(f"Name {i}" for i in range(10))
FILES = {
    "plain.txt": "\n".join(f"{r} {g} {b}" for r, g, b in TEN),
    "comments.csv": "# mine\n\nr,g,b\n" + "\n".join(f"{r}, {g}, {b}" for r, g, b in TEN),
    "spaces.txt": "\n".join(f"Name {i} {r} {g} {b}" for i, (r, g, b) in enumerate(TEN)),
    "class_dict.csv": "\ufeffname,r,g,b\n"
    + "\n".join(f"name {i},{r},{g},{b}" for i, (r, g, b) in reversed([*enumerate(TEN)]))
    + "\nvoid,1,2,3\n",
    "tabs.tsv": "\n".join(f'"Name {i}"\t{r}\t{g}\t{b}' for i, (r, g, b) in enumerate(TEN)),
    "semicolons.csv": "\n".join(f"{r};{g};{b}" for r, g, b in TEN),
    "list.json": json.dumps(TEN),
    "object.json": json.dumps({f"Name {i}": c for i, c in reversed([*enumerate(TEN)])}),
    "coco.json": json.dumps([{"name": f"Name {i}", "color": c} for i, c in enumerate(TEN)]),
}


@pytest.mark.parametrize("name", FILES)
def test_palette_files(name, tmp_path):
    path = tmp_path / name
    path.write_text(FILES[name], encoding="utf-8")
    palette = read_palette(path, NAMES, 10)
    assert (palette.dtype, palette.shape) == (np.uint8, (256, 3))
    assert [tuple(colour) for colour in palette[:10].tolist()] == TEN
    assert np.array_equal(palette[11:], voc_palette()[11:])


def test_palette_of_an_image(tmp_path):
    colours = np.array([*TEN, *voc_palette()[10:].tolist()], dtype=np.uint8)
    label_image(np.arange(10, dtype=np.uint8)[None], colours).save(tmp_path / "labels.png")
    assert np.array_equal(read_palette(tmp_path / "labels.png", None, 10), colours)
    GREY.save(tmp_path / "grey.png")
    with pytest.raises(PaletteError, match=r"an image of mode RGB \(expected one with a palette\)"):
        read_palette(tmp_path / "grey.png", None, 10)


@pytest.mark.parametrize(
    "text, categories, message",
    [
        ("0,0,0\n1,2,300", None, r"line 2: expected R, G, B from 0 to 255, got '1,2,300'"),
        ("name,r,g,b\n\ncat,1,2", None, r"line 3: expected R, G, B from 0 to 255, got 'cat,1,2'"),
        ("1,2,3", None, r"1 colours \(expected one for each of 2 classes\)"),
        ("", None, r"0 colours \(expected one for each of 2 classes\)"),
        ("cat,1,2,3\nfox,1,2,3", ("cat", "dog"), r"no colour for class 1, dog \(expected one"),
        ("[[1, 2, 3], [1, 2]]", None, r"entry 2: expected R, G, B from 0 to 255, got \[1, 2\]"),
        ('{"cat": 5}', None, r"cat: expected R, G, B from 0 to 255, got 5"),
        ("[1, 2", None, r"Expecting .* \(expected JSON\)"),
        ("[" * 100_000, None, r"\(expected JSON\)"),
        ("[[1.0, 0.5, 0.25]]", None, r"entry 1: expected R, G, B from 0 to 255, got \[1.0, 0.5"),
        ("[[Infinity, 0, 0]]", None, r"entry 1: expected R, G, B from 0 to 255, got \[inf, 0"),
        ("[5]", None, r"entry 1: expected R, G, B from 0 to 255, got 5"),
    ],
)
def test_wrong_palette_files(text, categories, message, tmp_path):
    path = tmp_path / "palette"
    path.write_text(text)
    with pytest.raises(PaletteError, match=message):
        read_palette(path, categories, 2)


def test_missing_palette_file():
    with pytest.raises(PaletteError, match=r"No such file or directory \(expected a readable file"):
        read_palette(Path("nowhere.csv"), None, 2)
