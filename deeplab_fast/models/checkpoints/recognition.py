"""Recognition of the project and the architecture of a state dict."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from . import jfzhang95, mmsegmentation, segmentation_models_pytorch, torchvision, vainf
from .checkpoint import Checkpoint, first
from .state_dict import State

PROJECTS = (
    torchvision.PROJECT,
    segmentation_models_pytorch.PROJECT,
    vainf.PROJECT,
    jfzhang95.PROJECT,
    mmsegmentation.PROJECT,
)


def recognize(state: State, description: Mapping[str, Any]) -> Checkpoint:
    """The checkpoint of a state dict in the keys of any project.

    Keys and shapes determine the network. Output stride and atrous rates, which they do not
    contain, are the defaults of the project.

    Args:
        description: the dict around the state dict.

    Raises:
        ValueError: it is no DeepLab, or one with an unsupported backbone; the message is one line.
    """
    checkpoint = recognized(state, description)
    if checkpoint is None:
        raise ValueError(
            f"expected the state dict of a DeepLab of {', '.join(PROJECTS)} or Hugging Face's "
            f"MobileNetV2, got {len(state)} tensors ({first(list(state))})"
        )
    return checkpoint


def recognized(state: State, description: Mapping[str, Any]) -> Checkpoint | None:
    """As :func:`recognize`, but None if it is no DeepLab."""
    return (
        torchvision.recognize(state)
        or segmentation_models_pytorch.recognize(state)
        or vainf.recognize(state)
        or jfzhang95.recognize(state)
        or mmsegmentation.recognize(state, description)
    )
