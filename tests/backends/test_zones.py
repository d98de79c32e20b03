"""The work lists of dilated convolution (csrc/schedule/zones.h): what they leave out and what not.

Convolutions are computed here in NumPy from the lists alone: gather, zero-fill, multiply.
"""

from __future__ import annotations

import heapq
from itertools import product
from typing import NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from deeplab_fast import _C
from deeplab_fast._native import work_lists

Branch = tuple[int, int, int, int]  # kernel_H, kernel_W, dilation_H, dilation_W


class TileList(NamedTuple):
    pixels: np.ndarray  # (n * H + y) * W + x
    taps: np.ndarray  # dy, dx, branch, index
    tiles: np.ndarray  # output, first_pixel, num_pixels, first_tap, num_taps

    def __iter__(self):  # (output, pixels, taps) of each tile
        for output, pixel, num_pixels, tap, num_taps in self.tiles:
            yield (
                output,
                self.pixels[pixel : pixel + num_pixels],
                self.taps[tap : tap + num_taps],
            )


def rows(buffer: bytearray, fields: int) -> np.ndarray:
    return np.frombuffer(buffer, np.int32).reshape(-1, fields).astype(np.int64)


def tile_list(make, *args) -> TileList:
    pixels, taps, tiles = make(*args)
    return TileList(rows(pixels, 1)[:, 0], rows(taps, 4), rows(tiles, 5))


def square(*kernels_and_rates: tuple[int, int]) -> list[Branch]:
    return [(k, k, r, r) for k, r in kernels_and_rates]


ASPP_OS16 = square((1, 1), (3, 6), (3, 12), (3, 18))
ASPP_OS8 = square((1, 1), (3, 12), (3, 24), (3, 36))


def branch_taps(branches: list[Branch], sign: int) -> list[tuple[int, int, int, int]]:
    """(dy, dx, branch, index), by definition."""
    return [
        (sign * (i - kh // 2) * dh, sign * (j - kw // 2) * dw, b, i * kw + j)
        for b, (kh, kw, dh, dw) in enumerate(branches)
        for i in range(kh)
        for j in range(kw)
    ]


def source(pixels: np.ndarray, H: int, W: int, dy: int, dx: int) -> tuple[np.ndarray, np.ndarray]:
    """Index of the pixel each tap reads, and whether it is on the map."""
    y, x = pixels // W % H + dy, pixels % W + dx
    return pixels + dy * W + dx, (y >= 0) & (y < H) & (x >= 0) & (x < W)


def check(tiles: TileList, plane: tuple[int, int, int], outputs, block_m: int) -> None:
    """Each output does each in-image (pixel, tap) once, in full tiles without idle taps."""
    N, H, W = plane
    num_pixels = N * H * W
    assert len(tiles.pixels) == len(outputs) * num_pixels
    assert (tiles.tiles[:, 1] == np.r_[0, np.cumsum(tiles.tiles[:, 2])[:-1]]).all()
    counts = [np.zeros((num_pixels, len(taps)), int) for taps in outputs]
    listed = [np.zeros(num_pixels, int) for _ in outputs]
    full: list[list[bool]] = [[] for _ in outputs]
    columns = [{tap[2:]: i for i, tap in enumerate(taps)} for taps in outputs]
    for output, pixels, taps in tiles:
        listed[output][pixels] += 1
        full[output].append(len(pixels) == block_m)
        for dy, dx, branch, index in taps.tolist():
            column = columns[output][branch, index]
            assert outputs[output][column][:2] == (dy, dx)
            _, inside = source(pixels, H, W, dy, dx)
            assert inside.any()
            counts[output][pixels, column] += inside
    everywhere = np.arange(num_pixels)
    for output, taps in enumerate(outputs):
        assert (listed[output] == 1).all()
        assert all(full[output][:-1])
        inside = [source(everywhere, H, W, dy, dx)[1] for dy, dx, _, _ in taps]
        assert (counts[output] == np.stack(inside, 1)).all()


SIZES = (1, 2, 3, 5, 6, 8)
RATES = (1, 2, 3, 4, 7, 9)


@pytest.mark.parametrize("kernel", [1, 3, 5, 7])
def test_every_pixel_and_tap_inside_once(kernel):
    for i, (H, W, r) in enumerate(product(SIZES, SIZES, RATES)):
        plane, block_m = (1 + i % 3, H, W), (1, 4, 7, 128)[i % 4]
        branch = square((kernel, r))
        forward = tile_list(_C.zones.forward_tiles, plane, branch, block_m)
        check(forward, plane, [branch_taps(branch, 1)], block_m)
        backward = tile_list(_C.zones.input_grad_tiles, plane, branch, block_m)
        check(backward, plane, [branch_taps(branch, -1)], block_m)


CASES = [
    ((1, 1, 1), square((3, 1))),
    ((3, 1, 1), square((1, 1), (7, 5))),
    ((2, 6, 6), square((3, 3))),  # H = 2r
    ((1, 5, 9), square((3, 3))),  # H < 2r
    ((2, 5, 5), square((3, 5), (3, 9))),  # r >= H
    ((1, 1, 40), square((3, 7), (5, 3))),
    ((2, 13, 8), square((5, 3), (1, 1), (3, 4))),
    ((1, 15, 16), square((7, 2), (3, 1))),
    ((2, 9, 12), [(1, 3, 1, 4), (3, 1, 2, 1), (3, 5, 4, 2)]),
    ((1, 20, 14), square((11, 1))),  # 121 taps
    ((1, 33, 33), ASPP_OS16),
    ((2, 33, 33), ASPP_OS8),  # rate 36 leaves the centre tap
]


@pytest.mark.parametrize("plane,branches", CASES)
@pytest.mark.parametrize("block_m", [16, 128])
def test_parallel_branches(plane, branches, block_m):
    forward = tile_list(_C.zones.forward_tiles, plane, branches, block_m)
    taps = branch_taps(branches, 1)
    outputs = [[t for t in taps if t[2] == b] for b in range(len(branches))]
    check(forward, plane, outputs, block_m)
    joint = tile_list(_C.zones.input_grad_tiles, plane, branches, block_m)
    check(joint, plane, [branch_taps(branches, -1)], block_m)


def convolve(tiles: TileList, images: list, weights: list, plane, num_outputs: int) -> list:
    """Sums over each tile's taps of images[branch] @ weights[branch][index], as a kernel would."""
    _, H, W = plane
    results = [
        np.full((len(images[0]), weights[o][0].shape[1]), np.nan) for o in range(num_outputs)
    ]
    for output, pixels, taps in tiles:
        total = np.zeros((len(pixels), results[output].shape[1]))
        for dy, dx, branch, index in taps:
            read, inside = source(pixels, H, W, dy, dx)
            rows = images[branch][np.where(inside, read, 0)]
            total += np.where(inside[:, None], rows, 0) @ weights[branch][index]
        results[output][pixels] = total
    return results


@pytest.mark.parametrize("plane,branches", CASES)
def test_convolution_and_its_gradients_from_the_lists(plane, branches):
    (N, H, W), C, K = plane, 3, 2
    x = torch.randn(N, C, H, W, dtype=torch.float64, requires_grad=True)
    weights = [
        torch.randn(K, C, kh, kw, dtype=torch.float64, requires_grad=True)
        for kh, kw, _, _ in branches
    ]
    outputs = [
        F.conv2d(x, w, padding=(kh // 2 * dh, kw // 2 * dw), dilation=(dh, dw))
        for w, (kh, kw, dh, dw) in zip(weights, branches)
    ]
    grads = [torch.randn_like(y) for y in outputs]
    torch.autograd.backward(outputs, grads)

    def matrix(image):  # [N, C, H, W] -> [pixels, C]
        return image.detach().permute(0, 2, 3, 1).reshape(N * H * W, -1).numpy()

    by_tap = [w.detach().permute(2, 3, 1, 0).reshape(-1, C, K).numpy() for w in weights]
    forward = tile_list(_C.zones.forward_tiles, plane, branches)
    ours = convolve(forward, [matrix(x)] * len(branches), by_tap, plane, len(branches))
    for result, y in zip(ours, outputs):
        np.testing.assert_allclose(result, matrix(y), rtol=1e-12, atol=1e-12)

    joint = tile_list(_C.zones.input_grad_tiles, plane, branches)
    transposed = [w.transpose(0, 2, 1) for w in by_tap]
    (dx,) = convolve(joint, [matrix(g) for g in grads], transposed, plane, 1)
    np.testing.assert_allclose(dx, matrix(x.grad), rtol=1e-12, atol=1e-12)

    dw = [np.full((kh * kw, K, C), np.nan) for kh, kw, _, _ in branches]
    images = x.detach().numpy()
    for dy, dx_, b, index, y0, x0, h, w in rows(_C.zones.tap_rectangles((H, W), branches), 8):
        grad = grads[b].numpy()[:, :, y0 : y0 + h, x0 : x0 + w]
        image = images[:, :, y0 + dy : y0 + dy + h, x0 + dx_ : x0 + dx_ + w]
        dw[b][index] = np.einsum("nkyx,ncyx->kc", grad, image) if h else 0
    for result, weight, (kh, kw, _, _) in zip(dw, weights, branches):
        expected = weight.grad.permute(2, 3, 0, 1).reshape(kh * kw, K, C).numpy()
        np.testing.assert_allclose(result, expected, rtol=1e-12, atol=1e-12)


def test_tap_rectangles_include_the_empty_ones():
    for H, W, r, kernel in product((1, 2, 5, 8), (1, 3, 8), RATES, (1, 3, 5)):
        got = rows(_C.zones.tap_rectangles((H, W), square((kernel, r))), 8)
        taps = branch_taps(square((kernel, r)), 1)
        assert [tuple(t) for t in got[:, 2:4]] == [t[2:] for t in taps]
        for (dy, dx, _, _), rectangle in zip(taps, got):
            y, x, h, w = rectangle[4:]
            if abs(dy) >= H or abs(dx) >= W:
                assert h == w == 0
            else:
                assert (h, w) == (H - abs(dy), W - abs(dx))
                assert (y, x) == (max(0, -dy), max(0, -dx))
                assert (rectangle[:2] == (dy, dx)).all()


def test_walks_visit_each_pixel_of_a_rectangle_once():
    N = 3
    for H, W, r in product((1, 2, 5, 8), (1, 3, 8), (1, 2, 4)):
        everywhere = np.arange(N * H * W).reshape(N, H, W)
        for *_, y, x, h, w in rows(_C.zones.tap_rectangles((H, W), square((3, r))), 8).tolist():
            if h == 0:
                continue
            expected = everywhere[:, y : y + h, x : x + w].ravel()
            for step in (1, 2, 7, 16, 32, 200):
                for first in range(min(step, len(expected))):
                    walk = _C.zones.rectangle_walk(
                        (H, W), (y, x, h, w), first, step, -(-(len(expected) - first) // step)
                    )
                    assert (rows(walk, 1)[:, 0] == expected[first::step]).all()


WGRAD_CASES = [*CASES, ((8, 65, 65), ASPP_OS8)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("num_workers", [1, 24, 264])
@pytest.mark.parametrize("plane,branches", WGRAD_CASES)
def test_weight_gradient_multiplies_each_tap_and_pixel_once(plane, branches, num_workers, dtype):
    """Each block of each tap is the sum over the rectangle, as its pieces walk through it."""
    (N, H, W), C, out_channels = plane, 264, [136 + 8 * b for b in range(len(branches))]
    _, tensors, num_slots, _ = work_lists.wgrad_work_list(
        plane, tuple(branches), C, tuple(out_channels), dtype, torch.device("cpu"), num_workers
    )
    rectangles, items, _, _ = (t.numpy().reshape(-1, f) for t, f in zip(tensors, (8, 6, 4, 1)))
    step = _C.CONV_STEP_BYTES // dtype.itemsize
    assert (np.diff(items[:, 3]) <= 0).all()  # longest first

    taps = branch_taps(branches, 1)
    pieces: dict = {(j, b): [] for j, tap in enumerate(taps) for b in range(2 * 3)}
    for job, block, first, steps, slot, _ in items.tolist():
        pieces[job, block].append((first, steps, slot))
    for (job, _), of_block in pieces.items():
        dy, dx, _, _ = taps[job]
        y, x, h, w = rectangles[job, 4:].tolist()
        visited = np.zeros(N * H * W, int)
        for first, steps, slot in of_block:
            count = min(steps * step, N * h * w - first * step)
            assert steps == -(-count // step)
            if count:
                walk = _C.zones.rectangle_walk((H, W), (y, x, h, w), first * step, 1, count)
                visited[rows(walk, 1)[:, 0]] += 1
            assert (slot < 0) == (len(of_block) == 1)
        _, inside = source(np.arange(N * H * W), H, W, dy, dx)
        assert (visited == inside).all()
    slots = sorted(slot for ps in pieces.values() for _, _, slot in ps if slot >= 0)
    assert slots == list(range(num_slots))


def executed_over_dense(tiles: TileList, plane, branches, block_m=128) -> float:
    dense = np.prod(plane) * sum(kh * kw for kh, kw, _, _ in branches)
    return tiles.tiles[:, 4].sum() * block_m / dense


@pytest.mark.parametrize(
    "size,branches,forward,joint",
    [(33, ASPP_OS16, 0.662, 0.785), (65, ASPP_OS8, 0.605, 0.640)],
)
def test_executed_products(size, branches, forward, joint):
    """Counting the padding of the last tile. A plain snake gives .701/.785 and .612/.648."""
    plane, three = (1, size, size), branches[1:]
    tiles = tile_list(_C.zones.forward_tiles, plane, three)
    assert executed_over_dense(tiles, plane, three) <= forward
    tiles = tile_list(_C.zones.input_grad_tiles, plane, branches)
    assert executed_over_dense(tiles, plane, branches) <= joint


def test_lists_are_repeatable():
    for make in (_C.zones.forward_tiles, _C.zones.input_grad_tiles):
        assert make((2, 33, 33), ASPP_OS16) == make((2, 33, 33), ASPP_OS16)


def test_empty_batch():
    for make in (_C.zones.forward_tiles, _C.zones.input_grad_tiles):
        assert make((0, 5, 5), ASPP_OS16) == (b"", b"", b"")


@pytest.mark.parametrize(
    "plane,branches,block_m,message",
    [
        ((1, 5, 5), [(2, 3, 1, 1)], 128, "odd"),
        ((1, 5, 5), [(3, 3, 0, 1)], 128, "dilation"),
        ((1, -5, 5), [(3, 3, 1, 1)], 128, "negative"),
        ((1, 5, 5), [(3, 3, 1, 1)], 0, "block_m"),
        ((32, 8192, 8192), [(3, 3, 1, 1)], 128, "2\\^31"),
        ((1, 200, 200), [(399, 399, 1, 1)], 128, "too many taps"),
    ],
)
def test_bad_input(plane, branches, block_m, message):
    for make in (_C.zones.forward_tiles, _C.zones.input_grad_tiles):
        with pytest.raises(ValueError, match=message):
            make(plane, branches, block_m)


def test_rates_beyond_int32():
    branches = [(5, 5, 2**31 - 1, 2**31 - 1)]
    tiles = tile_list(_C.zones.forward_tiles, (1, 4, 4), branches)
    check(tiles, (1, 4, 4), [branch_taps(branches, 1)], 128)


def schedule(jobs, num_workers, split_overhead=8):
    result = _C.zones.schedule(jobs, num_workers, split_overhead)
    return (
        rows(result["items"], 6),
        rows(result["reductions"], 4),
        result["num_slots"],
        result["makespan"],
    )


def aspp_jobs(size: int, N: int) -> list[tuple[int, int]]:
    branches = ASPP_OS16 if size == 33 else ASPP_OS8
    tiles = tile_list(_C.zones.forward_tiles, (N, size, size), branches)
    return [(num_taps * 64, 2) for num_taps in tiles.tiles[:, 4].tolist()]  # 2048 / 32, 256 / 128


JOBS = {
    "none": [],
    "nothing to add": [(0, 3)],
    "one": [(1000, 1)],
    "no blocks": [(10, 0), (7, 2)],
    "mixed": [(0, 2), (1, 1), (977, 3), (64, 5), (65, 1)],
    "33x33": aspp_jobs(33, 1),
    "65x65": aspp_jobs(65, 1),
    "33x33, 8 images": aspp_jobs(33, 8),
}


@pytest.mark.parametrize("jobs", JOBS.values(), ids=JOBS)
@pytest.mark.parametrize("num_workers", [1, 7, 132])
def test_schedule_adds_every_step_once_in_a_fixed_order(jobs, num_workers):
    items, reductions, num_slots, makespan = schedule(jobs, num_workers)
    assert (np.diff(items[:, 3]) <= 0).all()  # longest first

    ranges: dict = {(j, b): [] for j, (_, blocks) in enumerate(jobs) for b in range(blocks)}
    for job, block, first, steps, slot, reduction in items.tolist():
        ranges[job, block].append((first, steps, slot, reduction))
    used_slots = []
    for (job, block), pieces in ranges.items():
        pieces.sort()
        assert [first for first, *_ in pieces] == [
            sum(p[1] for p in pieces[:i]) for i in range(len(pieces))
        ]
        assert sum(steps for _, steps, *_ in pieces) == jobs[job][0]
        if len(pieces) == 1:
            assert pieces[0][2:] == (-1, -1)
            continue
        (reduction,) = {p[3] for p in pieces}
        first_slot = pieces[0][2]
        assert reductions[reduction].tolist() == [job, block, first_slot, len(pieces)]
        assert [p[2] for p in pieces] == list(range(first_slot, first_slot + len(pieces)))
        assert all(steps > 0 for _, steps, *_ in pieces)
        used_slots += [p[2] for p in pieces]
    assert sorted(used_slots) == list(range(num_slots))

    loads = [0] * num_workers
    for *_, steps, slot, _ in items.tolist():
        heapq.heapreplace(loads, loads[0] + steps + (8 if slot >= 0 else 0))
    assert makespan == max(loads)
    assert schedule(jobs, num_workers)[0].tolist() == items.tolist()


def test_small_problems_are_split_and_large_ones_are_not():
    def imbalance(jobs, num_workers=132):
        _, _, num_slots, makespan = schedule(jobs, num_workers)
        return num_slots, makespan * num_workers / sum(steps * blocks for steps, blocks in jobs)

    num_slots, ratio = imbalance(JOBS["33x33"])  # 72 sums for 132 workers
    assert num_slots > 0 and ratio < 1.2
    num_slots, ratio = imbalance(JOBS["65x65"])
    assert num_slots > 0 and ratio < 1.1
    num_slots, ratio = imbalance(JOBS["33x33, 8 images"])
    assert num_slots == 0 and ratio < 1.05
    assert imbalance(JOBS["33x33"], num_workers=1) == (0, 1)


def test_a_sum_that_does_not_fit_a_worker_goes_on_with_the_next():
    items, reductions, num_slots, makespan = schedule([(100, 1)] * 3, num_workers=2)
    assert len(items) == 4 and len(reductions) == 1 and num_slots == 2
    assert makespan < 160  # a piece costs 8: 158 at best, and 174 if all three were halved


def test_tap_rectangles_bad_input():
    with pytest.raises(ValueError, match="negative"):
        _C.zones.tap_rectangles((5, -1), [(3, 3, 1, 1)])


@pytest.mark.parametrize("jobs", JOBS.values(), ids=JOBS)
def test_every_item_costs_its_overhead(jobs):
    result = _C.zones.schedule(jobs, 7, 8, item_overhead=5)
    loads = [0] * 7
    for *_, steps, slot, _ in rows(result["items"], 6).tolist():
        heapq.heapreplace(loads, loads[0] + steps + 5 + (8 if slot >= 0 else 0))
    assert result["makespan"] == max(loads)


def test_items_that_cost_more_than_they_save_are_not_made():
    """A sum of 40 steps in two pieces takes 20 + 8 without an overhead, 20 + 8 + 30 with it."""
    assert _C.zones.schedule([(40, 1)], 2, 8)["makespan"] == 28
    result = _C.zones.schedule([(40, 1), (0, 1)], 2, 8, item_overhead=30)
    assert (result["num_slots"], result["makespan"]) == (0, 70)


@pytest.mark.parametrize(
    "jobs,num_workers,overheads,message",
    [
        ([(1, 1)], 0, (8, 0), "num_workers"),
        ([(1, 1)], 1, (-1, 0), "split"),
        ([(1, 1)], 1, (8, -1), "item_overhead"),
        ([(-1, 1)], 1, (8, 0), "steps"),
    ],
)
def test_bad_schedule(jobs, num_workers, overheads, message):
    with pytest.raises(ValueError, match=message):
        _C.zones.schedule(jobs, num_workers, *overheads)
