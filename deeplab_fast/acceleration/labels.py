"""Labels from the output of a segmentation model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..nn.deferred import DeferredUpsampling, Interpolation
from ..ops._arguments import integer, positive_pair, wrong_type
from ..ops.upsample_argmax import upsample_argmax

LOGITS_NAMES = ("out", "logits")
_MAX_LABELS = {torch.uint8: 256, torch.int32: 2**31, torch.int64: 2**63 - 1}


def logits_of(output: Any) -> Tensor:
    """The logits in the output of a model.

    Raises:
        TypeError: there are none.
    """
    logits = output
    if isinstance(output, Mapping):
        logits = next((output[name] for name in LOGITS_NAMES if name in output), None)
    elif isinstance(output, (tuple, list)):
        logits = next(filter(_are_logits, output), None)
    if not _are_logits(logits):
        raise TypeError(
            "predict: expected a model that returns logits [N, C, H, W], alone, as the first "
            'four-dimensional tensor of a tuple, or as the entry "out" or "logits" of a dict, got '
            f"{_described(output)}"
        )
    return logits


def _are_logits(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dim() == 4 and value.is_floating_point()


def _described(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor {list(value.shape)} of {value.dtype}"
    if isinstance(value, Mapping):
        items = (f"{name}: {_described(item)}" for name, item in value.items())
        return f"a {type(value).__name__} of {{{', '.join(items)}}}"
    if isinstance(value, (tuple, list)):
        return f"a {type(value).__name__} of ({', '.join(map(_described, value))})"
    return f"a {type(value).__name__}"


def resize_of(
    logits: Tensor, images: Tensor, size: tuple[int, int] | None = None
) -> tuple[Tensor, Interpolation | None]:
    """The last computed logits, and the resize between them and the labels or None.

    Args:
        logits: what the model returned. Its last resize may not have run yet.
        size: (height, width) of the labels; by default that of the model's own resize, or, if it
            has none, that of ``images``.
    """
    if isinstance(logits, DeferredUpsampling):
        if logits.is_pending:
            low, interpolation = logits.logits, logits.interpolation
            if isinstance(low, DeferredUpsampling):  # the first of two resizes
                low = low.run()
            if size is not None:
                interpolation = Interpolation(size, None, interpolation.align_corners)
            return low, interpolation
        logits = logits.run()
    size = size or (images.size(2), images.size(3))
    is_done = (logits.size(2), logits.size(3)) == size
    return logits, None if is_done else Interpolation(size, None, False)


def labels_of(
    logits: Tensor,
    images: Tensor,
    size: tuple[int, int] | None,
    dtype: torch.dtype,
    ends_with_sigmoid: bool | None,
) -> Tensor:
    """Labels [N, height, width]; see :meth:`AcceleratedModel.predict`."""
    if not isinstance(dtype, torch.dtype) or dtype not in _MAX_LABELS:
        raise wrong_type("dtype", "torch.int64, torch.int32 or torch.uint8", dtype)
    if size is not None:
        height, width = positive_pair(size, "size", integer)
        size = height, width
    logits, resize = resize_of(logits, images, size)
    if logits.size(1) == 1:
        if ends_with_sigmoid is None:
            raise TypeError(
                "predict: expected several channels, or a model that runs on meta tensors and ends "
                "with logits or a sigmoid: threshold the output of the model yourself"
            )
        output = logits
        if resize is not None:
            output = F.interpolate(
                logits, **resize.target, mode="bilinear", align_corners=resize.align_corners
            )
        return (output[:, 0] > (0.5 if ends_with_sigmoid else 0)).to(dtype)
    if resize is not None:
        return upsample_argmax(
            logits, **resize.target, align_corners=resize.align_corners, dtype=dtype
        )
    if logits.size(1) > _MAX_LABELS[dtype]:
        raise ValueError(f"dtype: expected one that holds {logits.size(1)} classes, got {dtype}")
    return logits.argmax(1).to(dtype)
