"""Batch norms like those of trained networks."""

from __future__ import annotations

from torch import nn


def with_statistics(model: nn.Module) -> nn.Module:
    """Give batch norms random statistics and parameters, as after training."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.7, 1.5)
            nn.init.uniform_(module.weight, 0.5, 1.2)
            nn.init.normal_(module.bias, 0, 0.1)
    return model
