"""Replacement of parts of a model, in place, for training."""

from __future__ import annotations

import os.path
from collections import defaultdict
from collections.abc import Iterator

from torch import nn

from . import module as swapped
from .convolutions import accelerate_convolution, kind_of, unsupported_reason
from .pyramids import Found, accelerate_pyramids
from .report import Entry, Report


def replace_parts(model: nn.Module) -> Report:
    """Replace the parts of ``model`` for which this package has a faster form.

    Parts that were replaced before are restored first, so a second call finds the same parts.

    A module that contains an atrous spatial pyramid gets another ``forward`` (pyramids.py), and a
    dilated convolution becomes one that runs :func:`deeplab_fast.dilated_conv2d` where
    :class:`deeplab_fast.nn.Conv2d` does. In fp32 on a CPU such a convolution stays PyTorch's.

    Pyramids with two or more dense branches have no second derivatives afterwards, because the op
    that runs them has none. torch.jit.script compiles the original code.
    """
    restore_parts(model)
    names = {module: name for name, module in model.named_modules()}
    pyramids, entries = _replace_pyramids(names)
    joint = {root.get_submodule(path) for root, found in pyramids.items() for path in found.joint}
    others = [module for module in names if isinstance(module, nn.Conv2d) and module not in joint]
    return Report([*entries, *_replace_convolutions(others, names), *_own_parts(names)])


def restore_parts(model: nn.Module) -> None:
    """Undo :func:`replace_parts`."""
    for submodule in model.modules():
        swapped.restore(submodule)


def _replace_pyramids(names: dict[nn.Module, str]) -> tuple[dict[nn.Module, Found], list[Entry]]:
    """Replace modules that contain pyramids, the innermost ones first."""
    replaced: dict[nn.Module, Found] = {}
    reasons: dict[tuple[nn.Module, ...], tuple[nn.Module, str]] = {}
    for module in reversed(names):  # submodules come after their parents
        if _is_ours(module) or sum(isinstance(m, nn.Conv2d) for m in module.modules()) < 2:
            continue
        found = accelerate_pyramids(module, replaced)
        if found.replacement:
            replaced[module] = found
        for miss in found.misses:  # code of a submodule is part of the graphs of its parents, too
            reasons.setdefault(miss.convs, (module, miss.reason))
    entries = [Entry(names[m], "ASPP", replaced[m].replacement) for m in names if m in replaced]
    missed: dict[str, list[str]] = defaultdict(list)
    for module, reason in reasons.values():
        missed[reason].append(names[module])
    kind = "concatenation of convolutions"
    entries += [
        Entry(_joined(paths), _counted(kind, paths), None, reason, tuple(paths))
        for reason, paths in missed.items()
    ]
    return replaced, entries


def _replace_convolutions(convs: list[nn.Conv2d], names: dict[nn.Module, str]) -> Iterator[Entry]:
    """Replace the dilated convolutions among ``convs``. One entry for all that are alike."""
    alike: dict[tuple[str, str | None, str], list[str]] = defaultdict(list)
    for conv in convs:
        kind = kind_of(conv)
        if kind is None or _is_ours(conv):
            continue
        reason = unsupported_reason(conv)
        replacement = accelerate_convolution(conv) if reason is None else None
        alike[kind, replacement, reason or ""].append(names[conv])
    for (kind, replacement, reason), paths in alike.items():
        yield Entry(_joined(paths), _counted(kind, paths), replacement, reason, tuple(paths))


def _own_parts(names: dict[nn.Module, str]) -> Iterator[Entry]:
    paths = [name for module, name in names.items() if _is_ours(module)]
    if paths:
        reason = "these modules use our kernels already"
        yield Entry(_joined(paths), "modules of deeplab_fast", None, reason, tuple(paths))


def _is_ours(module: nn.Module) -> bool:
    source = swapped.original_class(module).__module__
    return source.startswith("deeplab_fast.")


def _joined(paths: list[str]) -> str:
    """The path of one module, or what the paths of several have in common, followed by "*"."""
    if len(paths) == 1 or "" in paths:
        return paths[0]
    common = os.path.commonprefix([path.split(".") for path in paths])
    return ".".join([*common, "*"])


def _counted(kind: str, paths: list[str]) -> str:
    return kind if len(paths) == 1 else f"{kind} ({len(paths)})"
