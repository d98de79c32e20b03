"""Modules that run a graph."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

from torch import fx, nn


class Steps(NamedTuple):
    """Source of a function ``run(modules, *inputs)`` and the objects that it names."""

    source: str
    names: dict[str, Any]


class FusedModule(nn.Module):
    """A module whose ``forward`` is a fused graph.

    :func:`fused_copy` makes objects of a subclass of this and of the original class, so that other
    methods and attributes stay. Submodules have the names that their convolutions have in the
    original module.
    """

    _steps: Steps
    _main_steps: Steps | None
    _run: Callable[..., Any]
    _run_main: Callable[..., Any]

    def __init_subclass__(cls) -> None:
        """Skip the method of the original class, which may need keywords."""

    def forward(self, *inputs: Any, **named_inputs: Any) -> Any:
        return self._run(self, *inputs, **named_inputs)

    def main_output(self, *inputs: Any, **named_inputs: Any) -> Any:
        """The result of ``forward``, or a dict of the entry "out" only, if there is one.

        What only other entries need, such as an auxiliary classifier, is not computed.
        """
        return self._run_main(self, *inputs, **named_inputs)

    def train(self, mode: bool = True) -> FusedModule:
        """Do nothing: the mode is fixed, and methods of the original need its submodules."""
        return self

    def extra_repr(self) -> str:
        return ""

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return _restored, (type(self).__bases__[1], vars(self) | _NOT_COMPILED)

    def __deepcopy__(self, memo: dict[int, Any]) -> FusedModule:
        other: FusedModule = type(self).__new__(type(self))
        memo[id(self)] = other
        vars(other).update(copy.deepcopy(vars(self) | _NOT_COMPILED, memo))
        vars(other).update(_run=self._run, _run_main=self._run_main)
        return other


_NOT_COMPILED = {"_run": None, "_run_main": None}


@functools.cache
def _fused_class(original: type[nn.Module]) -> type[FusedModule]:
    return type(f"Fused{original.__name__}", (FusedModule, original), {})


def fused_copy(original: nn.Module, steps: Steps, main_steps: Steps | None) -> FusedModule:
    """``original`` without parameters and submodules, and with another ``forward``.

    Args:
        main_steps: those of :meth:`FusedModule.main_output`, or None if they are ``steps``.
    """
    members = vars(nn.Module())
    kept = {name: value for name, value in vars(original).items() if name not in members}
    new = {"_steps": steps, "_main_steps": main_steps, "training": False}
    return _restored(type(original), members | kept | new)


def _restored(original: type[nn.Module], members: dict[str, Any]) -> FusedModule:
    fused_class = _fused_class(original)  # type: ignore[arg-type]
    fused: FusedModule = fused_class.__new__(fused_class)
    vars(fused).update(members)
    run = compiled(members["_steps"])
    main_steps = members["_main_steps"]
    run_main = run if main_steps is None else compiled(main_steps)
    vars(fused).update(_run=run, _run_main=run_main)
    return fused


def compiled(steps: Steps) -> Callable[..., Any]:
    names = dict(steps.names)
    exec(steps.source, names)
    run: Callable[..., Any] = names["run"]
    return run


def steps_of(graph: fx.Graph) -> Steps:
    """Python code of a graph.

    Modules are looked up in dicts, because their attributes take longer. A value is forgotten after
    its last use.
    """
    names: dict[str, Any] = {}

    def text(value: Any) -> str:
        if isinstance(value, fx.Node):
            return value.name
        if isinstance(value, (tuple, list)):
            inner = "".join(f"{text(item)}, " for item in value)
            return f"({inner})" if isinstance(value, tuple) else f"[{inner}]"
        if type(value) is slice:
            return f"{text(slice)}({text(value.start)}, {text(value.stop)}, {text(value.step)})"
        if isinstance(value, dict):
            return "{" + "".join(f"{text(k)}: {text(v)}, " for k, v in value.items()) + "}"
        if type(value) in (int, str, bool, type(None)):
            return repr(value)
        for name, other in names.items():
            if other is value:
                return name
        name = f"constant_{len(names)}_"
        names[name] = value
        return name

    last_uses: dict[fx.Node, list[str]] = {}
    seen: set[fx.Node] = set()
    for node in reversed(graph.nodes):
        dead = [operand.name for operand in node.all_input_nodes if operand not in seen]
        last_uses[node] = dead + ([] if node.users or node.op == "output" else [node.name])
        seen.update(node.all_input_nodes)

    inputs, lines = ["self"], []
    for node in graph.nodes:
        if node.op == "placeholder":
            inputs.append(node.target)
            if node.name != node.target:
                lines.append(f"{node.name} = {node.target}")
            continue
        if node.op == "output":
            lines.append(f"return {text(node.args[0])}")
            continue
        operands = [text(value) for value in node.args]
        operands += [f"{name}={text(value)}" for name, value in node.kwargs.items()]
        if node.op == "call_module":
            call = f"{_module(node.target)}({', '.join(operands)})"
        elif node.op == "get_attr":
            owner, _, name = str(node.target).rpartition(".")
            call = f"{text(getattr)}({_module(owner)}, {name!r})"  # "0" in a ParameterList
        elif node.op == "call_method":
            call = f"{operands[0]}.{node.target}({', '.join(operands[1:])})"
        else:
            call = f"{text(node.target)}({', '.join(operands)})"
        lines.append(f"{node.name} = {call}")
        if last_uses[node]:
            lines.append(" = ".join([*last_uses[node], "None"]))
    body = "\n".join(f"    {line}" for line in lines)
    return Steps(f"def run({', '.join(inputs)}):\n{body}\n", names)


def _module(target: Any) -> str:
    return "self" + "".join(f"._modules[{name!r}]" for name in target.split(".") if name)


def container(root: nn.Module, path: list[str]) -> nn.Module:
    for name in path:
        if name not in root._modules:
            root.add_module(name, nn.Module())
        root = root._modules[name]  # type: ignore[assignment]
    return root
