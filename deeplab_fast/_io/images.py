"""Decoding of image files, and conversion to RGB."""

from __future__ import annotations

import logging
import os
import warnings
from typing import BinaryIO

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


def decode(source: str | os.PathLike[str] | BinaryIO) -> Image.Image:
    """The first frame of an image file as it is stored, in its own mode, with its metadata.

    Raises:
        ImageError: the image cannot be read.
    """
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
                image.load()
                return image.copy()
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


def is_turned(image: Image.Image) -> bool:
    """True if the EXIF orientation of ``image`` says that it is not upright as it is stored."""
    return image.getexif().get(ExifTags.Base.Orientation) in _UPRIGHT


def upright(image: Image.Image) -> Image.Image:
    """``image`` turned as its EXIF orientation says; without metadata if it was turned."""
    if not is_turned(image):
        return image
    turned = image.transpose(_UPRIGHT[image.getexif()[ExifTags.Base.Orientation]])
    turned.getexif().clear()
    turned.info.pop("exif", None)
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
    return image.convert("RGB")
