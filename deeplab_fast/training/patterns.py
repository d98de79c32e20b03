"""Pairs of images and labels whose paths follow patterns."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import Path, PurePosixPath

from PIL import Image

from .._io.folders import files_below
from .data import SegmentationData
from .errors import TrainingError

_IMAGES = (
    ".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".avif", ".jp2", ".j2k",
)  # fmt: skip
_UNREADABLE = (".heic", ".heif", ".hif", ".jxl")  # photos that Pillow reads with a plugin only
_LABELS = (".png", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".pgm")
_NUM_NAMES_SHOWN = 5


class Pattern:
    """Paths with a name in them, such as ``labels/{split}/{name}_mask.png``.

    The name may contain subfolders. It may occur several times, as in ``{name}/{name}.png``.
    Without a file extension, all image formats follow the pattern.

    Args:
        argument: name of the argument, for error messages.
        text: the pattern, relative to ``root``.
        root: folder of the data set.
        split: the text for ``{split}``.

    Raises:
        TrainingError: the pattern has no ``{name}``.
    """

    def __init__(self, argument: str, text: str, root: Path, split: str) -> None:
        self.text = text
        filled = text.replace("{split}", split)
        if "{name}" not in filled or "{" in filled.replace("{name}", ""):
            raise TrainingError(
                f"{argument}: expected a pattern such as 'masks/{{split}}/{{name}}.png', got "
                f"{text!r}"
            )
        self.path = (root / filled).as_posix()
        self.has_extension = PurePosixPath(filled).suffix not in ("", ".")
        ending = "" if self.has_extension else "|".join(map(re.escape, _IMAGES + _UNREADABLE))
        first, *others = self.path.split("{name}")
        regex = re.escape(first) + "(?P<name>.+)" + "(?P=name)".join(map(re.escape, others))
        self._regex = re.compile(f"{regex}(?:{ending})", re.IGNORECASE | re.DOTALL)

    @property
    def folder(self) -> Path:
        """The innermost folder that has all files."""
        return Path(self.path.split("{name}")[0] + "x").parent

    def name_of(self, path: Path) -> str | None:
        """The name in a path, or None if the path does not follow the pattern."""
        match = self._regex.fullmatch(path.as_posix())
        return match and match["name"]

    def path_of(self, name: str) -> Path:
        """The path with a name. The pattern has a file extension."""
        return Path(self.path.replace("{name}", name))


def find_pairs(images: Pattern, labels: Pattern) -> list[tuple[Path, Path]]:
    """All images of a pattern, in order, and the paths of their labels, which may not exist.

    Files that follow the pattern of the labels are no images.

    Raises:
        TrainingError: a folder cannot be read, or there are no images.
    """
    if not labels.has_extension:
        raise TrainingError(f"labels: expected a file extension, got {labels.text!r}")
    if images.path == labels.path:
        raise TrainingError(f"labels: expected another pattern than that of images, {images.text}")
    if not images.folder.is_dir():
        raise TrainingError(
            f"{images.folder}: no such folder (expected images; `images` and `labels` say where "
            "they are, as patterns such as '{split}/{name}.jpg')"
        )
    try:
        files = [path for path in files_below(images.folder) if labels.name_of(path) is None]
    except OSError as error:
        raise TrainingError(
            f"{error.filename}: {error.strerror} (expected a readable folder)"
        ) from error
    names = {path: name for path in sorted(files) if (name := images.name_of(path))}
    if not names:
        raise TrainingError(
            f"{images.folder}: no images like {images.text} (expected at least one)"
        )
    unreadable = [path for path in names if path.suffix.lower() in _UNREADABLE]
    unreadable = [path for path in unreadable if not _is_readable(path)]
    if unreadable:
        raise TrainingError(
            f"{unreadable[0]}: not readable, as {len(unreadable)} of {len(names)} images "
            "(expected JPEG, PNG, ...: convert HEIC and JPEG XL first)"
        )
    return [(path, labels.path_of(name)) for path, name in names.items()]


def image_of(stem: Path) -> Path:
    """The image file with this path without an extension; ``.jpg`` if there is none."""
    paths = [Path(f"{stem}{ending}") for end in _IMAGES for ending in (end, end.upper())]
    return next(filter(_is_file, paths), paths[0])


def _is_readable(path: Path) -> bool:
    return path.suffix.lower() in Image.registered_extensions()


def check_files(data: SegmentationData) -> SegmentationData:
    """Return ``data``, after checking that all its files exist.

    Raises:
        TrainingError: files are missing; the message has their number and the first names.
    """
    for index, what, expected in (
        (0, "images", "all images that are listed"),
        (1, "labels", "labels for each image"),
    ):
        paths = [pair[index] for pair in data.pairs]
        missing = [path for path in paths if isinstance(path, (str, Path)) and not _is_file(path)]
        if missing:
            more = f"; {len(missing)} of {len(paths)} {what} are missing: {_names(missing)}"
            raise TrainingError(
                f"{missing[0]}: no such file (expected {expected})"
                f"{more if len(missing) > 1 else ''}"
            )
    return data


def check_labels_exist(pairs: list[tuple[Path, Path]], images: Pattern, labels: Pattern) -> None:
    """Raise TrainingError if labels are missing; the message proposes a pattern that has them."""
    missing = [(image, label) for image, label in pairs if not _is_file(label)]
    if not missing:
        return
    image, label = missing[0]
    proposal = _proposal(image, images, labels)
    expected = "labels for each image" if proposal is None else f"`labels` as {proposal!r}"
    count = ""
    if len(missing) > 1:
        names = _names(image for image, _ in missing)
        count = f"; {len(missing)} of {len(pairs)} images have no labels: {names}"
    raise TrainingError(f"{label}: no such file (expected {expected}){count}")


def _is_file(path: str | Path) -> bool:
    return os.path.isfile(path)


def _names(paths: Iterable[str | Path]) -> str:
    """File names as text, the first few of them."""
    names = [Path(path).name for path in paths]
    return ", ".join(names[:_NUM_NAMES_SHOWN]) + (", ..." if names[_NUM_NAMES_SHOWN:] else "")


def _proposal(image: Path, images: Pattern, labels: Pattern) -> str | None:
    """A pattern for labels that exist for ``image``, whose names have another ending."""
    name = images.name_of(image) or ""
    for pattern in (labels, images):
        head, _, tail = pattern.text.rpartition("{name}")
        if "{name}" in head or "/" in tail:  # other endings are looked for only in one folder
            continue
        folder, stem = os.path.split(pattern.path.rpartition("{name}")[0] + name)
        try:
            files = os.listdir(folder)
        except OSError:
            continue
        endings = [file[len(stem) :] for file in files if file.startswith(stem)]
        found = [
            ending
            for ending in endings
            if ending[:1] in (".", "_", "-")
            and ending.lower().endswith(_LABELS)
            and Path(folder, stem + ending) != image
        ]
        if found:
            return f"{head}{{name}}{min(found, key=lambda ending: (len(ending), ending))}"
    return None
