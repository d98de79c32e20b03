"""Implementations of the ops, one folder or file per backend, and the choice among them."""

from .registry import available_backends, backend

__all__ = ["available_backends", "backend"]
