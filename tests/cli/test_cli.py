"""Command line: segment on images of every format, its errors, and info."""

from __future__ import annotations

import dataclasses
import errno
import functools
import math
import os
import re
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn

import deeplab_fast
from deeplab_fast import _C
from deeplab_fast._io.palette import label_image, overlay, voc_palette
from deeplab_fast.backends import dispatch_table, registry
from deeplab_fast.cli import images as cli_images
from deeplab_fast.cli import main
from deeplab_fast.cli.errors import UserError
from deeplab_fast.cli.processes import process_group
from deeplab_fast.models import DeepLabV3, DeepLabV3Plus, Preprocessing
from deeplab_fast.models.preprocessing import network_size
from deeplab_fast.training import TrainingError, distributed

CLASSES = 5


pytestmark = pytest.mark.usefixtures("one_thread")


def whole(preprocessing: Preprocessing) -> Preprocessing:
    """The preprocessing without its crop, as in the command line."""
    return dataclasses.replace(preprocessing, crop=None)


@pytest.fixture(scope="module")
def model() -> DeepLabV3:
    """A small random model, normalised such that photo() has all its classes."""
    torch.manual_seed(0)
    model = DeepLabV3("mobilenet_v2", CLASSES, 16, atrous_rates=(), head_conv=False, norm_eps=0.1)
    model.preprocessing = Preprocessing(resize=64, crop=(64, 64))
    model.categories = ("background", "apple", "pear", "plum", "quince")
    images = whole(model.preprocessing)(photo())[None]
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
    model(torch.cat([images, images.flip(2, 3)]))
    logits = model.eval().logits(images)["out"].detach()
    model.classifier[-1].bias.data -= logits.mean((0, 2, 3))
    return model


@pytest.fixture(scope="module")
def predict(model):
    """The Python interface: labels [H, W] of a whole image."""
    prepare = functools.cache(model.prepare_for_inference)

    def predict(image: Image.Image, dtype: torch.dtype = torch.float32) -> np.ndarray:
        pixels = whole(model.preprocessing)(image)
        return prepare(dtype).predict(pixels, size=(image.height, image.width)).numpy()

    return predict


@pytest.fixture(scope="module")
def weights(model, tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("weights") / "tiny.safetensors"
    model.save_pretrained(path)
    return str(path)


@pytest.fixture
def stand_in(monkeypatch) -> None:
    """Replace the network by one that labels everything class 1."""

    class Everything:
        def __init__(self, weights: str, device: torch.device, dtype: torch.dtype) -> None:
            pass

        def __call__(self, photo: Image.Image) -> np.ndarray:
            return np.ones((photo.height, photo.width), dtype=np.uint8)

        def name(self, label: int) -> str:
            return "everything"

    monkeypatch.setattr("deeplab_fast.cli.segment.Segmenter", Everything)


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def photo(width: int = 96, height: int = 72) -> Image.Image:
    """An image of random blocks."""
    pixels = np.random.default_rng(0).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((width, height), Image.Resampling.NEAREST)


def segment(capsys, *arguments: object) -> tuple[int, str, list[str]]:
    """Exit status, stdout and the lines of stderr of ``deeplab-fast segment ARGUMENTS``.

    It runs on the CPU by default: other devices round otherwise, and labels are compared with those
    of the CPU.
    """
    status = main(["segment", "--device", "cpu", *map(str, arguments)])
    out, err = capsys.readouterr()
    assert all(line.startswith("deeplab-fast: ") for line in err.splitlines()), err
    return status, out, err.splitlines()


def files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


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


def test_console_script(capsys):
    (script,) = entry_points(group="console_scripts", name="deeplab-fast")
    with pytest.raises(SystemExit) as exit:
        script.load()(["--version"])
    assert not exit.value.code
    assert capsys.readouterr().out == f"deeplab-fast {deeplab_fast.__version__}\n"


def test_closed_pipe_is_not_reported():
    command = [sys.executable, "-I", "-m", "deeplab_fast", "info"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait() == 1


def test_full_disk_is_reported():
    command = [sys.executable, "-I", "-m", "deeplab_fast", "info"]
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 1
    assert done.stderr == "deeplab-fast: [Errno 28] No space left on device\n"


def test_results_have_the_labels_in_the_voc_palette(predict, weights, folder, capsys):
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
    assert np.array_equal(np.asarray(painted), np.asarray(overlay(image, labels)))


def test_overlay():
    grey = Image.new("RGB", (7, 2), (100, 100, 100))
    labels = np.array([[0, 0, 1, 1, 15, 15, 15]] * 2, dtype=np.uint8)
    plain, white, red, pink = [100] * 3, [255] * 3, [117, 40, 40], [155, 117, 117]
    expected = [plain, plain, white, red, white, pink, pink]
    painted = np.asarray(overlay(grey, labels)).astype(int)
    assert np.abs(painted - [expected] * 2).max() <= 1
    painted = np.asarray(overlay(grey.transpose(Image.Transpose.TRANSPOSE), labels.T)).astype(int)
    assert np.abs(painted - [[colour] * 2 for colour in expected]).max() <= 1


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
    assert len(np.unique(palette, axis=0)) == 256


def test_more_classes_than_a_palette_has():
    labels = np.array([[0, 1, 255, 256, 511, 65535]], dtype=np.int32)
    label_image(labels).save("labels.png")
    assert np.array_equal(np.asarray(Image.open("labels.png")), labels)
    small = np.array([[0, 1, 255, 1, 1, 255]], dtype=np.uint8)
    large, small = (
        np.repeat(x, 2, axis=1) for x in (labels, small)
    )  # so that there are pixels beside outlines
    black = Image.new("RGB", (12, 1))
    colours = np.asarray(overlay(black, large))[0, 1::2]
    assert np.array_equal(colours, np.asarray(overlay(black, small))[0, 1::2])


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
    assert status == 1
    assert len(err) == 1 and err[0].startswith("deeplab-fast: photo.png: too large: Image size")


def test_out_of_memory(stand_in, monkeypatch, capsys):
    photo().save("photo.png")

    def allocate(*arguments):
        torch.empty(2**62, dtype=torch.uint8)

    monkeypatch.setattr("deeplab_fast.cli.segment.Segmenter.__call__", allocate)
    status, _, err = segment(capsys, "photo.png", "--weights", "any")
    assert (status, err) == (
        1,
        ["deeplab-fast: photo.png: not enough memory (expected a smaller image)"],
    )


def test_only_rank_zero_reports_an_error_of_training(monkeypatch):
    for rank, error in ((0, UserError), (1, SystemExit)):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        with pytest.raises(error) as caught, process_group("cpu"):
            raise TrainingError("a.png: damaged")
        assert str(caught.value) == ("2" if rank else "a.png: damaged")


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
        return [str(p.relative_to(folder)) for p in cli_images.find_images(argument, folder / "o")]

    assert find("*/1.png") == ["a/1.png", "b/1.png"]
    assert find("[ab]") == find("**/*.png") == ["a/1.png", "a/2.png", "b/1.png", "b/[x].png"]
    assert find("b/[x].png") == ["b/[x].png"]  # an existing file is not a glob


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


@pytest.mark.parametrize(
    "arguments", [[], ["paint"], ["segment"], ["segment", "x", "--dtype", "i"]]
)
def test_wrong_arguments(arguments, capsys):
    with pytest.raises(SystemExit) as exit:
        main(arguments)
    assert exit.value.code == 2
    assert "usage: deeplab-fast" in capsys.readouterr().err


def test_file_name_that_the_terminal_cannot_show(stand_in, capsys, monkeypatch):
    name = os.fsdecode(b"caf\xe9.png")
    photo(8, 8).save(name)
    status, out, _ = segment(capsys, name, "--weights", "any")
    assert status == 0
    assert Path("segmented", os.fsdecode(b"caf\xe9_labels.png")).exists()


@pytest.mark.parametrize(
    "size, resize, align_corners, expected",
    [
        ((640, 480), 520, False, (693, 520)),
        ((480, 640), 520, False, (520, 693)),
        ((640, 480), None, False, (640, 480)),
        ((640, 480), 513, True, (689, 513)),
        ((512, 512), 513, True, (513, 513)),
        ((451, 300), 513, True, (769, 513)),
        ((1, 1), 513, True, (513, 513)),
        ((100, 25), 520, False, (2080, 520)),
        ((1000, 25), 520, False, (2080, 52)),
        ((10**6, 1), 520, False, (2080, 1)),
        ((10**6, 1), 513, True, (2049, 1)),
        ((7, 9), None, True, (1, 17)),
    ],
)
def test_network_size(size, resize, align_corners, expected):
    assert network_size(size, resize, align_corners) == expected


def test_info(capsys):
    assert main(["info"]) == 0
    out = capsys.readouterr().out
    for fact in (
        deeplab_fast.__version__,
        torch.__version__,
        _C.build_info()["compiler"],
        "python",
        "triton",
    ):
        assert fact in out
    on_cpu = out.split("\nOn ")[1]
    assert on_cpu.startswith(f"cpu, in order of preference: {', '.join(registry.order('cpu'))}\n")
    ran = {line.split()[0]: line.split()[1] for line in on_cpu.splitlines()[1:] if line}
    assert set(ran) == {*registry.NAMES, *registry.ops()}
    for op in registry.ops():
        can_run = [n for n in registry.order("cpu") if n in registry.backends_of(op)]
        assert ran[op] == can_run[0]


def test_info_says_where_the_dispatch_tables_are_without_a_gpu(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert main(["info"]) == 0
    out = capsys.readouterr().out
    assert f"  shipped with the package: {dispatch_table.PATH}\n" in out
    assert f"  your own: {dispatch_table.user_path()}\n" in out


def test_info_gives_the_reason(monkeypatch, capsys):
    changed = registry._backends["cpu"]._replace(
        unavailable_reason=lambda device: "the moon is full"
    )
    monkeypatch.setitem(registry._backends, "cpu", changed)
    monkeypatch.delitem(registry._kernels["aspp"], "cpu")
    assert main(["info"]) == 0
    on_cpu = capsys.readouterr().out.split("\nOn ")[1].splitlines()
    lines = {line.split()[0]: line for line in on_cpu if line}
    assert lines["cpu"].endswith("the moon is full")
    assert "reference (cpu: the moon is full)" in lines["upsample_argmax"]
    assert "reference (cpu: it has no aspp kernel)" in lines["aspp"]


def test_info_prints_the_dispatch_table(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    gpu = SimpleNamespace(
        name="A GPU", major=9, minor=0, multi_processor_count=132, total_memory=2**37
    )
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: gpu)
    monkeypatch.setattr(dispatch_table, "device_class", lambda device: "sm_90 with 132 SMs")
    monkeypatch.setattr(dispatch_table, "PATH", tmp_path / "shipped.csv")
    monkeypatch.setattr(dispatch_table, "user_path", lambda: tmp_path / "cache" / "yours.csv")
    dispatch_table.write(dispatch_table.PATH, [])
    dispatch_table.fastest_kernels.cache_clear()
    for name in ("cuda", "cuda/sm90", "cuda/sm80", "triton"):
        changed = registry._backends[name]._replace(unavailable_reason=lambda device_type: None)
        monkeypatch.setitem(registry._backends, name, changed)
    assert main(["info"]) == 0
    out = capsys.readouterr().out
    on_gpu = {line.split()[0]: line for line in out.split("\nOn ")[2].splitlines() if line}
    assert on_gpu["aspp"].endswith("the fastest measured kernel, otherwise reference (cuDNN)")
    assert on_gpu["upsample_argmax"].split()[1] == "cuda"
    assert "Dispatch table for cuda:0, sm_90 with 132 SMs:\n" in out
    assert f"  shipped with the package: 0 rows in {tmp_path}/shipped.csv\n" in out
    assert f"  your own: 0 rows in {tmp_path}/cache/yours.csv\n" in out
    assert "  deeplab-fast tune measures the convolutions of a model\n" in out

    def row(bucket, kernel, ms, device="sm_90 with 132 SMs", versions=None, date="2026-11-30"):
        versions = dispatch_table.versions() if versions is None else versions
        return dispatch_table.Row(
            device, "aspp", bucket, kernel, ms, 0.063, "1x8x5x5", "A GPU", versions, "-", date
        )

    shipped = [
        row("a bucket", "cuda/sm90", 0.05), row("another", "triton", math.inf, versions="any"),
        row("another", "triton", 0.07, device="sm_80 with 108 SMs"),
    ]  # fmt: skip
    dispatch_table.write(dispatch_table.PATH, shipped)
    yours = [
        row("a bucket", "cuda/sm90", 0.04, date="2026-12-01"), row("a third", "cuda/sm90", 0.06),
        row("another", "triton", 0.01, versions="old"),
    ]  # fmt: skip
    dispatch_table.add(yours)
    assert main(["info"]) == 0
    out = capsys.readouterr().out
    assert f"  shipped with the package: 2 rows in {tmp_path}/shipped.csv\n" in out
    assert f"  your own: 2 rows in {tmp_path}/cache/yours.csv, and 1 out of date\n" in out
    assert "  aspp, 3 shape buckets: cuda/sm90 for 2, reference for 1\n" in out
    assert "another" not in out
    assert main(["info", "--dispatch-table"]) == 0
    lines = capsys.readouterr().out.splitlines()
    begin = lines.index("    cuda/sm90   a bucket")
    assert lines[begin + 1 : begin + 6] == [
        "      cuda/sm90    0.0400 ms, cuDNN    0.0630 ms, yours   2026-12-01: 1x8x5x5",
        "    reference   another",
        "      triton          failed, cuDNN    0.0630 ms, shipped 2026-11-30: 1x8x5x5",
        "    cuda/sm90   a third",
        "      cuda/sm90    0.0600 ms, cuDNN    0.0630 ms, yours   2026-11-30: 1x8x5x5",
    ]

    dispatch_table.PATH.write_text("device\n")
    dispatch_table.fastest_kernels.cache_clear()
    assert main(["info"]) == 2
    assert capsys.readouterr().err.startswith(f"deeplab-fast: {tmp_path}/shipped.csv: expected the")
    dispatch_table.fastest_kernels.cache_clear()


def test_info_explains_a_model(weights, capsys):
    shape = ["--size", "33", "47", "--batch", "2", "--device", "cpu"]
    assert main(["info", "--model", str(weights), *shape]) == 0
    title, first, *_, last = capsys.readouterr().out.splitlines()
    assert title.split() == ["layer", "op", "shapes", "backend", "evidence"]
    assert first.split()[:3] == ["backbone.features.0.0", "fused_conv2d", "2x3x33x47,"]
    assert " float32 " in first and first.endswith("fixed order: cpu, reference")
    assert last.split()[:2] == ["(model)", "upsample_argmax"]
    assert main(["info", "--model", str(weights), *shape, "--dtype", "bfloat16"]) == 0
    assert " bfloat16 " in capsys.readouterr().out.splitlines()[1]


def test_deeplabv3plus_is_segmented_and_explained(tmp_path, capsys):
    torch.manual_seed(0)
    model = DeepLabV3Plus("mobilenet_v2", 3, atrous_rates=(2,), separable=True, aspp_channels=8)
    model.preprocessing = Preprocessing(resize=64)
    path = tmp_path / "plus.safetensors"
    model.eval().save_pretrained(path)
    photo().save(tmp_path / "photo.png")
    status, out, err = segment(
        capsys, tmp_path / "photo.png", "--weights", path, "--output", tmp_path / "segmented"
    )
    assert (status, err) == (0, [])
    labels = np.asarray(Image.open(tmp_path / "segmented" / "photo_labels.png"))
    expected = model.predict(model.preprocessing(photo()), size=labels.shape)
    assert (labels == expected.numpy()).mean() > 0.99  # prepared for inference, it rounds elsewhere
    shape = ["--size", "33", "47", "--device", "cpu"]
    assert main(["info", "--model", str(path), *shape]) == 0
    layers = [line.split()[0] for line in capsys.readouterr().out.splitlines()[1:]]
    assert layers[-1] == "(model)" and any("classifier.0" in layer for layer in layers)
    assert main(["tune", str(path), *shape]) == 0
    assert "nothing to tune on cpu" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--model", "a.pth"], "expected --model WEIGHTS and --size HEIGHT WIDTH together"),
        (["--size", "5", "5"], "expected --model WEIGHTS and --size HEIGHT WIDTH together"),
        (["--model", "a.pth", "--size", "5", "0"], "--size: got 5 0 (expected positive integers)"),
        (["--model", "a.pth", "--size", "5", "5", "--batch", "0"], "--batch: got 0 (expected pos"),
        (["--model", "a.pth", "--size", "5", "5"], "deeplab-fast: --model: "),
    ],
)
def test_info_with_wrong_arguments(arguments, message, capsys):
    assert main(["info", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_info_of_one_subject_at_a_time(capsys):
    with pytest.raises(SystemExit):
        main(["info", "--model", "a.pth", "--size", "5", "5", "--dispatch-table"])
    assert "--dispatch-table: not allowed with argument --model" in capsys.readouterr().err


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
