"""Runs the kernels of hopper_faults.cu.

As a program, for a sanitizer: kernels given as name:faulty or name:correct, with several seeds.
"""

from __future__ import annotations

import ctypes
import sys

import numpy as np

STEPS, TILE = 6, 64

# Integers that bf16 represents exactly; it need not represent their sums.
INPUT = np.random.default_rng(90).integers(1, 200, (STEPS, TILE)).astype(np.float32)


def load(module: str) -> ctypes.CDLL:
    library = ctypes.CDLL(module)
    library.run_fault.restype = ctypes.c_char_p
    library.run_fault.argtypes = [ctypes.c_char_p, ctypes.c_bool, ctypes.c_uint64] + [
        ctypes.c_void_p
    ] * 2
    library.can_encode.restype = ctypes.c_bool
    return library


def run(library: ctypes.CDLL, name: str, fault: bool, seed: int) -> str | None:
    """The emulator's message, or "wrong output"; None if the kernel is right."""
    memory = np.zeros(INPUT.size + 4, np.float32)
    data = memory[-memory.ctypes.data % 16 // 4 :][: INPUT.size]
    data[:] = INPUT.ravel()
    output = np.full(TILE, np.nan, np.float32)
    message = library.run_fault(name.encode(), fault, seed, output.ctypes.data, data.ctypes.data)
    if message is not None:
        return message.decode()
    expected = (INPUT.sum(0) if name.startswith("sum_") else INPUT[0])[::-1]
    return None if np.array_equal(output, expected) else "wrong output"


if __name__ == "__main__":
    library = load(sys.argv[1])
    for kernel in sys.argv[2:]:
        name, _, variant = kernel.partition(":")
        for seed in range(3):
            print(f"== {kernel} {seed}", file=sys.stderr, flush=True)
            run(library, name, variant == "faulty", seed)
