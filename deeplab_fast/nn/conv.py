"""Convolution with correct half-precision weight gradients on a CPU."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..ops.dilated_conv2d import dilated_conv2d


class Conv2d(nn.Conv2d):
    """``nn.Conv2d``, except for the weight gradient of dilated half-precision layers on a CPU.

    PyTorch computes that gradient wrongly on many x86 CPUs (docs/onednn_bf16_weight_gradient.md).
    Such layers run :func:`deeplab_fast.dilated_conv2d` instead, which has no second derivatives.
    """

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        is_dilated = max(self.dilation) > 1 and has_same_padding(self)
        if is_dilated and _trains_in_half_on_cpu(input, weight):
            vertical, horizontal = self.dilation
            return dilated_conv2d(input, weight, bias, (vertical, horizontal), self.groups)
        return super()._conv_forward(input, weight, bias)


def has_same_padding(conv: nn.Conv2d) -> bool:
    """True if the output is as large as the input: stride 1 and "same" padding with zeros."""
    same = tuple(d * (k // 2) for d, k in zip(conv.dilation, conv.kernel_size))
    return (conv.stride, conv.padding, conv.padding_mode) == ((1, 1), same, "zeros")


def _trains_in_half_on_cpu(input: Tensor, weight: Tensor) -> bool:
    if not isinstance(input, Tensor):  # a proxy of torch.fx
        return False
    if input.device.type != "cpu" or not (weight.requires_grad and torch.is_grad_enabled()):
        return False
    dtype = input.dtype
    if torch.is_autocast_enabled("cpu") and dtype != torch.float64:
        dtype = torch.get_autocast_dtype("cpu")
    return dtype in (torch.bfloat16, torch.float16)
