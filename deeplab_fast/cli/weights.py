"""Loading of the model that an argument of the command line names."""

from __future__ import annotations

from typing import Any

import torch

from ..models import DeepLab, InferenceModel
from .errors import UserError

WEIGHTS = """\
  deeplabv3_resnet50, deeplabv3_resnet101,  torchvision's, downloaded once through torch.hub
  deeplabv3_mobilenet_v3_large
  FILE                                      a checkpoint (.pth, .pt, .tar, .bin, .ckpt or
                                            .safetensors) of a DeepLab of torchvision,
                                            segmentation_models_pytorch, VainF, jfzhang95 or
                                            mmsegmentation
  FILE.safetensors, FOLDER                  a file or folder of save_pretrained
  FOLDER                                    a Hugging Face MobileNetV2ForSemanticSegmentation or a
                                            folder of segmentation_models_pytorch: config.json,
                                            model.safetensors
  OWNER/NAME                                such a folder on the Hugging Face Hub"""


def load_model(weights: str, argument: str = "--weights", **overrides: Any) -> DeepLab:
    """``DeepLab.from_pretrained(weights, **overrides)``, with errors in one line.

    ``argument`` is what the command line calls the weights.

    Raises:
        UserError: there is no usable model; the message says why.
    """
    try:
        return DeepLab.from_pretrained(weights, **overrides)
    except (OSError, ValueError, RuntimeError, ImportError) as error:
        raise UserError(f"{argument}: {' '.join(str(error).split())}") from error
    except (LookupError, TypeError, AttributeError) as error:  # a file can hold anything
        raise UserError(
            f"{argument}: {weights}: damaged: {error!r} (expected a complete file)"
        ) from error


def load_for_photos(
    weights: str, device: torch.device, dtype: torch.dtype
) -> tuple[InferenceModel, int]:
    """The model prepared for inference on photos, and its number of labels.

    Raises:
        UserError: there is no usable model, it takes no photos, or it has too many classes for a
            label PNG.
    """
    model = load_model(weights).to(device)
    try:
        model.preprocessing.check_takes_photos()
    except ValueError as error:
        raise UserError(f"--weights: {weights}: {error}") from error
    if model.num_labels > 2**16:
        raise UserError(
            f"--weights: {weights} has {model.num_labels} classes (expected at most 65536, what a "
            "label PNG can hold)"
        )
    return model.prepare_for_inference(dtype), model.num_labels
