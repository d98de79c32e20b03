"""Photos with their classes painted over, and cut-outs of classes.

>>> model = DeepLab.from_pretrained("deeplabv3_resnet50").prepare_for_inference()
>>> painting = painting_of(model.categories, 21)
>>> labels = painting.keep_only(model.segment(frame))  # frame: uint8 [H, W, 3], RGB
>>> overlay(Image.fromarray(frame), labels, painting).save("overlay.png")
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from .palette import label_image, palette_of

# Names of the class "nothing of the others", in lower case: PASCAL VOC and COCO (background), label
# tools (__background__, _background_), Cityscapes (unlabeled), CamVid (void, unlabelled).
_BACKGROUND = {"background", "bg", "unlabeled", "unlabelled", "void", "ignore"}
# Numbers of classes of unnamed networks whose class 0 is the background: one foreground class, or
# those of PASCAL VOC.
_WITH_BACKGROUND = (2, 21)


@dataclass(frozen=True)
class Painting:
    """How the classes of a network are drawn; see :func:`painting_of`.

    Attributes:
        names: names of all classes.
        palette: colours of classes 0 to 255, uint8 [256, 3]. Later classes repeat those of classes
            1 to 255.
        background: classes that are left as in the photo.
        only: classes that are drawn and kept in labels, or None for all.
        alpha: opacity of the colours, from 0 to 1.
    """

    names: tuple[str, ...]
    palette: np.ndarray
    background: frozenset[int]
    only: frozenset[int] | None = None
    alpha: float = 0.6

    def draws(self, labels: np.ndarray) -> np.ndarray:
        """True where the class of ``labels`` is painted: bool [H, W]."""
        drawn = np.full(labels.shape, self.only is None)
        for label in self.background if self.only is None else self.only:
            drawn ^= labels == label  # a comparison for each class is faster than a table
        return drawn

    @property
    def other(self) -> int:
        """The label of pixels whose class is not in ``only``.

        It is 0 if class 0 is the background. Otherwise it is the largest value of a label file:
        255, which training and evaluation ignore, or 65535 with more than 255 classes.
        """
        if 0 in self.background and 0 not in (self.only or ()):
            return 0
        return 255 if len(self.names) <= 255 else 65535

    def keep_only(self, labels: np.ndarray) -> np.ndarray:
        """``labels`` [H, W] with :attr:`other` for all classes that are not in ``only``."""
        if self.only is None:
            return labels
        if self.other > 255:
            labels = labels.astype(np.int32)
        return np.where(self.draws(labels), labels, labels.dtype.type(self.other))

    def name(self, label: int) -> str:
        """Name of a class, or "other classes" for :attr:`other` if that is none."""
        return self.names[label] if label < len(self.names) else "other classes"

    def colour_numbers(self, labels: np.ndarray) -> np.ndarray:
        """Indices into ``palette`` of the colours of ``labels``: uint8 of the same shape."""
        if labels.dtype == np.uint8:
            return labels
        return np.where(labels > 255, (labels - 1) % 255 + 1, labels).astype(np.uint8)


def painting_of(
    categories: Sequence[str] | None,
    num_classes: int,
    palette: np.ndarray | None = None,
    only: Iterable[int] | None = None,
    alpha: float = 0.6,
) -> Painting:
    """How the classes of a network are drawn, with the colours of PASCAL VOC by default.

    Classes named "background", "bg", "unlabeled", "void" or "ignore" are the background, which is
    not painted. Without names class 0 is the background if there are 2 classes, or the 21 of PASCAL
    VOC.

    >>> painting = painting_of(("road", "car"), 2, alpha=0.4)
    >>> overlay(photo, model.segment(photo), painting).save("overlay.png")
    """
    background = background_classes(categories, num_classes)
    return Painting(
        tuple(categories or (f"class {label}" for label in range(num_classes))),
        palette_of(0 in background) if palette is None else palette,
        background,
        None if only is None else frozenset(only),
        alpha,
    )


def background_classes(categories: Sequence[str] | None, num_classes: int) -> frozenset[int]:
    """The classes that stand for nothing in particular; see :func:`painting_of`.

    >>> background_classes(("__background__", "cat"), 2)
    frozenset({0})
    """
    if categories is None:
        return frozenset({0} if num_classes in _WITH_BACKGROUND else ())
    names = [name.strip(" _").casefold() for name in categories]
    return frozenset(label for label, name in enumerate(names) if name in _BACKGROUND)


def overlay(photo: Image.Image, labels: np.ndarray, painting: Painting) -> Image.Image:
    """``photo`` (RGB) with its classes in half-transparent colours, outlined in white.

    The background, or what is not in ``painting.only``, is left as in the photo.
    """
    drawn = painting.draws(labels)
    colours = label_image(painting.colour_numbers(labels), painting.palette).convert("RGB")
    blended = Image.blend(photo, colours, painting.alpha)
    painted = Image.composite(blended, photo, Image.fromarray(drawn))
    outline = np.zeros(labels.shape, dtype=bool)
    outline[1:] |= (labels[1:] != labels[:-1]) & (drawn[1:] | drawn[:-1])
    outline[:, 1:] |= (labels[:, 1:] != labels[:, :-1]) & (drawn[:, 1:] | drawn[:, :-1])
    painted.paste("white", mask=Image.fromarray(outline))
    return painted


def cutout(photo: Image.Image, labels: np.ndarray, painting: Painting) -> Image.Image:
    """``photo`` in RGBA, with nothing of it where the overlay would leave it as it is.

    Pixels there are transparent and black, so that the file does not hold what it hides.
    """
    kept = Image.fromarray(painting.draws(labels))
    return Image.composite(photo.convert("RGBA"), Image.new("RGBA", photo.size), kept)
