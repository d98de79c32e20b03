"""Memory formats of the outputs of ops and of the operands of kernels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor


def empty_like_format(input: Tensor, shape: tuple[Any, ...]) -> Tensor:
    """Uninitialised tensor of ``shape`` with ``input``'s dtype, device and, if 4-D, memory format.

    Fakes and kernels allocate outputs with this function, so that their strides agree.
    """
    memory_format = _format(input)
    return torch.empty(shape, dtype=input.dtype, device=input.device, memory_format=memory_format)


def in_format_of(result: Tensor, input: Tensor) -> Tensor:
    """``result`` with the strides that :func:`empty_like_format` promises for ``input``."""
    if result.stride() == _strides(result.shape, _format(input)):
        return result
    # Not copy_ into an empty tensor: in an exported graph an op must not write to its operands.
    return result.to(input.dtype, copy=True, memory_format=_format(input))


def _format(tensor: Tensor) -> torch.memory_format:
    is_channels_last = tensor.dim() == 4 and tensor.stride(1) == 1 and tensor.size(1) > 1
    return torch.channels_last if is_channels_last else torch.contiguous_format


def _strides(shape: Sequence[int], memory_format: torch.memory_format) -> tuple[int, ...]:
    """Strides of ``torch.empty(shape, memory_format=memory_format)``, without allocating it."""
    if memory_format == torch.channels_last:
        _, channels, height, width = shape
        return (height * width * channels, 1, width * channels, channels)
    strides = [1]
    for size in reversed(shape[1:]):
        strides.append(strides[-1] * max(size, 1))
    return tuple(reversed(strides)) if shape else ()


def channels_last(tensor: Tensor) -> Tensor:
    return tensor.contiguous(memory_format=torch.channels_last)


def empty_nhwc(input: Tensor, channels: int) -> Tensor:
    """Uninitialised channels_last output [N, channels, H, W] for an ``input`` [N, C, H, W]."""
    return empty_output(input, channels)()


def empty_output(input: Tensor, channels: int) -> Callable[[], Tensor]:
    """Function that returns a new :func:`empty_nhwc` at each call."""
    N, _, H, W = input.shape
    shape = N, channels, H, W
    nhwc = _strides(shape, torch.channels_last)
    return partial(torch.empty_strided, shape, nhwc, dtype=input.dtype, device=input.device)


def aligned(tensor: Tensor, memory_format: torch.memory_format) -> Tensor:
    """``tensor`` in this format, at an address that 16-byte vectors can be read from."""
    tensor = tensor.contiguous(memory_format=memory_format)
    return tensor if tensor.data_ptr() % 16 == 0 else tensor.clone()


def aligned_nhwc(tensor: Tensor) -> Tensor:
    return aligned(tensor, torch.channels_last)


def aligned_rows(weight: Tensor) -> Tensor:
    """:func:`aligned_nhwc` of ``weight``, or ``weight`` itself if its rows are aligned already.

    The rows of a 1x1 weight [K, C, 1, 1] may be slices of longer rows. The distance of the rows of
    the result depends on the strides of ``weight`` alone, so that it is part of a launch plan.
    """
    if not _is_slice_of_rows(weight):
        return aligned_nhwc(weight)
    if weight.data_ptr() % 16 == 0:
        return weight
    return torch.empty_strided(
        weight.shape, weight.stride(), dtype=weight.dtype, device=weight.device
    ).copy_(weight)


def _is_slice_of_rows(weight: Tensor) -> bool:
    """True if ``weight`` has rows that do not overlap, at distances that keep them aligned."""
    distance = weight.stride(0)
    return (
        weight.shape[2:] == (1, 1)
        and weight.stride(1) == 1
        and distance >= weight.size(1)
        and distance * weight.element_size() % 16 == 0
    )


# Memory formats that kernels read without a copy. Whether the memory is aligned, which changes from
# call to call, is checked separately.


def is_nhwc(tensor: Tensor) -> bool:
    """True if ``tensor`` is channels_last, and so are outputs that have its format."""
    nhwc = torch.channels_last
    return _format(tensor) == nhwc and tensor.is_contiguous(memory_format=nhwc)


def has_rows(weight: Tensor) -> bool:
    """True if :func:`aligned_rows` copies ``weight`` only where its memory is not aligned."""
    return _is_slice_of_rows(weight) or weight.is_contiguous(memory_format=torch.channels_last)


def is_unaligned(*addresses: int) -> bool:
    """True if 16-byte vectors cannot be read from one of these addresses."""
    for address in addresses:  # any() takes twice as long
        if address % 16:
            return True
    return False
