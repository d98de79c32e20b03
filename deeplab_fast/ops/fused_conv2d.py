"""Convolution, bias, residual and activation in one: the layer of networks prepared for inference.

Internal; users call :meth:`deeplab_fast.DeepLabV3.prepare_for_inference`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from ..backends import registry
from . import _transforms
from ._register import define, empty_like_format, not_differentiable
from .shape_bucket import shape_class


def fused_conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor,
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    groups: int,
    activation: str,
) -> Tensor:
    """``activation(F.conv2d(input, weight, bias, stride, padding, dilation, groups))``.

    Args:
        input: [N, C, H, W].
        weight, bias: [K, C / groups, R, S] and [K].
        stride, padding, dilation: (vertical, horizontal).
        activation: "none", "relu" or "relu6".

    Returns:
        [N, K, H', W'] in the dtype and memory format of ``input``. Not differentiable.
    """
    geometry = stride, padding, dilation, groups
    return _fused_conv2d(input, weight, bias, *geometry, activation, backend=registry.current())


def fused_conv2d_add_(
    residual: Tensor,
    input: Tensor,
    weight: Tensor,
    bias: Tensor,
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    groups: int,
    activation: str,
) -> Tensor:
    """``activation(F.conv2d(input, ...) + residual)``, written over ``residual`` and returned.

    In place, because at these sizes the C library gives freed memory back to the system, and a
    fresh output would cost its page faults each time.
    """
    geometry = stride, padding, dilation, groups
    if _transforms.active():
        # An autograd.Function cannot write in place: PyTorch's own functions do it instead.
        residual += fused_conv2d(input, weight, bias, *geometry, "none")
        if activation == "none":
            return residual
        return residual.relu_() if activation == "relu" else F.relu6(residual, inplace=True)
    _fused_conv2d_add_(
        residual, input, weight, bias, *geometry, activation, backend=registry.current()
    )
    return residual


def _fake(
    input: Tensor,
    weight: Tensor,
    bias: Tensor,
    stride: Any,
    padding: Any,
    dilation: Any,
    *others: Any,
) -> Tensor:
    height, width = (
        (input.size(2 + i) + 2 * padding[i] - dilation[i] * (weight.size(2 + i) - 1) - 1)
        // stride[i]
        + 1
        for i in range(2)
    )
    return empty_like_format(input, (input.size(0), weight.size(0), height, width))


def geometry_refused(
    weight: Tensor, stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]
) -> str | None:
    """Why a kernel of ``dilated_conv2d``, which keeps the size, cannot compute this; or None."""
    kernel = tuple(weight.shape[2:])
    if tuple(stride) != (1, 1):
        return f"the kernel has stride (1, 1), not {tuple(stride)}"
    if any(
        size % 2 == 0 or 2 * p != (size - 1) * d for size, p, d in zip(kernel, padding, dilation)
    ):
        return f"the kernel pads to the same size, not a {kernel} weight by {tuple(padding)}"
    return None


def _shape_class(
    input: Tensor,
    weight: Tensor,
    bias: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    activation: str,
) -> str:
    return shape_class(input, [weight], [dilation], groups)


_ARGUMENTS = (
    "Tensor input, Tensor weight, Tensor bias, int[] stride, int[] padding, int[] dilation, "
    "int groups, str activation"
)
_fused_conv2d = define("fused_conv2d", f"({_ARGUMENTS}) -> Tensor", _fake, _shape_class)
not_differentiable(
    "fused_conv2d",
    "it is for inference; differentiate the model that was prepared",
    lambda *args: (0,),
)
_fused_conv2d_add_ = define(
    "fused_conv2d_add_",
    f"(Tensor(a!) residual, {_ARGUMENTS}) -> ()",
    lambda *args: None,
    lambda residual, *args: _shape_class(*args),
)
