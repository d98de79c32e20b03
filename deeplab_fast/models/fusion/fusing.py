"""Networks whose convolutions are fused with what follows them: :func:`fuse`.

torch.fx turns a network into graphs of calls (tracing.py). In each graph, convolutions, batch
norms, activations and sums become calls of fused layers (rewriting.py, layers.py).
"""

from __future__ import annotations

import copy
from collections.abc import Collection
from typing import NamedTuple

import torch
from torch import nn

from ...nn import ASPP
from .layers import FoldedASPP, FusedConv2d, can_fold, unsupported_reason
from .rewriting import Rewriting
from .tracing import is_kept, traced


class Report(NamedTuple):
    """Layers of a network after fusion.

    Attributes:
        fused: the shape, options and activation of each fused layer, or "ASPP", by its name in the
            result.
        kept: the convolutions that run as before, by name, and why.
    """

    fused: dict[str, str]
    kept: dict[str, str]


def fuse(module: nn.Module, outputs: Collection[str] | None = None) -> nn.Module:
    """A copy of ``module`` in evaluation mode with fused convolutions, for inference.

    Convolutions run as one kernel together with batch norm, ReLU or ReLU6 and the addition of a
    residual after them. :class:`deeplab_fast.ASPP` runs as :func:`deeplab_fast.aspp`. Weights are
    folded in float64 and rounded once. What cannot be fused stays as it is. The copy is fastest for
    images in channels_last. It cannot be differentiated, it stays in evaluation mode, and its
    submodules and intermediate results are not those of ``module``.

    The copy computes what ``module`` computes for inputs of all sizes, with these limits: code must
    not compare ``type(x)`` of an input or intermediate result, and side effects other than changes
    of buffers happen once, when ``module`` is fused, or not at all.

    Args:
        module: any module. It is not changed.
        outputs: the needed entries of the dict that ``module`` returns; others are not computed
            where torch.fx can trace ``module``. None for all.

    >>> fused = fuse(torchvision.models.resnet18().eval())
    """
    return fuse_with_report(module, outputs)[0]


def fuse_with_report(
    module: nn.Module, outputs: Collection[str] | None = None
) -> tuple[nn.Module, Report]:
    """:func:`fuse`, and a report of what was fused."""
    return fuse_without_copy(copy.deepcopy(module), outputs)


def fuse_without_copy(
    module: nn.Module, outputs: Collection[str] | None = None
) -> tuple[nn.Module, Report]:
    """:func:`fuse_with_report` of a module that nothing else needs, because it is changed."""
    module.eval()
    for parameter in module.parameters():
        if parameter.is_leaf:  # those of a copied torch.jit module are not
            parameter.requires_grad_(False)
    with torch.no_grad():
        fused = _fused_module(module, outputs)
    return fused, _report(fused)


def _report(module: nn.Module) -> Report:
    report = Report({}, {})
    for name, layer in module.named_modules():
        if isinstance(layer, FusedConv2d):
            report.fused[name] = layer.extra_repr()
        elif isinstance(layer, FoldedASPP):
            report.fused[name] = "ASPP"
        elif isinstance(layer, nn.Conv2d):
            reason = unsupported_reason(layer) or "in a module that torch.fx cannot trace"
            report.kept[name] = reason
    return report


def _fused_module(module: nn.Module, outputs: Collection[str] | None = None) -> nn.Module:
    if can_fold(module):
        return FoldedASPP(module)  # type: ignore[arg-type]
    if is_kept(module) and not (type(module) is ASPP and not module._is_unmodified()):
        return module
    graph = traced(module)
    if graph is None:
        _fuse_children(module)
        return module
    rewriting = Rewriting(module, graph)
    fused = rewriting.run(outputs)
    for kept in rewriting.kept:
        if not is_kept(kept):
            _fuse_children(kept)
    return fused


def _fuse_children(module: nn.Module) -> None:
    """Fuse within the modules that a module which stays as it is calls.

    Its own convolutions and the items of its containers stay, because its code may read them.
    """
    for name, child in list(module.named_children()):
        if isinstance(child, (nn.Sequential, nn.ModuleList, nn.ModuleDict)):
            _fuse_children(child)
        else:
            module._modules[name] = _fused_module(child)
