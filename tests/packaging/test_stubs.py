"""deeplab_fast/_C.pyi against the compiled module: names, and the signatures that pybind11 writes
into docstrings."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from types import ModuleType

import pytest

import deeplab_fast
from deeplab_fast import _C

STUB = ast.parse((Path(deeplab_fast.__file__).parent / "_C.pyi").read_text())
CLASSES = {node.name: node for node in STUB.body if isinstance(node, ast.ClassDef)}
SUBMODULES = ("cpu", "schedule", "cuda")
STRUCTS = [name for name, value in vars(_C).items() if isinstance(value, type) and name != "DType"]


def names(body: list[ast.stmt]) -> set[str]:
    """Public names that the stub declares; those of TypedDicts begin with an underscore."""
    declared = set()
    for node in body:
        if isinstance(node, ast.AnnAssign):
            declared.add(ast.unparse(node.target))
        elif isinstance(node, (ast.ClassDef, ast.FunctionDef)):
            declared.add(node.name)
    return {name for name in declared if not name.startswith("_")}


def compiled(submodule: str) -> ModuleType:
    """``dry_run`` has the same bindings as ``cuda``, which a build without CUDA lacks."""
    return getattr(_C, submodule, _C.dry_run)


def public(module: ModuleType | type) -> set[str]:
    return {name for name in dir(module) if not name.startswith("_")}


def method(class_name: str, name: str) -> ast.FunctionDef:
    body = CLASSES[class_name].body
    return next(node for node in body if isinstance(node, ast.FunctionDef) and node.name == name)


def parameters(function: ast.FunctionDef) -> list[tuple[str, str, str | None]]:
    """(name, type, default) of each but self; a name is empty if it cannot be used as a keyword."""
    arguments = function.args
    every = arguments.posonlyargs + arguments.args
    defaults = [None] * (len(every) - len(arguments.defaults)) + arguments.defaults
    return [
        (
            "" if argument in arguments.posonlyargs else argument.arg,
            ast.unparse(argument.annotation) if argument.annotation else "",
            ast.unparse(default) if default else None,
        )
        for argument, default in zip(every, defaults)
        if argument.arg != "self"
    ]


def documented(docstring: str) -> ast.FunctionDef:
    """The signature in the first line of a docstring, with types as the stub writes them."""
    line = docstring.partition("\n")[0]
    for pattern, text in (
        (r"typing\.SupportsInt( \| typing\.SupportsIndex)?", "int"),
        (r"typing\.SupportsFloat( \| typing\.SupportsIndex)?", "float"),
        (r"deeplab_fast\._C\.", ""),
        (r"(collections\.abc\.Sequence|\blist)\[", "Sequence["),
        (r'(typing\.)?Annotated\[(.*?), "?FixedSize\(\d+\)"?\]', r"\2"),
    ):
        line = re.sub(pattern, text, line)
    (function,) = ast.parse(f"def {line}: ...").body
    assert isinstance(function, ast.FunctionDef)
    return function


def documented_parameters(docstring: str) -> list[tuple[str, str, str | None]]:
    return [
        ("" if re.fullmatch(r"arg\d+", name) else name, *rest)
        for name, *rest in parameters(documented(docstring))
    ]


def test_names_of_the_module():
    assert names(STUB.body) == public(_C) | {"cuda"}


@pytest.mark.parametrize("submodule", SUBMODULES)
def test_names_of_submodules(submodule):
    assert names(CLASSES[submodule].body) == public(compiled(submodule))


def test_launchers_of_the_dry_run():
    assert public(_C.dry_run) == names(CLASSES["cuda"].body)


def test_names_of_dtypes():
    assert names(CLASSES["DType"].body) == public(_C.DType)
    assert set(_C.DType.__members__) == public(_C.DType) - {"name", "value"}


@pytest.mark.parametrize(
    "submodule,function",
    [(name, function) for name in SUBMODULES for function in sorted(names(CLASSES[name].body))],
)
def test_signatures_of_functions(submodule, function):
    stub = method(submodule, function)
    docstring = getattr(compiled(submodule), function).__doc__
    assert parameters(stub) == documented_parameters(docstring)
    assert stub.returns is not None
    returned = ast.unparse(stub.returns)
    is_dict = returned in CLASSES and ast.unparse(CLASSES[returned].bases[0]) == "TypedDict"
    assert documented(docstring).returns is not None
    assert ast.unparse(documented(docstring).returns) == ("dict" if is_dict else returned)


@pytest.mark.parametrize("struct", STRUCTS)
def test_signatures_of_constructors(struct):
    docstring = getattr(_C, struct).__init__.__doc__
    assert parameters(method(struct, "__init__")) == documented_parameters(docstring)


def test_keys_of_dicts():
    def keys(typed_dict: str) -> set[str]:
        return {ast.unparse(node.target) for node in CLASSES[typed_dict].body}

    assert keys("_BuildInfo") == set(_C.build_info())
    assert keys("_WorkList") == set(_C.schedule.split_k([(1, 1)], 1, 1))
    assert keys("_DeviceInfo") == set(compiled("cuda").device_info())
