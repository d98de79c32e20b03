"""Export of models to formats that run without this package."""

from .onnx import export_onnx
from .openvino import export_openvino
from .torch_export import export_aoti, export_torch

__all__ = ["export_aoti", "export_onnx", "export_openvino", "export_torch"]
