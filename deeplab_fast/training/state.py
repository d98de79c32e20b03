"""State of a run: everything that an update changes and that a checkpoint stores."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from . import distributed
from .recipe import Recipe

_PROGRESS = ("step", "evaluated", "loss", "best_miou")


class TrainingState:
    """Model, optimizer, loss scale and moving average of a run, and its progress.

    Args:
        model: a :class:`deeplab_fast.DeepLabV3` or :class:`deeplab_fast.DeepLabV3Plus` on the
            device to train on; it is changed in place.
        recipe: optimizer, precision, moving average and frozen layers.

    Attributes:
        step: number of updates so far.
        evaluated: number of updates at the last evaluation.
        loss: the last loss that was logged, or None.
        best_miou: highest mean IoU of all evaluations, or None.
    """

    def __init__(self, model: Any, recipe: Recipe) -> None:
        self.device = next(model.parameters()).device
        self.dtype = getattr(torch, recipe.dtype)
        self.freeze_batch_norm = recipe.freeze_batch_norm
        model.to(memory_format=torch.channels_last)
        if distributed.world_size() > 1 and self.device.type == "cuda":  # CPUs have none
            model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
        if recipe.freeze_batch_norm:
            for norm in _batch_norms(model):
                norm.requires_grad_(False)
        self.model = model
        self.optimizer = recipe.optimizer(model)
        self.scaler = torch.amp.GradScaler(
            self.device.type, enabled=self.dtype == torch.float16, init_scale=2.0**16
        )
        self.average = None
        if recipe.ema_decay is not None:
            average: Any = get_ema_multi_avg_fn(recipe.ema_decay)
            self.average = AveragedModel(model, multi_avg_fn=average, use_buffers=True)
        self.step = 0
        self.evaluated = 0
        self.loss: float | None = None
        self.best_miou: float | None = None

    @property
    def result(self) -> Any:
        """The model that is evaluated and saved: the moving average, if the recipe has one."""
        return self.model if self.average is None else self.average.module

    def train_mode(self) -> None:
        """Put the model into training mode, except frozen batch norms."""
        self.model.train()
        if self.freeze_batch_norm:
            for norm in _batch_norms(self.model):
                norm.eval()

    def autocast(self) -> torch.autocast:
        """Context of autocast to the dtype of the recipe, which does nothing for float32."""
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def state_dict(self) -> dict[str, Any]:
        """Tensors and numbers that :meth:`load_state_dict` restores."""
        return {
            **{name: getattr(self, name) for name in _PROGRESS},
            "model": self.model.state_dict(),
            "average": None if self.average is None else self.average.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned."""
        self.model.load_state_dict(state["model"])
        if self.average is not None:
            self.average.load_state_dict(state["average"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        for name in _PROGRESS:
            setattr(self, name, state[name])


def _batch_norms(model: nn.Module) -> Iterator[nn.Module]:
    for module in model.modules():
        if isinstance(module, (nn.BatchNorm2d, nn.SyncBatchNorm)):
            yield module
