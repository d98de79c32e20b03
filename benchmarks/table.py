"""README's table of results, made from the CSV files in the folders of benchmarks/results/.

Of a case measured more than once the last counts. The convolutions of a single rate, and what is
not named below, stay in the files.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from common import environment, harness, result_files

README = environment.ROOT / "README.md"
RESULTS = environment.ROOT / "benchmarks" / "results"
BEGIN, END = "<!-- made by benchmarks/table.py -->\n", "<!-- end of what it made -->\n"
BENCHMARKS = ("ceilings", "model", "aspp", "upsample_argmax", "upsample_cross_entropy")
DTYPES, BATCHES = ("fp32", "bf16"), ("1", "8")
COLUMNS = ("", "deeplab_fast", "the best of PyTorch", "ratio", "peak MiB", "others, ms")

Rows = list[dict[str, str]]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--check", action="store_true", help="only say whether README.md is what the files give"
    )
    args = parser.parse_args(argv)
    old = README.read_text()
    before, _, rest = old.partition(BEGIN)
    _, found, after = rest.partition(END)
    if not found:
        raise SystemExit(f"{README}: expected the lines {BEGIN.strip()} and {END.strip()}")
    new = before + BEGIN + tables(RESULTS) + END + after
    if args.check and new != old:
        raise SystemExit(f"{README} is not what the files give: python benchmarks/table.py")
    if new != old:
        environment.write_atomically(README, new.encode())


def tables(results: Path) -> str:
    """A table for each folder with raw files, the newest first."""
    folders = [path for path in results.iterdir() if path.name != "local" and path.is_dir()]
    folders.sort(key=lambda path: (path.name[-10:], path.name), reverse=True)
    return "".join(table(path) for path in folders if any(path.glob("*.csv")))


def table(folder: Path) -> str:
    headers, cases = read(folder)
    device, threads, versions = (
        ", ".join(dict.fromkeys(header[key] for header in headers))
        for key in ("device", "threads", "versions")
    )
    commits = ", ".join(sorted({header["commit"] for header in headers}))
    lines = [
        f"{device}, {threads} threads; {versions}; commits {commits}; raw files: "
        f"[{folder.name}](benchmarks/results/{folder.name}).",
        "",
        f"| {' | '.join(COLUMNS)} |",
        "|---" * len(COLUMNS) + "|",
    ]
    ceilings = []
    for (benchmark, case, batch, dtype), rows in cases.items():
        if benchmark == "ceilings":
            ceilings += [f"{case} in {dtype} {rate(row)}" for row in rows]
        elif dtype in DTYPES and batch in BATCHES and " dilation " not in case:
            if text := cells(rows):
                lines.append(f"| {benchmark}: {case}, batch {batch}, {dtype} | {text} |")
    text = "\n".join(lines) + "\n\n"
    failures = [
        f"* {key.removeprefix(harness.FAILED)}: {reason}\n"
        for header in headers
        for key, reason in header.items()
        if key.startswith(harness.FAILED)
    ]
    if failures:
        text += f"Left out, because they were wrong or raised:\n\n{''.join(failures)}\n"
    return f"{text}Ceilings of that machine: {'; '.join(ceilings)}.\n\n" if ceilings else text


def read(folder: Path) -> tuple[list[dict[str, str]], dict[tuple[str, ...], Rows]]:
    """The headers of all files, and the rows of each case in its last file."""
    headers, cases = [], {}
    for path in sorted(folder.glob("*.csv"), key=lambda path: path.stem.split("-")[-2:]):
        header, rows = result_files.read(path)
        headers.append(header)
        benchmark = header["benchmark"].split()[0].removeprefix("bench_")
        measured: dict[tuple[str, ...], Rows] = {}
        for row in rows if benchmark in BENCHMARKS else ():
            key = benchmark, row["case"], row["batch"], row["dtype"]
            measured.setdefault(key, []).append(row)
        cases |= measured
    return headers, dict(sorted(cases.items(), key=lambda case: BENCHMARKS.index(case[0][0])))


def cells(rows: Rows) -> str | None:
    """None if one side is missing. Labels in uint8 are less to write, so PyTorch has no match."""
    ours = [r for r in rows if r["kind"] == "ours" and "uint8" not in r["variant"]]
    theirs = [r for r in rows if r["variant"].startswith(("PyTorch", "torchvision"))]
    if not ours or not theirs:
        return None
    best, baseline = min(ours, key=time), min(theirs, key=time)
    others = [
        f"{r['variant']} {digits(time(r))}" for r in rows if r is not best and r is not baseline
    ]
    ratio = time(baseline) / time(best)
    peak = [digits(float(r["peak_mib"])) if r["peak_mib"] else "-" for r in (best, baseline)]
    return " | ".join([
        f"{digits(time(best))} ms ({best['variant']})",
        f"{digits(time(baseline))} ms ({baseline['variant']})",
        f"{digits(ratio)}x",
        " / ".join(peak),
        "; ".join(others),
    ])  # fmt: skip


def time(row: dict[str, str]) -> float:
    return float(row["median_ms"])


def rate(row: dict[str, str]) -> str:
    if row["gflop"]:
        return f"{digits(float(row['gflop']) / time(row))} TFLOP/s"
    return f"{digits(float(row['mbyte']) / time(row))} GB/s"


def digits(value: Any) -> str:
    """Three of them."""
    return f"{value:.0f}" if value >= 100 else f"{value:#.3g}".rstrip(".")


if __name__ == "__main__":
    main()
