"""Mean over all pixels, the image pooling of ASPP, and its gradient."""

from __future__ import annotations

import torch
from torch import Tensor


def mean_of_pixels(input: Tensor) -> Tensor:
    """Mean [N, C] of ``input`` [N, C, H, W] over its pixels, in fp32 or float64."""
    dtype = torch.promote_types(input.dtype, torch.float32)
    return input.mean((2, 3), dtype=dtype).contiguous()


def grad_of_each_pixel(grad_mean: Tensor, input: Tensor) -> Tensor:
    """Gradient [N, C] of each pixel, from the gradient ``grad_mean`` of the mean [N, C].

    It is in fp32 or float64.
    """
    N, C, H, W = input.shape
    dtype = torch.promote_types(grad_mean.dtype, torch.float32)
    return (grad_mean.to(dtype) / (H * W)).expand(N, C)
