"""Export to OpenVINO IR, in fp32 or quantised to int8."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from .._io.files import replacing_files
from . import quantization
from .check import Comparison, Result
from .metadata import metadata_of
from .onnx import export_onnx
from .optional import needs, not_installed
from .program import job_of
from .quantization import Agreement, Photos


def export_openvino(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    result: Result = "labels",
    dtype: torch.dtype = torch.int64,
    size: tuple[int, int] | None = None,
    calibration: Sequence[Path] | None = None,
) -> Comparison | Agreement:
    """Write a model as OpenVINO IR: an .xml file and, beside it, a .bin file with the weights.

    Input and output are those of :func:`export_onnx`, of any batch size. The metadata of
    :func:`deeplab_fast.export.metadata.metadata_of` are in the section ``deeplab_fast`` of the
    model's ``rt_info``.

    Weights are saved in fp32. In fp16, the default of ``openvino.save_model``, the file would be
    half as large, but its weights rounded; a CPU converts them back and is no faster. On CPUs with
    bf16 instructions OpenVINO computes in bf16 unless a program compiles the model with
    ``INFERENCE_PRECISION_HINT`` "f32", as the check does.

    Args:
        model: as for :func:`export_onnx`.
        path: of the .xml file. Both files are replaced only if all succeeds.
        result: "labels" [N, H, W] or "logits" [N, K, H, W], both as large as the images.
        dtype: dtype of the labels: torch.int64, torch.int32 or torch.uint8.
        size: the (height, width) that all images have; by default any.
        calibration: image files. If given, convolutions are quantised to int8, for the ranges of
            values that these photos cause; see :mod:`deeplab_fast.export.quantization`.

    Returns:
        The comparison of the exported model with ``model``; with ``calibration`` that of the
        labels in int8 with those in fp32.

    Raises:
        ValueError: ``path`` does not end in .xml, another argument is invalid, a photo cannot be
            read or there are none, or the model takes no photos.
        RuntimeError, TypeError: see :func:`export_onnx`.
        ImportError: openvino, onnx, onnxscript or, for int8, nncf is not installed.
        CheckFailed: the fp32 model computes something else than ``model``. No file is written.

    >>> export_openvino(model, "model.xml", calibration=sorted(Path("photos").glob("*.jpg")))
    """
    path = Path(path)
    if path.suffix != ".xml":
        raise ValueError(f"path: expected a name that ends in .xml, got {path.name}")
    openvino = import_openvino()
    job = job_of(model, result, dtype, size, None)
    photos = None
    if calibration is not None:
        quantization.import_nncf()
        photos = Photos(calibration, model, size)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "model.onnx")
        export_onnx(model, file, result=result, dtype=dtype, size=size)
        network = openvino.Core().read_model(file)
    fp32 = compiled(network)
    comparison = job.compare(fp32)
    logits = _logits_of(network) if result == "labels" else None
    if logits is not None:
        comparison = job.compare_logits(compiled(logits), comparison)
    report: Comparison | Agreement = comparison
    if photos is not None:
        network = quantization.quantize(network, photos.to_calibrate, photos.input)
        report = quantization.agreement(fp32, compiled(network), photos, result)
    for name, value in metadata_of(model, result, dtype).items():
        network.set_rt_info(value, ["deeplab_fast", name])
    with replacing_files(path) as partial:
        openvino.save_model(network, partial, compress_to_fp16=False)
    return report


def _logits_of(network: Any) -> Any:
    """A copy of ``network`` that returns what its argmax reads; None if it has not one argmax."""
    copy = network.clone()
    argmax = [op for op in copy.get_ops() if op.get_type_name() == "TopK"]
    if len(argmax) != 1:
        return None
    (logits,) = (op.input_value(0) for op in argmax)
    return import_openvino().Model([logits], copy.get_parameters())


def import_openvino() -> Any:
    """The module ``openvino``, imported without the telemetry that it sends otherwise.

    Its import reports to Google Analytics if the package openvino_telemetry, on which it depends,
    can be imported, unless the user has opted out. A program that has imported openvino before has
    decided that for itself.

    Raises:
        ImportError: openvino is not installed.
    """
    with needs("openvino", extra="int8"), not_installed("openvino_telemetry"):
        import openvino

        return openvino


def compiled(network: Any) -> Callable[[np.ndarray], np.ndarray]:
    """An ``openvino.Model`` compiled for this CPU, in fp32 but for what is int8."""
    config = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": torch.get_num_threads()}
    run = import_openvino().Core().compile_model(network, "CPU", config)
    return lambda images: run(images)[0]
