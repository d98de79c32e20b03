"""Entry points of torch.hub: ``torch.hub.load("path/to/checkout", "deeplabv3", source="local")``.

The package has to be installed, because its kernels are compiled then.
"""

from __future__ import annotations

# torch.hub.list takes every public class and function for an entry point.
import contextlib
import importlib
import sys
from collections.abc import Iterator as _Iterator
from pathlib import Path as _Path
from typing import Any as _Any

from torch import nn

dependencies = ["torch"]  # installing the package brings the others

_FOLDER = _Path(__file__).resolve().parent


def deeplabv3(*args: _Any, weights: str | None = None, **options: _Any) -> nn.Module:
    """DeepLab-v3.

    Args:
        args, options: arguments of deeplab_fast.DeepLabV3, such as ``"resnet50", num_classes=11``.
        weights: argument of ``DeepLabV3.from_pretrained``: a file, a folder, "deeplabv3_resnet50"
            or a repository of the Hugging Face Hub. The options, which have to be named, then
            replace those of the checkpoint. None: random weights.
    """
    return _model("DeepLabV3", args, weights, options)


def deeplabv3plus(*args: _Any, weights: str | None = None, **options: _Any) -> nn.Module:
    """DeepLab-v3+. The arguments are those of ``deeplabv3``, for deeplab_fast.DeepLabV3Plus."""
    return _model("DeepLabV3Plus", args, weights, options)


def _model(
    name: str, args: tuple[_Any, ...], weights: str | None, options: dict[str, _Any]
) -> nn.Module:
    kind = getattr(_installed_package(), name)
    if weights is None:
        return kind(*args, **options)
    if args:
        raise TypeError(f"weights: expected only named arguments beside it, got {args}")
    return kind.from_pretrained(weights, **options)


def _installed_package() -> _Any:
    """The installed deeplab_fast. The folder of that name beside this file has no kernels."""
    try:
        with _off_the_path(_FOLDER):
            return importlib.import_module("deeplab_fast")
    except ModuleNotFoundError as error:
        if error.name != "deeplab_fast":
            raise
        raise ImportError(
            f"deeplab_fast is not installed, which compiles its kernels: pip install {_FOLDER}"
        ) from error


@contextlib.contextmanager
def _off_the_path(folder: _Path) -> _Iterator[None]:
    """Take a folder, which torch.hub puts on sys.path and removes from there, off it."""
    before = sys.path.copy()
    sys.path[:] = [entry for entry in before if _Path(entry).resolve() != folder]
    try:
        yield
    finally:
        sys.path[:] = before
