"""Elements more than 2^32 elements from the start of their tensor, for every pointer of a kernel.

The tensors are zeros that take no memory, because hardly any of their pages is touched: a 32-bit
offset reads zeros there, or leaves the place zero that it should write to. Where a kernel goes
through the whole of its output, the emulator runs the last of its blocks only.
"""

from __future__ import annotations

import contextlib
import ctypes
import math
import mmap
import os
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import deeplab_fast
from deeplab_fast import _C, upsample_argmax, upsample_cross_entropy
from deeplab_fast._native import work_lists
from deeplab_fast._native.common import DTYPES
from deeplab_fast._native.upsample_shape import upsample_shape

from ..support import emulator
from ..support.emulator import machine
from ..support.memory import sparse_zeros

FAR = 2**32
LAST = 2**62  # past the last cluster of any launch
STREAM = 0
NO_CLAMP = -math.inf, math.inf


def sparse(*shape: int, dtype: torch.dtype) -> Tensor:
    """Zeros that take memory only where they are touched.

    A 32-bit offset with a sign leads to the memory before them, which is zeros as well.
    """
    return sparse_zeros(math.prod(shape), dtype, before=2**31).view(shape)


def far_view(values: Tensor, strides: Sequence[int]) -> Tensor:
    """The same values in these strides, with zeros between them."""
    last = sum((size - 1) * stride for size, stride in zip(values.shape, strides, strict=True))
    return sparse(last + 1, dtype=values.dtype).as_strided(values.shape, strides).copy_(values)


def ints(*shape: int, dtype: torch.dtype) -> Tensor:
    """Small integers, whose sums are exact."""
    return torch.randint(1, 5, shape).to(dtype)


@contextlib.contextmanager
def clusters(**ranges: tuple[int, int]) -> Iterator[None]:
    """Run only these clusters of the named kernels; a negative begin counts from the end."""
    outer = emulator.load().set_clusters(ranges)
    try:
        yield
    finally:
        emulator.load().set_clusters(outer)


def int32(rows: Sequence[Sequence[int]] | Sequence[int]) -> Tensor:
    return torch.tensor(rows, dtype=torch.int32)


# Convolution. A work list may name any pixels, taps, channels and workspace slots.

CONVOLUTIONS = pytest.mark.parametrize(
    ("suffix", "dtype"),
    [("", torch.bfloat16), ("", torch.float32), ("_sm90", torch.bfloat16)],
    ids=["sm80-bf16", "sm80-tf32", "sm90-bf16"],
)


def tile_of(suffix: str) -> int:
    return _C.CONV_TILE_SM90 if suffix else _C.CONV_TILE


def step_of(suffix: str, dtype: torch.dtype) -> int:
    """Channels of a k-iteration; pixels, for the weight gradient."""
    return (_C.CONV_K_ITER_BYTES_SM90 if suffix else _C.CONV_K_ITER_BYTES) // dtype.itemsize


def run(name: str, *arguments: Any, dtype: torch.dtype | None = None) -> None:
    typed = arguments if dtype is None else (*arguments, DTYPES[dtype])
    with machine(1, "sm_90" if name.endswith("_sm90") else "sm_80"):
        getattr(emulator.load().cuda, name)(*typed, STREAM)


def convolve(
    suffix: str,
    output: Tensor,
    input: Tensor,
    weight: Tensor,
    pixels: Sequence[int],
    taps: Sequence[Sequence[int]],
    items: Sequence[Sequence[int]],
    plane: tuple[int, int] = (1, 1),
    *,
    reductions: Sequence[Sequence[int]] = (),
    partial_sums: Tensor | None = None,
    bias: Tensor | None = None,
    image_bias: Tensor | None = None,
    residual: Tensor | None = None,
    pixel_sums: Tensor | None = None,
) -> None:
    """One tile of ``pixels`` of [pixels, C] by the weight [K, taps, C] to the output's channels."""

    def address(tensor: Tensor | None) -> int:
        return 0 if tensor is None else tensor.data_ptr()

    K, _, C = weight.shape
    lists = pixels, taps, [(0, 0, len(pixels), 0, len(taps))], items, reductions
    tensors = [int32(rows) for rows in lists]
    first_items = int32([0, len(items)])
    more: list[Tensor] = []
    if suffix:
        listed, _, tiles, item_rows, _ = tensors
        more = [
            work_lists.listed_pixels(listed, (1, *plane)),
            work_lists.tile_items(
                item_rows, tiles, listed, (1, *plane), step_of(suffix, input.dtype)
            ),
        ]
    work = _C.ConvWork(
        *map(address, tensors), len(items), len(reductions), address(first_items), 1,
        *map(address, more),
    )  # fmt: skip
    arguments = _C.ConvArguments(
        [_C.ConvOutput(weight.data_ptr(), address(bias), K, 0, weight.stride(0))],
        [_C.ConvSource(0, C, 0)],
        work,
        NO_CLAMP,
        _C.ConvShape(*plane, input.size(-1), output.size(-1)),
        DTYPES[input.dtype],
        summing_branch=0,
    )
    tensors = output, partial_sums, input, residual, image_bias, pixel_sums
    run("dilated_conv2d_fwd" + suffix, *map(address, tensors), arguments)


TAPS = [(dy, dx, 0, 3 * dy + dx + 4) for dy in (-1, 0, 1) for dx in (-1, 0, 1)]


@CONVOLUTIONS
def test_convolution_of_far_pixels(suffix, dtype):
    """A corner of the last of 1025 images is far in the input, the residual and the output."""
    N, H, W, C = 1025, 1024, 1024, 8
    input, residual, output = (sparse(N, H, W, C, dtype=dtype) for _ in range(3))
    corner = N - 1, slice(0, 4), slice(W - 5, W)
    input[corner], residual[corner] = ints(4, 5, C, dtype=dtype), ints(4, 5, C, dtype=dtype)
    weight, bias = ints(C, 9, C, dtype=dtype), ints(C, dtype=dtype)
    pixels = [((N - 1) * H + y) * W + x for y in range(4) for x in range(W - 5, W)]
    assert pixels[0] * C > FAR
    convolve(
        suffix, output.view(-1, C), input.view(-1, C), weight, pixels, TAPS,
        [(0, 0, 0, 9, -1)], (H, W), bias=bias, residual=residual,
    )  # fmt: skip
    image = input[corner].double().permute(2, 0, 1)
    kernel = weight.double().view(C, 3, 3, C).permute(0, 3, 1, 2)
    expected = F.conv2d(image, kernel, bias.double(), padding=1).permute(1, 2, 0)
    assert torch.equal(output[corner], (expected + residual[corner]).to(dtype))


@CONVOLUTIONS
def test_convolution_of_far_weights_and_channels(suffix, dtype):
    """The last channels of a huge pixel and of one far above, two late taps, rows far apart."""
    H, W, C, K, num_taps = 32, 32, 2**23, 3, 1024
    input, weight = sparse(H * W, C, dtype=dtype), sparse(K, num_taps, C, dtype=dtype)
    step, pixels, tap_indices, up = step_of(suffix, dtype), [1000, 455], [513, 700], 17
    assert pixels[0] - pixels[1] == up * W + 1
    assert up * W * C >= FAR and tap_indices[0] * C > FAR and weight.stride(0) > FAR
    channels = slice(C - step, C)
    input[pixels, channels] = ints(2, step, dtype=dtype)
    weight[:, tap_indices, channels] = ints(K, 2, step, dtype=dtype)
    output = torch.zeros(H * W, 8, dtype=dtype)
    taps = [(0, 0, 0, tap_indices[0]), (-up, -1, 0, tap_indices[1])]
    items = [(0, 0, 2 * (C // step - 1), 2, -1)]
    convolve(suffix, output, input, weight, pixels[:1], taps, items, (H, W))
    read = input[pixels, channels].double()
    expected = torch.einsum("tc,ktc->k", read, weight[:, tap_indices, channels].double())
    assert torch.equal(output[pixels[0], :K], expected.to(dtype))


@pytest.mark.parametrize("split", [False, True], ids=["whole", "split"])
@CONVOLUTIONS
def test_convolution_with_far_biases_of_images_and_partial_sums(suffix, dtype, split):
    """Images have one pixel; a split sum has two workspace slots that are far."""
    N, C, K, tile = 2**26 + 3, 128, 64, tile_of(suffix)
    input, output, residual = (sparse(N, size, dtype=dtype) for size in (C, K, K))
    image_bias = sparse(N, K, dtype=torch.float32)
    pixels = [N - 3, N - 1]
    assert pixels[0] * K >= FAR
    input[pixels], image_bias[pixels] = ints(2, C, dtype=dtype), ints(2, K, dtype=torch.float32)
    residual[pixels] = ints(2, K, dtype=dtype)
    weight, steps = ints(K, 1, C, dtype=dtype), C // step_of(suffix, dtype)
    slot = FAR // tile**2 + 1
    partial_sums = sparse(slot + 2, tile, tile, dtype=torch.float32)
    pieces = [(0, 0, 0, 1, slot), (0, 0, 1, steps - 1, slot + 1)]
    convolve(
        suffix, output, input, weight, pixels, [(0, 0, 0, 0)],
        pieces if split else [(0, 0, 0, steps, -1)],
        reductions=[(0, 0, slot, 2)] if split else [], partial_sums=partial_sums,
        image_bias=image_bias, residual=residual,
    )  # fmt: skip
    sums = input[pixels].double() @ weight[:, 0].double().T
    expected = sums + image_bias[pixels] + residual[pixels]
    assert torch.equal(output[pixels], expected.to(dtype))
    assert torch.equal(partial_sums[slot:].sum(0)[:2, :K].double(), sums if split else 0 * sums)


def test_sums_of_far_pixels_on_the_way():
    """Rows of the sums of images that have one pixel each."""
    first, count, C = 2**28, 5, 8
    assert first % _C.CONV_SUM_RUN == 0
    parts, run_of_pixels = _C.CONV_SUM_PARTS, first // _C.CONV_SUM_RUN
    input, output = (sparse(first + count, C, dtype=torch.bfloat16) for _ in range(2))
    input[first:] = ints(count, C, dtype=torch.bfloat16)
    sums = sparse(run_of_pixels + first + count, parts, C, dtype=torch.float32)
    assert (run_of_pixels + first) * parts * C > FAR
    convolve(
        "_sm90", output, input, ints(C, 1, C, dtype=torch.bfloat16),
        range(first, first + count), [(0, 0, 0, 0)], [(0, 0, 0, 1, -1)], pixel_sums=sums,
    )  # fmt: skip
    rows = sums[run_of_pixels + first : run_of_pixels + first + count]
    assert torch.equal(rows.sum(1), input[first:].float())


# Gradient of the weight.


def weight_gradient(
    suffix: str,
    grad_output: Tensor,
    input: Tensor,
    grad_weight: Tensor,
    rectangles: Sequence[Sequence[int]],
    items: Sequence[Sequence[int]],
    reductions: Sequence[Sequence[int]] = (),
    partial_sums: Tensor | None = None,
) -> None:
    """Of [N, H, W, C] and [N, H, W, K] to [K, taps, C]; boxes are of a row."""
    K, num_taps, C = grad_weight.shape
    N, H, W, _ = input.shape
    tensors = [int32(rows) for rows in (rectangles, items, reductions)]
    first_items = int32([0, len(items)])
    box, more = (1, 1, 1), []
    if suffix:
        box = _C.WGRAD_BOX_SM90, 1, 1
        boxes = step_of(suffix, input.dtype) // _C.WGRAD_BOX_SM90
        more = [work_lists.box_items(tensors[1], tensors[0], box, boxes, C, tile_of(suffix))]
    work = _C.ConvWgradWork(
        *(t.data_ptr() for t in tensors), len(items), len(reductions), first_items.data_ptr(), 1,
        box, *(t.data_ptr() for t in more),
    )  # fmt: skip
    run(
        "dilated_conv2d_wgrad" + suffix,
        0 if partial_sums is None else partial_sums.data_ptr(),
        grad_output.data_ptr(),
        input.data_ptr(),
        [(grad_weight.data_ptr(), K, num_taps)],
        work,
        _C.ConvWgradShape(N, H, W, C, K),
        dtype=input.dtype,
    )


@pytest.mark.parametrize(
    ("N", "H", "W", "C"),
    [(1025, 1024, 1024, 8), (3, 2**14, 2**15, 8), (1, 8, 2**20, 2**12)],
    ids=["many images", "large images", "large rows"],
)
@CONVOLUTIONS
def test_weight_gradient_of_far_pixels(suffix, dtype, N, H, W, C):
    """The last channels of the last pixels, in the last k-iteration of two rectangles."""
    K, tile, last = 8, tile_of(suffix), slice(-8, None)
    input, grad_output = sparse(N, H, W, C, dtype=dtype), sparse(N, H, W, K, dtype=dtype)
    for tensor in (input, grad_output):
        tensor[-1, -2:, -100:, last] = ints(2, 100, 8, dtype=dtype)
    rectangles = [(0, 0, 0, 0, 0, 0, H, W), (-1, 1, 0, 1, 1, 0, H - 1, W - 1)]
    step, box = step_of(suffix, dtype), _C.WGRAD_BOX_SM90 if suffix else 1
    block, grad_weight = (C - 1) // tile, torch.zeros(K, 2, C, dtype=dtype)
    firsts, items = [], []
    for job, (*_, h, w) in enumerate(rectangles):
        width = -(-w // box) * box
        steps = -(-N * h * width // step)
        items.append((job, block, steps - 1, 1, -1))
        firsts.append((steps - 1) * step - (N * h - 1) * width)  # in the last row
    weight_gradient(suffix, grad_output, input, grad_weight, rectangles, items)
    for (dy, dx, _, tap, _, _, _, w), first in zip(rectangles, firsts, strict=True):
        assert first >= W - 100
        grads = grad_output[-1, -1, first:w].double()
        read = input[-1, H - 1 + dy, first + dx : w + dx, last].double()
        assert torch.equal(grad_weight[:, tap, last], (grads.T @ read).to(dtype))


@pytest.mark.parametrize("split", [False, True], ids=["whole", "split"])
@CONVOLUTIONS
def test_weight_gradient_of_far_weights_and_partial_sums(suffix, dtype, split):
    """The last rows of a huge weight; a split sum has two workspace slots that are far."""
    K, num_taps, C, tile = 2**20 + 8, 512, 8, tile_of(suffix)
    grad_weight, grad_output = sparse(K, num_taps, C, dtype=dtype), sparse(1, 1, 70, K, dtype=dtype)
    first = 2**20
    assert first * num_taps * C >= FAR
    input = ints(1, 1, 70, C, dtype=dtype)
    grad_output[..., first:] = ints(1, 1, 70, K - first, dtype=dtype)
    pixels = -(-70 // _C.WGRAD_BOX_SM90) * _C.WGRAD_BOX_SM90 if suffix else 70
    steps, slot = -(-pixels // step_of(suffix, dtype)), FAR // tile**2 + 1
    partial_sums = sparse(slot + 2, tile, tile, dtype=torch.float32)
    block = first // tile
    pieces = [(0, block, 0, 1, slot), (0, block, 1, steps - 1, slot + 1)]
    weight_gradient(
        suffix, grad_output, input, grad_weight, [(0, 0, 0, 511, 0, 0, 1, 70)],
        pieces if split else [(0, block, 0, steps, -1)],
        [(0, block, slot, 2)] if split else [], partial_sums,
    )  # fmt: skip
    expected = grad_output[0, 0, :, first:].double().T @ input[0, 0].double()
    assert torch.equal(grad_weight[first:, 511], expected.to(dtype))
    sums = partial_sums[slot:, : K - first, :C].sum(0).double()
    assert torch.equal(sums, expected if split else 0 * expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_bias_gradient_of_far_pixels_and_parts(dtype):
    """The last channels of the last of 4097 parts of two pixels each."""
    num_parts, K = 4097, 2**20
    assert (num_parts - 1) * K >= FAR
    grad_output = sparse(2 * num_parts, K, dtype=dtype)
    grad_output[-2:, -300:] = ints(2, 300, dtype=dtype)
    partial_sums, grad_bias = sparse(num_parts, K, dtype=torch.float32), sparse(K, dtype=dtype)
    last = {f"dilated_conv2d_bias_grad{part}_kernel": (-2, LAST) for part in ("", "_reduce")}
    with clusters(**last):
        run(
            "dilated_conv2d_bias_grad", grad_bias.data_ptr(), partial_sums.data_ptr(),
            grad_output.data_ptr(), 2 * num_parts, K, num_parts, dtype=dtype,
        )  # fmt: skip
    expected = grad_output[-2:, -32:].sum(0)
    assert torch.equal(partial_sums[-1, -32:], expected.float())
    assert torch.equal(grad_bias[-32:], expected)


# Depthwise convolution. C = 33 does not fill a vector.

KERNELS = [((3, 3), 32), ((5, 5), 32), ((1, 3), 32), ((3, 3), 33)]
DEPTHWISE = {f"depthwise_conv2d_{name}_kernel": (-8, LAST) for name in ("fwd", "fwd_any")}


# (kernel, channels past the last vector, dilation). Columns are so far apart that one more tap
# takes 2^32 elements.
FAR_TAPS = [((3, 3), 0, 10), ((5, 5), 0, 26), ((1, 3), 0, 4), ((3, 3), 15, 10)]


def last_channels(C: int) -> dict[str, tuple[int, int]]:
    """The cluster of the last 64 channels, of the first columns."""
    names = (f"depthwise_conv2d_{name}_kernel" for name in ("fwd", "fwd_any", "wgrad"))
    chunks = -(-C // 64)
    return dict.fromkeys(names, (chunks - 1, chunks))


def depthwise_reference(
    input: Tensor,
    weight: Tensor,
    bias: Tensor,
    kernel: tuple[int, int],
    dilations: tuple[int, int] = (1, 1),
) -> Tensor:
    """Depthwise convolution of one image [H, W, C]."""
    C = input.size(-1)
    x, w = input.double().permute(2, 0, 1)[None], weight.double().view(C, 1, *kernel)
    output = F.conv2d(x, w, bias.double(), padding="same", dilation=dilations, groups=C)
    return output[0].permute(1, 2, 0)


@pytest.mark.parametrize(("kernel", "C"), KERNELS, ids=str)
def test_depthwise_convolution_of_far_pixels(kernel, C):
    """The last of 2^21 images is far in the input, the residual and the output."""
    N, H, W, dtype = 2**21 + 1, 8, 8, torch.bfloat16
    assert (N - 1) * H * W * C >= FAR
    input, residual, output = (sparse(N, H, W, C, dtype=dtype) for _ in range(3))
    input[-1], residual[-1] = ints(H, W, C, dtype=dtype), ints(H, W, C, dtype=dtype)
    weight, bias = ints(C, *kernel, dtype=dtype), ints(C, dtype=dtype)
    shape = _C.DepthwiseShape((N, H, W, C), kernel, (1, 1), 4, False)
    with clusters(**DEPTHWISE):
        run(
            "depthwise_conv2d_fwd", output.data_ptr(), input.data_ptr(), weight.data_ptr(),
            bias.data_ptr(), residual.data_ptr(), NO_CLAMP, shape, dtype=dtype,
        )  # fmt: skip
    expected = depthwise_reference(input[-1], weight, bias, kernel) + residual[-1]
    assert torch.equal(output[-1], expected.to(dtype))


@pytest.mark.parametrize(("kernel", "odd", "dilation"), FAR_TAPS, ids=str)
def test_depthwise_convolution_of_far_weights_rows_and_columns(kernel, odd, dilation):
    """There are so many channels that weights and taps are more than 2^32 elements away."""
    taps, dtype = math.prod(kernel), torch.bfloat16
    C, H, W = FAR // taps // 64 * 64 + 256 + odd, 2, dilation + 1
    input, output = (sparse(H, W, C, dtype=dtype) for _ in range(2))
    weight, bias, last = sparse(C, taps, dtype=dtype), sparse(C, dtype=dtype), slice(C - 8, C)
    assert last.start * taps >= FAR and dilation * C >= FAR
    input[..., last], weight[last] = ints(H, W, 8, dtype=dtype), ints(8, taps, dtype=dtype)
    bias[last] = ints(8, dtype=dtype)
    shape = _C.DepthwiseShape((1, H, W, C), kernel, (1, dilation), 4, False)
    with clusters(**last_channels(C)):
        run(
            "depthwise_conv2d_fwd", output.data_ptr(), input.data_ptr(), weight.data_ptr(),
            bias.data_ptr(), 0, NO_CLAMP, shape, dtype=dtype,
        )  # fmt: skip
    reference = depthwise_reference(
        input[..., last], weight[last], bias[last], kernel, (1, dilation)
    )
    columns = [0, dilation]  # neighbours to the kernel
    assert torch.equal(output[:, columns, last], reference[:, columns].to(dtype))


@pytest.mark.parametrize(("kernel", "odd", "dilation"), FAR_TAPS, ids=str)
def test_depthwise_weight_gradient_of_far_rows_and_columns(kernel, odd, dilation):
    taps, dtype = math.prod(kernel), torch.bfloat16
    C, H, W = FAR // taps // 64 * 64 + 256 + odd, 2, dilation + 1
    has_all_taps = kernel[0] == kernel[1] and not odd  # else a block has one: here the first
    input, grad_output = (sparse(H, W, C, dtype=dtype) for _ in range(2))
    last, columns = slice(C - 8, C), [0, dilation]
    for tensor in (input, grad_output):
        tensor[:, columns, last] = ints(H, 2, 8, dtype=dtype)
    partial_sums = sparse(taps + 1, C, dtype=torch.float32)
    shape = _C.DepthwiseShape((1, H, W, C), kernel, (1, dilation), 4, False)
    ranges = last_channels(C) | {"depthwise_conv2d_wgrad_reduce_kernel": (0, 0)}
    with clusters(**ranges):
        run(
            "depthwise_conv2d_wgrad", 0, 0, partial_sums.data_ptr(), grad_output.data_ptr(),
            input.data_ptr(), shape, 1, dtype=dtype,
        )  # fmt: skip
    leaf = torch.zeros(8, taps, dtype=torch.double, requires_grad=True)
    output = depthwise_reference(input[..., last], leaf, torch.zeros(8), kernel, (1, dilation))
    (expected,) = torch.autograd.grad(output, leaf, grad_output[..., last].double())
    own = slice(None) if has_all_taps else slice(0, 1)
    assert expected[:, own].count_nonzero() > 0
    assert torch.equal(partial_sums[:taps, last][own].T, expected[:, own].float())
    assert torch.equal(partial_sums[taps, last], grad_output[..., last].float().sum((0, 1)))


# A thread block has 32 floats of 16 pixels, or single channels of 4.
@pytest.mark.parametrize(
    ("kernel", "C", "N", "columns"),
    [
        ((3, 3), 2**16, 2**16, 16),
        ((5, 5), 2**16, 2**16, 16),
        ((1, 3), 2**18, 2**16, 16),
        ((1, 3), 2**18 + 1, 2**14, 4),
    ],
)
def test_depthwise_weight_gradient_of_far_pixels_and_parts(kernel, C, N, columns):
    """A part for each group of columns; the last tap of all, and the last channels."""
    H, W, taps, dtype = 1, 2, math.prod(kernel), torch.float32
    num_parts, has_all_taps = N * W // columns, kernel != (1, 3)  # else a block has one
    assert (num_parts - 1) * (taps + 1) * C >= FAR and (N - 1) * W * C >= FAR
    input, grad_output = (sparse(N, H, W, C, dtype=dtype) for _ in range(2))
    input[-1, ..., -8:], grad_output[-1, ..., -8:] = (ints(H, W, 8, dtype=dtype) for _ in range(2))
    partial_sums = sparse(num_parts, taps + 1, C, dtype=torch.float32)
    grad_weight, grad_bias = (sparse(C, n, dtype=dtype) for n in (taps, 1))
    shape = _C.DepthwiseShape((N, H, W, C), kernel, (1, 1), 4, False)
    ranges = {
        "depthwise_conv2d_wgrad_kernel": (-2, LAST),
        "depthwise_conv2d_wgrad_reduce_kernel": (-2 if has_all_taps else LAST, LAST),
    }
    with clusters(**ranges):
        run(
            "depthwise_conv2d_wgrad", grad_weight.data_ptr(), grad_bias.data_ptr(),
            partial_sums.data_ptr(), grad_output.data_ptr(), input.data_ptr(), shape, num_parts,
            dtype=dtype,
        )  # fmt: skip
    leaf = torch.zeros(8, taps, dtype=torch.double, requires_grad=True)
    output = depthwise_reference(input[-1, ..., -8:], leaf, torch.zeros(8), kernel)
    (expected,) = torch.autograd.grad(output, leaf, grad_output[-1, ..., -8:].double())
    own = slice(None) if has_all_taps else slice(taps - 1, taps)
    assert expected[:, own].count_nonzero() > 0
    assert torch.equal(partial_sums[-1, :taps, -8:][own].T, expected[:, own].float())
    if has_all_taps:
        expected_bias = grad_output[-1, ..., -8:].sum((0, 1))
        assert torch.equal(partial_sums[-1, taps, -8:], expected_bias)
        assert torch.equal(grad_bias[-8:, 0], expected_bias)


def test_depthwise_weight_gradient_to_far_weights():
    """The last tap of the last channels; the partial sums are given."""
    C, taps, dtype = FAR // 9 // 64 * 64 + 128, 9, torch.bfloat16
    partial_sums = sparse(1, taps + 1, C, dtype=torch.float32)
    grad_weight = sparse(C, taps, dtype=dtype)
    partial_sums[0, taps - 1, -8:] = ints(8, dtype=torch.float32)
    assert (C - 8) * taps >= FAR
    shape, end = _C.DepthwiseShape((1, 1, 1, C), (3, 3), (1, 1), 4, False), taps * C // 128
    ranges = {
        "depthwise_conv2d_wgrad_kernel": (0, 0),
        "depthwise_conv2d_wgrad_reduce_kernel": (end - 1, end + 1),
    }
    with clusters(**ranges):
        run(
            "depthwise_conv2d_wgrad", grad_weight.data_ptr(), 0, partial_sums.data_ptr(), 0, 0,
            shape, 1, dtype=dtype,
        )  # fmt: skip
    assert torch.equal(grad_weight[-8:, -1], partial_sums[0, taps - 1, -8:].to(dtype))
    assert (partial_sums[0, taps - 1, -8:] > 0).all() and not grad_weight[-8:, :-1].any()


# Means of pixels, and the pooled branch of ASPP.


def test_means_of_far_pixels():
    """Runs of one pixel, two images of 2^23 and a half."""
    N, pixels, C, dtype = 2, 2**23 + 1, 256, torch.bfloat16
    input, sums = (
        sparse(N, pixels, C, dtype=dtype),
        sparse(N * (pixels + 1), C, dtype=torch.float32),
    )
    assert (N * pixels - 2) * C >= FAR
    input[-1, -2:] = ints(2, C, dtype=dtype)
    runs = _C.PixelRuns(N, pixels, C, 1, 1)
    with clusters(pixel_sums_fwd_kernel=(-2, LAST)):
        run("pixel_sums_fwd", sums.data_ptr(), input.data_ptr(), runs, dtype=dtype)
    last = (N * pixels - 1) + (N - 1)  # run and image
    assert torch.equal(sums[last - 1 : last + 1], input[-1, -2:].float())


def test_means_of_far_images():
    N, C = 2**24 + 1, 256
    means, sums = sparse(N, C, dtype=torch.float32), sparse(2 * N, C, dtype=torch.float32)
    sums[2 * N - 2] = ints(C, dtype=torch.float32)  # of the last run and image
    assert (N - 1) * C >= FAR
    runs = _C.PixelRuns(N, 1, C, 1, 1)
    with clusters(pixel_means_fwd_kernel=(-C // 32, LAST)), machine(1):
        emulator.load().cuda.pixel_means_fwd(means.data_ptr(), sums.data_ptr(), runs, True, STREAM)
    assert torch.equal(means[-1], sums[2 * N - 2])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_pooled_branch_of_far_images_and_weights(dtype):
    """Means, pooled channels and biases of the last image; rows of the projection far apart."""
    N, C = 2**26 + 1, 64
    means, pooled, image_bias = (sparse(N, C, dtype=torch.float32) for _ in range(3))
    means[-1] = ints(C, dtype=torch.float32)
    assert (N - 1) * C >= FAR
    pool, pool_bias = ints(C, C, dtype=dtype), ints(C, dtype=dtype)
    project = far_view(ints(C, C, dtype=dtype), (FAR // 32 + 64, 1))
    assert (C - 16) * project.stride(0) > FAR
    project_bias = ints(C, dtype=dtype)
    tensors = pool, pool_bias, project, project_bias
    with clusters(aspp_fwd_linear_kernel=(-C // 8, LAST)), machine(1):
        emulator.load().cuda.aspp_image_bias_fwd(
            image_bias.data_ptr(), pooled.data_ptr(), means.data_ptr(),
            _C.AsppWeights(*(t.data_ptr() for t in tensors)),
            _C.AsppShape(N, C, C, C, project.stride(0)), DTYPES[dtype], True, STREAM,
        )  # fmt: skip
    expected = means[-1] @ pool.float().T + pool_bias
    assert torch.equal(pooled[-1], expected)
    expected = expected.double() @ project.double().T + project_bias
    torch.testing.assert_close(image_bias[-1].double(), expected, rtol=1e-6, atol=0)


# Upsampling. Logits come in any strides.

DIMENSIONS = pytest.mark.parametrize("dimension", range(4), ids=["N", "C", "H", "W"])
ORDERS = pytest.mark.parametrize("memory", ["contiguous", "channels_last"])
BACKENDS = pytest.mark.parametrize("name", ["cpu", "emulated"])


def with_far_dimension(logits: Tensor, dimension: int, memory: str) -> Tensor:
    """Tensor in this order in memory, whose neighbours in one dimension are far apart."""
    _, C, H, W = logits.shape
    in_order = {"contiguous": (C * H * W, H * W, W, 1), "channels_last": (C * H * W, 1, W * C, C)}
    strides = list(in_order[memory])
    strides[dimension] = FAR + 64
    return far_view(logits, strides)


@DIMENSIONS
@ORDERS
@BACKENDS
@pytest.mark.parametrize("size", [(13, 17), (5, 6)], ids=["large cells", "small cells"])
def test_argmax_of_far_logits(ran, name, dimension, memory, size):
    logits = torch.randn(2, 5, 3, 4)
    with deeplab_fast.backend(name):
        actual = upsample_argmax(with_far_dimension(logits, dimension, memory), size)
        expected = upsample_argmax(logits, size)
    assert torch.equal(actual, expected) and len(expected.unique()) > 2
    assert ran == [("upsample_argmax", name)] * 2


@DIMENSIONS
@ORDERS
@BACKENDS
@pytest.mark.parametrize("scale", [1, 100], ids=["tame", "wild"])
def test_cross_entropy_of_far_logits(ran, name, dimension, memory, scale):
    logits, target = scale * torch.randn(2, 5, 3, 4), torch.randint(5, (2, 7, 9))
    leaves = [x.requires_grad_() for x in (with_far_dimension(logits, dimension, memory), logits)]
    with deeplab_fast.backend(name):
        losses = [upsample_cross_entropy(x, target, label_smoothing=0.1) for x in leaves]
        grads = [torch.autograd.grad(loss, x)[0] for loss, x in zip(losses, leaves, strict=True)]
    assert torch.equal(*losses) and torch.equal(*grads)
    assert {pair[1] for pair in ran} == {name}


@pytest.mark.parametrize("dimension", range(3), ids=["N", "H", "W"])
@BACKENDS
def test_cross_entropy_of_far_incoming_gradients(name, dimension):
    logits, target = torch.randn(2, 3, 2, 3, requires_grad=True), torch.randint(3, (2, 5, 7))
    grad_loss, strides = torch.randn(2, 5, 7), [35, 7, 1]
    strides[dimension] = FAR + 64
    with deeplab_fast.backend(name):
        loss = upsample_cross_entropy(logits, target, reduction="none")
        expected, actual = (
            torch.autograd.grad(loss, logits, grad, retain_graph=True)[0]
            for grad in (grad_loss, far_view(grad_loss, strides))
        )
    assert torch.equal(actual, expected)


def emulated_argmax(labels: Tensor, logits: Tensor) -> Tensor:
    shape = upsample_shape(logits, labels.shape[1:], None, False)
    arguments = shape, DTYPES[labels.dtype], DTYPES[logits.dtype], STREAM
    with machine(1):
        emulator.load().cuda.upsample_argmax_fwd(labels.data_ptr(), logits.data_ptr(), *arguments)
    return labels


@pytest.mark.parametrize(
    ("N", "size", "kernel", "blocks"),
    [
        (2**16 - 1, (256, 257), "upsample_argmax_fwd_pruned_kernel", 27),
        (2**16 - 1, (257, 272), "upsample_argmax_fwd_pruned_kernel", 27),  # in vectors
        (2**16, (256, 257), "upsample_argmax_fwd_kernel", 257),  # more images than a grid has
        (2**28 + 1, (4, 5), "upsample_argmax_fwd_kernel", 1),
    ],
)
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64], ids=str)
def test_far_labels(N, size, kernel, blocks, dtype):
    """The labels of the last of many images."""
    logits, labels = sparse(N, 3, 4, 4, dtype=torch.float32), sparse(N, *size, dtype=dtype)
    assert (N - 1) * math.prod(size) > FAR
    logits[-1] = torch.randn(3, 4, 4)
    expected = emulated_argmax(torch.zeros(1, *size, dtype=dtype), logits[-1:])
    before = emulator.load().launch_counts().get(kernel, 0)
    with clusters(**{kernel: (-blocks, LAST)}):
        emulated_argmax(labels, logits)
    assert emulator.load().launch_counts()[kernel] == before + 1
    assert torch.equal(labels[-1:], expected) and expected.any()


@pytest.mark.parametrize(
    ("shape", "size"),
    [
        ((1, 2**28, 1, 1), (1, 1)),
        ((1, 1, 2**28, 1), (1, 1)),
        ((1, 1, 1, 2**28), (1, 1)),
        ((1, 1, 1, 1), (2**28, 1)),
        ((1, 1, 1, 1), (1, 2**28)),
        ((2**30, 1, 1, 1), (1, 1)),
        ((2**20, 2**18, 1, 1), (1, 1)),
        ((2**20, 1, 2**8, 2**8), (1, 1)),
    ],
)
def test_cross_entropy_unsupported_sizes(shape, size):
    """Too many classes, rows, blocks, elements or source pixels raise before anything is read."""
    shape = _C.UpsampleShape(shape, (1, 1, 1, 1), size, (1.0, 1.0), False)
    terms = _C.CrossEntropyParams(0, -100, 0.0)
    cuda, fp32 = emulator.load().cuda, DTYPES[torch.float32]
    names = ("prepare", "fwd", "reduce", "bwd", "gather")
    with clusters(**{f"upsample_cross_entropy_{name}_kernel": (0, 0) for name in names}):
        with pytest.raises(RuntimeError, match="fwd_kernel: a size is too large"):
            cuda.upsample_cross_entropy_fwd(0, 0, 0, 0, 0, 0, 0, False, shape, terms, fp32, STREAM)
        with pytest.raises(RuntimeError, match="bwd_kernel: a size is too large"):
            cuda.upsample_cross_entropy_bwd(
                0, 0, 0, (0, 0, 0), 0, 0, 0, 0, False, shape, terms, fp32, STREAM
            )


class CrossEntropy:
    """Run the emulated kernels on given tensors, without the reduction over all pixels."""

    def __init__(self, logits: Tensor, size: tuple[int, int], allocate: Any) -> None:
        N, C, H, W = logits.shape
        self.logits, self.allocate = logits, allocate
        self.shape = upsample_shape(logits, size, None, False)
        self.target = allocate(N, *size, dtype=torch.int64)
        self.log_sum_exp, self.losses = (allocate(N, *size, dtype=torch.float32) for _ in range(2))
        self.grad_losses = allocate(N, *size, dtype=torch.float32)
        self.terms = _C.CrossEntropyParams(0, -100, 0.1)
        num_bytes = emulator.load().cuda.upsample_cross_entropy_workspace
        num_bytes = max(num_bytes(self.shape, backward) for backward in (False, True))
        self.workspace = allocate(num_bytes, dtype=torch.uint8)

    def forward(self) -> None:
        total = torch.zeros(2)
        with machine(1):
            emulator.load().cuda.upsample_cross_entropy_fwd(
                total.data_ptr(), self.losses.data_ptr(), self.log_sum_exp.data_ptr(),
                total[1:].data_ptr(), self.workspace.data_ptr(), self.logits.data_ptr(),
                self.target.data_ptr(), False, self.shape, self.terms, DTYPES[torch.float32],
                STREAM,
            )  # fmt: skip

    def backward(self, channels_last: bool) -> Tensor:
        """[N, H, W, C] or [N, C, H, W]."""
        N, C, H, W = self.logits.shape
        shape = (N, H, W, C) if channels_last else (N, C, H, W)
        grad = self.allocate(*shape, dtype=torch.float32)
        with machine(1):
            emulator.load().cuda.upsample_cross_entropy_bwd(
                grad.data_ptr(), self.workspace.data_ptr(), self.grad_losses.data_ptr(),
                self.grad_losses.stride(), 0, self.log_sum_exp.data_ptr(), self.logits.data_ptr(),
                self.target.data_ptr(), channels_last, self.shape, self.terms,
                DTYPES[torch.float32], STREAM,
            )  # fmt: skip
        return grad


def entropy_clusters(**ranges: tuple[int, int]) -> contextlib.AbstractContextManager[None]:
    return clusters(**{
        f"upsample_cross_entropy_{name}_kernel": range_ for name, range_ in ranges.items()
    })  # fmt: skip


def test_cross_entropy_of_far_pixels():
    """Source pixels, targets, losses and what is kept for the gradient, of the last image."""
    N, C, H, W, size = 2**29 + 1, 3, 1, 8, (2, 16)
    far, near = (
        CrossEntropy(allocate(n, C, H, W, dtype=torch.float32), size, allocate)
        for n, allocate in ((N, sparse), (1, torch.zeros))
    )
    assert (N - 1) * H * W >= FAR
    near.logits.normal_()
    near.target.random_(C)
    far.logits[-1], far.target[-1] = near.logits[0], near.target[0]
    near.forward()
    with entropy_clusters(prepare=(-2, LAST), fwd=(-H - 1, LAST), reduce=(0, 0)):
        far.forward()
    assert torch.equal(far.losses[-1], near.losses[0]) and near.losses.all()
    assert torch.equal(far.log_sum_exp[-1], near.log_sum_exp[0])


@pytest.mark.parametrize("channels_last", [False, True])
def test_cross_entropy_gradient_of_far_pixels(channels_last):
    """The gradient of the last image, which is summed from those of its cells."""
    N, C, H, W, size = 2**27 + 1, 5, 1, 8, (4, 16)
    far, near = (
        CrossEntropy(allocate(n, C, H, W, dtype=torch.float32), size, allocate)
        for n, allocate in ((N, sparse), (1, torch.zeros))
    )
    assert (N - 1) * C * H * W >= FAR
    near.logits.normal_()
    near.target.random_(C)
    near.grad_losses.normal_()
    near.forward()
    for name in ("logits", "target", "grad_losses", "log_sum_exp"):
        getattr(far, name)[-1] = getattr(near, name)[0]
    expected = near.backward(channels_last)
    with entropy_clusters(prepare=(-2, LAST), bwd=(-H - 1, LAST), gather=(-2, LAST)):
        actual = far.backward(channels_last)
    assert torch.equal(actual[-1], expected[0]) and expected.all()


@pytest.mark.parametrize("channels_last", [False, True])
def test_cross_entropy_gradient_of_far_classes(channels_last):
    """The last classes of a row of 2^20 pixels, each of which is an output."""
    C, W, classes, pixels = 2**13, 2**20 + 12, slice(-32, None), slice(-8, None)
    assert C * W > FAR and W % 15 == 13  # columns of the last strip
    far = CrossEntropy(sparse(1, C, 1, W, dtype=torch.float32), (1, W), sparse)
    far.logits[0, classes, 0, pixels] = torch.randn(32, 8)
    last = far.logits[0, :, 0, pixels].double()
    far.target[0, 0, pixels] = C - 3
    far.log_sum_exp[0, 0, pixels] = (last - last.max(0).values).logsumexp(0).float()
    far.grad_losses[0, 0, pixels] = torch.rand(8) + 1
    pixel_blocks, strips, none = -(-W * 4 // 128), -(-W // 15), (0, 0)
    row = 2 * strips * 127  # of blocks, with the last classes
    with entropy_clusters(prepare=(pixel_blocks - 2, pixel_blocks + 1), bwd=none, gather=none):
        far.backward(channels_last)
    strip = row + strips - 1
    with entropy_clusters(prepare=(-1, LAST), bwd=(strip, strip + 1), gather=(-1, LAST)):
        actual = far.backward(channels_last)
    actual = actual[0, 0].T if channels_last else actual[0, :, 0]
    smooth = torch.full((C, 1), 0.1 / C, dtype=torch.double)
    smooth[C - 3] += 0.9
    expected = (last.softmax(0) - smooth) * far.grad_losses[0, 0, pixels]
    # The last cluster that gathers has pixels of one class, or classes of one pixel.
    own = (classes, -1) if channels_last else (-1, pixels)
    ours, theirs = actual[:, pixels][own].double(), expected[own]
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-9)


def share_one_memory(tensor: Tensor) -> None:
    """Map the same 2 MiB repeatedly into a tensor, so that writing it takes no more memory."""
    map_memory = ctypes.CDLL(None, use_errno=True).mmap
    map_memory.restype, size = ctypes.c_void_p, 2**21
    map_memory.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
    file, fixed = os.memfd_create("shared"), 0x10  # MAP_FIXED
    os.ftruncate(file, size)
    protection, flags = mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_SHARED | fixed
    end = tensor.data_ptr() + tensor.numel() * tensor.element_size()
    for address in range(tensor.data_ptr(), end, size):
        assert map_memory(address, size, protection, flags, file, 0) == address
    os.close(file)


def test_far_labels_on_the_cpu():
    """The last image follows 2^31 others that share the same memory."""
    N, side = 2**7 + 1, 2**12
    labels, logits = sparse(N, side, side, dtype=torch.uint8), torch.zeros(N, 2, 1, 1)
    assert (N - 1) * side**2 >= 2**31  # 2^32 would take twice the time
    share_one_memory(labels[:-1])
    logits[-1, 1] = 1
    shape = upsample_shape(logits, (side, side), None, False)
    dtypes = DTYPES[labels.dtype], DTYPES[logits.dtype]
    _C.cpu.upsample_argmax_fwd(labels.data_ptr(), logits.data_ptr(), shape, *dtypes, 2)
    assert labels[-1].all() and not labels[0, 0].any()
