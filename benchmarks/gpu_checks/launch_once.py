"""Launch our kernels of the given families once, at the tiny shape, and nothing else.

A program for compute-sanitizer: python -m gpu_checks.launch_once FAMILY...
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import torch
from common import harness

from .correctness import GPU, arguments_of, ours
from .families import FAMILIES
from .inputs import TINY


def main(names: Sequence[str]) -> None:
    for name in names:
        family = FAMILIES[name]
        print(f"family {name}", flush=True)
        for dtype in family.dtypes:
            arguments = arguments_of(family, TINY, dtype, GPU.device)
            with harness.tf32(dtype == "tf32"):
                ours(family, GPU, arguments)()
        torch.cuda.synchronize()
        print(f"end {name}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
