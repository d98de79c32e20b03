"""Recognition of resnets in a state dict."""

from __future__ import annotations

import re

from ..backbones.resnet import RESNETS, BasicBlock, Bottleneck
from .state_dict import State


def resnet_name(state: State, prefix: str = "backbone.") -> str | None:
    """Our name of the resnet under ``prefix``, whose keys are torchvision's, or None.

    None: a stage is missing, the numbers of blocks are none of ours, or the network is a relative
    such as ResNeXt, a wide resnet or ResNet-D, which has other shapes or shortcuts.
    """
    pattern = re.compile(rf"{re.escape(prefix)}layer([1-4])\.(\d+)\.conv(\d)\.weight")
    convs = [match.groups() for match in map(pattern.fullmatch, state) if match]
    blocks = tuple(len({block for i, block, _ in convs if i == stage}) for stage in "1234")
    block = Bottleneck if any(conv == "3" for _, _, conv in convs) else BasicBlock
    deep_stem = f"{prefix}stem.0.weight" in state
    found = (block, blocks, deep_stem)
    name = next((name for name, architecture in RESNETS.items() if architecture == found), None)
    if name is None or not {
        prefix + stem_key(name),
        f"{prefix}layer2.0.downsample.0.weight",
    } <= set(state):
        return None
    is_plain = state[f"{prefix}layer1.0.conv2.weight"].shape == (64, 64, 3, 3)
    return name if is_plain else None


def stem_key(name: str) -> str:
    """Key of the first convolution of our resnets, whose shape tells the channels of the images."""
    return "stem.0.weight" if RESNETS[name].deep_stem else "conv1.weight"
