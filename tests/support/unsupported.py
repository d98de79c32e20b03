"""Reasons why a backend does not support a call, and skips that give them."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from deeplab_fast.backends import registry


def unsupported_reason(backend: str, op: str, *arguments: Any) -> str | None:
    """Why ``backend`` cannot run this call; None if it can. Missing last arguments are None."""
    schema = getattr(torch.ops.deeplab_fast, op).default._schema
    missing = len(schema.arguments) - 1 - len(arguments)  # the backend is its last
    values = registry.arguments(op, *arguments, *[None] * missing)
    return registry.unsupported_reason(op, backend, values)


def skip_if_unsupported(backend: str, op: str, *arguments: Any) -> None:
    if reason := unsupported_reason(backend, op, *arguments):
        pytest.skip(f"{backend}: {reason}")


def skip_without(backend: str, op: str) -> None:
    if backend not in registry.backends_of(op):
        pytest.skip(f"{backend}: it has no {op} kernel")
