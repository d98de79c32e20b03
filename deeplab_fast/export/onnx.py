"""Export to ONNX."""

from __future__ import annotations

import importlib
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from .._io.files import replacing_files
from .check import Comparison, Result
from .metadata import metadata_of
from .optional import needs
from .program import Job, job_of, program_of

OPSET = 18
_MAX_FILE = 2**31 - 2**24  # protobuf's limit, with room for the graph
_SIZES = {0: "batch", 2: "height", 3: "width"}


def export_onnx(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    result: Result = "labels",
    dtype: torch.dtype = torch.int64,
    size: tuple[int, int] | None = None,
    batch: int | None = None,
) -> Comparison | None:
    """Write a model as an ONNX file, and check that ONNX Runtime computes the same from it.

    The file has standard operators of opset 18 only, so it runs where this package is not
    installed: ONNX Runtime, OpenVINO, TensorRT. It has one input, ``images``, float32 and
    normalised as by the model's ``preprocessing``, and one output, ``labels`` or ``logits``. Its
    metadata describes the preprocessing and the classes, see
    :func:`deeplab_fast.export.metadata.metadata_of`.

    The form of the model for inference is exported, as of ``prepare_for_inference`` or
    ``accelerate(model, inference=True)``, with batch norms folded into the convolutions. The model
    itself stays as it is. Images with NaN or Inf have no special meaning in the file.

    If onnxruntime is installed, labels or logits are then compared with those of ``model`` on
    images of three sizes. Labels must be equal where they do not nearly tie. A trained model may
    see one class only in random images, so the logits in the file, of which the labels are the
    argmax, are compared, too.

    Args:
        model: a DeepLabV3 or DeepLabV3Plus, plain or prepared for inference, a model of
            :func:`deeplab_fast.accelerate`, or any other segmentation model. In evaluation mode,
            with weights of float32.
        path: file to write, replaced only if all succeeds. Weights of more than 2 GB go to a
            second file beside it, ``NAME.data``.
        result: "labels" [N, H, W] or "logits" [N, K, H, W], both as large as the images.
        dtype: dtype of the labels: torch.int64, torch.int32 or torch.uint8.
        size: the (height, width) that all images have; by default any, which needs torch 2.7.
        batch: the number of images of all batches; by default any.

    Returns:
        The result of the check; None if onnxruntime is not installed.

    Raises:
        CheckFailed: the check found a difference. No file is written.
        RuntimeError: the model is in training mode.
        TypeError, ValueError: the weights are not float32, or an argument is invalid.
        ImportError: onnx or onnxscript is not installed.

    >>> export_onnx(model, "model.onnx", dtype=torch.uint8)
    """
    path = Path(path)
    for package in ("onnx", "onnxscript"):
        with needs(package, extra="export"):
            importlib.import_module(package)
    job = job_of(model, result, dtype, size, batch)
    if size is None and not hasattr(torch.compiler, "is_exporting"):
        raise ValueError(
            f"size: expected (height, width) with torch {torch.__version__}: to export for any "
            "size, install torch 2.7 or later"
        )
    exported: Any = torch.onnx.export(
        program_of(job),
        dynamo=True,
        opset_version=OPSET,
        input_names=["images"],
        output_names=[result],
        verbose=False,
    )
    _name_sizes(exported.model.graph, job)
    for node in exported.model.graph:
        node.metadata_props.clear()  # stack traces, with paths of this machine
    exported.model.metadata_props.update(metadata_of(job.prepared.model, result, dtype))
    with replacing_files(path) as partial:
        _save(exported, partial)
        comparison = _check(exported, partial, job)
    return comparison


def _name_sizes(graph: Any, job: Job) -> None:
    """Give the sizes that may vary their names, in the shapes of the input and the output."""
    (images,), (output,) = graph.inputs, graph.outputs
    names = {i: name for i, name in _SIZES.items() if not job.fixed[i]}
    for i, name in names.items():
        images.shape[i] = name
        output.shape[i - 1 if i and job.prepared.result == "labels" else i] = name


def _save(exported: Any, path: Path) -> None:
    weights = exported.model.graph.initializers.values()
    size = sum(weight.const_value.nbytes for weight in weights)
    exported.save(path, external_data=size > _MAX_FILE)


def _check(exported: Any, path: Path, job: Job) -> Comparison | None:
    try:
        import onnxruntime  # noqa: F401
    except ImportError:
        return None
    comparison = job.compare(_engine(path))
    graph = exported.model.graph
    logits = [node.inputs[0] for node in graph if node.op_type == "ArgMax"]
    if job.prepared.result != "labels" or len(logits) != 1:
        return comparison
    (labels,) = graph.outputs
    graph.outputs[:] = logits
    try:
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder, "logits.onnx")
            _save(exported, file)
            return job.compare_logits(_engine(file), comparison)
    finally:
        graph.outputs[:] = [labels]


def _engine(path: Path) -> Callable[[np.ndarray], np.ndarray]:
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda images: session.run(None, {"images": images})[0]
