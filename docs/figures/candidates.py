"""Draw the cells of a photo in which upsample_argmax compares classes: docs/figures/candidates.jpg.

    python docs/figures/candidates.py WEIGHTS

WEIGHTS is what `DeepLabV3.from_pretrained` takes, and the photo is the left half of
docs/segmentation.jpg. A cell is the square between four neighbouring low-resolution pixels. The
rule that drops classes is that of `upsample_argmax`; the labels of the op itself confirm it.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from deeplab_fast import DeepLabV3, upsample_argmax

DOCS = Path(__file__).parents[1]
PHOTO = (0, 0, 512, 512)  # within docs/segmentation.jpg
CELL = 8  # output pixels along the side of a cell
BLUE, AMBER = (100, 143, 255), (255, 176, 0)


def main() -> None:
    model = DeepLabV3.from_pretrained(sys.argv[1], align_corners=True)
    photo = Image.open(DOCS / "segmentation.jpg").crop(PHOTO).resize((513, 513))
    with torch.no_grad():
        logits = model.logits(model.preprocessing(photo)[None])["out"]
    can_win = candidates(logits[0])
    size = [CELL * (side - 1) + 1 for side in logits.shape[2:]]
    labels = upsample_argmax(logits, size, align_corners=True)[0]
    assert_labels_are_candidates(labels, can_win)

    count = can_win.sum(0)
    for number in count.unique():
        share = (count == number).float().mean()
        print(f"{share:6.1%} of the cells have {number} candidates")
    print(f"{count.float().mean():.2f} candidates on average, of {len(can_win)} classes")
    draw(photo, labels, count).save(DOCS / "figures" / "candidates.jpg", quality=88)


def candidates(logits: Tensor) -> Tensor:
    """Which classes can win in each cell of logits [C, H, W]: bool [C, H - 1, W - 1].

    As losing_bound in csrc/common/bilinear.h: a class that lies below another one by more than
    rounding at all four corners of a cell wins no pixel of it.
    """
    corners = torch.stack(
        [logits[:, :-1, :-1], logits[:, :-1, 1:], logits[:, 1:, :-1], logits[:, 1:, 1:]]
    )
    bounds = corners - (2**-18 * corners.abs() + 2**-118)
    can_win = torch.ones(corners.shape[1:], dtype=torch.bool)
    for c in range(len(logits)):
        can_win &= ~(corners <= bounds[:, c : c + 1]).all(0)
    return can_win


def assert_labels_are_candidates(labels: Tensor, can_win: Tensor) -> None:
    """Each pixel inside a cell has a label that `candidates` left to it."""
    for y in range(CELL):
        for x in range(CELL):
            inside = labels[y:-1:CELL, x:-1:CELL]
            assert can_win.gather(0, inside[None]).all()


def draw(photo: Image.Image, labels: Tensor, count: Tensor) -> Image.Image:
    """The labels over the photo, and beside it the cells with more than one candidate."""
    grey = np.asarray(photo.convert("L").convert("RGB"), np.float32)
    found = np.where(labels[..., None] > 0, BLUE, (255, 255, 255))
    left = Image.fromarray((0.55 * grey + 0.45 * found).astype(np.uint8))
    right = Image.fromarray((0.35 * grey + 0.65 * 255).astype(np.uint8))
    pen = ImageDraw.Draw(right)
    for y, x in (count > 1).nonzero().tolist():
        square = (x * CELL, y * CELL, (x + 1) * CELL, (y + 1) * CELL)
        pen.rectangle(square, fill=AMBER, outline="white")
    picture = Image.new("RGB", (2 * photo.width + 16, photo.height), "white")
    picture.paste(left, (0, 0))
    picture.paste(right, (photo.width + 16, 0))
    return picture


if __name__ == "__main__":
    main()
