"""Rewriting of a graph: fused layers replace the calls that they can do, and all others stay."""

from __future__ import annotations

import operator
from collections import OrderedDict
from collections.abc import Collection
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from ...ops.upsample import upsample
from . import calls
from .calls import between, is_call_of, is_no_dropout, is_view, only_user
from .layers import (
    NO_OPS,
    FoldedASPP,
    FusedConv2d,
    can_fold,
    can_fold_norm,
    fused_layer,
    is_plain,
    is_timms,
    padding_before,
    unsupported_reason,
)
from .module import FusedModule, Steps, container, fused_copy, steps_of


class Rewriting:
    """The rewriting of the graph of one module.

    The calls of fused layers hold them in ``node.meta["layer"]``, until :meth:`module` names them.
    """

    def __init__(self, root: nn.Module, graph: fx.Graph) -> None:
        self.root, self.graph = root, graph
        self.modules: dict[str, Any] = dict(root.named_modules())
        self.read = self.modules_read()
        self.folded: dict[tuple[nn.Module, ...], nn.Module] = {}  # by original modules
        self.kept: list[nn.Module] = []

    def run(self, outputs: Collection[str] | None) -> FusedModule:
        if outputs is not None:
            self.drop_outputs(outputs)
        self.drop_no_ops()
        self.drop_dead_code()
        for step in (self.fold_aspp, self.fuse_chain, self.fuse_sum, self.split_concatenation):
            for node in list(self.graph.nodes):
                step(node)
        self.drop_dead_code()
        for node in self.graph.nodes:
            self.allow_overwriting(node)
        return self.module()

    def modules_read(self) -> set[str]:
        """Names of the modules whose parameters or buffers other code reads or changes."""
        targets = [str(node.target) for node in self.graph.nodes if node.op == "get_attr"]
        names = {target.rpartition(".")[0] for target in targets}
        read = {id(self.tensor(target)) for target in targets}
        for name, module in self.modules.items():
            tensors = (*module._parameters.values(), *module._buffers.values())
            if any(tensor is not None and id(tensor) in read for tensor in tensors):
                names.add(name)
        return names

    def tensor(self, target: str) -> Any:
        owner, _, name = target.rpartition(".")
        return getattr(self.modules[owner], name)

    def module_of(self, node: fx.Node) -> Any:
        """The module that ``node`` calls, or None."""
        return node.meta.get("layer") or (
            self.modules[str(node.target)] if node.op == "call_module" else None
        )

    def plain_call(self, node: fx.Node | None) -> Any:
        """The plain module that ``node`` calls with one positional argument, or None."""
        if node is None or node.kwargs or [type(arg) for arg in node.args] != [fx.Node]:
            return None
        module = self.module_of(node)
        is_usable = module is not None and is_plain(module) and str(node.target) not in self.read
        return module if is_usable else None

    def drop_outputs(self, names: Collection[str]) -> bool:
        """Return only some entries of a dict. False if that changes nothing or leaves none."""
        *_, output = self.graph.nodes
        value: Any
        (value,) = output.args
        is_ordered = isinstance(value, fx.Node) and value.target is OrderedDict
        entries: Any = value.args[0] if is_ordered else value
        if not (is_ordered or isinstance(value, dict)):
            return False
        entries = dict(entries)
        needed = {name: entries[name] for name in entries if name in names}
        if not needed or len(needed) == len(entries):
            return False
        if is_ordered:
            value.args = (list(needed.items()),)
        else:
            output.args = (needed,)
        return True

    def drop_no_ops(self) -> None:
        for node in self.graph.nodes:
            module = self.plain_call(node)
            if (type(module) in NO_OPS and not module.training) or is_no_dropout(node):
                self.replace(node, node.args[0])

    def drop_dead_code(self) -> None:
        for node in reversed(self.graph.nodes):
            if not node.users and (self.is_pure(node) or is_view(node)):
                self.graph.erase_node(node)

    def replace(self, node: fx.Node, other: Any) -> None:
        node.replace_all_uses_with(other)
        self.graph.erase_node(node)

    def call(self, name: str, layer: nn.Module, *args: Any) -> fx.Node:
        """A call of a new layer, named after the original module ``name``."""
        node = self.graph.create_node("call_module", name, args)
        node.meta["layer"] = layer
        return node

    def is_pure(self, node: fx.Node) -> bool:
        """True if a call reads its operands, changes none, and returns new memory."""
        module = self.module_of(node)
        if module is not None:
            return (
                type(module) in calls.PURE_MODULES
                and is_plain(module)
                and not getattr(module, "inplace", False)
                and not (isinstance(module, nn.BatchNorm2d) and module.training)
            )
        if not is_call_of(node, calls.PURE_FUNCTIONS):
            return node.target is getattr and node.args[1] in ("shape", "dtype", "device", "ndim")
        options = dict(zip(calls.OPTIONS.get(node.target, ()), node.args[1:])) | node.kwargs
        is_operator = node.target in calls.OPERATORS
        joins_lists = is_operator and any(isinstance(arg, list) for arg in node.args)
        works_in_place = options.get("inplace") or options.get("training") or "out" in options
        return not works_in_place and not joins_lists

    # --- convolution, batch norm and activation

    def fold_aspp(self, node: fx.Node) -> None:
        module = self.plain_call(node)
        if module is not None and can_fold(module):
            if (module,) not in self.folded:
                self.folded[module,] = FoldedASPP(module)
            with self.graph.inserting_before(node):
                self.replace(node, self.call(node.target, self.folded[module,], *node.args))  # type: ignore

    def fuse_chain(self, node: fx.Node) -> None:
        conv = self.plain_call(node)
        if not isinstance(conv, nn.Conv2d) or unsupported_reason(conv):
            return
        user = only_user(node)
        norm = self.plain_call(user)
        if not can_fold_norm(norm, conv):
            norm = None
        layer = self.fused_layer(conv, norm)
        (input,) = node.args
        with self.graph.inserting_before(node):
            if padding := padding_before(conv):
                function, *options = padding
                input = self.graph.call_function(function, (input, *options))
            fused = end = self.call(node.target, layer, input)  # type: ignore[arg-type]
            if norm is not None and is_timms(norm) and type(norm.act) is not nn.Identity:
                end = self.graph.call_module(f"{user.target}.act", (fused,))  # type: ignore
        self.replace(node, fused)
        if norm is not None:
            self.replace(user, end)  # type: ignore
            end.args = (fused,) if end is not fused else end.args
        self.fuse_padding(fused, layer)
        self.fuse_activation(fused, layer)

    def fuse_padding(self, node: fx.Node, layer: FusedConv2d) -> None:
        """Let ``node``, a call of ``layer``, pad its input itself if that is padded evenly."""
        pad: Any = node.args[0]
        if (
            not is_call_of(pad, (F.pad,))
            or only_user(pad) is not node
            or len(pad.args) != 2
            or pad.kwargs.get("mode", "constant") != "constant"
            or pad.kwargs.get("value")
            or not all(self.is_pure(other) or is_view(other) for other in between(pad, node))
        ):
            return
        input, padding = pad.args
        if not (len(padding) == 4 and all(type(p) is int and p >= 0 for p in padding)):
            return
        left, right, top, bottom = padding
        if (left, top) == (right, bottom):
            stride, (vertical, horizontal), dilation, groups = layer.geometry
            layer.set_geometry(stride, (vertical + top, horizontal + left), dilation, groups)
            node.args = (input,)
            self.graph.erase_node(pad)

    def fused_layer(self, conv: Any, norm: Any) -> FusedConv2d:
        """A fused convolution. Calls of the same convolution and norm share the weights."""
        layer = fused_layer(conv, norm)
        first: Any = self.folded.setdefault((conv, norm), layer)
        layer.weight, layer.bias = first.weight, first.bias
        layer.has_norm = norm is not None
        return layer

    def fuse_activation(self, node: fx.Node, layer: FusedConv2d) -> None:
        """Fuse the activation after ``node``, a call of ``layer``."""
        user = only_user(node)
        activation = None if user is None else self.activation(user)
        if user is not None and activation:
            layer.activation = activation
            self.replace(user, node)

    def activation(self, node: fx.Node) -> str | None:
        """The activation that ``node`` applies to its only operand, if it can be fused."""
        if node.op == "call_module":
            module = self.plain_call(node)
            if type(module) is nn.Hardtanh:
                return "relu6" if (module.min_val, module.max_val) == (0, 6) else None
            return {nn.ReLU: "relu", nn.ReLU6: "relu6"}.get(type(module))
        if len(node.args) > 2 or not set(node.kwargs) <= {"inplace"}:
            return None
        return "relu" if node.target in calls.RELUS else "relu6" if node.target is F.relu6 else None

    # --- residuals

    def fuse_sum(self, node: fx.Node) -> None:
        """Fuse a sum into one of the convolutions that it adds."""
        if not is_call_of(node, calls.ADDS) or node.kwargs or len(node.args) != 2:
            return
        left, right = node.args
        candidates = [
            (self.module_of(conv), conv, residual)  # type: ignore[arg-type]
            for conv, residual in ((left, right), (right, left))
            if self.can_add(conv, residual, node)
        ]
        if not candidates:
            return
        # Kernels on a GPU add a residual to convolutions of stride 1 only.
        layer, conv, residual = min(candidates, key=lambda found: max(found[0].geometry[0]))
        with self.graph.inserting_before(node):
            fused = self.call(conv.target, layer, *conv.args, residual, False)  # type: ignore
        layer.has_residual = True
        self.replace(node, fused)
        self.graph.erase_node(conv)  # type: ignore[arg-type]
        self.fuse_activation(fused, layer)

    def can_add(self, conv: Any, residual: Any, node: fx.Node) -> bool:
        """True if the call ``conv`` may run where its sum with ``residual`` is computed."""
        if not (isinstance(conv, fx.Node) and isinstance(residual, fx.Node)) or conv is residual:
            return False
        layer = self.module_of(conv)
        if type(layer) is not FusedConv2d or layer.activation != "none" or len(conv.args) != 1:
            return False
        changes_residual = node.target in (operator.iadd, "add_") and node.args[0] is residual
        return (
            only_user(conv) is node
            and not (changes_residual and not self.is_free(residual, node))
            and all(self.is_pure(other) or is_view(other) for other in between(conv, node))
        )

    # --- concatenations

    def split_concatenation(self, node: fx.Node) -> None:
        """Run the separable convolution of two concatenated tensors as a sum of two.

        The decoder of DeepLab-v3+ concatenates 256 + 48 channels of stride 4. At 513x513 on an AMD
        EPYC with two threads in fp32, the sum took 102 instead of 129 ms (whole mobilenet_v2 model)
        and 485 instead of 578 ms (resnet50). Dense 3x3 convolutions gain nothing.
        """
        depthwise = only_user(node)
        pointwise = None if depthwise is None else only_user(depthwise)
        first, second = self.plain_call(depthwise), self.plain_call(pointwise)
        if (
            node.target is not torch.cat
            or (node.args[1:] or tuple(node.kwargs.values())) != (1,)
            or not type(first) is type(second) is FusedConv2d
        ):
            return
        parts: Any = node.args[0]
        sizes = [self.channels(part) for part in parts]
        *_, groups = first.geometry
        is_depthwise = first.weight.shape[:2] == (groups, 1)
        is_pointwise = second.weight.shape[1:] == (groups, 1, 1)
        if len(parts) != 2 or None in sizes or not (is_depthwise and is_pointwise):
            return
        total: tuple[Any, ...] = ()
        with self.graph.inserting_before(node):
            for i in sorted(range(2), key=sizes.__getitem__):  # type: ignore[arg-type]
                start = sum(sizes[:i])  # type: ignore[arg-type]
                part = slice(start, start + sizes[i])  # type: ignore[operator]
                rows = self.call(depthwise.target, first.part(part, slice(None)), parts[i])  # type: ignore
                layer = second.part(slice(None), part, is_last=bool(total))
                total = self.call(pointwise.target, layer, rows, *total), False  # type: ignore
        self.replace(pointwise, total[0])  # type: ignore[arg-type]
        self.graph.erase_node(depthwise)  # type: ignore[arg-type]
        self.graph.erase_node(node)

    def channels(self, node: Any) -> int | None:
        """The number of channels of a tensor, if it is known."""
        if not isinstance(node, fx.Node):
            return None
        module = self.module_of(node)
        if type(module) is FusedConv2d:
            return module.weight.size(0)
        if type(module) is FoldedASPP:
            return module.project_weight.size(0)
        resizes = is_call_of(node, (upsample, F.interpolate))
        if resizes or type(module) in (nn.Upsample, nn.UpsamplingBilinear2d):
            return self.channels(node.args[0])
        return None

    def is_free(self, value: fx.Node, last: fx.Node) -> bool:
        """True if nothing can read the memory of ``value`` after the call ``last``."""
        earlier = set(between(value, last))
        return self.is_pure(value) and all(
            user is last or (user in earlier and self.is_pure(user)) for user in value.users
        )

    def allow_overwriting(self, node: fx.Node) -> None:
        if type(self.module_of(node)) is FusedConv2d and len(node.args) == 3:
            input, residual, _ = node.args
            if input is not residual and self.is_free(residual, node):  # type: ignore[arg-type]
                node.args = input, residual, True

    # --- the result

    def module(self) -> FusedModule:
        """The fused module. Modules that are called as before are in :attr:`kept`, too."""
        nodes = [node for node in self.graph.nodes if node.op == "call_module"]
        kept = {str(node.target) for node in nodes if "layer" not in node.meta}
        self.kept = [self.modules[name] for name in sorted(kept)]
        named: dict[str, nn.Module] = {}
        for node in nodes:
            if layer := node.meta.get("layer"):
                node.target = _free_name(str(node.target), layer, kept, named)
                named[node.target] = layer
            elif node.target not in named:
                named[str(node.target)] = self.modules[str(node.target)]
        attributes = [node for node in self.graph.nodes if node.op == "get_attr"]
        steps = steps_of(self.graph)
        fused = fused_copy(self.root, steps, self.main_steps())
        for name, module in named.items():
            *path, last = name.split(".")
            container(fused, path).add_module(last, module)
        for node in attributes:
            *path, name = str(node.target).split(".")
            members = vars(self.modules[".".join(path)])
            owner = container(fused, path)
            for kind in ("_parameters", "_buffers"):
                if name in members[kind]:
                    vars(owner)[kind][name] = members[kind][name]
        nn.Module.train(fused, False)
        return fused

    def main_steps(self) -> Steps | None:
        """The steps that compute the entry "out" of a dict. None if there is no other entry."""
        if not self.drop_outputs(("out",)):
            return None
        self.drop_dead_code()
        return steps_of(self.graph)


def _free_name(name: str, layer: nn.Module, kept: set[str], named: dict[str, nn.Module]) -> str:
    """``name`` or a similar one that no other layer has, outside of the modules ``kept``."""
    if any(f"{name}.".startswith(f"{other}.") for other in kept):
        name = name.replace(".", "_") + "_fused"
    while named.get(name, layer) is not layer or name in kept:
        name += "_"
    return name
