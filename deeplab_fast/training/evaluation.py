"""How good a model is on a data set."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from ..models.preprocessing import Preprocessing, network_size
from ..models.sliding_window import predict_labels
from . import distributed
from .data import SegmentationData
from .errors import TrainingError
from .loader import in_workers
from .metrics import Scores, confusion_matrix


@torch.no_grad()
def evaluate(
    model: Any,
    data: SegmentationData,
    scales: Sequence[float] = (1.0,),
    flip: bool = False,
    window: tuple[int, int] | None = None,
    dtype: torch.dtype = torch.float32,
    workers: int = 2,
    quiet: bool = False,
) -> Scores:
    """Compare the labels that a model gives to whole images with the true ones.

    Images are prepared as ``deeplab-fast segment`` does, whole; labels are compared at full size.
    Where several processes run (torch.distributed), they share the images.

    Args:
        model: a :class:`deeplab_fast.DeepLabV3`, or one prepared for inference. Its mode is kept.
        data: images and their labels.
        scales, flip, window: see :func:`predict_labels`.
        dtype: of autocast; float32 for none.
        workers: processes that read images.
        quiet: show no progress, which is shown on a terminal only.

    Raises:
        TrainingError: the model has another number of classes, or a file cannot be used, naming it.

    >>> evaluate(model, data, scales=(0.75, 1.0, 1.25), flip=True).miou
    """
    device = next(model.parameters()).device
    classes = len(data.classes)
    total = torch.zeros(classes, classes, dtype=torch.int64, device=device)
    indices = range(distributed.rank(), len(data), distributed.world_size())
    was_training, error = model.training, None
    model.eval()
    try:
        images = _Images(data, model.preprocessing, model.align_corners)
        for pixels, target in tqdm(
            in_workers(images, indices, workers),
            "evaluating",
            len(indices),
            unit="image",
            leave=False,
            disable=quiet or None,
        ):
            with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                labels = predict_labels(
                    model, pixels.to(device), tuple(target.shape), scales, flip, window
                )
            if labels.max() >= classes:
                raise TrainingError(
                    f"the model found class {int(labels.max())}, the data have {classes} classes"
                )
            total += confusion_matrix(target.to(device), labels, classes)
    except TrainingError as caught:
        error = caught
    finally:
        if was_training:
            model.train()
    distributed.raise_on_all_ranks(error)
    return Scores(distributed.sum_over_processes(total).cpu().numpy(), data.classes)


def network_input(image: Image.Image, preprocessing: Preprocessing, align_corners: bool) -> Tensor:
    """A whole RGB image as a model sees it in evaluation: [1, 3, H, W], channels_last."""
    size = network_size(image.size, preprocessing.resize, align_corners)
    if size != image.size:
        image = image.resize(size, Image.Resampling.BILINEAR)
    pixels = replace(preprocessing, resize=None, crop=None)(image)
    return pixels[None].contiguous(memory_format=torch.channels_last)


class _Images:
    """Normalised images and their labels at full size, for workers to read."""

    def __init__(
        self, data: SegmentationData, preprocessing: Preprocessing, align_corners: bool
    ) -> None:
        self.data = data
        self.model = preprocessing, align_corners

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        image, labels = self.data.read(index)
        return network_input(image, *self.model), torch.from_numpy(labels)
