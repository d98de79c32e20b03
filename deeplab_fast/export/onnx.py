"""Export to ONNX."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from .._io.files import replacing
from .program import Exportable, Result


def export_onnx(
    model: Any,
    path: str | os.PathLike[str],
    *,
    result: Result = "labels",
    dtype: torch.dtype = torch.int64,
) -> None:
    """Write a model as an ONNX file of standard operators, for any batch, height and width."""
    exportable = Exportable(model.prepare_for_inference(), result, dtype).eval()
    images = torch.zeros(2, model.in_channels, 65, 81)
    dynamic = torch.export.Dim.DYNAMIC
    program: Any = torch.onnx.export(
        exportable,
        (images,),
        dynamo=True,
        opset_version=18,
        input_names=["images"],
        output_names=[result],
        dynamic_shapes={"images": {0: dynamic, 2: dynamic, 3: dynamic}},
        verbose=False,
    )
    with replacing(Path(path)) as partial:
        program.save(partial)
