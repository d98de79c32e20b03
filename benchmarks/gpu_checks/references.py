"""Ground truth of each op, and the PyTorch calls that its time is compared with."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from bench_upsample_argmax import regret
from bench_upsample_cross_entropy import IGNORE_INDEX
from common import convolutions
from common.timing import Run
from common.variants import with_cudnn
from torch import Tensor
from torch.utils._pytree import tree_map_only

import deeplab_fast  # noqa: F401  registers the ops


def reference(op: str, *arguments: Any) -> Any:
    return getattr(torch.ops.deeplab_fast, op)(*arguments, backend="reference")


def in_fp32(op: str, *arguments: Any) -> Any:
    return reference(op, *tree_map_only(Tensor, Tensor.float, arguments))


def upsampled(logits: Tensor, size: Sequence[int]) -> Tensor:
    return torch.ops.aten.upsample_bilinear2d(logits.double().contiguous(), size, False, None, None)


def argmax_ground_truth(
    op: str, logits: Tensor, size: Sequence[int], *options: Any
) -> list[Tensor]:
    """Full-resolution logits, by which ``regret`` judges the labels."""
    return [upsampled(logits, size)]


def loss_ground_truth(op: str, logits: Tensor, target: Tensor, *options: Any) -> tuple[Tensor, ...]:
    centred = logits.double() - logits.double().amax(1, keepdim=True)
    full = upsampled(centred, target.shape[1:])
    loss = F.cross_entropy(full, target, ignore_index=IGNORE_INDEX)
    return loss, full.logsumexp(1), (target != IGNORE_INDEX).sum()


def loss_gradient_ground_truth(
    op: str, grad_loss: Tensor, logits: Tensor, target: Tensor, *options: Any
) -> Tensor:
    leaf = logits.double().requires_grad_()
    with torch.enable_grad():
        loss = F.cross_entropy(upsampled(leaf, target.shape[1:]), target, ignore_index=IGNORE_INDEX)
    return torch.autograd.grad(loss, leaf, grad_loss.double())[0]


def worst_regret(output: Any, expected: Any) -> float:
    return regret(output[0], expected[0])


def cudnn(run: Run) -> dict[str, Run]:
    return {"cuDNN": run, "cuDNN, benchmark": with_cudnn(run, {"benchmark": True})}


def library(op: str, *arguments: Any) -> dict[str, Run]:
    dense = tree_map_only(Tensor, lambda t: t.clone(memory_format=torch.preserve_format), arguments)
    return cudnn(lambda: reference(op, *dense))


def one_by_one(op: str, *arguments: Any) -> dict[str, Run]:
    """One call per branch; concatenating the outputs is not counted."""
    if op == "parallel_dilated_conv2d":
        x, weights, _, dilations = arguments
        grad, direction = x.new_empty(0, sum(w.size(0) for w in weights), 1, 1), "forward"
    else:
        grad, x, weights, dilations, mask = arguments
        direction = "dgrad" if mask[0] else "wgrad"
    grads = grad.split([weight.size(0) for weight in weights], dim=1)
    grads = [part.clone(memory_format=torch.channels_last) for part in grads]
    runs = [
        convolutions.pytorch(direction, dilation, x, weight, part)
        for weight, part, dilation in zip(weights, grads, dilations)
    ]
    if direction == "dgrad":
        return cudnn(lambda: functools.reduce(torch.add, (run() for run in runs)))
    return cudnn(lambda: [run() for run in runs])


def eager_argmax(op: str, logits: Tensor, size: Sequence[int], *options: Any) -> dict[str, Run]:
    def run(logits: Tensor) -> Tensor:
        return F.interpolate(logits, size, mode="bilinear").argmax(1)

    nchw = logits.contiguous()
    return {"eager NCHW": lambda: run(nchw), "eager channels_last": lambda: run(logits)}


def eager_loss(op: str, logits: Tensor, target: Tensor, *options: Any) -> dict[str, Run]:
    def run(logits: Tensor) -> Tensor:
        full = F.interpolate(logits.float(), target.shape[1:], mode="bilinear")
        return F.cross_entropy(full, target, ignore_index=IGNORE_INDEX)

    nchw = logits.contiguous()
    return {"eager NCHW": lambda: run(nchw), "eager channels_last": lambda: run(logits)}


def eager_loss_gradient(
    op: str, grad_loss: Tensor, logits: Tensor, target: Tensor, *options: Any
) -> dict[str, Run]:
    """The backward kernels of F.cross_entropy of F.interpolate, without the forward pass."""
    size, aten = list(target.shape[1:]), torch.ops.aten
    full = F.interpolate(logits.float().contiguous(), size, mode="bilinear")
    log_softmax = full.log_softmax(1)
    total_weight = (target != IGNORE_INDEX).sum().float()

    def run() -> Tensor:
        grad = aten.nll_loss2d_backward(
            grad_loss, log_softmax, target, None, 1, IGNORE_INDEX, total_weight
        )
        grad = aten._log_softmax_backward_data(grad, log_softmax, 1, torch.float32)
        grad = aten.upsample_bilinear2d_backward(grad, size, logits.shape, False, None, None)
        return grad.to(logits.dtype)

    return {"eager NCHW": run}
