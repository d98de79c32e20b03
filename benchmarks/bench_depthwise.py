"""Benchmark depthwise atrous convolution: the dilated layers of MobileNetV2 at output stride 8.

The forward pass has bias and ReLU6, as in networks prepared for inference; the gradients are those
of the input (dgrad) and of the weight (wgrad). On a GPU cuDNN chooses its algorithm by heuristics,
by timing all (cudnn.benchmark), or among deterministic ones.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from common import cases, harness
from common.convolutions import DIRECTIONS, TOLERANCE, mask
from common.timing import Run
from common.variants import cudnn_variants
from torch import Tensor

from deeplab_fast.backends import registry
from deeplab_fast.ops.dilated_conv2d import dilated_conv2d_backward_op
from deeplab_fast.ops.fused_conv2d import fused_conv2d_op

LAYERS = ((384, 2), (576, 2), (960, 4))  # channels, dilation


def main(argv: list[str] | None = None) -> None:
    args = harness.arguments(__doc__, argv, gpu_dtypes=("bf16", "fp16", "fp32"))
    report = harness.Report("depthwise", args)
    size = cases.TINY.feature if args.tiny else cases.VOC_OS8.feature
    for channels, dilation in ((16, 2),) if args.tiny else LAYERS:
        for dtype in args.dtype:
            for batch in args.batch:
                torch.manual_seed(0)
                layer(report, size, channels, dilation, dtype, batch)
    report.finish()


def layer(
    report: harness.Report,
    size: tuple[int, int],
    channels: int,
    dilation: int,
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
    for direction in DIRECTIONS:
        baselines: dict[str, Run] = {}
        for layout, args in layouts.items():
            run = pytorch(direction, dilation, *args)
            baselines |= cudnn_variants(f"PyTorch {layout}", run, report.device)
        report.case(
            f"{channels} channels, {size[0]}x{size[1]}, dilation {dilation}, {direction}",
            batch=batch,
            dtype=dtype,
            reference=pytorch(direction, dilation, *(t.float() for t in tensors)),
            ours={
                name: deeplab_fast(direction, dilation, *layouts["channels_last"], backend)
                for name, backend in ours.items()
            },
            baselines=baselines,
            tolerance=TOLERANCE[dtype],
            bytes=2 * tensors[0].numel() * tensors[0].element_size(),
        )


def pytorch(
    direction: str, dilation: int, x: Tensor, weight: Tensor, bias: Tensor, grad: Tensor
) -> Run:
    """PyTorch's layer or a gradient: oneDNN on a CPU, cuDNN or PyTorch's own kernels on a GPU."""
    channels, dilations = weight.size(0), [dilation, dilation]
    if direction == "forward":
        return lambda: F.relu6(
            F.conv2d(x, weight, bias, 1, dilation, dilation, channels), inplace=True
        )
    geometry = ([1, 1], dilations, dilations, False, [0, 0], channels)
    requested = mask(direction)
    backward = torch.ops.aten.convolution_backward
    return lambda: backward(grad, x, weight, None, *geometry, requested)[requested.index(True)]


def deeplab_fast(
    direction: str,
    dilation: int,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    grad: Tensor,
    backend: str,
) -> Run:
    """Our op on ``backend``, "" for automatic dispatch."""
    channels, dilations = weight.size(0), [dilation, dilation]
    if direction == "forward":
        geometry = [1, 1], dilations, dilations, channels
        return lambda: fused_conv2d_op(x, weight, bias, *geometry, "relu6", backend=backend)
    requested = mask(direction)
    arguments = grad, x, weight, dilations, channels, requested
    return lambda: dilated_conv2d_backward_op(*arguments, backend=backend)[requested.index(True)]


if __name__ == "__main__":
    main()
