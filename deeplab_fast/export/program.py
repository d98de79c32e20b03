"""Export of a model by torch.export."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

Result = Literal["labels", "logits"]


class Exportable(nn.Module):
    """A prepared model as a function from images to one tensor: labels, or logits at full size."""

    def __init__(self, model: Any, result: Result, dtype: torch.dtype) -> None:
        super().__init__()
        self.model, self.result, self.dtype = model, result, dtype

    def forward(self, images: Tensor) -> Tensor:
        if self.result == "labels":
            labels: Tensor = self.model.predict(images, dtype=self.dtype)
            return labels
        logits: Tensor = self.model(images)["out"]
        return logits
