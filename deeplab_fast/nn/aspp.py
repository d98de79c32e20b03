"""Atrous spatial pyramid pooling as a module, with the parameters and keys of torchvision's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from ..ops._arguments import check_tensor, int_list, integer
from .conv import conv_norm_relu
from .pyramid import atrous_branches, is_atrous_branch, project


class ASPP(nn.Module):
    """Atrous spatial pyramid pooling (Chen et al. 2017, section 3.3).

    The parallel branches are a 1x1 convolution, one 3x3 atrous convolution per rate, and image
    pooling, each with batch norm and ReLU. A 1x1 convolution with batch norm, ReLU and dropout 0.5
    projects them. The module is a drop-in replacement for
    ``torchvision.models.segmentation.deeplabv3.ASPP``, with the same state dict keys
    (``convs.{0..}``, ``project``), outputs, seeded initialisation and dropout.

    The branches run as one :func:`deeplab_fast.parallel_dilated_conv2d` and one batch norm. The
    pooled branch is constant over an image, so its contribution to the projection is added as a
    bias per image. It is neither broadcast nor concatenated, and the kernel that writes the
    gradient of the input also adds the gradient of this branch. With ``separable`` or
    ``project_size=3``, if a submodule was replaced or hooked, or in a graph of torch.fx, the
    submodules are called one by one instead. If only batch norms were replaced, by a normalisation
    other than SyncBatchNorm, only the normalisation runs branch by branch.

    Args:
        in_channels: channels of the input.
        atrous_rates: one rate per 3x3 branch; () for the 1x1 branch and image pooling only.
        out_channels: channels of each branch and of the output.
        separable: depthwise atrous convolutions followed by 1x1 ones, instead of dense 3x3 ones
            (Chen et al. 2018, section 3.1).
        depthwise_norm: see :class:`SeparableConv2d`.
        project_size: 1, or 3 for a 3x3 projection as in mmsegmentation.
        dropout: probability of dropout after the projection.

    Input [N, in_channels, H, W] of any size; output [N, out_channels, H, W].

    Raises:
        ValueError: ``project_size`` is neither 1 nor 3.
        ValueError: the batch size is 1 while the batch norm of the pooled branch is in training
            mode: one value per channel cannot be normalised. ``aspp.convs[-1].eval()``, repeated
            after each ``train()``, makes that branch use its running statistics.

    >>> aspp = ASPP(2048, (12, 24, 36)).eval()
    >>> y = aspp(torch.randn(1, 2048, 65, 65))
    """

    def __init__(
        self,
        in_channels: int,
        atrous_rates: Sequence[int],
        out_channels: int = 256,
        *,
        separable: bool = False,
        depthwise_norm: bool = False,
        project_size: int = 1,
        dropout: float = 0.5,
    ) -> None:
        super().__init__()
        if project_size not in (1, 3):
            raise ValueError(f"project_size: expected 1 or 3, got {project_size}")
        self.convs: Any
        self.project: Any
        atrous_rates = int_list(atrous_rates, "atrous_rates")
        out_channels = integer(out_channels, "out_channels")
        shape = integer(in_channels, "in_channels"), out_channels
        branches = [conv_norm_relu(*shape)]
        for rate in atrous_rates:
            branches.append(conv_norm_relu(*shape, 3, rate, separable, depthwise_norm))
        pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), *conv_norm_relu(*shape))
        self.convs = nn.ModuleList([*branches, pool])
        self.project = conv_norm_relu(len(self.convs) * out_channels, out_channels, project_size)
        self.project.append(nn.Dropout(dropout))

    def forward(self, input: Tensor) -> Tensor:
        *branches, pool = self.convs
        is_traced = isinstance(input, fx.Proxy)
        if not is_traced:
            self._check_batch(input)
        if is_traced or not self._is_unmodified():
            pooled = pool(input).expand(-1, -1, input.size(2), input.size(3))
            return self.project(torch.cat([*(branch(input) for branch in branches), pooled], dim=1))

        convs, norms, _ = zip(*branches)
        features, pooled = atrous_branches(input, convs, norms, relu=True)
        for module in list(pool)[1:]:
            pooled = module(pooled)
        conv, *rest = self.project
        output = project(conv, [features], pooled, [])
        for module in rest:
            output = module(output)
        return output

    def _check_batch(self, input: Tensor) -> None:
        check_tensor(input, "input")
        norm = self.convs[-1][2]
        if type(norm) is nn.BatchNorm2d and norm.training and input.size(0) == 1:
            raise ValueError(
                "ASPP: expected at least 2 images in training mode, got a batch of 1: batch norm "
                "cannot normalise the one value per channel of image pooling. Use larger batches, "
                "or the running statistics of that branch, by aspp.convs[-1].eval() after each "
                "train() (DeepLabV3: model.classifier[0].convs[-1].eval(); DeepLabV3Plus: "
                "model.classifier[0].aspp.convs[-1].eval(), with aspp_conv "
                "model.classifier[0].aspp[0].convs[-1].eval())"
            )

    def _is_unmodified(self) -> bool:
        """True if no submodule was replaced or hooked."""
        *branches, pool = self.convs
        return (
            [len(branch) for branch in (*branches, self.project)] == [*[3] * len(branches), 4]
            and type(pool[0]) is nn.AdaptiveAvgPool2d
            and pool[0].output_size == 1
            and all(is_atrous_branch(branch[0]) for branch in (*branches, self.project))
            and self.project[0].kernel_size == (1, 1)
            and all(type(branch[2]) is nn.ReLU for branch in branches)
            and not any(map(_is_hooked, (*self.convs.modules(), *self.project.modules())))
        )


def _is_hooked(module: nn.Module) -> bool:
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )
