"""Replacement of parts of a model, in place, for training."""

from __future__ import annotations

from torch import nn

from . import module
from .report import Entry, Report


def replace_parts(model: nn.Module) -> Report:
    """Replace the parts of ``model`` that are faster with this package."""
    entries: list[Entry] = []
    return Report(entries)


def restore_parts(model: nn.Module) -> None:
    for submodule in model.modules():
        module.restore(submodule)
