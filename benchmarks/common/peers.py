"""Baselines for whole modules: the same networks in PyTorch, and other inference engines."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deeplab_fast.export import quantization
from deeplab_fast.export.openvino import import_openvino
from deeplab_fast.models import DeepLab, DeepLabV3Plus
from deeplab_fast.nn import ASPP, Conv2d

from . import variants
from .timing import Run

INT8 = "OpenVINO int8"  # name of the engine whose results are not those of fp32

try:
    from torchvision.models import resnet
    from torchvision.models._utils import IntermediateLayerGetter
    from torchvision.models.segmentation import deeplabv3
except ImportError:
    deeplabv3 = None
    print(
        "torchvision is not installed, so the baseline is the same network in plain PyTorch "
        '(pip install ".[bench]")'
    )


class PlainASPP(nn.Module):
    """The layers of ``module``, called one after the other as in torchvision's ASPP."""

    def __init__(self, module: ASPP) -> None:
        super().__init__()
        self.convs, self.project = module.convs, module.project

    def forward(self, x: Tensor) -> Tensor:
        *branches, pooled = [conv(x) for conv in self.convs]
        pooled = F.interpolate(pooled, x.shape[2:], mode="bilinear", align_corners=False)
        return self.project(torch.cat([*branches, pooled], dim=1))


class PlainDecoder(nn.Module):
    """The layers of the decoder ``module`` of a :class:`DeepLabV3Plus` in plain PyTorch."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.align_corners = module.align_corners
        self.aspp = PlainASPP(module.aspp)
        self.low_level, self.convs = module.low_level, module.convs

    def forward(self, features: dict[str, Tensor]) -> Tensor:
        low = self.low_level(features["low"])
        upsampled = F.interpolate(
            self.aspp(features["out"]),
            low.shape[2:],
            mode="bilinear",
            align_corners=self.align_corners,
        )
        return self.convs(torch.cat([upsampled, low], dim=1))


class Labels(nn.Module):
    """The argmax over classes of a model's full-resolution logits."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        return self.model(images)["out"].argmax(1)


def aspp(module: ASPP) -> tuple[str, nn.Module]:
    """Name and module of the baseline: torchvision's ASPP if installed, else PlainASPP."""
    if deeplabv3 is None:
        return "PyTorch", PlainASPP(module)
    conv, *dilated, _ = [branch[0] for branch in module.convs]
    atrous_rates = [conv.dilation[0] for conv in dilated]
    baseline = deeplabv3.ASPP(conv.in_channels, atrous_rates, conv.out_channels)
    baseline.load_state_dict(module.state_dict())
    return "torchvision", baseline.eval()


def model(module: DeepLab) -> tuple[str, nn.Module]:
    """Name and module of the baseline: torchvision's model if it has this one, else PyTorch's."""
    backbone, stride = module.config["backbone"], module.config["output_stride"]
    is_plus = isinstance(module, DeepLabV3Plus)
    if deeplabv3 is None or is_plus or not backbone.startswith("resnet"):
        baseline = copy.deepcopy(module)
        head = baseline.classifier[0]
        baseline.classifier[0] = PlainDecoder(head) if is_plus else PlainASPP(head)
        for layer in baseline.modules():
            if type(layer) is Conv2d:
                layer.__class__ = nn.Conv2d  # without our kernels
        return "PyTorch", baseline
    dilate = [False, stride == 8, True]
    layers = getattr(resnet, backbone)(replace_stride_with_dilation=dilate)
    head = deeplabv3.DeepLabHead(2048, module.config["num_classes"], module.config["atrous_rates"])
    baseline = deeplabv3.DeepLabV3(IntermediateLayerGetter(layers, {"layer4": "out"}), head)
    baseline.load_state_dict(module.state_dict())
    return "torchvision", baseline.eval()


def applied(module: nn.Module, x: Tensor, compile: bool = False) -> Run:
    """A call of ``module(x)``, on a copy with the device, dtype and memory format of ``x``.

    Compiled modules are frozen: Inductor folds batch norm and chooses the layout of weights.
    """
    last = x.is_contiguous(memory_format=torch.channels_last)
    memory_format = torch.channels_last if last else torch.contiguous_format
    module = copy.deepcopy(module).to(x.device, x.dtype, memory_format=memory_format)
    function = variants.compiled(module, x.device, freezing=True) if compile else module
    return lambda: function(x)


def exported(module: nn.Module, x: Tensor, path: Path) -> None:
    """Export ``module`` to ONNX, for inputs of the shape of ``x``."""
    torch.onnx.export(module, (x,), path, dynamo=True, external_data=False, verbose=False)


def engines(
    module: nn.Module,
    x: Tensor,
    dtype: str,
    export: Callable[[nn.Module, Tensor, Path], None] = exported,
) -> dict[str, Run]:
    """Calls of ``module(x)`` by engine name, for the installed CPU engines that support ``dtype``.

    Each engine uses as many threads as torch. int8 appears with fp32, which it replaces.

    Args:
        export: writes the ONNX file of ``module`` that the engines run.
    """
    wanted = [
        (name, build)
        for name, dtypes, build in (
            ("ONNX Runtime", ("fp32",), onnxruntime),
            ("OpenVINO", ("fp32", "bf16"), openvino),
            (INT8, ("fp32",), openvino_int8),
        )
        if dtype in dtypes
    ]
    runs: dict[str, Run] = {}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "model.onnx"
        try:
            if wanted:
                export(module, x, file)
        except ImportError as error:
            print(f'no engine of another project: {error} (pip install ".[peers]")')
            return runs
        for name, build in wanted:
            try:
                runs[name] = build(file, x, dtype)
            except ImportError:
                print(f'{name} is not installed and is left out (pip install ".[peers]")')
    return runs


def onnxruntime(file: Path, x: Tensor, dtype: str) -> Run:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    feed = {session.get_inputs()[0].name: x.numpy()}
    return lambda: torch.from_numpy(session.run(None, feed)[0])


def openvino(file: Path, x: Tensor, dtype: str) -> Run:
    return _compiled(_network(file, x), x, {"fp32": "f32", "bf16": "bf16"}[dtype])


def openvino_int8(file: Path, x: Tensor, dtype: str) -> Run:
    """OpenVINO with convolutions in int8, as ``deeplab-fast export --int8`` quantises them.

    It is calibrated on ``x`` itself. That gives the time of an int8 network, which does not depend
    on the ranges that calibration finds. It says nothing about the quality on photos.
    """
    network = quantization.quantize(_network(file, x), [x.numpy()], lambda images: images)
    return _compiled(network, x, "f32")


def _network(file: Path, x: Tensor) -> Any:
    network = import_openvino().Core().read_model(file)
    network.reshape(list(x.shape))
    return network


def _compiled(network: Any, x: Tensor, precision: str) -> Run:
    config = {
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "INFERENCE_PRECISION_HINT": precision,
        "PERFORMANCE_HINT": "LATENCY",
    }
    compiled = import_openvino().Core().compile_model(network, "CPU", config)
    return lambda: torch.from_numpy(compiled(x.numpy())[0])
