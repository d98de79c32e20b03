"""The public functions: :func:`accelerate` and :func:`restore`."""

from __future__ import annotations

import logging

from torch import nn

from .inference import prepare
from .training import replace_parts, restore_parts

_log = logging.getLogger("deeplab_fast")


def accelerate(model: nn.Module, *, inference: bool = False, verbose: bool = False) -> nn.Module:
    """Use this package's kernels in a model of any project.

    Without ``inference``, parts of ``model`` are replaced in place, for training: ASPP modules,
    whatever their class, and dilated and depthwise convolutions. Parameters, state dict, hooks and
    outputs stay as they are; :func:`restore` undoes it.

    With ``inference``, the result is an :class:`AcceleratedModel`, a copy with folded batch norms
    and fused convolutions, whose ``predict`` gives labels without logits at full resolution.

    What cannot be accelerated stays as it is. If that is all, ``model`` itself is returned and the
    logger ``deeplab_fast`` says so.

    Args:
        model: any module.
        inference: a copy for inference, instead of ``model`` for training.
        verbose: print what was replaced, and what was not and why.

    >>> model = accelerate(segmentation_models_pytorch.DeepLabV3Plus("resnet50"))
    """
    accelerated, report = prepare(model) if inference else (model, replace_parts(model))
    if verbose:
        print(report)
    elif not report.replaced():
        _log.warning("accelerate: nothing to replace in %s", type(model).__name__)
    return accelerated


def restore(model: nn.Module) -> nn.Module:
    """Undo :func:`accelerate` without ``inference``, in place. Returns ``model``."""
    restore_parts(model)
    return model
