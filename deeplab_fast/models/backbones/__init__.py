"""Backbones: networks that turn images into the features that a head classifies."""

from .build import make_backbone
from .imagenet import adapt_input_channels, imagenet_state, load_imagenet
from .interface import Backbone

__all__ = ["Backbone", "adapt_input_channels", "imagenet_state", "load_imagenet", "make_backbone"]
