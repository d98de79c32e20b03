"""Labels from several scales, mirrored images and windows, without full-size maps of all classes.

The logits of each scale are kept at the resolution of the network. Overlapping windows are averaged
at that resolution. Scales are upsampled, converted to probabilities and averaged in strips of rows.
The labels equal those computed from full-size maps.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ops._arguments import int_list, real, wrong_type
from ..ops.upsample_argmax import upsample_argmax
from ..ops.upsample_cross_entropy import with_background

_STRIP = 64  # rows of labels that are computed at a time
_STEP = 16  # windows start at multiples of this number, which the stride of all logits divides


class _LogitMap(NamedTuple):
    """Logits [1, C, h, w] of a view of ``size``, padded below and right to ``covered``."""

    logits: Tensor
    size: tuple[int, int]
    covered: tuple[int, int]


def predict_labels(
    model: Any,
    image: Tensor,
    size: tuple[int, int] | None = None,
    scales: Sequence[float] = (1.0,),
    flip: bool = False,
    window: tuple[int, int] | None = None,
) -> Tensor:
    """The class of every pixel of one image.

    Args:
        model: a :class:`deeplab_fast.DeepLabV3` or :class:`deeplab_fast.DeepLabV3Plus` in
            evaluation mode, or one prepared for inference.
        image: [1, 3, H, W], normalised.
        size: (height, width) of the labels; that of ``image`` by default.
        scales: factors by which the image is resized; the probabilities of all scales are averaged
            (Chen et al. 2017, section 4.1).
        flip: also average over the mirrored image at each scale.
        window: (height, width) of the windows into which the image is divided, in multiples of 16
            (plus 1 with ``align_corners``), such as the crop size of the training. Windows overlap
            by at least a third, and their logits are averaged where they overlap. None for the
            whole image at once.

    Returns:
        uint8 labels, or int32 with more than 256 classes: [height, width].

    Raises:
        ValueError: ``scales`` or ``window`` is out of range.

    >>> labels = predict_labels(model, image, scales=(0.75, 1.0, 1.25), flip=True)
    """
    return ImageLogits(model, image, scales, flip, window).labels(size)


class ImageLogits:
    """Logits of all views of an image, for its labels and probabilities at any size.

    The arguments are those of :func:`predict_labels`.

    >>> logits = ImageLogits(model, image, window=(512, 512))
    >>> labels = logits.labels()
    >>> confidence = torch.cat([strip.amax(0) for strip in logits.probabilities()])
    """

    @torch.no_grad()
    def __init__(
        self,
        model: Any,
        image: Tensor,
        scales: Sequence[float] = (1.0,),
        flip: bool = False,
        window: tuple[int, int] | None = None,
    ) -> None:
        check_views(model, scales, window)
        self.align_corners: bool = model.align_corners
        self.size = image.size(2), image.size(3)
        self.maps: list[tuple[_LogitMap, bool]] = []
        for scale in scales:
            scaled = _scaled(image, scale)
            for view in (scaled, scaled.flip(3)) if flip else (scaled,):
                logit_map = _whole(model, view) if window is None else _windows(model, view, window)
                # Mirrored maps are mirrored back when they are sampled. Their padding is on the
                # right, as in other maps, so the whole map cannot be flipped.
                self.maps.append((logit_map, view is not scaled))

    @torch.no_grad()
    def labels(self, size: tuple[int, int] | None = None) -> Tensor:
        """The class of every pixel: uint8, or int32 with more than 256 classes, [height, width]."""
        size = size or self.size
        classes = self.maps[0][0].logits.size(1)
        dtype = torch.uint8 if classes <= 256 else torch.int32
        if len(self.maps) == 1:  # the argmax of logits suffices, unless they are padded and resized
            logits, seen, covered = self.maps[0][0]
            if seen == covered or seen == size:
                target = size if seen == covered else covered
                labels = upsample_argmax(
                    logits, target, align_corners=self.align_corners, dtype=dtype
                )
                return labels[0, : size[0], : size[1]]
        return torch.cat([strip.argmax(0).to(dtype) for strip in self.probabilities(size)])

    @torch.no_grad()
    def probabilities(self, size: tuple[int, int] | None = None) -> Iterator[Tensor]:
        """Softmax of the logits, averaged over views: strips of rows, [C, rows, width] each."""
        size = size or self.size
        device = self.maps[0][0].logits.device
        for top in range(0, size[0], _STRIP):
            rows = torch.arange(top, min(top + _STRIP, size[0]), device=device)
            total: Any = 0
            for logit_map, mirrored in self.maps:
                total = total + _probabilities(
                    logit_map, rows, size, mirrored, int(self.align_corners)
                )
            yield total[0] / len(self.maps)


def check_views(model: Any, scales: Sequence[float], window: tuple[int, int] | None) -> None:
    """Raise ValueError or TypeError if an option of :func:`predict_labels` is wrong."""
    if not isinstance(scales, Sequence) or isinstance(scales, str):
        raise wrong_type("scales", "a list of numbers", scales)
    if not scales or not all(0 < real(scale, "scales") < math.inf for scale in scales):
        raise ValueError(f"scales: expected positive numbers, got {tuple(scales)}")
    if window is None:
        return
    sides = int_list(window, "window")
    extra = int(model.align_corners)
    if len(sides) != 2 or any(side < _STEP or side % _STEP != extra for side in sides):
        multiples = f"multiples of {_STEP}" + (", plus 1" if extra else "")
        raise ValueError(f"window: expected a height and width in {multiples}, got {tuple(sides)}")


def _scaled(image: Tensor, scale: float) -> Tensor:
    size = [max(1, round(side * scale)) for side in image.shape[2:]]
    if size == list(image.shape[2:]):
        return image
    return F.interpolate(image, size, mode="bilinear", antialias=True)


def _whole(model: Any, image: Tensor) -> _LogitMap:
    size = image.size(2), image.size(3)
    return _LogitMap(_logits(model, image), size, size)


def _logits(model: Any, image: Tensor) -> Tensor:
    return with_background(model.logits(image)["out"].float())


def _windows(model: Any, image: Tensor, window: tuple[int, int]) -> _LogitMap:
    """Logits of overlapping windows, averaged at low resolution.

    Windows start at multiples of the stride of the logits (the output stride in DeepLabV3, 4 in
    DeepLabV3Plus), so that their logits lie on one grid. Averaging before the upsampling gives the
    same result as after it, because upsampling is linear.
    """
    extra = int(model.align_corners)
    size = image.size(2), image.size(3)
    height, width = (
        max(part, -(-(side - extra) // _STEP) * _STEP + extra) for side, part in zip(size, window)
    )
    image = F.pad(image, (0, width - size[1], 0, height - size[0]))
    total, counts = None, None
    for top in _starts(height, window[0]):
        for left in _starts(width, window[1]):
            view = image[:, :, top : top + window[0], left : left + window[1]]
            logits = _logits(model, view)
            if total is None or counts is None:
                stride = (window[0] - extra) // (logits.size(2) - extra)
                grid = [(side - extra) // stride + extra for side in (height, width)]
                total = logits.new_zeros(1, logits.size(1), *grid)
                counts = logits.new_zeros(*grid)
            rows = slice(top // stride, top // stride + logits.size(2))
            columns = slice(left // stride, left // stride + logits.size(3))
            total[:, :, rows, columns] += logits
            counts[rows, columns] += 1
    assert total is not None and counts is not None
    return _LogitMap(total / counts, size, (height, width))


def _starts(side: int, window: int) -> list[int]:
    """Offsets of windows, evenly spread over ``side`` and overlapping by at least a third."""
    last = (side - window) // _STEP
    intervals = -(-last // max(1, window * 2 // 3 // _STEP))
    return [last * i // intervals * _STEP for i in range(intervals)] + [last * _STEP]


def _probabilities(
    logit_map: _LogitMap, rows: Tensor, size: tuple[int, int], mirrored: bool, extra: int
) -> Tensor:
    """Probabilities [1, C, len(rows), width] of some rows of the labels."""
    columns = torch.arange(size[1], device=rows.device)
    if mirrored:
        columns = columns.flip(0)
    logits = logit_map.logits
    for dim, pixels in ((2, rows), (3, columns)):
        axis = dim - 2
        position = _positions(
            pixels,
            size[axis],
            logit_map.size[axis],
            logit_map.covered[axis],
            logits.size(dim),
            extra,
        )
        low = position.long()
        high = (low + 1).clamp(max=logits.size(dim) - 1)
        shape = [1, 1, 1, 1]
        shape[dim] = -1
        fraction = (position - low).view(shape)
        logits = torch.lerp(logits.index_select(dim, low), logits.index_select(dim, high), fraction)
    return logits.softmax(1)


def _positions(pixels: Tensor, size: int, seen: int, covered: int, low: int, extra: int) -> Tensor:
    """Positions on the map of pixels of the labels, along one axis, as in F.interpolate."""
    position = pixels.float()
    if extra:
        position = position * ((seen - 1) / max(size - 1, 1))
        position = position * ((low - 1) / max(covered - 1, 1))
    else:
        position = (position + 0.5) * (seen / size * low / covered) - 0.5
    return position.clamp(0, low - 1)
