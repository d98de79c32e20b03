"""How good the work lists are: bounds that a search or a rule which was broken would exceed."""

from __future__ import annotations

import numpy as np
import pytest

from deeplab_fast import _C


def schedule(jobs, num_workers: int, split_overhead: int = 8) -> tuple[int, int]:
    result = _C.zones.schedule(jobs, num_workers, split_overhead)
    return result["num_slots"], result["makespan"]


@pytest.mark.parametrize(
    ("jobs", "num_workers", "makespan"),
    [
        ([(1000, 1)], 7, 151),  # equal pieces
        ([(1000, 1)], 132, 16),
        ([(977, 3), (64, 5), (65, 1)], 7, 488),
        ([(977, 3), (64, 5), (65, 1)], 132, 34),
        ([(100, 1)] * 3, 2, 159),  # a sum that goes on with the next worker
        ([(72, 4)] * 18, 132, 55),
        ([(36, 1)] * 5, 4, 57),
        ([(60, 2), (10, 9)], 4, 60),
    ],
)
def test_makespans(jobs, num_workers, makespan):
    """At most what was found when this was written; never less than a worker's share."""
    total = sum(steps * blocks for steps, blocks in jobs)
    assert -(-total // num_workers) <= schedule(jobs, num_workers)[1] <= makespan


@pytest.mark.parametrize(
    ("jobs", "num_workers", "makespan"),
    [
        ([(100, 1)] * 3, 2, 162),  # one sum in two pieces
        ([(72, 4)] * 18, 66, 98),
        ([(20, 1)] * 7, 3, 64),
        ([(27, 3), (30, 1), (53, 2), (30, 1)], 4, 79),  # 82 where pieces of a few steps are cut
    ],
)
def test_makespans_of_items_with_an_overhead(jobs, num_workers, makespan):
    total = sum((steps + 2) * blocks for steps, blocks in jobs)
    result = _C.zones.schedule(jobs, num_workers, 8, item_overhead=2)
    assert -(-total // num_workers) <= result["makespan"] <= makespan


def test_sums_are_split_for_one_percent_or_more():
    """Partial sums take memory and a second launch."""
    num_slots, makespan = schedule([(1813, 1), (1792, 1)], 2, split_overhead=0)
    assert (num_slots, makespan) == (0, 1813)  # 0.6 % more than a half
    num_slots, makespan = schedule([(1000, 1), (960, 1)], 2, split_overhead=0)
    assert num_slots > 0 and makespan < 990


def test_every_slot_has_its_piece_and_no_worker_far_more_than_its_share():
    for steps in range(1, 60):
        for num_workers in (2, 3, 8):
            result = _C.zones.schedule([(steps, 1), (17, 2)], num_workers, 8)
            items = np.frombuffer(result["items"], np.int32).reshape(-1, 6)
            pieces = items[items[:, 4] >= 0, 3]
            whole = items[items[:, 4] < 0, 3]
            assert len(pieces) == result["num_slots"] and len(whole) + len(pieces) == len(items)
            assert result["makespan"] <= max(steps, 17, -(-(steps + 34) // num_workers) + 17)


def square(*kernels_and_rates: tuple[int, int]) -> list[tuple[int, int, int, int]]:
    return [(k, k, r, r) for k, r in kernels_and_rates]


@pytest.mark.parametrize(
    ("plane", "branches", "forward", "input_grad", "in_16"),
    [
        ((1, 33, 33), square((1, 1), (3, 6), (3, 12), (3, 18)), 161, 187, 1172),
        ((1, 65, 65), square((1, 1), (3, 12), (3, 24), (3, 36)), 573, 591, 4422),
        ((2, 33, 33), square((3, 12)), 96, 96, 713),
        ((1, 20, 14), square((11, 1)), 318, 318, 1737),
        ((2, 13, 8), square((5, 3), (1, 1), (3, 4)), 56, 64, 225),
    ],
)
def test_taps_of_tiles(plane, branches, forward, input_grad, in_16):
    """At most as many as were found when this was written; never less than pixels need."""

    def count(make, block_m: int) -> int:
        _, _, tiles = make(plane, branches, block_m)
        return int(np.frombuffer(tiles, np.int32).reshape(-1, 5)[:, 4].sum())

    N, H, W = plane
    inside = sum(
        max(0, H - abs(i - r // 2) * dy) * max(0, W - abs(j - s // 2) * dx) * N
        for r, s, dy, dx in branches
        for i in range(r)
        for j in range(s)
    )
    for make, block_m, bound in (
        (_C.zones.forward_tiles, 128, forward),
        (_C.zones.input_grad_tiles, 128, input_grad),
        (_C.zones.forward_tiles, 16, in_16),
    ):
        assert -(-inside // block_m) <= count(make, block_m) <= bound


def test_pixels_of_all_branches_fit_int32_together():
    with pytest.raises(ValueError, match="2\\^31"):
        _C.zones.forward_tiles((1, 2**15, 2**15), square((1, 1)) * 2, 128)
