"""Where networks run, and what it looks like when they do not fit there."""

from __future__ import annotations

import torch

from .errors import UserError, reason


def find_device(name: str | None) -> torch.device:
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError) as error:
        gpus = [f"cuda:{index}" for index in range(torch.cuda.device_count())]
        expected = ", ".join(["cpu", *gpus])
        why = reason(error).split(". ")[0]
        raise UserError(f"--device {name}: {why} (expected one of {expected})") from error
    return device


def is_out_of_memory(error: BaseException) -> bool:
    # PyTorch's allocator for the CPU has no exception of its own.
    kinds = (MemoryError, torch.OutOfMemoryError)
    return isinstance(error, kinds) or "can't allocate memory" in str(error)
