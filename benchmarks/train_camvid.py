"""Train on CamVid with deeplab_fast and, with the same recipe and batches, in plain PyTorch.

Without --weights, DeepLabV3-ResNet50 is trained from scratch, for a GPU: our model, and
torchvision's in a plain PyTorch loop. They start from equal weights for each seed, and are not
evaluated during training.

With --weights, a model for PASCAL VOC is fine-tuned, which a CPU can do: once with our ops
("deeplab_fast") and once with each op's reference in plain PyTorch ("reference"). FOLDER is a
Hugging Face folder of DeepLabV3-MobileNetV2 whose batch norms are folded; they are frozen. The
model is evaluated on "val" during training. The model after the last update is tested.

    python benchmarks/train_camvid.py CAMVID                             # three seeds of each
    python benchmarks/train_camvid.py CAMVID --weights FOLDER            # the same, fine-tuning
    python benchmarks/train_camvid.py CAMVID --weights FOLDER --timing   # only time and memory
    python benchmarks/train_camvid.py CAMVID --tiny                      # smoke test

Each run is a process of its own and writes its scores and losses to --output as VARIANT-SEED.json.
Runs whose file exists are skipped, so an interrupted command can be repeated, and the work can be
split; the table (CSV) and the plot show all runs in the folder:

    python benchmarks/train_camvid.py CAMVID --output results --variants torchvision --seeds 0
    python benchmarks/train_camvid.py CAMVID --output results --variants deeplab_fast --seeds 0 1

The time of a run is that of all updates, with reading the images, without evaluation. It means
little on a busy machine, and variants that ran one after the other differ for other reasons, too.
--timing trains the variants for a few minutes, in blocks of updates that take turns, and writes
timing.csv. It has a third variant, "pytorch": the reference with F.interpolate and F.cross_entropy
as its loss, which is faster than our reference of it. On a CPU the peak memory is the peak resident
memory of the process.

CAMVID holds images/{train,val,test} and labels/{train,val,test}, with classes 0 to 10 and 11 for
pixels to ignore.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import os
import statistics
from pathlib import Path
from typing import Any, NamedTuple

import torch
from common import training_plot
from common.environment import commit, csv_text, run_header, write_atomically
from common.resources import OtherLoad
from common.training import Run, in_process, interleaved, measured

from deeplab_fast.training import Recipe
from deeplab_fast.training.loader import steps_per_epoch

BLOCK, BLOCKS = 10, 15  # updates that are timed together, and how often


class Experiment(NamedTuple):
    """Variants to compare, and the settings of :class:`Run` that all runs share."""

    name: str
    variants: tuple[str, str]
    recipe: Recipe
    output_stride: int
    log_every: int
    evaluate_every: int | None


# A learning rate of 0.01 for 8 images is torchvision's; the others are defaults of Recipe.
FROM_SCRATCH = Experiment(
    "from scratch (no ImageNet weights)",
    ("deeplab_fast", "torchvision"),
    Recipe(
        epochs=100, batch_size=8, crop_size=(360, 480), learning_rate=0.01, warmup_steps=100
    ),
    output_stride=8,
    log_every=10,
    evaluate_every=None,
)  # fmt: skip
# Folded weights diverge at the learning rates for batch norm: at 0.01, and 0.1 for the head. The
# class weights are the square roots of those of median frequency balancing (Eigen and Fergus 2015,
# section 6.3.2), rounded; without them thin classes such as poles are not predicted for epochs.
FINE_TUNING = Experiment(
    "fine-tuning",
    ("deeplab_fast", "reference"),
    Recipe(
        epochs=12, batch_size=8, crop_size=(193, 257), scale=(0.5, 1.25), learning_rate=0.004,
        head_learning_rate=0.04, warmup_steps=20, freeze_batch_norm=True,
        class_weights=(0.5, 0.4, 2.1, 0.4, 1.0, 0.7, 2.0, 2.0, 0.9, 2.6, 3.9),
    ),
    output_stride=16,
    log_every=1,
    evaluate_every=2,
)  # fmt: skip


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=Path, metavar="CAMVID")
    parser.add_argument(
        "--weights", metavar="FOLDER", help="fine-tune this model instead of training from scratch"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--variants", nargs="+", choices=sorted({*FROM_SCRATCH.variants, *FINE_TUNING.variants}),
        metavar="VARIANT", help="default: both",
    )  # fmt: skip
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, help="default: 100, or 12 with --weights")
    parser.add_argument(
        "--workers", type=int, default=min(8, len(os.sched_getaffinity(0))),
        help="processes that read images",
    )  # fmt: skip
    parser.add_argument(
        "--output", type=Path, default=Path(__file__).parent / "results/local/train_camvid"
    )
    parser.add_argument("--timing", action="store_true", help="only measure time and memory")
    parser.add_argument(
        "--tiny", action="store_true", help="one epoch of tiny crops, as a smoke test"
    )
    args = parser.parse_args(argv)
    experiment = FINE_TUNING if args.weights else FROM_SCRATCH
    args.variants = args.variants or list(experiment.variants)
    unknown = set(args.variants) - set(experiment.variants)
    if unknown:
        parser.error(f"--variants: expected {' or '.join(experiment.variants)}, got {unknown}")
    if args.timing and not args.weights:
        parser.error("--timing: expected --weights")
    return args


def main(argv: list[str] | None = None) -> None:
    args = arguments(argv)
    device = torch.device(args.device)
    experiment = FINE_TUNING if args.weights else FROM_SCRATCH
    recipe = dataclasses.replace(
        experiment.recipe,
        epochs=args.epochs or experiment.recipe.epochs,
        dtype="bfloat16" if device.type == "cuda" else "float32",
    )
    if args.tiny:
        recipe = dataclasses.replace(recipe, epochs=1, batch_size=2, crop_size=(33, 33))
    header = run_header(f"train_camvid, {experiment.name}", device)
    of_run = {name: header.pop(name) for name in ("commit", "date")}
    header["output_stride"] = str(experiment.output_stride)
    header["recipe"] = str(recipe)

    def run(variant: str, seed: int) -> Run:
        return Run(
            variant, args.data, args.weights, experiment.output_stride,
            dataclasses.replace(recipe, seed=seed), device, args.workers, experiment.log_every,
            experiment.evaluate_every,
        )  # fmt: skip

    if args.timing:
        runs = [run(variant, args.seeds[0]) for variant in (*experiment.variants, "pytorch")]
        time_updates(runs, {**header, **of_run}, args.output, 2 if args.tiny else BLOCKS)
        return
    results(args.output, header)
    for seed in args.seeds:
        for variant in args.variants if seed % 2 == 0 else reversed(args.variants):
            path = args.output / f"{variant}-{seed}.json"
            if not path.exists():
                content = in_process(measured, run(variant, seed))
                row = {"variant": variant, "seed": seed, **content["run"]}
                content["run"] = row | {"commit": commit(), "date": now()}
                text = json.dumps({"header": header, **content})
                write_atomically(path, text.encode() + b"\n")
    summarize(args.output, header, experiment.variants)


def results(output: Path, header: dict[str, str]) -> list[dict[str, Any]]:
    """The runs in ``output``, which must all have the same header."""
    contents = []
    for path in sorted(output.glob("*-*.json")):
        contents.append(json.loads(path.read_text()))
        for key, value in contents[-1]["header"].items():
            if value != header.get(key):
                raise SystemExit(
                    f"{path}: {key}: expected {header.get(key)!r}, got {value!r}; "
                    "choose another --output"
                )
    return contents


def summarize(output: Path, header: dict[str, str], variants: tuple[str, str]) -> None:
    """Write the table and the plot of all runs in ``output``, and print their means."""
    contents = results(output, header)
    runs = [content["run"] for content in contents]
    for run in runs:
        print(", ".join(f"{key} {value}" for key, value in run.items()))
    write_atomically(output / "train_camvid.csv", csv_text(header, list(runs[0]), runs))
    write_atomically(
        output / "train_camvid.png", training_plot.png(header, contents, list(variants))
    )
    for variant in variants:
        scores = [run["test_miou"] for run in runs if run["variant"] == variant]
        if scores:
            deviation = f", standard deviation {statistics.stdev(scores):.4f}" if scores[1:] else ""
            print(
                f"{variant}: mean test mIoU {statistics.mean(scores):.4f} of {len(scores)} seeds, "
                f"{min(scores):.4f} to {max(scores):.4f}{deviation}"
            )
    print(f"written to {output}/train_camvid.csv and .png")


def time_updates(runs: list[Run], header: dict[str, str], output: Path, blocks: int) -> None:
    """Write timing.csv: the time and the memory of each variant, trained in turns."""
    load = OtherLoad()
    times = interleaved(runs, blocks, BLOCK)
    header["other_load_percent"] = f"{load.percent():.1f}"
    rows = []
    for run in runs:
        seconds, faults, peak = times[run.variant]
        steps = steps_per_epoch(len(run.data("train")), run.recipe)
        low, _, high = statistics.quantiles(seconds, n=4)
        median = statistics.median(seconds)
        rows.append({
            "variant": run.variant,
            "seconds_per_update": median,
            "min_seconds": min(seconds),
            "iqr_percent": 100 * (high - low) / median,
            "blocks": len(seconds),
            "seconds_per_epoch": median * steps,
            "page_faults_per_update": faults,
            "peak_mib": peak,
        })  # fmt: skip
        print(", ".join(f"{key} {value}" for key, value in rows[-1].items()))
    write_atomically(output / "timing.csv", csv_text(header, list(rows[0]), rows))
    print(f"written to {output}/timing.csv")


def now() -> str:
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")


if __name__ == "__main__":
    main()
