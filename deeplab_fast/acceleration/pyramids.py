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

import contextlib
import operator
from collections.abc import Collection, Iterator, Sequence
from itertools import chain, groupby
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.module import _has_any_global_hook

from ..models.fusion.calls import RELUS, between, is_call_of, only_user
from ..models.fusion.layers import NO_OPS, is_hooked
from ..models.fusion.module import Steps, compiled, steps_of
from ..models.fusion.tracing import traced
from ..nn.pyramid import atrous_branches, is_atrous_branch, is_projection, project
from . import module as swapped

_CONCATENATIONS = {torch.cat, torch.concat, torch.concatenate}
_SIZES = {getattr, operator.getitem, "size"}
_POINTWISE = (
    _BatchNorm, nn.GroupNorm, nn.ReLU, nn.ReLU6, nn.Hardtanh, nn.SiLU, nn.Hardswish, nn.Hardsigmoid,
    nn.GELU, nn.Sigmoid, nn.LeakyReLU, nn.ELU, nn.PReLU, *NO_OPS,
)  # fmt: skip


class Pyramid(swapped.Accelerated):
    """A module whose ``forward`` is a rewritten graph.

    The original ``forward`` runs instead while a submodule has hooks, or if a part that the graph
    depends on was changed.
    """

    _accelerated_members = ("_graphs",)
    _graphs: Graphs

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if self._graphs.are_valid(self):
            return self._graphs.run(self, *args, **kwargs)
        original = swapped.original_class(self)
        return original.forward(self, *args, **kwargs)


class Graphs:
    """The rewritten graphs of a module, and what they depend on.

    Args:
        steps: code of the graph, in evaluation and in training mode.
        parts: paths of the submodules whose code is part of the graph.
    """

    def __init__(self, root: nn.Module, steps: tuple[Steps, Steps], parts: Sequence[str]) -> None:
        self.steps = steps
        self.parts = [Part.of(root, path) for path in parts]
        self.depends_on_mode = steps[0] != steps[1]
        self._compile()

    def _compile(self) -> None:
        self._runs = compiled(self.steps[0]), compiled(self.steps[1])

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_runs": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._compile()

    def run(self, root: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return self._runs[root.training](root, *args, **kwargs)

    def are_valid(self, root: nn.Module) -> bool:
        """True if the graph computes what the original ``forward`` would."""
        for part in self.parts:
            module = part.find(root)
            if module is None or not part.is_unchanged(module):
                return False
            if self.depends_on_mode and module.training != root.training:
                return False
        return not _has_any_global_hook() and not any(
            is_hooked(module) for module in root.modules() if module is not root
        )


class Part(NamedTuple):
    """A submodule and everything but its parameters that a graph depends on."""

    path: list[str]
    kind: type
    children: list[str]
    parameters: list[str]
    settings: list[tuple[str, Any]]

    @staticmethod
    def of(root: nn.Module, path: str) -> Part:
        module = root.get_submodule(path)
        settings = [
            (name, list(value) if type(value) is list else value)
            for name, value in vars(module).items()
            if _is_plain(value) and name != "training"
        ]
        kind, names = type(module), path.split(".") if path else []
        return Part(names, kind, list(module._modules), _parameters(module), settings)

    def find(self, root: nn.Module) -> nn.Module | None:
        module: nn.Module | None = root
        for name in self.path:
            module = None if module is None else module._modules.get(name)
        return module

    def is_unchanged(self, module: nn.Module) -> bool:
        return (
            (type(module) is self.kind or not self.path)  # the class of the root is replaced
            and list(module._modules) == self.children
            and _parameters(module) == self.parameters
            and all(getattr(module, name, None) == value for name, value in self.settings)
        )


def _parameters(module: nn.Module) -> list[str]:
    return [name for name, parameter in module._parameters.items() if parameter is not None]


def _is_plain(value: Any) -> bool:
    if type(value) in (list, tuple):
        return all(map(_is_plain, value))
    return type(value) in (bool, int, float, str, type(None))


class Miss(NamedTuple):
    """A concatenation of convolved branches that was not taken."""

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

    @property
    def replacement(self) -> str:
        """What runs instead; "" if nothing was replaced."""
        row = f"{len(self.joint)} branches as one convolution" if self.joint else ""
        bias = "pooled branch as a bias" if self.has_pool else ""
        return ", ".join(filter(None, (row, bias)))


def accelerate_pyramids(root: nn.Module, leaves: Collection[nn.Module] = ()) -> Found:
    """Replace the class of ``root`` if its own ``forward`` contains pyramids.

    Args:
        leaves: submodules whose code is not looked into.
    """
    modes = [(module, module.training) for module in root.modules()]
    untraced = {*leaves, *(module for module, _ in modes if isinstance(module, _BatchNorm))}
    rewritings = []
    for mode in (False, True):
        try:
            for module, _ in modes:
                module.training = mode
            with _unpadded_1x1_convolutions(root):
                graph = traced(root, untraced)
        finally:
            for module, training in modes:
                module.training = training
        if graph is None:
            return Found([], False, _untraced(root, leaves))
        rewritings.append(_Rewriting(root, graph))
    evaluation, training = rewritings
    found = training.run()
    if evaluation.run()[:2] != found[:2]:
        reason = "its code depends on whether the module is in training mode"
        return Found([], False, [*found.misses, Miss((), reason)])
    if found.replacement:
        steps = steps_of(evaluation.graph), steps_of(training.graph)
        swapped.replace(root, Pyramid, _graphs=Graphs(root, steps, training.parts()))
    return found


def _untraced(root: nn.Module, leaves: Collection[nn.Module]) -> list[Miss]:
    """Report a module without a graph, if it concatenates and has dilated convolutions."""
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


@contextlib.contextmanager
def _unpadded_1x1_convolutions(root: nn.Module) -> Iterator[None]:
    """Let torch.fx trace MobileNetV2 of transformers with its TensorFlow padding.

    The function that pads computes with sizes, which torch.fx does not know. It pads nothing before
    a 1x1 convolution of stride 1.
    """
    name = "apply_tf_padding"

    def pad(features: Any, conv: Any) -> Any:
        is_1x1 = (conv.kernel_size, conv.stride) == ((1, 1), (1, 1))
        return features if is_1x1 else original(features, conv)

    sources = [type(module).forward.__globals__ for module in root.modules()]
    padding = next((source for source in sources if name in source), None)
    if padding is None:
        yield
        return
    original = padding[name]
    padding[name] = pad
    try:
        yield
    finally:
        padding[name] = original


class _Branch(NamedTuple):
    """A branch of a concatenation: the calls between the input and the concatenation."""

    calls: list[fx.Node]
    kind: str  # "dense", "pooled" or "other"
    relu: bool = False

    @property
    def groups(self) -> tuple[Any, ...]:
        """Dense branches with equal groups can run as one."""
        return self.kind == "dense", len(self.calls), self.relu


class _Rewriting:
    def __init__(self, root: nn.Module, graph: fx.Graph) -> None:
        self.root, self.graph = root, graph
        self.modules: dict[str, Any] = dict(root.named_modules(remove_duplicate=False))
        self.replaced: set[fx.Node] = set()  # calls that the new graph does not contain
        self.absorbed: set[str] = set()  # the paths of their modules, other than norms

    def run(self) -> Found:
        found = Found([], False, [])
        for node in list(self.graph.nodes):
            if is_call_of(node, _CONCATENATIONS):
                joint, has_pool, misses = self.rewrite(node)
                found = Found(found.joint + joint, found.has_pool or has_pool, found.misses + misses)
        return found

    def rewrite(self, cat: fx.Node) -> Found:
        """Rewrite the pyramid that ends with the concatenation ``cat``."""
        nothing = Found([], False, [])
        input, branches = self.branches(cat)
        convs = tuple(self.convs_of(branches))
        if input is None or len(convs) < 2 or not all(branch.calls for branch in branches):
            return nothing
        projection = only_user(cat)
        pooled = [branch for branch in branches if branch.kind == "pooled"]
        joint = self.joint(branches)

        def miss(reason: str) -> Found:
            return Found([], False, [Miss(convs, reason)])

        if not (pooled or joint):
            is_atrous = any(max(conv.dilation) > 1 for conv in convs) and len(convs) <= 2 * len(branches)
            reason = "neither a pooled branch nor two dense branches like each other"
            return miss(reason) if is_atrous else nothing
        if projection is None or not isinstance(self.module_of(projection), nn.Conv2d):
            return miss("no projection by a convolution")
        if pooled and not (len(pooled) == 1 and is_projection(self.module_of(projection))):
            return miss("no 1x1 or 3x3 projection of one pooled branch and others")
        ends = {cat, *(branch.calls[-1] for branch in pooled)}
        if any(not _readers(branch.calls[-1]) <= ends for branch in joint):
            return miss("the size of a branch is needed elsewhere")
        first, is_changed = self.first(input, [*joint, *pooled], cat)
        if is_changed:
            return miss("its input is changed in place")

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
                conv = self.module_node(projection)
                output = self.graph.call_function(project, (conv, *operands))
                projection.replace_all_uses_with(output)
                self.forget([resize, projection])
            else:
                output = self.graph.call_function(torch.cat, (values, 1))
                cat.replace_all_uses_with(output if len(values) > 1 else values[0])
                self.replaced.add(output)
        self.forget([cat])
        self.drop_dead_calls()
        return Found([str(branch.calls[0].target) for branch in joint], bool(pooled), [])

    # --- what a graph contains

    def branches(self, cat: fx.Node) -> tuple[fx.Node | None, list[_Branch]]:
        """The input and the branches of a pyramid; None and [] if ``cat`` has no common input."""
        values = cat.args[0] if cat.args else cat.kwargs.get("tensors")
        dim = cat.args[1] if len(cat.args) > 1 else cat.kwargs.get("dim", 0)
        if dim not in (1, -3) or not isinstance(values, (list, tuple)) or len(values) < 2:
            return None, []
        paths = [list(_calls_back_from(value)) for value in values]
        for node in paths[0]:
            if all(node in path for path in paths):
                calls = [path[: path.index(node)][::-1] for path in paths]
                return node, [self.branch(branch) for branch in calls]
        return None, []

    def branch(self, calls: list[fx.Node]) -> _Branch:
        if not calls:
            return _Branch(calls, "other")
        first, *middle = calls
        last = calls[-1]
        is_chain = all(only_user(node) is after for node, after in zip(calls, middle))
        is_chain = is_chain and len(last.users) == 1 + sum(is_call_of(u, _SIZES) for u in last.users)
        if is_chain and is_atrous_branch(self.module_of(first)):
            rest = [node for node in middle if not isinstance(self.module_of(node), _BatchNorm)]
            relu = len(rest) == 1 and rest[0] is last and self.is_relu(last)
            if len(middle) - len(rest) <= 1 and len(rest) == relu and len(first.args) == 1:
                return _Branch(calls, "dense", relu)
        if is_chain and self.is_mean(first):
            if middle and _is_resize(last) and all(map(self.keeps_one_pixel, middle[:-1])):
                return _Branch(calls, "pooled")
        return _Branch(calls, "other")

    def joint(self, branches: list[_Branch]) -> list[_Branch]:
        """The longest row of dense branches, if one of them is atrous."""
        rows = [list(row) for _, row in groupby(branches, lambda branch: branch.groups)]
        dense = [row for row in rows if row[0].kind == "dense" and len(row) > 1]
        longest = max(dense, key=len, default=[])
        is_atrous = any(max(self.module_of(b.calls[0]).dilation) > 1 for b in longest)
        return longest if is_atrous else []

    def convs_of(self, branches: list[_Branch]) -> Iterator[nn.Module]:
        for branch in branches:
            modules = [self.module_of(node) for node in branch.calls]
            yield from (m for m in modules if isinstance(m, nn.Conv2d))

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

    def first(
        self, input: fx.Node, branches: list[_Branch], cat: fx.Node
    ) -> tuple[fx.Node, bool]:
        """The first call of the branches, and whether ``input`` may be changed after it."""
        starts = {branch.calls[0] for branch in branches}
        first = next(node for node in self.graph.nodes if node in starts)
        users = (node for node in between(first, cat) if input in node.all_input_nodes)
        return first, any(map(self.works_in_place, users))

    def works_in_place(self, node: fx.Node) -> bool:
        name = getattr(node.target, "__name__", str(node.target))
        if node.op == "call_module":
            return bool(getattr(self.module_of(node), "inplace", False))
        is_operator = node.op == "call_function" and hasattr(operator, f"__{name}__")
        is_marked = True in node.args[1:] or True in node.kwargs.values()
        return is_marked or name.endswith("_") or (is_operator and name[0] == "i")

    # --- how it changes

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
        pair = self.graph.call_function(atrous_branches, arguments)  # type: ignore[arg-type]
        features, mean = (
            self.graph.call_function(operator.getitem, (pair, i)) for i in range(2)
        )
        return features, mean

    def forget(self, calls: Sequence[fx.Node]) -> None:
        """Note calls that were replaced. The norms among them may be exchanged later."""
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
