"""Runs the kernels of faults.cu. As a program: the named kernels with several seeds.

The program is for sanitizers, which would slow torch down, so this file does not import it.
"""

from __future__ import annotations

import ctypes
import sys

import numpy as np

THREADS = 64
INPUT = np.arange(6 * THREADS, dtype=np.float32) + 1
SHARED_MEMORY = 64 * 1024


def load(module: str) -> ctypes.CDLL:
    library = ctypes.CDLL(module)
    library.run_fault.restype = library.run_with_shared_memory.restype = ctypes.c_char_p
    library.run_with_shared_memory.argtypes = [ctypes.c_size_t, ctypes.c_void_p, ctypes.c_void_p]
    library.set_machine.argtypes = [ctypes.c_uint64, ctypes.c_size_t]
    return library


def run(library: ctypes.CDLL, name: str, fault: bool, seed: int) -> str | None:
    """The emulator's message, or "wrong output"; None if the kernel is right."""
    library.set_machine(seed, SHARED_MEMORY)
    output = np.full(THREADS, np.nan, np.float32)
    pointers = (ctypes.c_void_p(array.ctypes.data) for array in (output, INPUT))
    message = library.run_fault(name.encode(), fault, *pointers)
    if message is not None:
        return message.decode()
    steps = INPUT.reshape(6, THREADS)
    expected = (steps.sum(0) if name == "refill" else steps[0])[::-1]
    return None if np.array_equal(output, expected) else "wrong output"


if __name__ == "__main__":
    library = load(sys.argv[1])
    for name in sys.argv[2:]:
        for fault in (False, True):
            for seed in range(3):
                print(f"== {name} {fault} {seed}", file=sys.stderr, flush=True)
                run(library, name, fault, seed)
