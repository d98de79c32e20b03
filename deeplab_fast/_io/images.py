"""Decoding of image files, and conversion to RGB."""

from __future__ import annotations

import contextlib
import logging
import os
import struct
import warnings
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError, features

_EXPECTED = "expected JPEG, PNG, WebP, TIFF, ..."
_EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif")
_JPEG_2000 = (".jp2", ".j2k", ".jpx")  # needs a library that some builds of Pillow lack
# Pillow opens most raw files of cameras as TIFF files, and decodes their small preview.
_RAW = (".dng", ".cr2", ".cr3", ".nef", ".arw", ".orf", ".raf", ".rw2")
_FOREIGN = {  # extensions of photos that Pillow cannot read without a plugin, and their format
    **dict.fromkeys(_RAW, "a raw file of a camera"),
    **dict.fromkeys((".heic", ".heif", ".hif"), "HEIC"),
    **dict.fromkeys(_JPEG_2000, "JPEG 2000"),
    ".jxl": "JPEG XL",
}
_HEIC_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"mif1", b"msf1")

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


def image_extensions() -> tuple[str, ...]:
    """Extensions, in lower case, of the images that Pillow can read, also through its plugins."""
    known = Image.registered_extensions()
    foreign = (end for end in _FOREIGN if end in known and not _lacks_decoder(end))
    return (*_EXTENSIONS, *foreign)


def foreign_extensions() -> tuple[str, ...]:
    """Extensions, in lower case, of photos that Pillow cannot read."""
    return tuple(end for end in _FOREIGN if end not in image_extensions())


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
    if path is not None:
        if not os.path.isfile(path):  # opening a named pipe would block
            raise ImageError("no such file, or not a regular one (expected an image)")
        if _lacks_decoder(_extension(path)):
            raise _foreign(_FOREIGN[_extension(path)])
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow decodes what it can, or raises
            with Image.open(source) as image:
                yield image
    except UnidentifiedImageError:
        raise _unidentified(source) from None
    except Image.DecompressionBombError as error:
        size = _reason(error).partition(",")[0].replace(".0 ", " ")
        raise ImageError(
            f"too large: {size} (expected a larger --max-pixels, in Python "
            "PIL.Image.MAX_IMAGE_PIXELS)"
        ) from None
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
    return Header(image.size, _known_orientation(image.getexif))


def _orientation(image: Any) -> int:
    """EXIF orientation of an image file, 1 if it has none. The pixels are not read."""
    if image.format == "PNG":  # the method of PNG images reads the pixels, which EXIF may follow
        if "exif" not in image.info and (exif := _last_exif_chunk(image.fp)):
            image.info["exif"] = exif
        return _known_orientation(lambda: Image.Image.getexif(image))
    return _known_orientation(image.getexif)


def _known_orientation(exif: Callable[[], Image.Exif]) -> int:
    """The orientation in EXIF data, from 1 to 8; 1 if there is none, or the data are malformed."""
    try:
        orientation = exif().get(ExifTags.Base.Orientation)
    except Exception:  # malformed data raise anything from SyntaxError to struct.error
        return 1
    return orientation if isinstance(orientation, int) and orientation in _UPRIGHT else 1


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


def _lacks_decoder(extension: str) -> bool:
    """True if Pillow opens such files and cannot decode them, or only their preview."""
    return extension in _RAW or (extension in _JPEG_2000 and not features.check("jpg_2000"))


def _unidentified(source: str | os.PathLike[str] | BinaryIO) -> ImageError:
    """The error for a file whose format Pillow does not know."""
    if isinstance(source, (str, os.PathLike)):
        extension = _extension(source)
        with open(source, "rb") as file:
            start = file.read(12)
    else:
        extension = ""
        source.seek(0)
        start = source.read(12)
    if start[4:8] == b"ftyp" and start[8:] in _HEIC_BRANDS:  # also under the name of another format
        return _foreign("HEIC")
    if start and extension in _FOREIGN:
        return _foreign(_FOREIGN[extension])
    return ImageError(f"{'not an image' if start else 'the file is empty'} ({_EXPECTED})")


def _foreign(format: str) -> ImageError:
    return ImageError(f"{format} ({_EXPECTED}: convert it first, with ImageMagick for example)")


def _extension(path: str | os.PathLike[str]) -> str:
    return os.path.splitext(os.fsdecode(path))[1].lower()


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
    return header_of(image).is_turned


def upright(image: Image.Image) -> Image.Image:
    """``image`` turned as its EXIF orientation says; without metadata if it was turned."""
    header = header_of(image)
    if not header.is_turned:
        return image
    turned = turn(image, header.orientation)
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
