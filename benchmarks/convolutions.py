"""The convolutions of an ASPP alone, by kernel, rate and direction, for bench_aspp."""

from __future__ import annotations

import cases
import harness
import torch
from cases import Shape
from harness import Run
from torch import Tensor

from deeplab_fast import backends
from deeplab_fast.ops.dilated_conv2d import (
    _dilated_conv2d,
    _dilated_conv2d_backward,
    _parallel_dilated_conv2d,
)

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
        arguments = x, weight.to(x), None, [rate, rate], 1
        ours = ours_by_name(dtype, "dilated_conv2d", *arguments)
        for direction in ("forward", "dgrad", "wgrad"):
            report.case(
                f"{shape.name}, {kernel}x{kernel} rate {rate}, {direction}",
                batch=batch,
                dtype=dtype,
                reference=pytorch(direction, rate, *(t.float() for t in tensors)),
                ours={
                    name: deeplab_fast(direction, rate, *layouts["channels_last"], backend)
                    for name, backend in ours.items()
                    if not backend or direction == "forward"
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

    The outputs of the calls are not joined, which would take them longer.
    """
    x = cases.features(shape, batch, harness.DTYPES[dtype], report.device)
    layers = [(1, 1), *((3, rate) for rate in shape.rates)]
    weights = [
        (torch.randn(shape.channels, shape.in_channels, k, k) / k / shape.in_channels**0.5).to(x)
        for k, _ in layers
    ]
    rates = [rate for _, rate in layers]
    last = [t.contiguous(memory_format=torch.channels_last) for t in (x, *weights)]
    ours = ours_by_name(dtype, "parallel_dilated_conv2d", x, weights, [], rates)

    def one_launch(backend: str) -> Run:
        return lambda: _parallel_dilated_conv2d(
            last[0], last[1:], [], rates, backend=backend
        ).split(shape.channels, dim=1)

    def one_by_one(x: Tensor, weights: list[Tensor]) -> Run:
        runs = [pytorch("forward", rate, x, w, x) for w, rate in zip(weights, rates, strict=True)]
        return lambda: [run() for run in runs]

    report.case(
        f"{shape.name}, {len(layers)} branches, forward",
        batch=batch,
        dtype=dtype,
        reference=one_by_one(x.float(), [weight.float() for weight in weights]),
        ours={name: one_launch(backend) for name, backend in ours.items()},
        baselines={
            f"PyTorch {layout}{setting}": with_cudnn(one_by_one(*args), flags)
            for layout, args in {"NCHW": (x, weights), "channels_last": (last[0], last[1:])}.items()
            for setting, flags in (CUDNN if report.device.type == "cuda" else {"": {}}).items()
        },
        tolerance=TOLERANCE[dtype],
        flops=sum(
            cases.conv_flops(batch, shape.in_channels, shape.channels, shape.feature, rate, kernel)
            for kernel, rate in layers
        ),
    )


def ours_by_name(dtype: str, op: str, x: Tensor, *arguments: object) -> dict[str, str]:
    """The backends to measure: the automatic choice, and the CUDA kernel that may not be it."""
    with harness.tf32(dtype == "tf32"):
        reason = backends.why_not(op, "cuda", x.device.type, x, *arguments)
    if reason is None:
        return {"deeplab_fast": "", "deeplab_fast on cuda": "cuda"}
    print(f"{op}, {dtype}: deeplab_fast on cuda is skipped: {reason}")
    return {"deeplab_fast": ""}


def pytorch(direction: str, rate: int, x: Tensor, weight: Tensor, grad: Tensor) -> Run:
    """oneDNN on a CPU, cuDNN on a GPU."""
    padding = rate * (weight.size(2) // 2)
    geometry = ([1, 1], [padding, padding], [rate, rate], False, [0, 0], 1)
    if direction == "forward":
        return lambda: torch.ops.aten.convolution(x, weight, None, *geometry)
    mask = [direction == "dgrad", direction == "wgrad", False]
    return lambda: _first(
        torch.ops.aten.convolution_backward(grad, x, weight, None, *geometry, mask), mask
    )


def deeplab_fast(
    direction: str, rate: int, x: Tensor, weight: Tensor, grad: Tensor, backend: str
) -> Run:
    """The op, "" for its automatic backend, without the autograd that would need both gradients."""
    if direction == "forward":
        return lambda: _dilated_conv2d(x, weight, None, [rate, rate], 1, backend=backend)
    mask = [direction == "dgrad", direction == "wgrad", False]
    return lambda: _first(_dilated_conv2d_backward(grad, x, weight, [rate, rate], 1, mask), mask)


def _first(grads: tuple[Tensor, ...], mask: list[bool]) -> Tensor:
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
