"""Memory and CPU time of this process, as Linux counts them."""

from __future__ import annotations

import os
import resource
from pathlib import Path


def peak_resident_mib() -> float:
    """The peak resident memory of this process so far, libraries included."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) / 1024
    raise OSError("/proc/self/status has no VmHWM")


def page_faults() -> int:
    """Pages of memory that the kernel has handed to this process so far, without reading a disk."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


class OtherLoad:
    """Share of the machine's CPU time that other processes took.

    >>> load = OtherLoad()
    >>> ...
    >>> load.percent()  # near 0 on a quiet machine
    """

    def __init__(self) -> None:
        self._start = _cpu_seconds()

    def percent(self) -> float:
        """Percent of the CPU time of all cores since the start.

        The time of child processes counts as one's own once they have ended.
        """
        own, busy, total = (now - start for now, start in zip(_cpu_seconds(), self._start))
        return 100 * max(0.0, busy - own) / total if total else 0.0


def _cpu_seconds() -> tuple[float, float, float]:
    """CPU seconds of this process and its children, of all processes, and of the machine."""
    # The columns of proc(5): user, nice, system, idle, iowait, irq, softirq, steal, ...
    first, _ = Path("/proc/stat").read_text().split("\n", 1)
    ticks = [int(value) / os.sysconf("SC_CLK_TCK") for value in first.split()[1:9]]
    return sum(os.times()[:4]), sum(ticks) - ticks[3] - ticks[4], sum(ticks)
