"""``deeplab-fast info``: the build, the hardware, and the backend chosen for each op or layer."""

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
from ..backends import dispatch_table, explain, registry
from ..backends.dispatch_table import Row
from .device import add_device, add_dtype, find_device, out_of_memory
from .errors import UserError
from .weights import WEIGHTS, load_model


def add_parser(subparsers: Any) -> None:
    help = "print the build, the hardware, and the backend chosen for each op"
    parser = subparsers.add_parser(
        "info",
        help=help,
        description=f"{help[0].upper()}{help[1:]}, with the reason.\n\n"
        "With --model, print the kernel that each layer of a model prepared for inference uses,\n"
        "and the evidence for it. The model runs once, and nothing is measured.",
        epilog=f"WEIGHTS is one of\n{WEIGHTS}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    subject = parser.add_mutually_exclusive_group()
    subject.add_argument(
        "--dispatch-table",
        action="store_true",
        help="list the shape buckets measured on these GPUs, the kernel chosen for each, and the "
        "times in the table that ships with the package and in your own",
    )
    subject.add_argument("--model", metavar="WEIGHTS", help="explain the layers of this model")
    options = parser.add_argument_group("with --model")
    options.add_argument(
        "--size",
        type=int,
        nargs=2,
        metavar=("HEIGHT", "WIDTH"),
        help="size of the images that the network gets",
    )
    options.add_argument(
        "--batch", type=int, default=1, metavar="N", help="batch size (default: 1)"
    )
    add_device(options)
    add_dtype(options, "float32", "float32")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    if arguments.model is not None or arguments.size is not None:
        return _explain(arguments)
    for title, text in (*_versions(), *_build(), *_machine()):
        print(f"{title:<14}{text}")
    for device_type in ("cpu", "cuda"):
        print()
        print("\n".join(_backends(device_type)))
    for index in range(torch.cuda.device_count()):
        print()
        device = torch.device("cuda", index)
        print("\n".join(_dispatch_table(device, arguments.dispatch_table)))
    if not torch.cuda.device_count():
        print("\nDispatch tables, which apply to GPUs only:")
        print(f"  shipped with the package: {dispatch_table.PATH}")
        print(f"  your own: {dispatch_table.user_path()}")
    print('\nTo force a backend: with deeplab_fast.backend("triton"): ...')
    return 0


def _explain(arguments: argparse.Namespace) -> int:
    """Print which kernel each layer of a model uses."""
    if arguments.model is None or arguments.size is None:
        raise UserError("expected --model WEIGHTS and --size HEIGHT WIDTH together")
    for option, values in (("--size", arguments.size), ("--batch", [arguments.batch])):
        if min(values) < 1:
            raise UserError(
                f"{option}: got {' '.join(map(str, values))} (expected positive integers)"
            )
    device = find_device(arguments.device)
    with out_of_memory("a smaller --size or --batch, or another --device"):
        model = load_model(arguments.model, "--model").to(device)
        prepared = model.prepare_for_inference(getattr(torch, arguments.dtype))
        shape = arguments.batch, model.in_channels, *arguments.size
        print(explain(prepared, torch.zeros(shape, device=device)))
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
    lines.append("")
    width = max(map(len, registry.ops())) + 2
    for op in registry.ops():
        if registry.depends_on_measurements(op, device_type):
            lines.append(f"  {op:<{width}}the fastest measured kernel, otherwise reference (cuDNN)")
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
        shipped = dispatch_table.read(dispatch_table.PATH)
        measured = dispatch_table.rows_of(device)
        choices = dispatch_table.fastest_kernels(device)
    except (OSError, ValueError) as error:
        raise UserError(str(error)) from error
    here = dispatch_table.device_class(device)
    user_rows = [row for row in dispatch_table.user_rows() if row.device == here]
    yours = {row for row in user_rows if row.versions == dispatch_table.versions()}
    num_shipped = sum(row.device == here for row in shipped)
    outdated = len(user_rows) - len(yours)
    lines = [
        f"Dispatch table for {device}, {here}:",
        f"  shipped with the package: {num_shipped} rows in {dispatch_table.PATH}",
        f"  your own: {len(yours)} rows in {dispatch_table.user_path()}"
        + (f", and {outdated} out of date" if outdated else ""),
    ]
    if not choices:
        return [*lines, "  deeplab-fast tune measures the convolutions of a model"]
    for op, buckets in choices.items():
        chosen = {name: (*faster, "reference")[0] for name, faster in buckets.items()}
        counts = Counter(chosen.values())
        shares = ", ".join(f"{backend} for {count}" for backend, count in counts.most_common())
        plural = "s" if len(chosen) > 1 else ""
        lines.append(f"  {op}, {len(chosen)} shape bucket{plural}: {shares}")
        if in_full:
            for name, backend in chosen.items():
                lines.append(f"    {backend:<12}{name}")
                lines += [_measurement(row, row in yours) for row in measured[op][name]]
    return lines


def _measurement(row: Row, is_yours: bool) -> str:
    time = "failed" if row.failed else f"{row.median_ms:.4f} ms"
    origin = f"{'yours' if is_yours else 'shipped':<7} {row.date.partition('T')[0]}"
    return f"      {row.kernel:<9}{time:>13}, cuDNN{row.cudnn_ms:>10.4f} ms, {origin}: {row.shape}"
