"""Tables of the results in benchmarks/results/, written into README.md and pages of docs/.

A case that was measured more than once is shown as measured last. The CSV files hold more rows than
the tables: further dtypes and batch sizes, and the convolutions of a single dilation.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

from common import environment, harness, result_files

RESULTS = environment.ROOT / "benchmarks" / "results"
BEGIN, END = "<!-- made by benchmarks/table.py -->\n", "<!-- end of what it made -->\n"
BENCHMARKS = ("ceilings", "model", "aspp", "upsample_argmax", "upsample_cross_entropy")
DTYPES, BATCHES = ("fp32", "bf16"), ("1", "8")
COLUMNS = ("", "deeplab_fast", "best of PyTorch", "speedup", "peak memory, MiB", "others, ms")

# The rows of README.md: what is computed, and the benchmark, case and dtype that measured it.
README_FOLDER = "xeon-2core-2026-11-22"
README_ROWS = {
    "Logits to labels, `upsample_argmax`, 513x513, 21 classes": (
        "upsample_argmax",
        "VOC 513 OS8, trained logits",
        "fp32",
    ),
    "Loss and its gradient, `upsample_cross_entropy`, 513x513, 21 classes": (
        "upsample_cross_entropy",
        "VOC 513 OS8",
        "fp32",
    ),
    "Image to labels, ResNet-50, output stride 8, bf16": (
        "model",
        "resnet50 VOC 513 OS8",
        "bf16",
    ),
    "Image to labels, ResNet-50, output stride 8, fp32": (
        "model",
        "resnet50 VOC 513 OS8",
        "fp32",
    ),
}

# The runs of train_camvid.py that docs/guides/train.md shows.
TRAINING_FOLDER = "epyc-2core-2026-11-27/fine-tuning"

# The tasks of bench_accelerate.py, and what docs/guides/accelerate.md says above their tables.
ACCELERATE_TASKS = {
    "labels": "From images to labels:",
    "training step": "A training step: forward, loss and backward.",
}
ACCELERATE_COLUMNS = (
    "model, size", "original", "accelerated", "speedup", "A/A", "goal", "original, compiled",
    "accelerated, compiled", "accelerated beside compiled", "peak memory, MiB",
)  # fmt: skip

Rows = list[dict[str, str]]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--check", action="store_true", help="fail if a page differs from the files; write nothing"
    )
    args = parser.parse_args(argv)
    for path, text in (
        (environment.ROOT / "docs" / "performance.md", tables(RESULTS)),
        (environment.ROOT / "README.md", readme_table(RESULTS / README_FOLDER)),
        (
            environment.ROOT / "docs" / "guides" / "train.md",
            training_tables(RESULTS / TRAINING_FOLDER),
        ),
        (environment.ROOT / "docs" / "guides" / "accelerate.md", accelerate_tables(RESULTS)),
    ):
        old = path.read_text()
        new = with_text(old, text, path)
        if args.check and new != old:
            raise SystemExit(f"{path} differs from the results: run python benchmarks/table.py")
        if new != old:
            environment.write_atomically(path, new.encode())


def with_text(page: str, text: str, path: Path) -> str:
    """``page`` with ``text`` between the two markers."""
    before, _, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not end:
        raise SystemExit(f"{path}: expected the lines {BEGIN.strip()} and {END.strip()}")
    return before + BEGIN + text + END + after


def readme_table(folder: Path) -> str:
    _, cases = read(folder)
    lines = ["| | deeplab_fast | best of PyTorch | speedup | raw times |", "|---|---|---|---|---|"]
    for what, (benchmark, case, dtype) in README_ROWS.items():
        rows = cases[benchmark, case, "1", dtype]
        best, peer = fastest(rows)
        link = f"[{folder.name[-10:]}](benchmarks/results/{folder.name}/{rows[0]['file']})"
        lines.append(
            f"| {what} | {digits(time(best))} ms | {digits(time(peer))} ms | "
            f"**{digits(time(peer) / time(best))}x** | {link} |"
        )
    return "\n".join(lines) + "\n"


def training_tables(folder: Path) -> str:
    """The scores of the runs of train_camvid.py and, if they were measured, time and memory."""
    header, rows = result_files.read(folder / "train_camvid.csv")
    seeds = sorted({row["seed"] for row in rows}, key=int)
    lines = [
        f"| test mIoU | seed {' | seed '.join(seeds)} | mean | mean pixel accuracy |",
        "|---" * (len(seeds) + 3) + "|",
    ]
    for variant, runs in by_variant(rows).items():
        miou, accuracy = (
            [100 * float(run[f"test_{name}"]) for run in runs]
            for name in ("miou", "pixel_accuracy")
        )
        scores = [*miou, statistics.mean(miou), statistics.mean(accuracy)]
        lines.append(f"| {variant} | {' | '.join(f'{score:.2f} %' for score in scores)} |")
    lines += ["", training_source(header | rows[-1], folder, "train_camvid.csv")]
    lines += [loss_differences(folder, seeds), ""]
    if (folder / "timing.csv").exists():
        header, rows = result_files.read(folder / "timing.csv")
        lines += [
            "| | seconds per epoch | IQR | relative to deeplab_fast | peak memory |",
            "|---|---|---|---|---|",
        ]
        first = float(rows[0]["seconds_per_epoch"])
        for row in rows:
            seconds = float(row["seconds_per_epoch"])
            lines.append(
                f"| {row['variant']} | {digits(seconds)} | {digits(float(row['iqr_percent']))} % | "
                f"{digits(seconds / first)} | {digits(float(row['peak_mib']))} MiB |"
            )
        lines += ["", training_source(header, folder, "timing.csv")]
    return "\n".join(lines)


def accelerate_tables(results: Path) -> str:
    """Tables of the cases of bench_accelerate.py in the newest folder that has some."""
    files = [path for folder in result_folders(results) for path in folder.glob("accelerate-*.csv")]
    if not files:
        return "No results yet.\n"
    folder = files[0].parent
    used, cases = [], {}
    for path in sorted(folder.glob("accelerate-*.csv")):  # the last measurement of a case counts
        header, rows = result_files.read(path)
        used.append((path.name, header))
        measured: dict[str, Rows] = {}
        for row in rows:
            case = f"{row['case']}, batch {row['batch']}, {row['dtype']}"
            measured.setdefault(case, []).append({**row, "file": path.name})
        cases |= measured
    lines = []
    for task, title in ACCELERATE_TASKS.items():
        rows_of = {case: rows for case, rows in cases.items() if f", {task}, " in case}
        if rows_of:
            lines += [title, "", f"| {' | '.join(ACCELERATE_COLUMNS)} |"]
            lines += ["|---" * len(ACCELERATE_COLUMNS) + "|"]
            lines += [
                f"| {case.replace(f', {task}, batch 1, fp32', '').replace(f', {task}', '')} | "
                f"{accelerate_cells(rows)} |"
                for case, rows in rows_of.items()
            ]
            lines += [""]
    for name, header in used:
        if any(row["file"] == name for rows in cases.values() for row in rows):
            link = f"[{name}](../../benchmarks/results/{folder.name}/{name})"
            lines.append(
                f"{header['device']}, threads: {header['threads']}; {header['versions']}; commit "
                f"{header['commit']}; {header['date'][:10]}. Raw file: {link}.\n"
            )
    return "\n".join(lines)


def accelerate_cells(rows: Rows) -> str:
    """Times of the original and of the accelerated model, speedups, memory, noise and goal.

    A variant that failed has no row and no cell.
    """
    by_name = {row["variant"]: row for row in rows}
    eager = [
        row for name, row in by_name.items() if name in ("original NCHW", "original channels_last")
    ]
    original = min(eager, key=time, default=None)
    ours = by_name.get("accelerated")

    def milliseconds(row: dict[str, str] | None) -> str:
        return f"{digits(time(row))} ms" if row else "-"

    def speedup(column: str) -> str:
        return f"{1 / float(ours[column]):.2f}x" if ours and ours[column] else "-"

    def mebibytes(row: dict[str, str] | None) -> str:
        return digits(float(row["peak_mib"])) if row and row["peak_mib"] else "-"

    noise = f"{float(ours['noise_percent']):.1f} %" if ours and ours["noise_percent"] else "-"
    return " | ".join([
        f"{milliseconds(original)} ({original['variant'].removeprefix('original ')})"
        if original
        else "-",
        milliseconds(ours),
        speedup("ratio"),
        noise,
        ours["goal"] if ours and ours["goal"] else "-",
        milliseconds(by_name.get("original, compiled")),
        milliseconds(by_name.get("accelerated, compiled")),
        speedup("ratio_to_compiled"),
        f"{mebibytes(original)} / {mebibytes(ours)}",
    ])  # fmt: skip


def loss_differences(folder: Path, seeds: list[str]) -> str:
    """How far the losses of two variants are apart in the first updates."""
    updates = (1, 2, 5, 10)
    differences: dict[int, list[float]] = {update: [] for update in updates}
    for seed in seeds:
        runs = [json.loads(path.read_text()) for path in sorted(folder.glob(f"*-{seed}.json"))]
        ours, theirs = (run["losses"] for run in runs)
        for update in updates:
            loss = ours[update - 1]
            differences[update].append(abs(theirs[update - 1] - loss) / loss)
    largest = ", ".join(f"{max(values):.0e} in update {n}" for n, values in differences.items())
    return f"Largest relative difference of the losses of two runs with the same seed: {largest}."


def by_variant(rows: Rows) -> dict[str, Rows]:
    variants: dict[str, Rows] = {}
    for row in rows:
        variants.setdefault(row["variant"], []).append(row)
    return variants


def training_source(values: dict[str, str], folder: Path, file: str) -> str:
    """The machine and the date of a file of train_camvid.py, and a link to it."""
    return (
        f"{values['device']}, threads: {values['threads']}; {values['versions']}; commit "
        f"{values['commit']}; {values['date'][:10]}. Raw file: "
        f"[{file}](../../benchmarks/results/{folder.parent.name}/{folder.name}/{file}).\n"
    )


def tables(results: Path) -> str:
    """A table for each folder with raw files of models and ops, the newest first."""
    return "".join(
        table(folder)
        for folder in result_folders(results)
        if any(not path.name.startswith("accelerate-") for path in folder.glob("*.csv"))
    )


def result_folders(results: Path) -> list[Path]:
    """The folders of all machines, the newest first."""
    folders = [path for path in results.iterdir() if path.name != "local" and path.is_dir()]
    return sorted(folders, key=lambda path: (path.name[-10:], path.name), reverse=True)


def table(folder: Path) -> str:
    headers, cases = read(folder)
    device, threads, versions = (
        ", ".join(dict.fromkeys(header[key] for header in headers))
        for key in ("device", "threads", "versions")
    )
    commits = ", ".join(sorted({header["commit"] for header in headers}))
    links = (
        f"[{header['file']}](../benchmarks/results/{folder.name}/{header['file']})"
        for header in headers
    )
    lines = [
        f"### {folder.name}",
        "",
        f"{device}, {threads} threads; {versions}; commits {commits}.",
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
    text = "\n".join(lines) + f"\n\nRaw files: {', '.join(links)}.\n\n"
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
    """The headers of all files, and the rows of each case in the last file that has it."""
    headers, cases = [], {}
    for path in sorted(folder.glob("*.csv"), key=lambda path: path.stem.split("-")[-2:]):
        header, rows = result_files.read(path)
        headers.append({**header, "file": path.name})
        benchmark = header["benchmark"].split()[0].removeprefix("bench_")
        measured: dict[tuple[str, ...], Rows] = {}
        for row in rows if benchmark in BENCHMARKS else ():
            key = benchmark, row["case"], row["batch"], row["dtype"]
            measured.setdefault(key, []).append({**row, "file": path.name})
        cases |= measured
    return headers, dict(sorted(cases.items(), key=lambda case: BENCHMARKS.index(case[0][0])))


def fastest(rows: Rows) -> tuple[dict[str, str], dict[str, str]] | None:
    """Our fastest variant and PyTorch's, or None if one side is missing.

    Labels in uint8 are left out: PyTorch writes int64, which is eight times as much memory. Models
    that we exported are left out, too: other engines run them.
    """
    ours = [
        row
        for row in rows
        if row["kind"] == "ours"
        and not any(word in row["variant"] for word in ("uint8", "exported"))
    ]
    theirs = [r for r in rows if r["variant"].startswith(("PyTorch", "torchvision"))]
    return (min(ours, key=time), min(theirs, key=time)) if ours and theirs else None


def cells(rows: Rows) -> str | None:
    """The cells of a case after its name, or None if one side is missing."""
    pair = fastest(rows)
    if pair is None:
        return None
    best, peer = pair
    others = [f"{r['variant']} {digits(time(r))}" for r in rows if r is not best and r is not peer]
    memory = [digits(float(r["peak_mib"])) if r["peak_mib"] else "-" for r in pair]
    return " | ".join([
        f"{digits(time(best))} ms ({best['variant']})",
        f"{digits(time(peer))} ms ({peer['variant']})",
        f"{digits(time(peer) / time(best))}x",
        " / ".join(memory),
        "; ".join(others),
    ])  # fmt: skip


def time(row: dict[str, str]) -> float:
    return float(row["median_ms"])


def rate(row: dict[str, str]) -> str:
    if row["gflop"]:
        return f"{digits(float(row['gflop']) / time(row))} TFLOP/s"
    return f"{digits(float(row['mbyte']) / time(row))} GB/s"


def digits(value: Any) -> str:
    """``value`` with three significant digits."""
    return f"{value:.0f}" if value >= 100 else f"{value:#.3g}".rstrip(".")


if __name__ == "__main__":
    main()
