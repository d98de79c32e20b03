"""``deeplab-fast train``: a network from a folder of images and labels."""

from __future__ import annotations

import argparse
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..models import DeepLabV3
from ..training import Interrupted, Recipe, TrainingError, distributed, train
from .datasets import LAYOUTS, add_arguments, add_workers, open_split
from .device import find_device, is_out_of_memory
from .errors import UserError, reason

# Field of Recipe -> its type, and what the help says. Defaults are the recipe's.
_RECIPE: dict[str, tuple[Any, str]] = {
    "epochs": (int, "how often every image is seen"),
    "batch_size": (int, "images per update, over all GPUs and accumulated parts"),
    "grad_accum_steps": (int, "parts in which an update is computed, to save memory"),
    "crop_size": (int, "height and width of the training images"),
    "scale": (float, "range of the random resizing"),
    "flip": (float, "probability of mirroring"),
    "color_jitter": (float, "change of brightness, contrast and saturation"),
    "learning_rate": (float, "at the start, of the backbone and, by default, of the rest"),
    "head_learning_rate": (float, "of all but the backbone"),
    "warmup_steps": (int, "updates of linear warm-up"),
    "power": (float, "of the poly learning rate"),
    "momentum": (float, "of SGD"),
    "weight_decay": (float, "of SGD"),
    "aux_weight": (float, "of the auxiliary loss; 0 for a network without it"),
    "class_weights": (float, "one factor per class"),
    "label_smoothing": (float, "part of each label spread over all classes"),
    "top_k_pixels": (float, "fraction of the pixels, those of largest loss, that count"),
    "ema_decay": (float, "decay of a moving average of the weights, which is then kept"),
    "seed": (int, "of weights, order, augmentation and dropout"),
}
_METAVARS = {"crop_size": ("HEIGHT", "WIDTH"), "scale": ("MIN", "MAX")}  # those with two values


def add_parser(subparsers: Any) -> None:
    help = "train a network on images with labels"
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
    data.add_argument("--train-split", default="train", metavar="SPLIT", help="(default: train)")
    data.add_argument(
        "--val-split", default="val", metavar="SPLIT", help='"" for none (default: val)'
    )
    network = parser.add_argument_group("network")
    network.add_argument(
        "--backbone",
        choices=("resnet50", "resnet101", "mobilenet_v2"),
        help="(default: resnet50, or that of --weights)",
    )
    network.add_argument("--output-stride", type=int, choices=(8, 16), help="(default: 8)")
    network.add_argument(
        "--weights",
        help="start from these: what `deeplab-fast segment` takes; the last layer is new where the "
        "number of classes differs",
    )
    network.add_argument(
        "--backbone-weights",
        type=Path,
        metavar="FILE.pth",
        help="start from a classifier of torchvision with this backbone, trained on ImageNet",
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
        "--freeze-batch-norm", action="store_true", help="keep its statistics and parameters"
    )
    recipe.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="what the network computes in (default: bfloat16 on a GPU, float32 on a CPU)",
    )
    run = parser.add_argument_group("run")
    run.add_argument(
        "--output",
        type=Path,
        default=Path("run"),
        metavar="FOLDER",
        help="where checkpoints and logs go (default: run)",
    )
    run.add_argument("--resume", action="store_true", help="go on with the run in that folder")
    run.add_argument("--device", help="cpu, cuda, cuda:1 ... (default: cuda if there is one)")
    add_workers(run)
    run.add_argument(
        "--evaluate-every",
        type=int,
        default=1,
        metavar="N",
        help="epochs from one evaluation and checkpoint to the next (default: 1)",
    )
    run.add_argument("--log-every", type=int, default=10, metavar="N", help="updates (default: 10)")
    parser.set_defaults(run=run_training)


def run_training(arguments: argparse.Namespace) -> int:
    device = distributed.start(find_device(arguments.device))
    try:
        recipe = _recipe(arguments, device)
        train_data = open_split(arguments, arguments.train_split)
        val_data = open_split(arguments, arguments.val_split) if arguments.val_split else None
        torch.manual_seed(recipe.seed)
        model = _model(arguments, len(train_data.classes), recipe.aux_weight > 0).to(device)
        if distributed.rank() == 0:
            print(
                f"{model.config['backbone']} at output stride {model.config['output_stride']}, "
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
    except TrainingError as error:
        if distributed.rank() > 0:  # the first says it
            return 2
        raise UserError(str(error)) from error
    except Interrupted as error:
        if distributed.rank() == 0:
            print(f"deeplab-fast: {error}", file=sys.stderr)
        return 130
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise UserError(
            "not enough memory (expected a smaller --batch-size or --crop-size, or a larger "
            "--grad-accum-steps)"
        ) from error
    finally:
        distributed.stop()
    return 0


def _recipe(arguments: argparse.Namespace, device: torch.device) -> Recipe:
    values = {field.name: getattr(arguments, field.name) for field in fields(Recipe)}
    for name, value in values.items():
        values[name] = tuple(value) if isinstance(value, list) else value
    values["dtype"] = arguments.dtype or ("bfloat16" if device.type == "cuda" else "float32")
    return Recipe(**values)


def _model(arguments: argparse.Namespace, num_classes: int, aux_loss: bool) -> DeepLabV3:
    if arguments.weights is None:
        model = DeepLabV3(
            arguments.backbone or "resnet50",
            num_classes,
            arguments.output_stride or 8,
            aux_loss=aux_loss,
        )
    else:
        model = _pretrained(arguments, num_classes, aux_loss)
    if arguments.backbone_weights is not None:
        _load_backbone(model, arguments.backbone_weights)
    return model


def _pretrained(arguments: argparse.Namespace, num_classes: int, aux_loss: bool) -> DeepLabV3:
    stride = {} if arguments.output_stride is None else {"output_stride": arguments.output_stride}
    try:
        model = DeepLabV3.from_pretrained(arguments.weights, **stride)
    except (OSError, ValueError, RuntimeError, ImportError) as error:
        raise UserError(f"--weights: {' '.join(str(error).split())}") from error
    if arguments.backbone not in (None, model.config["backbone"]):
        raise UserError(
            f"--weights: {arguments.weights} has the backbone {model.config['backbone']} "
            f"(expected {arguments.backbone}, as --backbone says)"
        )
    if not aux_loss:
        model.aux_classifier = None
    if model.config["num_classes"] != num_classes:
        heads: list[Any] = [model.classifier, model.aux_classifier]
        for head in heads:
            if head is not None:
                head[-1] = nn.Conv2d(head[-1].in_channels, num_classes, 1)
    return model


def _load_backbone(model: DeepLabV3, path: Path) -> None:
    """Take over the weights of a classifier; its last layers have no place in the backbone."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        missing, _ = model.backbone.load_state_dict(state, strict=False)
    except OSError as error:
        raise UserError(f"--backbone-weights: {path}: {reason(error)}") from error
    except Exception as error:  # a file can hold anything, and shapes can differ
        first = reason(error)[:200]
        raise UserError(f"--backbone-weights: {path}: does not fit: {first}") from error
    if missing:
        raise UserError(
            f"--backbone-weights: {path}: {missing[0]} is missing (expected a state dict of "
            f"torchvision's {model.config['backbone']})"
        )
