"""Bilinear upsampling of logits to full size."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _decomposition, _transforms
from ._exporting import is_exporting


def upsample(input: Tensor, size: tuple[int, int], align_corners: bool) -> Tensor:
    """``F.interpolate(input, size, mode="bilinear")`` that torch.compile does not slow down.

    On a CPU, Inductor generates a loop that took two to three times as long as PyTorch's own kernel
    (21 classes, from 33x33 to 513x513). So the call is an opaque op in a compiled graph, except
    where it needs a gradient or a torch.func transform is active. An exported graph has PyTorch's
    op, which runs without this package.

    Args:
        input: [N, C, h, w].
        size: (height, width) of the output.

    Returns:
        [N, C, height, width].
    """
    if (
        torch.compiler.is_dynamo_compiling()
        and not is_exporting()
        and input.device.type == "cpu"
        and not (torch.is_grad_enabled() and input.requires_grad)
        and not _transforms.active()
    ):
        return _opaque(input, *size, align_corners)
    return _interpolate(input, *size, align_corners)


def _interpolate(input: Tensor, height: int, width: int, align_corners: bool) -> Tensor:
    return F.interpolate(input, (height, width), mode="bilinear", align_corners=align_corners)


_opaque = torch.library.custom_op("deeplab_fast::upsample", _interpolate, mutates_args=())
_opaque.register_fake(
    _decomposition.register(torch.ops.deeplab_fast.upsample.default, _interpolate, _interpolate)
)
