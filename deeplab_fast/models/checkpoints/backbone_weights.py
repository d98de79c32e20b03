"""Weights for a backbone from a classifier or from a DeepLab."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from .checkpoint import fitted
from .pretrained import read_pretrained, read_state_dict
from .recognition import recognized
from .safetensors_file import is_own
from .state_dict import State, renamed

# Last layers of classifiers: of resnets, and of the mobilenets of torchvision and timm
_CLASSIFIER = ("fc.", "classifier.", "conv_head.", "bn2.")

_MOBILENET_V2_STAGES = (1, 2, 3, 4, 3, 3, 1)  # blocks


def read_backbone(path: Path, name: str, expected: Mapping[str, Tensor]) -> State:
    """The tensors for a backbone whose state dict is ``expected``.

    The file may hold a classifier with the keys of torchvision or timm, alone or inside the
    checkpoint of a training script, or any DeepLab that from_pretrained reads, whose backbone is
    taken.

    Args:
        name: our name of the backbone.

    Raises:
        ValueError: the file is damaged, or the tensors do not fit; the message is one line.
    """
    state = _backbone_of_deeplab(path)
    if state is None:
        state, _ = read_state_dict(path)
        is_timm = name.startswith("timm/")
        # Segmentation networks of other kinds have one of these prefixes.
        for prefix in ("backbone.", "encoder."):
            if any(key.startswith(prefix) for key in state):
                state = _with_prefix(state, prefix)
                break
        else:
            state = _of_timm(state, expected) if is_timm else state
        if not is_timm:
            state = _without_head(state, name)
    if "features.18.0.weight" not in expected:  # the last 1x1 convolution of mobilenet_v2
        state = {key: state[key] for key in state if not key.startswith("features.18.")}
    try:
        return fitted(state, expected)
    except ValueError as error:
        raise ValueError(f"{path}: expected weights of {name}, but {error}") from error


def _backbone_of_deeplab(path: Path) -> State | None:
    """The backbone's tensors if the file is a DeepLab of any project, else None."""
    if path.is_dir() or (path.suffix == ".safetensors" and is_own(path)):
        state = read_pretrained(path).state
    else:
        try:
            checkpoint = recognized(*read_state_dict(path))
        except (ValueError, KeyError, IndexError):  # its head or backbone is another one
            return None
        if checkpoint is None:
            return None
        state = checkpoint.state
    return _with_prefix(state, "backbone.")


def _with_prefix(state: State, prefix: str) -> State:
    return {key.removeprefix(prefix): state[key] for key in state if key.startswith(prefix)}


def _of_timm(state: State, expected: Mapping[str, Tensor]) -> State:
    """The tensors of a classifier of timm for the same network as features.

    timm flattens a sequence "stages.0" there to "stages_0". Heads have many names.
    """
    result = {}
    for key in expected:
        theirs = key.removeprefix("model.")
        for name in (theirs, re.sub(r"_(\d+)\.", r".\1.", theirs, count=1)):
            if name in state:
                result[key] = state[name]
    return result


def _without_head(state: State, name: str) -> State:
    """The tensors of a classifier with the keys of torchvision or timm, in ours."""
    if name == "mobilenet_v2" and "conv_stem.weight" in state:
        state = renamed(state, _timm_mobilenet_v2())
    elif name == "mobilenet_v3_large":  # torchvision's DeepLab-v3 has no such prefix
        state = renamed(state, {"features.": ""})
    elif "conv1.6.weight" in state:  # timm's resnets with deep stem
        state = renamed(state, {"conv1.": "stem.", "bn1.": "stem.7."})
    return {key: state[key] for key in state if not key.startswith(_CLASSIFIER)}


def _timm_mobilenet_v2() -> dict[str, str | None]:
    """Prefixes of timm's mobilenetv2_100 -> ours."""
    table: dict[str, str | None] = {"conv_stem.": "features.0.0.", "bn1.": "features.0.1."}
    number = 0
    for stage, blocks in enumerate(_MOBILENET_V2_STAGES):
        for block in range(blocks):
            number += 1
            theirs, ours = f"blocks.{stage}.{block}.", f"features.{number}.conv."
            expanded = {
                "conv_pw.": "0.0.", "bn1.": "0.1.", "conv_dw.": "1.0.", "bn2.": "1.1.",
                "conv_pwl.": "2.", "bn3.": "3.",
            }  # fmt: skip
            first = {"conv_dw.": "0.0.", "bn1.": "0.1.", "conv_pw.": "1.", "bn2.": "2."}
            layers = expanded if stage else first
            table |= {theirs + key: ours + layer for key, layer in layers.items()}
    return table | {"conv_head.": "features.18.0.", "bn2.": "features.18.1."}
