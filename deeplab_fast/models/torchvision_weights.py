"""Weights that torchvision publishes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def download(name: str, weights: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """State dict and description of published weights, cached by torch.hub.

    Args:
        name: a model of torchvision, such as "resnet50".
        weights: one of its weights, such as "DEFAULT" or "IMAGENET1K_V1".

    Raises:
        ImportError: torchvision is not installed.
        ConnectionError: the download failed; the message says which file is needed, and where.
    """
    try:
        from torchvision.models import get_model_weights
    except ImportError as error:
        raise ImportError(
            f"{name}: torchvision knows where these weights are: pip install torchvision"
        ) from error
    published = get_model_weights(name)[weights]
    try:
        state = torch.hub.load_state_dict_from_url(
            published.url, map_location="cpu", check_hash=True, weights_only=True
        )
    except OSError as error:
        raise ConnectionError(
            f"{name}: cannot download {published.url}: {error}. Offline, fetch that file elsewhere "
            f"and put it into {torch.hub.get_dir()}/checkpoints, or give its path"
        ) from error
    return dict(state), published.meta
