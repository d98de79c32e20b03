"""Image files: finding, decoding and writing them. Videos are found with them."""

from __future__ import annotations

import contextlib
import glob
import io
import os
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from .._io.files import replacing
from .._io.images import ImageError, foreign_extensions, image_extensions, read_photo
from .._io.video import VideoError, import_av
from .errors import UserError, reason

STDIN = Path("-")  # stands for the image on standard input


# Without .ts, which in most folders is TypeScript.
VIDEO_EXTENSIONS = (
    ".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".mts", ".m2ts", ".wmv",
    ".flv", ".3gp", ".ogv",
)  # fmt: skip
VIDEO_EXTRA = 'pip install "deeplab-fast[video]"'


class Found(NamedTuple):
    """Files of a search.

    Attributes:
        images: images, and videos if PyAV is installed.
        foreign: how many files with each extension are photos in a format we cannot read.
        videos: how many videos there are that cannot be read without PyAV.
    """

    images: list[Path]
    foreign: Counter[str]
    videos: int


def find_images(argument: str, output: Path) -> Found:
    """The images and videos of a file, folder or glob, sorted, as absolute paths.

    Folders are searched recursively, through links too, except for hidden names and for ``output``,
    which has the results of earlier runs. A glob is expanded as by a shell.

    Raises:
        UserError: there are none, or a folder cannot be read.
    """
    if glob.has_magic(argument) and not os.path.lexists(argument):
        matches = glob.glob(argument, recursive=True)
    else:
        matches = [argument]
    extensions = image_extensions()
    images: set[Path] = set()
    foreign: set[Path] = set()
    videos: set[Path] = set()
    for match in matches:
        path = Path(os.path.abspath(match))
        if not match or not os.path.exists(path):
            raise UserError("no such file (expected an image, a folder or a glob)")
        if not path.is_dir():
            images.add(path)
            continue
        for found in _search(path, output):
            if found.name.lower().endswith(extensions):
                images.add(found)
            elif found.name.lower().endswith(VIDEO_EXTENSIONS):
                (images if can_read_videos() else videos).add(found)
            elif found.name.lower().endswith(foreign_extensions()):
                foreign.add(found)
    counts = Counter(path.suffix.lower() for path in foreign)
    if not images and counts:
        raise UserError(f"no image there but {foreign_files(counts)}")
    if not images and videos:
        raise UserError(f"no image there but {unread_videos(len(videos))}")
    if not images:
        raise UserError(f"no image there (expected {' '.join(extensions)})")
    return Found(sorted(images), counts, len(videos))


def can_read_videos() -> bool:
    """True if PyAV is installed."""
    with contextlib.suppress(VideoError):
        return bool(import_av())
    return False


def unread_videos(count: int) -> str:
    """A message about videos that cannot be read without PyAV.

    >>> unread_videos(2)
    '2 videos (expected pip install "deeplab-fast[video]")'
    """
    return f"{count} video{'' if count == 1 else 's'} (expected {VIDEO_EXTRA})"


def foreign_files(counts: Counter[str]) -> str:
    """A message about files of formats that we cannot read.

    >>> foreign_files(Counter({".heic": 3}))
    '3 .heic files (expected .jpg .jpeg .png ...: convert them first, with ImageMagick for example)'
    """
    files = " and ".join(f"{count} {end}" for end, count in sorted(counts.items()))
    return (
        f"{files} file{'' if counts.total() == 1 else 's'} (expected "
        f"{' '.join(image_extensions())}: convert them first, with ImageMagick for example)"
    )


def _search(folder: Path, output: Path) -> Iterator[Path]:
    """All files of a folder. Links to folders are followed last, and each folder is read once."""

    def fail(error: OSError) -> None:
        raise UserError(f"{error.filename}: {reason(error)} (expected a readable folder)")

    above = {os.path.realpath(parent) for parent in Path(os.path.realpath(folder)).parents}
    seen = above | {os.path.realpath(output)} - {os.path.realpath(folder)}
    starts = [folder]
    for start in starts:
        for root, folders, files in os.walk(start, onerror=fail):
            if os.path.realpath(root) in seen:
                folders.clear()
                continue
            seen.add(os.path.realpath(root))
            folders[:] = sorted(name for name in folders if name[0] != ".")
            links = [name for name in folders if os.path.islink(os.path.join(root, name))]
            starts += (Path(root, name) for name in links)
            folders[:] = [name for name in folders if name not in links]
            yield from (Path(root, name) for name in files if name[0] != ".")


def result_names(images: Sequence[Path]) -> dict[Path, Path]:
    """The name of the results of each image: its path below the deepest common folder.

    The extension is removed, unless two images would then have the same name. The image on standard
    input is called "stdin", and a camera "camera0".

    >>> result_names([Path("/a/x.jpg"), Path("/b/x.jpg"), Path("/b/x.png")]).values()
    [Path("a/x"), Path("b/x.jpg"), Path("b/x.png")]
    """
    folders = [image.parent for image in images if image.is_absolute()]
    base = os.path.commonpath(folders) if folders else ""
    full = {
        image: image.relative_to(base) if image.is_absolute() else _name_of_device(image)
        for image in images
    }
    names = {image: Path(os.path.splitext(name)[0]) for image, name in full.items()}
    while clashes := [name for name, uses in Counter(names.values()).items() if uses > 1]:
        names.update((image, full[image]) for image in images if names[image] in clashes)
    return names


def _name_of_device(image: Path) -> Path:
    return Path("stdin" if image == STDIN else str(image).replace(":", ""))


def shown(path: Path) -> str:
    """A path in messages: relative, or "standard input", or the name of a camera."""
    return "standard input" if path == STDIN else os.path.relpath(path)


def read_image(path: Path) -> Image.Image:
    """Decode the first frame of an image to RGB, upright, with transparency on white.

    Raises:
        UserError: the image cannot be read. The message gives the reason, without the path.
    """
    try:
        return read_photo(io.BytesIO(sys.stdin.buffer.read()) if path == STDIN else path)
    except ImageError as error:
        raise UserError(str(error)) from None


def write_png(image: Image.Image, path: Path) -> None:
    """Write a PNG completely, or leave the previous file unchanged."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as partial:
        image.save(partial, format="PNG")


def write_npz(arrays: dict[str, np.ndarray], path: Path) -> None:
    """Write an uncompressed .npz file completely, or leave the previous file unchanged."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as partial, open(partial, "wb") as file:
        np.savez(file, **arrays)  # type: ignore[arg-type]


def add_max_pixels(parser: Any) -> None:
    parser.add_argument(
        "--max-pixels",
        type=int,
        metavar="N",
        help="pixels of the largest image to read (default: 178956970, as in Pillow)",
    )


@contextlib.contextmanager
def max_pixels(limit: int | None) -> Iterator[None]:
    """Let Pillow read images of up to ``limit`` pixels in the block.

    Raises:
        UserError: the limit is not positive.
    """
    if limit is None:
        yield
        return
    if limit < 1:
        raise UserError(f"--max-pixels {limit}: expected a positive number")
    before = Image.MAX_IMAGE_PIXELS
    try:
        Image.MAX_IMAGE_PIXELS = limit / 2  # type: ignore[assignment]  # it only warns below twice
        yield
    finally:
        Image.MAX_IMAGE_PIXELS = before
