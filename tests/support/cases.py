"""Shapes, dtypes and the tolerance rule shared by the tests of all ops."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Conv(NamedTuple):
    """One dilated convolution: input [N, C, H, W], weight [K, C / groups, R, S]."""

    N: int
    C: int
    K: int
    H: int
    W: int
    kernel: tuple[int, int] = (3, 3)
    dilation: int | tuple[int, int] = 1
    groups: int = 1

    def __str__(self) -> str:
        kernel = "x".join(map(str, self.kernel))
        dilation = str(self.dilation).replace(" ", "")
        return f"{self.N}x{self.C}x{self.H}x{self.W}-K{self.K}-k{kernel}-d{dilation}-g{self.groups}"


CONVS = (
    Conv(1, 1, 1, 1, 1),  # one pixel, one channel
    Conv(1, 1, 1, 1, 1, (1, 1)),
    Conv(0, 4, 8, 5, 5),  # empty batch
    Conv(1, 8, 16, 7, 11, (1, 1)),
    Conv(2, 3, 5, 7, 11, (3, 3), 2),  # odd channel counts, prime sizes
    Conv(1, 8, 8, 5, 5, (3, 3), 9),  # larger than the map: only the centre tap is inside
    Conv(1, 8, 8, 6, 6, (3, 3), 3),  # H = 2 * dilation
    Conv(2, 8, 8, 5, 9, (3, 3), 3),  # H < 2 * dilation
    Conv(1, 4, 6, 13, 8, (5, 5), 3),
    Conv(1, 4, 6, 15, 15, (7, 7), 2),
    Conv(1, 4, 6, 9, 12, (1, 3), (1, 4)),
    Conv(1, 6, 6, 12, 10, (3, 3), 2, 6),  # depthwise
    Conv(2, 3, 3, 7, 11, (3, 3), 2, 3),  # channels that do not fill a vector
    Conv(1, 13, 13, 9, 10, (5, 5), 2, 13),
    Conv(1, 8, 8, 1, 1, (3, 3), 1, 8),
    Conv(1, 8, 8, 5, 7, (3, 3), 9, 8),
    Conv(2, 16, 16, 11, 6, (5, 5), (2, 3), 16),
    Conv(1, 16, 16, 9, 12, (1, 3), (1, 4), 16),
    Conv(3, 40, 40, 17, 5, (3, 3), (5, 1), 40),
    Conv(1, 136, 136, 9, 5, (3, 3), 2, 136),  # vectors that do not fill their last block
    Conv(1, 6, 12, 9, 9, (3, 3), 2, 3),
    Conv(1, 16, 16, 33, 33, (3, 3), 12),
    Conv(1, 8, 8, 65, 65, (3, 3), 24),
    Conv(2, 40, 21, 9, 13, (3, 3), (3, 2)),  # channels that do not fill a tile of a kernel
    Conv(1, 72, 133, 12, 11, (3, 3), 5),  # channels that need a second tile
    Conv(1, 24, 24, 9, 33, (3, 3), 2, 24),  # wide maps: oneDNN's bf16 gradients can be wrong
    Conv(1, 40, 8, 9, 33, (3, 3), 6),
    Conv(1, 1030, 6, 7, 9, (3, 3), 3),  # more channels than oneDNN computes at once
)


def operands(case: Conv, dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor, Tensor]:
    """Input, weight and bias of a case, scaled so that outputs are of order one."""
    taps = case.C // case.groups * case.kernel[0] * case.kernel[1]
    input = torch.randn(case.N, case.C, case.H, case.W)
    weight = torch.randn(case.K, case.C // case.groups, *case.kernel) / taps**0.5
    bias = torch.randn(case.K)
    return tuple(t.to(device, dtype) for t in (input, weight, bias))  # type: ignore[return-value]


def with_layout(tensor: Tensor, layout: str) -> Tensor:
    """The same [N, C, H, W] values as another view of memory."""
    if layout == "contiguous":
        return tensor.contiguous()
    if layout == "channels_last":
        return tensor.contiguous(memory_format=torch.channels_last)
    if layout == "sliced":  # every second pixel of a wider buffer, at an offset
        n, c, h, w = tensor.shape
        buffer = tensor.new_full((n + 1, c, h, 2 * w + 1), float("nan"))
        view = buffer[1:, :, :, 1::2]
        view.copy_(tensor)
        return view
    raise ValueError(layout)


def to_tf32(tensor: Tensor) -> Tensor:
    """fp32 rounded to 10 bits of mantissa, ties away from zero."""
    assert tensor.dtype == torch.float32
    return ((tensor.view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)


def oracle_input(input: Tensor) -> Tensor:
    """``input`` for PyTorch's own convolution: contiguous if it is in half precision.

    Half-precision gradients can be wrong in channels_last (docs/onednn_bf16_weight_gradient.md).
    """
    return input.contiguous() if input.dtype in (torch.bfloat16, torch.float16) else input


def upsampled(
    input: Tensor,
    size: tuple[int, int] | None = None,
    scale_factor: tuple[float, float] | None = None,
    align_corners: bool = False,
) -> Tensor:
    """F.interpolate's bilinear kernel.

    F.interpolate itself uses another formula on a GPU under deterministic algorithms, which the
    tests switch on. That formula gives NaN next to infinities where the kernel gives infinity.
    """
    return torch.ops.aten.upsample_bilinear2d.vec(input, size, align_corners, scale_factor)


LAYOUTS = ("contiguous", "channels_last", "sliced")

# Error relative to the largest value that is always allowed: rounding to the dtype costs up to half
# an ulp in every implementation.
_FLOOR = {torch.float64: 1e-12, torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}


def assert_as_accurate_as(actual: Tensor, peer: Tensor, exact: Tensor, *peers: Tensor) -> None:
    """Check that the error of ``actual`` is at most twice that of PyTorch's own result.

    Errors are relative to ``exact``, in float64. If PyTorch sums in another order in another memory
    format, its results in both count: ``peer`` and ``peers``. A peer that is plainly wrong would
    allow any error, so the check fails (docs/onednn_bf16_weight_gradient.md).
    """
    assert actual.dtype == peer.dtype
    assert actual.shape == peer.shape == exact.shape
    assert exact.dtype == torch.float64
    if exact.numel() == 0:
        return

    def error(result: Tensor) -> float:
        return (result.double().cpu() - exact.cpu()).abs().max().item()

    largest = exact.abs().max().item()
    peer_errors = [error(p) for p in (peer, *peers)]
    assert all(e <= 0.1 * largest for e in peer_errors), f"no peer: its error is {peer_errors}"
    allowed = 2 * max(peer_errors)
    floor = _FLOOR[actual.dtype] * largest
    assert error(actual) <= allowed + floor, f"error {error(actual):.3g}, allowed {allowed:.3g}"
