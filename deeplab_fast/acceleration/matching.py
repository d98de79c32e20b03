"""Atrous spatial pyramids in modules of any class, and their faster form.

A pyramid, as torch.fx sees it::

    input --- convolution --- batch norm --- ReLU ------------.
         |--- atrous convolution --- batch norm --- ReLU -----|
         |--- depthwise, pointwise, ... any other branch -----|--- torch.cat --- projection
         '--- mean --- convolution, norm, ReLU --- resize ----'

The branches may be in any order, and each kind may be missing. In the faster form the neighbouring
dense branches run as one convolution and one batch norm, and what the pooled branch contributes to
the projection is added as a bias per image (:mod:`deeplab_fast.nn.pyramid`). All other calls of the
graph stay.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..models.fusion.calls import RELUS, between, is_call_of, only_user
from ..models.fusion.layers import NO_OPS
from ..nn.pyramid import atrous_branches, is_atrous_branch, is_projection, project

_CONCATENATIONS = {torch.cat, torch.concat, torch.concatenate}
_SIZES = {getattr, operator.getitem, "size"}
_POINTWISE = (
    _BatchNorm, nn.GroupNorm, nn.ReLU, nn.ReLU6, nn.Hardtanh, nn.SiLU, nn.Hardswish, nn.Hardsigmoid,
    nn.GELU, nn.Sigmoid, nn.LeakyReLU, nn.ELU, nn.PReLU, *NO_OPS,
)  # fmt: skip


class Miss(NamedTuple):
    """A concatenation of convolved branches that stays as it is, and why."""

    convs: tuple[nn.Module, ...]
    reason: str


class Found(NamedTuple):
    """The pyramids of a module.

    Attributes:
        joint: paths of the convolutions that run as one.
        has_pool: True if there is a pooled branch.
        misses: see :class:`Miss`.
    """

    joint: list[str]
    has_pool: bool
    misses: list[Miss]

    def __add__(self, other: Found) -> Found:  # type: ignore[override]
        misses = self.misses + other.misses
        return Found(self.joint + other.joint, self.has_pool or other.has_pool, misses)

    @property
    def replacement(self) -> str:
        """A description of the rewritten pyramids; "" if there are none."""
        row = f"{len(self.joint)} branches as one convolution" if self.joint else ""
        bias = "pooled branch as a bias" if self.has_pool else ""
        return ", ".join(filter(None, (row, bias)))


class _Branch(NamedTuple):
    """A branch of a concatenation: the calls between the input and the concatenation."""

    calls: list[fx.Node]
    kind: str  # "dense", "pooled" or "other"
    relu: bool = False

    @property
    def groups(self) -> tuple[Any, ...]:
        """Dense branches with equal groups can run as one."""
        return self.kind == "dense", len(self.calls), self.relu


class Rewriting:
    """The rewriting of the pyramids in the graph of one module."""

    def __init__(self, root: nn.Module, graph: fx.Graph) -> None:
        self.root, self.graph = root, graph
        self.modules: dict[str, Any] = dict(root.named_modules(remove_duplicate=False))
        self.replaced: set[fx.Node] = set()  # calls that the new graph does not contain
        self.absorbed: set[str] = set()  # paths of modules that must stay, other than norms

    def run(self) -> Found:
        found = Found([], False, [])
        for node in list(self.graph.nodes):
            if is_call_of(node, _CONCATENATIONS):
                found += self.rewrite(node)
        return found

    def rewrite(self, cat: fx.Node) -> Found:
        """Rewrite the pyramid that ends with the concatenation ``cat``."""
        input, branches = self.branches(cat)
        if input is None:
            return Found([], False, [])
        joint = self.joint(branches)
        pooled = [branch for branch in branches if branch.kind == "pooled"]
        convs_of = [self.convs_of(branch) for branch in branches]
        convs = tuple(conv for row in convs_of for conv in row)
        if not (joint or pooled):
            # Longer branches are the paths of a network, and no pyramid.
            is_short = all(len(row) in (1, 2) for row in convs_of)
            is_pyramid = is_short and any(max(conv.dilation) > 1 for conv in convs)
            reason = "neither a pooled branch nor two dense branches with the same layers"
            return Found([], False, [Miss(convs, reason)] if is_pyramid else [])
        starts = {branch.calls[0] for branch in (*joint, *pooled)}
        first = next(node for node in self.graph.nodes if node in starts)
        unsupported = self.unsupported_reason(cat, input, first, joint, pooled)
        if unsupported is not None:
            return Found([], False, [Miss(convs, unsupported)])

        values: list[Any] = [branch.calls[-1] for branch in branches]
        if joint:
            with self.graph.inserting_before(first):
                features, mean = self.call_joint(input, joint)
            start = branches.index(joint[0])
            values[start : start + len(joint)] = [features]
            for branch in joint:
                self.forget(branch.calls)
            for branch in pooled:
                branch.calls[0].replace_all_uses_with(mean)
                self.forget(branch.calls[:1])
        with self.graph.inserting_before(cat):
            if pooled:
                resize = pooled[0].calls[-1]
                i = values.index(resize)
                operands = values[:i], resize.args[0], values[i + 1 :]
                (projection,) = cat.users
                conv = self.module_node(projection)
                output = self.graph.call_function(project, (conv, *operands))
                projection.replace_all_uses_with(output)
                self.forget([resize, projection])
                # Other convolutions of the pooled pixel might make several pixels of it.
                calls = pooled[0].calls
                nodes = [node for node in calls if isinstance(self.module_of(node), nn.Conv2d)]
                self.absorbed |= {str(node.target) for node in nodes}
            else:
                output = self.graph.call_function(torch.cat, (values, 1))
                cat.replace_all_uses_with(output if len(values) > 1 else values[0])
                self.replaced.add(output)
        self.forget([cat])
        self.drop_dead_calls()
        return Found([str(branch.calls[0].target) for branch in joint], bool(pooled), [])

    # --- reading the graph

    def branches(self, cat: fx.Node) -> tuple[fx.Node | None, list[_Branch]]:
        """The input and the branches of a pyramid; None and [] if ``cat`` has no common input."""
        values = cat.args[0] if cat.args else cat.kwargs.get("tensors")
        dim = cat.args[1] if len(cat.args) > 1 else cat.kwargs.get("dim", 0)
        if dim != 1 or not isinstance(values, (list, tuple)) or len({*values}) < len(values):
            return None, []
        paths = [list(_calls_back_from(value)) for value in values]
        for node in paths[0]:
            if all(node in path[1:] for path in paths):
                calls = [path[: path.index(node)][::-1] for path in paths]
                return node, [self.branch(branch) for branch in calls]
        return None, []

    def branch(self, calls: list[fx.Node]) -> _Branch:
        first, *rest = calls
        *_, last = calls
        readers = [user for user in last.users if not is_call_of(user, _SIZES)]
        if len(readers) > 1 or any(
            only_user(node) is not after for node, after in zip(calls, rest)
        ):
            return _Branch(calls, "other")
        if self.is_mean(first) and rest and _is_resize(last):
            is_pooled = all(map(self.keeps_one_pixel, rest[:-1]))
            return _Branch(calls, "pooled" if is_pooled else "other")
        relu = self.is_relu(last)
        norm = rest[:-1] if relu else rest
        is_norm = len(norm) <= 1 and all(isinstance(self.module_of(n), _BatchNorm) for n in norm)
        is_dense = is_atrous_branch(self.module_of(first)) and is_norm
        return _Branch(calls, "dense" if is_dense else "other", relu)

    def joint(self, branches: list[_Branch]) -> list[_Branch]:
        """The longest row of dense branches, if one of them is atrous."""
        rows = [list(row) for _, row in groupby(branches, lambda branch: branch.groups)]
        dense = [row for row in rows if row[0].kind == "dense" and len(row) > 1]
        longest = max(dense, key=len, default=[])
        is_atrous = any(max(self.module_of(b.calls[0]).dilation) > 1 for b in longest)
        return longest if is_atrous else []

    def convs_of(self, branch: _Branch) -> list[nn.Conv2d]:
        modules = [self.module_of(node) for node in branch.calls]
        return [module for module in modules if isinstance(module, nn.Conv2d)]

    def module_of(self, node: fx.Node) -> Any:
        return self.modules[str(node.target)] if node.op == "call_module" else None

    def is_relu(self, node: fx.Node) -> bool:
        return type(self.module_of(node)) is nn.ReLU or is_call_of(node, RELUS)

    def is_mean(self, node: fx.Node) -> bool:
        """True for the mean over all pixels."""
        module = self.module_of(node)
        if module is not None:
            return type(module) is nn.AdaptiveAvgPool2d and module.output_size in (1, (1, 1))
        if is_call_of(node, {F.adaptive_avg_pool2d}):
            return (node.args[1:] or tuple(node.kwargs.values())) in ((1,), ((1, 1),))
        options = dict(zip(("dim", "keepdim"), node.args[1:])) | node.kwargs
        dim: Any = options.pop("dim", None)
        return (
            is_call_of(node, {torch.mean, "mean"})
            and options == {"keepdim": True}
            and isinstance(dim, (tuple, list))
            and sorted(x % 4 for x in dim) == [2, 3]
        )

    def keeps_one_pixel(self, node: fx.Node) -> bool:
        """True if a call makes one pixel of one pixel."""
        module = self.module_of(node)
        if isinstance(module, nn.Conv2d):
            return (module.kernel_size, module.padding) == ((1, 1), (0, 0))
        return isinstance(module, _POINTWISE) or is_call_of(node, RELUS)

    def unsupported_reason(
        self,
        cat: fx.Node,
        input: fx.Node,
        first: fx.Node,
        joint: list[_Branch],
        pooled: list[_Branch],
    ) -> str | None:
        """Why a pyramid stays as it is, or None."""
        projection = only_user(cat)
        conv = None if projection is None else self.module_of(projection)
        if not isinstance(conv, nn.Conv2d):
            return "no projection by a convolution"
        if pooled and not (len(pooled) == 1 and is_projection(conv)):
            return "no 1x1 or 3x3 projection of one pooled branch and others"
        ends = {cat, *(branch.calls[-1] for branch in pooled)}
        if any(not _readers(branch.calls[-1]) <= ends for branch in joint):
            return "the size of a branch is needed elsewhere"
        users = [node for node in between(first, cat) if input in node.all_input_nodes]
        return "its input is changed in place" if any(map(self.works_in_place, users)) else None

    def works_in_place(self, node: fx.Node) -> bool:
        name = getattr(node.target, "__name__", str(node.target))
        if node.op == "call_module":
            return bool(getattr(self.module_of(node), "inplace", False))
        is_operator = node.op == "call_function" and hasattr(operator, f"__{name}__")
        is_marked = any(value is True for value in (*node.args[1:], *node.kwargs.values()))
        return is_marked or name.endswith("_") or (is_operator and name[0] == "i")

    # --- changing the graph

    def module_node(self, call: fx.Node) -> fx.Node:
        """The module that ``call`` calls, as a value."""
        return self.graph.create_node("get_attr", call.target)

    def call_joint(self, input: fx.Node, branches: list[_Branch]) -> tuple[fx.Node, fx.Node]:
        convs = [self.module_node(branch.calls[0]) for branch in branches]
        norms = [
            self.module_node(node)
            for branch in branches
            for node in branch.calls
            if isinstance(self.module_of(node), _BatchNorm)
        ]
        arguments = input, convs, norms, branches[0].relu
        pair = self.graph.call_function(atrous_branches, arguments)
        features, mean = (self.graph.call_function(operator.getitem, (pair, i)) for i in range(2))
        return features, mean

    def forget(self, calls: Sequence[fx.Node]) -> None:
        """Record calls that were replaced. The norms among them may be exchanged later."""
        self.replaced |= set(calls)
        self.absorbed |= {
            str(node.target)
            for node in calls
            if node.op == "call_module" and not isinstance(self.module_of(node), _BatchNorm)
        }

    def drop_dead_calls(self) -> None:
        """Erase the calls that were replaced, and the sizes that only they needed."""
        for node in reversed(self.graph.nodes):
            if not node.users and (node in self.replaced or is_call_of(node, _SIZES)):
                self.graph.erase_node(node)

    def parts(self) -> list[str]:
        """Paths of the modules whose code the graph contains, and of absorbed ones."""
        called = {str(node.target) for node in self.graph.nodes if node.op == "call_module"}
        used = {str(node.target) for node in self.graph.nodes if node.op == "get_attr"}
        leaves = (called | used) - self.absorbed
        return [
            path
            for path in self.modules
            if not any(path == leaf or path.startswith(f"{leaf}.") for leaf in leaves)
        ]


def _calls_back_from(value: Any) -> Iterator[fx.Node]:
    """``value`` and the calls before it, along first operands, up to an item of a list."""
    while isinstance(value, fx.Node):
        yield value
        is_item = value.target is operator.getitem
        value = value.args[0] if value.args and not is_item else None


def _is_resize(node: fx.Node) -> bool:
    """True for a call that makes a constant map of one pixel."""
    if node.op == "call_method":
        return node.target == "expand" and node.args[1:3] == (-1, -1)
    names = "size", "scale_factor", "mode"
    options = dict(zip(names, node.args[1:])) | node.kwargs
    return is_call_of(node, {F.interpolate}) and options.get("mode", "nearest") in (
        "nearest",
        "bilinear",
    )


def _readers(node: fx.Node) -> set[fx.Node]:
    """The calls that read ``node`` or sizes of it."""
    readers: set[fx.Node] = set()
    for user in node.users:
        readers |= _readers(user) if is_call_of(user, _SIZES) else {user}
    return readers
