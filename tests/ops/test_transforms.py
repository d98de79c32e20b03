"""torch.func transforms and forward mode of every op against plain PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import (
    functional_call,
    functionalize,
    grad,
    grad_and_value,
    hessian,
    jacfwd,
    jacrev,
    jvp,
    vjp,
    vmap,
)
from torch.testing import assert_close
from torch.utils._pytree import tree_leaves, tree_map

import deeplab_fast
from deeplab_fast import (
    ASPP,
    DeepLabV3,
    aspp,
    dilated_conv2d,
    parallel_dilated_conv2d,
    upsample_argmax,
    upsample_cross_entropy,
)
from deeplab_fast.ops import _transforms
from deeplab_fast.ops.dilated_conv2d_and_mean import parallel_dilated_conv2d_and_mean
from deeplab_fast.ops.fused_conv2d import fused_conv2d, fused_conv2d_add_

from ..support.cases import assert_as_accurate_as

pytestmark = pytest.mark.usefixtures("one_thread")  # for such small convolutions threads only wait


class Op(NamedTuple):
    """A function of tensors alone, the same in plain PyTorch, and shapes of its arguments."""

    name: str
    ours: Callable[..., Any]
    theirs: Callable[..., Any]
    shapes: tuple[tuple[int, ...], ...]  # of the input, [N, C, H, W], and of what is shared by all


def same_conv2d(input, weight, bias=None, dilation=1, groups=1):
    return F.conv2d(input, weight, bias, padding="same", dilation=dilation, groups=groups)


def their_branches(input, w1, w3, b1=None, b3=None):
    return torch.cat([same_conv2d(input, w1, b1), same_conv2d(input, w3, b3, 2)], dim=1)


def our_aspp(input, w1, w3, b1, b3, *others):
    return aspp(input, [w1, w3], [b1, b3], [1, 2], *others)


def their_aspp(input, w1, w3, b1, b3, pool_weight, pool_bias, project_weight, project_bias):
    pooled = F.conv2d(input.mean((2, 3), keepdim=True), pool_weight, pool_bias)
    pooled = pooled.expand(-1, -1, *input.shape[2:])
    joined = torch.cat([their_branches(input, w1, w3, b1, b3), pooled], dim=1).relu()
    return F.conv2d(joined, project_weight, project_bias).relu()


BRANCHES = ((2, 3, 3, 4), (2, 3, 1, 1), (3, 3, 3, 3))
OPS = {
    op.name: op
    for op in (
        Op(
            "dilated_conv2d",
            lambda *tensors: dilated_conv2d(*tensors, (2, 1), 2),
            lambda *tensors: same_conv2d(*tensors, (2, 1), 2),
            ((2, 4, 3, 4), (6, 2, 3, 3), (6,)),
        ),
        Op(
            "parallel_dilated_conv2d",
            lambda x, w1, w3, b1, b3: parallel_dilated_conv2d(x, [w1, w3], [b1, b3], [1, 2]),
            their_branches,
            (*BRANCHES, (2,), (3,)),
        ),
        Op(
            "parallel_dilated_conv2d_and_mean",
            lambda x, *weights: parallel_dilated_conv2d_and_mean(x, weights, [1, 2]),
            lambda x, *weights: (their_branches(x, *weights), F.adaptive_avg_pool2d(x, 1)),
            BRANCHES,
        ),
        Op(
            "aspp",
            our_aspp,
            their_aspp,
            (*BRANCHES, (2,), (3,), (2, 3, 1, 1), (2,), (4, 7, 1, 1), (4,)),
        ),
    )
}


def arguments_of(op: Op, batch: int | None = None) -> tuple[Tensor, ...]:
    """Random arguments in float64, stacked ``batch`` times if that is given."""
    shapes = op.shapes if batch is None else [(batch, *shape) for shape in op.shapes]
    return tuple(torch.randn(shape, dtype=torch.float64) for shape in shapes)


def total(function: Callable[..., Any]) -> Callable[..., Tensor]:
    """A scalar whose gradients depend on all arguments."""
    return lambda *args: sum(output.square().sum() for output in tree_leaves(function(*args)))


def of_channels(function: Callable[..., Any]) -> Callable[..., Any]:
    """A few numbers instead of maps, so that a Jacobian has few rows."""

    def reduced(*args: Tensor) -> Any:
        return tree_map(lambda output: output.square().sum((0, 2, 3)), function(*args))

    return reduced


def all_of(args: tuple[Any, ...]) -> tuple[int, ...]:
    return tuple(range(len(args)))


def images(args: tuple[Tensor, ...]) -> tuple[Any, ...]:
    """in_dims and arguments: each image is a batch of its own, the other arguments are shared."""
    return (0, *[None] * (len(args) - 1)), (args[0][:, None], *args[1:])


def vmap_images(function, args):
    in_dims, args = images(args)
    return vmap(function, in_dims)(*args)


def per_sample_gradients(function, args):
    in_dims, args = images(args)
    return vmap(grad(total(function), all_of(args)), in_dims)(*args)


def per_sample_gradients_of_the_last(function, args):
    in_dims, args = images(args)
    return vmap(grad(total(function), len(args) - 1), in_dims)(*args)


def vmap_everything(function, args):
    """vmap over all arguments, each along another dimension."""
    dims = [i % (arg.dim() + 1) for i, arg in enumerate(args)]
    stacks = (torch.stack([arg, 2 * arg, arg - 1], dim) for arg, dim in zip(args, dims))
    return vmap(function, tuple(dims))(*stacks)


def vmap_each(function, args):
    """vmap over one argument at a time."""
    return [
        vmap(function, tuple(0 if i == j else None for j in all_of(args)))(
            *(torch.stack([arg, 2 * arg]) if i == j else arg for j, arg in enumerate(args))
        )
        for i in all_of(args)
    ]


def vmap_twice(function, args):
    outer, inner = (0, *[None] * (len(args) - 1)), (1, *[None] * (len(args) - 1))
    stack = torch.stack([torch.stack([args[0], 2 * args[0], args[0] - 1], dim=1)] * 2)
    return vmap(vmap(function, inner), outer)(stack, *args[1:])


def jvp_all(function, args):
    return jvp(function, args, tuple(arg.cos() for arg in args))


def jvp_each(function, args):
    """jvp with a tangent of one argument at a time."""

    def only(i: int) -> Callable[[Tensor], Any]:
        return lambda arg: function(*args[:i], arg, *args[i + 1 :])

    return [jvp(only(i), args[i : i + 1], (args[i].cos(),)) for i in all_of(args)]


def dual_numbers(function, args, tangents=None):
    tangents = tangents or [arg.cos() for arg in args]
    with forward_ad.dual_level():
        outputs = function(*map(forward_ad.make_dual, args, tangents))
        return [tuple(forward_ad.unpack_dual(output)) for output in tree_leaves(outputs)]


def vjp_of_all(function, args):
    outputs, pull_back = vjp(function, *args)
    return pull_back(tree_map(torch.cos, outputs))


TRANSFORMS: dict[str, Callable[[Callable[..., Any], tuple[Tensor, ...]], Any]] = {
    "grad": lambda f, args: grad(total(f), all_of(args))(*args),
    "grad_of_the_last": lambda f, args: grad(total(f), len(args) - 1)(*args),
    "grad_and_value": lambda f, args: grad_and_value(total(f), all_of(args))(*args),
    "vjp": vjp_of_all,
    "jvp": jvp_all,
    "jvp_each": jvp_each,
    "dual_numbers": dual_numbers,
    "jacrev": lambda f, args: jacrev(of_channels(f), all_of(args))(*args),
    "jacfwd": lambda f, args: jacfwd(of_channels(f), (0, len(args) - 1))(*args),
    "vmap_images": vmap_images,
    "vmap_everything": vmap_everything,
    "vmap_each": vmap_each,
    "vmap_twice": vmap_twice,
    "per_sample_gradients": per_sample_gradients,
    "per_sample_gradients_of_the_last": per_sample_gradients_of_the_last,
    "vmap_of_jvp": lambda f, args: vmap_everything(lambda *args: jvp_all(f, args), args),
    "reverse_over_forward": lambda f, args: jacrev(jacfwd(total(f), 1), 1)(*args),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS.keys())
@pytest.mark.parametrize("op", OPS.values(), ids=OPS.keys())
def test_convolutions_transform_like_pytorchs(op: Op, transform, dtype, ran):
    """float64 runs on the reference, which supports it for every op."""
    args = arguments_of(op)
    inputs = tuple(arg.to(dtype) for arg in args)
    backend = "reference" if dtype == torch.float64 else "cpu"
    with deeplab_fast.backend(backend):
        actual = transform(op.ours, inputs)
    assert ran[0] == (op.name, backend) and {name for _, name in ran} == {backend}
    leaves = tree_leaves(actual), tree_leaves(transform(op.theirs, inputs))
    for a, p, e in zip(*leaves, tree_leaves(transform(op.theirs, args)), strict=True):
        assert_as_accurate_as(a, p, e)


class Loss(NamedTuple):
    """A cross entropy of logits, target and class weights."""

    reduction: str
    label_smoothing: float
    align_corners: bool

    def ours(self, logits: Tensor, target: Tensor, weight: Tensor | None) -> Tensor:
        return upsample_cross_entropy(logits, target, weight, 255, *self)

    def theirs(self, logits: Tensor, target: Tensor, weight: Tensor | None) -> Tensor:
        upsampled = F.interpolate(
            logits, target.shape[-2:], mode="bilinear", align_corners=self.align_corners
        )
        return F.cross_entropy(
            upsampled,
            target,
            None if weight is None else weight.to(logits.dtype),
            ignore_index=255,
            reduction=self.reduction,
            label_smoothing=self.label_smoothing,
        )


LOSSES = [Loss("mean", 0.1, False), Loss("sum", 0.0, True), Loss("none", 0.3, False)]


def entropy_arguments() -> tuple[Tensor, Tensor, Tensor]:
    logits = torch.randn(2, 3, 3, 2)
    target = torch.randint(3, (2, 5, 7))
    target[torch.rand(target.shape) < 0.2] = 255
    return logits, target, torch.rand(3) + 0.1


def of_logits(function, target, weight):
    return lambda logits: function(logits, target, weight).sum()


def loop(function: Callable[..., Tensor], in_dims: tuple[int | None, ...]):
    """vmap as a loop, because PyTorch's own does not support every cross entropy."""

    def looped(*args: Any) -> Tensor:
        dims = [(arg, dim) for arg, dim in zip(args, in_dims) if dim is not None]
        return torch.stack([
            function(*(a if d is None else a.select(d, i) for a, d in zip(args, in_dims)))
            for i in range(dims[0][0].size(dims[0][1]))
        ])  # fmt: skip

    return looped


def vmap_of(function):
    return loop if getattr(function, "__name__", "") == "theirs" else vmap


def vmap_samples(function, logits, target, weight):
    mapped = vmap_of(function)(function, (0, 0, None))
    return mapped(logits[:, None], target[:, None], weight)


def vmap_parts(function, logits, target, weight):
    """vmap over each argument, along the first and other dimensions."""
    mapped = vmap_of(function)
    weights = torch.stack([weight, 2 * weight**2], 1)
    stack, targets = torch.stack([logits, 2 * logits], 3), torch.stack([target, target.flip(0)], 1)
    return (
        mapped(function, (None, None, 1))(logits, target, weights),
        mapped(function, (3, 1, None))(stack, targets, weight),
        mapped(function, (None, 1, None))(logits, targets, None),
    )


def sample_gradients(function, logits, target, weight):
    def gradient(logits, target, weight):
        return grad(of_logits(function, target, weight))(logits)

    mapped = vmap_of(function)(gradient, (0, 0, None))
    return mapped(logits[:, None], target[:, None], weight)


ENTROPY_TRANSFORMS: dict[str, Callable[..., Any]] = {
    "grad": lambda f, x, t, w: grad(of_logits(f, t, w))(x),
    "grad_and_value": lambda f, x, t, w: grad_and_value(of_logits(f, t, w))(x),
    "vjp": lambda f, x, t, w: vjp(lambda x: f(x, t, w), x)[1](f(x, t, w).cos())[0],
    "jacrev": lambda f, x, t, w: jacrev(lambda x: f(x, t, w))(x),
    "vmap": vmap_samples,
    "vmap_parts": vmap_parts,
    "sample_gradients": sample_gradients,
}


def steepest(logits: Tensor, target: Tensor) -> Tensor:
    """A tangent along which no part of the derivative cancels another."""
    leaf = logits.detach().requires_grad_()
    (gradient,) = torch.autograd.grad(LOSSES[0].theirs(leaf, target, None), leaf)
    return gradient / gradient.abs().max()


ENTROPY_FORWARD: dict[str, Callable[..., Any]] = {
    "jvp": lambda f, x, t, w: jvp(lambda x: f(x, t, w), (x,), (steepest(x, t),)),
    "jacfwd": lambda f, x, t, w: jacfwd(lambda x: f(x, t, w))(x),
    "dual_numbers": lambda f, x, t, w: dual_numbers(lambda x: f(x, t, w), (x,), (steepest(x, t),)),
}


@pytest.mark.parametrize("kernels", ["cpu", "reference"])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(
    ("loss", "name"),
    [
        *((loss, name) for loss in LOSSES for name in ENTROPY_TRANSFORMS),
        *((loss, name) for loss in LOSSES[:2] for name in ENTROPY_FORWARD),
    ],
)
def test_cross_entropy_transforms_like_pytorchs(loss: Loss, name, weighted, kernels, ran):
    logits, target, weight = entropy_arguments()
    if not weighted and name != "vmap_parts":
        weight = None
    transform = (ENTROPY_TRANSFORMS | ENTROPY_FORWARD)[name]
    with deeplab_fast.backend(kernels):
        actual = transform(loss.ours, logits, target, weight)
    assert ran and {backend for _, backend in ran} == {kernels}
    peers = tree_leaves(transform(loss.theirs, logits, target, weight))
    exact = tree_leaves(transform(loss.theirs, logits.double(), target, weight))
    for a, p, e in zip(tree_leaves(actual), peers, exact, strict=True):
        assert_as_accurate_as(a, p, e)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_cross_entropy_tangents_of_other_dtypes(dtype):
    """The loss and its tangent are fp32, and neither the gradient nor the tangent is rounded."""
    logits, target, weight = entropy_arguments()
    logits = logits.to(dtype)
    ours, theirs = (lambda x, f=f: f(x, target, weight) for f in (LOSSES[0].ours, LOSSES[0].theirs))
    actual = jvp(ours, (logits,), (logits.cos(),))
    exact = jvp(theirs, (logits.double(),), (logits.cos().double(),))
    tolerance = 1e-5 if dtype == torch.float64 else 1e-2  # the gradient is in bfloat16
    for a, e in zip(actual, exact):
        assert a.dtype == torch.float32
        assert_close(a.double(), e, rtol=tolerance, atol=tolerance)


def test_no_forward_mode_of_a_loss_for_each_pixel():
    logits, target, _ = entropy_arguments()
    ours = partial(upsample_cross_entropy, target=target, ignore_index=255, reduction="none")
    message = 'reduction="none" has no forward-mode derivative: use "mean" or "sum"'
    with pytest.raises(NotImplementedError, match=message):
        jvp(ours, (logits,), (logits,))
    with pytest.raises(NotImplementedError, match=message):
        dual_numbers(ours, (logits,))


def test_class_weights_have_no_derivative():
    logits, target, weight = entropy_arguments()

    def ours(weight):
        return upsample_cross_entropy(logits, target, weight, 255)

    with pytest.raises(ValueError, match="weight: expected requires_grad=False"):
        grad(ours)(weight)
    with pytest.raises(ValueError, match="weight: expected no tangent"):
        jvp(ours, (weight,), (weight,))
    with pytest.raises(ValueError, match="weight: expected no tangent"):
        dual_numbers(ours, (weight,))


@pytest.mark.parametrize("kernels", ["cpu", "reference"])
def test_argmax_maps_and_has_no_derivative(kernels, ran):
    logits = torch.randn(2, 3, 4, 2, 5)
    ours = partial(upsample_argmax, scale_factor=(2.5, 1.5), dtype=torch.uint8)

    def counted(logits):  # labels do not move: only the product has a derivative
        return (ours(logits).float().mean() * logits.square().sum()).sum()

    with deeplab_fast.backend(kernels):
        flat = ours(logits.movedim(2, 1).flatten(0, 1))
        ran.clear()
        labels = vmap(ours, in_dims=2, out_dims=1)(logits)
        assert ran == [("upsample_argmax", kernels)]
        factor = ours(logits[0]).float().mean()
        expected = 2 * factor * logits[0]
        assert_close(grad(counted)(logits[0]), expected)
        _, tangent = jvp(counted, (logits[0],), (torch.ones_like(logits[0]),))
        assert_close(tangent, expected.sum())
        ((primal, none),) = dual_numbers(ours, (logits[0],))
    assert labels.dtype == primal.dtype == torch.uint8
    assert torch.equal(labels, flat.unflatten(0, (2, 4))) and torch.equal(primal, ours(logits[0]))
    assert none is None


def target_of(logits: Tensor) -> Tensor:
    return torch.arange(len(logits) * 20).view(-1, 5, 4) % 3


EMULATED: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor], tuple[Any, ...]]] = {
    "depthwise": (
        lambda x, w: dilated_conv2d(x, w, dilation=2, groups=8),
        lambda x, w: same_conv2d(x, w, None, 2, 8),
        ((2, 8, 3, 4), (8, 1, 3, 3)),
    ),
    "cross entropy": (
        lambda x: upsample_cross_entropy(x, target_of(x)),
        lambda x: F.cross_entropy(F.interpolate(x, (5, 4), mode="bilinear"), target_of(x)),
        ((2, 3, 2, 2),),
    ),
}


@pytest.mark.parametrize("name", EMULATED)
def test_cuda_kernels_transform(name, ran):
    ours, theirs, shapes = EMULATED[name]
    args = tuple(map(torch.randn, shapes))
    doubles = tuple(arg.double() for arg in args)

    def jvp_along_the_gradient(function, args):
        tangents = grad(total(theirs), all_of(args))(*doubles)
        return jvp(function, args, tuple(t.to(args[0].dtype) for t in tangents))

    for transform in (per_sample_gradients, jvp_along_the_gradient):
        with deeplab_fast.backend("emulated"):
            actual = tree_leaves(transform(ours, args))
        peers, exact = tree_leaves(transform(theirs, args)), transform(theirs, doubles)
        for a, p, e in zip(actual, peers, tree_leaves(exact), strict=True):
            assert_as_accurate_as(a, p, e)
    assert {backend for _, backend in ran} == {"emulated"}


# How many calls of the op a transform takes.


@pytest.mark.parametrize("op", OPS.values(), ids=OPS.keys())
def test_vmap_over_images_is_one_call(op: Op, ran):
    args = arguments_of(op)
    for transform in (vmap_images, vmap_twice):
        ran.clear()
        transform(op.ours, args)
        assert [name for name, _ in ran] == [op.name]


@pytest.mark.parametrize("op", list(OPS.values())[:3], ids=list(OPS)[:3])
def test_per_sample_gradients_of_the_input_take_two_calls(op: Op, ran):
    in_dims, args = images(arguments_of(op))
    vmap(grad(total(op.ours)), in_dims)(*args)
    backward = op.name.removesuffix("_and_mean") + "_backward"
    assert [name for name, _ in ran] == [op.name, backward]


def test_vmap_over_weights_is_a_call_for_each_sample(ran):
    input, weight, bias = arguments_of(OPS["dilated_conv2d"])
    vmap(OPS["dilated_conv2d"].ours, (None, None, 0))(input, weight, torch.stack([bias] * 3))
    assert [name for name, _ in ran] == ["dilated_conv2d"] * 3


def test_tangents_of_one_argument_take_one_more_call(ran):
    input, weight, bias = arguments_of(OPS["dilated_conv2d"])
    jvp(lambda x: dilated_conv2d(x, weight, bias, 2, 2), (input,), (input,))
    assert len(ran) == 2
    jvp(lambda b: dilated_conv2d(input, weight, b, 2, 2), (bias,), (bias,))
    assert len(ran) == 3


def test_only_needed_gradients_are_computed(monkeypatch):
    """The backward op receives the mask of needed gradients, as without a transform."""
    input, weight, bias = arguments_of(OPS["dilated_conv2d"])
    masks = []
    table = deeplab_fast.backends.registry._kernels["dilated_conv2d_backward"]
    right = table["cpu"]
    spy = right._replace(run=lambda args: masks.append(args.output_mask) or right.run(args))
    monkeypatch.setitem(table, "cpu", spy)
    ours = total(OPS["dilated_conv2d"].ours)
    grad(ours)(input, weight, bias)
    grad(ours, 1)(input, weight, bias)
    grad(ours, (0, 2))(input, weight, bias)
    assert masks == [[True, False, False], [False, True, False], [True, False, True]]


def test_calls_outside_of_transforms_are_those_of_the_op(monkeypatch):
    monkeypatch.setattr(_transforms, "call", lambda *args: pytest.fail("a transform is active"))
    x = torch.randn(1, 2, 3, 3, requires_grad=True)
    dilated_conv2d(x, torch.randn(2, 2, 3, 3)).sum().backward()
    with torch.no_grad(), torch.inference_mode():
        upsample_argmax(x, 5)


def test_backward_runs_where_forward_did(ran):
    input, weight, bias = arguments_of(OPS["dilated_conv2d"])
    with deeplab_fast.backend("reference"):
        output, pull_back = vjp(OPS["dilated_conv2d"].ours, input, weight, bias)
    pull_back(output)
    pull_back(output)
    assert {backend for _, backend in ran} == {"reference"} and len(ran) == 3


def test_jvp_runs_where_forward_did(ran):
    with deeplab_fast.backend("reference"):
        for op in OPS.values():
            jvp_all(op.ours, arguments_of(op))
        logits, target, _ = entropy_arguments()
        jvp(lambda x: upsample_cross_entropy(x, target, None, 255), (logits,), (logits,))
    assert {backend for _, backend in ran} == {"reference"}


# Second derivatives.

SECOND: dict[str, Callable[[Callable[[Tensor], Tensor], Tensor], Any]] = {
    "hessian": lambda f, x: hessian(f)(x),
    "jacfwd(jacrev)": lambda f, x: jacfwd(jacrev(f))(x),
    "jacrev(jacrev)": lambda f, x: jacrev(jacrev(f))(x),
    "grad(grad)": lambda f, x: grad(lambda x: grad(f)(x).square().sum())(x),
    "jvp(grad)": lambda f, x: jvp(grad(f), (x,), (x,)),
    "vmap(hessian)": lambda f, x: vmap(hessian(f))(x[None]),
    "functional.jvp": lambda f, x: torch.autograd.functional.jvp(f, (x,), (x,)),
    "functional.hvp": lambda f, x: torch.autograd.functional.hvp(f, (x,), (x,)),
    "gradient of a dual number": lambda f, x: torch.autograd.grad(
        dual_numbers(grad(f), (x.requires_grad_(),))[0][1].sum(), x
    ),
}


@pytest.mark.parametrize("second", SECOND.values(), ids=SECOND.keys())
@pytest.mark.parametrize("argument", [0, 1])
@pytest.mark.parametrize("op", OPS.values(), ids=OPS.keys())
def test_no_second_derivative_through_a_backward_op(op: Op, argument, second):
    args = arguments_of(op)

    def ours(x: Tensor) -> Tensor:
        return total(op.ours)(*args[:argument], x, *args[argument + 1 :])

    with pytest.raises(NotImplementedError, match="there is no double backward; F.conv2d has one"):
        second(ours, args[argument])


SECOND_OF_ENTROPY = {
    **SECOND,
    "jacrev(jacfwd)": lambda f, x: jacrev(jacfwd(f))(x),
    "jacfwd(jacfwd)": lambda f, x: jacfwd(jacfwd(f))(x),
}


@pytest.mark.parametrize("second", SECOND_OF_ENTROPY.values(), ids=SECOND_OF_ENTROPY.keys())
def test_no_second_derivative_of_cross_entropy(second):
    logits, target, _ = entropy_arguments()
    with pytest.raises(NotImplementedError, match="use F.interpolate and F.cross_entropy"):
        second(lambda x: upsample_cross_entropy(x, target, None, 255), logits)


@pytest.mark.parametrize("op", list(OPS.values())[:3], ids=list(OPS)[:3])
def test_gradcheck_of_both_modes(op: Op):
    args = [arg.requires_grad_() for arg in arguments_of(op)]
    batched = op.name == "dilated_conv2d"  # torch's older vmap, which takes no lists of tensors
    assert torch.autograd.gradcheck(
        op.ours,
        args,
        fast_mode=True,
        check_forward_ad=True,
        check_batched_grad=batched,
        check_batched_forward_grad=batched,
    )


def test_jacobian_of_torch_autograd_functional():
    op = OPS["dilated_conv2d"]
    args = arguments_of(op)
    expected = jacrev(of_channels(op.theirs), all_of(args))(*args)
    for options in ({}, {"vectorize": True}, {"vectorize": True, "strategy": "forward-mode"}):
        actual = torch.autograd.functional.jacobian(of_channels(op.ours), args, **options)
        assert_close(actual, expected)


# Models.


def test_functional_gradients_of_aspp():
    """Gradients, also per-sample ones, of all parameters equal those of torchvision's module."""
    deeplabv3 = pytest.importorskip("torchvision.models.segmentation.deeplabv3")
    modules = ASPP(4, (2, 3), 3).double().eval(), deeplabv3.ASPP(4, [2, 3], 3).double().eval()
    modules[1].load_state_dict(modules[0].state_dict())
    input = torch.randn(2, 4, 5, 6, dtype=torch.float64)

    def loss(module: nn.Module, parameters: dict[str, Tensor], input: Tensor) -> Tensor:
        return functional_call(module, parameters, (input,)).square().sum()

    results = []
    for module in modules:
        parameters = dict(module.named_parameters())
        whole = grad(partial(loss, module))(parameters, input)
        each = vmap(grad(partial(loss, module)), (None, 0))(parameters, input[:, None])
        tangents = {name: parameter.cos() for name, parameter in parameters.items()}
        forward = jvp(lambda p, m=module: loss(m, p, input), (parameters,), (tangents,))
        results.append((whole, each, forward))
    assert_close(results[0], results[1])


def test_functional_gradients_of_a_model_and_its_loss(ran):
    """Gradients equal those of backward(), and per-sample gradients those of a loop."""
    model = DeepLabV3("mobilenet_v2", 3, 16, atrous_rates=()).eval()
    images, target = torch.randn(2, 3, 17, 17), torch.randint(3, (2, 17, 17))

    def loss(parameters: dict[str, Tensor], images: Tensor, target: Tensor) -> Tensor:
        class Logits(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.model = model

            def forward(self, images: Tensor) -> Tensor:
                return self.model.logits(images)["out"]

        parameters = {f"model.{name}": p for name, p in parameters.items()}
        return upsample_cross_entropy(functional_call(Logits(), parameters, (images,)), target)

    parameters = {name: p.detach() for name, p in model.named_parameters()}
    actual = grad(loss)(parameters, images, target)
    each = vmap(grad(loss), (None, 0, 0))(parameters, images[:, None], target[:, None])
    forward, names = ran[0][0], {name for name, _ in ran}
    assert forward == "parallel_dilated_conv2d_and_mean" and "upsample_cross_entropy" in names

    def by_backward(images: Tensor, target: Tensor) -> dict[str, Tensor]:
        model.zero_grad()
        upsample_cross_entropy(model.logits(images)["out"], target).backward()
        return {name: p.grad.clone() for name, p in model.named_parameters()}

    def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
        for name, e in expected.items():
            assert_close(actual[name], e, rtol=1e-4, atol=1e-5 * e.abs().max().item() + 1e-8)

    assert_same(actual, by_backward(images, target))
    for i in range(2):
        expected = by_backward(images[i : i + 1], target[i : i + 1])
        assert_same({name: g[i] for name, g in each.items()}, expected)


# With torch.compile, autocast and other modes.


def convolution_loss(weight: Tensor) -> Tensor:
    x = torch.linspace(-1, 1, 60).view(1, 3, 4, 5)
    return dilated_conv2d(x, weight, dilation=2).square().sum()


COMPILED: dict[str, Callable[[Tensor], Any]] = {
    "grad": lambda w: grad(convolution_loss)(w[0]),
    "jvp": lambda w: jvp(convolution_loss, (w[0],), (w[1],)),
    "vmap": vmap(convolution_loss),
    "per sample": vmap(grad(convolution_loss)),
}


@pytest.mark.parametrize("function", COMPILED.values(), ids=COMPILED.keys())
def test_a_transform_inside_a_compiled_function(function):
    """The transform runs uncompiled, or raises with fullgraph=True."""
    weights = torch.randn(2, 2, 3, 3, 3)
    torch._dynamo.reset()
    compiled = torch.compile(function, backend="aot_eager")
    assert_close(compiled(weights), function(weights))
    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    message = "dilated_conv2d: torch.compile does not trace torch.func transforms"
    with pytest.raises(Exception, match=message):
        compiled(weights)


@pytest.mark.parametrize("function", [grad, vmap], ids=["grad", "vmap"])
def test_a_transform_of_a_compiled_function(function):
    torch._dynamo.reset()
    compiled = torch.compile(convolution_loss, backend="aot_eager")
    weights = torch.randn(2, 2, 3, 3, 3)
    argument = weights if function is vmap else weights[0]
    assert_close(function(compiled)(argument), function(convolution_loss)(argument))


def test_recompiled_for_forward_mode():
    """A graph compiled for ordinary tensors would lose the tangent."""
    torch._dynamo.reset()
    compiled = torch.compile(convolution_loss, backend="eager")
    weight = torch.randn(2, 3, 3, 3)
    assert_close(compiled(weight), convolution_loss(weight))
    assert_close(dual_numbers(compiled, (weight,)), dual_numbers(convolution_loss, (weight,)))


def test_export_inside_a_transform_is_an_error():
    class Gradient(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return grad(convolution_loss)(weight)

    with pytest.raises(Exception, match="torch.compile does not trace torch.func transforms"):
        torch.export.export(Gradient(), (torch.randn(2, 3, 3, 3),), strict=False)


def test_functionalize():
    weight = torch.randn(2, 3, 3, 3)
    assert_close(functionalize(convolution_loss)(weight), convolution_loss(weight))
    with pytest.raises(RuntimeError, match="Functionalize"):  # rather than tangents of zero
        dual_numbers(functionalize(convolution_loss), (weight,))


def test_autocast_inside_a_transform():
    x, weight = torch.randn(1, 3, 5, 4), torch.randn(2, 3, 3, 3)

    def loss(function, weight):
        with torch.autocast("cpu", torch.bfloat16):
            output = function(x, weight)
        assert output.dtype == torch.bfloat16
        return output.float().square().sum()

    for transform in (
        lambda f: grad(f)(weight),
        lambda f: jvp(f, (weight,), (weight.cos(),)),
        lambda f: vmap(grad(f))(weight[None]),
    ):
        actual = transform(partial(loss, dilated_conv2d))
        expected = transform(partial(loss, same_conv2d))
        assert [t.dtype for t in tree_leaves(actual)] == [t.dtype for t in tree_leaves(expected)]
        assert_close(actual, expected, rtol=3e-2, atol=3e-1)


@pytest.mark.parametrize("op", OPS.values(), ids=OPS.keys())
def test_vmap_over_no_samples(op: Op):
    args = arguments_of(op)
    empty = tree_leaves(vmap(op.ours, (0, *[None] * (len(args) - 1)))(args[0][None][:0], *args[1:]))
    expected = tree_leaves(op.theirs(*args))
    assert [t.shape for t in empty] == [(0, *t.shape) for t in expected]
    with pytest.raises(NotImplementedError, match=f"{op.name}: vmap over a dimension of size 0"):
        vmap(op.ours)(*arguments_of(op, batch=0))


def test_vmap_over_batches_of_no_images():
    logits = torch.zeros(3, 0, 4, 5, 5)
    assert vmap(partial(upsample_argmax, size=9))(logits).shape == (3, 0, 9, 9)


def test_vmap_keeps_the_memory_format():
    x = torch.randn(2, 3, 4, 5, 6).flatten(0, 1).contiguous(memory_format=torch.channels_last)
    output = vmap(dilated_conv2d, (0, None))(x.unflatten(0, (2, 3)), torch.randn(8, 4, 3, 3))
    assert output.flatten(0, 1).is_contiguous(memory_format=torch.channels_last)


# The layer of networks prepared for inference.

GEOMETRY = (1, 1), (1, 1), (1, 1), 1


@pytest.mark.parametrize("activation", ["none", "relu", "relu6"])
def test_prepared_layers_map_over_images(activation):
    x, weight, bias = 3 * torch.randn(3, 2, 4, 5, 6), torch.randn(4, 4, 3, 3), torch.randn(4)

    def layers(x: Tensor) -> Tensor:
        y = fused_conv2d(x, weight, bias, *GEOMETRY, activation)
        return fused_conv2d_add_(y, x, weight, bias, *GEOMETRY, activation)

    assert_close(vmap(layers)(x), torch.stack([layers(images) for images in x]))


def test_prepared_layers_have_no_derivative():
    x, weight, bias = torch.randn(1, 4, 5, 6), torch.randn(4, 4, 3, 3), torch.randn(4)

    def layer(x: Tensor) -> Tensor:
        return fused_conv2d(x, weight, bias, *GEOMETRY, "relu").sum()

    def residual(x: Tensor) -> Tensor:
        y = torch.ones_like(x)
        return fused_conv2d_add_(y, x, weight, bias, *GEOMETRY, "relu").sum()

    for function in (layer, residual):
        for transform in (lambda f: grad(f)(x), lambda f: jvp(f, (x,), (x,))):
            with pytest.raises(NotImplementedError, match="it is for inference"):
                transform(function)
