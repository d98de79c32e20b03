"""Communication between the processes that torchrun starts. Without torchrun there is only one."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .errors import TrainingError


def start(device: torch.device) -> torch.device:
    """Join the processes that torchrun started, and return the device of this one."""
    if "LOCAL_RANK" not in os.environ:  # set by torchrun
        return device
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    return device


def stop() -> None:
    """Leave the group of processes."""
    if dist.is_initialized():
        dist.destroy_process_group()


def rank() -> int:
    """Index of this process, 0 if it is the only one."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def sum_over_processes(tensor: Tensor) -> Tensor:
    """Sum a tensor over all processes, in place, and return it."""
    if world_size() > 1:
        dist.all_reduce(tensor)
    return tensor


def gather(value: Any) -> list[Any]:
    """The values of all processes, by rank, on all processes."""
    values: list[Any] = [value] * world_size()
    if world_size() > 1:
        dist.all_gather_object(values, value)
    return values


def any_process(flag: bool) -> bool:
    """True on all processes if ``flag`` is true on any of them. It does not wait for a GPU."""
    return bool(sum_over_processes(torch.tensor(float(flag))))


def raise_on_all_ranks(error: TrainingError | None) -> None:
    """Raise the error of one process on all processes, which would otherwise wait for it.

    Every process calls this function, with its own error or None.
    """
    for message in gather(None if error is None else str(error)):
        if message is not None:
            raise TrainingError(message) from error


def on_rank_zero(function: Callable[[], None]) -> None:
    """Call a function on rank 0 while the others wait. A TrainingError of it is raised on all."""
    error = None
    if rank() == 0:
        try:
            function()
        except TrainingError as caught:
            error = caught
    raise_on_all_ranks(error)
