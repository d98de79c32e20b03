"""Interface of all backbones."""

from __future__ import annotations

from torch import Tensor, nn


class Backbone(nn.Module):
    """Interface of all backbones.

    Input [N, in_channels, H, W]; output {"low": [N, low_channels, H/4, W/4],
    "aux": [N, aux_channels, H/a, W/a], "out": [N, out_channels, H/s, W/s]}, sizes rounded up, where
    s is the output stride and a <= s.
    """

    low_channels: int
    aux_channels: int
    out_channels: int

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        raise NotImplementedError
