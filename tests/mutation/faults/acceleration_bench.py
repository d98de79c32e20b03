"""Faults: the allocator of the commands, and deferred logits of networks that are no DeepLabs."""

from __future__ import annotations

from .guards import Fault

FAULTS: dict[str, list[Fault]] = {
    "deeplab_fast/cli/allocator.py": [
        Fault("large blocks from mmap", "libc.mallopt(_M_MMAP_MAX, 0)", "pass"),
        Fault("a heap that shrinks", "libc.mallopt(_M_TRIM_THRESHOLD, -1)", "pass"),
        Fault(
            "other C libraries are changed", 'if hasattr(libc, "gnu_get_libc_version"):', "if True:"
        ),
        Fault(
            "an error without a C library",
            "contextlib.suppress(AttributeError, OSError, TypeError)",
            "contextlib.suppress(OSError)",
        ),
    ],
    "deeplab_fast/cli/__init__.py": [
        Fault("a caller's allocator is changed", "if argv is None:", "if True:"),
        Fault(
            "commands do not keep memory", "            keep_freed_memory()\n", "            pass\n"
        ),
    ],
}
