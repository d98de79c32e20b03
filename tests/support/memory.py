"""Memory that shows accesses outside a tensor, and memory for huge tensors.

There are two kinds of guards. GuardedMemory and GuardedAllocations fill the memory around each
tensor with a pattern, which shows writes close to it. A tensor beside an unreadable page ends the
process at the first access past it, also at a read: tests run such code with in_child.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

GUARD_BYTES = 512
LINE_BYTES = 64
PATTERN = 0xA5  # byte that fills guards and uninitialised tensors


class GuardedMemory:
    """Allocator of tensors with a pattern on both sides."""

    def __init__(self) -> None:
        self._regions: list[tuple[Tensor, int, int]] = []

    def empty(
        self,
        size: Sequence[int],
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
        misalignment: int = 0,
    ) -> Tensor:
        """Contiguous tensor that starts ``misalignment`` elements after a cache line begins."""
        num_bytes = torch.Size(size).numel() * dtype.itemsize
        length = num_bytes + 2 * GUARD_BYTES + 2 * LINE_BYTES
        buffer = torch.full((length,), PATTERN, dtype=torch.uint8, device=device)
        begin = GUARD_BYTES + -buffer.data_ptr() % LINE_BYTES + misalignment * dtype.itemsize
        self._regions.append((buffer, begin, begin + num_bytes))
        return buffer[begin : begin + num_bytes].view(dtype).view(*size)

    def assert_intact(self) -> None:
        for buffer, begin, end in self._regions:
            for side, guard in (("before", buffer[:begin]), ("after", buffer[end:])):
                written = (guard != PATTERN).nonzero()
                assert len(written) == 0, f"{len(written)} bytes written {side} a tensor"

    def __len__(self) -> int:
        return len(self._regions)


_aten = torch.ops.aten
_ALLOCATIONS = {
    _aten.empty.memory_format,
    _aten.empty_like.default,
    _aten.empty_strided.default,
    _aten.new_empty.default,
    _aten.new_empty_strided.default,
}


class GuardedAllocations(TorchDispatchMode):
    """Mode in which every uninitialised tensor has a pattern on both sides."""

    GUARD_BYTES = 4096

    def __init__(self) -> None:
        super().__init__()
        self._buffers: list[Tensor] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **kwargs or {})
        if function not in _ALLOCATIONS or made.numel() == 0 or made.is_meta:
            return made
        extent = 1 + sum((n - 1) * s for n, s in zip(made.shape, made.stride(), strict=True))
        num_bytes = extent * made.element_size() + 2 * self.GUARD_BYTES
        buffer = torch.full((num_bytes,), PATTERN, dtype=torch.uint8)
        self._buffers.append(buffer)
        inside = buffer[self.GUARD_BYTES : -self.GUARD_BYTES].view(made.dtype)
        return inside.as_strided(made.shape, made.stride()).copy_(made)

    def assert_intact(self) -> None:
        assert self._buffers
        for buffer in self._buffers:
            for guard in (buffer[: self.GUARD_BYTES], buffer[-self.GUARD_BYTES :]):
                assert (guard == PATTERN).all()


@contextlib.contextmanager
def allocations_from(empty: Callable[..., Tensor]) -> Iterator[None]:
    """Make uninitialised tensors, outputs and workspaces, with ``empty(size, dtype, device)``."""

    def size_of(size: tuple[Any, ...]) -> tuple[int, ...]:
        return size if not size or isinstance(size[0], int) else tuple(size[0])

    def new_empty(self: Tensor, *size: Any, dtype: Any = None, device: Any = None) -> Tensor:
        return empty(size_of(size), dtype or self.dtype, device or self.device)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Tensor, "new_empty", new_empty)
        yield


@contextlib.contextmanager
def guarded_allocations() -> Iterator[GuardedMemory]:
    """Give uninitialised tensors guards, and check at the end that these are intact."""
    memory = GuardedMemory()
    with allocations_from(memory.empty):
        yield memory
    memory.assert_intact()


_LIBC = ctypes.CDLL(None, use_errno=True)


def beside_unreadable_page(num_bytes: int, after: bool) -> Tensor:
    """Bytes that end where an unreadable page starts, or start where one ends."""
    page = mmap.PAGESIZE
    usable = -(-max(num_bytes, 1) // page) * page
    memory = mmap.mmap(-1, usable + 2 * page)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    for guard in (address, address + page + usable):
        protected = _LIBC.mprotect(ctypes.c_void_p(guard), ctypes.c_size_t(page), 0)
        assert protected == 0, ctypes.get_errno()
    offset = page + (usable - num_bytes if after else 0)
    if num_bytes == 0:
        return torch.empty(0, dtype=torch.uint8)
    return torch.frombuffer(memory, dtype=torch.uint8, count=num_bytes, offset=offset)


def empty_beside_unreadable_page(
    size: Sequence[int], dtype: torch.dtype, device: object = "cpu", *, after: bool
) -> Tensor:
    num_bytes = torch.Size(size).numel() * dtype.itemsize
    return beside_unreadable_page(num_bytes, after).fill_(PATTERN).view(dtype).view(tuple(size))


def copy_beside_unreadable_page(tensor: Tensor, after: bool) -> Tensor:
    """Dense copy beside an unreadable page, with the dimensions in the same memory order."""
    order = sorted(range(tensor.dim()), key=tensor.stride, reverse=True)
    dense = tensor.permute(order)
    assert dense.is_contiguous()
    copy = empty_beside_unreadable_page(dense.shape, tensor.dtype, after=after).copy_(dense)
    return copy.permute([order.index(d) for d in range(tensor.dim())])


def sparse_zeros(num_elements: int, dtype: torch.dtype, before: int = 0) -> Tensor:
    """Zeros that use memory only where they are touched, preceded by ``before`` more."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0x4000)
    num_bytes = (before + num_elements) * dtype.itemsize
    try:
        memory = mmap.mmap(-1, num_bytes, flags=flags)
    except OSError as error:
        pytest.skip(f"{num_bytes >> 30} GiB of address space are not available: {error}")
    return torch.frombuffer(memory, dtype=dtype, offset=before * dtype.itemsize)


def in_child(function: Callable[[], None], timeout: int = 300) -> None:
    """Run ``function`` in a forked process with one thread; fail if it raises or crashes there.

    In that process memory from malloc is filled with a pattern.
    """

    def run() -> None:
        torch.set_num_threads(1)
        if hasattr(_LIBC, "mallopt"):
            _LIBC.mallopt(-6, PATTERN)  # M_PERTURB
        function()

    process = multiprocessing.get_context("fork").Process(target=run)
    process.start()
    process.join(timeout)
    if process.exitcode is None:
        process.kill()
        process.join()
    assert process.exitcode == 0, f"the child process ended with {process.exitcode}"
