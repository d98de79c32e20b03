"""The commands keep the memory of freed tensors; the library leaves the allocator alone."""

from __future__ import annotations

import ctypes
import subprocess
import sys

import pytest

from deeplab_fast.cli.allocator import keep_freed_memory

PROGRAM = """
import resource
import torch
from deeplab_fast.cli import main

def faults():
    for _ in range(10):  # until small remainders no longer keep a block from being used again
        torch.ones(12 << 20)  # 48 MiB, above every threshold of glibc's own
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(3):
        torch.ones(12 << 20)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

print("faults", faults())
main(["info"])
print("faults", faults())
main()
print("faults", faults())
"""


@pytest.mark.skipif(
    not hasattr(ctypes.CDLL(None), "gnu_get_libc_version"), reason="not glibc's malloc"
)
def test_a_command_keeps_freed_memory_and_a_caller_of_main_does_not(tmp_path):
    output = subprocess.run(
        [sys.executable, "-c", PROGRAM, "info"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    library, caller, command = (
        int(line.split()[1]) for line in output.splitlines() if line.startswith("faults ")
    )
    # A huge page takes a single fault, so the numbers depend on the system's settings.
    assert library > 50 and caller > 50
    assert command < 20


def test_another_c_library_is_left_as_it_is(monkeypatch):
    class Musl:
        def mallopt(self, *arguments):
            raise AssertionError("called mallopt")

    def windows(name):
        raise TypeError("expected a name")

    for open_library in (lambda name: Musl(), windows):
        monkeypatch.setattr(ctypes, "CDLL", open_library)
        keep_freed_memory()
