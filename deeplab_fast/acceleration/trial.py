"""A trial run of a network without data, which shows how its output is made."""

from __future__ import annotations

import contextlib
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from ..nn.deferred import Interpolation
from .counting import channels_of_images, dtype_of, without_data
from .labels import logits_of, resize_of

_SIGMOIDS = (
    torch.sigmoid, torch.sigmoid_, Tensor.sigmoid, Tensor.sigmoid_, F.sigmoid,
    torch.special.expit, F.hardsigmoid,
)  # fmt: skip
# Names of functions whose result is made of values of the first operand.
_SELECTIONS = {
    "__getitem__", "bfloat16", "clamp", "clip", "clone", "contiguous", "detach", "double", "flip",
    "dropout", "float", "half", "max_pool2d", "pad", "permute", "reshape", "squeeze", "to",
    "transpose", "type", "unsqueeze", "view",
}  # fmt: skip
_ARITHMETIC = {
    "__rsub__", "add", "cat", "div", "maximum", "mean", "minimum", "mul", "rsub", "stack", "sub",
    "sum", "true_divide",
}  # fmt: skip
# Heights and widths of the images. Many networks need multiples of 32, and some take one size only.
_SIZES = (256, 224, 384, 512, 640)


class Trial(NamedTuple):
    """Result of the trial run of a network.

    Attributes:
        in_channels_last: False if images must be contiguous, because code calls ``view``, or if the
            trial failed. (torch.save cannot save a torch.memory_format.)
        resize: a description of the final resize, "" if it is unknown.
        failure: why it is unknown.
        ends_with_sigmoid: True if the output consists of probabilities, None if that is unknown,
            such as for the mean of several.
    """

    in_channels_last: bool
    resize: str
    failure: str
    ends_with_sigmoid: bool | None


class _Resize(NamedTuple):
    result: Tensor
    interpolation: Interpolation
    is_second: bool  # its input is the result of a resize


class _Watch(TorchFunctionMode):
    """Context that records which results are probabilities, and which are bilinear resizes."""

    def __init__(self) -> None:
        super().__init__()
        self.probabilities: list[Any] = []
        self.unclear: list[Any] = []  # what arithmetic makes of probabilities only
        self.resizes: list[_Resize] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if func in _SIGMOIDS:
            self.probabilities.append(result)
        elif func is F.interpolate:
            self.note_resize(result, *args, **kwargs)
        else:
            self.note_probabilities(result, getattr(func, "__name__", ""), args)
        return result

    def note_probabilities(self, result: Any, name: str, args: Any) -> None:
        operands = [x for x in tree_leaves(args) if isinstance(x, Tensor)]
        if not operands or not isinstance(result, Tensor):
            return
        if name in _SELECTIONS:
            for known in (self.probabilities, self.unclear):
                if any(operands[0] is other for other in known):
                    known.append(result)
        elif name in _ARITHMETIC:
            known = [*self.probabilities, *self.unclear]
            if all(any(x is other for other in known) for x in operands):
                self.unclear.append(result)

    def note_resize(self, result: Tensor, input: Tensor, **options: Any) -> None:
        if any(input is other for other in self.probabilities):
            self.probabilities.append(result)
        if options["mode"] != "bilinear" or options["antialias"]:
            return
        factor: Any = None if options["recompute_scale_factor"] else options["scale_factor"]
        if factor is not None and not isinstance(factor, (tuple, list)):
            factor = factor, factor
        size, align_corners = (result.size(2), result.size(3)), bool(options["align_corners"])
        interpolation = Interpolation(size, factor, align_corners)
        self.resizes.append(_Resize(result, interpolation, self.resize_of(input) is not None))

    def resize_of(self, tensor: Tensor) -> _Resize | None:
        """The resize whose result ``tensor`` is, if nothing changed it since."""
        found = (resize for resize in self.resizes if resize.result is tensor)
        return next(found, None) if tensor._version == 0 else None


def in_format(images: Tensor, in_channels_last: bool) -> Tensor:
    memory_format = torch.channels_last if in_channels_last else torch.contiguous_format
    return images.contiguous(memory_format=memory_format)


def trial_of(network: nn.Module) -> Trial:
    """Run ``network`` on meta tensors, trying a few sizes. No data is read or copied."""
    on_meta, failure = without_data(network), ""
    for size in _SIZES:
        for in_channels_last in (True, False):
            try:
                first = _run(on_meta, (size, size), in_channels_last)
            except Exception as error:
                failure = failure or f"{type(error).__name__}: {error}".partition("\n")[0]
                continue
            second = None
            with contextlib.suppress(Exception):
                second = _run(on_meta, (size, 2 * size), in_channels_last)
            resize = _described(first, (size, size), second)
            return Trial(in_channels_last, resize, "", first.ends_with_sigmoid)
    return Trial(False, "", failure, None)


class _Run(NamedTuple):
    resize: Interpolation | None
    is_second: bool  # the resize is of another resize
    ends_with_sigmoid: bool | None


@torch.no_grad()
def _run(network: nn.Module, size: tuple[int, int], in_channels_last: bool) -> _Run:
    channels = channels_of_images(network)
    assert channels is not None
    # Some code can call view on one image in channels_last, but not on two.
    images = torch.empty(2, channels, *size, dtype=dtype_of(network), device="meta")
    images = in_format(images, in_channels_last)
    with _Watch() as watch:
        logits = logits_of(network(images))
    ends_with_sigmoid: bool | None = any(logits is other for other in watch.probabilities)
    if any(logits is other for other in watch.unclear):
        ends_with_sigmoid = None
    if resize := watch.resize_of(logits):
        return _Run(resize.interpolation, resize.is_second, ends_with_sigmoid)
    _, interpolation = resize_of(logits, images)
    return _Run(interpolation, False, ends_with_sigmoid)


def _described(first: _Run, size: tuple[int, int], second: _Run | None) -> str:
    """The final resize of two runs, of images of ``size`` and of twice the width."""
    if first.resize is None:
        return "the output has the images' size without a bilinear resize"
    to, scale_factors, align_corners = first.resize
    height, width = size
    wide = second.resize.size if second and second.resize else None
    if to == size and wide in (None, (height, 2 * width)):
        text = "to the images' size"
    elif scale_factors:
        vertical, horizontal = scale_factors
        factors = f"{vertical:g}" if vertical == horizontal else f"{vertical:g} and {horizontal:g}"
        text = f"by a factor of {factors}"
    else:
        text = f"to {to[0]}x{to[1]}" if wide in (None, to) else "to a size of the model"
    text = f"bilinear {text}, align_corners={align_corners}, fused with argmax"
    return f"{text}; the resize before it is computed" if first.is_second else text
