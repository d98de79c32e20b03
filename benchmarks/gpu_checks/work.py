"""The least work of each op: operations and bytes."""

from __future__ import annotations

from typing import NamedTuple

from common import cases, convolutions

from .inputs import Size


class Work(NamedTuple):
    """The least work of a call.

    ``flops`` leaves out products with padding and ``dense_flops`` has them; ``bytes`` counts each
    operand once.
    """

    flops: float
    dense_flops: float
    bytes: float


def convolution_work(size: Size, itemsize: int) -> Work:
    """Work of the four convolutions of an ASPP; each of their gradients needs as much."""
    shape, n = size.shape, size.batch
    layers = convolutions.layers(shape)
    arguments = n, shape.in_channels, shape.channels, shape.feature
    flops = sum(cases.conv_flops(*arguments, dilation, kernel) for kernel, dilation in layers)
    pixels = n * shape.feature[0] * shape.feature[1]
    weights = sum(kernel**2 for kernel, _ in layers) * shape.in_channels * shape.channels
    elements = pixels * (shape.in_channels + 4 * shape.channels) + weights
    return Work(flops, 2 * pixels * weights, elements * itemsize)


def projection_work(size: Size, itemsize: int) -> Work:
    c = size.shape.channels
    pixels = size.batch * size.shape.feature[0] * size.shape.feature[1]
    flops = 2 * pixels * 4 * c * c
    return Work(flops, flops, (pixels * 5 * c + 4 * c * c) * itemsize)


def aspp_work(size: Size, itemsize: int) -> Work:
    """Work of an ASPP; its bytes leave out the branches, which need not leave the chip."""
    shape, convolution = size.shape, convolution_work(size, itemsize)
    pixels = size.batch * shape.feature[0] * shape.feature[1]
    dense = convolution.dense_flops + 2 * pixels * 4 * shape.channels**2
    bytes = convolution.bytes - pixels * 3 * shape.channels * itemsize
    return Work(cases.aspp_flops(shape, size.batch), dense, bytes)


def depthwise_work(size: Size, itemsize: int) -> Work:
    pixels = size.batch * size.shape.feature[0] * size.shape.feature[1]
    return Work(0, 0, 2 * pixels * size.depthwise[0] * itemsize)


def upsampling_work(logits_passes: int, bytes_per_pixel: int, size: Size, itemsize: int) -> Work:
    height, width = size.shape.image
    logits = size.batch * size.shape.classes * size.shape.feature[0] * size.shape.feature[1]
    pixels = size.batch * height * width
    return Work(0, 0, logits_passes * logits * itemsize + pixels * bytes_per_pixel)
