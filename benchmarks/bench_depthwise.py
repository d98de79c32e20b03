"""Depthwise atrous convolution: the dilated layers of MobileNetV2 at output stride 8.

Forward as networks prepared for inference run it, with bias and ReLU6, and the gradients of the
input (dgrad) and of the weight (wgrad); on a GPU against cuDNN's algorithm chosen by heuristics, by
search (cudnn.benchmark) or among the deterministic ones.
"""

from __future__ import annotations

import cases
import harness
import torch
import torch.nn.functional as F
from convolutions import CUDNN, TOLERANCE, with_cudnn
from harness import Run
from torch import Tensor

from deeplab_fast.backends import registry
from deeplab_fast.ops.dilated_conv2d import dilated_conv2d_backward_op
from deeplab_fast.ops.fused_conv2d import fused_conv2d_op

LAYERS = ((384, 2), (576, 2), (960, 4))  # channels, rate
DIRECTIONS = ("forward", "dgrad", "wgrad")


def main(argv: list[str] | None = None) -> None:
    args = harness.arguments(__doc__, argv, gpu_dtypes=("bf16", "fp16", "fp32"))
    report = harness.Report("depthwise", args)
    size = cases.TINY.feature if args.tiny else cases.VOC_OS8.feature
    for channels, rate in ((16, 2),) if args.tiny else LAYERS:
        for dtype in args.dtype:
            for batch in args.batch:
                torch.manual_seed(0)
                layer(report, size, channels, rate, dtype, batch)
    report.finish()


def layer(
    report: harness.Report,
    size: tuple[int, int],
    channels: int,
    rate: int,
    dtype: str,
    batch: int,
) -> None:
    x = torch.randn(batch, channels, *size)
    weight, bias = torch.randn(channels, 1, 3, 3) / 3, torch.randn(channels)
    grad = torch.randn_like(x)
    tensors = [t.to(report.device, harness.DTYPES[dtype]) for t in (x, weight, bias, grad)]
    layouts = {
        "NCHW": tensors,
        "channels_last": [
            t.contiguous(memory_format=torch.channels_last) if t.dim() == 4 else t for t in tensors
        ],
    }
    ours = {"deeplab_fast": ""}
    if report.device.type == "cuda":
        for backend in ("cuda", "triton"):
            if registry.unavailable_reason(backend, "cuda") is None:
                ours[f"deeplab_fast on {backend}"] = backend
    settings = CUDNN if report.device.type == "cuda" else {"": {}}
    for direction in DIRECTIONS:
        report.case(
            f"{channels} channels, {size[0]}x{size[1]}, rate {rate}, {direction}",
            batch=batch,
            dtype=dtype,
            reference=pytorch(direction, rate, *(t.float() for t in tensors)),
            ours={
                name: deeplab_fast(direction, rate, *layouts["channels_last"], backend)
                for name, backend in ours.items()
            },
            baselines={
                f"PyTorch {layout}{setting}": with_cudnn(pytorch(direction, rate, *args), flags)
                for layout, args in layouts.items()
                for setting, flags in settings.items()
            },
            tolerance=TOLERANCE[dtype],
            bytes=2 * tensors[0].numel() * tensors[0].element_size(),
        )


def pytorch(
    direction: str, rate: int, x: Tensor, weight: Tensor, bias: Tensor, grad: Tensor
) -> Run:
    """oneDNN on a CPU, cuDNN or PyTorch's own depthwise kernels on a GPU."""
    channels = weight.size(0)
    if direction == "forward":
        return lambda: F.relu6(F.conv2d(x, weight, bias, 1, rate, rate, channels), inplace=True)
    geometry = ([1, 1], [rate, rate], [rate, rate], False, [0, 0], channels)
    mask = [direction == "dgrad", direction == "wgrad", False]
    backward = torch.ops.aten.convolution_backward
    return lambda: backward(grad, x, weight, None, *geometry, mask)[mask.index(True)]


def deeplab_fast(
    direction: str,
    rate: int,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    grad: Tensor,
    backend: str,
) -> Run:
    """The op, "" for its automatic backend."""
    channels, rates = weight.size(0), [rate, rate]
    if direction == "forward":
        geometry = [1, 1], rates, rates, channels
        return lambda: fused_conv2d_op(x, weight, bias, *geometry, "relu6", backend=backend)
    mask = [direction == "dgrad", direction == "wgrad", False]
    arguments = grad, x, weight, rates, channels, mask
    return lambda: dilated_conv2d_backward_op(*arguments, backend=backend)[mask.index(True)]


if __name__ == "__main__":
    main()
