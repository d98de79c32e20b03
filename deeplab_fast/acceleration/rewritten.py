"""Modules that run a rewritten graph as long as everything it depends on is unchanged."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor, fx, nn
from torch.nn.modules import module as torch_module

from ..models.fusion.layers import is_hooked
from ..models.fusion.module import Steps, compiled
from .module import Accelerated, original_class


class Rewritten(Accelerated):
    """A module whose ``forward`` is a rewritten graph.

    The original ``forward`` runs instead while a submodule has hooks, after a change of a part that
    the graph depends on, and when torch.fx traces the module.
    """

    _accelerated_members = ("_graphs",)
    _graphs: Graphs

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        is_traced = any(isinstance(value, fx.Proxy) for value in (*args, *kwargs.values()))
        if self._graphs.are_valid(self) and not is_traced:
            return self._graphs.run(self, *args, **kwargs)
        original = original_class(self)
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
        return not _has_global_hooks() and not any(
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
            (name, _copied(value))
            for name, value in vars(module).items()
            if name not in _MEMBERS and not isinstance(value, Tensor)
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
            original_class(module) is self.kind
            and list(module._modules) == self.children
            and _parameters(module) == self.parameters
            and all(_is_same(getattr(module, name, None), value) for name, value in self.settings)
        )


def _parameters(module: nn.Module) -> list[str]:
    return [name for name, parameter in module._parameters.items() if parameter is not None]


def _has_global_hooks() -> bool:
    """True if a hook is called for each module. torch 2.6 has no function for that."""
    return any(getattr(torch_module, name) for name in _GLOBAL_HOOKS)


_GLOBAL_HOOKS = (
    "_global_forward_hooks", "_global_forward_pre_hooks", "_global_backward_hooks",
    "_global_backward_pre_hooks",
)  # fmt: skip


# Every module has these. Parameters, submodules and the mode are checked in other ways.
_MEMBERS = {*vars(nn.Module())}


def _copied(value: Any) -> Any:
    """``value`` with copies of the lists and dicts in it, which may be changed in place."""
    if type(value) is dict:
        return {key: _copied(item) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(map(_copied, value))
    return value


def _is_same(value: Any, before: Any) -> bool:
    if type(value) is not type(before):
        return False
    if type(value) in (bool, int, float, str, type(None)):
        return bool(value == before)
    if type(value) is dict:
        return list(value) == list(before) and _is_same(list(value.values()), [*before.values()])
    if type(value) in (list, tuple):
        return len(value) == len(before) and all(map(_is_same, value, before))
    return value is before
