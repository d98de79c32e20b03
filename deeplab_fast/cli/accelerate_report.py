"""``deeplab-fast accelerate-report``: what ``accelerate`` replaces in a model of any project."""

from __future__ import annotations

import argparse
import difflib
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import nn

from ..acceleration.accelerating import IMAGE_SIZE, accelerate_with_report
from .errors import UserError, reason


def add_parser(subparsers: Any) -> None:
    help = "print what deeplab_fast.accelerate replaces in your model, and what it saves"
    parser = subparsers.add_parser(
        "accelerate-report",
        help=help,
        description=f"{help[0].upper()}{help[1:]}.\n\n"
        "The table lists each part of the model, what runs instead or why it is kept, its\n"
        "floating-point operations and the share of them that multiply zero padding.\n"
        "Nothing is computed or timed, and the model needs no trained weights.",
        epilog="examples:\n"
        "  deeplab-fast accelerate-report my_project.models:build_model\n"
        "  deeplab-fast accelerate-report train.py:make_network --inference --size 1024 2048\n"
        "  deeplab-fast accelerate-report torchvision.models.segmentation:fcn_resnet50",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "model",
        metavar="MODULE:FUNCTION",
        help="a module that Python can import from the current folder, or a .py file; and its "
        "function or class that makes the model without arguments, or a variable that is the model",
    )
    parser.add_argument(
        "--inference",
        action="store_true",
        help="report on accelerate(model, inference=True), instead of accelerate(model), which is "
        "for training",
    )
    parser.add_argument(
        "--size",
        type=int,
        nargs=2,
        default=IMAGE_SIZE,
        metavar=("HEIGHT", "WIDTH"),
        help="size of the image for which operations are counted (default: {} {})".format(
            *IMAGE_SIZE
        ),
    )
    parser.add_argument(
        "--channels",
        type=int,
        metavar="N",
        help="number of channels of that image (default: that of the model's first convolution)",
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    for option, values in (("--size", arguments.size), ("--channels", [arguments.channels])):
        if any(value is not None and value < 1 for value in values):
            raise UserError(
                f"{option}: got {' '.join(map(str, values))} (expected positive integers)"
            )
    module_name, colon, name = arguments.model.rpartition(":")
    if not (module_name and colon and name):
        raise UserError(f"{arguments.model}: expected MODULE:FUNCTION, such as my_models:build")
    before = sys.path.copy()
    sys.path.insert(0, str(Path.cwd()))
    try:
        model = _model(_find(_import(module_name), name, arguments.model), arguments.model)
        if arguments.inference:
            model.eval()
        _, report = accelerate_with_report(
            model, inference=arguments.inference, size=arguments.size, channels=arguments.channels
        )
    finally:
        sys.path[:] = before
    print(report)
    return 0


def _import(name: str) -> ModuleType:
    """The module of this name, or in this file."""
    path = Path(name)
    if path.suffix == ".py":
        if not path.is_file():
            raise UserError(f"{name}: no such file (expected a .py file or the name of a module)")
        return _user_code(name, lambda: _import_file(path))
    try:
        return _user_code(name, lambda: importlib.import_module(name))
    except UserError as error:
        missing = error.__cause__
        if isinstance(missing, ModuleNotFoundError) and f"{name}.".startswith(f"{missing.name}."):
            raise UserError(
                f"{name}: no such module (expected one that Python can import from "
                f"{Path.cwd()}, or a .py file)"
            ) from missing
        raise


def _import_file(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"{path.stem} of accelerate-report", path)
    assert spec is not None and spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    sys.path.insert(1, str(path.resolve().parent))
    spec.loader.exec_module(module)
    return module


def _find(module: ModuleType, name: str, argument: str) -> Any:
    if hasattr(module, name):
        return getattr(module, name)
    names = [other for other, value in vars(module).items() if callable(value)]
    similar = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    own = [
        other
        for other in names
        if getattr(vars(module)[other], "__module__", "") == module.__name__
    ]
    expected = similar or own[:3]
    hint = f"one such as {', '.join(expected)}" if expected else "a function that returns a model"
    raise UserError(f"{argument}: no such function (expected {hint})")


def _model(function: Any, argument: str) -> nn.Module:
    """The model that ``function`` returns or is."""
    if isinstance(function, nn.Module):
        return function
    if not callable(function):
        raise UserError(
            f"{argument}: expected a function or an nn.Module, got {type(function).__name__}"
        )
    if needed := _needed_arguments(function):
        raise UserError(
            f"{argument}: needs arguments: {', '.join(needed)} (expected a function without "
            "arguments)"
        )
    model = _user_code(argument, function)
    if not isinstance(model, nn.Module):
        raise UserError(f"{argument}: returned {type(model).__name__} (expected an nn.Module)")
    return model


def _needed_arguments(function: Callable[..., Any]) -> list[str]:
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # functions in C may have no signature
        return []
    optional = inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD
    return [
        parameter.name
        for parameter in parameters
        if parameter.default is parameter.empty and parameter.kind not in optional
    ]


def _user_code(name: str, run: Callable[[], Any]) -> Any:
    """The result of ``run()``. Any exception becomes a UserError with its type and message."""
    try:
        return run()
    except (Exception, SystemExit) as error:
        raise UserError(f"{name}: {type(error).__name__}: {reason(error)}") from error
