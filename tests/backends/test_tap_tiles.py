"""Pixel tiles and tap rectangles: they leave out products with padding, and nothing else.

Convolutions are computed here in NumPy from the lists alone: gather, zero-fill, multiply.
"""

from __future__ import annotations

from itertools import product
from typing import NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from deeplab_fast import _C
from deeplab_fast._native import work_lists

from ..support.tap_tiles import ASPP_OS8, ASPP_OS16, Branch, rows, square


class TileList(NamedTuple):
    pixels: np.ndarray  # (n * H + y) * W + x
    taps: np.ndarray  # dy, dx, branch, index
    tiles: np.ndarray  # output, first_pixel, num_pixels, first_tap, num_taps

    def __iter__(self):
        """Yield (output, pixels, taps) of each tile."""
        for output, pixel, num_pixels, tap, num_taps in self.tiles:
            yield (
                output,
                self.pixels[pixel : pixel + num_pixels],
                self.taps[tap : tap + num_taps],
            )


def tile_list(make, *args) -> TileList:
    pixels, taps, tiles = make(*args)
    return TileList(rows(pixels, 1)[:, 0], rows(taps, 4), rows(tiles, 5))


def branch_taps(branches: list[Branch], sign: int) -> list[tuple[int, int, int, int]]:
    """(dy, dx, branch, index) of every tap, by definition."""
    return [
        (sign * (i - kh // 2) * dh, sign * (j - kw // 2) * dw, b, i * kw + j)
        for b, (kh, kw, dh, dw) in enumerate(branches)
        for i in range(kh)
        for j in range(kw)
    ]


def source(pixels: np.ndarray, H: int, W: int, dy: int, dx: int) -> tuple[np.ndarray, np.ndarray]:
    """Index of the pixel that each pixel's tap reads, and whether it is on the map."""
    y, x = pixels // W % H + dy, pixels % W + dx
    return pixels + dy * W + dx, (y >= 0) & (y < H) & (x >= 0) & (x < W)


def check(tiles: TileList, plane: tuple[int, int, int], outputs, block_m: int) -> None:
    """Assert that each output has each (pixel, tap) on the map once, in full tiles, no tap idle."""
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
DILATIONS = (1, 2, 3, 4, 7, 9)


@pytest.mark.parametrize("kernel", [1, 3, 5, 7])
def test_every_pixel_and_tap_inside_once(kernel):
    for i, (H, W, d) in enumerate(product(SIZES, SIZES, DILATIONS)):
        plane, block_m = (1 + i % 3, H, W), (1, 4, 7, 128)[i % 4]
        branch = square((kernel, d))
        forward = tile_list(_C.schedule.forward_tiles, plane, branch, block_m)
        check(forward, plane, [branch_taps(branch, 1)], block_m)
        backward = tile_list(_C.schedule.input_grad_tiles, plane, branch, block_m)
        check(backward, plane, [branch_taps(branch, -1)], block_m)


CASES = [
    ((1, 1, 1), square((3, 1))),
    ((3, 1, 1), square((1, 1), (7, 5))),
    ((2, 6, 6), square((3, 3))),  # H = 2d
    ((1, 5, 9), square((3, 3))),  # H < 2d
    ((2, 5, 5), square((3, 5), (3, 9))),  # d >= H
    ((1, 1, 40), square((3, 7), (5, 3))),
    ((2, 13, 8), square((5, 3), (1, 1), (3, 4))),
    ((1, 15, 16), square((7, 2), (3, 1))),
    ((2, 9, 12), [(1, 3, 1, 4), (3, 1, 2, 1), (3, 5, 4, 2)]),
    ((1, 20, 14), square((11, 1))),  # 121 taps
    ((1, 33, 33), ASPP_OS16),
    ((2, 33, 33), ASPP_OS8),  # dilation 36 leaves the centre tap
]


@pytest.mark.parametrize("plane,branches", CASES)
@pytest.mark.parametrize("block_m", [16, 128])
def test_parallel_branches(plane, branches, block_m):
    forward = tile_list(_C.schedule.forward_tiles, plane, branches, block_m)
    taps = branch_taps(branches, 1)
    outputs = [[t for t in taps if t[2] == b] for b in range(len(branches))]
    check(forward, plane, outputs, block_m)
    joint = tile_list(_C.schedule.input_grad_tiles, plane, branches, block_m)
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
    forward = tile_list(_C.schedule.forward_tiles, plane, branches)
    ours = convolve(forward, [matrix(x)] * len(branches), by_tap, plane, len(branches))
    for result, y in zip(ours, outputs):
        np.testing.assert_allclose(result, matrix(y), rtol=1e-12, atol=1e-12)

    joint = tile_list(_C.schedule.input_grad_tiles, plane, branches)
    transposed = [w.transpose(0, 2, 1) for w in by_tap]
    (dx,) = convolve(joint, [matrix(g) for g in grads], transposed, plane, 1)
    np.testing.assert_allclose(dx, matrix(x.grad), rtol=1e-12, atol=1e-12)

    dw = [np.full((kh * kw, K, C), np.nan) for kh, kw, _, _ in branches]
    images = x.detach().numpy()
    for dy, dx_, b, index, y0, x0, h, w in rows(_C.schedule.tap_rectangles((H, W), branches), 8):
        grad = grads[b].numpy()[:, :, y0 : y0 + h, x0 : x0 + w]
        image = images[:, :, y0 + dy : y0 + dy + h, x0 + dx_ : x0 + dx_ + w]
        dw[b][index] = np.einsum("nkyx,ncyx->kc", grad, image) if h else 0
    for result, weight, (kh, kw, _, _) in zip(dw, weights, branches):
        expected = weight.grad.permute(2, 3, 0, 1).reshape(kh * kw, K, C).numpy()
        np.testing.assert_allclose(result, expected, rtol=1e-12, atol=1e-12)


def test_tap_rectangles_include_the_empty_ones():
    for H, W, d, kernel in product((1, 2, 5, 8), (1, 3, 8), DILATIONS, (1, 3, 5)):
        got = rows(_C.schedule.tap_rectangles((H, W), square((kernel, d))), 8)
        taps = branch_taps(square((kernel, d)), 1)
        assert [tuple(t) for t in got[:, 2:4]] == [t[2:] for t in taps]
        for (dy, dx, _, _), rectangle in zip(taps, got):
            y, x, h, w = rectangle[4:]
            if abs(dy) >= H or abs(dx) >= W:
                assert h == w == 0
            else:
                assert (h, w) == (H - abs(dy), W - abs(dx))
                assert (y, x) == (max(0, -dy), max(0, -dx))
                assert (rectangle[:2] == (dy, dx)).all()


WGRAD_CASES = [*CASES, ((8, 65, 65), ASPP_OS8)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("num_ctas", [1, 24, 264])
@pytest.mark.parametrize("plane,branches", WGRAD_CASES)
def test_weight_gradient_multiplies_each_tap_and_pixel_once(plane, branches, num_ctas, dtype):
    """Each block of each tap is the sum over the pixels of its rectangle, row by row."""
    (N, H, W), C, out_channels = plane, 264, [136 + 8 * b for b in range(len(branches))]
    _, tensors, num_slots = work_lists.wgrad_work_list(
        plane, tuple(branches), C, tuple(out_channels), dtype, torch.device("cpu"), num_ctas
    )
    rectangles, items, _, _ = (t.numpy().reshape(-1, f) for t, f in zip(tensors, (8, 5, 4, 1)))
    k_iter = _C.CONV_K_ITER_BYTES // dtype.itemsize  # pixels
    assert (np.diff(items[:, 3]) <= 0).all()  # longest first

    everywhere = np.arange(N * H * W)
    taps = branch_taps(branches, 1)
    pieces: dict = {(t, b): [] for t, tap in enumerate(taps) for b in range(2 * 3)}
    for tile, block, first, num_k_iters, slot in items.tolist():
        pieces[tile, block].append((first, num_k_iters, slot))
    for (tile, _), of_block in pieces.items():
        dy, dx, _, _ = taps[tile]
        y, x, h, w = rectangles[tile, 4:].tolist()
        pixels = everywhere.reshape(N, H, W)[:, y : y + h, x : x + w].ravel()
        visited = np.zeros(N * H * W, int)
        for first, num_k_iters, slot in of_block:
            piece = pixels[first * k_iter : (first + num_k_iters) * k_iter]
            assert num_k_iters == -(-len(piece) // k_iter)
            visited[piece] += 1
            assert (slot < 0) == (len(of_block) == 1)
        _, inside = source(everywhere, H, W, dy, dx)
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
    """Ratios include the padding of the last tile. A plain snake gives .701/.785 and .612/.648."""
    plane, three = (1, size, size), branches[1:]
    tiles = tile_list(_C.schedule.forward_tiles, plane, three)
    assert executed_over_dense(tiles, plane, three) <= forward
    tiles = tile_list(_C.schedule.input_grad_tiles, plane, branches)
    assert executed_over_dense(tiles, plane, branches) <= joint


def test_lists_are_repeatable():
    for make in (_C.schedule.forward_tiles, _C.schedule.input_grad_tiles):
        assert make((2, 33, 33), ASPP_OS16) == make((2, 33, 33), ASPP_OS16)


def test_empty_batch():
    for make in (_C.schedule.forward_tiles, _C.schedule.input_grad_tiles):
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
    for make in (_C.schedule.forward_tiles, _C.schedule.input_grad_tiles):
        with pytest.raises(ValueError, match=message):
            make(plane, branches, block_m)


def test_dilations_beyond_int32():
    branches = [(5, 5, 2**31 - 1, 2**31 - 1)]
    tiles = tile_list(_C.schedule.forward_tiles, (1, 4, 4), branches)
    check(tiles, (1, 4, 4), [branch_taps(branches, 1)], 128)


def test_tap_rectangles_bad_input():
    with pytest.raises(ValueError, match="negative"):
        _C.schedule.tap_rectangles((5, -1), [(3, 3, 1, 1)])


@pytest.mark.parametrize(
    ("plane", "branches", "forward", "input_grad", "in_16"),
    [
        ((1, 33, 33), ASPP_OS16, 161, 187, 1172),
        ((1, 65, 65), ASPP_OS8, 573, 591, 4422),
        ((2, 33, 33), square((3, 12)), 96, 96, 713),
        ((1, 20, 14), square((11, 1)), 318, 318, 1737),
        ((2, 13, 8), square((5, 3), (1, 1), (3, 4)), 56, 64, 225),
    ],
)
def test_taps_of_tiles(plane, branches, forward, input_grad, in_16):
    """At most as many as when this was written; never less than the pixels need."""

    def count(make, block_m: int) -> int:
        _, _, tiles = make(plane, branches, block_m)
        return int(rows(tiles, 5)[:, 4].sum())

    N, H, W = plane
    inside = sum(
        max(0, H - abs(i - r // 2) * dy) * max(0, W - abs(j - s // 2) * dx) * N
        for r, s, dy, dx in branches
        for i in range(r)
        for j in range(s)
    )
    for make, block_m, bound in (
        (_C.schedule.forward_tiles, 128, forward),
        (_C.schedule.input_grad_tiles, 128, input_grad),
        (_C.schedule.forward_tiles, 16, in_16),
    ):
        assert -(-inside // block_m) <= count(make, block_m) <= bound


def test_pixels_of_all_branches_fit_int32_together():
    with pytest.raises(ValueError, match="2\\^31"):
        _C.schedule.forward_tiles((1, 2**15, 2**15), square((1, 1)) * 2, 128)
