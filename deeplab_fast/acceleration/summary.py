"""Entries of the report on a copy for inference."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import nn

from ..models import fusion
from ..models.fusion import FoldedASPP, FusedConv2d
from .report import Entry
from .trial import Trial


def entries_of(
    original: Mapping[str, type], network: nn.Module, fused: fusion.Report, trial: Trial | None
) -> list[Entry]:
    """One entry for the convolutions of each part, for each ASPP and each kept convolution.

    Args:
        original: the classes of the modules of the model before the fusion, by name.
        network: the fused network.
        fused: the report of the fusion.
        trial: None if the network is not used.
    """
    modules = dict(network.named_modules())
    entries = []
    for part in dict.fromkeys(map(_part, fused.fused | fused.kept)):
        before = [kind for name, kind in original.items() if _part(name) == part]
        after = {name: module for name, module in modules.items() if _part(name) == part}
        entries += _entries_of_part(part, before, after)
    entries += [Entry(name, "convolution", None, reason) for name, reason in fused.kept.items()]
    if trial is not None and trial.resize:
        is_fused = trial.resize.startswith("bilinear")
        replacement = trial.resize if is_fused else None
        entries.append(Entry("", "final resize", replacement, "" if is_fused else trial.resize))
    elif trial is not None:
        reason = f"unknown until predict runs, because a trial run failed: {trial.failure}"
        entries.append(Entry("", "final resize", None, reason))
    return entries


def _part(name: str) -> str:
    return name.partition(".")[0]


def _entries_of_part(
    part: str, before: Iterable[type], after: Mapping[str, nn.Module]
) -> list[Entry]:
    layers = [module for module in after.values() if isinstance(module, FusedConv2d)]
    kept = [module for module in after.values() if isinstance(module, nn.Conv2d)]
    total = sum(issubclass(kind, nn.Conv2d) for kind in before)
    aspps = [name for name, module in after.items() if isinstance(module, FoldedASPP)]
    entries = []
    if layers:
        done = f"{total - len(kept)} of {total} fused"
        counts = {
            "with batch norm": sum(layer.has_norm for layer in layers),
            "with ReLU": sum(layer.activation == "relu" for layer in layers),
            "with ReLU6": sum(layer.activation == "relu6" for layer in layers),
            "with a residual": sum(layer.has_residual for layer in layers),
        }
        details = [f"{count} {what}" for what, count in counts.items() if count]
        entries.append(Entry(part, "convolutions", ", ".join([done, *details])))
    entries += [Entry(name, "ASPP", "deeplab_fast.aspp") for name in aspps]
    return entries
