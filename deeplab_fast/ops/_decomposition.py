"""Decompositions of our ops into PyTorch's operators.

An exported graph, for example one for ONNX, has the decompositions; torch.compile calls the ops.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from torch._decomp import register_decomposition
from torch._ops import OpOverload


def register(
    op: OpOverload, decomposition: Callable[..., Any], fake: Callable[..., Any]
) -> Callable[..., Any]:
    """Register the decomposition of an op.

    Args:
        fake: the fake implementation of the op.

    Returns:
        The fake implementation to register in its place.
    """
    register_decomposition(op)(decomposition)

    # Inductor accepts an op that it has no code for, except where the op has a decomposition and
    # the environment variable CI is set. This is called while Inductor traces a graph.
    def fake_that_prepares_inductor(*args: Any, **kwargs: Any) -> Any:
        inductor = sys.modules.get("torch._inductor.lowering")
        if inductor and op not in inductor.lowerings:
            # From PyTorch 2.8 on, tags of an op precede the constraint on strides given here.
            inductor.make_fallback(op, inductor.constrain_to_fx_strides, warn=False)
        return fake(*args, **kwargs)

    # Otherwise fake tensors with symbolic sizes would run the decomposition instead of the fake.
    register_decomposition(op, type="meta")(fake_that_prepares_inductor)
    return fake_that_prepares_inductor
