"""What the Python sides of the compiled backends share: dtypes, shapes, calls of launchers."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import _C
from .ops._bilinear import source_scale
from .ops._library import empty_like_format, in_format_of

DTYPES = {
    torch.float32: _C.DType.float32,
    torch.float16: _C.DType.float16,
    torch.bfloat16: _C.DType.bfloat16,
    torch.int64: _C.DType.int64,
    torch.int32: _C.DType.int32,
    torch.uint8: _C.DType.uint8,
}


def upsample_shape(
    logits: Tensor,
    size: Sequence[int],
    scale_factors: Sequence[float] | None,
    align_corners: bool,
) -> _C.UpsampleShape:
    scales = [
        source_scale(in_size, out_size, factor, align_corners)
        for in_size, out_size, factor in zip(logits.shape[2:], size, scale_factors or (None, None))
    ]
    return _C.UpsampleShape(logits.shape, logits.stride(), size, scales, align_corners)


def upsample_argmax(
    launcher: Callable[..., None],
    stream: int,
    logits: Tensor,
    size: Sequence[int],
    scale_factors: Sequence[float] | None,
    align_corners: bool,
    dtype: torch.dtype,
) -> Tensor:
    """The op through ``upsample_argmax_fwd`` of a module compiled from the CUDA kernels."""
    if logits.dtype not in DTYPES:
        logits = logits.float()
    labels = logits.new_empty((logits.size(0), *size), dtype=dtype)
    launcher(
        labels.data_ptr(),
        logits.data_ptr(),
        upsample_shape(logits, size, scale_factors, align_corners),
        DTYPES[dtype],
        DTYPES[logits.dtype],
        stream,
    )
    return labels


def _cross_entropy_terms(
    weight: Tensor | None, ignore_index: int, label_smoothing: float
) -> _C.CrossEntropyTerms:
    return _C.CrossEntropyTerms(
        0 if weight is None else weight.data_ptr(), ignore_index, label_smoothing
    )


def upsample_cross_entropy(
    module: Any,
    stream: int,
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    reduction: str,
    label_smoothing: float,
    align_corners: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The op through ``module.upsample_cross_entropy_fwd``, compiled from the CUDA kernels."""
    if logits.dtype not in DTYPES:
        logits = logits.float()
    target = target.contiguous()
    weight = None if weight is None else weight.float().contiguous()
    shape = upsample_shape(logits, target.shape[1:], None, align_corners)
    per_pixel = reduction == "none"
    loss = logits.new_empty(target.shape if per_pixel else (), dtype=torch.float32)
    log_sum_exp = logits.new_empty(target.shape, dtype=torch.float32)
    total_weight = logits.new_empty((), dtype=torch.float32)
    workspace = _cross_entropy_workspace(module, logits, shape, backward=False)
    module.upsample_cross_entropy_fwd(
        0 if per_pixel else loss.data_ptr(),
        loss.data_ptr() if per_pixel else 0,
        log_sum_exp.data_ptr(),
        total_weight.data_ptr(),
        workspace.data_ptr(),
        logits.data_ptr(),
        target.data_ptr(),
        reduction == "mean",
        shape,
        _cross_entropy_terms(weight, ignore_index, label_smoothing),
        DTYPES[logits.dtype],
        stream,
    )
    return loss, log_sum_exp, total_weight


def upsample_cross_entropy_backward(
    module: Any,
    stream: int,
    grad_loss: Tensor,
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    log_sum_exp: Tensor,
    total_weight: Tensor,
    ignore_index: int,
    reduction: str,
    label_smoothing: float,
    align_corners: bool,
) -> Tensor:
    """The op through ``module.upsample_cross_entropy_bwd``, compiled from the CUDA kernels."""
    typed = logits if logits.dtype in DTYPES else logits.float()
    grad_logits = empty_like_format(typed, tuple(typed.shape))
    grad_loss = grad_loss.expand(target.shape)
    target, log_sum_exp = target.contiguous(), log_sum_exp.contiguous()
    weight = None if weight is None else weight.float().contiguous()
    shape = upsample_shape(typed, target.shape[1:], None, align_corners)
    workspace = _cross_entropy_workspace(module, typed, shape, backward=True)
    module.upsample_cross_entropy_bwd(
        grad_logits.data_ptr(),
        workspace.data_ptr(),
        grad_loss.data_ptr(),
        grad_loss.stride(),
        total_weight.data_ptr() if reduction == "mean" else 0,
        log_sum_exp.data_ptr(),
        typed.data_ptr(),
        target.data_ptr(),
        not grad_logits.is_contiguous(),
        shape,
        _cross_entropy_terms(weight, ignore_index, label_smoothing),
        DTYPES[typed.dtype],
        stream,
    )
    return in_format_of(grad_logits.to(logits.dtype), logits)


def _cross_entropy_workspace(
    module: Any, logits: Tensor, shape: _C.UpsampleShape, backward: bool
) -> Tensor:
    nbytes = module.upsample_cross_entropy_workspace(shape, backward)
    return logits.new_empty(nbytes, dtype=torch.uint8)


class ConvWorkList(NamedTuple):
    """What the kernel of dilated convolution is to do; ``tensors`` hold what ``work`` points to."""

    work: _C.ConvWork
    tensors: tuple[Tensor, ...]
    num_slots: int


_SPLIT_STEPS = 8  # a partial sum, 64 KiB in and out, moves as many bytes as eight steps


# Never dropped: a captured CUDA graph holds the addresses.
@functools.cache
def conv_work_list(
    plane: tuple[int, int, int],
    branches: tuple[tuple[int, int, int, int], ...],
    channels: int,
    out_channels: tuple[int, ...],
    device: torch.device,
    num_workers: int,
) -> ConvWorkList:
    """The work list (csrc/common/zones.h) of a forward pass, on ``device``.

    ``plane`` is (N, H, W), ``branches`` are (kernel_H, kernel_W, dilation_H, dilation_W), and
    ``num_workers`` is how many thread blocks run at once.
    """
    rows = _C.zones.forward_tiles(plane, branches, _C.CONV_TILE)
    pixels, taps, tiles = (_int32(buffer) for buffer in rows)
    jobs = [
        (num_taps * -(-channels // _C.CONV_STEP), -(-out_channels[branch] // _C.CONV_TILE))
        for branch, _, _, _, num_taps in tiles.view(-1, 5).tolist()
    ]
    schedule = _C.zones.schedule(jobs, num_workers, _SPLIT_STEPS)
    items, reductions = (_int32(schedule[name]) for name in ("items", "reductions"))
    tensors = tuple(t.to(device) for t in (pixels, taps, tiles, items, reductions))
    addresses = [t.data_ptr() for t in tensors]
    work = _C.ConvWork(*addresses, items.numel() // 6, reductions.numel() // 4)
    return ConvWorkList(work, tensors, schedule["num_slots"])


def _int32(buffer: bytearray) -> Tensor:
    return torch.frombuffer(buffer, dtype=torch.int32) if buffer else torch.empty(0).int()


_MAX_TAPS = 1024  # the search of a work list's order slows down with their square


def dilated_conv2d_refuses(input: Tensor, weights: Sequence[Tensor], groups: int) -> str | None:
    """Why the kernel cannot compute these branches, or None."""
    if input.dtype not in (torch.float16, torch.bfloat16):
        return f"the kernel takes float16 and bfloat16, not {input.dtype}"
    if groups != 1:
        return f"the kernel has no groups, got {groups}"
    if input.size(1) % 8:
        return f"the kernel takes a multiple of 8 input channels, got {input.size(1)}"
    if input.numel() == 0 or any(weight.numel() == 0 for weight in weights):
        return "the input or a weight is empty"
    if len(weights) > _C.MAX_CONV_BRANCHES:
        return f"the kernel takes at most {_C.MAX_CONV_BRANCHES} branches, got {len(weights)}"
    if any(weight.size(2) * weight.size(3) > _MAX_TAPS for weight in weights):
        return f"the kernel takes at most {_MAX_TAPS} taps"
    if len(weights) * input.numel() // input.size(1) >= 2**31:
        return "the work list holds fewer than 2^31 pixels, those of all branches together"
    return None


def dilated_conv2d(
    launcher: Callable[..., None],
    stream: int,
    num_workers: int,
    input: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    dilations: Sequence[Sequence[int]],
) -> Tensor:
    """Parallel branches through ``dilated_conv2d_fwd`` of a module compiled from the kernels."""
    N, C, H, W = input.shape
    channels = tuple(weight.size(0) for weight in weights)
    # A rate beyond the map does what the map's size does, and that fits the work list's int32.
    branches = tuple(
        (*weight.shape[2:], min(vertical, H), min(horizontal, W))
        for weight, (vertical, horizontal) in zip(weights, dilations)
    )
    work_list = conv_work_list((N, H, W), branches, C, channels, input.device, num_workers)
    nhwc, *weights = (_aligned_nhwc(t) for t in (input, *weights))
    biases = [None if bias is None else bias.contiguous() for bias in biases]
    output = torch.empty(
        (N, sum(channels), H, W),
        dtype=input.dtype,
        device=input.device,
        memory_format=torch.channels_last,
    )
    partial_sums = input.new_empty(
        work_list.num_slots * _C.CONV_TILE * _C.CONV_TILE, dtype=torch.float32
    )
    launcher(
        output.data_ptr(),
        partial_sums.data_ptr(),
        nhwc.data_ptr(),
        [
            (
                weight.data_ptr(),
                0 if bias is None else bias.data_ptr(),
                weight.size(0),
                weight.size(2) * weight.size(3),
            )
            for weight, bias in zip(weights, biases)
        ],
        work_list.work,
        _C.ConvShape(H, W, C, sum(channels)),
        DTYPES[input.dtype],
        stream,
    )
    return in_format_of(output, input)


def _aligned_nhwc(tensor: Tensor) -> Tensor:
    """In channels_last memory that asynchronous copies of 16 bytes can read."""
    tensor = tensor.contiguous(memory_format=torch.channels_last)
    return tensor if tensor.data_ptr() % 16 == 0 else tensor.clone()
