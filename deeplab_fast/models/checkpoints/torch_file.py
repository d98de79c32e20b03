"""Reader of files of torch.save that executes nothing that a file names."""

from __future__ import annotations

import pickle
import pickletools
import re
import textwrap
import zipfile
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any, ClassVar, TypeAlias

import torch
from torch import Tensor

_ZIP, _PICKLE = b"PK\x03\x04", b"\x80"  # first bytes of files since torch 1.6, and of older ones
_LEGACY_PICKLES = 4  # magic number, version and system of an older file, then its object

# Opcodes that add items to an object of a class -> the type in whose place PyTorch accepts them
_CONTAINERS: dict[str, type] = {
    "SETITEM": OrderedDict,
    "SETITEMS": OrderedDict,
    "APPEND": list,
    "APPENDS": list,
}

_Names: TypeAlias = dict[tuple[str, str], type | None]


class Inert:
    """Stand-in for an object of a class that is not PyTorch's. It keeps its state and does nothing.

    Training scripts save objects beside the weights: argparse's arguments, NumPy's scalars, logs of
    mmengine, sometimes the whole model. PyTorch's reader with weights_only=True refuses such files,
    although nothing but the tensors is wanted. So every name in a file that PyTorch does not allow
    by itself is bound to a subclass of this class, for the time of the call: a name is never looked
    up, so neither its class nor its function is ever imported or called. In place of a dict or list
    of a class of its own, such as a defaultdict, there is a plain ``container``.
    """

    container: ClassVar[Any] = None
    state: Any = None

    def __new__(cls, *args: Any) -> Any:
        return super().__new__(cls) if cls.container is None else cls.container()

    def __setstate__(self, state: Any) -> None:
        self.state = state


def read_torch_file(path: Path) -> Any:
    """The object in a file of torch.save, with :class:`Inert` for everything foreign.

    Raises:
        ValueError: the file is damaged or has another format; the message is one line.
    """
    with path.open("rb") as file:
        head = file.read(16)
    if not head.startswith((_ZIP, _PICKLE)):
        content = f"one that starts with {head!r}" if head else "an empty file"
        if head[8:9] == b"{":
            content = "one of safetensors, whose name must end in .safetensors"
        raise ValueError(f"{path}: expected a file of torch.save or safetensors, got {content}")
    try:
        with torch.serialization.safe_globals(_stand_ins(path, head.startswith(_ZIP))):
            return torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # a damaged file raises nearly anything
        raise ValueError(
            f"{path}: expected a complete file of torch.save: {_cause(error)}"
        ) from error


def _cause(error: Exception) -> str:
    """The first line of an error, without torch.load's advice to read the file unsafely.

    torch.load puts the advice around the message of the error that it handles.
    """
    original = error.__context__
    error = original if isinstance(original, pickle.UnpicklingError) else error
    message = re.sub(r"\x1b\[[0-9;]*m", "", str(error)).strip().partition("\n")[0]
    return textwrap.shorten(message or type(error).__name__, 200, placeholder=" ...")


def _stand_ins(path: Path, is_zip: bool) -> list[Any]:
    """A subclass of :class:`Inert` for each name in the file that PyTorch does not allow.

    PyTorch looks its own names up first, so a stand-in cannot change what they mean. A name that
    the program has allowed is left out: leaving ``safe_globals`` would forbid it.
    """
    allowed = {
        entry[1] if isinstance(entry, tuple) else f"{entry.__module__}.{entry.__qualname__}"
        for entry in torch.serialization.get_safe_globals()
    }
    return [
        type(name, (Inert,), {"__module__": module, "__qualname__": name, "container": container})
        for (module, name), container in _names(path, is_zip).items()
        if f"{module}.{name}" not in allowed
    ]


def _names(path: Path, is_zip: bool) -> _Names:
    """Modules and names of all classes and functions in the pickles of a file, with a container.

    The container is OrderedDict or list if objects of the class get items, else None.

    The pickles are only disassembled. Names of Python 2 are translated as torch.load does.
    """
    if is_zip:
        with zipfile.ZipFile(path) as archive:
            entries = {name.rpartition("/")[2]: name for name in archive.namelist()}
            if "constants.pkl" in entries:
                raise ValueError("it is a TorchScript archive, whose weights are not a state dict")
            if "data.pkl" not in entries:
                raise ValueError("it is a zip archive without data.pkl")
            with archive.open(entries["data.pkl"]) as file:
                return _names_in_pickle(file)
    with path.open("rb") as file:
        names: _Names = {}
        for _ in range(_LEGACY_PICKLES):
            names |= _names_in_pickle(file)
    return names


def _names_in_pickle(file: IO[bytes]) -> _Names:
    """As :func:`_names`. The stack and the memo of the unpickler hold the names of classes here."""
    names: _Names = {}
    stack: list[Any] = []
    memo: dict[Any, Any] = {}
    mark = pickletools.markobject
    for opcode, argument, _ in pickletools.genops(file):
        count = len(opcode.stack_before)
        if mark in opcode.stack_before:
            while stack.pop() is not mark:
                pass
            count = opcode.stack_before.index(mark)
        operands = [stack.pop() for _ in range(count)]
        name = operands[-1] if operands else None  # an object is below what is added to it
        if opcode.name == "MARK":
            name = mark
        elif opcode.name == "GLOBAL":
            name = _translated(*str(argument).split(" ", 1))
            names.setdefault(name)
        elif opcode.name.endswith("GET"):
            name = memo.get(argument)
        elif opcode.name in _CONTAINERS and name is not None:
            names[name] = _CONTAINERS[opcode.name]
        stack += [name] * len(opcode.stack_after)
        if opcode.name.endswith("PUT"):
            memo[argument] = stack[-1]
    return names


def _translated(module: str, name: str) -> tuple[str, str]:
    """The name in Python 3 of what a file names as in Python 2."""
    module, name = NAME_MAPPING.get((module, name), (module, name))
    return IMPORT_MAPPING.get(module, module), name


def tensors_of_module(module: Inert) -> dict[str, Tensor]:
    """The state dict of a pickled torch.nn.Module, of which only the attributes were read.

    A submodule with two names appears under one of them.
    """
    state: dict[str, Tensor] = {}
    pending, seen = [("", module)], {id(module)}
    while pending:
        prefix, inert = pending.pop()
        attributes = inert.state if isinstance(inert.state, Mapping) else {}
        for kind in ("_parameters", "_buffers", "_modules"):
            entries = attributes.get(kind)
            for name, value in entries.items() if isinstance(entries, Mapping) else ():
                if isinstance(value, Tensor):
                    state[f"{prefix}{name}"] = value
                elif isinstance(value, Inert) and id(value) not in seen:
                    seen.add(id(value))
                    pending.append((f"{prefix}{name}.", value))
    return state
