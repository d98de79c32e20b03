"""Acceleration of models of any project: :func:`accelerate`."""

from .accelerating import accelerate, restore
from .inference import AcceleratedModel
from .report import Entry, Report

__all__ = ["AcceleratedModel", "Entry", "Report", "accelerate", "restore"]
