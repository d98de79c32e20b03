"""Skips for backends that cannot run a call, with the reason."""

from __future__ import annotations

from typing import Any

import pytest

from deeplab_fast.backends import registry


def skip_if_unsupported(backend: str, op: str, *arguments: Any) -> None:
    reason = registry.why_not(op, backend, arguments[0].device.type, *arguments)
    if reason:
        pytest.skip(f"{backend}: {reason}")


def skip_without_kernel(backend: str, op: str) -> None:
    if backend not in registry.implementations(op):
        pytest.skip(f"{backend}: it has no {op} kernel")
