"""The CPU as a GPU on which two kernels compete with cuDNN, for tests of the dispatch by speed."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from deeplab_fast.backends import dispatch_table, race, registry
from deeplab_fast.backends.dispatch_table import Row
from deeplab_fast.ops import fused_conv2d

KERNELS = ("cuda/sm90", "triton")


class PretendGPU:
    """The kernels and the times of a simulated GPU, which a test can change.

    Attributes:
        wrong: what a kernel does to the outputs of the reference; by default nothing.
        unsupported: kernel -> function of the arguments that says why it cannot compute a call.
        times: function of a kernel's name, or that of cuDNN, and of the first output of a call
            that returns the time of the call in ms. It may raise an exception.
        timed: the calls that were timed, by the shape of the first output.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
        self.wrong: dict[str, Callable[[Any], Any]] = {}
        self.unsupported: dict[str, Callable[[Any], str | None]] = {}
        self.times: Callable[[str, torch.Tensor], float] = lambda name, output: 1.0
        self.timed: list[tuple[int, ...]] = []
        self.table = folder / "cache" / "dispatch_table.csv"
        torch.use_deterministic_algorithms(False)
        monkeypatch.setattr(
            registry, "depends_on_measurements", lambda op, kind: op in registry.shape_buckets
        )
        # A GPU has no short way to oneDNN.
        monkeypatch.setattr(fused_conv2d, "_runs_on_onednn", lambda input, weight: False)
        monkeypatch.setattr(dispatch_table, "device_class", lambda device: "a pretended GPU")
        monkeypatch.setattr(dispatch_table, "user_path", lambda: self.table)
        uncached = dispatch_table.fastest_kernels.__wrapped__
        monkeypatch.setattr(dispatch_table, "fastest_kernels", functools.cache(uncached))
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "PretendGPU 1000")
        monkeypatch.setattr(race, "milliseconds", self._milliseconds)
        for name in KERNELS:
            available = registry.Backend(lambda kind: None, target=None, load=None)
            monkeypatch.setitem(registry._backends, name, available)
            for op in registry.shape_buckets:
                monkeypatch.setitem(registry._kernels[op], name, self._kernel(op, name))

    def _kernel(self, op: str, name: str) -> registry.Kernel:
        reference = registry._kernels[op]["reference"].run

        def run(arguments: Any) -> Any:
            return self.wrong.get(name, lambda outputs: outputs)(reference(arguments))

        def unsupported_reason(arguments: Any) -> str | None:
            return self.unsupported.get(name, lambda arguments: None)(arguments)

        return registry.Kernel(run, unsupported_reason)

    def _milliseconds(
        self, calls: Mapping[str, Callable[[], Any]], device: torch.device, budget_ms: float
    ) -> dict[str, float]:
        assert budget_ms > 0
        outputs = {name: call()[0] for name, call in calls.items()}
        self.timed.append(tuple(next(iter(outputs.values())).shape))
        return {name: self.times(name, output) for name, output in outputs.items()}

    def rows(self) -> list[Row]:
        """The user's dispatch table."""
        return dispatch_table.read(self.table) if self.table.exists() else []
