"""Copies of models for inference."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..models.fusion import fuse_with_report
from ..nn.deferred import DeferredUpsampling, deferred_upsampling
from ..ops.upsample_argmax import upsample_argmax
from .report import Entry, Report
from .training import restore_parts


class AcceleratedModel(nn.Module):
    """A model for inference, with the outputs of the original and the method :meth:`predict`."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.network(*args, **kwargs)

    @torch.no_grad()
    def predict(
        self,
        images: Tensor,
        size: tuple[int, int] | None = None,
        dtype: torch.dtype = torch.int64,
    ) -> Tensor:
        """The class of every pixel, computed without full-resolution logits."""
        with deferred_upsampling():
            logits = _logits_of(self.network(images))
        if isinstance(logits, DeferredUpsampling) and logits.is_pending:
            _, _, align_corners = logits.interpolation
            size = size or logits.interpolation.size
            return upsample_argmax(logits.logits, size, align_corners=align_corners, dtype=dtype)
        return upsample_argmax(logits, size or (images.size(2), images.size(3)), dtype=dtype)


def _logits_of(output: Any) -> Tensor:
    if isinstance(output, Mapping):
        return output["out"] if "out" in output else output["logits"]
    return output


def prepare(model: nn.Module) -> tuple[nn.Module, Report]:
    """An :class:`AcceleratedModel` of ``model``, or ``model`` itself if nothing can be fused."""
    model_copy = copy.deepcopy(model)
    restore_parts(model_copy)
    network, fused = fuse_with_report(model_copy)
    entries = [Entry(name, "convolution", layer) for name, layer in fused.fused.items()]
    entries += [Entry(name, "convolution", None, reason) for name, reason in fused.kept.items()]
    report = Report(entries)
    return (AcceleratedModel(network) if report.replaced() else model), report
