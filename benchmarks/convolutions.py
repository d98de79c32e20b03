"""The convolutions of an ASPP alone, by kernel, rate and direction, for bench_aspp."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import cases
import harness
import torch
from cases import Shape
from harness import Run
from torch import Tensor
from torch.utils._pytree import tree_map

from deeplab_fast.backends import dispatch_table, registry
from deeplab_fast.ops.dilated_conv2d import (
    _dilated_conv2d,
    _dilated_conv2d_backward,
    _parallel_dilated_conv2d,
    _parallel_dilated_conv2d_backward,
)

DIRECTIONS = ("forward", "dgrad", "wgrad")

# Of harness.relative_error against fp32; a wrong kernel is off by about 1.
TOLERANCE = {"fp32": 1e-5, "tf32": 5e-3, "fp16": 5e-3, "bf16": 2e-2}

# cuDNN takes an algorithm from its heuristics, the fastest of a search, or a deterministic one.
CUDNN = {"": {}, ", benchmark": {"benchmark": True}, ", deterministic": {"deterministic": True}}


def convolutions(report: harness.Report, shape: Shape, dtype: str, batch: int) -> None:
    """One case for each convolution of the pyramid, forward and both gradients."""
    x = cases.features(shape, batch, harness.DTYPES[dtype], report.device)
    settings = CUDNN if report.device.type == "cuda" else {"": {}}
    for kernel, rate in [(1, 1), *((3, rate) for rate in shape.rates)]:
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
            arguments = x, weight.to(x), None, [rate, rate], 1
            if direction != "forward":
                op += "_backward"
                arguments = grad.to(x), x, weight.to(x), [rate, rate], 1, mask(direction)
            report.case(
                f"{shape.name}, {kernel}x{kernel} rate {rate}, {direction}",
                batch=batch,
                dtype=dtype,
                reference=pytorch(direction, rate, *(t.float() for t in tensors)),
                ours={
                    name: deeplab_fast(direction, rate, *layouts["channels_last"], backend)
                    for name, backend in ours_by_name(dtype, op, *arguments).items()
                },
                baselines={
                    f"PyTorch {layout}{setting}": with_cudnn(pytorch(direction, rate, *args), flags)
                    for layout, args in layouts.items()
                    for setting, flags in settings.items()
                },
                tolerance=TOLERANCE[dtype],
                flops=cases.conv_flops(
                    batch, shape.in_channels, shape.channels, shape.feature, rate, kernel
                ),
            )


def branches(report: harness.Report, shape: Shape, dtype: str, batch: int) -> None:
    """All convolutions of the pyramid: in one launch, against one call after the other.

    The outputs of the calls are not joined, which would take them longer; the gradients of the
    input are added.
    """
    x = cases.features(shape, batch, harness.DTYPES[dtype], report.device)
    layers = [(1, 1), *((3, rate) for rate in shape.rates)]
    weights = [
        (torch.randn(shape.channels, shape.in_channels, k, k) / k / shape.in_channels**0.5).to(x)
        for k, _ in layers
    ]
    grads = [torch.randn(batch, shape.channels, *shape.feature).to(x) for _ in layers]
    rates = [rate for _, rate in layers]
    nchw = x, weights, grads
    last = tree_map(lambda t: t.contiguous(memory_format=torch.channels_last), nchw)
    joined = torch.cat(last[2], dim=1)

    def one_launch(direction: str, backend: str) -> Run:
        x, weights, _ = last
        if direction == "forward":
            return lambda: _parallel_dilated_conv2d(x, weights, [], rates, backend=backend).split(
                shape.channels, dim=1
            )
        return lambda: _first(
            _parallel_dilated_conv2d_backward(
                joined, x, weights, rates, mask(direction), backend=backend
            ),
            mask(direction),
        )

    def one_by_one(
        direction: str, x: Tensor, weights: list[Tensor], grads: list[Tensor]
    ) -> Callable[[], Any]:
        runs = [pytorch(direction, rate, x, w, g) for w, g, rate in zip(weights, grads, rates)]
        if direction == "dgrad":
            return lambda: functools.reduce(torch.add, (run() for run in runs))
        return lambda: [run() for run in runs]

    for direction in DIRECTIONS:
        op = "parallel_dilated_conv2d"
        arguments = x, weights, [], rates
        if direction != "forward":
            op, arguments = op + "_backward", (joined, x, weights, rates, mask(direction))
        report.case(
            f"{shape.name}, {len(layers)} branches, {direction}",
            batch=batch,
            dtype=dtype,
            reference=one_by_one(direction, *tree_map(Tensor.float, nchw)),
            ours={
                name: one_launch(direction, backend)
                for name, backend in ours_by_name(dtype, op, *arguments).items()
            },
            baselines={
                f"PyTorch {layout}{setting}": with_cudnn(one_by_one(direction, *args), flags)
                for layout, args in {"NCHW": nchw, "channels_last": last}.items()
                for setting, flags in (CUDNN if report.device.type == "cuda" else {"": {}}).items()
            },
            tolerance=TOLERANCE[dtype],
            flops=sum(
                cases.conv_flops(
                    batch, shape.in_channels, shape.channels, shape.feature, rate, kernel
                )
                for kernel, rate in layers
            ),
        )


def mask(direction: str) -> list[bool]:
    """Which of the gradients of input, weight and bias are asked for."""
    return [direction == "dgrad", direction == "wgrad", False]


def ours_by_name(dtype: str, op: str, x: Tensor, *arguments: object) -> dict[str, str]:
    """The backends to measure: the automatic choice, and kernels that may not be it."""
    names = {"deeplab_fast": ""}
    for backend in dispatch_table.KERNELS if x.device.type == "cuda" else ("cuda",):
        with harness.tf32(dtype == "tf32"):
            reason = registry.unsupported_reason(op, backend, registry.arguments(op, x, *arguments))
        if reason is None:
            names[f"deeplab_fast on {backend}"] = backend
        else:
            print(f"{op}, {dtype}: deeplab_fast on {backend} is skipped: {reason}")
    return names


def pytorch(direction: str, rate: int, x: Tensor, weight: Tensor, grad: Tensor) -> Run:
    """oneDNN on a CPU, cuDNN on a GPU."""
    padding = rate * (weight.size(2) // 2)
    geometry = ([1, 1], [padding, padding], [rate, rate], False, [0, 0], 1)
    if direction == "forward":
        return lambda: torch.ops.aten.convolution(x, weight, None, *geometry)
    asked = mask(direction)
    return lambda: _first(
        torch.ops.aten.convolution_backward(grad, x, weight, None, *geometry, asked), asked
    )


def deeplab_fast(
    direction: str, rate: int, x: Tensor, weight: Tensor, grad: Tensor, backend: str
) -> Run:
    """The op, "" for its automatic backend, without the autograd that would need both gradients."""
    if direction == "forward":
        return lambda: _dilated_conv2d(x, weight, None, [rate, rate], 1, backend=backend)
    asked = mask(direction)
    return lambda: _first(
        _dilated_conv2d_backward(grad, x, weight, [rate, rate], 1, asked, backend=backend), asked
    )


def _first(grads: tuple[Any, ...], mask: list[bool]) -> Any:
    return grads[mask.index(True)]


def with_cudnn(run: Run, flags: dict[str, bool]) -> Run:
    """``run`` under torch.backends.cudnn's ``flags``."""

    def flagged() -> Tensor:
        before = {flag: getattr(torch.backends.cudnn, flag) for flag in flags}
        _set(flags)
        try:
            return run()
        finally:
            _set(before)

    return flagged


def _set(flags: dict[str, bool]) -> None:
    for flag, value in flags.items():
        setattr(torch.backends.cudnn, flag, value)
