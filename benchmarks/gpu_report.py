"""Tables of gpu_check: rows on the terminal as they come, report.md, a CSV file for each table."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from harness import write_atomically

Row = Mapping[str, Any]

# Columns of each table, and how their numbers are written.
TABLES: dict[str, dict[str, str]] = {
    "Correctness": {
        "family": "", "shape": "", "dtype": "", "outcome": "", "error": ".1e", "tolerance": ".1e",
        "seconds": ".1f", "note": "",
    },
    "Ceilings": {"what": "", "TFLOP/s": ".4g", "GB/s": ".4g"},
    "Time": {
        "family": "", "dtype": "", "outcome": "", "us": ".1f", "peer us": ".1f", "ratio": ".2f",
        "TFLOP/s": ".0f", "GB/s": ".0f", "bound us": ".1f", "of bound": ".0f", "steps": "d",
        "us/step": ".3f", "peer": "", "note": "",
    },
    "Variants": {
        "family": "", "variant": "", "outcome": "", "error": ".1e", "tolerance": ".1e",
        "us": ".1f", "note": "",
    },
    "Sanitizer": {"tool": "", "family": "", "outcome": "", "note": ""},
}  # fmt: skip
EXPLAINED = {
    "Correctness": "An error is the largest distance from the truth, divided by the largest number "
    "in the truth. The tolerance is twice the error of PyTorch in the same dtype, plus what "
    "rounding to that dtype can cost.",
    "Time": "`us` is the time of our kernels in microseconds and `peer us` that of the fastest "
    "peer in PyTorch, which `peer` names; `ratio` is `peer us` / `us`. TFLOP/s count products with "
    "zero padding too, as libraries compute them. `bound us` is the least time that the rates "
    "under Ceilings allow, without those products; `of bound` is `bound us` / `us` in percent. "
    "`steps` counts the work of the thread block that has most of it.",
}
WIDTHS = {"family": 31, "shape": 16, "dtype": 6, "outcome": 8, "what": 29, "peer": 20, "tool": 10,
          "variant": 14}  # fmt: skip
NUMBER_WIDTH = 10


class Report:
    """Files in ``folder``, written again after each row: nothing is lost when the run is killed."""

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
            if title in EXPLAINED:
                parts += [EXPLAINED[title], ""]
            parts.append(markdown(title, rows))
            comments = "".join(f"# {key}: {value}\n" for key, value in self.header.items())
            path = self.folder / f"{title.lower()}.csv"
            write_atomically(path, (comments + csv_text(title, rows)).encode())
        write_atomically(self.folder / "report.md", ("\n".join(parts) + "\n").encode())


def cells(title: str, row: Row) -> list[str]:
    """The row as text; what is not known is a dash."""
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
