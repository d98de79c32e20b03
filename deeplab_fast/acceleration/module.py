"""Replacement of a module's class by a subclass, so that only ``forward`` changes."""

from __future__ import annotations

import copy
import copyreg
import functools
from typing import Any

from torch import nn


class Accelerated(nn.Module):
    """First base class of a replaced class. The second one is the original class."""

    _accelerated_members: tuple[str, ...] = ()  # attributes that restore() deletes

    def __init_subclass__(cls) -> None:
        """Skip the method of the original class, which may need keywords."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        reduced: Any = super().__reduce_ex__(protocol)
        function, arguments, *rest = reduced
        if function is copyreg.__newobj__:  # type: ignore[attr-defined]
            function, arguments = _new, type(self).__bases__
        return function, arguments, *rest

    def __prepare_scriptable__(self) -> nn.Module:
        """The original module, which is what torch.jit.script compiles."""
        other = copy.copy(self)
        vars(other)["_modules"] = dict(self._modules)
        restore(other)
        return other


@functools.cache
def _accelerated_class(replacement: type[Accelerated], original: Any) -> type[Accelerated]:
    name = f"Accelerated{original.__name__}"
    # torch.fx recognises modules of torch.nn by the name of their file.
    members: dict[str, Any] = {"__doc__": original.__doc__, "__module__": original.__module__}
    if "forward" in vars(replacement):  # with the signature of the original, which torch.fx needs
        members["forward"] = _like(original.forward, vars(replacement)["forward"])
    return type(name, (replacement, original), members)


def _like(original: Any, function: Any) -> Any:
    @functools.wraps(original)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return function(self, *args, **kwargs)

    return forward


def _new(replacement: type[Accelerated], original: type) -> Accelerated:
    cls = _accelerated_class(replacement, original)  # type: ignore[arg-type]
    return cls.__new__(cls)


def original_class(module: nn.Module) -> Any:
    """The class of ``module`` before :func:`replace`."""
    return type(module).__bases__[1] if isinstance(module, Accelerated) else type(module)


def replace(module: nn.Module, replacement: type[Accelerated], **members: Any) -> None:
    """Make ``module`` run ``forward`` of ``replacement``, in place, and set these attributes."""
    module.__class__ = _accelerated_class(replacement, type(module))  # type: ignore[arg-type]
    vars(module).update(members)


def restore(module: nn.Module) -> None:
    """Undo :func:`replace`."""
    if isinstance(module, Accelerated):
        for name in module._accelerated_members:
            vars(module).pop(name, None)
        module.__class__ = original_class(module)
