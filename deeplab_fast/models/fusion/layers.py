"""Fused layers, and the folding of batch norms into them."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ... import ops
from ...nn import ASPP, Conv2d
from ...ops._register import autocast
from ...ops.fused_conv2d import fused_conv2d, fused_conv2d_add_
from ..backbones.mobilenet_v2 import SameConv2d, pad_same

CONVOLUTIONS = (nn.Conv2d, Conv2d, SameConv2d)
NORMS = (nn.BatchNorm2d, nn.SyncBatchNorm)
NO_OPS = (nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout)


class FusedConv2d(nn.Module):
    """``activation(conv2d(input, weight, bias) + residual)``.

    Args:
        weight: [K, C / groups, R, S].
        bias: [K].
        stride, padding, dilation: (vertical, horizontal).
        activation: "none", "relu" or "relu6".

    Attributes:
        has_norm, has_residual: whether a batch norm is folded in, and a residual added, for
            reports.
    """

    has_norm = has_residual = False

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor,
        stride: tuple[int, int],
        padding: tuple[int, int],
        dilation: tuple[int, int],
        groups: int,
        activation: str = "none",
    ) -> None:
        super().__init__()
        self.weight, self.bias = _frozen(weight), _frozen(bias)
        self.set_geometry(stride, padding, dilation, groups)
        self.activation = activation

    def set_geometry(
        self,
        stride: tuple[int, int],
        padding: tuple[int, int],
        dilation: tuple[int, int],
        groups: int,
    ) -> None:
        self.geometry = stride, padding, dilation, groups  # one attribute is faster than four
        spans = (
            d * (k - 1) + 1 - 2 * p for d, k, p in zip(dilation, self.weight.shape[2:], padding)
        )
        self._extents = self.weight.size(0), *spans

    def forward(
        self, input: Tensor, residual: Tensor | None = None, overwrite: bool = False
    ) -> Tensor:
        """Input [N, C, H, W] or [C, H, W]; ``overwrite`` allows to write to ``residual``."""
        if torch.compiler.is_compiling():
            return self._run(input, residual, overwrite)
        # A TorchFunctionMode, such as that of predict, would take long to pass each attribute on.
        with torch._C.DisableTorchFunction():
            return self._run(input, residual, overwrite)

    def _run(self, input: Tensor, residual: Tensor | None, overwrite: bool) -> Tensor:
        parameters: Any = self._parameters  # attributes of a module take longer
        weight, bias = parameters["weight"], parameters["bias"]
        if torch.compiler.is_compiling() or torch._C._is_any_autocast_enabled():
            input, weight, bias = autocast(input, weight, bias)
        operands = input, weight, bias, *self.geometry
        if input.dim() == 3:
            output = fused_conv2d(input[None], *operands[1:], "none")[0]
            return self._activated(output if residual is None else output + residual)
        if residual is None:
            return fused_conv2d(*operands, self.activation)
        if not self._is_output_like(residual, input):  # the sum broadcasts or changes the dtype
            return self._activated(fused_conv2d(*operands, "none") + residual)
        if not overwrite:
            residual = residual.clone()
        return fused_conv2d_add_(residual, *operands, self.activation)

    def part(self, outputs: slice, inputs: slice, is_last: bool = True) -> FusedConv2d:
        """The layer for some channels. Only the last one of a sum has bias and activation."""
        stride, padding, dilation, groups = self.geometry
        weight = self.weight[outputs, inputs].clone(memory_format=torch.channels_last)
        bias = self.bias[outputs].clone() if is_last else torch.zeros_like(self.bias[outputs])
        groups = 1 if groups == 1 else weight.size(0)
        activation = self.activation if is_last else "none"
        return FusedConv2d(weight, bias, stride, padding, dilation, groups, activation)

    def _is_output_like(self, residual: Tensor, input: Tensor) -> bool:
        """True if ``residual`` has the shape, dtype and device of the convolution's output."""
        batch, _, height, width = input.shape
        channels, vertical_span, horizontal_span = self._extents
        (vertical, horizontal), *_ = self.geometry
        return (
            isinstance(residual, Tensor)
            and residual.shape
            == (
                batch,
                channels,
                (height - vertical_span) // vertical + 1,
                (width - horizontal_span) // horizontal + 1,
            )
            and residual.dtype == input.dtype
            and residual.device == input.device
        )

    def _activated(self, output: Tensor) -> Tensor:
        if self.activation == "none":
            return output
        return output.relu_() if self.activation == "relu" else F.relu6(output, inplace=True)

    def extra_repr(self) -> str:
        channels, per_group, *kernel = self.weight.shape
        stride, padding, dilation, groups = self.geometry
        return (
            f"{per_group * groups}, {channels}, kernel_size={tuple(kernel)}, stride={stride}, "
            f"padding={padding}, dilation={dilation}, groups={groups}, "
            f"activation={self.activation}"
        )


class FoldedASPP(nn.Module):
    """:class:`deeplab_fast.ASPP` in evaluation mode as one :func:`deeplab_fast.aspp`.

    Raises:
        ValueError: the module is not one for which :func:`can_fold` is true.
    """

    def __init__(self, module: ASPP) -> None:
        super().__init__()
        if not can_fold(module):
            raise ValueError("module: expected an ASPP whose batch norms can be folded")
        branches: list[Any] = list(module.convs)
        pool = branches.pop()
        weights, biases = zip(*(folded(branch[0], branch[1]) for branch in branches))
        pool_weight, pool_bias = folded(pool[1], pool[2])
        project_weight, project_bias = folded(module.project[0], module.project[1])
        self.weights = nn.ParameterList(map(_frozen, weights))
        self.biases = nn.ParameterList(map(_frozen, biases))
        self.dilations = [branch[0].dilation[0] for branch in branches]
        self.pool_weight, self.pool_bias = _frozen(pool_weight), _frozen(pool_bias)
        self.project_weight, self.project_bias = _frozen(project_weight), _frozen(project_bias)

    def operands(self) -> tuple[Any, ...]:
        """Arguments of the op after the input."""
        return (
            list(self.weights),
            list(self.biases),
            self.dilations,
            self.pool_weight,
            self.pool_bias,
            self.project_weight,
            self.project_bias,
        )

    def forward(self, input: Tensor) -> Tensor:
        return ops.aspp(input, *self.operands())


def can_fold(module: nn.Module) -> bool:
    """True if the op ``aspp`` can compute ``module``, an ASPP in evaluation mode."""
    if type(module) is not ASPP or not module._is_unmodified():
        return False
    *branches, pool = module.convs
    activations = [pool[-1], *(layer[2] for layer in (*branches, module.project))]
    pairs = [(pool[1], pool[2]), *((layer[0], layer[1]) for layer in (*branches, module.project))]
    return (
        len(pool) == 4
        and all(map(is_plain, module.modules()))
        and all(type(activation) is nn.ReLU for activation in activations)
        and type(pool[1]) in CONVOLUTIONS
        and pool[1].kernel_size == (1, 1)
        and all(can_fold_norm(norm, conv) for conv, norm in pairs)
    )


def is_of(module: Any, name: str, project: str) -> bool:
    """True for a module of the class ``name`` of another project, which need not be installed."""
    kind = type(module)
    return kind.__name__ == name and kind.__module__.partition(".")[0] == project


def _is_static_same(conv: Any) -> bool:
    """True for a convolution of smp's EfficientNet, which pads for images of one size."""
    return is_of(conv, "Conv2dStaticSamePadding", "segmentation_models_pytorch") and (
        type(conv.static_padding) in (nn.Identity, nn.ZeroPad2d) and is_plain(conv.static_padding)
    )


def padding_before(conv: Any) -> tuple[Any, ...] | None:
    """The function, and its arguments after the input, that pads the input of a convolution."""
    if type(conv) is SameConv2d or is_of(conv, "Conv2dSame", "timm"):
        return pad_same, conv.kernel_size, conv.stride, conv.dilation
    if _is_static_same(conv) and type(conv.static_padding) is nn.ZeroPad2d:
        return F.pad, tuple(conv.static_padding.padding)
    return None


def unsupported_reason(conv: nn.Module) -> str | None:
    """Why a convolution cannot be fused; None if it can."""
    is_known = type(conv) in CONVOLUTIONS or is_of(conv, "Conv2dSame", "timm")
    if not (is_known or _is_static_same(conv)):
        return f"unknown kind of convolution: {type(conv).__name__}"
    assert isinstance(conv, nn.Conv2d)
    if not is_plain(conv):
        return "it has hooks or parametrizations"
    if conv.padding_mode != "zeros" or isinstance(conv.padding, str):
        return f"padding: {conv.padding_mode}, {conv.padding}"
    if not conv.weight.is_floating_point() or not isinstance(conv.weight, nn.Parameter):
        return f"weights: {conv.weight.dtype}, {type(conv.weight).__name__}"
    return None


def is_timms(norm: nn.Module) -> bool:
    """True for timm's batch norm with activation, which holds both."""
    return is_of(norm, "BatchNormAct2d", "timm")


def can_fold_norm(norm: Any, conv: Any) -> bool:
    return (
        (type(norm) in NORMS or is_timms(norm))
        and is_plain(norm)
        and not norm.training
        and norm.running_mean is not None
        and norm.running_var is not None
        and norm.num_features == conv.out_channels
        and norm.running_mean.device == conv.weight.device
        and (not is_timms(norm) or type(norm.drop) in NO_OPS and is_plain(norm.drop))
    )


def folded(conv: Any, norm: Any = None) -> tuple[Tensor, Tensor]:
    """Weight and bias of the convolution that equals ``norm(conv(x))`` in evaluation mode.

    They are computed in float64 and rounded once, at the end.
    """
    weight = conv.weight.detach().double()
    bias = weight.new_zeros(weight.size(0)) if conv.bias is None else conv.bias.detach().double()
    if norm is not None:
        factor = 1.0 if norm.weight is None else norm.weight.detach().double()
        scale = factor / (norm.running_var.double() + norm.eps).sqrt()
        weight = weight * scale[:, None, None, None]
        bias = scale * (bias - norm.running_mean.double())
        if norm.bias is not None:
            bias += norm.bias.detach().double()
    return weight.to(conv.weight.dtype), bias.to(conv.weight.dtype)


def fused_layer(conv: Any, norm: Any = None) -> FusedConv2d:
    """The fused convolution for a convolution and the batch norm after it."""
    weight, bias = folded(conv, norm)
    weight = weight.contiguous(memory_format=torch.channels_last)
    stride, dilation = tuple(conv.stride), tuple(conv.dilation)  # a list in smp's EfficientNet
    return FusedConv2d(weight, bias, stride, conv.padding, dilation, conv.groups)


def _frozen(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)


def is_plain(module: nn.Module) -> bool:
    """True if a call of ``module`` runs the ``forward`` of its class and nothing else."""
    return not (is_hooked(module) or parametrize.is_parametrized(module))


def is_hooked(module: nn.Module) -> bool:
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in vars(module)
    )
