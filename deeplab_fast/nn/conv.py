"""Convolutions: with correct half-precision weight gradients on a CPU, and separable ones."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..ops.dilated_conv2d import dilated_conv2d


class _EqualToConv2d(type):
    """Type of classes that are equal to ``nn.Conv2d``, also as keys of a dict.

    Libraries that look layers up by their exact type, such as FX quantisation, then find what they
    have for ``nn.Conv2d``. A class with another ``forward`` is equal to itself only.
    """

    def __eq__(cls: Any, other: object) -> bool:
        if other is not nn.Conv2d:
            return other is cls
        return (cls.forward, cls._conv_forward) == (nn.Conv2d.forward, Conv2d._conv_forward)

    def __hash__(cls) -> int:
        return hash(nn.Conv2d)


class Conv2d(nn.Conv2d, metaclass=_EqualToConv2d):
    """``nn.Conv2d``, except for two kinds of dilated layers.

    They run :func:`deeplab_fast.dilated_conv2d`, which has no second derivatives:

    * half-precision layers with "same" or no padding in training on a CPU, whose weight gradient
      PyTorch computes wrongly on many x86 CPUs (docs/onednn_bf16_weight_gradient.md);
    * dense and depthwise layers with "same" padding on a GPU, where our kernel runs if it was
      measured to be faster than cuDNN.

    In a graph of torch.fx and for FX quantisation it is an ``nn.Conv2d``. Eager-mode quantisation
    compares classes with ``is`` and does not know it.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        run_dilated(self)

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        is_dilated = max(self.dilation) > 1 and has_same_padding(self)
        if is_dilated and (_trains_in_half_on_cpu(input, weight) or self._has_gpu_kernels(input)):
            vertical, horizontal = self.dilation
            return dilated_conv2d(input, weight, bias, (vertical, horizontal), self.groups)
        is_valid = (self.stride, self.padding, self.padding_mode) == ((1, 1), (0, 0), "zeros")
        if max(self.dilation) > 1 and is_valid and _trains_in_half_on_cpu(input, weight):
            vertical, horizontal = self.dilation
            output = dilated_conv2d(input, weight, bias, (vertical, horizontal), self.groups)
            top, left = (d * (k // 2) for d, k in zip(self.dilation, self.kernel_size))
            return output[:, :, top : output.size(2) - top, left : output.size(3) - left]
        return super()._conv_forward(input, weight, bias)

    def _has_gpu_kernels(self, input: Tensor) -> bool:
        is_supported = self.groups in (1, self.in_channels)
        return is_supported and isinstance(input, Tensor) and input.device.type == "cuda"


def run_dilated(conv: nn.Conv2d) -> None:
    """Make a layer of PyTorch's class a :class:`Conv2d`, in place."""
    conv.__class__ = Conv2d
    conv.__module__ = nn.Conv2d.__module__  # torch.fx recognises the layers of torch.nn by it


class SeparableConv2d(nn.Sequential):
    """3x3 depthwise atrous convolution followed by a 1x1 convolution, both without bias.

    Args:
        in_channels, out_channels: channels of input and output.
        dilation: dilation of the depthwise convolution, whose padding keeps the size.
        depthwise_norm: batch norm and ReLU between the two, as in TensorFlow's DeepLab, detectron2
            and mmsegmentation. segmentation_models_pytorch has none.
    """

    def __init__(
        self, in_channels: int, out_channels: int, dilation: int = 1, depthwise_norm: bool = False
    ) -> None:
        depthwise = Conv2d(
            in_channels,
            in_channels,
            3,
            padding=dilation,
            dilation=dilation,
            groups=in_channels,
            bias=False,
        )
        norm = [nn.BatchNorm2d(in_channels), nn.ReLU()] if depthwise_norm else []
        super().__init__(depthwise, *norm, Conv2d(in_channels, out_channels, 1, bias=False))


def conv_norm_relu(
    in_channels: int,
    out_channels: int,
    kernel_size: int = 1,
    dilation: int = 1,
    separable: bool = False,
    depthwise_norm: bool = False,
) -> nn.Sequential:
    """Convolution of stride 1 that keeps the size, batch norm and ReLU.

    Args:
        separable: a :class:`SeparableConv2d` instead of a dense 3x3 convolution.
    """
    conv: nn.Module
    if separable and kernel_size == 3:
        conv = SeparableConv2d(in_channels, out_channels, dilation, depthwise_norm)
    else:
        padding = dilation * (kernel_size // 2)
        conv = Conv2d(
            in_channels, out_channels, kernel_size, padding=padding, dilation=dilation, bias=False
        )
    return nn.Sequential(conv, nn.BatchNorm2d(out_channels), nn.ReLU())


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
