"""``deeplab-fast info``: the build, the hardware, and the backend chosen for each op."""

from __future__ import annotations

import argparse
import os
import platform
from collections import Counter
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from .. import __version__
from .._native import _C
from ..backends import dispatch_table, registry
from .errors import UserError


def add_parser(subparsers: Any) -> None:
    help = "print the build, the hardware, and the backend chosen for each op"
    parser = subparsers.add_parser(
        "info", help=help, description=f"{help[0].upper()}{help[1:]}, with the reason."
    )
    parser.add_argument(
        "--dispatch-table",
        action="store_true",
        help="list the shape buckets measured on these GPUs, and the kernel chosen for each",
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    for title, text in (*_versions(), *_build(), *_machine()):
        print(f"{title:<14}{text}")
    for device_type in ("cpu", "cuda"):
        print()
        print("\n".join(_backends(device_type)))
    for index in range(torch.cuda.device_count()):
        print()
        device = torch.device("cuda", index)
        print("\n".join(_dispatch_table(device, arguments.dispatch_table)))
    print('\nTo force a backend: with deeplab_fast.backend("triton"): ...')
    return 0


def _versions() -> list[tuple[str, str]]:
    try:
        triton = version("triton")
    except PackageNotFoundError:
        triton = "not installed"
    return [
        ("deeplab_fast", f"{__version__} in {Path(__file__).parents[1]}"),
        ("python", platform.python_version()),
        ("torch", torch.__version__),
        ("triton", triton),
    ]


def _build() -> list[tuple[str, str]]:
    build = _C.build_info()
    kernels = "CPU only"
    if build["cuda"]:
        kernels = f"CPU, and CUDA {build['cuda']} for {', '.join(build['architectures'])}"
    return [("kernels", kernels), ("compiler", build["compiler"])]


def _machine() -> list[tuple[str, str]]:
    rows = [
        ("system", platform.platform()),
        ("processor", _processor()),
        ("threads", f"{torch.get_num_threads()} of {os.cpu_count()} logical processors"),
    ]
    if hasattr(_C, "cuda"):
        rows.append(("CUDA driver", _cuda_version(_C.cuda.device_info()["driver_version"])))
    for index in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(index)
        memory = f"{gpu.total_memory / 2**30:.0f} GiB"
        rows.append((f"cuda:{index}", f"{gpu.name}, sm_{gpu.major}{gpu.minor}, {memory}"))
    return rows


def _processor() -> str:
    """Model name of the CPU, from Linux; platform.processor() is empty on most systems."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.machine()


def _cuda_version(number: int) -> str:
    return f"for CUDA {number // 1000}.{number % 1000 // 10}" if number else "none"


def _backends(device_type: str) -> list[str]:
    """The backends that are available on a type of device, and the one chosen for each op."""
    preference = registry.order(device_type)
    lines = [f"On {device_type}, in order of preference: {', '.join(preference)}"]
    for name in registry.NAMES:
        lines.append(f"  {name:<12}{registry.unavailable_reason(name, device_type) or 'available'}")
    if device_type == "cuda" and not torch.cuda.is_available():
        return [*lines, "  no op can run: PyTorch finds no usable GPU"]
    width = max(map(len, registry.ops())) + 2
    for op in registry.ops():
        if registry.depends_on_measurements(op, device_type):
            lines.append(f"  {op:<{width}}reference (cuDNN), or the kernel in the dispatch table")
            continue
        passed = []
        for name in preference:
            reason = registry.unavailable_reason(name, device_type)
            if name not in registry.backends_of(op):
                reason = f"it has no {op} kernel"
            if reason is None:
                break
            passed.append(f"{name}: {reason}")
        lines.append(f"  {op:<{width}}{name}{' (' + '; '.join(passed) + ')' if passed else ''}")
    return lines


def _dispatch_table(device: torch.device, in_full: bool) -> list[str]:
    """Number of shape buckets for which each kernel was measured to be the fastest on a GPU."""
    try:
        choices = dispatch_table.fastest_kernels(device)
    except (OSError, ValueError) as error:
        raise UserError(str(error)) from error
    name = dispatch_table.device_class(device)
    lines = [f"Dispatch table for {device}, {name}, in {dispatch_table.PATH}:"]
    if not choices:
        return [*lines, "  no rows; python benchmarks/tune_dispatch_table.py measures them"]
    for op, buckets in choices.items():
        chosen = {name: (*faster, "reference")[0] for name, faster in buckets.items()}
        counts = Counter(chosen.values())
        shares = ", ".join(f"{backend} for {count}" for backend, count in counts.most_common())
        lines.append(f"  {op}, {len(chosen)} shape buckets: {shares}")
        if in_full:
            lines += [f"    {backend:<12}{name}" for name, backend in chosen.items()]
    return lines
