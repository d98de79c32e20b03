"""Gradients of parallel dense branches of dilated convolution."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor

from ... import _C
from ..._native.common import DTYPES, Kernels, aligned_nhwc, nhwc_output
from ..._native.work_lists import (
    Branches,
    conv_branches,
    conv_kernel,
    conv_work_list,
    steps_per_tap,
    wgrad_kernel,
    wgrad_work_list,
)
from ...ops._register import in_format_of
from ..reference import share_of_pixel
from .dilated_conv2d import MAX_TAPS, launch
from .dilated_conv2d import refuses as convolution_refuses


def refuses(input: Tensor, weights: Sequence[Tensor], groups: int) -> str | None:
    """Why the kernels cannot compute the gradients of these branches, or None."""
    if refusal := convolution_refuses(input, weights, groups):
        return refusal
    if sum(weight.size(2) * weight.size(3) for weight in weights) > MAX_TAPS:
        return f"the kernel takes at most {MAX_TAPS} taps, those of all branches together"
    return None


def backward(
    kernels: Kernels,
    grad_output: Tensor,
    input: Tensor,
    weights: Sequence[Tensor],
    dilations: Sequence[Sequence[int]],
    output_mask: Sequence[bool],
    grad_mean: Tensor | None = None,
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Gradients of input, weights and biases of parallel branches; empty where not asked for.

    ``grad_mean`` [N, C], that of the input's mean over space, is part of the input's.
    """
    channels = [weight.size(0) for weight in weights]
    added = [-k % (16 // input.element_size()) for k in channels]  # copies are of 16 bytes
    if any(added):
        grad_parts = zip(grad_output.split(channels, dim=1), added)
        grad_output = torch.cat([F.pad(g, (0, 0, 0, 0, 0, more)) for g, more in grad_parts], dim=1)
        padded = [F.pad(w, (0, 0, 0, 0, 0, 0, 0, more)) for w, more in zip(weights, added)]
        grad_input, grad_weights, grad_biases = backward(
            kernels, grad_output, input, padded, dilations, output_mask, grad_mean
        )
        return (
            grad_input,
            [in_format_of(grad[: w.size(0)], w) for grad, w in zip(grad_weights, weights)],
            [grad[:k] for grad, k in zip(grad_biases, channels)],
        )

    branches = conv_branches(input, weights, dilations)
    grad_output = aligned_nhwc(grad_output)
    needs_input, needs_weights, needs_biases = output_mask
    return (
        input_gradient(kernels, grad_output, input, weights, branches, grad_mean)
        if needs_input
        else input.new_empty(0),
        weight_gradients(kernels, grad_output, input, weights, branches) if needs_weights else [],
        bias_gradients(kernels, grad_output, weights) if needs_biases else [],
    )


def input_gradient(
    kernels: Kernels,
    grad_output: Tensor,
    input: Tensor,
    weights: Sequence[Tensor],
    branches: Branches,
    grad_mean: Tensor | None,
) -> Tensor:
    """A convolution of ``grad_output`` with the mirrored taps of all branches, written once.

    What a pixel adds to the mean is the same for all of an image: a bias of that convolution.
    """
    N, C, H, W = input.shape
    channels = [weight.size(0) for weight in weights]
    sizes = [weight.numel() // C for weight in weights]
    # Row c: [R, S, K] of each branch in turn.
    transposed = input.new_empty(C, sum(sizes))
    for part, weight in zip(transposed.split(sizes, dim=1), weights):
        K, _, R, S = weight.shape
        part.unflatten(1, (R, S, K)).copy_(weight.permute(1, 2, 3, 0))
    sources = zip(accumulate(channels, initial=0), channels, accumulate(sizes, initial=0))
    image_bias = None
    if grad_mean is not None:
        image_bias = share_of_pixel(grad_mean, input).float().contiguous()
    bias_address = 0 if image_bias is None else image_bias.data_ptr()
    grad_input = nhwc_output(input, C)
    kernel = conv_kernel(kernels, input)
    launch(
        kernels,
        grad_input,
        grad_output,
        [_C.ConvOutput(transposed.data_ptr(), 0, bias_address, C, 0, transposed.size(1))],
        [_C.ConvSource(*source) for source in sources],
        conv_work_list(
            _C.schedule.input_grad_tiles,
            (N, H, W),
            branches,
            steps_per_tap(max(channels), input.dtype, kernel),
            (C,),
            input.device,
            kernels.num_workers,
            kernel,
        ),
        _C.ConvEpilogue(0, -math.inf, math.inf),
    )
    return in_format_of(grad_input, input)


def weight_gradients(
    kernels: Kernels,
    grad_output: Tensor,
    input: Tensor,
    weights: Sequence[Tensor],
    branches: Branches,
) -> list[Tensor]:
    """Those of all branches in one launch, and one that adds the sums it split."""
    N, C, H, W = input.shape
    channels = tuple(weight.size(0) for weight in weights)
    kernel = wgrad_kernel(kernels, input.dtype)
    work_list = wgrad_work_list(
        (N, H, W), branches, C, channels, input.dtype, input.device, kernels.num_workers, kernel
    )
    nhwc = aligned_nhwc(input)
    grads = [torch.empty_like(w, memory_format=torch.channels_last) for w in weights]
    partial_sums = input.new_empty(work_list.num_slots * kernel.tile**2, dtype=torch.float32)
    getattr(kernels.module, kernel.launcher)(
        partial_sums.data_ptr(),
        grad_output.data_ptr(),
        nhwc.data_ptr(),
        [(grad.data_ptr(), grad.size(0), grad.size(2) * grad.size(3)) for grad in grads],
        work_list.work,
        _C.ConvWgradShape(N, H, W, C, sum(channels)),
        DTYPES[input.dtype],
        kernels.stream,
    )
    return [in_format_of(grad, weight) for grad, weight in zip(grads, weights)]


_PIXELS_PER_PART = 256  # of a bias gradient, at least: eight rounds of the rows of a block


def bias_gradients(
    kernels: Kernels, grad_output: Tensor, weights: Sequence[Tensor]
) -> list[Tensor]:
    """Sums of ``grad_output`` over images and pixels."""
    N, K, H, W = grad_output.shape
    num_pixels = N * H * W
    num_parts = max(1, min(kernels.num_workers, num_pixels // _PIXELS_PER_PART))
    sums = grad_output.new_empty(K)
    partial_sums = grad_output.new_empty(num_parts * K, dtype=torch.float32)
    kernels.module.dilated_conv2d_bias_grad(
        sums.data_ptr(),
        partial_sums.data_ptr(),
        grad_output.data_ptr(),
        num_pixels,
        K,
        num_parts,
        DTYPES[grad_output.dtype],
        kernels.stream,
    )
    if len(weights) == 1:
        return [sums]
    # Results of an op must not share memory.
    return [part.clone() for part in sums.split([weight.size(0) for weight in weights])]
