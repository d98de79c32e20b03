"""COCO-Stuff: label images of all 164000 images of COCO."""

from __future__ import annotations

from pathlib import Path

from .data import IGNORE, SegmentationData
from .errors import TrainingError
from .layouts import folder

# Names in the order of their ids, from 1 (github.com/nightrome/cocostuff, labels.txt).
_NAMES = """
person, bicycle, car, motorcycle, airplane, bus, train, truck, boat, traffic light, fire
hydrant, street sign, stop sign, parking meter, bench, bird, cat, dog, horse, sheep, cow,
elephant, bear, zebra, giraffe, hat, backpack, umbrella, shoe, eye glasses, handbag, tie,
suitcase, frisbee, skis, snowboard, sports ball, kite, baseball bat, baseball glove,
skateboard, surfboard, tennis racket, bottle, plate, wine glass, cup, fork, knife, spoon,
bowl, banana, apple, sandwich, orange, broccoli, carrot, hot dog, pizza, donut, cake, chair,
couch, potted plant, bed, mirror, dining table, window, desk, toilet, door, tv, laptop, mouse,
remote, keyboard, cell phone, microwave, oven, toaster, sink, refrigerator, blender, book,
clock, vase, scissors, teddy bear, hair drier, toothbrush, hair brush, banner, blanket,
branch, bridge, building-other, bush, cabinet, cage, cardboard, carpet, ceiling-other,
ceiling-tile, cloth, clothes, clouds, counter, cupboard, curtain, desk-stuff, dirt, door-
stuff, fence, floor-marble, floor-other, floor-stone, floor-tile, floor-wood, flower, fog,
food-other, fruit, furniture-other, grass, gravel, ground-other, hill, house, leaves, light,
mat, metal, mirror-stuff, moss, mountain, mud, napkin, net, paper, pavement, pillow, plant-
other, plastic, platform, playingfield, railing, railroad, river, road, rock, roof, rug,
salad, sand, sea, shelf, sky-other, skyscraper, snow, solid-other, stairs, stone, straw,
structural-other, table, tent, textile-other, towel, tree, vegetable, wall-brick, wall-
concrete, wall-other, wall-panel, wall-stone, wall-tile, wall-wood, water-other, waterdrops,
window-blind, window-other, wood
"""
# Ids of the classes that COCO has no annotations of.
_UNUSED = (12, 26, 29, 30, 45, 66, 68, 69, 71, 83, 91)


def coco_stuff(root: str | Path, split: str) -> SegmentationData:
    """COCO-Stuff: the 171 classes of things and stuff of COCO 2017, without background.

    The images are in images/SPLIT2017 or SPLIT2017. The label images, those of
    stuffthingmaps_trainval2017.zip, are in stuffthingmaps/SPLIT2017 or annotations/SPLIT2017.
    Value n is the class with id n + 1, and 255 is unlabelled (github.com/nightrome/cocostuff).

    Raises:
        TrainingError: a folder or file is missing; the message names it.

    >>> data = coco_stuff("coco", "train")
    """
    root = Path(root)
    images = _existing(root, f"images/{split}2017", f"{split}2017")
    labels = _existing(root, f"stuffthingmaps/{split}2017", f"annotations/{split}2017")
    text = _NAMES.replace("-\n", "-").replace("\n", " ")
    names = [name.strip() for name in text.split(",")]
    used = [id for id in range(1, len(names) + 1) if id not in _UNUSED]
    return folder(
        root,
        split,
        [names[id - 1] for id in used],
        label_ids={id - 1: label for label, id in enumerate(used)} | {IGNORE: IGNORE},
        images=f"{images}/{{name}}.jpg",
        labels=f"{labels}/{{name}}.png",
    )


def _existing(root: Path, *folders: str) -> str:
    for path in folders:
        if (root / path).is_dir():
            return path
    raise TrainingError(f"{root}: no such folder as {folders[0]} (expected it or {folders[1]})")
