"""Faults: the checks of labels before a run."""

from __future__ import annotations

from .guards import Fault

FAULTS: dict[str, list[Fault]] = {
    "deeplab_fast/training/checks.py": [
        Fault(
            "masks of 0 and 255 pass",
            "values == [0, IGNORE] and classes.tolist() == [0, IGNORE]",
            "values == [1, IGNORE] and classes.tolist() == [0, IGNORE]",
        ),
        Fault("an evaluation of one class is an error", "elif trains and np.", "elif np."),
        Fault("errors are printed only", "    if errors:\n", "    if False:\n"),
        Fault(
            "labels that are no class in the order of their values",
            "key=lambda value: -counts.values[value].pixels",
            "key=lambda value: value",
        ),
        Fault(
            "classes that are counted from 1 are not recognised",
            "unknown == [count] and 0 not in values",
            "unknown == [0] and 0 not in values",
        ),
        Fault(
            "255 is not proposed as a class",
            "for found in (without, values) if",
            "for found in (without,) if",
        ),
        Fault(
            "copies of training images pass",
            "str(image) in paths or twin is not None and _are_copies(twin, str(image))",
            "str(image) in paths",
        ),
        Fault(
            "files of one name are copies",
            "twin is not None and _are_copies(twin, str(image))",
            "twin is not None",
        ),
        Fault(
            "crops are compared without the scale",
            "math.ceil(side * recipe.scale[1])",
            "math.ceil(side)",
        ),
    ],
    "deeplab_fast/training/label_counts.py": [
        Fault(
            "processes read the same files",
            "range(distributed.rank(), len(data), distributed.world_size())",
            "range(0, len(data), distributed.world_size())",
        ),
        Fault(
            "runs of one value count once",
            "np.bincount(runs.ravel(), lengths, len(found))",
            "np.bincount(runs.ravel(), None, len(found))",
        ),
        Fault("the rarest values are kept", "np.argsort(-pixels,", "np.argsort(pixels,"),
        Fault("images count once a pixel", "images[label] += 1", "images[label] += 2"),
        Fault(
            "files with one ignored pixel have no labels",
            "(classes == IGNORE).all()",
            "(classes == IGNORE).any()",
        ),
        Fault("weights without a bound", "math.log(1.02 + share)", "math.log(1 + share)"),
        Fault("absent classes weigh most", "if share else 0.0", "if share >= 0 else 0.0"),
        Fault("weights of another mean", "{weight / mean:.4g}", "{weight:.4g}"),
    ],
}
