"""Ops that exported graphs have decompositions of, and that torch.compile calls."""

from __future__ import annotations

import pytest
import torch

from deeplab_fast import ops
from deeplab_fast.ops.upsample import upsample


def convolve(x):
    return ops.dilated_conv2d(x, torch.ones(2, 5, 3, 3), dilation=2)


def upsample_to_9x10(x):
    return upsample(x, (9, 10), False)


@pytest.mark.parametrize(
    "function, op",
    [
        (convolve, torch.ops.deeplab_fast.dilated_conv2d.default),
        (upsample_to_9x10, torch.ops.deeplab_fast.upsample.default),
    ],
)
@torch.no_grad()
def test_inductor_calls_the_op_where_ci_is_set(function, op, monkeypatch):
    """There it refuses ops with a decomposition that nobody has told it to call."""
    from torch._inductor import config, lowering

    monkeypatch.setenv("CI", "true")
    monkeypatch.delitem(lowering.lowerings, op, raising=False)
    torch._dynamo.reset()
    x = torch.randn(2, 5, 4, 3)
    with config.patch(force_disable_caches=True):
        assert torch.equal(torch.compile(function, fullgraph=True)(x), function(x))
    assert op in lowering.lowerings
