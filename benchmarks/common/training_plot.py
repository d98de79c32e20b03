"""Plot the runs of train_camvid.py."""

from __future__ import annotations

import io
import re
from typing import Any

import numpy as np
from matplotlib.figure import Figure


def png(header: dict[str, str], contents: list[dict[str, Any]], variants: list[str]) -> bytes:
    """A PNG of the training losses, the validation curves and the test scores of all runs."""
    has_curve = any(content["val_miou"] for content in contents)
    figure = Figure(figsize=(10, 7), layout="constrained")
    top, bottom = figure.subfigures(2, 1)
    loss, *curve = top.subplots(1, 2 if has_curve else 1, squeeze=False)[0]
    classes, total = bottom.subplots(1, 2, width_ratios=(5, 1))
    for content in contents:
        run = content["run"]
        index = variants.index(run["variant"])
        style: Any = {
            "color": f"C{index}",
            "linewidth": 1,
            "linestyle": "--" if index else "-",  # curves that coincide stay visible
            "label": f"{run['variant']}, seed {run['seed']}",
        }
        losses = content["losses"]
        window = max(1, len(losses) // 50)  # points averaged
        smooth = np.convolve(losses, np.full(window, 1 / window), "valid")
        loss.plot(
            np.linspace(window / len(losses), 1, len(smooth)) * run["updates"], smooth, **style
        )
        if has_curve:
            curve[0].plot(*zip(*content["val_miou"]), **style)
        total.plot(run["variant"], run["test_miou"], "o", color=f"C{index}", alpha=0.7)
    _bars(classes, contents, variants)
    loss.set_xlabel("update")
    loss.set_ylabel("training loss")
    loss.legend(fontsize=8)
    for axes in curve:
        axes.set_xlabel("epoch")
        axes.set_ylabel("validation mIoU")
    total.set_ylabel("test mIoU")
    total.margins(x=0.5)
    total.tick_params(axis="x", rotation=30)
    figure.suptitle(
        f"{header['benchmark']}\n{header['device']}, {header['threads']} threads, "
        f"{header['versions']}",
        fontsize=9,
    )
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=120)
    return image.getvalue()


def _bars(axes: Any, contents: list[dict[str, Any]], variants: list[str]) -> None:
    """Mean test IoU of each class, with the range over the seeds."""
    names = list(contents[0]["test_iou"])
    places = np.arange(len(names))
    for index, variant in enumerate(variants):
        scores = np.array([
            # A class that occurs neither in the images nor in the predictions has no IoU.
            [np.nan if value is None else value for value in content["test_iou"].values()]
            for content in contents
            if content["run"]["variant"] == variant
        ])  # fmt: skip
        if len(scores):
            mean = scores.mean(0)
            axes.bar(
                places + 0.4 * (index - 0.5), mean, 0.4, color=f"C{index}", label=variant,
                yerr=[mean - scores.min(0), scores.max(0) - mean], capsize=2,
            )  # fmt: skip
    axes.set_xticks(
        places, [re.sub("(?<=[a-z])(?=[A-Z])", "\n", name) for name in names], fontsize=7
    )
    axes.set_ylabel("test IoU")
    axes.legend(fontsize=8)
