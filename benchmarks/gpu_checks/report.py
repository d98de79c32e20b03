"""Report of gpu_check.py: rows on the terminal, report.md and a CSV file for each table."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from common.environment import write_atomically

Row = Mapping[str, Any]

# Columns of each table with the format of their numbers, "" for text.
TABLES: dict[str, dict[str, str]] = {
    "Correctness": {
        "family": "", "shape": "", "dtype": "", "outcome": "", "error": ".1e", "tolerance": ".1e",
        "seconds": ".1f", "note": "",
    },
    "Ceilings": {"measurement": "", "TFLOP/s": ".4g", "GB/s": ".4g"},
    "Time": {
        "family": "", "dtype": "", "outcome": "", "us": ".1f", "peer us": ".1f", "speedup": ".2f",
        "TFLOP/s": ".0f", "GB/s": ".0f", "bound us": ".1f", "of bound": ".0f", "k-iters": "d",
        "us/k-iter": ".3f", "peer": "", "note": "",
    },
    "Variants": {
        "family": "", "variant": "", "outcome": "", "error": ".1e", "tolerance": ".1e",
        "us": ".1f", "note": "",
    },
    "Sanitizer": {"tool": "", "family": "", "outcome": "", "note": ""},
}  # fmt: skip
EXPLANATIONS = {
    "Correctness": "The error is the largest difference from the ground truth, divided by the "
    "largest magnitude in the ground truth. The tolerance is twice PyTorch's error in the same "
    "dtype, plus the error of rounding to that dtype.",
    "Time": "`us` is our kernels' time in microseconds, `peer us` that of PyTorch's fastest "
    "variant, named by `peer`; `speedup` is `peer us` / `us`. TFLOP/s include products with zero "
    "padding, which libraries compute. `bound us` is a lower bound: the least time at the rates "
    "under Ceilings, without those products; `of bound` is `bound us` / `us` in percent. `k-iters` "
    "is the number of k-iterations of the busiest CTA; a work item counts as two more.",
}
WIDTHS = {"family": 31, "shape": 16, "dtype": 6, "outcome": 8, "measurement": 29, "peer": 20,
          "tool": 10, "variant": 14}  # fmt: skip
NUMBER_WIDTH = 10


class Report:
    """Tables in ``folder``, rewritten after each row so that a killed run loses nothing."""

    def __init__(self, folder: Path, header: dict[str, str]) -> None:
        self.folder, self.header = folder, header
        self.rows: dict[str, list[Row]] = {}
        for key, value in header.items():
            print(f"{key}: {value}")
        print(f"report: {folder / 'report.md'}", flush=True)
        self._write()

    def add(self, title: str, **row: Any) -> None:
        if title not in self.rows:
            print(f"\n{title}\n{head(title)}")
        self.rows.setdefault(title, []).append(row)
        print(line(title, row), flush=True)
        self._write()

    def outcomes(self) -> list[str]:
        return [row["outcome"] for rows in self.rows.values() for row in rows if "outcome" in row]

    def _write(self) -> None:
        parts = ["# gpu_check\n", *(f"* {key}: {value}" for key, value in self.header.items())]
        for title, rows in self.rows.items():
            parts += ["", f"## {title}", ""]
            if title in EXPLANATIONS:
                parts += [EXPLANATIONS[title], ""]
            parts.append(markdown(title, rows))
            comments = "".join(f"# {key}: {value}\n" for key, value in self.header.items())
            path = self.folder / f"{title.lower()}.csv"
            write_atomically(path, (comments + csv_text(title, rows)).encode())
        write_atomically(self.folder / "report.md", ("\n".join(parts) + "\n").encode())


def cells(title: str, row: Row) -> list[str]:
    """The row as text; a missing number is a dash."""
    texts = []
    for column, spec in TABLES[title].items():
        value = row.get(column)
        text = "-" if value is None and spec else "" if value is None else format(value, spec)
        texts.append(text)
    return texts


def padded(title: str, texts: list[str]) -> str:
    parts = []
    for (column, spec), text in zip(TABLES[title].items(), texts):
        if spec:
            parts.append(text.rjust(NUMBER_WIDTH))
        else:
            parts.append(" " * bool(parts) + text.ljust(WIDTHS.get(column, 0)))
    return "".join(parts).rstrip()


def head(title: str) -> str:
    return padded(title, list(TABLES[title]))


def line(title: str, row: Row) -> str:
    return padded(title, cells(title, row))


def markdown(title: str, rows: list[Row]) -> str:
    columns = TABLES[title]
    lines = [list(columns), ["---:" if spec else "---" for spec in columns.values()]]
    lines += [[text.replace("|", "\\|") for text in cells(title, row)] for row in rows]
    return "\n".join(f"| {' | '.join(texts)} |" for texts in lines)


def csv_text(title: str, rows: list[Row]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(TABLES[title]), extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()})
    return text.getvalue()
