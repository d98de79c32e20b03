"""One process or several: torchrun starts them, torch.distributed connects them."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .errors import TrainingError


def start(device: torch.device) -> torch.device:
    """Join the other processes where torchrun started this one; the device of this one."""
    if "LOCAL_RANK" not in os.environ:  # set by torchrun
        return device
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    return device


def stop() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def sum_over_processes(tensor: Tensor) -> Tensor:
    """In place."""
    if world_size() > 1:
        dist.all_reduce(tensor)
    return tensor


def gather(value: Any) -> list[Any]:
    """The ``value`` of every process, on all of them."""
    values: list[Any] = [value] * world_size()
    if world_size() > 1:
        dist.all_gather_object(values, value)
    return values


def any_process(flag: bool) -> bool:
    """Whether ``flag`` is true on any of them. Asked on the CPU: no GPU is waited for."""
    return bool(sum_over_processes(torch.tensor(float(flag))))


def raise_on_all_ranks(error: TrainingError | None) -> None:
    """Raise on every process what was caught on one: the others would wait for it.

    It returns where nothing was caught, and only when all processes are here.
    """
    for message in gather(None if error is None else str(error)):
        if message is not None:
            raise TrainingError(message) from error


def on_rank_zero(work: Callable[[], None]) -> None:
    """Do it on the first process, the others wait; what it raises there is raised on all."""
    error = None
    if rank() == 0:
        try:
            work()
        except TrainingError as caught:
            error = caught
    raise_on_all_ranks(error)
