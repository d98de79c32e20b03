"""Checks of the memory accesses of interpreted Triton kernels, and memory for huge tensors."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils._pytree import tree_leaves

from ..support.memory import sparse_zeros

Addresses = NDArray[np.int64]


def zeros_without_memory(*shape: int, dtype: torch.dtype) -> Tensor:
    """Zeros that take memory only where they are accessed; channels_last if they are 4-D."""
    flat = sparse_zeros(torch.Size(shape).numel(), dtype)
    if len(shape) != 4:
        return flat.view(shape)
    N, C, H, W = shape
    return flat.view(N, H, W, C).permute(0, 3, 1, 2)


def number_programs_from(monkeypatch: pytest.MonkeyPatch, first: int) -> None:
    """Number the programs of all launches from ``first``."""
    from triton.runtime.interpreter import interpreter_builder

    original = interpreter_builder.create_get_program_id

    def program_id(axis: int) -> Any:
        handle = original(axis)
        if axis == 0:
            handle.data = (handle.data + first).astype(np.int32)
        return handle

    monkeypatch.setattr(interpreter_builder, "create_get_program_id", program_id)


class _Memory:
    """Replacement of the interpreter's native module that records loads and stores."""

    def __init__(self, native: Any, builder: Any) -> None:
        self.native, self.builder = native, builder

    def __getattr__(self, name: str) -> Any:
        return getattr(self.native, name)

    def begin(self, tensors: list[Tensor]) -> None:
        ranges = sorted(
            (
                t.data_ptr(),
                t.data_ptr()
                + t.itemsize * (1 + sum((n - 1) * s for n, s in zip(t.shape, t.stride()))),
            )
            for t in tensors
            if t.numel()
        )
        self.starts, ends = np.array(ranges, np.int64).T
        self.ends = np.maximum.accumulate(ends)
        self.loads: list[tuple[int, Addresses]] = []
        self.stores: list[tuple[int, Addresses]] = []

    def end(self) -> None:
        addresses, programs = self._joined(self.stores)
        order = np.argsort(addresses, kind="stable")
        addresses, programs = addresses[order], programs[order]
        assert (addresses[1:] != addresses[:-1]).all(), "an element is stored twice"
        loaded, readers = self._joined(self.loads)
        if addresses.size and loaded.size:
            found = np.searchsorted(addresses, loaded).clip(max=addresses.size - 1)
            raced = (addresses[found] == loaded) & (programs[found] != readers)
            assert not raced.any(), "a program loads what another stores"

    @staticmethod
    def _joined(accesses: list[tuple[int, Addresses]]) -> tuple[Addresses, Addresses]:
        if not accesses:
            return np.empty(0, np.int64), np.empty(0, np.int64)
        programs = np.repeat([p for p, _ in accesses], [a.size for _, a in accesses])
        return np.concatenate([a for _, a in accesses]), programs

    def _accessed(self, pointers: Any, mask: Any, itemsize: int) -> tuple[int, Addresses]:
        pointers, mask = np.broadcast_arrays(pointers, mask)
        addresses = pointers[mask].astype(np.int64)
        in_range = np.searchsorted(self.starts, addresses, side="right") - 1
        assert (in_range >= 0).all() and (addresses + itemsize <= self.ends[in_range]).all(), (
            "out of the bounds of all arguments"
        )
        (x, y, z), (_, height, depth) = self.builder.grid_idx, self.builder.grid_dim
        return (x * height + y) * depth + z, addresses

    def load(self, pointers: Any, mask: Any, other: Any, dtype: Any) -> Any:
        self.loads.append(self._accessed(pointers, mask, dtype.itemsize))
        return self.native.load(pointers, mask, other, dtype)

    def store(self, pointers: Any, value: Any, mask: Any) -> Any:
        self.stores.append(self._accessed(pointers, mask, value.itemsize))
        return self.native.store(pointers, value, mask)


def check_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make interpreted launches fail if they access memory outside of their tensors.

    They also fail if they store an element twice, or if one program loads what another one stores,
    because a GPU runs programs in any order.
    """
    from triton.runtime import interpreter

    memory = _Memory(interpreter._interpreter, interpreter.interpreter_builder)
    run = interpreter.GridExecutor.__call__

    def checked(self: Any, *args: Any, **kwargs: Any) -> None:
        memory.begin([t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)])
        run(self, *args, **kwargs)
        memory.end()

    monkeypatch.setattr(interpreter, "_interpreter", memory)
    monkeypatch.setattr(interpreter.GridExecutor, "__call__", checked)
