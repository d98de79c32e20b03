"""``deeplab-fast segment`` on images of every format, and its errors."""

from __future__ import annotations

import errno
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from deeplab_fast._io.overlay import overlay, painting_of
from deeplab_fast._io.palette import voc_palette
from deeplab_fast.cli import images as cli_images
from deeplab_fast.cli import main
from deeplab_fast.cli.errors import UserError
from deeplab_fast.training import SegmentationData

from ..support.segment import files, photo, segment

pytestmark = pytest.mark.usefixtures("one_thread", "folder")


def test_segment_as_a_process(model, predict, weights, folder):
    photo().save(folder / "photo.png")
    (folder / "notes.jpg").write_text("no image")
    command = [sys.executable, "-m", "deeplab_fast", "segment", "*.[jp][pn]g"]
    command += ["--weights", weights, "--device", "cpu"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr == (
        "deeplab-fast: notes.jpg: not an image (expected JPEG, PNG, WebP, TIFF, ...)\n"
    )
    first, *histogram = done.stdout.splitlines()
    assert first == ("photo.png (96x72) -> segmented/photo_labels.png, segmented/photo_overlay.png")
    labels = predict(photo())
    counts = np.bincount(labels.ravel())
    assert (counts > 0).sum() >= 3, "the test would not detect wrong labels"
    assert np.array_equal(np.asarray(Image.open(folder / "segmented/photo_labels.png")), labels)
    assert histogram == [
        f"  {100 * counts[label] / labels.size:5.1f} %  {model.categories[label]}"
        for label in np.argsort(-counts)
        if counts[label]
    ]


def test_results_have_the_labels_in_the_voc_palette(model, predict, weights, folder, capsys):
    image = photo()
    image.save("photo.png")
    assert segment(capsys, "photo.png", "--weights", weights, "--output", "out")[0] == 0
    assert files(folder / "out") == ["photo_labels.png", "photo_overlay.png"]
    labels = predict(image)
    stored = Image.open("out/photo_labels.png")
    assert stored.mode == "P"
    assert np.array_equal(np.asarray(stored), labels)
    assert np.array_equal(np.asarray(stored.convert("RGB")), voc_palette()[labels])

    painted = Image.open("out/photo_overlay.png")
    painting = painting_of(model.categories, 5)
    assert np.array_equal(np.asarray(painted), np.asarray(overlay(image, labels, painting)))


GREY = photo().convert("L")
SEE_THROUGH = Image.merge("RGBA", [*photo().split(), Image.linear_gradient("L").resize((96, 72))])
PALETTE = photo().convert("P", palette=Image.Palette.ADAPTIVE, colors=32)
KINDS = {
    "rgb.png": (photo(), photo()),
    "grey.png": (GREY, GREY.convert("RGB")),
    "bilevel.png": (GREY.convert("1"), GREY.convert("1").convert("RGB")),
    "sixteen_bit.png": (
        Image.fromarray(np.asarray(GREY).astype(np.uint16) * 257),
        GREY.convert("RGB"),
    ),
    "sixteen_bit.tif": (
        Image.fromarray(np.asarray(GREY).astype(np.uint16) * 257),
        GREY.convert("RGB"),
    ),
    "palette.png": (PALETTE, PALETTE.convert("RGB")),
    "opaque.png": (photo().convert("RGBA"), photo()),
    "opaque_grey.png": (GREY.convert("LA"), GREY.convert("RGB")),
    "see_through.png": (
        SEE_THROUGH,
        Image.alpha_composite(Image.new("RGBA", (96, 72), "white"), SEE_THROUGH).convert("RGB"),
    ),
    "photo.bmp": (photo(), photo()),
    "photo.ppm": (photo(), photo()),
    "UPPER.PNG": (photo(), photo()),
    "one_pixel.png": (photo(1, 1), photo(1, 1)),
    "one_row.png": (photo(37, 1), None),
    "panorama.png": (photo(600, 7), None),
    "tower.png": (photo(3, 500), None),
}


@pytest.fixture(scope="module")
def segmented_kinds(weights, tmp_path_factory):
    """The results of all KINDS, in one run because loading a model is slow."""
    folder = tmp_path_factory.mktemp("kinds")
    for name, (image, _) in KINDS.items():
        image.save(folder / name)
    status = main(
        ["segment", *(str(folder / n) for n in KINDS), "--weights", weights]
        + ["--output", str(folder / "out"), "--device", "cpu"]
    )
    assert status == 0
    return folder


@pytest.mark.parametrize("name", KINDS)
def test_kinds_of_images(name, predict, segmented_kinds):
    stored, seen = KINDS[name]
    names = cli_images.result_names([segmented_kinds / n for n in KINDS])
    result = segmented_kinds / "out" / f"{names[segmented_kinds / name]}_labels.png"
    labels = np.asarray(Image.open(result))
    assert labels.shape == (stored.height, stored.width)
    if seen is not None:
        assert np.array_equal(np.asarray(cli_images.read_image(segmented_kinds / name)), seen)
        assert np.array_equal(labels, predict(seen))


def test_cmyk(folder):
    photo().convert("CMYK").save("cmyk.jpg", quality=95)
    read = np.asarray(cli_images.read_image(folder / "cmyk.jpg")).astype(int)
    assert np.abs(read - np.asarray(photo())).mean() < 8


@pytest.mark.parametrize("extension", ["png", "tif", "jpg"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(orientation, extension, folder):
    """Row 0 and column 0 of the file lie as the tag says (Exif 2.32, tag 0x0112)."""
    upright = photo(96, 64)
    pixels = np.asarray(upright)
    stored = {
        1: pixels,
        2: pixels[:, ::-1],
        3: pixels[::-1, ::-1],
        4: pixels[::-1],
        5: pixels.transpose(1, 0, 2),
        6: pixels.transpose(1, 0, 2)[::-1],
        7: pixels.transpose(1, 0, 2)[::-1, ::-1],
        8: pixels.transpose(1, 0, 2)[:, ::-1],
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"quality": 95, "subsampling": 0} if extension == "jpg" else {}
    Image.fromarray(stored).save(f"camera.{extension}", exif=exif, **options)
    read = np.asarray(cli_images.read_image(folder / f"camera.{extension}")).astype(int)
    assert read.shape == pixels.shape
    assert np.abs(read - pixels).mean() < (3 if extension == "jpg" else 1e-9)


def test_malformed_exif_is_ignored(folder):
    exif = Image.Exif()
    exif[0x0112], exif[0x010F] = 6, "camera maker"
    photo().save("camera.jpg", exif=exif)
    data = Path("camera.jpg").read_bytes()
    maker = data.index(b"\x01\x0f\x00\x02") + 3  # the entry's type is changed from text to unknown
    Path("camera.jpg").write_bytes(data[:maker] + b"\x07" + data[maker + 1 :])
    assert cli_images.read_image(folder / "camera.jpg").size == (72, 96)


@pytest.mark.parametrize("extension", ["png", "jpg", "webp"])
@pytest.mark.parametrize("damage", ["no TIFF header", "orientation is a text"])
def test_photo_with_unusable_exif_is_read_as_stored(damage, extension, folder):
    exif = Image.Exif()
    exif[0x0112] = 6
    content = exif.tobytes().replace(b"\x01\x12\x00\x03", b"\x01\x12\x00\x02")
    if damage == "no TIFF header":
        content = b"Exif\0\0damaged"
    photo(96, 64).save(f"camera.{extension}", exif=content)
    Image.new("L", (96, 64)).save("labels.png")
    path = folder / f"camera.{extension}"
    assert cli_images.read_image(path).size == (96, 64)
    data = SegmentationData([(path, folder / "labels.png")], ("a", "b"))
    assert data.image_size(0) == data.read(0)[0].size == (96, 64)


def test_results_of_a_rotated_photo_are_upright(predict, weights, capsys):
    exif = Image.Exif()
    exif[0x0112] = 6
    photo().transpose(Image.Transpose.ROTATE_90).save("camera.png", exif=exif)
    assert segment(capsys, "camera.png", "--weights", weights)[0] == 0
    labels = np.asarray(Image.open("segmented/camera_labels.png"))
    assert np.array_equal(labels, predict(photo()))
    assert Image.open("segmented/camera_overlay.png").size == (96, 72)


@pytest.mark.parametrize("extension", ["gif", "tif", "webp"])
def test_first_frame_of_many_is_read(extension, folder):
    frames = [photo(), photo().rotate(180), photo().rotate(90)]
    options = {"lossless": True} if extension == "webp" else {}
    frames[0].save(f"many.{extension}", save_all=True, append_images=frames[1:], **options)
    read = np.asarray(cli_images.read_image(folder / f"many.{extension}")).astype(int)
    assert np.abs(read - np.asarray(frames[0])).mean() < 1


def _encoded(image: Image.Image, name: str) -> bytes:
    image.save(name)
    data = Path(name).read_bytes()
    Path(name).unlink()
    return data


BAD = {
    "empty.jpg": (lambda: b"", r"the file is empty \(expected JPEG"),
    "text.jpg": (lambda: b"hello", r"not an image \(expected JPEG"),
    "no_pixels.ppm": (lambda: b"P6\n0 5\n255\n", r"not an image \(expected JPEG"),
    "truncated.jpg": (lambda: _encoded(photo(), "x.jpg")[:1500], r"damaged: .*truncated"),
    "truncated.png": (lambda: _encoded(photo(), "x.png")[:100], r"damaged: .*truncated"),
    "header_only.png": (lambda: _encoded(photo(), "x.png")[:20], r"(not an image|damaged)"),
    "damaged.png": (
        lambda: _encoded(photo(), "x.png").replace(b"IDAT", b"IDOT"),
        r"(not an image|damaged)",
    ),
    "floats.tif": (
        lambda: _encoded(Image.fromarray(np.ones((4, 4), np.float32)), "x.tif"),
        r"32 bits per channel, mode F \(expected 8 or 16\)",
    ),
}


def test_bad_images_are_named_and_the_others_segmented(predict, weights, folder, capsys):
    os.mkdir("in")
    for name, (content, _) in BAD.items():
        Path("in", name).write_bytes(content())
    photo().save("in/good.png")
    os.mkdir("none")
    Path("dangling.png").symlink_to("nowhere.png")
    os.mkfifo("pipe.png")
    arguments = ["in/missing.jpg", "nothing_*.jpg", "none", "dangling.png", "pipe.png"]
    status, out, err = segment(
        capsys, *arguments, *(f"in/{name}" for name in BAD), "in/good.png", "--weights", weights
    )
    assert status == 1
    expected = {
        "in/missing.jpg": r"no such file \(expected an image, a folder or a glob\)",
        "nothing_*.jpg": r"no image there \(expected \.jpg",
        "none": r"no image there \(expected \.jpg",
        "dangling.png": r"no such file \(expected an image",
        "pipe.png": r"no such file, or not a regular one \(expected an image\)",
        **{f"in/{name}": message for name, (_, message) in BAD.items()},
    }
    assert len(err) == len(expected)
    for line, (path, message) in zip(err, expected.items()):
        prefix = f"deeplab-fast: {path}: "
        assert line.startswith(prefix)
        assert re.match(message, line[len(prefix) :]), line
    labels = np.asarray(Image.open("segmented/in/good_labels.png"))
    assert np.array_equal(labels, predict(photo()))
    assert files(folder / "segmented") == ["in/good_labels.png", "in/good_overlay.png"]


def test_decompression_bomb(stand_in, monkeypatch, capsys):
    photo().save("photo.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    status, _, err = segment(capsys, "photo.png", "--weights", "any")
    assert (status, err) == (
        1,
        [
            "deeplab-fast: photo.png: too large: Image size (6912 pixels) exceeds limit of 2000 "
            "pixels (expected a larger --max-pixels, in Python PIL.Image.MAX_IMAGE_PIXELS)"
        ],
    )


def test_max_pixels(stand_in, monkeypatch, capsys):
    photo().save("photo.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    options = ["--weights", "any", "--max-pixels"]
    status, _, err = segment(capsys, "photo.png", *options, 6911)
    assert status == 1 and "(6912 pixels) exceeds limit of 6911 pixels (expected" in err[0]
    assert segment(capsys, "photo.png", *options, 6912)[0] == 0
    assert Image.MAX_IMAGE_PIXELS == 10
    assert segment(capsys, "photo.png", *options, 0)[::2] == (
        2,
        ["deeplab-fast: --max-pixels 0: expected a positive number"],
    )


@pytest.mark.parametrize(
    "align_corners, options, way_out",
    [
        (False, [], "--window 512 512, or a smaller image"),
        (True, [], "--window 513 513, or a smaller image"),
        (False, ["--window", 512, 512], "a smaller --window, or a smaller image"),
    ],
)
def test_out_of_memory(align_corners, options, way_out, stand_in, capsys):
    photo().save("photo.png")
    stand_in.segment = lambda photo, **views: torch.empty(2**62, dtype=torch.uint8)
    stand_in.align_corners = align_corners
    status, _, err = segment(capsys, "photo.png", "--weights", "any", *options)
    assert (status, err) == (
        1,
        [f"deeplab-fast: photo.png: not enough memory (expected {way_out})"],
    )


def test_folders_are_searched_and_keep_their_structure(stand_in, folder, capsys):
    for name in ["a/x.png", "b/x.png", "b/c/x.PNG", "b/.hidden.png", ".git/x.png", "b/x.txt"]:
        path = Path("in", name)
        path.parent.mkdir(parents=True, exist_ok=True)
        photo(8, 8).save(path, format="PNG")
    photo(8, 8).save("in/b/x.jpg")
    arguments = ["in", "in/a/x.png", "--weights", "any", "--output", "in/out"]
    expected = [
        f"{name}_{kind}.png"
        for name in ["a/x", "b/c/x", "b/x.jpg", "b/x.png"]
        for kind in ["labels", "overlay"]
    ]
    for _ in range(2):  # the second run finds the results of the first
        status, _, err = segment(capsys, *arguments)
        assert (status, err) == (0, [])
        assert files(folder / "in/out") == expected


@pytest.mark.parametrize(
    "paths, names",
    [
        (["/p/x.jpg"], ["x"]),
        (["/p/x.jpg", "/p/y.z.jpg"], ["x", "y.z"]),
        (["/p/a/x.jpg", "/p/b/x.jpg"], ["a/x", "b/x"]),
        (["/p/x.jpg", "/p/x.png", "/p/y.png"], ["x.jpg", "x.png", "y"]),
        (["/p/x.jpg", "/p/x.png", "/p/x.jpg.png"], ["x.jpg", "x.png", "x.jpg.png"]),
        (["/p/..jpg", "/p/x."], ["..jpg", "x"]),
    ],
)
def test_result_names(paths, names):
    results = cli_images.result_names([Path(path) for path in paths])
    assert [str(results[Path(path)]) for path in paths] == names


def test_quoted_glob_is_expanded_as_by_a_shell(folder):
    for name in ["a/1.png", "a/2.png", "b/1.png", "b/[x].png"]:
        Path(name).parent.mkdir(exist_ok=True)
        photo(2, 2).save(name)

    def find(argument):
        return [
            str(p.relative_to(folder))
            for p in cli_images.find_images(argument, folder / "o").images
        ]

    assert find("*/1.png") == ["a/1.png", "b/1.png"]
    assert find("[ab]") == find("**/*.png") == ["a/1.png", "a/2.png", "b/1.png", "b/[x].png"]
    assert find("b/[x].png") == ["b/[x].png"]  # an existing file is not a glob
    with pytest.raises(UserError, match="no such file"):
        find("")  # not the current folder: an unset variable of a shell


def test_inputs_are_never_overwritten(stand_in, folder, capsys):
    photo(8, 8).save("x.png")
    photo(9, 9).save("x_labels.png")
    before = Path("x_labels.png").read_bytes()
    status, _, err = segment(capsys, "x.png", "x_labels.png", "--weights", "any", "--output", ".")
    assert status == 1
    assert err == [
        "deeplab-fast: x.png: x_labels.png would be overwritten, but it is also an input "
        "(expected another --output)"
    ]
    assert Path("x_labels.png").read_bytes() == before
    assert not Path("x_overlay.png").exists()
    assert Path("x_labels_labels.png").exists()


@pytest.mark.parametrize(
    "failure, status, message",
    [
        (
            OSError(errno.ENOSPC, "No space left on device"),
            1,
            "x.png: cannot write out/x_labels.png: No space left on device",
        ),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_results_are_complete_or_absent(
    failure, status, message, stand_in, folder, monkeypatch, capsys
):
    photo(8, 8).save("x.png")
    os.mkdir("out")
    Path("out/x_labels.png").write_text("of an earlier run")
    save = Image.Image.save

    def fail_half_way(image, path, *arguments, **options):
        save(image, path, *arguments, **options)
        with open(path, "r+b") as file:
            file.truncate(20)
        raise failure

    monkeypatch.setattr(Image.Image, "save", fail_half_way)
    arguments = ["x.png", "--weights", "any", "--output", "out"]
    assert segment(capsys, *arguments)[::2] == (status, [f"deeplab-fast: {message}"])
    assert [path.name for path in Path("out").iterdir()] == ["x_labels.png"]
    assert Path("out/x_labels.png").read_text() == "of an earlier run"


def test_results_have_the_default_permissions(stand_in, capsys):
    photo(8, 8).save("x.png")
    segment(capsys, "x.png", "--weights", "any")
    result, plain = Path("segmented/x_labels.png"), Path("x.png")
    assert result.stat().st_mode == plain.stat().st_mode


@pytest.mark.parametrize(
    "output, why", [("x.png", "File exists"), ("x.png/out", "Not a directory")]
)
def test_output_must_be_a_folder(output, why, stand_in, folder, capsys):
    photo(8, 8).save("x.png")
    status, out, err = segment(capsys, "x.png", "--weights", "any", "--output", output)
    assert (status, out) == (2, "")
    assert err == [f"deeplab-fast: --output {output}: {why} (expected a folder)"]


def test_output_must_be_writable(stand_in, monkeypatch, capsys):
    photo(8, 8).save("x.png")
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write everywhere
    status, _, err = segment(capsys, "x.png", "--weights", "any", "--output", "out")
    assert status == 2
    assert err == ["deeplab-fast: --output out: not writable (expected a folder to write to)"]


def test_missing_weights_option_lists_the_formats(capsys):
    assert main(["segment", "x.png"]) == 2
    message = capsys.readouterr().err
    assert message.startswith("deeplab-fast: segment needs --weights, one of\n")
    for way in ("deeplabv3_resnet50", ".pth", "Hugging Face", ".safetensors"):
        assert way in message


@pytest.mark.parametrize(
    "name",
    ["missing.pth", "text.pth", "text.safetensors", "odd.safetensors", "x.png", "empty_folder"],
)
def test_wrong_weights(name, folder, capsys):
    photo(8, 8).save("x.png")
    Path("text.pth").write_text("hello")
    Path("text.safetensors").write_text("hello")
    save_file({"weight": torch.ones(2)}, "odd.safetensors", metadata={"deeplab_fast": "[]"})
    os.mkdir("empty_folder")
    status, out, err = segment(capsys, "x.png", "--weights", name)
    assert (status, out) == (2, "")
    assert len(err) == 1 and err[0].startswith("deeplab-fast: --weights: ")
    assert name in err[0]
    assert not Path("segmented").exists()


@pytest.mark.parametrize("device", ["gpu", "cuda:99", "meta", "cpu:x", ""])
def test_missing_devices_are_errors(device, stand_in, capsys):
    photo(8, 8).save("x.png")
    status, _, err = segment(capsys, "x.png", "--weights", "any", "--device", device)
    assert status == 2
    assert len(err) == 1 and err[0].startswith(f"deeplab-fast: --device {device}: ")
    assert "(expected one of cpu" in err[0] and len(err[0]) < 100


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision(dtype, predict, weights, capsys):
    photo().save("x.png")
    options = ["--weights", weights, "--dtype", dtype]
    assert segment(capsys, "x.png", *options)[0] == 0
    labels = np.asarray(Image.open("segmented/x_labels.png"))
    assert np.array_equal(labels, predict(photo(), getattr(torch, dtype)))


def test_file_name_that_the_terminal_cannot_show(stand_in, capsys, monkeypatch):
    name = os.fsdecode(b"caf\xe9.png")
    photo(8, 8).save(name)
    status, out, _ = segment(capsys, name, "--weights", "any")
    assert status == 0
    assert Path("segmented", os.fsdecode(b"caf\xe9_labels.png")).exists()


@pytest.mark.parametrize(
    "name, label, category, share",
    [("chelsea", 8, "cat", (0.75, 0.95)), ("astronaut", 15, "person", (0.35, 0.5))],
)
def test_real_weights_segment_a_cat_and_a_person(name, label, category, share, shared_data, capsys):
    data = pytest.importorskip("skimage.data", reason="scikit-image has the photos")
    Image.fromarray(getattr(data, name)()).save("photo.png")
    weights = shared_data / "deeplabv3_mobilenet_v2_voc"
    if not weights.is_dir():
        pytest.skip("the real weights are absent")
    status, out, err = segment(capsys, "photo.png", "--weights", weights)
    assert (status, err) == (0, [])
    assert re.search(rf"^ .*% +{category}$", out, re.MULTILINE)
    labels = np.asarray(Image.open("segmented/photo_labels.png"))
    assert share[0] < (labels == label).mean() < share[1]
    assert np.isin(labels, (0, label)).mean() > 0.9
