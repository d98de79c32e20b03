"""Export to OpenVINO IR, in fp32 or quantised to int8."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from . import quantization
from .check import Comparison, compare
from .onnx import export_onnx
from .optional import needs, not_installed
from .program import Result
from .quantization import Agreement

_SIZES = ((65, 81), (48, 33), (97, 65))  # where an export of dynamic size is checked


def export_openvino(
    model: Any,
    path: str | os.PathLike[str],
    *,
    result: Result = "labels",
    dtype: torch.dtype = torch.int64,
    size: tuple[int, int] | None = None,
    calibration: Sequence[Path] | None = None,
) -> Comparison | Agreement:
    """Write a model as OpenVINO IR: ``path`` and, beside it, a .bin file with the weights.

    The input ``images`` is float32 [N, C, H, W], normalised as by ``model.preprocessing``. The
    weights stay fp32: fp16, the default of ``openvino.save_model``, halves the file, but rounds the
    weights and is no faster on a CPU, where OpenVINO converts them back. On CPUs with bf16
    instructions OpenVINO computes in bf16 unless it is loaded with ``INFERENCE_PRECISION_HINT``
    "f32".

    Args:
        model: a model in evaluation mode, or one prepared for inference.
        path: of the .xml file. Both files are replaced only when they are complete.
        result: "labels" [N, H, W], or "logits" [N, num_classes, H, W] at the size of the images.
        dtype: of the labels: torch.int64, torch.int32 or torch.uint8.
        size: (height, width) of the images, which fixes the batch size at 1; None for any.
        calibration: photos. If given, convolutions are quantised to int8 (8-bit integers) for the
            ranges of values that occur with these photos; see
            :func:`deeplab_fast.export.quantization.quantize`.

    Returns:
        The comparison of the written model with ``model``, or with ``calibration`` that of the
        int8 model's labels with those in fp32. ``str()`` of it is a sentence or two.

    Raises:
        ValueError: ``path`` does not end in .xml, a photo cannot be read or there are none, or the
            model does not take photos.
        ImportError: OpenVINO, onnxscript or, for int8, NNCF is not installed.
        CheckFailed: the fp32 export computes something else than ``model``.

    >>> print(export_openvino(model.eval(), "model.xml", calibration=list(Path("photos").iterdir())))
    """
    path = Path(path)
    if path.suffix != ".xml":
        raise ValueError(f"path: expected a name that ends in .xml, got {path.name}")
    runtime = import_openvino()
    if calibration is not None:
        quantization.import_nncf()
        photos = quantization.Photos(calibration, model, size)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "model.onnx"
        export_onnx(model, file, result=result, dtype=dtype)
        network = runtime.Core().read_model(file)  # convert_model would call openvino_telemetry
    if size is not None:
        network.reshape([1, model.in_channels, *size])
    shapes = [
        (1 if size is not None else 1 + index, model.in_channels, *shape)
        for index, shape in enumerate(_SIZES if size is None else (size,))
    ]
    engine = compiled(network)
    report: Comparison | Agreement = compare(
        engine, lambda images: model(images)["out"], result, shapes
    )
    if calibration is not None:
        network = quantization.quantize(network, photos.to_calibrate, photos.input)
        report = quantization.agreement(engine, compiled(network), photos, result)
    _save(network, path)
    return report


def import_openvino() -> Any:
    """The module ``openvino``, imported so that it reports nothing to its makers.

    Raises:
        ImportError: it is not installed.
    """
    with needs("openvino", "OpenVINO"), not_installed("openvino_telemetry"):
        import openvino

        return openvino


def compiled(network: Any) -> Callable[[np.ndarray], np.ndarray]:
    """An ``openvino.Model`` compiled for the CPU, in fp32 where it is not int8."""
    config = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": torch.get_num_threads()}
    run = import_openvino().Core().compile_model(network, "CPU", config)
    return lambda images: np.asarray(run(images)[0])


def _save(network: Any, path: Path) -> None:
    """Write ``path`` and its .bin file; if that fails, both stay as they were."""
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.stem[:50]}.") as folder:
        written = Path(folder) / path.name
        import_openvino().save_model(network, written, compress_to_fp16=False)
        for suffix in (".bin", ".xml"):  # who reads the new .xml finds the new weights
            os.replace(written.with_suffix(suffix), path.with_suffix(suffix))
