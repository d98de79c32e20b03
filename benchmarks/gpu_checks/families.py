"""The kernel families that gpu_check.py checks and times, most important first.

A family is an op on one backend. Its ground truth is the op's reference in fp32, or a definition in
float64. PyTorch in the same dtype sets the accuracy that it must reach.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from bench_upsample_argmax import regret, trained_like
from bench_upsample_cross_entropy import IGNORE_INDEX, labels
from common import cases, convolutions, harness
from common.cases import Shape
from common.timing import Run
from common.variants import with_cudnn
from torch import Tensor
from torch.utils._pytree import tree_map_only

import deeplab_fast  # noqa: F401  registers the ops


class Size(NamedTuple):
    name: str
    shape: Shape
    batch: int
    depthwise: tuple[int, int]  # channels, dilation


TINY = Size(
    "tiny", Shape("tiny", (49, 57), 7, 8, (2, 3, 9), in_channels=72, channels=24), 2, (24, 2)
)
REAL = Size("VOC OS8 batch 8", cases.VOC_OS8, 8, (960, 4))
SIZES = (TINY, REAL)


class Work(NamedTuple):
    """The least work of a call.

    ``flops`` leaves out products with padding and ``dense_flops`` has them; ``bytes`` counts each
    operand once.
    """

    flops: float
    dense_flops: float
    bytes: float


class Family(NamedTuple):
    """An op on one backend.

    ``arguments`` makes the op's arguments. ``truth`` and ``peers`` take the op's name and these
    arguments: the former returns the ground truth, the latter the calls that ours is compared with,
    by name. ``error`` compares outputs with the ground truth.
    """

    op: str
    backend: str
    arguments: Callable[[Size, torch.dtype, torch.device], tuple[Any, ...]]
    truth: Callable[..., Any]
    peers: Callable[..., dict[str, Run]]
    work: Callable[[Size, int], Work]
    error: Callable[[Any, Any], float] = harness.relative_error
    dtypes: tuple[str, ...] = ("bf16",)


def channels_last(*shape: int, like: Tensor, scale: float = 1.0) -> Tensor:
    """Normal random numbers in channels_last, in the dtype and on the device of ``like``."""
    random = torch.randn(shape, device=like.device) * scale
    return random.to(like.dtype, memory_format=torch.channels_last)


def branches(size: Size, dtype: torch.dtype, device: torch.device) -> tuple[Any, ...]:
    """Input, weights, dilations and output gradient of an ASPP's four convolutions."""
    shape = size.shape
    x = cases.features(shape, size.batch, dtype, device).contiguous(
        memory_format=torch.channels_last
    )
    c_in, c = shape.in_channels, shape.channels
    weights = [channels_last(c, c_in, k, k, like=x, scale=1 / k / c_in**0.5) for k in (1, 3, 3, 3)]
    grad = channels_last(size.batch, 4 * c, *shape.feature, like=x)
    return x, weights, [1, *shape.atrous_rates], grad


def forward_arguments(*place: Any) -> tuple[Any, ...]:
    x, weights, dilations, _ = branches(*place)
    return x, weights, [], dilations


def backward_arguments(direction: str, *place: Any) -> tuple[Any, ...]:
    x, weights, dilations, grad = branches(*place)
    return grad, x, weights, dilations, convolutions.mask(direction)


def projection_arguments(size: Size, dtype: torch.dtype, device: torch.device) -> tuple[Any, ...]:
    """Projection of four branches; its weight is a slice that leaves out the pooled branch."""
    channels = size.shape.channels
    shape = size.shape._replace(in_channels=4 * channels)
    x = cases.features(shape, size.batch, dtype, device)
    weight = channels_last(channels, 5 * channels, 1, 1, like=x, scale=(4 * channels) ** -0.5)
    x = x.contiguous(memory_format=torch.channels_last)
    return x, weight[:, : 4 * channels], None, [1, 1], 1


def aspp_arguments(*place: Any) -> tuple[Any, ...]:
    x, weights, dilations, _ = branches(*place)
    c = weights[0].size(0)
    bias = functools.partial(torch.randn, c, dtype=x.dtype, device=x.device)
    pool = channels_last(c, x.size(1), 1, 1, like=x, scale=x.size(1) ** -0.5)
    project = channels_last(c, 5 * c, 1, 1, like=x, scale=(5 * c) ** -0.5)
    return x, weights, [bias() for _ in weights], dilations, pool, bias(), project, bias()


def depthwise_arguments(
    direction: str, size: Size, dtype: torch.dtype, device: torch.device
) -> Any:
    channels, dilation = size.depthwise
    x = torch.empty(0, dtype=dtype, device=device)
    x = channels_last(size.batch, channels, *size.shape.feature, like=x)
    weight = channels_last(channels, 1, 3, 3, like=x, scale=1 / 3)
    if direction == "forward":
        bias = torch.randn(channels, dtype=dtype, device=device)
        return x, weight, bias, [1, 1], [dilation] * 2, [dilation] * 2, channels, "relu6"
    grad = channels_last(*x.shape, like=x)
    return grad, x, weight, [dilation] * 2, channels, convolutions.mask(direction)


def argmax_arguments(size: Size, dtype: torch.dtype, device: torch.device) -> tuple[Any, ...]:
    """Random logits at the tiny shape, where many classes can win; else trained-like logits."""
    shape = size.shape
    if size is TINY:
        logits = torch.randn(size.batch, shape.classes, *shape.feature)
    else:
        logits = trained_like(shape, size.batch)
    logits = logits.to(device, dtype).contiguous(memory_format=torch.channels_last)
    return logits, list(shape.image), None, False, torch.int64


def loss_arguments(size: Size, dtype: torch.dtype, device: torch.device) -> tuple[Any, ...]:
    like = torch.empty(0, dtype=dtype, device=device)
    logits = channels_last(size.batch, size.shape.classes, *size.shape.feature, like=like, scale=3)
    target = labels(size.shape, size.batch, device)
    return logits, target, None, IGNORE_INDEX, "mean", 0.0, False


def loss_gradient_arguments(*place: Any) -> tuple[Any, ...]:
    """Arguments with the reference's saved tensors, so that only the gradient is checked."""
    logits, target, *options = loss_arguments(*place)
    forward = torch.ops.deeplab_fast.upsample_cross_entropy
    _, *saved = forward(logits, target, *options, backend="reference")
    grad_loss = torch.tensor(0.5, device=logits.device)
    return grad_loss, logits, target, options[0], *saved, *options[1:]


def reference(op: str, *arguments: Any) -> Any:
    return getattr(torch.ops.deeplab_fast, op)(*arguments, backend="reference")


def in_fp32(op: str, *arguments: Any) -> Any:
    return reference(op, *tree_map_only(Tensor, Tensor.float, arguments))


def upsampled(logits: Tensor, size: Sequence[int]) -> Tensor:
    return torch.ops.aten.upsample_bilinear2d(logits.double().contiguous(), size, False, None, None)


def true_argmax(op: str, logits: Tensor, size: Sequence[int], *options: Any) -> list[Tensor]:
    """Full-resolution logits, by which ``regret`` judges the labels."""
    return [upsampled(logits, size)]


def true_loss(op: str, logits: Tensor, target: Tensor, *options: Any) -> tuple[Tensor, ...]:
    centred = logits.double() - logits.double().amax(1, keepdim=True)
    full = upsampled(centred, target.shape[1:])
    loss = F.cross_entropy(full, target, ignore_index=IGNORE_INDEX)
    return loss, full.logsumexp(1), (target != IGNORE_INDEX).sum()


def true_loss_gradient(
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


def convolution_work(size: Size, itemsize: int) -> Work:
    """Work of the four convolutions of an ASPP; each of their gradients needs as much."""
    shape, n = size.shape, size.batch
    layers = convolutions.layers(shape)
    arguments = n, shape.in_channels, shape.channels, shape.feature
    flops = sum(cases.conv_flops(*arguments, dilation, kernel) for kernel, dilation in layers)
    pixels = n * shape.feature[0] * shape.feature[1]
    weights = sum(kernel**2 for kernel, _ in layers) * shape.in_channels * shape.channels
    elements = pixels * (shape.in_channels + 4 * shape.channels) + weights
    return Work(flops, 2 * pixels * weights, elements * itemsize)


def projection_work(size: Size, itemsize: int) -> Work:
    c = size.shape.channels
    pixels = size.batch * size.shape.feature[0] * size.shape.feature[1]
    flops = 2 * pixels * 4 * c * c
    return Work(flops, flops, (pixels * 5 * c + 4 * c * c) * itemsize)


def aspp_work(size: Size, itemsize: int) -> Work:
    """Work of an ASPP; its bytes leave out the branches, which need not leave the chip."""
    shape, convolution = size.shape, convolution_work(size, itemsize)
    pixels = size.batch * shape.feature[0] * shape.feature[1]
    dense = convolution.dense_flops + 2 * pixels * 4 * shape.channels**2
    bytes = convolution.bytes - pixels * 3 * shape.channels * itemsize
    return Work(cases.aspp_flops(shape, size.batch), dense, bytes)


def depthwise_work(size: Size, itemsize: int) -> Work:
    pixels = size.batch * size.shape.feature[0] * size.shape.feature[1]
    return Work(0, 0, 2 * pixels * size.depthwise[0] * itemsize)


def upsampling_work(logits_passes: int, bytes_per_pixel: int, size: Size, itemsize: int) -> Work:
    height, width = size.shape.image
    logits = size.batch * size.shape.classes * size.shape.feature[0] * size.shape.feature[1]
    pixels = size.batch * height * width
    return Work(0, 0, logits_passes * logits * itemsize + pixels * bytes_per_pixel)


def _families() -> dict[str, Family]:
    """Families by name: first those for one kind of GPU, then ops without a vendor library."""
    parallel, single = "parallel_dilated_conv2d", "dilated_conv2d"
    work = convolution_work

    def aspp(name: str, backend: str, dtypes: tuple[str, ...]) -> dict[str, Family]:
        backward = functools.partial(functools.partial, backward_arguments)
        names = f"{name}-forward", f"{name}-dgrad", f"{name}-wgrad", f"{name}-aspp"
        families = [
            Family(parallel, backend, forward_arguments, in_fp32, one_by_one, work),
            Family(f"{parallel}_backward", backend, backward("dgrad"), in_fp32, one_by_one, work),
            Family(f"{parallel}_backward", backend, backward("wgrad"), in_fp32, one_by_one, work),
            Family("aspp", backend, aspp_arguments, in_fp32, library, aspp_work),
        ]
        return {key: family._replace(dtypes=dtypes) for key, family in zip(names, families)}

    def upsampling(name: str, backend: str) -> dict[str, Family]:
        argmax = functools.partial(upsampling_work, 1, 8)
        loss = functools.partial(upsampling_work, 1, 12)
        gradient = functools.partial(upsampling_work, 2, 12)
        ce = "upsample_cross_entropy"
        return {
            f"{name}argmax": Family(
                "upsample_argmax", backend, argmax_arguments, true_argmax, eager_argmax, argmax,
                worst_regret,
            ),
            f"{name}cross-entropy": Family(
                ce, backend, loss_arguments, true_loss, eager_loss, loss
            ),
            f"{name}cross-entropy-backward": Family(
                f"{ce}_backward", backend, loss_gradient_arguments, true_loss_gradient,
                eager_loss_gradient, gradient,
            ),
        }  # fmt: skip

    def depthwise(name: str, backend: str) -> dict[str, Family]:
        return {
            f"{name}depthwise-{direction}": Family(
                "fused_conv2d" if direction == "forward" else f"{single}_backward",
                backend,
                functools.partial(depthwise_arguments, direction),
                in_fp32,
                library,
                depthwise_work,
            )
            for direction in convolutions.DIRECTIONS
        }

    return {
        "sm90-projection": Family(
            single, "cuda/sm90", projection_arguments, in_fp32, library, projection_work
        ),
        **aspp("sm90", "cuda/sm90", ("bf16",)),
        **upsampling("", "cuda"),
        **depthwise("", "cuda"),
        **aspp("sm80", "cuda/sm80", ("bf16", "tf32")),
        **upsampling("triton-", "triton"),
        **aspp("triton", "triton", ("bf16", "tf32")),
        **depthwise("triton-", "triton"),
    }


FAMILIES = _families()
