"""segmentation_models_pytorch (smp): DeepLab-v3 and -v3+.

Source of keys and semantics: decoders/deeplabv3/, encoders/{resnet,mobilenet,_utils}.py and
base/heads.py of version 0.6.0.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..preprocessing import Preprocessing
from .checkpoint import Checkpoint, well_formed
from .huggingface import read_json
from .resnets import resnet_name
from .safetensors_file import read_safetensors
from .state_dict import State, renamed

PROJECT = "segmentation_models_pytorch"

_ENCODER: dict[str, str | None] = {
    "encoder.": "backbone.",
    "classification_head.": None,  # a classifier of whole images, for which DeepLab has no use
}
_V3 = _ENCODER | {
    "decoder.aspp.": "classifier.0.",
    "decoder.conv.": "classifier.1.",
    "decoder.bn.": "classifier.2.",
    "decoder.0.": "classifier.0.",  # the names of versions up to 0.3
    "decoder.1.": "classifier.1.",
    "decoder.2.": "classifier.2.",
    "segmentation_head.0.": "classifier.4.",
}
_V3_PLUS = _ENCODER | {
    "decoder.aspp.0.": "classifier.0.aspp.0.",
    "decoder.aspp.1.": "classifier.0.aspp.1.0.",
    "decoder.aspp.2.": "classifier.0.aspp.1.1.",
    "decoder.block1.": "classifier.0.low_level.",
    "decoder.block2.": "classifier.0.convs.0.",
    "segmentation_head.0.": "classifier.1.",
}


def recognize(state: State, timm_encoder: str | None = None) -> Checkpoint | None:
    """The checkpoint of a state dict of the project's keys, or None.

    Args:
        timm_encoder: timm's name of the encoder, which the keys do not contain.
    """
    is_plus = {"decoder.aspp.0.project.0.weight", "decoder.block1.0.weight"} <= state.keys()
    v3_keys = {"decoder.aspp.project.0.weight", "decoder.0.project.0.weight"}
    is_v3 = not v3_keys.isdisjoint(state)
    if "segmentation_head.0.weight" not in state or not (is_plus or is_v3):
        return None
    num_classes = state["segmentation_head.0.weight"].size(0)
    state = renamed(state, _V3_PLUS if is_plus else _V3)
    aspp = "classifier.0.aspp.0." if is_plus else "classifier.0."
    config = _encoder(state, timm_encoder) | {
        "num_classes": num_classes,
        "output_stride": 16 if is_plus else 8,
        "atrous_rates": (12, 24, 36),  # at both output strides
        "align_corners": True,
        "separable": f"{aspp}convs.1.0.1.weight" in state,
        "aspp_channels": state[f"{aspp}project.0.weight"].size(0),
    }
    if is_plus:
        config |= {"separable_decoder": True, "aspp_conv": True, "decoder_convs": 1}
    architecture = "DeepLabV3Plus" if is_plus else "DeepLabV3"
    return Checkpoint(architecture, config, state, Preprocessing(), None, PROJECT)


def _encoder(state: State, timm_encoder: str | None) -> dict[str, Any]:
    """The configuration of the backbone."""
    if any(key.startswith("backbone.model.") for key in state):
        if timm_encoder is None:
            raise ValueError(
                f"a {PROJECT} DeepLab with an encoder of timm, whose name is not in the file: "
                "expected the folder of its save_pretrained"
            )
        return {"backbone": f"timm/{timm_encoder}"}
    if "backbone.features.18.0.weight" in state:
        first_conv = "backbone.features.0.0.weight"
        config: dict[str, Any] = {"backbone": "mobilenet_v2"}
    else:
        config, first_conv = {"backbone": resnet_name(state)}, "backbone.conv1.weight"
    if config["backbone"] is None:
        raise ValueError(
            f"a {PROJECT} DeepLab with an unsupported encoder (expected resnet18, 34, 50, 101 or "
            "152, mobilenet_v2 or one of timm (tu-...), with encoder_depth 5)"
        )
    return config | {"in_channels": state[first_conv].size(1), "backbone_variant": PROJECT}


def read_folder(folder: Path) -> Checkpoint | None:
    """Read a folder of the project's save_pretrained, or None if it is no such folder.

    config.json contains what the weights do not: output stride, atrous rates and dropout.
    """
    path = folder / "config.json"
    config = read_json(path)
    if "encoder_name" not in config:
        return None
    weights = folder / "model.safetensors"
    if not weights.exists():
        raise FileNotFoundError(f"{weights}: not found. Expected it beside config.json")
    encoder = str(config["encoder_name"])
    try:
        checkpoint = recognize(read_safetensors(weights)[0], encoder.removeprefix("tu-"))
    except ValueError as error:
        raise ValueError(f"{folder}: {error} ({encoder})") from error
    if checkpoint is None:
        raise ValueError(
            f"{folder}: expected a DeepLabV3 or DeepLabV3Plus of {PROJECT}, got "
            f"{config.get('_model_class')}"
        )
    with well_formed(path):
        stride, rates = config["encoder_output_stride"], tuple(config["decoder_atrous_rates"])
        checkpoint.config.update(
            output_stride=stride,
            atrous_rates=rates,
            dropout=config["decoder_aspp_dropout"],
            in_channels=config.get("in_channels", 3),
        )
    return checkpoint
