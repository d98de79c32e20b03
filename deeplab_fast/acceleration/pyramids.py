"""Replacement of the modules whose ``forward`` contains atrous spatial pyramids."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator
from itertools import chain

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..models.fusion.layers import is_hooked
from ..models.fusion.module import steps_of
from ..models.fusion.tracing import traced
from .matching import Found, Miss, Rewriting
from .module import replace
from .rewritten import Graphs, Rewritten


def accelerate_pyramids(root: nn.Module, leaves: Collection[nn.Module] = ()) -> Found:
    """Replace the class of ``root`` if its own ``forward`` contains pyramids.

    Args:
        leaves: submodules whose code is not looked into.
    """
    norms = [module for module in root.modules() if isinstance(module, _BatchNorm)]
    rewritings = []
    for mode in (True, False):
        with _in_mode(root, mode), torch.enable_grad():
            graph = traced(root, {*leaves, *norms})
        if graph is None:
            return Found([], False, _untraced(root, leaves))
        rewritings.append(Rewriting(root, graph))
        found = rewritings[-1].run()
        if not found.replacement:
            return found
    training, evaluation = rewritings
    steps = steps_of(evaluation.graph), steps_of(training.graph)
    parts = {*evaluation.parts(), *training.parts()}
    replace(root, Rewritten, _graphs=Graphs(root, steps, sorted(parts)))
    return found


@contextlib.contextmanager
def _in_mode(root: nn.Module, training: bool) -> Iterator[None]:
    before = [(module, module.training) for module in root.modules()]
    try:
        for module, _ in before:
            module.training = training
        yield
    finally:
        for module, mode in before:
            module.training = mode


def _untraced(root: nn.Module, leaves: Collection[nn.Module]) -> list[Miss]:
    """The miss of an untraceable module that concatenates and has dilated convolutions."""
    known = {module for leaf in leaves for module in leaf.modules()}
    dilated = tuple(
        module
        for module in root.modules()
        if isinstance(module, nn.Conv2d) and max(module.dilation) > 1 and module not in known
    )
    functions = [vars(cls).values() for cls in type(root).__mro__ if cls is not nn.Module]
    codes = [getattr(function, "__code__", None) for function in chain(*functions)]
    concatenates = any(code and {"cat", "concat"} & {*code.co_names} for code in codes)
    if not (dilated and concatenates):
        return []
    has_hooks = any(map(is_hooked, root.modules()))
    return [Miss(dilated, "it has hooks" if has_hooks else "torch.fx cannot trace its code")]
