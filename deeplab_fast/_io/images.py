"""Decoding of image files, and conversion to RGB."""

from __future__ import annotations

import contextlib
import logging
import os
import struct
import warnings
from collections.abc import Iterator
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

# EXIF orientation -> transposition that turns the image upright (Exif 2.32, tag 0x0112).
# ImageOps.exif_transpose also rewrites the EXIF data, and fails if they are malformed.
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

_STORED = {6: Image.Transpose.ROTATE_90, 8: Image.Transpose.ROTATE_270}  # where not its own inverse

logging.getLogger("PIL").addHandler(logging.NullHandler())  # its errors are exceptions, too


class ImageError(ValueError):
    """An image cannot be read. The message gives the reason in one line, without the path."""


class Header(NamedTuple):
    """Size (width, height) of an image as it is stored, and its EXIF orientation."""

    size: tuple[int, int]
    orientation: int

    @property
    def is_turned(self) -> bool:
        """True if the orientation says that the image is not upright as it is stored."""
        return self.orientation in _UPRIGHT

    @property
    def upright_size(self) -> tuple[int, int]:
        """Size (width, height) of the upright image."""
        return self.size[::-1] if 5 <= self.orientation <= 8 else self.size


@contextlib.contextmanager
def _opened(source: str | os.PathLike[str] | BinaryIO) -> Iterator[Any]:
    """An image file whose pixels are not yet read. Errors become ImageErrors."""
    path = source if isinstance(source, (str, os.PathLike)) else None
    if path is not None and not os.path.isfile(path):  # opening a named pipe would block
        raise ImageError("no such file, or not a regular one (expected an image)")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow decodes what it can, or raises
            with Image.open(source) as image:
                yield image
    except UnidentifiedImageError:
        empty = path is not None and os.path.getsize(path) == 0
        problem = "the file is empty" if empty else "not an image"
        raise ImageError(f"{problem} (expected JPEG, PNG, WebP, TIFF, ...)") from None
    except Image.DecompressionBombError as error:
        raise ImageError(f"too large: {_reason(error)}") from None
    except MemoryError:
        raise
    except OSError as error:
        if error.errno is not None:  # the operating system's, not Pillow's
            raise ImageError(f"{_reason(error)} (expected a readable image)") from None
        raise ImageError(f"damaged: {_reason(error)} (expected a complete image)") from None
    except Exception as error:  # a damaged file raises anything from struct.error to SyntaxError
        raise ImageError(f"damaged: {_reason(error)} (expected a complete image)") from None


def decode(source: str | os.PathLike[str] | BinaryIO) -> Image.Image:
    """The first frame of an image file as it is stored, in its own mode, with its metadata.

    Raises:
        ImageError: the image cannot be read.
    """
    with _opened(source) as image:
        orientation = _orientation(image) if image.format == "TIFF" else 1
        image.load()
        copy = image.copy()
        if orientation in _UPRIGHT and not is_turned(copy):  # Pillow turns TIFF images upright
            copy = copy.transpose(_STORED.get(orientation, _UPRIGHT[orientation]))
            copy.getexif()[ExifTags.Base.Orientation] = orientation
        copy.format = image.format
        return copy


def read_header(path: str | os.PathLike[str]) -> Header:
    """Size and EXIF orientation of an image file. The pixels are not read.

    Raises:
        ImageError: the image cannot be read.
    """
    with _opened(path) as image:
        size = image.size
        if image.format == "TIFF":  # Pillow gives the size of the upright image
            size = image.tag_v2[ExifTags.Base.ImageWidth], image.tag_v2[ExifTags.Base.ImageLength]
        return Header(size, _orientation(image))


def header_of(image: Image.Image) -> Header:
    """Header of an image that :func:`decode` has read."""
    return Header(image.size, image.getexif().get(ExifTags.Base.Orientation, 1))


def _orientation(image: Any) -> int:
    """EXIF orientation of an image file, 1 if it has none. The pixels are not read."""
    if image.format == "PNG":  # the method of PNG images reads the pixels, which EXIF may follow
        if "exif" not in image.info and (exif := _last_exif_chunk(image.fp)):
            image.info["exif"] = exif
        return Image.Image.getexif(image).get(ExifTags.Base.Orientation, 1)
    return image.getexif().get(ExifTags.Base.Orientation, 1)


def _last_exif_chunk(file: BinaryIO) -> bytes:
    """Content of a PNG file's eXIf chunk behind the pixels, or nothing."""
    found = b""
    file.seek(8)
    while len(head := file.read(8)) == 8 and head[4:] != b"IEND":
        length = struct.unpack(">I", head[:4])[0]
        if head[4:] == b"eXIf":
            found = file.read(length)
            length = 0
        file.seek(length + 4, os.SEEK_CUR)
    return found


def _reason(error: BaseException) -> str:
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return " ".join(text.split()) or type(error).__name__


def turn(image: Image.Image, orientation: int) -> Image.Image:
    """``image`` turned upright from the way it is stored with an EXIF orientation of 2 to 8."""
    return image.transpose(_UPRIGHT[orientation])


def forget_orientation(image: Image.Image) -> None:
    """Remove EXIF and XMP data from ``image``, so that nothing turns it again."""
    image.getexif().clear()
    for key in ("exif", "xmp", "XML:com.adobe.xmp", "Raw profile type exif"):
        image.info.pop(key, None)


def is_turned(image: Image.Image) -> bool:
    """True if the EXIF orientation of ``image`` says that it is not upright as it is stored."""
    return image.getexif().get(ExifTags.Base.Orientation) in _UPRIGHT


def upright(image: Image.Image) -> Image.Image:
    """``image`` turned as its EXIF orientation says; without metadata if it was turned."""
    if not is_turned(image):
        return image
    turned = turn(image, image.getexif()[ExifTags.Base.Orientation])
    forget_orientation(turned)
    return turned


def read_photo(source: str | os.PathLike[str] | BinaryIO) -> Image.Image:
    """The first frame of an image file in RGB, upright, with transparency on white.

    Raises:
        ImageError: the image cannot be read.

    >>> read_photo("photo.jpg").mode
    'RGB'
    """
    return photo_of(decode(source))


def photo_of(image: Image.Image) -> Image.Image:
    """``image`` in RGB, upright, with transparency on white.

    Raises:
        ImageError: the image has 32 bits per channel.
    """
    return to_rgb(upright(image))


def to_rgb(image: Image.Image) -> Image.Image:
    """``image`` in 8-bit RGB: 16 bits are scaled, and transparent pixels become white.

    The result is ``image`` itself if there is nothing to convert.

    Raises:
        ImageError: the image has 32 bits per channel, whose range is unknown.

    >>> to_rgb(Image.open("photo.png")).mode
    'RGB'
    """
    if image.mode.startswith("I;16"):
        return Image.fromarray((np.asarray(image) / 257).round().astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        raise ImageError(f"32 bits per channel, mode {image.mode} (expected 8 or 16)")
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer)
    return image if image.mode == "RGB" else image.convert("RGB")
