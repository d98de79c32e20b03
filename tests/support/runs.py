"""A small network to train, and signals that interrupt its training."""

from __future__ import annotations

import signal

import pytest
import torch

from deeplab_fast import DeepLabV3
from deeplab_fast.training.step import TrainingStep


def small_network(**options) -> DeepLabV3:
    """MobileNetV2 at output stride 16 with as few layers behind it as there can be, seed 0."""
    torch.manual_seed(0)
    small = {"num_classes": 3, "output_stride": 16, "atrous_rates": (), "head_conv": False}
    return DeepLabV3("mobilenet_v2", **small | options)


def signal_in_update(
    monkeypatch: pytest.MonkeyPatch, update: int, *signals: signal.Signals
) -> None:
    """Send signals to this process while an update, counted from 1, is computed."""
    original = TrainingStep.update

    def interrupted(self, micro_batches):
        if self.state.step + 1 == update:
            for number in signals:
                signal.raise_signal(number)
        return original(self, micro_batches)

    monkeypatch.setattr(TrainingStep, "update", interrupted)
