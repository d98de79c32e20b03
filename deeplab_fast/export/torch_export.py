"""Export to PyTorch's own formats: programs of torch.export, and packages of AOTInductor."""

from __future__ import annotations

import io
import json
import os
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from .._io.files import replacing_files
from .check import Comparison, Result
from .metadata import metadata_of
from .program import Job, job_of, logits_within, program_of, with_standard_operators

METADATA = "metadata.json"


def export_torch(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    result: Result = "labels",
    dtype: torch.dtype = torch.int64,
    size: tuple[int, int] | None = None,
    batch: int | None = None,
    portable: bool = False,
) -> Comparison:
    """Write a model as a program of torch.export (.pt2), and check what is read back.

    ``torch.export.load(path).module()`` is a function from images to labels or logits, as
    :func:`export_onnx` describes them. It needs ``import deeplab_fast`` first, for its ops, unless
    it is ``portable``. PyTorch promises to read a program in the version that wrote it.

    The file has an extra file "metadata.json", a JSON object of
    :func:`deeplab_fast.export.metadata.metadata_of`, which ``torch.export.load`` reads as
    ``extra_files={"metadata.json": ""}``.

    Args:
        model, result, dtype, size, batch: see :func:`export_onnx`.
        path: file to write, with the suffix .pt2. It is replaced only if all succeeds.
        portable: write PyTorch's operators instead of the ops of this package, so that the program
            loads where this package is not installed. It is slower.

    Returns, Raises: see :func:`export_onnx`.

    >>> export_torch(model, "model.pt2", portable=True)
    """
    path = _pt2(path)
    job = job_of(model, result, dtype, size, batch)
    program = program_of(job)
    if portable:
        program = with_standard_operators(program)
    metadata = json.dumps(metadata_of(job.prepared.model, result, dtype), ensure_ascii=False)
    with replacing_files(path) as partial:
        # On a full disk PyTorch's own writer would end the process, so it writes to memory.
        file = io.BytesIO()
        with warnings.catch_warnings():
            # The warning is about weights in channels_last, which are saved completely.
            warnings.filterwarnings("ignore", "No complete tensor")
            torch.export.save(program, file, extra_files={METADATA: metadata})
        partial.write_bytes(file.getbuffer())
        loaded = torch.export.load(partial)
        comparison = job.compare(_engine(loaded.module()))
        return _with_logits(loaded, job, comparison)


def export_aoti(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    result: Result = "labels",
    dtype: torch.dtype = torch.int64,
    size: tuple[int, int] | None = None,
    batch: int | None = None,
) -> Comparison:
    """Compile a model for this CPU with AOTInductor into a package (.pt2), and check it.

    ``torch._inductor.aoti_load_package(path)`` is a function from images to labels or logits, as
    :func:`export_onnx` describes them, and its ``get_metadata()`` has the entries of
    :func:`deeplab_fast.export.metadata.metadata_of`. In C++ it is
    ``torch::inductor::AOTIModelPackageLoader``.

    The package contains machine code for the instructions of this CPU, and calls PyTorch's
    operators. It needs the version of PyTorch that wrote it, and neither this package nor a
    compiler. Compiling needs a C++ compiler and takes from half a minute to a few minutes.

    Args:
        model, result, dtype, size, batch: see :func:`export_onnx`.
        path: file to write, with the suffix .pt2. It is replaced only if all succeeds.

    Returns: see :func:`export_onnx`.

    Raises:
        FileNotFoundError: there is no C++ compiler.
        CheckFailed, RuntimeError, TypeError, ValueError: see :func:`export_onnx`.

    >>> export_aoti(model, "model.pt2", size=(513, 513))
    """
    path = _pt2(path)
    job = job_of(model, result, dtype, size, batch)
    _check_compiler()
    # With our ops the package would need this package and Python, and AOTInductor of torch 2.6 has
    # no arguments of their types.
    program = with_standard_operators(program_of(job))
    metadata = metadata_of(job.prepared.model, result, dtype)
    with replacing_files(path) as partial:
        torch._inductor.aoti_compile_and_package(
            program,
            package_path=str(partial),
            inductor_configs={"aot_inductor.metadata": metadata},
        )
        comparison = job.compare(_engine(torch._inductor.aoti_load_package(str(partial))))
        return _with_logits(program, job, comparison)


def _pt2(path: str | os.PathLike[str]) -> Path:
    path = Path(path)
    if path.suffix != ".pt2":
        raise ValueError(f"path: expected a name that ends in .pt2, got {path.name}")
    return path


def _check_compiler() -> None:
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler as error:
        raise FileNotFoundError(
            "no C++ compiler (expected g++ on the path, or another one as CXX)"
        ) from error


def _engine(program: Callable[[Tensor], Tensor]) -> Callable[[np.ndarray], np.ndarray]:
    def engine(images: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            return program(torch.from_numpy(images)).numpy()

    return engine


def _with_logits(program: ExportedProgram, job: Job, comparison: Comparison) -> Comparison:
    """``comparison`` after that of the logits within ``program``, if it returns their argmax."""
    if job.prepared.result != "labels":
        return comparison
    logits = logits_within(with_standard_operators(program))
    return job.compare_logits(_engine(logits), comparison) if logits else comparison
