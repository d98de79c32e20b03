"""Elements more than 2^32 elements from the start of their tensor, for every pointer of a kernel.

The tensors are zeros that take no memory, because hardly any of their pages is touched: a 32-bit
offset reads zeros there, or leaves the place zero that it should write to. Where a kernel goes
through the whole of its output, the emulator runs the last of its blocks only.
"""

from __future__ import annotations

import contextlib
import math
import mmap
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import deeplab_fast
from deeplab_fast import _C, _emulated, upsample_argmax, upsample_cross_entropy
from deeplab_fast.cuda_kernels.bilinear import upsample_shape
from deeplab_fast.cuda_kernels.common import DTYPES
from deeplab_fast.emulated import machine

FAR = 2**32
LAST = 2**62  # past the last cluster of any launch
STREAM = 0
NO_CLAMP = -math.inf, math.inf


def sparse(*shape: int, dtype: torch.dtype) -> Tensor:
    """Zeros that take memory only where they are touched.

    A 32-bit offset with a sign leads to the memory before them, which is zeros as well.
    """
    before = 2**31 * dtype.itemsize
    num_bytes = before + math.prod(shape) * dtype.itemsize
    no_reserve = 0x4000  # mmap.MAP_NORESERVE, which Python has from 3.13 on
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | no_reserve
    try:
        memory = mmap.mmap(-1, num_bytes, flags=flags)
    except OSError as error:
        pytest.skip(f"{num_bytes >> 30} GiB of address space are not to be had: {error}")
    return torch.frombuffer(memory, dtype=dtype, offset=before).view(shape)


def far_view(values: Tensor, strides: Sequence[int]) -> Tensor:
    """The same values in these strides, between zeros."""
    last = sum((size - 1) * stride for size, stride in zip(values.shape, strides, strict=True))
    return sparse(last + 1, dtype=values.dtype).as_strided(values.shape, strides).copy_(values)


def ints(*shape: int, dtype: torch.dtype) -> Tensor:
    """Small, so that their sums are exact."""
    return torch.randint(1, 5, shape).to(dtype)


@contextlib.contextmanager
def clusters(**ranges: tuple[int, int]) -> Iterator[None]:
    """Only these clusters of the kernels named run, those from a negative begin on are the last."""
    outer = _emulated.set_clusters(ranges)
    try:
        yield
    finally:
        _emulated.set_clusters(outer)


def int32(rows: Sequence[Sequence[int]] | Sequence[int]) -> Tensor:
    return torch.tensor(rows, dtype=torch.int32)


# Convolution. A work list may name any pixels, taps, channels and slots.

CONVOLUTIONS = pytest.mark.parametrize(
    ("suffix", "dtype"),
    [("", torch.bfloat16), ("", torch.float32), ("_sm90", torch.bfloat16)],
    ids=["sm80-bf16", "sm80-tf32", "sm90-bf16"],
)


def tile_of(suffix: str) -> int:
    return _C.CONV_TILE_SM90 if suffix else _C.CONV_TILE


def step_of(suffix: str, dtype: torch.dtype) -> int:
    """Channels of a step, or pixels of one of the weight gradient."""
    return (_C.CONV_STEP_BYTES_SM90 if suffix else _C.CONV_STEP_BYTES) // dtype.itemsize


def run(name: str, *arguments: Any, dtype: torch.dtype) -> None:
    with machine(1, "sm_90" if name.endswith("_sm90") else "sm_80"):
        getattr(_emulated.cuda, name)(*arguments, DTYPES[dtype], STREAM)


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
    work = _C.ConvWork(
        *map(address, tensors), len(items), len(reductions), address(first_items), 1
    )
    run(
        "dilated_conv2d_fwd" + suffix,
        output.data_ptr(),
        address(partial_sums),
        input.data_ptr(),
        [
            _C.ConvOutput(
                weight.data_ptr(), address(bias), address(image_bias), K, 0, weight.stride(0),
                address(pixel_sums),
            )
        ],
        [_C.ConvSource(0, C, 0)],
        work,
        _C.ConvEpilogue(address(residual), *NO_CLAMP),
        _C.ConvShape(*plane, input.size(-1), output.size(-1)),
        dtype=input.dtype,
    )  # fmt: skip


TAPS = [(dy, dx, 0, 3 * dy + dx + 4) for dy in (-1, 0, 1) for dx in (-1, 0, 1)]


@CONVOLUTIONS
def test_convolution_of_far_pixels(suffix, dtype):
    """Of the input, the residual and the output: a corner of the last of 1025 images."""
    N, H, W, C = 1025, 1024, 1024, 8
    input, residual, output = (sparse(N, H, W, C, dtype=dtype) for _ in range(3))
    corner = N - 1, slice(0, 4), slice(W - 5, W)
    input[corner], residual[corner] = ints(4, 5, C, dtype=dtype), ints(4, 5, C, dtype=dtype)
    weight, bias = ints(C, 9, C, dtype=dtype), ints(C, dtype=dtype)
    pixels = [((N - 1) * H + y) * W + x for y in range(4) for x in range(W - 5, W)]
    assert pixels[0] * C > FAR
    convolve(
        suffix, output.view(-1, C), input.view(-1, C), weight, pixels, TAPS,
        [(0, 0, 0, 9, -1, -1)], (H, W), bias=bias, residual=residual,
    )  # fmt: skip
    image = input[corner].double().permute(2, 0, 1)
    kernel = weight.double().view(C, 3, 3, C).permute(0, 3, 1, 2)
    expected = F.conv2d(image, kernel, bias.double(), padding=1).permute(1, 2, 0)
    assert torch.equal(output[corner], (expected + residual[corner]).to(dtype))


@CONVOLUTIONS
def test_convolution_of_far_weights_and_channels(suffix, dtype):
    """The last channels of a huge pixel, two late taps, and rows of a weight that are far apart."""
    H, W, C, K, num_taps = 32, 32, 2**23, 3, 1024
    input, weight = sparse(H * W, C, dtype=dtype), sparse(K, num_taps, C, dtype=dtype)
    step, pixel, taps = step_of(suffix, dtype), 1000, [513, 700]
    assert pixel * C > FAR and taps[0] * C > FAR and weight.stride(0) > FAR
    channels = slice(C - step, C)
    input[pixel : pixel + 2, channels] = ints(2, step, dtype=dtype)
    weight[:, taps, channels] = ints(K, 2, step, dtype=dtype)
    output = torch.zeros(H * W, 8, dtype=dtype)
    convolve(
        suffix, output, input, weight, [pixel], [(0, 0, 0, taps[0]), (0, 1, 0, taps[1])],
        [(0, 0, 2 * (C // step - 1), 2, -1, -1)], (H, W),
    )  # fmt: skip
    read = input[pixel : pixel + 2, channels].double()
    expected = torch.einsum("tc,ktc->k", read, weight[:, taps, channels].double())
    assert torch.equal(output[pixel, :K], expected.to(dtype))


@pytest.mark.parametrize("split", [False, True], ids=["whole", "split"])
@CONVOLUTIONS
def test_convolution_with_far_biases_of_images_and_partial_sums(suffix, dtype, split):
    """Images of one pixel; a split sum has two pieces in late slots."""
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
    pieces = [(0, 0, 0, 1, slot, 0), (0, 0, 1, steps - 1, slot + 1, 0)]
    convolve(
        suffix, output, input, weight, pixels, [(0, 0, 0, 0)],
        pieces if split else [(0, 0, 0, steps, -1, -1)],
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
        range(first, first + count), [(0, 0, 0, 0)], [(0, 0, 0, 1, -1, -1)], pixel_sums=sums,
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
    work = _C.ConvWgradWork(
        *(t.data_ptr() for t in tensors), len(items), len(reductions), first_items.data_ptr(), 1,
        (_C.WGRAD_BOX_SM90 if suffix else 1, 1, 1),
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


@CONVOLUTIONS
def test_weight_gradient_of_far_pixels(suffix, dtype):
    """The last pixels of the last of 1025 images, in the last step of two rectangles."""
    N, H, W, C = 1025, 1024, 1024, 8
    input, grad_output = (sparse(N, H, W, C, dtype=dtype) for _ in range(2))
    for tensor in (input, grad_output):
        tensor[-1, -2:] = ints(2, W, C, dtype=dtype)
    rectangles = [(0, 0, 0, 0, 0, 0, H, W), (-1, 1, 0, 1, 1, 0, H - 1, W - 1)]
    step, box = step_of(suffix, dtype), _C.WGRAD_BOX_SM90 if suffix else 1
    widths = [-(-w // box) * box for *_, w in rectangles]
    steps = [
        -(-N * h * width // step)
        for (*_, h, _), width in zip(rectangles, widths, strict=True)
    ]
    items = [(job, 0, count - 1, 1, -1, -1) for job, count in enumerate(steps)]
    grad_weight = torch.zeros(C, 2, C, dtype=dtype)
    weight_gradient(suffix, grad_output, input, grad_weight, rectangles, items)
    for (dy, dx, _, tap, _, _, h, w), width, count in zip(rectangles, widths, steps, strict=True):
        first = (count - 1) * step - (N * h - 1) * width  # in the last row
        assert first >= 0
        columns = slice(first, w)
        grads = grad_output[-1, -1, columns].double()
        read = input[-1, H - 1 + dy, first + dx : w + dx].double()
        assert torch.equal(grad_weight[:, tap], (grads.T @ read).to(dtype))


@pytest.mark.parametrize("split", [False, True], ids=["whole", "split"])
@CONVOLUTIONS
def test_weight_gradient_of_far_weights_and_partial_sums(suffix, dtype, split):
    """The last rows of a huge weight; a split sum has two pieces in late slots."""
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
    pieces = [(0, block, 0, 1, slot, 0), (0, block, 1, steps - 1, slot + 1, 0)]
    weight_gradient(
        suffix, grad_output, input, grad_weight, [(0, 0, 0, 511, 0, 0, 1, 70)],
        pieces if split else [(0, block, 0, steps, -1, -1)],
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
