"""The processes that torchrun starts."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from ..training import TrainingError, distributed
from .device import find_device
from .errors import UserError


@contextlib.contextmanager
def process_group(device: str | None) -> Iterator[torch.device]:
    """Join the group of processes for the block, on the device with this name.

    A TrainingError, which all processes raise, becomes a UserError on rank 0.
    """
    try:
        yield distributed.start(find_device(device))
    except TrainingError as error:
        if distributed.rank() > 0:
            raise SystemExit(2) from error
        raise UserError(str(error)) from error
    finally:
        distributed.stop()
