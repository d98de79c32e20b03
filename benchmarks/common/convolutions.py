"""Cases of bench_aspp.py for the convolutions of an ASPP alone, in all three directions."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from deeplab_fast.backends import dispatch_table, registry
from deeplab_fast.ops.dilated_conv2d import (
    dilated_conv2d_backward_op,
    dilated_conv2d_op,
    parallel_dilated_conv2d_backward_op,
    parallel_dilated_conv2d_op,
)

from . import cases, harness
from .cases import Shape
from .timing import Run
from .variants import cudnn_variants

DIRECTIONS = ("forward", "dgrad", "wgrad")

# Largest harness.relative_error against fp32; that of a wrong kernel is about 1.
TOLERANCE = {"fp32": 1e-5, "tf32": 5e-3, "fp16": 5e-3, "bf16": 2e-2}


def layers(shape: Shape) -> list[tuple[int, int]]:
    """Kernel size and dilation of the convolutions of an ASPP."""
    return [(1, 1), *((3, rate) for rate in shape.atrous_rates)]


def convolutions(report: harness.Report, shape: Shape, dtype: str, batch: int) -> None:
    """A case for each convolution of the ASPP and direction."""
    x = cases.features(shape, batch, harness.DTYPES[dtype], report.device)
    for kernel, dilation in layers(shape):
        fan_in = shape.in_channels * kernel**2
        weight = torch.randn(shape.channels, shape.in_channels, kernel, kernel) / fan_in**0.5
        grad = torch.randn(batch, shape.channels, *shape.feature)
        tensors = x, weight.to(x), grad.to(x)
        layouts = {
            "NCHW": tensors,
            "channels_last": [t.contiguous(memory_format=torch.channels_last) for t in tensors],
        }
        for direction in DIRECTIONS:
            op = "dilated_conv2d"
            arguments = x, weight.to(x), None, [dilation, dilation], 1
            if direction != "forward":
                op += "_backward"
                arguments = grad.to(x), x, weight.to(x), [dilation, dilation], 1, mask(direction)
            baselines: dict[str, Run] = {}
            for layout, args in layouts.items():
                run = pytorch(direction, dilation, *args)
                baselines |= cudnn_variants(f"PyTorch {layout}", run, report.device)
            report.case(
                f"{shape.name}, {kernel}x{kernel} dilation {dilation}, {direction}",
                batch=batch,
                dtype=dtype,
                reference=pytorch(direction, dilation, *(t.float() for t in tensors)),
                ours={
                    name: deeplab_fast(direction, dilation, *layouts["channels_last"], backend)
                    for name, backend in ours_by_name(dtype, op, *arguments).items()
                },
                baselines=baselines,
                tolerance=TOLERANCE[dtype],
                flops=cases.conv_flops(
                    batch, shape.in_channels, shape.channels, shape.feature, dilation, kernel
                ),
            )


def branches(report: harness.Report, shape: Shape, dtype: str, batch: int) -> None:
    """A case for each direction: all convolutions of the ASPP, in one launch or one by one.

    The outputs of separate calls are not concatenated, which would take them longer; their
    gradients of the input are added.
    """
    x = cases.features(shape, batch, harness.DTYPES[dtype], report.device)
    weights = [
        (torch.randn(shape.channels, shape.in_channels, k, k) / k / shape.in_channels**0.5).to(x)
        for k, _ in layers(shape)
    ]
    grads = [torch.randn(batch, shape.channels, *shape.feature).to(x) for _ in layers(shape)]
    dilations = [dilation for _, dilation in layers(shape)]
    nchw = x, weights, grads
    channels_last = tree_map(lambda t: t.contiguous(memory_format=torch.channels_last), nchw)
    grad_output = torch.cat(channels_last[2], dim=1)

    def one_launch(direction: str, backend: str) -> Run:
        x, weights, _ = channels_last
        if direction == "forward":
            return lambda: parallel_dilated_conv2d_op(
                x, weights, [], dilations, backend=backend
            ).split(shape.channels, dim=1)
        return lambda: _requested(
            parallel_dilated_conv2d_backward_op(
                grad_output, x, weights, dilations, mask(direction), backend=backend
            ),
            mask(direction),
        )

    def one_by_one(
        direction: str, x: Tensor, weights: list[Tensor], grads: list[Tensor]
    ) -> Callable[[], Any]:
        runs = [pytorch(direction, d, x, w, g) for w, g, d in zip(weights, grads, dilations)]
        if direction == "dgrad":
            return lambda: functools.reduce(torch.add, (run() for run in runs))
        return lambda: [run() for run in runs]

    for direction in DIRECTIONS:
        op = "parallel_dilated_conv2d"
        arguments = x, weights, [], dilations
        if direction != "forward":
            op, arguments = op + "_backward", (grad_output, x, weights, dilations, mask(direction))
        baselines: dict[str, Run] = {}
        for layout, args in {"NCHW": nchw, "channels_last": channels_last}.items():
            run = one_by_one(direction, *args)
            baselines |= cudnn_variants(f"PyTorch {layout}", run, report.device)
        report.case(
            f"{shape.name}, {len(weights)} branches, {direction}",
            batch=batch,
            dtype=dtype,
            reference=one_by_one(direction, *tree_map(Tensor.float, nchw)),
            ours={
                name: one_launch(direction, backend)
                for name, backend in ours_by_name(dtype, op, *arguments).items()
            },
            baselines=baselines,
            tolerance=TOLERANCE[dtype],
            flops=sum(
                cases.conv_flops(
                    batch, shape.in_channels, shape.channels, shape.feature, dilation, kernel
                )
                for kernel, dilation in layers(shape)
            ),
        )


def mask(direction: str) -> list[bool]:
    """Output mask of a convolution's backward: gradients of input, weight and bias."""
    return [direction == "dgrad", direction == "wgrad", False]


def ours_by_name(dtype: str, op: str, x: Tensor, *arguments: object) -> dict[str, str]:
    """Backends by variant name: automatic dispatch ("") and each kernel that supports the call."""
    names = {"deeplab_fast": ""}
    for backend in dispatch_table.KERNELS if x.device.type == "cuda" else ("cuda",):
        with harness.tf32(dtype == "tf32"):
            reason = registry.unsupported_reason(op, backend, registry.arguments(op, x, *arguments))
        if reason is None:
            names[f"deeplab_fast on {backend}"] = backend
        else:
            print(f"{op}, {dtype}: deeplab_fast on {backend} is skipped: {reason}")
    return names


def pytorch(direction: str, dilation: int, x: Tensor, weight: Tensor, grad: Tensor) -> Run:
    """PyTorch's convolution or one of its gradients: oneDNN on a CPU, cuDNN on a GPU."""
    padding = dilation * (weight.size(2) // 2)
    geometry = ([1, 1], [padding, padding], [dilation, dilation], False, [0, 0], 1)
    if direction == "forward":
        return lambda: torch.ops.aten.convolution(x, weight, None, *geometry)
    requested = mask(direction)
    return lambda: _requested(
        torch.ops.aten.convolution_backward(grad, x, weight, None, *geometry, requested), requested
    )


def deeplab_fast(
    direction: str, dilation: int, x: Tensor, weight: Tensor, grad: Tensor, backend: str
) -> Run:
    """Our op on ``backend``, "" for automatic dispatch.

    Its backward is called directly, because autograd would compute both gradients.
    """
    dilations = [dilation, dilation]
    if direction == "forward":
        return lambda: dilated_conv2d_op(x, weight, None, dilations, 1, backend=backend)
    requested = mask(direction)
    return lambda: _requested(
        dilated_conv2d_backward_op(grad, x, weight, dilations, 1, requested, backend=backend),
        requested,
    )


def _requested(grads: tuple[Any, ...], mask: list[bool]) -> Any:
    return grads[mask.index(True)]
