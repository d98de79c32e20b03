"""Compiles what the launchers of the Triton kernels launch, for a GPU that need not be there.

Run as ``python triton_ahead_of_time.py 80``: prints a JSON object of each kernel launched, by name.
A process of its own, because Triton's interpreter, which other tests use, cannot compile.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"


class Driver:
    """As much of Triton's driver as compiling asks for."""

    def __init__(self, capability: int) -> None:
        self.target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def record_launches() -> dict[str, Any]:
    """From now on launches compile only; returns the dict of kernels that they fill."""
    compiled: dict[str, Any] = {}
    run = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        kernel = run(self, *args, grid=grid, warmup=True, **options)
        compiled.setdefault(self.__name__, []).append(kernel)
        return kernel

    JITFunction.run = compile_only
    return compiled


def facts(kernel: Any) -> dict[str, Any]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage = subprocess.run(
            [CUOBJDUMP, "--dump-resource-usage", file.name],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
    ptx = kernel.asm["ptx"]
    return {
        "registers": int(re.search(r"REG:(\d+)", usage)[1]),  # type: ignore[index]
        "stack": int(re.search(r"STACK:(\d+)", usage)[1]),  # type: ignore[index]
        "shared": kernel.metadata.shared,
        "instructions": sorted(
            set(re.findall(r"\b(?:wgmma\.mma_async|mma\.sync|fma\.rn\.f32)\b", ptx))
        ),
    }


def launch_all() -> None:
    from deeplab_fast.triton_kernels.dilated_conv2d import dilated_conv2d
    from deeplab_fast.triton_kernels.upsample_argmax import upsample_argmax

    for shape, size in (((1, 21, 65, 65), (513, 513)), ((1, 21, 65, 65), (129, 129))):
        for layout in (torch.contiguous_format, torch.channels_last):
            logits = torch.zeros(shape, dtype=torch.bfloat16).contiguous(memory_format=layout)
            upsample_argmax(logits, size, None, False, torch.int64)

    for dtype in (torch.bfloat16, torch.float32):
        x = torch.zeros(1, 2048, 33, 33, dtype=dtype)
        weights = [torch.zeros(256, 2048, k, k, dtype=dtype) for k in (1, 3, 3, 3)]
        dilated_conv2d(x, weights, [None] * 4, [(1, 1), (6, 6), (12, 12), (18, 18)])


if __name__ == "__main__":
    triton.runtime.driver.set_active(Driver(int(sys.argv[1])))
    compiled = record_launches()
    launch_all()
    print(json.dumps({name: [*map(facts, kernels)] for name, kernels in compiled.items()}))
