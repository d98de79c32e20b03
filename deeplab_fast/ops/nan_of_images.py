"""NaN in the outputs of images that are not finite."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import _decomposition, _transforms
from ._exporting import is_exporting


def with_nan_of(output: Tensor, images: Sequence[Tensor], finite_weights: bool) -> Tensor:
    """``output``, with NaN for each image that has NaN or Inf.

    On a CPU oneDNN's ReLU turns NaN into 0, and our convolutions skip the products of a weight that
    is not finite. PyTorch's own operators do neither. So in an exported graph this is an op that
    disappears when the graph is decomposed into them, as in a file for ONNX.

    Args:
        output: [N, ...], floating.
        images: tensors [N, C, H, W].
        finite_weights: False makes all outputs NaN.

    Returns:
        A new tensor like ``output``.
    """
    if is_exporting() and not _transforms.active():
        return _op(output, images, finite_weights)
    return _with_nan_of(output, images, finite_weights)


def _with_nan_of(output: Tensor, images: Sequence[Tensor], finite_weights: bool) -> Tensor:
    zero = 0.0 if finite_weights else torch.nan
    nan_or_zero = sum(zero * x.sum((1, 2, 3), dtype=torch.float32) for x in images)
    assert isinstance(nan_or_zero, Tensor)
    return output + nan_or_zero.view(-1, *[1] * (output.dim() - 1)).to(output.dtype)


def _unchanged(output: Tensor, images: Sequence[Tensor], finite_weights: bool) -> Tensor:
    return output


_op = torch.library.custom_op("deeplab_fast::with_nan_of", _with_nan_of, mutates_args=())
_op.register_fake(
    _decomposition.register(torch.ops.deeplab_fast.with_nan_of.default, _unchanged, _with_nan_of)
)
