"""Backbones: networks that turn images into the features that a head classifies."""

from .build import make_backbone
from .interface import Backbone

__all__ = ["Backbone", "make_backbone"]
