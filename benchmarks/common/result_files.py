"""Read the CSV files that the benchmarks write.

Files written by version 0.1.0 name a few columns and cases differently. They are raw measurements
and are not edited; :func:`read` translates their names.
"""

from __future__ import annotations

import csv
from pathlib import Path

_COLUMNS_0_1_0 = {
    "spread_percent": "iqr_percent",
    "floor_ms": "lower_bound_ms",
    "percent_of_floor": "percent_of_lower_bound",
    "extra_mib": "peak_mib",
}
_LOGITS_0_1_0 = {"white noise": "random logits", "reference": "trained logits"}


def read(file: Path) -> tuple[dict[str, str], list[dict[str, str]]]:
    """The header (the lines that begin with #) and the rows of a benchmark's CSV file."""
    lines = file.read_text().splitlines()
    comments = [line for line in lines if line.startswith("#")]
    header = dict(line[2:].partition(": ")[::2] for line in comments)
    rows = [
        {_COLUMNS_0_1_0.get(column, column): value for column, value in row.items()}
        for row in csv.DictReader(lines[len(comments) :])
    ]
    for row in rows:
        if "case" in row:  # bench_host has none
            shape, comma, logits = row["case"].rpartition(", ")
            row["case"] = shape + comma + _LOGITS_0_1_0.get(logits, logits)
    return header, rows
