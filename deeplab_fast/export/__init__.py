"""Export of models to formats that run without this package."""

from .onnx import export_onnx

__all__ = ["export_onnx"]
