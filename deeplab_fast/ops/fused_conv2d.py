"""Convolution fused with bias, residual and activation: the layer of models prepared for inference.

It is internal; users call :meth:`deeplab_fast.DeepLabV3.prepare_for_inference`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .._native.memory_format import empty_like_format
from ..backends import cpu, registry
from ..backends.arguments import FusedConv2d, FusedConv2dAdd
from . import _transforms
from ._exporting import is_exporting
from ._register import define, not_differentiable
from .shape_bucket import shape_bucket


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
    operands = input, weight, bias, stride, padding, dilation, groups, activation
    if _runs_on_onednn(input, weight):
        return cpu.fused_conv2d(FusedConv2d(*operands))
    return fused_conv2d_op(*operands, backend=registry.current())


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
    """``activation(F.conv2d(input, ...) + residual)``, written to ``residual`` and returned.

    It works in place because the C library returns freed memory of this size to the system, so that
    a new output would cost page faults at each call.
    """
    geometry = stride, padding, dilation, groups
    if _transforms.active() or is_exporting():
        # An autograd.Function cannot write in place, so PyTorch's own functions do. In an exported
        # graph, an op that writes in place could not be decomposed.
        residual += fused_conv2d(input, weight, bias, *geometry, "none")
        if activation == "none":
            return residual
        return residual.relu_() if activation == "relu" else F.relu6(residual, inplace=True)
    operands = residual, input, weight, bias, *geometry, activation
    if _runs_on_onednn(input, weight) and type(residual) is Tensor:
        cpu.fused_conv2d_add_(FusedConv2dAdd(*operands))
    else:
        fused_conv2d_add_op(*operands, backend=registry.current())
    return residual


def _runs_on_onednn(input: Tensor, weight: Tensor) -> bool:
    """True if the call would reach oneDNN, so that the way through the dispatcher can be saved.

    That way takes longer than a small convolution, such as those of squeeze and excitation.
    """
    return (
        type(input) is Tensor
        and input.is_cpu
        and input.dtype is torch.float32
        and not registry.current()
        and not registry.is_tracing()
        and not torch.compiler.is_compiling()
        and not torch._C._len_torch_dispatch_stack()
        and not torch._C._get_tracing_state()
        and not _transforms.active()
        and not (torch.is_grad_enabled() and (input.requires_grad or weight.requires_grad))
        and not torch._C._is_any_autocast_enabled()
        and input.numel() > 0
        and torch.backends.mkldnn.is_available()
    )


def _fake(arguments: FusedConv2d) -> Tensor:
    input, weight, _, stride, padding, dilation, _, _ = arguments
    height, width = (
        (input.size(2 + i) + 2 * padding[i] - dilation[i] * (weight.size(2 + i) - 1) - 1)
        // stride[i]
        + 1
        for i in range(2)
    )
    return empty_like_format(input, (input.size(0), weight.size(0), height, width))


def _bucket(arguments: FusedConv2d | FusedConv2dAdd) -> str:
    return shape_bucket(arguments.input, [arguments.weight], [arguments.dilation], arguments.groups)


_ARGUMENTS = (
    "Tensor input, Tensor weight, Tensor bias, int[] stride, int[] padding, int[] dilation, "
    "int groups, str activation"
)
fused_conv2d_op = define("fused_conv2d", FusedConv2d, f"({_ARGUMENTS}) -> Tensor", _fake, _bucket)
not_differentiable(
    "fused_conv2d",
    "it is for inference; differentiate the model that was prepared",
    lambda *args: (0,),
)
fused_conv2d_add_op = define(
    "fused_conv2d_add_",
    FusedConv2dAdd,
    f"(Tensor(a!) residual, {_ARGUMENTS}) -> ()",
    lambda arguments: None,
    _bucket,
)
