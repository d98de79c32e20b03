"""Dispatch table: times of kernels beside cuDNN's, by device, op and shape.

The table is dispatch_table.csv beside this file. ``python benchmarks/tune_dispatch_table.py``
writes it on a GPU: a row for each kernel and shape, with cuDNN's time in the same run.
"""

from __future__ import annotations

import csv
import functools
import math
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

import torch

PATH = Path(__file__).with_name("dispatch_table.csv")
KERNELS = ("cuda/sm90", "cuda/sm80", "triton")  # the backends that the table chooses among


class Row(NamedTuple):
    """The columns of the table."""

    device: str  # see device_class
    op: str
    shape_bucket: str  # see ops/shape_bucket.py
    kernel: str
    median_ms: float
    cudnn_ms: float  # the fastest of cuDNN's medians
    shape: str  # the arguments that were measured
    gpu: str
    versions: str
    commit: str
    date: str


@functools.cache
def device_class(device: torch.device) -> str:
    """Name of the kind of device: all devices of a kind run the same code with the same work lists.

    >>> device_class(torch.device("cuda:0"))  # an H200, an H100 SXM or a GH200
    'sm_90 with 132 SMs'
    """
    gpu = torch.cuda.get_device_properties(device)
    vendor = "gfx" if torch.version.hip else "sm"
    return f"{vendor}_{gpu.major}{gpu.minor} with {gpu.multi_processor_count} SMs"


def read(path: Path) -> list[Row]:
    """The rows of a table.

    Raises:
        ValueError: the file is not such a table; the message names the line.
    """
    with path.open(newline="") as file:
        lines = csv.reader(file)
        if next(lines, None) != list(Row._fields):
            raise ValueError(f"{path}: expected the columns {','.join(Row._fields)}")
        return [_row(line, f"{path}, line {lines.line_num}") for line in lines]


def _row(line: list[str], place: str) -> Row:
    if len(line) != len(Row._fields):
        raise ValueError(f"{place}: expected {len(Row._fields)} values, got {len(line)}")
    row = Row(*line)  # type: ignore[arg-type]
    if row.kernel not in KERNELS:
        raise ValueError(f"{place}: expected a kernel of {', '.join(KERNELS)}, got {row.kernel!r}")
    try:
        median, cudnn = float(row.median_ms), float(row.cudnn_ms)
    except ValueError:
        median = cudnn = math.nan
    if not (0 < median < math.inf and 0 < cudnn < math.inf):
        raise ValueError(
            f"{place}: expected two times in ms, got {row.median_ms!r} and {row.cudnn_ms!r}"
        )
    return row._replace(median_ms=median, cudnn_ms=cudnn)


@functools.cache
def fastest_kernels(device: torch.device) -> dict[str, dict[str, tuple[str, ...]]]:
    """Kernels that beat cuDNN on devices of this class, for each op and shape bucket.

    A kernel that was slower than cuDNN on any shape of a bucket is left out. The kernels of a
    bucket are sorted by their worst ratio to cuDNN, the best first.
    """
    here = device_class(device)
    worst: dict[str, dict[str, dict[str, float]]] = defaultdict(lambda: defaultdict(dict))
    for row in read(PATH):
        if row.device == here:
            ratios = worst[row.op][row.shape_bucket]
            ratio = row.median_ms / row.cudnn_ms
            ratios[row.kernel] = max(ratio, ratios.get(row.kernel, 0))
    return {
        op: {
            name: tuple(sorted((k for k in ratios if ratios[k] < 1), key=ratios.__getitem__))
            for name, ratios in classes.items()
        }
        for op, classes in worst.items()
    }
