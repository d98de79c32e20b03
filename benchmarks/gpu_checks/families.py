"""The kernel families that gpu_check.py checks and times, most important first.

A family is an op on one backend. Its ground truth is the op's reference in fp32, or a definition in
float64. PyTorch in the same dtype sets the accuracy that it must reach.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from common import harness
from common.convolutions import DIRECTIONS
from common.timing import Run

from .inputs import (
    Size,
    argmax_arguments,
    aspp_arguments,
    backward_arguments,
    depthwise_arguments,
    forward_arguments,
    loss_arguments,
    loss_gradient_arguments,
    projection_arguments,
)
from .references import (
    argmax_ground_truth,
    eager_argmax,
    eager_loss,
    eager_loss_gradient,
    in_fp32,
    library,
    loss_gradient_ground_truth,
    loss_ground_truth,
    one_by_one,
    worst_regret,
)
from .work import (
    Work,
    aspp_work,
    convolution_work,
    depthwise_work,
    projection_work,
    upsampling_work,
)


class Family(NamedTuple):
    """An op on one backend.

    ``arguments`` makes the op's arguments. ``ground_truth`` and ``peers`` take the op's name and
    these arguments: the former returns the expected outputs, the latter the calls to time beside
    ours, by name. ``error`` compares outputs with the expected ones.
    """

    op: str
    backend: str
    arguments: Callable[[Size, torch.dtype, torch.device], tuple[Any, ...]]
    ground_truth: Callable[..., Any]
    peers: Callable[..., dict[str, Run]]
    work: Callable[[Size, int], Work]
    error: Callable[[Any, Any], float] = harness.relative_error
    dtypes: tuple[str, ...] = ("bf16",)


def _aspp(name: str, backend: str, dtypes: tuple[str, ...]) -> dict[str, Family]:
    op = "parallel_dilated_conv2d"
    dgrad, wgrad = partial(backward_arguments, "dgrad"), partial(backward_arguments, "wgrad")
    common = in_fp32, one_by_one, convolution_work
    families = {
        f"{name}-forward": Family(op, backend, forward_arguments, *common),
        f"{name}-dgrad": Family(f"{op}_backward", backend, dgrad, *common),
        f"{name}-wgrad": Family(f"{op}_backward", backend, wgrad, *common),
        f"{name}-aspp": Family("aspp", backend, aspp_arguments, in_fp32, library, aspp_work),
    }
    return {key: family._replace(dtypes=dtypes) for key, family in families.items()}


def _upsampling(prefix: str, backend: str) -> dict[str, Family]:
    return {
        f"{prefix}argmax": Family(
            "upsample_argmax",
            backend,
            argmax_arguments,
            argmax_ground_truth,
            eager_argmax,
            partial(upsampling_work, 1, 8),
            worst_regret,
        ),
        f"{prefix}cross-entropy": Family(
            "upsample_cross_entropy",
            backend,
            loss_arguments,
            loss_ground_truth,
            eager_loss,
            partial(upsampling_work, 1, 12),
        ),
        f"{prefix}cross-entropy-backward": Family(
            "upsample_cross_entropy_backward",
            backend,
            loss_gradient_arguments,
            loss_gradient_ground_truth,
            eager_loss_gradient,
            partial(upsampling_work, 2, 12),
        ),
    }


def _depthwise(prefix: str, backend: str) -> dict[str, Family]:
    return {
        f"{prefix}depthwise-{direction}": Family(
            "fused_conv2d" if direction == "forward" else "dilated_conv2d_backward",
            backend,
            partial(depthwise_arguments, direction),
            in_fp32,
            library,
            depthwise_work,
        )
        for direction in DIRECTIONS
    }


# First the families for one kind of GPU, then ops without a vendor library.
FAMILIES = {
    "sm90-projection": Family(
        "dilated_conv2d", "cuda/sm90", projection_arguments, in_fp32, library, projection_work
    ),
    **_aspp("sm90", "cuda/sm90", ("bf16",)),
    **_upsampling("", "cuda"),
    **_depthwise("", "cuda"),
    **_aspp("sm80", "cuda/sm80", ("bf16", "tf32")),
    **_upsampling("triton-", "triton"),
    **_aspp("triton", "triton", ("bf16", "tf32")),
    **_depthwise("triton-", "triton"),
}
