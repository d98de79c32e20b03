"""Split-K: every k-iteration is computed once, and CTAs finish about evenly.

Upper bounds of a makespan are what split_k reached when the test was written: a change of the
search or of a rule that makes the distribution worse exceeds them.
"""

from __future__ import annotations

import heapq
from typing import NamedTuple

import numpy as np
import pytest

from deeplab_fast import _C

from ..support.tap_tiles import ASPP_OS8, ASPP_OS16, rows

Tiles = list[tuple[int, int]]  # k-iterations and channel blocks of each pixel tile


class WorkList(NamedTuple):
    work_items: np.ndarray  # tile, block, first_k_iter, num_k_iters, slot
    reductions: np.ndarray  # tile, block, first_slot, num_slots
    num_slots: int
    loads: np.ndarray  # [num_ctas], in k-iterations, with the costs of splits and items

    @property
    def makespan(self) -> int:
        return max(self.loads)


def split_k(tiles: Tiles, num_ctas: int, split_cost: int = 8, item_cost: int = 0) -> WorkList:
    result = _C.schedule.split_k(tiles, num_ctas, split_cost, item_cost)
    items, ctas = rows(result["work_items"], 5), rows(result["ctas"], 1)[:, 0]
    costs = items[:, 3] + item_cost + split_cost * (items[:, 4] >= 0)
    loads = np.zeros(num_ctas, int)
    np.add.at(loads, ctas, costs)
    return WorkList(items, rows(result["reductions"], 4), result["num_slots"], loads)


def aspp_tiles(size: int, N: int) -> Tiles:
    branches = ASPP_OS16 if size == 33 else ASPP_OS8
    _, _, tiles = _C.schedule.forward_tiles((N, size, size), branches)
    num_taps = rows(tiles, 5)[:, 4].tolist()
    return [(taps * 64, 2) for taps in num_taps]  # 2048 / 32 and 256 / 128


TILES: dict[str, Tiles] = {
    "none": [],
    "no k-iterations": [(0, 3)],
    "one": [(1000, 1)],
    "no blocks": [(10, 0), (7, 2)],
    "mixed": [(0, 2), (1, 1), (977, 3), (64, 5), (65, 1)],
    "33x33": aspp_tiles(33, 1),
    "65x65": aspp_tiles(65, 1),
    "33x33, 8 images": aspp_tiles(33, 8),
}


@pytest.mark.parametrize("tiles", TILES.values(), ids=TILES)
@pytest.mark.parametrize("num_ctas", [1, 7, 132])
def test_every_k_iteration_is_added_once_in_a_fixed_order(tiles, num_ctas):
    items, reductions, num_slots, _ = split_k(tiles, num_ctas)
    assert (np.diff(items[:, 3]) <= 0).all()  # longest first

    pieces: dict = {(t, b): [] for t, (_, blocks) in enumerate(tiles) for b in range(blocks)}
    for tile, block, first, num_k_iters, slot in items.tolist():
        pieces[tile, block].append((first, num_k_iters, slot))
    slots: dict = {(tile, block): (first, count) for tile, block, first, count in reductions}
    assert len(slots) == len(reductions)
    used_slots = []
    for (tile, block), of_tile in pieces.items():
        of_tile.sort()
        assert [first for first, *_ in of_tile] == [
            sum(p[1] for p in of_tile[:i]) for i in range(len(of_tile))
        ]
        assert sum(num_k_iters for _, num_k_iters, _ in of_tile) == tiles[tile][0]
        if len(of_tile) == 1:
            assert of_tile[0][2] == -1 and (tile, block) not in slots
            continue
        first_slot = of_tile[0][2]
        assert slots[tile, block] == (first_slot, len(of_tile))
        assert [p[2] for p in of_tile] == list(range(first_slot, first_slot + len(of_tile)))
        assert all(num_k_iters > 0 for _, num_k_iters, _ in of_tile)
        used_slots += [p[2] for p in of_tile]
    assert sorted(used_slots) == list(range(num_slots))
    assert split_k(tiles, num_ctas)[0].tolist() == items.tolist()


@pytest.mark.parametrize("tiles", TILES.values(), ids=TILES)
@pytest.mark.parametrize("item_cost", [0, 5])
@pytest.mark.parametrize("num_ctas", [1, 7, 132])
def test_each_item_goes_to_the_cta_that_is_free_first(tiles, num_ctas, item_cost):
    work_list = split_k(tiles, num_ctas, item_cost=item_cost)
    loads = [0] * num_ctas
    for *_, num_k_iters, slot in work_list.work_items.tolist():
        heapq.heapreplace(loads, loads[0] + num_k_iters + item_cost + (8 if slot >= 0 else 0))
    assert sorted(work_list.loads) == sorted(loads)


def test_small_problems_are_split_and_large_ones_are_not():
    def imbalance(tiles: Tiles, num_ctas: int = 132) -> tuple[int, float]:
        work_list = split_k(tiles, num_ctas)
        share = sum(num_k_iters * blocks for num_k_iters, blocks in tiles) / num_ctas
        return work_list.num_slots, work_list.makespan / share

    num_slots, ratio = imbalance(TILES["33x33"])  # 72 output tiles for 132 CTAs
    assert num_slots > 0 and ratio < 1.2
    num_slots, ratio = imbalance(TILES["65x65"])
    assert num_slots > 0 and ratio < 1.1
    num_slots, ratio = imbalance(TILES["33x33, 8 images"])
    assert num_slots == 0 and ratio < 1.05
    assert imbalance(TILES["33x33"], num_ctas=1) == (0, 1)


def test_a_tile_that_does_not_fit_a_cta_goes_on_with_the_next():
    work_list = split_k([(100, 1)] * 3, num_ctas=2)
    assert len(work_list.work_items) == 4 and len(work_list.reductions) == 1
    assert work_list.num_slots == 2
    assert work_list.makespan < 160  # a piece costs 8: 158 at best, 174 if all three were halved


def test_splits_that_cost_more_than_they_save_are_not_made():
    """40 k-iterations in two pieces take 20 + 8 without a cost per item, 20 + 8 + 30 with it."""
    assert split_k([(40, 1)], 2).makespan == 28
    work_list = split_k([(40, 1), (0, 1)], 2, item_cost=30)
    assert (work_list.num_slots, work_list.makespan) == (0, 70)


@pytest.mark.parametrize(
    ("tiles", "num_ctas", "makespan"),
    [
        ([(1000, 1)], 7, 151),  # equal pieces
        ([(1000, 1)], 132, 16),
        ([(977, 3), (64, 5), (65, 1)], 7, 488),
        ([(977, 3), (64, 5), (65, 1)], 132, 34),
        ([(100, 1)] * 3, 2, 159),  # a tile that goes on with the next CTA
        ([(72, 4)] * 18, 132, 55),
        ([(36, 1)] * 5, 4, 57),
        ([(60, 2), (10, 9)], 4, 60),
    ],
)
def test_makespans(tiles, num_ctas, makespan):
    total = sum(num_k_iters * blocks for num_k_iters, blocks in tiles)
    assert -(-total // num_ctas) <= split_k(tiles, num_ctas).makespan <= makespan


@pytest.mark.parametrize(
    ("tiles", "num_ctas", "makespan"),
    [
        ([(100, 1)] * 3, 2, 162),  # one tile in two pieces
        ([(72, 4)] * 18, 66, 98),
        ([(20, 1)] * 7, 3, 64),
        ([(27, 3), (30, 1), (53, 2), (30, 1)], 4, 79),  # 82 if pieces of a few k-iterations are cut
    ],
)
def test_makespans_with_a_cost_per_item(tiles, num_ctas, makespan):
    total = sum((num_k_iters + 2) * blocks for num_k_iters, blocks in tiles)
    assert -(-total // num_ctas) <= split_k(tiles, num_ctas, item_cost=2).makespan <= makespan


def test_tiles_are_split_only_for_one_percent_or_more():
    """A split takes workspace and a second launch."""
    work_list = split_k([(1813, 1), (1792, 1)], 2, split_cost=0)
    assert (work_list.num_slots, work_list.makespan) == (0, 1813)  # 0.6 % more than a half
    work_list = split_k([(1000, 1), (960, 1)], 2, split_cost=0)
    assert work_list.num_slots > 0 and work_list.makespan < 990


def test_every_slot_has_its_piece_and_no_cta_far_more_than_its_share():
    for num_k_iters in range(1, 60):
        for num_ctas in (2, 3, 8):
            work_list = split_k([(num_k_iters, 1), (17, 2)], num_ctas)
            items = work_list.work_items
            pieces, whole = items[items[:, 4] >= 0], items[items[:, 4] < 0]
            assert len(pieces) == work_list.num_slots and len(whole) + len(pieces) == len(items)
            share = -(-(num_k_iters + 34) // num_ctas)
            assert work_list.makespan <= max(num_k_iters, 17, share + 17)


@pytest.mark.parametrize(
    "tiles,num_ctas,costs,message",
    [
        ([(1, 1)], 0, (8, 0), "num_ctas"),
        ([(1, 1)], 1, (-1, 0), "split_cost"),
        ([(1, 1)], 1, (8, -1), "item_cost"),
        ([(-1, 1)], 1, (8, 0), "k-iterations"),
    ],
)
def test_bad_input(tiles, num_ctas, costs, message):
    with pytest.raises(ValueError, match=message):
        split_k(tiles, num_ctas, *costs)
