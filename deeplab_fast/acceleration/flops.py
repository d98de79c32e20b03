"""Number of operations of convolutions, with and without those on zero padding."""

from __future__ import annotations


def taps(
    size: int, dilation: int = 1, kernel: int = 3, stride: int = 1, padding: int | None = None
) -> int:
    """Number of taps inside the image, over all outputs of a 1-D convolution.

    A 2-D convolution has ``taps(height) * taps(width)`` of them. A library that also multiplies
    padding computes ``kernel`` taps per output and dimension. The padding is "same" by default.
    """
    if padding is None:
        padding = kernel // 2 * dilation
    last = size + 2 * padding - (kernel - 1) * dilation  # where the first tap cannot begin
    offsets = [k * dilation - padding for k in range(kernel)]
    return sum(0 <= pixel + o < size for pixel in range(0, last, stride) for o in offsets)


def conv_flops(
    batch: int,
    in_channels: int,
    channels: int,
    size: tuple[int, int],
    dilation: int = 1,
    kernel: int = 3,
    stride: int = 1,
) -> int:
    """Floating-point operations of a dilated "same" convolution; a multiply-add counts as two.

    Products with zero padding are not counted. For a grouped convolution ``in_channels`` is that of
    one group. The gradients of the input and of the weight take as many operations each.
    """
    height, width = (taps(length, dilation, kernel, stride) for length in size)
    return 2 * batch * in_channels * channels * height * width
