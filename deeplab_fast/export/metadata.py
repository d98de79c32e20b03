"""Description of a model that is stored in exported files."""

from __future__ import annotations

import json
from importlib.metadata import version
from typing import Any

import torch

from ..models.preprocessing import Preprocessing


def metadata_of(model: Any, result: str, dtype: torch.dtype) -> dict[str, str]:
    """Names and values that an application needs to use an exported model.

    ``result`` and, for labels, ``labels_dtype`` describe the output, ``deeplab_fast_version`` the
    version of this package. A model of another project has no more. Ours has ``preprocessing``, a
    JSON object, and, if its classes have names, ``categories``, a JSON list of them.

    The preprocessing of a whole photo: resize it, so that its shorter side has ``resize`` pixels,
    if that is not null. If ``side_multiple`` is 16 and ``side_remainder`` is 1, resize it to sides
    of 16 k + 1, the nearest ones. Both resizes are bilinear with antialiasing. Divide the values of
    the pixels by 255, subtract ``mean`` and divide by ``std``. The labels are those of the resized
    photo. ``crop`` is the (height, width) of the centre crop that the network was evaluated with.

    Args:
        model: the model, plain or prepared for inference.
        result: "labels" or "logits".
        dtype: dtype of the labels.
    """
    metadata = {"deeplab_fast_version": version("deeplab-fast"), "result": result}
    if result == "labels":
        metadata["labels_dtype"] = str(dtype).removeprefix("torch.")
    preprocessing = getattr(model, "preprocessing", None)
    if isinstance(preprocessing, Preprocessing):
        metadata["preprocessing"] = json.dumps(_described(preprocessing, model.align_corners))
    if isinstance(getattr(model, "categories", None), tuple):
        metadata["categories"] = json.dumps(list(model.categories), ensure_ascii=False)
    return metadata


def _described(preprocessing: Preprocessing, align_corners: bool) -> dict[str, Any]:
    colors = {1: "grey", 3: "RGB"}
    return {
        "channels": colors.get(len(preprocessing.mean)),
        "mean": preprocessing.mean,
        "std": preprocessing.std,
        "resize": preprocessing.resize,
        "crop": preprocessing.crop,
        # With align_corners the corners of the logits lie on the corners of the image only then.
        "side_multiple": 16 if align_corners else 1,
        "side_remainder": 1 if align_corners else 0,
    }
