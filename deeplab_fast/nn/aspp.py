"""Atrous spatial pyramid pooling as a module, with the parameters and keys of torchvision's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops.dilated_conv2d import dilated_conv2d
from ..ops.dilated_conv2d_and_mean import parallel_dilated_conv2d_and_mean


class Conv2d(nn.Conv2d):
    """``nn.Conv2d`` with a right weight gradient where it is dilated, in half precision, on a CPU.

    PyTorch's is wrong there on many x86 CPUs (docs/onednn_bf16_weight_gradient.md), so that
    :func:`deeplab_fast.dilated_conv2d`, which has no second derivatives, takes its place.
    """

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if max(self.dilation) > 1 and _keeps_size(self) and _trains_in_half_on_cpu(input, weight):
            vertical, horizontal = self.dilation
            return dilated_conv2d(input, weight, bias, (vertical, horizontal), self.groups)
        return super()._conv_forward(input, weight, bias)


def _trains_in_half_on_cpu(input: Tensor, weight: Tensor) -> bool:
    if not isinstance(input, Tensor):  # torch.fx traces with proxies
        return False
    if input.device.type != "cpu" or not (weight.requires_grad and torch.is_grad_enabled()):
        return False
    dtype = input.dtype
    if torch.is_autocast_enabled("cpu") and dtype != torch.float64:
        dtype = torch.get_autocast_dtype("cpu")
    return dtype in (torch.bfloat16, torch.float16)


def _keeps_size(conv: nn.Conv2d) -> bool:
    return (conv.stride, conv.padding, conv.padding_mode) == ((1, 1), _same(conv), "zeros")


class ASPP(nn.Module):
    """Atrous spatial pyramid pooling (Chen et al. 2017, section 3.3).

    A 1x1 convolution, one 3x3 atrous convolution per rate and image pooling, in parallel, each with
    batch norm and ReLU; projected together by a 1x1 convolution with batch norm, ReLU and dropout
    0.5. Takes the place of ``torchvision.models.segmentation.deeplabv3.ASPP``: the same keys
    (``convs.{0..}``, ``project``), numbers, seeded initialisation and dropout.

    The branches run as one :func:`deeplab_fast.parallel_dilated_conv2d` and one batch norm. The
    pooled branch is constant over space, so its share of the projection is added as a bias per
    image and neither its broadcast nor the concatenation with it exists; its gradient reaches the
    input in the kernel that writes that of the branches. Where somebody hooked or replaced a module
    inside, all of them are called one by one instead; a batch norm replaced by another
    normalisation than SyncBatchNorm only keeps the norms apart.

    Args:
        in_channels: channels of the input.
        atrous_rates: one rate per 3x3 branch; () leaves the 1x1 branch and the pooling.
        out_channels: channels of each branch and of the output.

    Input [N, in_channels, H, W] of any size; output [N, out_channels, H, W].

    Raises:
        ValueError: batch 1 while the batch norm of the pooled branch is in training mode: one value
            per channel cannot be normalised. ``aspp.convs[-1].eval()``, repeated after each
            ``train()``, makes that branch use its running statistics.

    >>> aspp = ASPP(2048, (12, 24, 36)).eval()
    >>> y = aspp(torch.randn(1, 2048, 65, 65))
    """

    def __init__(
        self, in_channels: int, atrous_rates: Sequence[int], out_channels: int = 256
    ) -> None:
        super().__init__()
        self.convs: Any
        self.project: Any
        branches = [_conv_norm_relu(in_channels, out_channels)]
        branches += [_conv_norm_relu(in_channels, out_channels, 3, rate) for rate in atrous_rates]
        pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), *_conv_norm_relu(in_channels, out_channels))
        self.convs = nn.ModuleList([*branches, pool])
        self.project = _conv_norm_relu(len(self.convs) * out_channels, out_channels)
        self.project.append(nn.Dropout(0.5))

    def forward(self, input: Tensor) -> Tensor:
        *branches, pool = self.convs
        pool_norm = pool[2]
        if type(pool_norm) is nn.BatchNorm2d and pool_norm.training and input.size(0) == 1:
            raise ValueError(
                "ASPP: batch norm cannot normalise the one value per channel that image pooling "
                "leaves of a batch of 1 in training mode. Train with at least 2 images a batch, or "
                "let that branch use its running statistics: aspp.convs[-1].eval() after each "
                "train() (in DeepLabV3: model.classifier[0].convs[-1].eval())"
            )
        if not self._as_built():
            pooled = pool(input).expand(-1, -1, *input.shape[2:])
            return self.project(torch.cat([*(branch(input) for branch in branches), pooled], dim=1))

        convs, norms, _ = zip(*branches)
        features, pooled = parallel_dilated_conv2d_and_mean(
            input, [conv.weight for conv in convs], [conv.dilation[0] for conv in convs]
        )
        for module in list(pool)[1:]:
            pooled = module(pooled)
        if _are_alike(norms):
            features = _batch_norm(features, norms).relu_()
        else:
            chunks = features.split([conv.out_channels for conv in convs], dim=1)
            features = torch.cat([norm(x).relu() for norm, x in zip(norms, chunks)], dim=1)

        conv, norm, relu, dropout = self.project
        weight, pool_weight = conv.weight.split([features.size(1), pooled.size(1)], dim=1)
        output = _conv1x1(features, weight, F.conv2d(pooled, pool_weight).flatten(1))
        return dropout(relu(norm(output)))

    def _as_built(self) -> bool:
        """Whether the modules that forward does not call are plain ones nobody listens to."""
        *branches, pool = self.convs
        return (
            [len(branch) for branch in (*branches, self.project)] == [*[3] * len(branches), 4]
            and type(pool[0]) is nn.AdaptiveAvgPool2d
            and pool[0].output_size == 1
            and all(_is_plain(branch[0]) for branch in (*branches, self.project))
            and all(type(branch[2]) is nn.ReLU for branch in branches)
            and not any(map(_is_hooked, (*self.convs.modules(), *self.project.modules())))
        )


def _conv_norm_relu(
    in_channels: int, out_channels: int, kernel_size: int = 1, dilation: int = 1
) -> nn.Sequential:
    padding = dilation * (kernel_size // 2)
    return nn.Sequential(
        Conv2d(
            in_channels, out_channels, kernel_size, padding=padding, dilation=dilation, bias=False
        ),
        nn.BatchNorm2d(out_channels),
        nn.ReLU(),
    )


def _conv1x1(input: Tensor, weight: Tensor, image_bias: Tensor) -> Tensor:
    """1x1 convolution with a bias [N, K] per image, in one sum: half precision rounds it once."""
    N, C, H, W = input.shape
    K = weight.size(0)
    bias = image_bias[:, None].expand(N, H * W, K)
    pixels = input.permute(0, 2, 3, 1).reshape(N * H * W, C)
    output = torch.addmm(bias.reshape(N * H * W, K), pixels, weight.flatten(1).t())
    output = output.view(N, H, W, K).permute(0, 3, 1, 2)
    in_channels_last = input.is_contiguous(memory_format=torch.channels_last)
    return output if in_channels_last else output.contiguous()


def _is_plain(conv: Any) -> bool:
    """Whether this is nothing but the convolution that its weight and dilation tell."""
    return type(conv) in (nn.Conv2d, Conv2d) and (
        _keeps_size(conv)
        and (conv.bias, conv.groups, conv.dilation) == (None, 1, conv.dilation[:1] * 2)
    )


def _same(conv: nn.Conv2d) -> tuple[int, ...]:
    return tuple(d * (k // 2) for d, k in zip(conv.dilation, conv.kernel_size))


def _is_hooked(module: nn.Module) -> bool:
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )


def _are_alike(norms: Sequence[Any]) -> bool:
    """Whether these are batch norms that :func:`_batch_norm` can run as one."""
    first = norms[0]
    return type(first) in (nn.BatchNorm2d, nn.SyncBatchNorm) and all(
        type(norm) is type(first)
        and getattr(norm, "process_group", None) is getattr(first, "process_group", None)
        and norm.affine
        and norm.track_running_stats
        and norm.momentum is not None
        and (norm.training, norm.momentum, norm.eps) == (first.training, first.momentum, first.eps)
        for norm in norms
    )


def _batch_norm(input: Tensor, norms: Sequence[Any]) -> Tensor:
    """The norms on consecutive channels of ``input`` as one: statistics are per channel."""
    first = norms[0]
    mean = torch.cat([norm.running_mean for norm in norms])
    var = torch.cat([norm.running_var for norm in norms])
    weight = torch.cat([norm.weight for norm in norms])
    bias = torch.cat([norm.bias for norm in norms])
    if isinstance(first, nn.SyncBatchNorm):  # has no function, only a module
        merged = {"running_mean": mean, "running_var": var, "weight": weight, "bias": bias}
        merged["num_batches_tracked"] = input.new_zeros((), dtype=torch.int64)  # counted below
        output = torch.func.functional_call(first, merged, (input,))
    else:
        output = F.batch_norm(
            input, mean, var, weight, bias, first.training, first.momentum, first.eps
        )
    if first.training:
        sizes = [norm.num_features for norm in norms]
        for norm, new_mean, new_var in zip(norms, mean.split(sizes), var.split(sizes)):
            norm.running_mean.copy_(new_mean)
            norm.running_var.copy_(new_var)
            norm.num_batches_tracked.add_(1)
    return output
