"""What deeplab_fast is compared with: the same networks in torchvision, and other engines."""

from __future__ import annotations

import copy
import tempfile
from pathlib import Path

import harness
import torch
import torch.nn.functional as F
from harness import Run
from torch import Tensor, nn

from deeplab_fast.models import DeepLabV3
from deeplab_fast.nn import ASPP

try:
    from torchvision.models import resnet
    from torchvision.models._utils import IntermediateLayerGetter
    from torchvision.models.segmentation import deeplabv3
except ImportError:
    deeplabv3 = None
    print(
        "torchvision is not installed, the baseline is the same network in plain PyTorch: "
        'pip install ".[bench]" brings the torchvision rows'
    )


class PlainASPP(nn.Module):
    """The layers of ``module``, run one by one as torchvision's ASPP does."""

    def __init__(self, module: ASPP) -> None:
        super().__init__()
        self.convs, self.project = module.convs, module.project

    def forward(self, x: Tensor) -> Tensor:
        *branches, pooled = [conv(x) for conv in self.convs]
        pooled = F.interpolate(pooled, x.shape[2:], mode="bilinear", align_corners=False)
        return self.project(torch.cat([*branches, pooled], dim=1))


class Labels(nn.Module):
    """A model that returns full-resolution logits, as one that returns their argmax."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        return self.model(images)["out"].argmax(1)


def aspp(module: ASPP) -> tuple[str, nn.Module]:
    """(name, the same function without deeplab_fast): torchvision's ASPP, else a plain one."""
    if deeplabv3 is None:
        return "PyTorch", PlainASPP(module)
    conv, *dilated, _ = [branch[0] for branch in module.convs]
    rates = [conv.dilation[0] for conv in dilated]
    twin = deeplabv3.ASPP(conv.in_channels, rates, conv.out_channels)
    twin.load_state_dict(module.state_dict())
    return "torchvision", twin.eval()


def model(module: DeepLabV3) -> tuple[str, nn.Module]:
    """(name, the same network without deeplab_fast): torchvision's where it has that backbone."""
    backbone, stride = module.config["backbone"], module.config["output_stride"]
    if deeplabv3 is None or not backbone.startswith("resnet"):
        twin = copy.deepcopy(module)
        twin.classifier[0] = PlainASPP(twin.classifier[0])
        return "PyTorch", twin
    dilate = [False, stride == 8, True]
    layers = getattr(resnet, backbone)(replace_stride_with_dilation=dilate)
    head = deeplabv3.DeepLabHead(2048, module.config["num_classes"], module.config["atrous_rates"])
    twin = deeplabv3.DeepLabV3(IntermediateLayerGetter(layers, {"layer4": "out"}), head)
    twin.load_state_dict(module.state_dict())
    return "torchvision", twin.eval()


def applied(module: nn.Module, x: Tensor, compile: bool = False) -> Run:
    """``module(x)``, by a copy of the module in the device, dtype and memory format of ``x``.

    Compiled, its weights are frozen: Inductor folds batch norm and lays them out as it likes.
    """
    last = x.is_contiguous(memory_format=torch.channels_last)
    memory_format = torch.channels_last if last else torch.contiguous_format
    module = copy.deepcopy(module).to(x.device, x.dtype, memory_format=memory_format)
    function = harness.compiled(module, x.device, freezing=True) if compile else module
    return lambda: function(x)


def engines(module: nn.Module, x: Tensor, dtype: str) -> dict[str, Run]:
    """``module(x)`` in the CPU engines that are installed and know ``dtype``, by name.

    On as many threads as torch uses.
    """
    runs = {}
    for name, dtypes, build in (
        ("ONNX Runtime", ("fp32",), onnxruntime),
        ("OpenVINO", ("fp32", "bf16"), openvino),
    ):
        if dtype not in dtypes:
            continue
        try:
            runs[name] = build(module, x, dtype)
        except ImportError:
            print(f'{name} is not installed: pip install ".[peers]" brings its rows')
    return runs


def onnxruntime(module: nn.Module, x: Tensor, dtype: str) -> Run:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    with tempfile.TemporaryDirectory() as folder:
        session = onnxruntime.InferenceSession(
            exported(module, x, folder), options, providers=["CPUExecutionProvider"]
        )
    feed = {session.get_inputs()[0].name: x.numpy()}
    return lambda: torch.from_numpy(session.run(None, feed)[0])


def openvino(module: nn.Module, x: Tensor, dtype: str) -> Run:
    import openvino

    config = {
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "INFERENCE_PRECISION_HINT": {"fp32": "f32", "bf16": "bf16"}[dtype],
        "PERFORMANCE_HINT": "LATENCY",
    }
    with tempfile.TemporaryDirectory() as folder:
        compiled = openvino.Core().compile_model(exported(module, x, folder), "CPU", config)
    return lambda: torch.from_numpy(compiled(x.numpy())[0])


def exported(module: nn.Module, x: Tensor, folder: str) -> Path:
    """The path of ``module`` as an ONNX file for inputs of the shape of ``x``."""
    path = Path(folder) / "model.onnx"
    torch.onnx.export(module, (x,), path, dynamo=True, external_data=False, verbose=False)
    return path
