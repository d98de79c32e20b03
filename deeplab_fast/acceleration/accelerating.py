"""The public functions: :func:`accelerate` and :func:`restore`."""

from __future__ import annotations

import logging
import textwrap

from torch import nn

from ..ops._arguments import wrong_type
from .counting import Cost, channels_of_images, count
from .inference import prepare
from .report import Report
from .training import replace_parts, restore_parts

IMAGE_SIZE = 512, 512  # operations are counted for an image of this height and width

_log = logging.getLogger("deeplab_fast")


def accelerate(model: nn.Module, *, inference: bool = False, verbose: bool = False) -> nn.Module:
    """Use this package's kernels in a model of any project.

    Without ``inference``, parts of ``model`` are replaced in place, for training: ASPP modules,
    whatever their class, and dilated convolutions. Parameters, state dict and hooks stay the same,
    and outputs the same up to rounding; :func:`restore` undoes the replacement.

    With ``inference``, the result is an :class:`AcceleratedModel`, a copy with folded batch norms
    and fused convolutions, whose ``predict`` gives labels without logits at full resolution.

    Other parts run as before. If there is nothing to accelerate, the result is ``model`` itself,
    and the logger ``deeplab_fast`` says so.

    Args:
        model: any module.
        inference: return a copy for inference, instead of ``model`` for training.
        verbose: print a :class:`~deeplab_fast.acceleration.Report`: what was replaced, what was not
            and why, and how many operations that saves for an image of 512x512.

    Raises:
        TypeError: ``model`` is not a module.

    >>> model = accelerate(segmentation_models_pytorch.DeepLabV3Plus("resnet50"))
    """
    if not isinstance(model, nn.Module):
        raise wrong_type("model", "an nn.Module", model)
    if verbose:
        accelerated, report = accelerate_with_report(model, inference=inference)
        print(report)
        return accelerated
    accelerated, report = _accelerated(model, inference)
    if not report.replaced():
        _log.warning("accelerate: nothing to replace in %s", type(model).__name__)
    return accelerated


def accelerate_with_report(
    model: nn.Module,
    *,
    inference: bool = False,
    size: tuple[int, int] = IMAGE_SIZE,
    channels: int | None = None,
) -> tuple[nn.Module, Report]:
    """:func:`accelerate`, and a report with operations and memory traffic.

    Args:
        size: height and width of the image that they are counted for.
        channels: its channels; by default those of the first convolution.
    """
    before, uncounted = _count(model, size, channels)
    accelerated, report = _accelerated(model, inference)
    after = None
    if before is not None and report.replaced():
        after, uncounted = _count(accelerated, size, before.shape[0], by_layer=False)
    return accelerated, report._replace(before=before, after=after, uncounted=uncounted)


def _accelerated(model: nn.Module, inference: bool) -> tuple[nn.Module, Report]:
    return prepare(model) if inference else (model, replace_parts(model))


def _count(
    model: nn.Module, size: tuple[int, int], channels: int | None, by_layer: bool = True
) -> tuple[Cost | None, str]:
    """The cost of a model and "", or None and the reason why it cannot be counted."""
    channels = channels or channels_of_images(model)
    if channels is None:
        return None, "not counted: the model has no convolution that gives the channels of images"
    shape = channels, *size
    try:
        return count(model, shape, by_layer), ""
    except Exception as error:  # the model's own code can raise anything
        what = "x".join(map(str, shape))
        reason = f"the model fails on meta tensors for an image of {what}: {_line(error)}"
        return None, f"not counted: {reason}"


def _line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return textwrap.shorten(f"{type(error).__name__}: {text}", 200, placeholder=" ...")


def restore(model: nn.Module) -> nn.Module:
    """Undo :func:`accelerate` without ``inference``, in place. Returns ``model``."""
    if not isinstance(model, nn.Module):
        raise wrong_type("model", "an nn.Module", model)
    restore_parts(model)
    return model
