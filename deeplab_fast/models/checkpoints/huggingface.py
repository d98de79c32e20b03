"""Reader of Hugging Face's MobileNetV2ForSemanticSegmentation."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..preprocessing import Preprocessing
from .checkpoint import Checkpoint, well_formed
from .safetensors_file import read_safetensors

_ARCHITECTURE = "MobileNetV2ForSemanticSegmentation"

# Settings that are fixed in our network. They are also transformers' defaults.
_REQUIRED = {
    "num_channels": 3,
    "depth_multiplier": 1,
    "depth_divisible_by": 8,
    "min_depth": 8,
    "expand_ratio": 6,
    "first_layer_is_expansion": True,
    "hidden_act": "relu6",
}


def read_folder(folder: Path) -> Checkpoint:
    """Read a folder; see ``DeepLabV3.from_pretrained``."""
    _existing(folder / "config.json")
    weights = _existing(folder / "model.safetensors")
    return read_model(folder, weights, read_safetensors(weights)[0])


def has_keys(state: dict[str, Tensor]) -> bool:
    """True if a state dict has the keys of these models."""
    return "segmentation_head.conv_aspp.convolution.weight" in state


def read_model(folder: Path, weights: Path, tensors: dict[str, Tensor]) -> Checkpoint:
    """The checkpoint of the tensors in a file ``weights``.

    Args:
        folder: where config.json and, for the preprocessing, preprocessor_config.json are.
    """
    config = read_json(folder / "config.json")
    if _ARCHITECTURE not in (config.get("architectures") or ()):
        raise ValueError(
            f"{folder / 'config.json'}: expected the architecture {_ARCHITECTURE}, got "
            f"{config.get('architectures')}"
        )
    _require(config, _REQUIRED, folder / "config.json")
    state = _renamed(tensors, weights)
    num_classes = state["classifier.1.weight"].size(0)
    labels = config.get("id2label") or {}
    with well_formed(folder / "config.json"):
        categories = tuple(labels[str(i)] for i in range(num_classes)) if labels else None
    return Checkpoint(
        "DeepLabV3",
        {
            "backbone": "mobilenet_v2",
            "num_classes": num_classes,
            "output_stride": config.get("output_stride", 32),
            "atrous_rates": [],
            # TensorFlow, where these networks were trained, aligns corners. The configuration does
            # not say so, and transformers' loss and post-processing do not align them.
            "align_corners": True,
            "head_conv": False,
            "backbone_variant": "tensorflow" if config.get("tf_padding", True) else "torchvision",
            "norm_eps": config.get("layer_norm_eps", 1e-3),
        },
        state,
        _preprocessing(folder / "preprocessor_config.json"),
        categories,
        "Hugging Face",
    )


def _renamed(tensors: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    """The state dict with the keys of DeepLabV3, whose projection has the pooled channels last."""
    state = {}
    for key, tensor in tensors.items():
        module, _, parameter = key.rpartition(".")
        if module.startswith("mobilenet_v2.conv_1x1."):
            continue  # part of the image classifier
        if module not in _MODULES:
            raise ValueError(f"{path}: unexpected tensor {key} for a {_ARCHITECTURE}")
        state[f"{_MODULES[module]}.{parameter}"] = tensor
    missing = [name for name in _MODULES.values() if f"{name}.weight" not in state]
    if missing:
        raise ValueError(f"{path}: no tensors for {', '.join(missing[:3])} of a {_ARCHITECTURE}")
    pooled, branch = state["classifier.0.project.0.weight"].chunk(2, dim=1)
    state["classifier.0.project.0.weight"] = torch.cat([branch, pooled], dim=1)
    return state


def _modules() -> dict[str, str]:
    """Names of the modules with parameters: transformers' name -> name in DeepLabV3."""
    layers = {
        "mobilenet_v2.conv_stem.first_conv": ("backbone.features.0.0", "backbone.features.0.1"),
        "segmentation_head.conv_aspp": ("classifier.0.convs.0.0", "classifier.0.convs.0.1"),
        "segmentation_head.conv_pool": ("classifier.0.convs.1.1", "classifier.0.convs.1.2"),
        "segmentation_head.conv_projection": ("classifier.0.project.0", "classifier.0.project.1"),
    }
    for block in range(17):  # block 0 is in their stem and has no expansion
        theirs = f"mobilenet_v2.layer.{block - 1}" if block else "mobilenet_v2.conv_stem"
        ours = f"backbone.features.{block + 1}.conv"
        names = ("expand_1x1", "conv_3x3") if block else ("conv_3x3",)
        for i, name in enumerate(names):
            layers[f"{theirs}.{name}"] = (f"{ours}.{i}.0", f"{ours}.{i}.1")
        layers[f"{theirs}.reduce_1x1"] = (f"{ours}.{len(names)}", f"{ours}.{len(names) + 1}")
    modules = {"segmentation_head.classifier.convolution": "classifier.1"}
    for layer, (conv, norm) in layers.items():
        modules |= {f"{layer}.convolution": conv, f"{layer}.normalization": norm}
    return modules


_MODULES = _modules()


def _preprocessing(path: Path) -> Preprocessing:
    """Preprocessing of preprocessor_config.json; without that file, only scaling to [-1, 1]."""
    if not path.exists():
        return Preprocessing((0.5,) * 3, (0.5,) * 3)
    config = read_json(path)
    _require(config, {"do_rescale": True, "do_normalize": True}, path)
    if config.get("do_resize", True):
        _require(config, {"resample": 2}, path)  # Pillow's bilinear
    with well_formed(path):
        if not math.isclose(config.get("rescale_factor", 1 / 255), 1 / 255, rel_tol=1e-6):
            raise ValueError(f"expected rescale_factor 1/255, got {config['rescale_factor']}")
        resize = crop = None
        if config.get("do_resize", True):
            resize = config["size"]["shortest_edge"]
        if config.get("do_center_crop", True):
            crop = (config["crop_size"]["height"], config["crop_size"]["width"])
        mean, std = config.get("image_mean", (0.5,) * 3), config.get("image_std", (0.5,) * 3)
        return Preprocessing(tuple(mean), tuple(std), resize, crop)


def _require(config: dict[str, Any], required: dict[str, Any], path: Path) -> None:
    for key, value in required.items():
        if config.get(key, value) != value:
            raise ValueError(f"{path}: expected {key} {value!r}, got {config[key]!r}")


def _existing(path: Path) -> Path:
    if not path.exists():
        raise FileNotFoundError(
            f"{path}: not found. Expected a folder with config.json and model.safetensors"
        )
    return path


def read_json(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(_existing(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not JSON: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path}: expected a JSON object, got a {type(config).__name__}")
    return config
