"""Split sums of the Triton convolutions in tests. Imports Triton in each function."""

from __future__ import annotations

import pytest

from deeplab_fast._native import work_lists as native_work_lists


def set_num_programs(monkeypatch: pytest.MonkeyPatch, num_programs: int) -> None:
    """Many programs split even short sums, one program splits none."""
    from deeplab_fast.backends.triton import work_lists

    monkeypatch.setattr(work_lists, "num_programs", lambda device: num_programs)
    monkeypatch.setattr(native_work_lists, "SPLIT_K_ITERS", 1)


def set_blocks(monkeypatch: pytest.MonkeyPatch, m: int, n: int, k: int) -> None:
    """Blocks of all convolutions."""
    from deeplab_fast.backends.triton import block_sizes

    blocks = block_sizes.Blocks(m, n, k, 4, 1)
    monkeypatch.setattr(block_sizes, "blocks_for", lambda *shape: blocks)


def record_num_slots(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Numbers of workspace slots of the work lists that are used from now on."""
    from deeplab_fast.backends.triton import work_lists

    counts: list[int] = []
    for name in ("work_list", "weight_work_list"):
        make = getattr(work_lists, name)

        def spy(*args, make=make):
            work = make(*args)
            counts.append(work.num_slots)
            return work

        monkeypatch.setattr(work_lists, name, spy)
    return counts
