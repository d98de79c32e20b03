"""Direct calls of the CUDA kernels of dense convolution, below the op."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from deeplab_fast._native.common import LaunchContext
from deeplab_fast._native.memory_format import empty_nhwc, in_format_of
from deeplab_fast.backends.cuda.dilated_conv2d import launch, parallel_branches


def convolve(
    context: LaunchContext,
    output: Tensor,
    input: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    dilations: Sequence[Sequence[int]],
    activation: str = "none",
    residual: Tensor | None = None,
    image_bias: Tensor | None = None,
    pixel_sums: Tensor | None = None,
) -> None:
    """Parallel branches, written to ``output``."""
    convolution = parallel_branches(
        context, input, weights, biases, dilations, image_bias, pixel_sums
    )
    launch(context, output, convolution, activation, residual)


def convolved(
    context: LaunchContext,
    input: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    dilations: Sequence[Sequence[int]],
) -> Tensor:
    """Parallel branches, in a new tensor of the memory format of ``input``."""
    output = empty_nhwc(input, sum(weight.size(0) for weight in weights))
    convolve(context, output, input, weights, biases, dilations)
    return in_format_of(output, input)
