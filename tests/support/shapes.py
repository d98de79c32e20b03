"""A data set of red and blue rectangles, which a network learns in seconds."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from deeplab_fast.training import SegmentationData, folder

CLASSES = ("nothing", "red", "blue")


def write_shapes(
    root: Path, train: int = 6, val: int = 2, size: tuple[int, int] = (72, 56)
) -> Path:
    """Write images of ``size`` (width, height) in the layout "folder"; one row each is ignored."""
    random = np.random.default_rng(0)
    (root / "images").mkdir(parents=True)
    (root / "classes.txt").write_text("\n".join(CLASSES) + "\n")
    for split, count in (("train", train), ("val", val)):
        for kind in ("images", "labels"):
            (root / kind / split).mkdir(parents=True)
        for index in range(count):
            labels = np.zeros(size[::-1], dtype=np.uint8)
            for label in (1, 2):
                top, left = random.integers(0, (size[1] // 2, size[0] // 2))
                labels[top : top + size[1] // 3, left : left + size[0] // 3] = label
            colours = np.array([[90, 90, 90], [200, 40, 40], [40, 40, 200]])
            pixels = colours[labels] + random.integers(-30, 30, (*labels.shape, 3))
            labels[index % size[1]] = 255
            name = f"{index}.png"
            Image.fromarray(pixels.astype(np.uint8)).save(root / "images" / split / name)
            Image.fromarray(labels).save(root / "labels" / split / name)
    return root


def read_shapes(root: Path) -> tuple[SegmentationData, SegmentationData]:
    """Training and validation data of :func:`write_shapes`."""
    return folder(root, "train"), folder(root, "val")
