"""Evaluation of a model on a data set."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from ..models.preprocessing import Preprocessing, network_input
from ..models.sliding_window import check_views, predict_labels
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
    """Scores of a model's predictions for whole images, against the ground truth at full size.

    Images are preprocessed as in ``deeplab-fast segment``. With several processes
    (torch.distributed) each evaluates a part of the images.

    Args:
        model: a :class:`deeplab_fast.DeepLabV3` or :class:`deeplab_fast.DeepLabV3Plus`, or one
            prepared for inference. It is put into evaluation mode, and afterwards back into its
            previous mode.
        data: images and their labels.
        scales, flip, window: views of each image; see :func:`predict_labels`.
        dtype: dtype of autocast; float32 for none.
        workers: processes that read images.
        quiet: show no progress bar. Otherwise a progress bar is shown on a terminal.

    Raises:
        TrainingError: ``scales`` or ``window`` is out of range, the model predicts a class that the
            data do not have, no pixel is labelled, or a file cannot be read; the message names the
            cause.

    >>> evaluate(model, data, scales=(0.75, 1.0, 1.25), flip=True).miou
    """
    try:
        check_views(model, scales, window)
        model.preprocessing.check_takes_photos()
    except ValueError as error:
        raise TrainingError(str(error)) from error
    device = next(model.parameters()).device
    classes = len(data.classes)
    total = torch.zeros(classes, classes, dtype=torch.int64, device=device)
    indices = range(distributed.rank(), len(data), distributed.world_size())
    was_training, caught = model.training, None
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
                    f"model: expected predictions of the {classes} classes in the data, got class "
                    f"{int(labels.max())}"
                )
            total += confusion_matrix(target.to(device), labels, classes)
    except TrainingError as error:
        caught = error
    finally:
        if was_training:
            model.train()
    distributed.raise_on_all_ranks(caught)
    confusion = distributed.sum_over_processes(total).cpu().numpy()
    if not confusion.any():
        raise TrainingError(
            f"no labelled pixel in {len(data)} images (expected labels that are not ignored)"
        )
    return Scores(confusion, data.classes)


class _Images:
    """Images as inputs of a network, and their labels at full size."""

    def __init__(
        self, data: SegmentationData, preprocessing: Preprocessing, align_corners: bool
    ) -> None:
        self.data, self.preprocessing, self.align_corners = data, preprocessing, align_corners

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        image, labels = self.data.read(index)
        pixels = network_input(image, self.preprocessing, self.align_corners)
        return pixels, torch.from_numpy(labels)
