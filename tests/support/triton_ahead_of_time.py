"""Compiles what the launchers of the Triton kernels launch, for a GPU that need not be there.

Run as ``python triton_ahead_of_time.py 80`` (or ``gfx942``, an AMD chip): prints a JSON object of
each kernel launched, by name. A process of its own, because Triton's interpreter, which other tests
use, cannot compile.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from deeplab_fast.backends.triton import (
    depthwise_conv2d,
    dilated_conv2d,
    dilated_conv2d_backward,
    upsample_argmax,
    upsample_cross_entropy,
    work_lists,
)

INSTRUCTIONS = r"\b(?:wgmma\.mma_async|mma\.sync|cp\.async\.c[ag]|fma\.rn\.f32|mul(?:\.rn)?\.f32)\b"
CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"


class Driver:
    """The part of Triton's driver that compilation needs."""

    def __init__(self, chip: str) -> None:
        is_amd = chip.startswith("gfx")
        self.target = GPUTarget("hip", chip, 64) if is_amd else GPUTarget("cuda", int(chip), 32)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def record_launches() -> dict[str, Any]:
    """Make launches compile only, and return the dict that they fill with kernels."""
    compiled: dict[str, Any] = {}
    run = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        kernel = run(self, *args, grid=grid, warmup=True, **options)
        kernel.options = options
        compiled.setdefault(self.__name__, []).append(kernel)
        return kernel

    JITFunction.run = compile_only
    return compiled


def facts(kernel: Any) -> dict[str, Any]:
    if "cubin" not in kernel.asm:
        return {"shared": kernel.metadata.shared, "options": kernel.options}
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage, sass = (
            subprocess.run(
                [CUOBJDUMP, option, file.name], capture_output=True, text=True, check=True
            ).stdout
            for option in ("--dump-resource-usage", "--dump-sass")
        )
    return {
        "registers": int(re.search(r"REG:(\d+)", usage)[1]),  # type: ignore[index]
        "spills": len(re.findall(r"\b(?:STL|LDL)\b", sass)),
        "shared": kernel.metadata.shared,
        "instructions": sorted(set(re.findall(INSTRUCTIONS, kernel.asm["ptx"]))),
        "options": kernel.options,
    }


def _first(first: int, _: object) -> int:
    return first


def launch_all() -> None:
    for size, layout in (((513, 513), torch.contiguous_format), ((129, 129), torch.channels_last)):
        logits = torch.zeros(1, 21, 65, 65, dtype=torch.bfloat16).contiguous(memory_format=layout)
        upsample_argmax.forward(logits, size, None, False, torch.int64)

    logits = torch.zeros(1, 21, 65, 65, dtype=torch.bfloat16)
    target = torch.zeros(1, 513, 513, dtype=torch.int64)
    options = (255, "mean", 0.1, False)
    loss, *saved = upsample_cross_entropy.forward(logits, target, None, *options)
    upsample_cross_entropy.backward(loss, logits, target, None, *saved, *options)

    for dtype, tf32 in ((torch.bfloat16, True), (torch.float32, True), (torch.float32, False)):
        # So many that sums are split, and so added up, in bf16
        programs = 10**6 if dtype == torch.bfloat16 else 1
        work_lists.num_programs = partial(_first, programs)
        torch.backends.cudnn.allow_tf32 = tf32
        x = torch.zeros(1, 2048, 17, 17, dtype=dtype)
        weights = [torch.zeros(256, 2048, k, k, dtype=dtype) for k in (1, 3, 3, 3)]
        dilations = [(1, 1), (6, 6), (12, 12), (18, 18)]
        grad = dilated_conv2d.forward(x, weights, [None] * 4, dilations, activation="relu")
        dilated_conv2d_backward.input_gradient(grad, weights, dilations, torch.zeros(1, 2048))
        dilated_conv2d_backward.weight_gradients(grad, x, weights, dilations)

    work_lists.num_programs = partial(_first, 10**6)
    x = torch.zeros(1, 64, 33, 33, dtype=torch.bfloat16)
    weight = torch.zeros(64, 64, 3, 3, dtype=torch.bfloat16)
    dilated_conv2d_backward.weight_gradients(x, x, [weight], [(12, 12)])  # split sums

    x = torch.zeros(1, 256, 33, 33, dtype=torch.bfloat16)
    weight = torch.zeros(256, 1, 3, 3, dtype=torch.bfloat16)
    depthwise_conv2d.forward(x, weight, None, (12, 12))
    depthwise_conv2d.weight_gradient(x, x, weight, (12, 12))


def launch_with_every_size_one() -> None:
    """Triton makes an argument that is 1 a constant of the kernel."""
    x, labels = (
        torch.zeros(1, 1, 1, 1, dtype=torch.float16),
        torch.zeros(1, 1, 1, dtype=torch.int64),
    )
    upsample_argmax.forward(x, (9, 9), None, True, torch.uint8)
    for reduction in ("none", "mean"):
        options = (1, reduction, 0.0, True)
        loss, *saved = upsample_cross_entropy.forward(x, labels, torch.ones(1), *options)
        upsample_cross_entropy.backward(loss, x, labels, None, *saved, *options)
    bias = torch.zeros(1, 1)
    dilated_conv2d.forward(x, [x], [bias], [(1, 1)], x.clone(), "relu6")
    dilated_conv2d_backward.input_gradient(x, [x], [(1, 1)])
    dilated_conv2d_backward.weight_gradients(x, x, [x], [(1, 1)])
    depthwise_conv2d.forward(x, x, x.flatten(), (1, 1), x.clone(), "relu6")
    depthwise_conv2d.weight_gradient(x, x, x, (1, 1))


if __name__ == "__main__":
    driver = Driver(sys.argv[1])
    triton.runtime.driver.set_active(driver)
    if driver.target.backend == "hip":
        torch.version.hip = "7.0"
    compiled = record_launches()
    launch_all()
    if driver.target.backend == "hip":  # whose compiler is the fastest
        launch_with_every_size_one()
    print(json.dumps({name: [*map(facts, kernels)] for name, kernels in compiled.items()}))
