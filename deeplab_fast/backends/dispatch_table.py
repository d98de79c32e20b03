"""Dispatch table: times of kernels beside cuDNN's, by device, op and shape.

There are two tables with the same columns, which have a row for each kernel and shape, with cuDNN's
time in the same run. One ships with the package, as dispatch_table.csv beside this file. The other
is the user's own, in their cache folder; :func:`add` writes it.
"""

from __future__ import annotations

import contextlib
import csv
import fcntl
import functools
import logging
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import platformdirs
import torch

from .._io.files import replacing

PATH = Path(__file__).with_name("dispatch_table.csv")
KERNELS = ("cuda/sm90", "cuda/sm80", "triton")  # the backends that the table chooses among

# A logger, not the module warnings: under `python -W error` a look-up would raise an exception.
_logger = logging.getLogger("deeplab_fast")


class Row(NamedTuple):
    """The columns of the table."""

    device: str  # see device_class
    op: str
    shape_bucket: str  # see ops/shape_bucket.py
    kernel: str
    median_ms: float  # inf if the kernel failed, so that it is not chosen for its bucket
    cudnn_ms: float  # the fastest of cuDNN's medians
    shape: str  # the arguments that were measured
    gpu: str
    versions: str  # see versions
    commit: str
    date: str

    @property
    def ratio(self) -> float:
        """The kernel's time relative to cuDNN's; less than 1 if it is faster."""
        return self.median_ms / self.cudnn_ms

    @property
    def failed(self) -> bool:
        """True if the kernel was wrong or raised an error."""
        return math.isinf(self.median_ms)

    @property
    def key(self) -> tuple[str, ...]:
        """Identity of the measurement: a later row with the same key replaces an earlier one."""
        return self.device, self.op, self.shape_bucket, self.shape, self.kernel


@functools.cache
def device_class(device: torch.device) -> str:
    """Name of the kind of device: all devices of a kind run the same code with the same work lists.

    >>> device_class(torch.device("cuda:0"))  # an H200, an H100 SXM or a GH200
    'sm_90 with 132 SMs'
    """
    gpu = torch.cuda.get_device_properties(device)
    vendor = "gfx" if torch.version.hip else "sm"
    return f"{vendor}_{gpu.major}{gpu.minor} with {gpu.multi_processor_count} SMs"


@functools.cache
def versions() -> str:
    """The versions that a measurement depends on: a row with other versions is out of date.

    These are the versions of the packages whose kernels are compared. PyTorch is not among them,
    because it only calls cuDNN's.

    >>> versions()
    'deeplab_fast 0.2.0, cuDNN 91002, Triton 3.9.0'
    """
    try:
        triton = version("triton")
    except PackageNotFoundError:
        triton = "-"
    cudnn = torch.backends.cudnn.version()
    return f"deeplab_fast {version('deeplab-fast')}, cuDNN {cudnn}, Triton {triton}"


def user_path() -> Path:
    """The user's own table, which need not exist.

    >>> user_path()
    PosixPath('/home/me/.cache/deeplab_fast/dispatch_table.csv')
    """
    return platformdirs.user_cache_path("deeplab_fast") / PATH.name


def read(path: Path) -> list[Row]:
    """The rows of a table.

    Raises:
        ValueError: the file is not such a table; the message names the line.
        OSError: the file cannot be read.
    """
    with path.open(newline="", encoding="utf-8") as file:
        lines = csv.reader(file)
        try:
            if next(lines, None) != list(Row._fields):
                raise ValueError(f"{path}: expected the columns {','.join(Row._fields)}")
            return [_row(line, f"{path}, line {lines.line_num}") for line in lines]
        except (csv.Error, UnicodeDecodeError) as error:
            raise ValueError(f"{path}: expected a CSV file in UTF-8, got: {error}") from error


def _row(line: list[Any], place: str) -> Row:
    if len(line) != len(Row._fields):
        raise ValueError(f"{place}: expected {len(Row._fields)} values, got {len(line)}")
    row = Row(*line)
    if row.kernel not in KERNELS:
        raise ValueError(f"{place}: expected a kernel of {', '.join(KERNELS)}, got {row.kernel!r}")
    try:
        median, cudnn = float(row.median_ms), float(row.cudnn_ms)
    except ValueError:
        median = cudnn = math.nan
    if not (0 < median and 0 < cudnn < math.inf):
        raise ValueError(
            f"{place}: expected two times in ms, got {row.median_ms!r} and {row.cudnn_ms!r}"
        )
    return row._replace(median_ms=median, cudnn_ms=cudnn)


def user_rows() -> list[Row]:
    """The rows of the user's table, including those out of date; none if it is damaged.

    A damaged table is reported once, on the logger ``deeplab_fast``; it is only a cache.
    """
    path = user_path()
    try:
        return read(path)
    except FileNotFoundError:
        return []
    except (OSError, ValueError) as error:
        _report_once(path, str(error))
        return []


@functools.cache
def _report_once(path: Path, reason: str) -> None:
    _logger.warning(
        "deeplab_fast ignores your dispatch table, and replaces it when you next tune: %s", reason
    )


def write(path: Path, rows: Iterable[Row]) -> None:
    """Replace the table at ``path``; of rows with the same key the last is written."""
    merged = {row.key: row for row in rows}
    with replacing(path) as partial, partial.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(Row._fields)
        for _, row in sorted(merged.items()):
            writer.writerow(f"{value:.6g}" if isinstance(value, float) else value for value in row)


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold an exclusive lock on a file, which is created if necessary and not removed."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


changed: list[Callable[[], None]] = []
"""Functions that :func:`add` calls: they forget what was derived from the tables."""


def add(rows: Iterable[Row]) -> None:
    """Add rows to the user's table, from which kernels are chosen from now on.

    A row replaces the one with the same device, op, shape bucket, shape and kernel. Other processes
    may add rows at the same time; none are lost.

    Raises:
        ValueError: a row is invalid; the table is unchanged.
        OSError: the table cannot be written.
    """
    new = [_row(list(row), f"row {number}") for number, row in enumerate(rows)]
    path = user_path()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _locked(path.with_name(f"{path.name}.lock")):
            write(path, [*user_rows(), *new])
    except OSError as error:
        message = f"cannot write your dispatch table {path}: {error.strerror or error}"
        raise type(error)(f"{message} (expected a folder to write to)") from error
    fastest_kernels.cache_clear()
    for forget in changed:
        forget()


def rows_of(device: torch.device) -> dict[str, dict[str, list[Row]]]:
    """The rows of both tables for this class of devices, by op and shape bucket.

    A user's row replaces the shipped one of the same shape and kernel, unless it is out of date.
    """
    valid = [row for row in user_rows() if row.versions == versions()]
    merged = {row.key: row for row in (*read(PATH), *valid)}
    here = device_class(device)
    rows: dict[str, dict[str, list[Row]]] = defaultdict(lambda: defaultdict(list))
    for row in merged.values():
        if row.device == here:
            rows[row.op][row.shape_bucket].append(row)
    return rows


def worst_rows(rows: Iterable[Row]) -> list[Row]:
    """The row of each kernel with its worst ratio to cuDNN, the best of them first."""
    worst = {row.kernel: row for row in sorted(rows, key=lambda row: row.ratio)}
    return sorted(worst.values(), key=lambda row: row.ratio)


@functools.cache
def fastest_kernels(device: torch.device) -> dict[str, dict[str, tuple[str, ...]]]:
    """Kernels that beat cuDNN on devices of this class, for each op and shape bucket.

    A kernel that was slower than cuDNN on any shape of a bucket is left out. The kernels of a
    bucket are sorted by their worst ratio to cuDNN, the best first.
    """
    return {
        op: {
            bucket: tuple(row.kernel for row in worst_rows(rows) if row.ratio < 1)
            for bucket, rows in buckets.items()
        }
        for op, buckets in rows_of(device).items()
    }
