"""The sm_90 weight-gradient kernel, run by the emulator of such a device."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from deeplab_fast import _C
from deeplab_fast._native import work_lists
from deeplab_fast._native.common import LaunchContext
from deeplab_fast.backends.cuda import dilated_conv2d_backward

from ..ops.test_dilated_conv2d_backward import emulated_gradients, gradients, reference, tensors_of
from ..support import emulator
from ..support.cases import assert_as_accurate_as
from ..support.emulator import machine

DTYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
# One cluster computes whole output tiles; six clusters split them along k.
NUM_CTAS = pytest.mark.parametrize("num_ctas", [1, 24])
CPU = torch.device("cpu")

# (input, [(K, R, S)], dilations): channels past the ends of chunks, of a CTA's channels and of an
# output tile; branches that begin within a chunk; boxes over every edge of a rectangle and past the
# last image; taps that are never inside; work items that begin in a later image.
CASES = [
    ((1, 8, 1, 1), [(8, 3, 3)], [1]),
    ((2, 8, 11, 1), [(8, 3, 3)], [2]),
    ((5, 8, 1, 3), [(8, 3, 3), (16, 1, 1)], [2, 1]),
    ((2, 40, 7, 9), [(24, 3, 3), (8, 1, 1), (72, 3, 5)], [3, 1, 20]),
    ((1, 72, 9, 9), [(133, 1, 3)], [2]),
    ((1, 264, 5, 4), [(8, 1, 1)], [1]),
    ((1, 8, 6, 5), [(264, 1, 1), (8, 1, 1)], [1, 1]),
    ((1300, 8, 1, 1), [(8, 1, 1)], [1]),
    ((8, 8, 17, 13), [(136, 1, 1)], [1]),
]


def weight_gradients(
    input: Tensor, weights: list[Tensor], grad_output: Tensor, rates, num_ctas: int, seed: int
) -> list[Tensor]:
    kernels = LaunchContext(emulator.load().cuda, 0, num_ctas, is_sm90=True)
    rates = [(rate, rate) for rate in rates]
    with machine(seed, "sm_90"):
        return dilated_conv2d_backward.backward(
            kernels, grad_output, input, weights, rates, [False, True, False]
        )[1]


def expected_gradients(*tensors) -> list[Tensor]:
    return gradients(reference, *tensors)[1 : 1 + len(tensors[1])]


@NUM_CTAS
@DTYPES
@pytest.mark.parametrize(("shape", "kernels", "rates"), CASES)
def test_seeds_agree(shape, kernels, rates, dtype, num_ctas):
    input, weights, grad_output = tensors_of(shape, kernels, dtype)
    args = input, weights, grad_output, rates
    results = [weight_gradients(*args, num_ctas, seed) for seed in range(3)]
    exact = expected_gradients(
        input.double(), [w.double() for w in weights], grad_output.double(), rates
    )
    for a, p, e in zip(results[0], expected_gradients(*args), exact, strict=True):
        assert_as_accurate_as(a, p, e)
    for result in results[1:]:
        assert all(map(torch.equal, result, results[0]))


def test_some_output_tiles_are_split():
    """Otherwise test_seeds_agree would not run the split-K reduction."""
    (N, C, H, W), [(K, R, S)], [rate] = CASES[-1]
    arguments = (N, H, W), ((R, S, rate, rate),), C, (K,), torch.bfloat16, CPU
    slots = [
        work_lists.wgrad_work_list(*arguments, n, work_lists.WGRAD_SM90).num_slots for n in (1, 24)
    ]
    assert slots[0] == 0 and slots[1] > 2


def test_box_items_match_work_items_and_rectangles():
    """Rows that the kernel reads equal the work items and rectangles they combine."""
    N, H, W = plane = 40, 9, 21
    work_list = work_lists.wgrad_work_list(
        plane, ((1, 3, 1, 2), (1, 1, 1, 1)), 264, (264, 8), torch.bfloat16, CPU, 36,
        work_lists.WGRAD_SM90,
    )  # fmt: skip
    rectangles, items, _, _, box_items = work_list.tensors
    box_x, box_y, box_n = work_lists.best_box(
        N, [(h, w) for *_, h, w in rectangles.view(-1, 8).tolist()], _C.WGRAD_BOX_SM90
    )
    starts = set()
    for row, item in zip(box_items.tolist(), items.view(-1, 5).tolist(), strict=True):
        tile, block, first_k_iter, num_k_iters, slot = item
        dy, dx, branch, index, y, x, h, w = rectangles.view(-1, 8)[tile].tolist()
        boxes = [
            (box_row, column, n)
            for n in range(0, N + 2 * box_n, box_n)
            for box_row in range(-(-h // box_y))
            for column in range(-(-w // box_x))
        ]
        starts.add(boxes[2 * first_k_iter])
        rows, columns = boxes[-1][0] + 1, boxes[-1][1] + 1
        assert row == [
            slot, num_k_iters, branch, index, block // 2 * 256, block % 2 * 256, dy, dx, y, x,
            rows, columns, *boxes[2 * first_k_iter], 0,
        ]  # fmt: skip
    assert box_n < N and all(max(values) > 0 for values in zip(*starts))


def test_pipeline_on_more_seeds():
    """Several work items for one cluster and two, each with several rounds of the pipeline."""
    args = *tensors_of((2, 8, 16, 17), [(8, 3, 3)], torch.bfloat16), [1]
    results = [weight_gradients(*args, n, seed)[0] for n in (4, 8) for seed in range(6)]
    assert all(torch.equal(result, results[0]) for result in results[1:])
    torch.testing.assert_close(results[0], expected_gradients(*args)[0], rtol=2e-2, atol=2e-2)


@DTYPES
def test_backward(dtype):
    """Both gradients through the op, for slices of channels, 7 of which are padded to 8."""
    input, weights, grad_output = tensors_of((2, 24, 6, 7), [(7, 3, 3), (16, 1, 1)], dtype)
    args = input[:, 8:], [w[:, 8:] for w in weights], grad_output, [2, 1]
    before = emulator.load().launch_counts()
    results = emulated_gradients(*args, device="sm_90")
    after = emulator.load().launch_counts()
    name = "dilated_conv2d_wgrad_kernel"
    assert after["dilated_conv2d_wgrad_sm90_kernel"] > before.get(name.replace("_k", "_sm90_k"), 0)
    assert after.get(name, 0) == before.get(name, 0)
    exact = gradients(
        reference, args[0].double(), [w.double() for w in args[1]], grad_output.double(), [2, 1]
    )
    for a, p, e in zip(results, gradients(reference, *args), exact, strict=True):
        assert_as_accurate_as(a, p, e)


def between_nans(tensor: Tensor) -> Tensor:
    """Copy of the tensor within a buffer that holds NaN before and after it."""
    buffer = torch.full((tensor.numel() + 2 * 4096,), float("nan"), dtype=tensor.dtype)
    inside = buffer[4096:-4096].view(tensor.permute(0, 2, 3, 1).shape).permute(0, 3, 1, 2)
    return inside.copy_(tensor)


@NUM_CTAS
def test_reads_only_its_own_channels(num_ctas):
    """No element outside the tensors is read, and none of one branch for another."""
    kernels, rates = [(8, 3, 3), (16, 3, 1), (8, 1, 1)], [2, 9, 1]
    input, weights, grad_output = tensors_of((3, 8, 7, 5), kernels, torch.bfloat16)
    args = input, weights, grad_output, rates
    expected = weight_gradients(*args, num_ctas, 0)
    grad_output[:, 8:24] = float("nan")
    results = weight_gradients(
        between_nans(input), weights, between_nans(grad_output), rates, num_ctas, 1
    )
    assert torch.equal(results[0], expected[0]) and torch.equal(results[2], expected[2])
    inside = results[1].isnan()
    assert (
        inside[:, :, 1].all() and not inside[:, :, [0, 2]].any()
    )  # taps that are never inside: zeros


@pytest.mark.parametrize(
    ("plane", "branches"),
    [
        ((3, 7, 19), [(3, 3, 2, 5)]),
        ((8, 9, 9), [(1, 1, 1, 1), (3, 3, 3, 3), (3, 5, 9, 4)]),
        ((1, 1, 1), [(3, 3, 1, 1)]),
    ],
)
def test_boxes_cover_each_pixel_once(plane, branches):
    """Boxes contain each pixel once, and no other pixel where both operands are inside the map."""
    N, H, W = plane
    arguments = plane, tuple(branches), 8, (8,) * len(branches), torch.bfloat16, CPU, 4
    work_list = work_lists.wgrad_work_list(*arguments, work_lists.WGRAD_SM90)
    rows = work_list.tensors[0].view(-1, 8).tolist()
    x, y, n = work_lists.best_box(N, [(h, w) for *_, h, w in rows], _C.WGRAD_BOX_SM90)
    assert x * y * n == _C.WGRAD_BOX_SM90
    for dy, dx, _, _, first_y, first_x, h, w in rows:
        size = -(-N // n) * n, -(-h // y) * y, -(-w // x) * x
        assert np.prod(size) == work_lists.num_boxes((x, y, n), N, h, w) * _C.WGRAD_BOX_SM90
        image, row, column = np.indices(size)
        row, column = row + first_y, column + first_x
        has_grad = (image < N) & (row < H) & (column < W)
        has_input = (image < N) & (row + dy >= 0) & (row + dy < H)
        has_input &= (column + dx >= 0) & (column + dx < W)
        assert np.count_nonzero(has_grad & has_input) == N * h * w


def test_boxes_fit_the_shape():
    """For VOC at output stride 8 and batch 8, boxes have 4 % more pixels than rectangles."""
    sizes = [
        (65 - abs(y), 65 - abs(x)) for r in (12, 24, 36) for y in (-r, 0, r) for x in (-r, 0, r)
    ]
    box = work_lists.best_box(8, sizes, 32)
    assert box == (2, 2, 8)
    pixels = 32 * sum(work_lists.num_boxes(box, 8, *size) for size in sizes)
    assert 1.04 < pixels / sum(8 * h * w for h, w in sizes) < 1.05


def test_fp32_uses_the_sm80_kernel():
    kernels = LaunchContext(emulator.load().cuda, 0, 4, is_sm90=True)
    assert work_lists.wgrad_kernel(kernels, torch.float32) is work_lists.WGRAD_SM80
    assert work_lists.wgrad_kernel(kernels, torch.float16) is work_lists.WGRAD_SM90
