"""One update of the weights: forward, backward, optimizer, loss scale and moving average."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from . import distributed
from .errors import TrainingError
from .objective import Objective
from .recipe import Recipe
from .state import TrainingState


class TrainingStep:
    """Updates of a :class:`TrainingState`, with DistributedDataParallel if there are several ranks.

    Args:
        state: the state to update.
        recipe: losses and learning rates.
        num_steps: updates of the whole run, which the learning rates depend on.
    """

    def __init__(self, state: TrainingState, recipe: Recipe, num_steps: int) -> None:
        self.state, self.recipe, self.num_steps = state, recipe, num_steps
        self.label_weight = torch.zeros((), device=state.device)  # since the last check
        self.updates = 0  # since the last check
        self.objective = Objective(state.model, recipe).to(state.device)
        self.parallel: Any = self.objective
        if distributed.world_size() > 1:
            ids = [state.device.index] if state.device.type == "cuda" else None
            self.parallel = DistributedDataParallel(self.objective, device_ids=ids)
        mean, std = state.model.preprocessing.mean, state.model.preprocessing.std
        self.mean = torch.tensor(mean, device=state.device).view(-1, 1, 1)
        self.std = torch.tensor(std, device=state.device).view(-1, 1, 1)

    def update(self, micro_batches: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
        """Update the state with the micro-batches of this process.

        Args:
            micro_batches: images uint8 [N, H, W, 3] and labels uint8 [N, H, W] of each.

        Returns:
            This process's share of the loss; the shares of all processes add up to it.
        """
        state, processes = self.state, distributed.world_size()
        self.recipe.set_learning_rates(state.optimizer, state.step, self.num_steps)
        batch = [self._to_device(*micro_batch) for micro_batch in micro_batches]
        normalizers = [self.objective.loss_normalizer(target) for _, target in batch]
        # DistributedDataParallel averages gradients over the processes. To get their sum, the
        # normalizer is divided by the number of processes.
        normalizer = distributed.sum_over_processes(torch.stack(normalizers).sum()) / processes
        self.label_weight += normalizer
        self.updates += 1
        total = torch.zeros((), device=state.device)
        for index, (images, target) in enumerate(batch):
            synchronizes = index == len(batch) - 1 or processes == 1
            with contextlib.nullcontext() if synchronizes else self.parallel.no_sync():
                with state.autocast():
                    loss = self.parallel(images, target, normalizer)
                state.scaler.scale(loss).backward()
            total += loss.detach()
        state.scaler.step(state.optimizer)
        state.scaler.update()
        state.optimizer.zero_grad(set_to_none=True)
        if state.average is not None:
            state.average.update_parameters(state.model)
        state.step += 1
        return total / processes

    def check_labelled(self, least: int) -> None:
        """Raise a TrainingError if no pixel counted in all updates since the last check.

        Such an update has a loss of 0. With fewer updates than ``least`` nothing is checked.
        """
        if self.updates < least:
            return
        if not self.label_weight.item():
            raise TrainingError(
                f"no pixel counted in the last {self.updates} updates (expected labels that are "
                "not ignored, and class weights above 0)"
            )
        self.label_weight.zero_()
        self.updates = 0

    def _to_device(self, images: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """Normalised images [N, C, H, W] in channels_last and int64 labels, on the device."""
        images = images.to(self.state.device, non_blocking=True)
        if self.mean.size(0) == 1:
            images = to_grey(images)
        images = images.permute(0, 3, 1, 2)
        images = (images / 255 - self.mean) / self.std
        return images, target.to(self.state.device, non_blocking=True).long()


def to_grey(images: Tensor) -> Tensor:
    """RGB images uint8 [..., 3] as grey ones [..., 1], rounded as Pillow's ``convert("L")``."""
    luma = torch.tensor([19595, 38470, 7471], dtype=torch.int32, device=images.device)
    return ((images * luma).sum(-1, keepdim=True) + 32768) >> 16
