"""Options of ``deeplab-fast segment``: views, selected classes, further results, pipes, folders."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image, features

from deeplab_fast._io.images import ImageError, foreign_extensions, image_extensions, read_photo
from deeplab_fast._io.overlay import overlay, painting_of
from deeplab_fast._io.palette import voc_palette
from deeplab_fast.cli import images as cli_images
from deeplab_fast.cli import main
from deeplab_fast.models import DeepLabV3

from ..support.segment import files, photo, segment

pytestmark = pytest.mark.usefixtures("one_thread", "folder")

NAMES = ("background", "apple", "pear", "plum", "quince")


@pytest.fixture(scope="module")
def prepared(model):
    return model.prepare_for_inference(torch.float32)


def stored(kind: str, name: str = "photo") -> np.ndarray:
    return np.asarray(Image.open(f"segmented/{name}_{kind}.png"))


# Views


@pytest.mark.parametrize(
    "options, views",
    [
        (["--scales", 0.5, 1, "--flip"], {"scales": (0.5, 1.0), "flip": True}),
        (["--window", 32, 48], {"window": (32, 48)}),
        (["--flip", "--window", 64, 64], {"flip": True, "window": (64, 64)}),
    ],
)
def test_views(options, views, prepared, weights, predict, capsys):
    photo().save("photo.png")
    assert segment(capsys, "photo.png", "--weights", weights, *options)[0] == 0
    labels = stored("labels")
    assert np.array_equal(labels, prepared.segment(photo(), **views))
    assert not np.array_equal(labels, predict(photo())), "the test would not detect lost options"


@pytest.mark.parametrize(
    "options, message",
    [
        (["--scales", 0], "--scales: expected positive numbers, got (0.0,)"),
        (["--scales", 1, "nan"], "--scales: expected positive numbers, got (1.0, nan)"),
        (
            ["--window", 40, 48],
            "--window: expected a height and width in multiples of 16, got (40, 48)",
        ),
        (["--alpha", 1.5], "--alpha 1.5: expected a number from 0 to 1"),
        (["--alpha", "nan"], "--alpha nan: expected a number from 0 to 1"),
        (
            ["--only", "cherry"],
            "--only cherry: no such class (expected background, everything, or a number from 0 to 1"
            ")",
        ),
        (["--only", "2"], "--only 2: no such class"),
        (["--palette", "none.csv"], "--palette none.csv: No such file or directory (expected"),
        (["--palette", "bad.csv"], "--palette bad.csv: line 2: expected R, G, B from 0 to 255"),
        (["--labels-only", "--legend"], "--legend: expected an overlay, which is not written"),
        (["--labels-only", "--alpha", "0"], "--alpha: expected an overlay, which is not written"),
        (["--json", "no/r.json"], "--json: no: no such folder (expected one)"),
        (["--json", "x.png"], "--json x.png: expected a file that is not an input"),
        (["--output", "-", "--probabilities"], "--output -: expected a folder with --probab"),
        (
            ["--output", "-", "--cutout", "--labels-only"],
            "--output -: expected one result, got --labels-only, --cutout",
        ),
        (["--output", "-", "--cutout", "--legend"], "--legend: expected an overlay, which is not"),
        (["--output", "-", "--cutout", "--palette", "p"], "--palette: expected labels or an over"),
    ],
)
def test_wrong_options(options, message, stand_in, capsys):
    photo(8, 8).save("x.png")
    Path("bad.csv").write_text("0,0,0\n1,2\n")
    before = Path("x.png").read_bytes()
    status, out, err = segment(capsys, "x.png", "--weights", "any", *options)
    assert (status, out) == (2, "")
    assert len(err) == 1 and err[0].startswith(f"deeplab-fast: {message}")
    assert not Path("segmented").exists() and Path("x.png").read_bytes() == before


# Classes and results


def test_only_some_classes(predict, weights, capsys):
    photo().save("photo.png")
    options = ["--only", "Plum", "4", "--cutout", "--alpha", 0.3]
    status, out, _ = segment(capsys, "photo.png", "--weights", weights, *options)
    labels = predict(photo())
    assert len(np.unique(labels)) > 3, "the test would not detect other classes"
    kept = np.isin(labels, (3, 4))
    assert status == 0
    assert np.array_equal(stored("labels"), np.where(kept, labels, 0))
    assert np.array_equal(stored("cutout")[..., 3], 255 * kept)
    painting = painting_of(NAMES, 5, only=[3, 4], alpha=0.3)
    assert np.array_equal(stored("overlay"), np.asarray(overlay(photo(), labels, painting)))
    lines = [line.split() for line in out.splitlines()[1:]]
    assert {line[-1] for line in lines} == {"background", "plum", "quince"}
    assert sum(float(line[0]) for line in lines) == pytest.approx(100, abs=0.2)


def test_other_classes_are_255_without_a_background(stand_in, capsys):
    stand_in.label_names = ("road", "everything")
    photo(8, 8).save("photo.png")
    status, out, _ = segment(capsys, "photo.png", "--weights", "any", "--only", "road")
    assert status == 0
    assert (stored("labels") == 255).all()
    assert out.splitlines()[1:] == ["  100.0 %  other classes"]


@pytest.mark.parametrize("names, name", [(None, "class 1"), (("leaf",), "leaf")])
def test_binary_network(names, name, capsys):
    torch.manual_seed(0)
    binary = DeepLabV3("mobilenet_v2", 1, 16, atrous_rates=(), head_conv=False).eval()
    binary.categories = names
    binary.classifier[-1].weight.data.zero_()
    photo(32, 32).save("photo.png")
    for bias, only, is_leaf in ((1.0, "1", True), (-1.0, "1", False)):
        binary.classifier[-1].bias.data.fill_(bias)
        binary.save_pretrained("binary.safetensors")
        options = ["--only", only, "--confidence", "--cutout"]
        status, out, _ = segment(capsys, "photo.png", "--weights", "binary.safetensors", *options)
        background = "background" if names else "class 0"
        assert (status, out.split("%  ")[1]) == (0, f"{name if is_leaf else background}\n")
        assert (stored("labels") == is_leaf).all()
        assert (stored("confidence") == round(255 / (1 + np.exp(-1)))).all()
        assert (stored("cutout")[..., 3] == 255 * is_leaf).all()
        assert (stored("overlay") == np.asarray(photo(32, 32))).all() != is_leaf


def test_labels_only(stand_in, folder, capsys):
    photo(8, 8).save("photo.png")
    status, out, _ = segment(capsys, "photo.png", "--weights", "any", "--labels-only")
    assert (status, files(folder / "segmented")) == (0, ["photo_labels.png"])
    assert out.splitlines()[0] == "photo.png (8x8) -> segmented/photo_labels.png"


def test_palette_of_labels_and_overlay(stand_in, capsys):
    photo(8, 8).save("photo.png")
    Path("colours.csv").write_text("name,r,g,b\neverything,10,20,30\nbackground,1,2,3\n")
    options = ["--palette", "colours.csv", "--alpha", "1"]
    assert segment(capsys, "photo.png", "--weights", "any", *options)[0] == 0
    assert (stored("overlay") == (10, 20, 30)).all()
    labels = Image.open("segmented/photo_labels.png")
    assert (np.asarray(labels.convert("RGB")) == (10, 20, 30)).all()
    assert labels.getpalette()[:3] == [1, 2, 3]


def test_legend(stand_in, capsys):
    photo(200, 100).save("photo.png")
    assert segment(capsys, "photo.png", "--weights", "any")[0] == 0
    plain = stored("overlay")
    assert plain.shape == (100, 200, 3)
    assert segment(capsys, "photo.png", "--weights", "any", "--legend")[0] == 0
    with_legend = stored("overlay")
    assert np.array_equal(with_legend[:100, :200], plain)
    assert (with_legend[100:] == voc_palette()[1]).all(2).sum() > 100


def test_confidence_and_probabilities(model, prepared, weights, predict, capsys):
    photo().save("photo.png")
    options = ["--confidence", "--probabilities"]
    assert segment(capsys, "photo.png", "--weights", weights, *options)[0] == 0
    pixels = dataclasses.replace(model.preprocessing, crop=None)(photo())[None]
    logits = prepared.logits(pixels)["out"]
    expected = torch.nn.functional.interpolate(logits, (72, 96), mode="bilinear").softmax(1)[0]
    with np.load("segmented/photo_probabilities.npz") as saved:
        probabilities, classes = saved["probabilities"], saved["classes"]
    assert (probabilities.dtype, tuple(classes)) == (np.float16, NAMES)
    assert np.abs(probabilities - expected.numpy()).max() < 1e-3
    assert os.path.getsize("segmented/photo_probabilities.npz") < 2 * 5 * 72 * 96 + 2000
    confidence = stored("confidence")
    assert confidence.dtype == np.uint8
    assert np.abs(confidence - 255 * expected.max(0).values.numpy()).max() <= 0.51
    assert np.array_equal(stored("labels"), predict(photo()))

    options = ["--probabilities", "--only", "quince", "pear", "--output", "two"]
    assert segment(capsys, "photo.png", "--weights", weights, *options)[0] == 0
    with np.load("two/photo_probabilities.npz") as saved:
        assert saved["classes"].tolist() == ["pear", "quince"]
        assert np.array_equal(saved["probabilities"], probabilities[[2, 4]])
    labels = np.asarray(Image.open("two/photo_labels.png"))
    assert np.array_equal(labels, np.where(np.isin(stored("labels"), (2, 4)), stored("labels"), 0))


def test_json(stand_in, capsys):
    photo(8, 6).save("photo.png")
    Path("bad.png").write_text("text")
    options = ["--json", "r.json", "--flip", "--only", "1", "--labels-only"]
    status, _, err = segment(
        capsys, "bad.png", "photo.png", "none.png", "--weights", "any", *options
    )
    assert status == 1 and len(err) == 2
    assert json.loads(Path("r.json").read_text()) == {
        "weights": "any",
        "dtype": "float32",
        "scales": [1.0],
        "flip": True,
        "window": None,
        "only": ["everything"],
        "classes": ["background", "everything"],
        "images": [
            {
                "image": "photo.png",
                "width": 8,
                "height": 6,
                "results": {"labels": "segmented/photo_labels.png"},
                "shares": [{"class": 1, "name": "everything", "share": 1.0}],
            }
        ],
        "failed": [
            {
                "image": "none.png",
                "error": "no such file (expected an image, a folder or a glob)",
            },
            {"image": "bad.png", "error": "not an image (expected JPEG, PNG, WebP, TIFF, ...)"},
        ],
    }
    assert [name for name in os.listdir(".") if name.endswith(".partial")] == []


def test_json_that_cannot_be_written(stand_in, capsys):
    photo(8, 8).save("photo.png")
    os.mkdir("r.json")
    status, _, err = segment(capsys, "photo.png", "--weights", "any", "--json", "r.json")
    assert (status, err) == (2, ["deeplab-fast: --json: cannot write r.json: Is a directory"])


# Pipes


def as_input(monkeypatch, content: bytes, is_terminal: bool = False) -> None:
    stream = io.TextIOWrapper(io.BytesIO(content))
    monkeypatch.setattr(stream, "isatty", lambda: is_terminal, raising=False)
    monkeypatch.setattr(sys, "stdin", stream)


def encoded(image: Image.Image, format: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=format, **options)
    return buffer.getvalue()


def test_standard_input(stand_in, folder, monkeypatch, capsys):
    photo(8, 6).save("stdin.jpg")
    as_input(monkeypatch, encoded(photo(6, 8)))
    status, out, _ = segment(capsys, "-", "--weights", "any")
    assert status == 0
    assert out.startswith("standard input (6x8) -> segmented/stdin_labels.png, ")
    as_input(monkeypatch, encoded(photo(6, 8)))
    status, _, _ = segment(capsys, "stdin.jpg", "-", "--weights", "any", "--output", "two")
    names = ["stdin.jpg_labels.png", "stdin.jpg_overlay.png"]
    assert files(folder / "two") == [*names, "stdin_labels.png", "stdin_overlay.png"]


@pytest.mark.parametrize(
    "content, message",
    [
        (b"", "the file is empty (expected JPEG, PNG, WebP, TIFF, ...)"),
        (b"hello", "not an image (expected JPEG, PNG, WebP, TIFF, ...)"),
        (b"\0\0\0\x18ftypheic", "HEIC (expected JPEG, PNG, WebP, TIFF, ...: convert it first"),
        (encoded(photo())[:100], "damaged: "),
    ],
)
def test_wrong_standard_input(content, message, stand_in, monkeypatch, capsys):
    as_input(monkeypatch, content)
    status, _, err = segment(capsys, "-", "--weights", "any")
    assert status == 1
    assert len(err) == 1 and err[0].startswith(f"deeplab-fast: standard input: {message}")


def test_only_one_image_to_standard_output(stand_in, capsys):
    photo(8, 8).save("x.png")
    photo(8, 8).save("y.png")
    status, out, err = segment(capsys, "x.png", "y.png", "--weights", "any", "--output", "-")
    assert (status, out) == (2, "")
    assert err == ["deeplab-fast: --output -: expected one image, got 2"]


def test_terminals_are_no_pipes(stand_in, monkeypatch, capsys):
    photo(8, 8).save("photo.png")
    as_input(monkeypatch, b"", is_terminal=True)
    assert segment(capsys, "-", "--weights", "any")[::2] == (
        2,
        ["deeplab-fast: -: standard input is a terminal (expected an image)"],
    )
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    status, _, err = segment(capsys, "photo.png", "--weights", "any", "--output", "-")
    assert status == 2
    assert err == [
        "deeplab-fast: --output -: standard output is a terminal (expected a pipe or a file)"
    ]


@pytest.mark.parametrize(
    "option, kind", [([], "overlay"), (["--labels-only"], "labels"), (["--cutout"], "cutout"),
                     (["--confidence"], "confidence")],
)  # fmt: skip
def test_standard_output(option, kind, stand_in, folder, monkeypatch, capfdbinary):
    stand_in.segment_with_probabilities = lambda photo, **views: (
        stand_in.segment(photo),
        iter([np.full((2, 6, 8), 0.5, np.float32)]),
    )
    photo(8, 6).save("photo.png")
    assert main(["segment", "photo.png", "--weights", "any", *option, "--output", "to"]) == 0
    capfdbinary.readouterr()
    as_input(monkeypatch, Path("photo.png").read_bytes())
    assert main(["segment", "-", "--weights", "any", *option, "--output", "-"]) == 0
    out, err = capfdbinary.readouterr()
    assert out == Path(f"to/photo_{kind}.png").read_bytes()
    assert err == b"standard input (8x6) -> standard output\n  100.0 %  everything\n"
    assert not Path("-").exists()


# Folders and formats


def test_links_to_folders_are_followed_once(tmp_path):
    for name in ["in/b/x.png", "elsewhere/deep/y.png", "in/out/z.png"]:
        path = Path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        photo(2, 2).save(path)
    Path("in/a").symlink_to("b")  # a folder that is found itself, under its own name
    Path("in/b/up").symlink_to("..")  # loops
    Path("in/above").symlink_to(tmp_path)
    Path("in/b/far").symlink_to(tmp_path / "elsewhere")
    Path("elsewhere/deep/back").symlink_to(tmp_path / "in")
    Path("in/results").symlink_to("out")
    Path("in/broken").symlink_to("nowhere")
    found = cli_images.find_images("in", tmp_path / "in/out").images
    assert [str(path.relative_to(tmp_path / "in")) for path in found] == [
        "b/far/deep/y.png",
        "b/x.png",
    ]


def test_output_folder_as_input(tmp_path):
    photo(2, 2).save("x.png")
    assert cli_images.find_images(".", tmp_path).images == [tmp_path / "x.png"]


def test_files_of_other_formats_are_named(stand_in, capsys):
    os.makedirs("in/sub")
    os.makedirs("phone")
    for name in ["in/1.HEIC", "in/sub/2.heic", "in/3.dng", "in/.4.heic", "phone/5.heif"]:
        Path(name).write_bytes(b"\0")
    photo(8, 8).save("in/photo.png")
    expected = f"expected {' '.join(image_extensions())}: convert them first, with ImageMagick"
    status, _, err = segment(capsys, "in", "--weights", "any")
    assert status == 0
    assert len(err) == 1
    assert err[0].startswith(f"deeplab-fast: in: skipped 1 .dng and 2 .heic files ({expected}")
    status, _, err = segment(capsys, "phone", "in/3.dng", "--weights", "any")
    assert status == 1
    assert err[0].startswith(f"deeplab-fast: phone: no image there but 1 .heif file ({expected}")
    assert err[1:] == [
        "deeplab-fast: in/3.dng: a raw file of a camera (expected JPEG, PNG, WebP, TIFF, ...: "
        "convert it first, with ImageMagick for example)"
    ]


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("a.heic", b"\0\0\0\x18ftypmif1", "HEIC (expected"),
        ("phone.jpg", b"\0\0\0\x18ftypheic", "HEIC (expected"),
        ("a.HEIF", b"anything", "HEIC (expected"),
        ("a.jxl", b"\xff\x0a", "JPEG XL (expected"),
        ("a.heic", b"", "the file is empty (expected"),
        ("a.nef", b"", "a raw file of a camera (expected"),
    ],
)
def test_named_files_of_other_formats(name, content, message):
    Path(name).write_bytes(content)
    with pytest.raises(ImageError) as caught:
        read_photo(name)
    assert str(caught.value).startswith(message)


def test_the_preview_in_a_raw_file_is_not_the_photo():
    photo().save("camera.tif")
    os.rename("camera.tif", "camera.nef")  # raw files begin like TIFF files
    with pytest.raises(ImageError, match="a raw file of a camera"):
        read_photo("camera.nef")


def test_jpeg_2000(monkeypatch):
    if features.check("jpg_2000"):
        assert {".jp2", ".j2k"} <= {*image_extensions()}
        assert not {".jp2", ".j2k"} & {*foreign_extensions()}
        photo().save("photo.jp2", irreversible=False)
        assert np.array_equal(np.asarray(read_photo("photo.jp2")), np.asarray(photo()))
    Path("photo.jp2").write_bytes(b"\0\0\0\x0cjP  \r\n\x87\n")
    monkeypatch.setattr(features, "check", lambda name: False)
    with pytest.raises(ImageError, match=r"JPEG 2000 \(expected .*: convert it first"):
        read_photo("photo.jp2")
    assert {".jp2", ".j2k"} <= {*foreign_extensions()}
    assert not {".jp2", ".j2k"} & {*image_extensions()}


def test_a_plugin_for_heic_is_used(monkeypatch):
    known = {**Image.registered_extensions(), ".heic": "PNG"}
    assert ".heic" in foreign_extensions()
    monkeypatch.setattr(Image, "registered_extensions", lambda: known)
    assert ".heic" in image_extensions() and ".heic" not in foreign_extensions()
    assert ".nef" not in image_extensions()


# Training and evaluation share the limit of pixels


@pytest.mark.parametrize("command", ["train", "evaluate"])
def test_max_pixels_of_labelled_images(command, weights, monkeypatch, capsys):
    for kind in ("images", "labels"):
        for split in ("train", "val"):
            path = Path("data", kind, split, "a.png")
            path.parent.mkdir(parents=True)
            photo(64, 64).convert("RGB" if kind == "images" else "L").point(lambda x: 0).save(path)
    Path("data/classes.txt").write_text("\n".join(NAMES))
    arguments = [command, "data", "--weights", weights, "--device", "cpu", "--workers", "1"]
    assert main([*arguments, "--max-pixels", "4095"]) == 2
    assert "a.png: too large: Image size (4096 pixels) exceeds limit of 4095 pixels (expected " in (
        capsys.readouterr().err
    )


def test_evaluation_out_of_memory_names_a_window(weights, monkeypatch, capsys):
    path = Path("data/images/val/a.png")
    for folder in ("images", "labels"):
        Path("data", folder, "val").mkdir(parents=True)
    photo(8, 8).save(path)
    Image.new("L", (8, 8)).save("data/labels/val/a.png")
    Path("data/classes.txt").write_text("\n".join(NAMES))

    def allocate(*arguments: object, **options: object) -> SimpleNamespace:
        raise MemoryError

    monkeypatch.setattr("deeplab_fast.cli.evaluate.evaluate", allocate)
    assert main(["evaluate", "data", "--weights", weights, "--device", "cpu"]) == 2
    assert capsys.readouterr().err.endswith(
        "deeplab-fast: not enough memory (expected --window 512 512)\n"
    )
