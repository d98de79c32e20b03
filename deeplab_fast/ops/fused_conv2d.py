"""Convolution with bias, residual and activation in one op: the layer of a network prepared for
inference. Internal; users call :meth:`deeplab_fast.DeepLabV3.prepare_for_inference`."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .. import backends
from ._library import define, empty_like_format, not_differentiable


def fused_conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor,
    residual: Tensor | None,
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    groups: int,
    activation: str,
) -> Tensor:
    """``activation(F.conv2d(input, weight, bias, stride, padding, dilation, groups) + residual)``.

    Args:
        input: [N, C, H, W].
        weight, bias: [K, C / groups, R, S] and [K].
        residual: in the output's shape, or None.
        stride, padding, dilation: (vertical, horizontal).
        activation: "none", "relu" or "relu6".

    Returns:
        [N, K, H', W'] in the dtype and memory format of ``input``. Not differentiable.
    """
    return _fused_conv2d(
        input,
        weight,
        bias,
        residual,
        stride,
        padding,
        dilation,
        groups,
        activation,
        backend=backends.current(),
    )


def _fake(
    input: Tensor,
    weight: Tensor,
    bias: Tensor,
    residual: Any,
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


_fused_conv2d = define(
    "fused_conv2d",
    "(Tensor input, Tensor weight, Tensor bias, Tensor? residual, int[] stride, int[] padding, "
    "int[] dilation, int groups, str activation) -> Tensor",
    _fake,
)
not_differentiable(
    "fused_conv2d", "it is for inference; differentiate the model that was prepared from"
)
