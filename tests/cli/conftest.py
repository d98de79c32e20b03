"""Models that the command line segments with."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from deeplab_fast.cli import segment as command
from deeplab_fast.models import DeepLabV3, Preprocessing

from ..support.segment import photo

CLASSES = 5


def whole(preprocessing: Preprocessing) -> Preprocessing:
    """The preprocessing without its crop, as in the command line."""
    return dataclasses.replace(preprocessing, crop=None)


@pytest.fixture(scope="module")
def model() -> DeepLabV3:
    """A small random model, normalised such that photo() has all its classes."""
    torch.manual_seed(0)
    model = DeepLabV3("mobilenet_v2", CLASSES, 16, atrous_rates=(), head_conv=False, norm_eps=0.1)
    model.preprocessing = Preprocessing(resize=64, crop=(64, 64))
    model.categories = ("background", "apple", "pear", "plum", "quince")
    images = whole(model.preprocessing)(photo())[None]
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
    model(torch.cat([images, images.flip(2, 3)]))
    logits = model.eval().logits(images)["out"].detach()
    model.classifier[-1].bias.data -= logits.mean((0, 2, 3))
    return model


@pytest.fixture(scope="module")
def predict(model):
    """The Python interface: labels [H, W] of a whole image."""
    prepare = functools.cache(model.prepare_for_inference)

    def predict(image: Image.Image, dtype: torch.dtype = torch.float32) -> np.ndarray:
        pixels = whole(model.preprocessing)(image)
        return prepare(dtype).predict(pixels, size=(image.height, image.width)).numpy()

    return predict


@pytest.fixture(scope="module")
def weights(model, tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("weights") / "tiny.safetensors"
    model.save_pretrained(path)
    return str(path)


@pytest.fixture
def stand_in(monkeypatch) -> SimpleNamespace:
    """Replace the network by one of two classes that labels everything class 1."""
    network = SimpleNamespace(
        segment=lambda photo, **views: np.ones((photo.height, photo.width), np.uint8),
        label_names=("background", "everything"),
        align_corners=False,
    )
    monkeypatch.setattr(command, "load_for_photos", lambda *arguments: (network, 2))
    return network


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path
