"""Which implementation of an op runs: one table, one rule.

Implementations register themselves with :func:`implements`. An op call asks :func:`run`, which
takes the backend the caller forced, or else the first of the automatic order that has the op, can
run on this machine and accepts the arguments. ``reference`` accepts everything.

On a GPU the reference of an op that has shape classes is a library's kernel, cuDNN's. Only a kernel
that was measured to be faster for the class of the call comes before it.
"""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch

from . import dispatch_table

NAMES = ("cuda", "cuda/sm90", "cuda/sm80", "triton", "cpu", "emulated", "reference")

# Where no library has a rival. Devices not named here (mps, xpu, ...) have the reference only.
_AUTOMATIC = {
    "cuda": ("cuda", "triton", "reference"),
    "cpu": ("cpu", "reference"),
}


class Implementation(NamedTuple):
    """``run(*args)`` computes the op; ``refuses(*args)`` says why it cannot, or None."""

    run: Callable[..., Any]
    refuses: Callable[..., str | None]


class Remediable(str):
    """Why a backend cannot run, where the user can do something about it.

    Said once, as a warning, where the automatic choice passes over the backend.
    """


_table: dict[str, dict[str, Implementation]] = {}
shape_classes: dict[str, Callable[..., str]] = {}  # of ops with a rival, of their arguments
_availability: dict[str, Callable[[str], str | None]] = {}
_forced = ""  # a plain global: torch.compile guards on it, unlike a ContextVar
_trace: list[tuple[str, str]] | None = None


def _accepts_all(*args: Any) -> str | None:
    return None


def implements(
    op: str, name: str, refuses: Callable[..., str | None] = _accepts_all
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorator that enters a function into the table as the ``name`` implementation of ``op``."""

    def enter(function: Callable[..., Any]) -> Callable[..., Any]:
        _table.setdefault(op, {})[name] = Implementation(function, refuses)
        return function

    return enter


def availability(name: str) -> Callable[[Callable[[str], str | None]], Any]:
    """Decorator for a backend's check: device type -> None if it can run there, or why not."""

    def enter(check: Callable[[str], str | None]) -> Callable[[str], str | None]:
        _availability[name] = check
        return check

    return enter


@availability("reference")
def _reference_unavailable(device_type: str) -> str | None:
    return None


def unavailable(name: str, device_type: str) -> str | None:
    """Why backend ``name`` cannot run on devices of this type here; None if it can."""
    check = _availability.get(name)
    return check(device_type) if check else "this installation has no such kernels"


def available_backends(device: str | torch.device = "cpu") -> list[str]:
    """The backends that can run on ``device`` on this machine, in the order of :data:`NAMES`.

    >>> available_backends("cpu")
    ['cpu', 'emulated', 'reference']
    """
    device_type = torch.device(device).type
    return [name for name in NAMES if unavailable(name, device_type) is None]


class backend(contextlib.ContextDecorator):
    """Force every op inside the ``with`` block onto one backend.

    Args:
        name: "cuda", "triton", "cpu", "emulated" or "reference"; "cuda/sm90" or "cuda/sm80" for
            the convolutions of one compute capability, where "cuda" has the newest that run.

    Raises:
        ValueError: ``name`` is not one of these.
        RuntimeError: raised by an op in the block that the backend cannot run, saying why.

    >>> with backend("reference"):
    ...     labels = upsample_argmax(logits, size=(513, 513))
    """

    def __init__(self, name: str) -> None:
        if name not in NAMES:
            raise ValueError(f"unknown backend {name!r}: expected one of {', '.join(NAMES)}")
        self.name = name

    def __enter__(self) -> None:
        global _forced
        self.outer = _forced
        _forced = self.name

    def __exit__(self, *exception: object) -> None:
        global _forced
        _forced = self.outer


def ops() -> list[str]:
    """The names of all ops, backward ops included."""
    return list(_table)


def implementations(op: str) -> list[str]:
    """The backends that have a kernel for ``op``, whether or not they can run here."""
    return [name for name in NAMES if name in _table[op]]


def current() -> str:
    """The forced backend, or "" where the choice is automatic. Travels as an op argument."""
    return _forced


def why_not(op: str, name: str, device_type: str, *args: Any) -> str | None:
    """Why backend ``name`` cannot run this call of ``op``; None if it can."""
    if name not in _table[op]:
        return f"it has no {op} kernel"
    return unavailable(name, device_type) or _table[op][name].refuses(*args)


def order(device_type: str) -> tuple[str, ...]:
    """The automatic order of preference where no library has a rival."""
    return _AUTOMATIC.get(device_type, ("reference",))


def rests_on_measurements(op: str, device_type: str) -> bool:
    """Whether a kernel of ours has to be measured faster than a library's to be chosen."""
    return device_type == "cuda" and op in shape_classes


def automatic(op: str, *args: Any) -> tuple[str, ...]:
    """The order of preference for this call of ``op``."""
    device = args[0].device
    if not rests_on_measurements(op, device.type):
        return order(device.type)
    classes = dispatch_table.choices(device).get(op)
    faster = classes.get(shape_classes[op](*args), ()) if classes else ()
    return (*faster, "reference")


def run(op: str, requested: str, *args: Any) -> Any:
    """Run ``op`` on the requested backend, or on the automatic choice if that is "".

    The first argument is the tensor whose device decides.
    """
    device_type = args[0].device.type
    for name in (requested,) if requested else automatic(op, *args):
        reason = why_not(op, name, device_type, *args)
        if reason is None:
            if _trace is not None:
                _trace.append((op, name))
            return _table[op][name].run(*args)
        if isinstance(reason, Remediable):
            _warn_once(name, reason)
    raise RuntimeError(f"backend {name!r} cannot run {op} on this input: {reason}")


@functools.cache
def _warn_once(name: str, reason: str) -> None:
    warnings.warn(f"deeplab_fast: another backend stands in for {name!r}: {reason}", stacklevel=2)


@contextlib.contextmanager
def trace() -> Iterator[list[tuple[str, str]]]:
    """Collect the (op, backend) pairs that run inside the block, in order.

    >>> with trace() as ran:
    ...     labels = upsample_argmax(logits, size=(513, 513))
    >>> ran
    [('upsample_argmax', 'cpu')]
    """
    global _trace
    outer, _trace = _trace, []
    try:
        yield _trace
    finally:
        _trace = outer
