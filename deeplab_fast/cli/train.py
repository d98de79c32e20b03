"""``deeplab-fast train``: trains a network on images with labels."""

from __future__ import annotations

import argparse
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..models import DeepLab, DeepLabV3, DeepLabV3Plus
from ..models.backbones import load_imagenet
from ..models.checkpoints import read_backbone
from ..training import Interrupted, Recipe, distributed, train
from .datasets import LAYOUTS, add_arguments, add_workers, open_split
from .device import add_device, add_dtype, out_of_memory
from .errors import UserError, reason
from .images import add_max_pixels, max_pixels
from .processes import process_group
from .weights import load_model

_MODELS: dict[str, type[DeepLabV3] | type[DeepLabV3Plus]] = {
    "deeplabv3": DeepLabV3,
    "deeplabv3plus": DeepLabV3Plus,
}

# Field of Recipe -> its type and its help. The defaults are those of Recipe.
_RECIPE: dict[str, tuple[Any, str]] = {
    "epochs": (int, "passes over the training images"),
    "batch_size": (int, "images per update, over all GPUs and micro-batches"),
    "grad_accum_steps": (int, "micro-batches per update and GPU, to save memory"),
    "crop_size": (int, "height and width of the training images"),
    "scale": (float, "range of the random resizing"),
    "flip": (float, "probability of a horizontal flip"),
    "color_jitter": (float, "range of the random brightness, contrast and saturation"),
    "learning_rate": (float, "initial learning rate"),
    "head_learning_rate": (float, "initial learning rate of all layers but the backbone"),
    "warmup_steps": (int, "updates of linear warm-up"),
    "power": (float, "exponent of the poly learning rate"),
    "momentum": (float, "momentum of SGD"),
    "weight_decay": (float, "weight decay of SGD"),
    "aux_weight": (float, "factor of the auxiliary loss; 0 removes the auxiliary classifier"),
    "class_weights": (float, "weight of each class in the loss"),
    "label_smoothing": (float, "fraction of each target that is spread over all classes"),
    "top_k_pixels": (float, "fraction of pixels in the loss: those with the largest losses"),
    "ema_decay": (float, "evaluate and save a moving average of the weights with this decay"),
    "seed": (int, "seed of weights, image order, augmentation and dropout"),
}
_METAVARS = {"crop_size": ("HEIGHT", "WIDTH"), "scale": ("MIN", "MAX")}  # settings with two values


def add_parser(subparsers: Any) -> None:
    help = "train a network on images with label masks"
    parser = subparsers.add_parser(
        "train",
        help=help,
        description=f"{help[0].upper()}{help[1:]}. On several GPUs: torchrun --nproc-per-node 8 -m "
        "deeplab_fast train ...",
        epilog=f"layouts of DATA:\n{LAYOUTS}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    data = parser.add_argument_group("data")
    add_arguments(data)
    data.add_argument(
        "--train-split", default="train", metavar="SPLIT", help="split to train on (default: train)"
    )
    data.add_argument(
        "--val-split",
        default="val",
        metavar="SPLIT",
        help='split to evaluate on, "" for none (default: val)',
    )
    add_max_pixels(data)
    network = parser.add_argument_group("network")
    network.add_argument(
        "--model", choices=_MODELS, help="model (default: deeplabv3, or that of --weights)"
    )
    network.add_argument(
        "--backbone",
        metavar="NAME",
        help="any backbone of DeepLabV3, such as resnet18, mobilenet_v2 or timm/regnety_002 "
        "(default: resnet50, or that of --weights)",
    )
    network.add_argument(
        "--output-stride",
        type=int,
        choices=(8, 16),
        help="output stride (default: 8, for deeplabv3plus 16, or that of --weights)",
    )
    network.add_argument(
        "--atrous-rates",
        type=int,
        nargs="+",
        metavar="N",
        help="rates of ASPP's 3x3 convolutions (default: 12 24 36 at output stride 8, 6 12 18 at "
        "16, or those of --weights)",
    )
    network.add_argument(
        "--separable",
        action="store_true",
        help="depthwise separable convolutions in ASPP and in the decoder of deeplabv3plus",
    )
    network.add_argument(
        "--weights",
        help="model to start from, as for `deeplab-fast segment`; its last layers are replaced if "
        "the number of classes differs",
    )
    network.add_argument(
        "--backbone-weights",
        metavar="FILE",
        help="start from the backbone in this file, a classifier with the keys of torchvision or "
        "timm or a DeepLab of any project; imagenet: download ImageNet weights",
    )
    recipe = parser.add_argument_group("recipe")
    for name, (kind, text) in _RECIPE.items():
        default = getattr(Recipe, name)
        shown = " ".join(map(str, default)) if isinstance(default, tuple) else default
        recipe.add_argument(
            f"--{name.replace('_', '-')}",
            type=kind,
            nargs="+" if name == "class_weights" else 2 if name in _METAVARS else None,
            default=default,
            metavar=_METAVARS.get(name, "N" if kind is int else "X"),
            help=text if default is None else f"{text} (default: {shown})",
        )
    recipe.add_argument(
        "--freeze-batch-norm",
        action="store_true",
        help="do not update the statistics and parameters of batch norm",
    )
    add_dtype(recipe, None, "bfloat16 on a GPU, float32 on a CPU")
    run = parser.add_argument_group("run")
    run.add_argument(
        "--output",
        type=Path,
        default=Path("run"),
        metavar="FOLDER",
        help="folder of checkpoint, models and logs (default: run)",
    )
    run.add_argument("--resume", action="store_true", help="resume the run in --output")
    add_device(run)
    add_workers(run)
    run.add_argument(
        "--evaluate-every",
        type=int,
        default=1,
        metavar="N",
        help="epochs from one evaluation and checkpoint to the next (default: 1)",
    )
    run.add_argument(
        "--log-every",
        type=int,
        default=10,
        metavar="N",
        help="updates from one line in the log to the next (default: 10)",
    )
    parser.set_defaults(run=run_training)


def run_training(arguments: argparse.Namespace) -> int:
    smaller = "a smaller --batch-size or --crop-size, or a larger --grad-accum-steps"
    with (
        process_group(arguments.device) as device,
        max_pixels(arguments.max_pixels),
        out_of_memory(smaller),
    ):
        try:
            _train(arguments, device)
        except Interrupted as error:
            if distributed.rank() == 0:
                print(f"deeplab-fast: {error}", file=sys.stderr)
            return 130
    return 0


def _train(arguments: argparse.Namespace, device: torch.device) -> None:
    recipe = _recipe(arguments, device)
    train_data = open_split(arguments, arguments.train_split)
    val_data = open_split(arguments, arguments.val_split) if arguments.val_split else None
    torch.manual_seed(recipe.seed)
    model = _model(arguments, len(train_data.classes), recipe.aux_weight > 0).to(device)
    if distributed.rank() == 0:
        print(
            f"{model.architecture} with {model.config['backbone']} at output stride "
            f"{model.config['output_stride']}, "
            f"{len(train_data)} images of {len(train_data.classes)} classes, "
            f"{distributed.world_size()} x {device.type}, {recipe.dtype}"
        )
    train(
        model,
        train_data,
        val_data,
        recipe,
        arguments.output,
        resume=arguments.resume,
        workers=arguments.workers,
        evaluate_every=arguments.evaluate_every,
        log_every=arguments.log_every,
    )


def _recipe(arguments: argparse.Namespace, device: torch.device) -> Recipe:
    values = {field.name: getattr(arguments, field.name) for field in fields(Recipe)}
    for name, value in values.items():
        values[name] = tuple(value) if isinstance(value, list) else value
    values["dtype"] = arguments.dtype or ("bfloat16" if device.type == "cuda" else "float32")
    return Recipe(**values)


def _model(arguments: argparse.Namespace, num_classes: int, aux_loss: bool) -> DeepLab:
    model: DeepLab
    if arguments.weights is None:
        kind = _MODELS[arguments.model or "deeplabv3"]
        backbone = arguments.backbone or "resnet50"
        options = {**_geometry(arguments), "aux_loss": aux_loss, "separable": arguments.separable}
        try:
            model = kind(backbone, num_classes, **options)
        except (ImportError, ValueError) as error:  # it begins with the name of the option
            raise UserError(str(error)) from error
    else:
        model = _pretrained(arguments, num_classes, aux_loss)
    if arguments.backbone_weights is not None:
        _load_backbone(model, arguments.backbone_weights)
    return model


def _geometry(arguments: argparse.Namespace) -> dict[str, Any]:
    """The options that change no weights and were given."""
    options = {name: getattr(arguments, name) for name in ("output_stride", "atrous_rates")}
    return {name: value for name, value in options.items() if value is not None}


def _pretrained(arguments: argparse.Namespace, num_classes: int, aux_loss: bool) -> DeepLab:
    model = load_model(arguments.weights, **_geometry(arguments))
    if arguments.model is not None and not isinstance(model, _MODELS[arguments.model]):
        raise UserError(
            f"--weights: {arguments.weights} is a {model.architecture} (expected "
            f"{arguments.model}, as --model says)"
        )
    if arguments.backbone not in (None, model.config["backbone"]):
        raise UserError(
            f"--weights: {arguments.weights} has the backbone {model.config['backbone']} "
            f"(expected {arguments.backbone}, as --backbone says)"
        )
    if arguments.separable and not model.config["separable"]:
        raise UserError(
            f"--weights: {arguments.weights} has dense convolutions (expected depthwise separable "
            "ones, as --separable says)"
        )
    if not aux_loss:
        model.aux_classifier = None
    if model.num_labels != num_classes:  # a binary model keeps its one channel for two classes
        heads: list[Any] = [model.classifier, model.aux_classifier]
        for head in heads:
            if head is not None:
                head[-1] = nn.Conv2d(head[-1].in_channels, num_classes, 1)
    return model


def _load_backbone(model: DeepLab, weights: str) -> None:
    """Load a backbone's weights from a file, or those of ImageNet."""
    try:
        if weights == "imagenet":
            load_imagenet(model)
        else:
            expected = model.backbone.state_dict()
            state = read_backbone(Path(weights), model.config["backbone"], expected)
            model.backbone.load_state_dict(state)
    except OSError as error:
        raise UserError(f"--backbone-weights: {weights}: {reason(error)}") from error
    except (ImportError, ValueError) as error:
        raise UserError(f"--backbone-weights: {reason(error)}") from error
