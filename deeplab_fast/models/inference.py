"""Networks prepared for inference: batch norms folded, convolutions fused."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ..nn import ASPP
from ..ops import aspp
from ..ops.fused_conv2d import fused_conv2d, fused_conv2d_add_
from .backbones.mobilenet_v2 import InvertedResidual, SameConv2d, pad_same
from .backbones.resnet import Bottleneck, ResNet
from .cuda_graphs import CudaGraphs
from .segmentation import SegmentationModel

_T = TypeVar("_T", Tensor, OrderedDict[str, Tensor])
_ACTIVATIONS = {type(None): None, nn.ReLU: "relu", nn.ReLU6: "relu6"}


class FusedConv2d(nn.Module):
    """``activation(conv2d(input, weight, bias) + residual)``, written to the residual's memory.

    Args:
        weight: [K, C / groups, R, S].
        bias: [K].
        stride, padding, dilation: (vertical, horizontal).
        activation: "relu", "relu6" or None.
    """

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor,
        stride: tuple[int, int],
        padding: tuple[int, int],
        dilation: tuple[int, int],
        groups: int,
        activation: str | None,
    ) -> None:
        super().__init__()
        self.weight, self.bias = _frozen(weight), _frozen(bias)
        self.stride, self.padding, self.dilation = stride, padding, dilation
        self.groups = groups
        self.activation = activation or "none"

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        geometry = self.stride, self.padding, self.dilation, self.groups
        operands = input, self.weight, self.bias, *geometry, self.activation
        return (
            fused_conv2d(*operands) if residual is None else fused_conv2d_add_(residual, *operands)
        )


class PadSame(nn.Module):
    """:func:`pad_same` as a module."""

    def forward(self, input: Tensor) -> Tensor:
        return pad_same(input)


class FoldedASPP(nn.Module):
    """:class:`deeplab_fast.ASPP` in evaluation mode as one :func:`deeplab_fast.aspp`."""

    def __init__(self, module: ASPP) -> None:
        super().__init__()
        if type(module) is not ASPP:
            raise _cannot_prepare(module, "deeplab_fast.ASPP")
        branches: list[Any] = list(module.convs)
        pool = branches.pop()
        for activation in (*(branch[2] for branch in branches), pool[3], module.project[2]):
            if type(activation) is not nn.ReLU:
                raise _cannot_prepare(activation, "nn.ReLU")
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
        return aspp(input, *self.operands())


class FusedBottleneck(nn.Module):
    """:class:`Bottleneck` in evaluation mode as three or four fused convolutions."""

    def __init__(self, block: Bottleneck) -> None:
        super().__init__()
        self.conv1 = fused(block.conv1, block.bn1, block.relu)
        self.conv2 = fused(block.conv2, block.bn2, block.relu)
        self.conv3 = fused(block.conv3, block.bn3, block.relu)
        self.downsample = None if block.downsample is None else fused(*block.downsample)

    def forward(self, input: Tensor) -> Tensor:
        residual = input if self.downsample is None else self.downsample(input)
        return self.conv3(self.conv2(self.conv1(input)), residual)


class FusedInvertedResidual(nn.Module):
    """:class:`InvertedResidual` in evaluation mode as two or three fused convolutions."""

    def __init__(self, block: InvertedResidual) -> None:
        super().__init__()
        layers: list[Any] = list(block.conv)
        *conv_norm_relus, conv, norm = layers
        self.layers = nn.Sequential(*(fused(*layer) for layer in conv_norm_relus))
        self.project = fused(conv, norm)
        self.residual = block.residual

    def forward(self, input: Tensor) -> Tensor:
        return self.project(self.layers(input), input if self.residual else None)


class FusedBackbone(nn.Sequential):
    """Sequence of fused layers, for images of any floating dtype and memory format."""

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        weight = next(self.parameters())
        if images.device != weight.device:
            raise ValueError(
                f"images: expected on {weight.device}, like the weights, got {images.device}"
            )
        features = super().forward(images.to(weight.dtype, memory_format=torch.channels_last))
        return {"out": features}


class InferenceModel(SegmentationModel):
    """Model that ``DeepLabV3.prepare_for_inference`` returns. It cannot be trained or saved.

    Residual blocks overwrite their input, so a hook that keeps an activation has to copy it. The
    logits of an image with NaN or Inf are NaN. This also holds on a CPU, although oneDNN's ReLU
    turns NaN into 0.

    On a GPU, ``forward`` and ``predict`` replay CUDA graphs; see
    ``DeepLabV3.prepare_for_inference``. Copies and pickles of the model have none yet.
    """

    def __init__(self, *args: Any, cuda_graphs: bool = True) -> None:
        super().__init__(*args)
        self._cuda_graphs = CudaGraphs() if cuda_graphs else None

    def train(self, mode: bool = True) -> InferenceModel:
        if mode:
            raise RuntimeError(
                "a model prepared for inference cannot be trained: train the model it was made from"
            )
        super().train(False)
        return self

    def forward(self, images: Tensor) -> OrderedDict[str, Tensor]:
        return self._replayed(super().forward, images)

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        self._drop_cuda_graphs()
        return super().load_state_dict(*args, **kwargs)

    def _predict(self, images: Tensor, size: tuple[int, int] | None, dtype: torch.dtype) -> Tensor:
        return self._replayed(super()._predict, images, size, dtype)

    def _replayed(self, method: Callable[..., _T], images: Tensor, *options: Any) -> _T:
        if self._cuda_graphs is None:
            return method(images, *options)
        return self._cuda_graphs(self, method, images, *options)

    def _apply(self, *args: Any, **kwargs: Any) -> InferenceModel:
        self._drop_cuda_graphs()
        return super()._apply(*args, **kwargs)

    def _drop_cuda_graphs(self) -> None:
        if self._cuda_graphs is not None:
            self._cuda_graphs.clear()

    def _classify(self, features: dict[str, Tensor], images: Tensor) -> Tensor:
        logits = super()._classify(features, images)
        if images.device.type != "cpu":
            return logits
        nan_or_zero = 0 * images.sum((1, 2, 3), keepdim=True, dtype=torch.float32)
        return logits + nan_or_zero.to(logits.dtype)


def prepare(
    model: SegmentationModel, dtype: torch.dtype | None, cuda_graphs: bool
) -> InferenceModel:
    """Fold and fuse a model; see ``DeepLabV3.prepare_for_inference``."""
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise TypeError(f"dtype: expected a floating-point torch.dtype or None, got {dtype!r}")
    prepared: Any = InferenceModel(
        _fused_backbone(model.backbone),
        _fused_head(model.classifier),
        None,
        model.align_corners,
        model.preprocessing,
        model.categories,
        cuda_graphs=cuda_graphs,
    )
    prepared.to(dtype=dtype, memory_format=torch.channels_last)
    *layers, last = prepared.classifier
    for layer in (prepared.backbone, *layers):
        for parameter in layer.parameters():
            last.bias += 0 * parameter.sum(dtype=torch.float64)  # keeps NaN that ReLU would drop
    return prepared.eval()


def _fused_backbone(backbone: Any) -> FusedBackbone:
    if isinstance(backbone, ResNet):
        stages: tuple[Any, ...] = (
            backbone.layer1,
            backbone.layer2,
            backbone.layer3,
            backbone.layer4,
        )
        return FusedBackbone(
            fused(backbone.conv1, backbone.bn1, backbone.relu),
            backbone.maxpool,
            *(FusedBottleneck(block) for stage in stages for block in stage),
        )
    stem, *blocks = backbone.features
    return FusedBackbone(fused(*stem), *(FusedInvertedResidual(block) for block in blocks))


def _fused_head(head: Any) -> nn.Sequential:
    pyramid, *conv_norm_relu, last = head
    if len(conv_norm_relu) not in (0, 3):
        raise _cannot_prepare(head, "ASPP, convolution, batch norm, ReLU and convolution")
    layers = [fused(*conv_norm_relu)] if conv_norm_relu else []
    return nn.Sequential(FoldedASPP(pyramid), *layers, fused(last))


def fused(conv: Any, norm: Any = None, activation: nn.Module | None = None) -> nn.Module:
    """One module for a convolution, its batch norm in evaluation mode and its activation.

    Raises:
        TypeError: one of them was replaced by a module that cannot be fused.
    """
    if type(activation) not in _ACTIVATIONS:
        raise _cannot_prepare(activation, "nn.ReLU or nn.ReLU6")
    weight, bias = folded(conv, norm)
    layer = FusedConv2d(
        weight,
        bias,
        conv.stride,
        conv.padding,
        conv.dilation,
        conv.groups,
        _ACTIVATIONS[type(activation)],
    )
    return nn.Sequential(PadSame(), layer) if isinstance(conv, SameConv2d) else layer


def folded(conv: Any, norm: Any) -> tuple[Tensor, Tensor]:
    """Weight and bias of the convolution that equals ``norm(conv(x))`` in evaluation mode.

    They are computed in float64 and rounded once, at the end.

    Raises:
        TypeError: one of them was replaced by a module that cannot be folded.
    """
    if not isinstance(conv, nn.Conv2d) or conv.padding_mode != "zeros":
        raise _cannot_prepare(conv, "nn.Conv2d with zero padding")
    weight = conv.weight.detach().double()
    bias = weight.new_zeros(weight.size(0)) if conv.bias is None else conv.bias.detach().double()
    if norm is not None:
        mean, var = (getattr(norm, name, None) for name in ("running_mean", "running_var"))
        if not isinstance(norm, (nn.BatchNorm2d, nn.SyncBatchNorm)) or mean is None or var is None:
            raise _cannot_prepare(norm, "nn.BatchNorm2d with running statistics")
        scale = norm.weight.detach().double() / (var.double() + norm.eps).sqrt()
        weight = weight * scale[:, None, None, None]
        bias = norm.bias.detach().double() + scale * (bias - mean.double())
    return weight.to(conv.weight.dtype), bias.to(conv.weight.dtype)


def _cannot_prepare(module: nn.Module | None, expected: str) -> TypeError:
    return TypeError(f"cannot prepare a {type(module).__name__}: expected {expected}")


def _frozen(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)
