"""Image files: finding, decoding and writing them."""

from __future__ import annotations

import glob
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from PIL import Image

from .._io.files import replacing
from .._io.images import ImageError, read_photo
from .errors import UserError, reason

_EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif")


def find_images(argument: str, output: Path) -> list[Path]:
    """The images of a file, folder or glob, sorted, as absolute paths.

    Folders are searched recursively, except for hidden names and for ``output``, which has the
    results of earlier runs. A glob is expanded as by a shell.

    Raises:
        UserError: there are none, or a folder cannot be read.
    """
    if glob.has_magic(argument) and not os.path.lexists(argument):
        matches = glob.glob(argument, recursive=True)
    else:
        matches = [argument]
    images: set[Path] = set()
    for match in matches:
        path = Path(os.path.abspath(match))
        if not os.path.exists(path):
            raise UserError("no such file (expected an image, a folder or a glob)")
        images.update(_search(path, output) if path.is_dir() else [path])
    if not images:
        raise UserError(f"no image there (expected {' '.join(_EXTENSIONS)})")
    return sorted(images)


def _search(folder: Path, output: Path) -> Iterator[Path]:
    def fail(error: OSError) -> None:
        raise UserError(f"{error.filename}: {reason(error)} (expected a readable folder)")

    for root, folders, files in os.walk(folder, onerror=fail):
        folders[:] = [name for name in folders if name[0] != "." and Path(root, name) != output]
        for name in files:
            if name[0] != "." and name.lower().endswith(_EXTENSIONS):
                yield Path(root, name)


def result_names(images: Sequence[Path]) -> dict[Path, Path]:
    """The name of the results of each image: its path below the deepest common folder.

    The extension is removed, unless two images would then have the same name.

    >>> result_names([Path("/a/x.jpg"), Path("/b/x.jpg"), Path("/b/x.png")]).values()
    [Path("a/x"), Path("b/x.jpg"), Path("b/x.png")]
    """
    base = os.path.commonpath([image.parent for image in images])
    full = {image: image.relative_to(base) for image in images}
    names = {image: Path(os.path.splitext(name)[0]) for image, name in full.items()}
    while clashes := [name for name, uses in Counter(names.values()).items() if uses > 1]:
        names.update((image, full[image]) for image in images if names[image] in clashes)
    return names


def read_image(path: Path) -> Image.Image:
    """Decode the first frame of an image to RGB, upright, with transparency on white.

    Raises:
        UserError: the image cannot be read. The message gives the reason, without the path.
    """
    try:
        return read_photo(path)
    except ImageError as error:
        raise UserError(str(error)) from None


def write_png(image: Image.Image, path: Path) -> None:
    """Write a PNG completely, or leave the previous file unchanged."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as partial:
        image.save(partial, format="PNG")
