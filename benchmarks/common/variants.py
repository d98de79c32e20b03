"""Wrappers that run a callable compiled, on a given backend, or with given cuDNN settings."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

import deeplab_fast
from deeplab_fast._native.device_cache import DeviceCache
from deeplab_fast.backends import registry

from .timing import Run

# How cuDNN chooses an algorithm: by heuristics, by timing all, or among deterministic ones.
CUDNN_MODES = {
    "": {},
    ", benchmark": {"benchmark": True},
    ", deterministic": {"deterministic": True},
}


def compiled(
    function: Callable[..., Any], device: torch.device, fullgraph: bool = True, **options: bool
) -> Run:
    """``function``, or a module, compiled by torch.compile for the shapes of its next call.

    The reset keeps sizes static: without it the second shape in a process is compiled with symbolic
    sizes, which is slower, and after some shapes torch.compile gives up. ``options`` are passed to
    Inductor; on a GPU max_autotune is added.
    """
    torch._dynamo.reset()
    options["max_autotune"] = device.type == "cuda"
    return torch.compile(function, fullgraph=fullgraph, dynamic=False, options=options)


def forced(run: Run, backend: str) -> Run:
    """``run`` on a backend; "" stands for automatic dispatch."""

    def on_backend() -> object:
        with deeplab_fast.backend(backend):
            return run()

    return on_backend if backend else run


def preferring(run: Run, kernel: str) -> Run:
    """``run`` on the backend ``kernel`` for every call it supports, else by automatic dispatch.

    It has its own launch plans, because plans contain the choice of the kernel.
    """
    plans: DeviceCache[registry.Plan] = DeviceCache()

    def preferred() -> object:
        automatic, other_plans = registry.automatic, registry._plans
        registry.automatic = lambda op, arguments: (kernel, *automatic(op, arguments))
        registry._plans = plans
        try:
            return run()
        finally:
            registry.automatic, registry._plans = automatic, other_plans

    return preferred


def with_triton(ours: dict[str, Run], device: torch.device) -> dict[str, Run]:
    """``ours`` and, if Triton can compile for ``device``, its first variant on Triton."""
    if device.type != "cuda" or "triton" not in deeplab_fast.available_backends(device):
        return ours
    return {**ours, "deeplab_fast on triton": forced(next(iter(ours.values())), "triton")}


def with_cudnn(run: Run, flags: dict[str, bool]) -> Run:
    """``run`` with the attributes ``flags`` of torch.backends.cudnn set."""

    def flagged() -> Any:
        before = {flag: getattr(torch.backends.cudnn, flag) for flag in flags}
        _set(flags)
        try:
            return run()
        finally:
            _set(before)

    return flagged


def cudnn_variants(name: str, run: Run, device: torch.device) -> dict[str, Run]:
    """``run`` by name: on a GPU once for each of CUDNN_MODES, on a CPU as it is."""
    modes = CUDNN_MODES if device.type == "cuda" else {"": {}}
    return {f"{name}{suffix}": with_cudnn(run, flags) for suffix, flags in modes.items()}


def _set(flags: dict[str, bool]) -> None:
    for flag, value in flags.items():
        setattr(torch.backends.cudnn, flag, value)
