"""What the Python sides of the compiled backends share: dtypes, shapes, calls of launchers."""

from __future__ import annotations

import functools
import math
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


class Kernels(NamedTuple):
    """Compiled CUDA kernels and where they are to run."""

    module: Any  # _C.cuda or _emulated.cuda
    stream: int
    num_workers: int  # blocks of dilated_conv2d that run at once, were they CONV_SM80's
    is_sm90: bool = False  # the kernels for compute capability 9.0 can run too


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
    kernels: Kernels,
    logits: Tensor,
    size: Sequence[int],
    scale_factors: Sequence[float] | None,
    align_corners: bool,
    dtype: torch.dtype,
) -> Tensor:
    if logits.dtype not in DTYPES:
        logits = logits.float()
    labels = logits.new_empty((logits.size(0), *size), dtype=dtype)
    kernels.module.upsample_argmax_fwd(
        labels.data_ptr(),
        logits.data_ptr(),
        upsample_shape(logits, size, scale_factors, align_corners),
        DTYPES[dtype],
        DTYPES[logits.dtype],
        kernels.stream,
    )
    return labels


def _cross_entropy_terms(
    weight: Tensor | None, ignore_index: int, label_smoothing: float
) -> _C.CrossEntropyTerms:
    return _C.CrossEntropyTerms(
        0 if weight is None else weight.data_ptr(), ignore_index, label_smoothing
    )


def upsample_cross_entropy(
    kernels: Kernels,
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    reduction: str,
    label_smoothing: float,
    align_corners: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    if logits.dtype not in DTYPES:
        logits = logits.float()
    target = target.contiguous()
    weight = None if weight is None else weight.float().contiguous()
    shape = upsample_shape(logits, target.shape[1:], None, align_corners)
    per_pixel = reduction == "none"
    loss = logits.new_empty(target.shape if per_pixel else (), dtype=torch.float32)
    log_sum_exp = logits.new_empty(target.shape, dtype=torch.float32)
    total_weight = logits.new_empty((), dtype=torch.float32)
    workspace = _cross_entropy_workspace(kernels, logits, shape, backward=False)
    kernels.module.upsample_cross_entropy_fwd(
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
        kernels.stream,
    )
    return loss, log_sum_exp, total_weight


def upsample_cross_entropy_backward(
    kernels: Kernels,
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
    typed = logits if logits.dtype in DTYPES else logits.float()
    grad_logits = empty_like_format(typed, tuple(typed.shape))
    grad_loss = grad_loss.expand(target.shape)
    target, log_sum_exp = target.contiguous(), log_sum_exp.contiguous()
    weight = None if weight is None else weight.float().contiguous()
    shape = upsample_shape(typed, target.shape[1:], None, align_corners)
    workspace = _cross_entropy_workspace(kernels, typed, shape, backward=True)
    kernels.module.upsample_cross_entropy_bwd(
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
        kernels.stream,
    )
    return in_format_of(grad_logits.to(logits.dtype), logits)


def _cross_entropy_workspace(
    kernels: Kernels, logits: Tensor, shape: _C.UpsampleShape, backward: bool
) -> Tensor:
    nbytes = kernels.module.upsample_cross_entropy_workspace(shape, backward)
    return logits.new_empty(nbytes, dtype=torch.uint8)


class ConvKernel(NamedTuple):
    """A kernel of dilated convolution and the work list that it is made for."""

    launcher: str
    tile: int  # pixels, and output channels, of an item
    step_bytes: int  # of input channels of one tap
    blocks_per_worker: int  # of CONV_SM80 in the place that a worker takes


CONV_SM80 = ConvKernel("dilated_conv2d_fwd", _C.CONV_TILE, _C.CONV_STEP_BYTES, 1)
CONV_SM90 = ConvKernel("dilated_conv2d_fwd_sm90", _C.CONV_TILE_SM90, _C.CONV_STEP_BYTES_SM90, 4)


def conv_kernel(kernels: Kernels, dtype: torch.dtype) -> ConvKernel:
    """tf32 stays with the kernel that rounds to it: wgmma would cut fp32 off."""
    return CONV_SM90 if kernels.is_sm90 and dtype != torch.float32 else CONV_SM80


class ConvWorkList(NamedTuple):
    """What a kernel of dilated convolution is to do; ``tensors`` hold what ``work`` points to."""

    kernel: ConvKernel
    work: _C.ConvWork
    tensors: tuple[Tensor, ...]
    num_slots: int


# A partial sum, out and in, moves as many bytes as eight steps of its kernel.
SPLIT_STEPS = 8


# Never dropped: a captured CUDA graph holds the addresses.
@functools.cache
def conv_work_list(
    list_tiles: Callable[..., tuple[bytearray, bytearray, bytearray]],
    plane: tuple[int, int, int],
    branches: tuple[tuple[int, int, int, int], ...],
    steps_per_tap: int,
    out_channels: tuple[int, ...],
    device: torch.device,
    num_workers: int,
    kernel: ConvKernel = CONV_SM80,
) -> ConvWorkList:
    """The work list (csrc/common/zones.h) of a launch, on ``device``.

    ``list_tiles`` is ``_C.zones.forward_tiles`` or ``input_grad_tiles``, ``plane`` is (N, H, W),
    ``branches`` are (kernel_H, kernel_W, dilation_H, dilation_W), ``out_channels`` are those of
    each output, and ``num_workers`` is how many thread blocks of ``CONV_SM80`` run at once.
    """
    num_workers = max(1, num_workers // kernel.blocks_per_worker)
    rows = list_tiles(plane, branches, kernel.tile)
    pixels, taps, tiles = (int32_tensor(buffer) for buffer in rows)
    jobs = [
        (num_taps * steps_per_tap, -(-out_channels[output] // kernel.tile))
        for output, _, _, _, num_taps in tiles.view(-1, 5).tolist()
    ]
    schedule = _C.zones.schedule(jobs, num_workers, SPLIT_STEPS)
    items, workers, reductions = (
        int32_tensor(schedule[name]) for name in ("items", "workers", "reductions")
    )
    if kernel is CONV_SM90:
        items = items.view(-1, 6)[workers.argsort(stable=True)].flatten()
    first_items = workers.bincount(minlength=num_workers).cumsum(0)
    first_items = torch.cat([first_items.new_zeros(1), first_items]).int()
    lists = (pixels, taps, tiles, items, reductions, first_items)
    tensors = tuple(t.to(device) for t in lists)
    *addresses, first_item = (t.data_ptr() for t in tensors)
    counts = items.numel() // 6, reductions.numel() // 4
    work = _C.ConvWork(*addresses, *counts, first_item, num_workers)
    return ConvWorkList(kernel, work, tensors, schedule["num_slots"])


def int32_tensor(buffer: bytearray) -> Tensor:
    return torch.frombuffer(buffer, dtype=torch.int32) if buffer else torch.empty(0).int()


def steps_per_tap(channels: int, dtype: torch.dtype, kernel: ConvKernel = CONV_SM80) -> int:
    """Steps that the kernel takes for ``channels`` input channels of one tap."""
    return -(-channels * dtype.itemsize // kernel.step_bytes)


MAX_TAPS = 1024  # the search of a work list's order slows down with their square


def dilated_conv2d_refuses(input: Tensor, weights: Sequence[Tensor], groups: int) -> str | None:
    """Why the kernel cannot compute these branches, or None."""
    if input.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"the kernel takes float32, float16 and bfloat16, not {input.dtype}"
    if input.dtype == torch.float32 and not tf32_is_allowed():
        return "the kernel computes float32 as tf32, which torch.backends.cudnn does not allow"
    if groups != 1:
        return f"the kernel has no groups, got {groups}"
    if refusal := channels_refused(input, input.size(1), "input channels"):
        return refusal
    if any(weight.dtype != input.dtype or weight.device != input.device for weight in weights):
        return "the input and a weight differ in dtype or device"
    if input.numel() == 0 or any(weight.numel() == 0 for weight in weights):
        return "the input or a weight is empty"
    if len(weights) > _C.MAX_CONV_BRANCHES:
        return f"the kernel takes at most {_C.MAX_CONV_BRANCHES} branches, got {len(weights)}"
    if any(weight.size(2) * weight.size(3) > MAX_TAPS for weight in weights):
        return f"the kernel takes at most {MAX_TAPS} taps"
    if len(weights) * input.numel() // input.size(1) >= 2**31:
        return "the work list holds fewer than 2^31 pixels, those of all branches together"
    return None


def tf32_is_allowed() -> bool:
    """Torch's switch for convolutions. ``allow_tf32`` raises once the newer one was used."""
    conv = getattr(torch.backends.cudnn, "conv", None)
    return torch.backends.cudnn.allow_tf32 if conv is None else conv.fp32_precision == "tf32"


def channels_refused(input: Tensor, channels: int, what: str) -> str | None:
    """Asynchronous copies are of 16 bytes."""
    multiple = 16 // input.element_size()
    if channels % multiple:
        return f"the kernel takes a multiple of {multiple} {what}, got {channels}"
    return None


def dilated_conv2d(
    kernels: Kernels,
    input: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    dilations: Sequence[Sequence[int]],
    activation: str = "none",
) -> Tensor:
    """Parallel branches over ``input``, in its memory format."""
    output = nhwc_output(input, sum(weight.size(0) for weight in weights))
    convolve(kernels, output, input, weights, biases, dilations, activation=activation)
    return in_format_of(output, input)


CLAMPS = {"none": (-math.inf, math.inf), "relu": (0.0, math.inf), "relu6": (0.0, 6.0)}


def convolve(
    kernels: Kernels,
    output: Tensor,
    input: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    dilations: Sequence[Sequence[int]],
    *,
    activation: str,
    residual: Tensor | None = None,
    image_bias: Tensor | None = None,
) -> None:
    """Parallel branches over ``input`` into consecutive channels of ``output``.

    ``output``, and ``residual`` if there is one, are aligned and channels_last. ``image_bias`` is
    fp32 [N, K], for a single branch.
    """
    N, C, H, W = input.shape
    channels = tuple(weight.size(0) for weight in weights)
    branches = conv_branches(input, weights, dilations)
    input, *weights = aligned_nhwc(input), *map(_aligned_rows, weights)
    biases = [None if bias is None else bias.contiguous() for bias in biases]
    outputs = [
        _C.ConvOutput(
            weight.data_ptr(),
            0 if bias is None else bias.data_ptr(),
            0 if image_bias is None else image_bias.data_ptr(),
            weight.size(0),
            sum(channels[:i]),
            weight.stride(0),
        )
        for i, (weight, bias) in enumerate(zip(weights, biases))
    ]
    kernel = conv_kernel(kernels, input.dtype)
    launch(
        kernels,
        output,
        input,
        outputs,
        [_C.ConvSource(0, C, 0)] * len(weights),
        conv_work_list(
            _C.zones.forward_tiles,
            (N, H, W),
            branches,
            steps_per_tap(C, input.dtype, kernel),
            channels,
            input.device,
            kernels.num_workers,
            kernel,
        ),
        _C.ConvEpilogue(0 if residual is None else residual.data_ptr(), *CLAMPS[activation]),
    )


def conv_branches(
    input: Tensor, weights: Sequence[Tensor], dilations: Sequence[Sequence[int]]
) -> tuple[tuple[int, int, int, int], ...]:
    """(kernel_H, kernel_W, dilation_H, dilation_W) of each branch of a work list.

    A rate beyond the map does what the map's size does, and that fits the work list's int32.
    """
    H, W = input.shape[2:]
    return tuple(
        (weight.size(2), weight.size(3), min(vertical, H), min(horizontal, W))
        for weight, (vertical, horizontal) in zip(weights, dilations)
    )


def launch(
    kernels: Kernels,
    output: Tensor,
    input: Tensor,
    outputs: Sequence[_C.ConvOutput],
    sources: Sequence[_C.ConvSource],
    work_list: ConvWorkList,
    epilogue: _C.ConvEpilogue,
) -> None:
    """The kernel of ``work_list`` from ``input`` to ``output``, both aligned and channels_last."""
    partial_sums = input.new_empty(
        work_list.num_slots * work_list.kernel.tile**2, dtype=torch.float32
    )
    getattr(kernels.module, work_list.kernel.launcher)(
        output.data_ptr(),
        partial_sums.data_ptr(),
        input.data_ptr(),
        outputs,
        sources,
        work_list.work,
        epilogue,
        _C.ConvShape(*input.shape[2:], input.size(1), output.size(1)),
        DTYPES[input.dtype],
        kernels.stream,
    )


def nhwc_output(input: Tensor, channels: int) -> Tensor:
    """Uninitialised channels_last [N, channels, H, W]."""
    return torch.empty(
        (input.size(0), channels, *input.shape[2:]),
        dtype=input.dtype,
        device=input.device,
        memory_format=torch.channels_last,
    )


def aligned(tensor: Tensor, memory_format: torch.memory_format) -> Tensor:
    """In memory of this format that vectors of 16 bytes can be read from."""
    tensor = tensor.contiguous(memory_format=memory_format)
    return tensor if tensor.data_ptr() % 16 == 0 else tensor.clone()


def aligned_nhwc(tensor: Tensor) -> Tensor:
    return aligned(tensor, torch.channels_last)


def _aligned_rows(weight: Tensor) -> Tensor:
    """The same, but the rows of a 1x1 weight [K, C, 1, 1] may be parts of longer ones."""
    row_bytes = weight.stride(0) * weight.element_size()
    is_aligned = weight.data_ptr() % 16 == 0 and row_bytes % 16 == 0
    is_row = weight.shape[2:] == (1, 1) and weight.stride(1) == 1
    return weight if is_row and is_aligned else aligned_nhwc(weight)


_MAX_POOL_CHANNELS = 16384  # their means are in shared memory
_MAX_RUNS, _RUN_PIXELS = 16, 64  # of pixels summed by one block; enough blocks for small images


def aspp_refuses(
    input: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    dilations: Sequence[int],
    pool_weight: Tensor,
    pool_bias: Tensor,
    project_weight: Tensor,
    project_bias: Tensor,
) -> str | None:
    channels = sum(weight.size(0) for weight in weights)
    if max(input.size(1), pool_weight.size(0)) > _MAX_POOL_CHANNELS:
        return f"the kernel takes at most {_MAX_POOL_CHANNELS} channels to the pooled branch"
    return (
        dilated_conv2d_refuses(input, [*weights, pool_weight, project_weight], groups=1)
        or channels_refused(input, channels, "channels of all convolutions together")
        or channels_refused(input, pool_weight.size(0), "pooled channels")
    )


def aspp(
    kernels: Kernels,
    input: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    dilations: Sequence[int],
    pool_weight: Tensor,
    pool_bias: Tensor,
    project_weight: Tensor,
    project_bias: Tensor,
) -> Tensor:
    """The op in five launches, and one more for each of the two convolutions that splits its sums.

    The pooled branch is never as large as the map: what it adds to the projection is the same at
    every pixel of an image, a bias.
    """
    nhwc = aligned_nhwc(input)
    pairs = [(rate, rate) for rate in dilations]
    branches = nhwc_output(input, sum(weight.size(0) for weight in weights))
    output = nhwc_output(input, project_weight.size(0))
    project_weight = _aligned_rows(project_weight)
    project, project_pooled = project_weight.tensor_split([branches.size(1)], dim=1)
    image_bias = aspp_image_bias(
        kernels, nhwc, pool_weight, pool_bias, project_pooled, project_bias
    )
    convolve(kernels, branches, nhwc, weights, biases, pairs, activation="relu")
    convolve(
        kernels, output, branches, [project], [None], [(1, 1)], activation="relu",
        image_bias=image_bias,
    )  # fmt: skip
    return in_format_of(output, input)


def aspp_image_bias(
    kernels: Kernels,
    input: Tensor,
    pool_weight: Tensor,
    pool_bias: Tensor,
    project_weight: Tensor,
    project_bias: Tensor,
) -> Tensor:
    """fp32 [N, K] that the pooled channels and the bias add to the projection, in three launches.

    ``input`` is aligned and channels_last, ``project_weight`` has the columns of the pooled
    channels.
    """
    (N, C, H, W), P, K = input.shape, pool_weight.size(0), project_weight.size(0)
    num_runs = max(1, min(_MAX_RUNS, H * W // _RUN_PIXELS))
    image_bias, pooled, sums = (
        input.new_empty(shape, dtype=torch.float32) for shape in ((N, K), (N, P), (N, num_runs, C))
    )
    pool_weight = aligned_nhwc(pool_weight)
    pool_bias, project_bias = pool_bias.contiguous(), project_bias.contiguous()
    tensors = pool_weight, pool_bias, project_weight, project_bias
    kernels.module.aspp_image_bias_fwd(
        image_bias.data_ptr(),
        pooled.data_ptr(),
        sums.data_ptr(),
        input.data_ptr(),
        _C.AsppWeights(*(t.data_ptr() for t in tensors)),
        _C.AsppShape(N, H * W, C, P, K, num_runs, project_weight.stride(0)),
        DTYPES[input.dtype],
        kernels.stream,
    )
    return image_bias
