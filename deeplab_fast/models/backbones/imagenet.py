"""ImageNet weights for backbones, published by torchvision and timm."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from .. import torchvision_weights
from ..preprocessing import Preprocessing
from .timm_features import PREFIX, create_timm, import_timm


def load_imagenet(model: Any) -> None:
    """Load ImageNet weights into the backbone of a :class:`DeepLab`, and set its preprocessing.

    Weights of other numbers of input channels than 3 come from :func:`adapt_input_channels`.

    Raises:
        ValueError: nobody publishes weights for this backbone.
        ImportError: torchvision or timm is not installed.
        ConnectionError: the download failed; the message says which file is needed, and where.
    """
    name, backbone = model.config["backbone"], model.backbone
    expected = backbone.state_dict()
    state = adapt_input_channels(imagenet_state(name), expected)
    missing = [
        key for key in expected if key not in state and not key.endswith("num_batches_tracked")
    ]
    if missing:
        raise ValueError(f"{name}: the published weights have no {missing[0]}")
    backbone.load_state_dict({key: state[key] for key in expected if key in state}, strict=False)
    model.preprocessing = _preprocessing(name).for_channels(model.in_channels)


def imagenet_state(name: str) -> dict[str, Tensor]:
    """State dict of a backbone for RGB images, downloaded and cached. It may have further keys.

    torchvision's weights are IMAGENET1K_V1, from which it trained its own DeepLab-v3 models. Those
    of "resnet50c" and "resnet101c" are Gluon's, published by timm. Those of a model of timm are the
    ones that its tag names, by default the first that timm lists.

    Raises:
        ValueError, ImportError, ConnectionError: see :func:`load_imagenet`.

    >>> model.backbone.load_state_dict(imagenet_state("resnet50"), strict=False)
    """
    if name.startswith(PREFIX):
        state = _timm_state(name.removeprefix(PREFIX))
        return {f"model.{key}": tensor for key, tensor in state.items()}
    if name.endswith("c"):
        return _deep_stem(_timm_state(name))
    state, _ = torchvision_weights.download(name, "IMAGENET1K_V1")
    if name == "mobilenet_v3_large":  # torchvision's DeepLab-v3 has no such prefix
        state = {key.removeprefix("features."): tensor for key, tensor in state.items()}
    return state


def adapt_input_channels(
    state: Mapping[str, Tensor], expected: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """``state`` with the first convolution for as many channels as in ``expected``.

    RGB weights are added up for one channel, for which a grey image gives the features of an RGB
    image with equal channels. For n channels they are repeated and multiplied by 3 / n. This is the
    rule of timm's ``adapt_input_conv``.
    """
    adapted = dict(state)
    for key, weight in state.items():
        if weight.dim() == 4 and weight.size(1) == 3 and key in expected:
            channels = expected[key].size(1)
            if channels == 1:
                adapted[key] = weight.sum(1, keepdim=True)
            elif channels != 3:
                repeated = weight.repeat(1, -(-channels // 3), 1, 1)[:, :channels]
                adapted[key] = repeated * (3 / channels)
    return adapted


def _timm_state(name: str) -> dict[str, Tensor]:
    published = import_timm(name).get_pretrained_cfg(name)
    if published is not None and not (published.hf_hub_id or published.url):
        raise ValueError(f"{PREFIX}{name}: timm publishes no weights for it")
    try:
        return create_timm(name, pretrained=True).state_dict()
    except (ValueError, ImportError):
        raise
    except Exception as error:  # what a failed download raises depends on huggingface_hub
        from huggingface_hub.constants import HF_HUB_CACHE  # timm needs huggingface_hub

        reason = " ".join(str(error).split())
        raise ConnectionError(
            f"{PREFIX}{name}: cannot download {published.hf_hub_id}: {reason} Offline, run `hf "
            f"download {published.hf_hub_id}` elsewhere and copy what it wrote to its cache into "
            f"{HF_HUB_CACHE}"
        ) from error


def _deep_stem(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict of timm's resnets with deep stem, in our keys."""
    renamed = {}
    for key, tensor in state.items():
        key = re.sub(r"^conv1\.", "stem.", key)
        renamed[re.sub(r"^bn1\.", "stem.7.", key)] = tensor
    return renamed


def _preprocessing(name: str) -> Preprocessing:
    """The statistics with which the ImageNet weights of a backbone were trained."""
    if not name.startswith(PREFIX):
        return Preprocessing()
    published = import_timm(name).get_pretrained_cfg(name.removeprefix(PREFIX))
    return Preprocessing(tuple(published.mean), tuple(published.std))
