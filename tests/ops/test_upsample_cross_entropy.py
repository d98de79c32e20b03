"""upsample_cross_entropy against F.interpolate and F.cross_entropy in fp32 and in float64."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import deeplab_fast
from deeplab_fast import _C, upsample_cross_entropy

from ..support.backends import device_of, is_interpreted, needs_triton, triton_examples
from ..support.cases import DTYPES, LAYOUTS, assert_as_accurate_as, upsampled, with_layout
from ..support.emulator import machine

OP = "upsample_cross_entropy"
REDUCTIONS = ("mean", "sum", "none")


def interpolate_and_cross_entropy(
    logits: Tensor, target: Tensor, weight: Tensor | None = None, align_corners=False, **options
) -> Tensor:
    """The loss of PyTorch, in fp32, or in float64 for float64 logits."""
    logits = logits if logits.dtype == torch.float64 else logits.float()
    weight = None if weight is None else weight.to(logits.dtype)
    pixels = upsampled(logits, target.shape[1:], align_corners=align_corners)
    return F.cross_entropy(pixels, target, weight, **options)


def loss_and_gradient(function, logits: Tensor, grad_loss: Tensor | None = None):
    leaf = logits.detach().requires_grad_()
    loss = function(leaf)
    grad_loss = torch.ones_like(loss) if grad_loss is None else grad_loss.to(loss.dtype)
    (grad,) = torch.autograd.grad(loss, leaf, grad_loss.expand(loss.shape))
    return loss.detach(), grad


def problem(
    shape: tuple[int, ...], size: tuple[int, int], device: str, dtype=torch.float32, ignored=255
) -> tuple[Tensor, Tensor, Tensor]:
    """Logits, a target with some ignored pixels, and class weights."""
    logits = 3 * torch.randn(shape)
    target = torch.randint(shape[1], (shape[0], *size))
    target[torch.rand(target.shape) < 0.2] = ignored
    return logits.to(device, dtype), target.to(device), torch.rand(shape[1]).to(device) + 0.1


def assert_like_pytorch(
    logits: Tensor,
    target: Tensor,
    grad_loss: Tensor | None = None,
    floors: tuple[float, float] = (0.0, 0.0),
    **arguments,
) -> None:
    """``floors``: what loss and gradient may be off by although PyTorch happens to be exact."""
    ours = partial(upsample_cross_entropy, target=target, **arguments)
    theirs = partial(interpolate_and_cross_entropy, target=target, **arguments)
    actual = loss_and_gradient(ours, logits, grad_loss)
    nchw, nhwc = (
        loss_and_gradient(theirs, with_layout(logits, layout), grad_loss)
        for layout in ("contiguous", "channels_last")
    )
    exact = loss_and_gradient(theirs, logits.double(), grad_loss)
    for a, p, e, q, floor in zip(actual, nchw, exact, nhwc, floors):
        if a.shape == e.shape and a.numel() and (a - e).abs().max() <= floor:
            continue
        assert_as_accurate_as(a, p, e, q)


CASES = [  # logits, size
    ((0, 4, 5, 5), (9, 9)),
    ((1, 2, 1, 1), (1, 1)),
    ((1, 3, 1, 1), (23, 17)),
    ((2, 5, 3, 4), (24, 33)),
    ((1, 21, 9, 9), (65, 65)),
    ((2, 7, 17, 13), (17, 13)),
    ((1, 19, 17, 33), (13, 7)),
    ((1, 2, 40, 3), (7, 100)),
    ((1, 150, 5, 6), (37, 41)),
    ((1, 4, 2, 35), (5, 300)),  # three blocks of cells in a row
    ((1, 3, 2, 2), (40, 50)),  # several groups of rows in a cell
]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("shape", "size"), CASES, ids=str)
def test_shapes(backend, device, ran, shape, size, dtype, layout):
    logits, target, weight = problem(shape, size, device, dtype)
    arguments = dict(weight=weight, ignore_index=255, label_smoothing=0.1)
    with deeplab_fast.backend(backend):
        # test_options has the others
        reductions = ["none"] if is_interpreted(backend) else REDUCTIONS
        for reduction in reductions if shape[0] else ("sum", "none"):
            assert_like_pytorch(
                with_layout(logits, layout), target, reduction=reduction, **arguments
            )
    assert set(ran) == {(OP, backend), (OP + "_backward", backend)}


@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("ignore_index", [-100, 255, 2])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_options(
    backend, device, reduction, ignore_index, weighted, label_smoothing, align_corners
):
    logits, target, weight = problem((2, 6, 7, 9), (29, 37), device, ignored=ignore_index)
    with deeplab_fast.backend(backend):
        assert_like_pytorch(
            logits,
            target,
            torch.rand(target.shape, device=device) if reduction == "none" else None,
            weight=weight if weighted else None,
            ignore_index=ignore_index,
            reduction=reduction,
            label_smoothing=label_smoothing,
            align_corners=align_corners,
        )


FIXTURES = [HealthCheck.function_scoped_fixture]
SIDES = st.sampled_from([1, 2, 3, 5, 8, 13, 17, 31, 40])


CASES_OF_ANY_KIND = given(
    seed=st.integers(0, 2**31),
    shape=st.tuples(st.integers(1, 2), st.sampled_from([2, 3, 7, 19, 37]), SIDES, SIDES),
    size=st.tuples(SIDES, SIDES),
    scale=st.sampled_from([0.01, 1.0, 5.0, 30.0, 300.0]),
    dtype=st.sampled_from(DTYPES),
    layout=st.sampled_from(LAYOUTS),
    label_smoothing=st.sampled_from([0.0, 0.1]),
    align_corners=st.booleans(),
)


@settings(max_examples=100, deadline=None, suppress_health_check=FIXTURES)
@CASES_OF_ANY_KIND
def test_like_pytorch(backend, device, **case):
    if backend == "triton":
        pytest.skip("Triton: fewer examples in the next test")
    assert_any_kind(backend, device, **case)


@needs_triton()
@settings(max_examples=triton_examples(interpreted=20), deadline=None)
@CASES_OF_ANY_KIND
def test_triton_like_pytorch(**case):
    assert_any_kind("triton", device_of("triton"), **case)


def assert_any_kind(backend, device, seed, shape, size, scale, dtype, layout, **arguments):
    torch.manual_seed(seed)
    logits, target, weight = problem(shape, size, device, dtype)
    logits = with_layout(logits * scale, layout)
    # fp32 keeps so much of a pixel's logits and of the sum of exponentials, which is 1 or more; a
    # gradient adds up the pixels around it.
    floor = 2**-22 * (1 + logits.abs().max().item())
    pixels_per_logit = math.prod(max(out / n, 1) for out, n in zip(size, shape[2:]))
    with deeplab_fast.backend(backend):
        assert_like_pytorch(
            logits,
            target,
            floors=(floor, floor * pixels_per_logit),
            weight=weight,
            ignore_index=255,
            reduction="none",
            **arguments,
        )


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_one_channel_is_binary(backend, device, label_smoothing):
    logits, target, _ = problem((2, 1, 5, 7), (31, 20), device)
    target[target == 0] = torch.randint(2, target.shape, device=device)[target == 0]
    counted = target != 255
    ours = partial(
        upsample_cross_entropy, target=target, ignore_index=255, label_smoothing=label_smoothing
    )
    with deeplab_fast.backend(backend):
        actual = loss_and_gradient(ours, logits)

    def binary(logits):
        upsampled = F.interpolate(logits, (31, 20), mode="bilinear")[:, 0]
        probability = target * (1 - label_smoothing) + label_smoothing / 2
        return F.binary_cross_entropy_with_logits(
            upsampled[counted], probability[counted].to(logits.dtype)
        )

    expected = loss_and_gradient(binary, logits.double())
    torch.testing.assert_close(
        actual, tuple(tensor.float() for tensor in expected), rtol=1e-5, atol=1e-7
    )


INTEGERS = [torch.uint8, torch.int8, torch.int16, torch.int32]


@pytest.mark.parametrize("dtype", INTEGERS, ids=str)
def test_integer_targets(backend, device, dtype):
    logits, target, weight = problem((2, 3, 5, 4), (9, 8), device, ignored=100)
    options = {"weight": weight, "label_smoothing": 0.1, "ignore_index": 100}
    with deeplab_fast.backend(backend):
        expected, actual = (
            loss_and_gradient(partial(upsample_cross_entropy, target=t, **options), logits)
            for t in (target, target.to(dtype))
        )
    assert torch.equal(actual[0], expected[0])
    assert torch.equal(actual[1], expected[1])


def test_integer_targets_of_other_values():
    logits, target = torch.randn(1, 3, 4, 4), torch.zeros(1, 9, 9, dtype=torch.uint8)
    target[0, 0, 0] = 255
    with pytest.raises(IndexError, match="target: 255 is not a class"):
        upsample_cross_entropy(logits, target)  # ignore_index is -100
    everywhere = upsample_cross_entropy(logits, target, ignore_index=255, reduction="none")
    assert (everywhere > 0).sum() == 80
    signed = upsample_cross_entropy(logits, target.to(torch.int8), ignore_index=-1)
    assert torch.isfinite(signed)


def test_integer_targets_in_transforms_and_graphs():
    logits, target = torch.randn(2, 3, 4, 4), torch.randint(3, (2, 9, 9), dtype=torch.uint8)

    def loss(logits, target):
        return upsample_cross_entropy(logits, target)

    gradient = torch.func.grad(loss)
    expected = gradient(logits, target.long())
    assert torch.equal(gradient(logits, target), expected)
    each = torch.func.vmap(gradient)(logits[:, None], target[:, None])
    torch.testing.assert_close(each.flatten(0, 1) / 2, expected)
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True, dynamic=True)
    assert torch.equal(compiled(logits, target), loss(logits, target))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(loss(logits, target), loss(logits, target.long()))


@pytest.mark.parametrize("dynamic", [False, True])
def test_torch_func_in_a_compiled_function(dynamic):
    """The transform runs uncompiled, or raises with fullgraph=True."""
    logits, target = torch.randn(2, 3, 4, 5), torch.randint(3, (2, 9, 9))

    def gradient(logits):
        return torch.func.grad(lambda x: upsample_cross_entropy(x, target))(logits)

    torch._dynamo.reset()
    options = {"backend": "aot_eager", "dynamic": dynamic}
    compiled = torch.compile(gradient, **options)
    assert torch.equal(compiled(logits), gradient(logits))
    torch._dynamo.reset()
    with pytest.raises(Exception, match="does not trace torch.func transforms"):
        torch.compile(gradient, fullgraph=True, **options)(logits)


def test_a_compiled_graph_of_any_size_runs_the_op():
    """The fake, not the decomposition, gives the shapes of symbolic sizes."""
    torch._dynamo.reset()
    compiled = torch.compile(
        upsample_cross_entropy, backend="aot_eager", fullgraph=True, dynamic=True
    )
    for size in ((4, 5), (7, 6)):
        logits, target = torch.randn(2, 3, *size), torch.randint(3, (2, 9, 9))
        expected = loss_and_gradient(partial(upsample_cross_entropy, target=target), logits)
        actual = loss_and_gradient(partial(compiled, target=target), logits)
        assert torch.equal(actual[0], expected[0])
        assert torch.equal(actual[1], expected[1])


@pytest.mark.parametrize("offset", [1e4, -1e4, 1e30])
def test_large_offset(backend, device, offset):
    """Only differences of logits matter. PyTorch itself loses digits of large logits."""
    if backend == "reference":
        pytest.skip("the reference is PyTorch's interpolation, without centring")
    logits, target, _ = problem((1, 5, 6, 7), (25, 29), device)
    logits += offset
    options = {"target": target, "ignore_index": 255, "reduction": "none"}
    with deeplab_fast.backend(backend):
        actual = loss_and_gradient(partial(upsample_cross_entropy, **options), logits)
    centred = logits.double() - logits.double().amax(1, keepdim=True)
    expected = loss_and_gradient(partial(interpolate_and_cross_entropy, **options), centred)
    torch.testing.assert_close(actual, tuple(t.float() for t in expected))


@pytest.mark.parametrize("spread", [20, 50, 100, 1e4, 1e30])
def test_widely_spread_logits(backend, device, spread):
    """Exponentials underflow between one source pixel and the next."""
    logits, target, _ = problem((1, 5, 6, 21), (25, 90), device)
    with deeplab_fast.backend(backend):
        assert_like_pytorch(logits * spread, target, ignore_index=255, reduction="none")


@pytest.mark.parametrize("value", [-1e30, torch.finfo(torch.float32).min])
def test_masked_class(backend, device, value):
    """A class with very low logits can never win."""
    logits, target, _ = problem((1, 5, 6, 7), (25, 29), device)
    logits[:, 3] = value
    target[target == 3] = 2
    ours = partial(upsample_cross_entropy, target=target, ignore_index=255)
    others = [0, 1, 2, 4]
    expected_target = torch.where(target == 4, 3, target)
    theirs = partial(interpolate_and_cross_entropy, target=expected_target, ignore_index=255)
    with deeplab_fast.backend(backend):
        loss, grad = loss_and_gradient(ours, logits)
    expected_loss, expected_grad = loss_and_gradient(theirs, logits[:, others])
    torch.testing.assert_close(loss, expected_loss)
    torch.testing.assert_close(grad[:, others], expected_grad)
    assert (grad[:, 3] == 0).all()


@pytest.mark.parametrize("value", [0.0, math.inf, -math.inf, math.nan])
def test_upsampled_is_the_kernel_of_interpolate(value):
    logits = torch.randn(2, 3, 6, 7)
    logits[torch.rand(logits.shape) < 0.1] = value
    for arguments in (
        {"size": (11, 18)},
        {"size": (24, 28), "align_corners": True},
        {"scale_factor": (1.7, 2.3)},
    ):
        expected = F.interpolate(logits, mode="bilinear", **arguments)
        actual = upsampled(logits, **arguments)
        torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)


class Called(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.ops = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.ops.append(function._schema.name)
        return function(*args, **(kwargs or {}))


def test_comparisons_on_a_device_take_the_kernel():
    """F.interpolate chooses its kernel on the meta device as on a GPU."""
    assert torch.are_deterministic_algorithms_enabled()
    logits, kernel = torch.empty(1, 3, 4, 5, device="meta"), "aten::upsample_bilinear2d"
    with Called() as theirs:
        F.interpolate(logits, (7, 9), mode="bilinear")
    with Called() as helper:
        upsampled(logits, (7, 9))
    assert kernel not in theirs.ops and helper.ops == [kernel]
    target = torch.zeros(1, 7, 9, dtype=torch.int64, device="meta")
    with Called() as loss:
        interpolate_and_cross_entropy(logits, target)
    assert kernel in loss.ops


@pytest.mark.parametrize("size", [(24, 28), (11, 18), (3, 3)])
@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_non_finite_logits_like_pytorch(backend, device, value, size):
    logits, target, _ = problem((4, 5, 6, 7), size, device)
    logits[torch.rand(logits.shape) < 0.02] = value
    arguments = dict(target=target, ignore_index=255, reduction="none", label_smoothing=0.1)
    expected = interpolate_and_cross_entropy(logits, **arguments)
    with deeplab_fast.backend(backend):
        loss = upsample_cross_entropy(logits, **arguments)
    assert not expected.isfinite().all() and expected.isfinite().any()
    torch.testing.assert_close(loss, expected, equal_nan=True)


def test_nan_stays_where_it_was_read(backend, device):
    """Pixels that read no NaN have the same gradient as without it."""
    logits, target, _ = problem((1, 4, 12, 12), (6, 6), device, ignored=0)
    ours = partial(upsample_cross_entropy, target=target, reduction="sum")
    logits_nan = logits.clone()
    logits_nan[0, 1, 5, 5] = math.nan
    with deeplab_fast.backend(backend):
        _, grad = loss_and_gradient(ours, logits)
        _, grad_nan = loss_and_gradient(ours, logits_nan)
    touched = grad_nan.isnan()
    assert touched[0, :, 4:6, 4:6].all() and touched.sum() == 4 * 4
    assert torch.equal(grad_nan[~touched], grad[~touched])
    # Downsampled by six, only one pixel of each 6x6 patch's middle is read.
    target = target[:, :2, :2]
    logits_nan = logits.clone()
    logits_nan[0, 1, 0, 4] = math.nan
    with deeplab_fast.backend(backend):
        _, grad = loss_and_gradient(ours, logits)
        _, grad_nan = loss_and_gradient(partial(ours, target=target), logits_nan)
        _, grad = loss_and_gradient(partial(ours, target=target), logits)
    assert torch.equal(grad_nan, grad)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_all_ignored(backend, device, reduction, label_smoothing):
    logits, target, weight = problem((2, 4, 3, 5), (11, 13), device)
    arguments = dict(
        target=target.fill_(-100), reduction=reduction, label_smoothing=label_smoothing
    )
    with deeplab_fast.backend(backend):
        for w in (None, weight):
            ours = partial(upsample_cross_entropy, weight=w, **arguments)
            theirs = partial(interpolate_and_cross_entropy, weight=w, **arguments)
            loss, grad = loss_and_gradient(ours, logits)
            expected_loss, _ = loss_and_gradient(theirs, logits)
            assert torch.equal(loss.isnan(), expected_loss.isnan())
            assert torch.equal(loss.nan_to_num(), expected_loss.nan_to_num())
            assert (loss.isnan() if reduction == "mean" else loss == 0).all()
            assert (grad == 0).all()


def test_mean_of_empty_batch_is_nan(backend, device):
    logits, target, _ = problem((0, 4, 3, 5), (11, 13), device)
    with deeplab_fast.backend(backend):
        loss, grad = loss_and_gradient(partial(upsample_cross_entropy, target=target), logits)
    assert loss.isnan() and grad.shape == logits.shape


@pytest.mark.parametrize("bad", [4, -1, 255, 2**62, -(2**62)])
def test_invalid_target(backend, device, bad):
    logits, target, _ = problem((2, 4, 3, 5), (11, 13), device, ignored=-100)
    target[1, 10, 5] = bad
    target[1, 10, 12] = 77
    with deeplab_fast.backend(backend):
        if device != "cpu" or backend == "emulated":  # where nothing waits for the answer
            assert upsample_cross_entropy(logits, target).isnan()
            assert upsample_cross_entropy(logits, target, reduction="sum").isnan()
            losses = upsample_cross_entropy(logits, target, reduction="none")
            assert losses.isnan().nonzero().tolist() == [[1, 10, 5], [1, 10, 12]]
            return
        for reduction in REDUCTIONS:
            message = f"target: {bad} is not a class: expected 0 to 3, or ignore_index .-100"
            with pytest.raises(IndexError, match=message):
                upsample_cross_entropy(logits, target, reduction=reduction)


def test_backward_op_checks_no_targets_but_stays_inside(backend, device):
    """The backward op is called directly with a target that is an error in the forward."""
    logits, target, _ = problem((1, 4, 3, 5), (11, 13), device, ignored=0)
    ops = torch.ops.deeplab_fast
    options = (-100, "sum", 0.0, False)
    _, *saved = ops.upsample_cross_entropy(logits, target, None, *options, backend=backend)
    target[0, 5, 6] = 2**40
    ops.upsample_cross_entropy_backward(
        torch.ones((), device=device), logits, target, None, *saved, *options, backend=backend
    )


def test_out_of_memory_is_an_exception():
    shape = _C.UpsampleShape([1] * 4, [1] * 4, [1, 2**58], [1.0, 1.0], False)
    terms = _C.CrossEntropyParams(0, -100, 0.0)
    with pytest.raises(RuntimeError, match="upsample_cross_entropy_fwd: out of memory"):
        _C.cpu.upsample_cross_entropy_fwd(0, 0, 0, 0, shape, terms, 1)
    with pytest.raises(RuntimeError, match="upsample_cross_entropy_bwd: out of memory"):
        _C.cpu.upsample_cross_entropy_bwd(0, 0, [0] * 3, 0, 0, 0, shape, terms, 1)


@pytest.mark.parametrize("scale", [3, 300])
def test_bitwise_repeatable_whatever_the_number_of_threads(scale):
    """The tensors are so large that several threads share the work."""
    logits, target, weight = problem((2, 5, 24, 20), (190, 163), "cpu")
    arguments = dict(target=target, weight=weight, ignore_index=255, label_smoothing=0.1)
    threads = torch.get_num_threads()
    results = []
    try:
        with deeplab_fast.backend("cpu"):
            for n in (1, 2, 2, 3, 7):
                torch.set_num_threads(n)
                for reduction in ("mean", "none"):
                    ours = partial(upsample_cross_entropy, reduction=reduction, **arguments)
                    results += [loss_and_gradient(ours, logits * scale)]
    finally:
        torch.set_num_threads(threads)
    for i, (loss, grad) in enumerate(results):
        assert torch.equal(loss, results[i % 2][0]) and torch.equal(grad, results[i % 2][1])


@pytest.mark.parametrize("scale", [1, 100])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_emulated_gives_the_same_bits_on_seeds(layout, scale):
    """Cells have more than eight rows and columns of more than one block; devices are small."""
    logits, target, weight = problem((2, 5, 3, 18), (28, 75), "cpu")
    logits = with_layout(logits * scale, layout)
    results = []
    for seed, sm in enumerate(("sm_80", "sm_80", "sm_86", "sm_90")):
        for reduction in REDUCTIONS:
            ours = partial(
                upsample_cross_entropy,
                target=target,
                weight=weight,
                ignore_index=255,
                reduction=reduction,
                label_smoothing=0.1,
            )
            with deeplab_fast.backend("emulated"), machine(seed, sm):
                results += [loss_and_gradient(ours, logits)]
    for i, result in enumerate(results):
        for actual, expected in zip(result, results[i % len(REDUCTIONS)]):
            assert torch.equal(actual, expected)


def test_repeats_its_bits(backend, device):
    if device != "cpu" and backend == "reference":
        pytest.skip("PyTorch's own kernels are not deterministic there")
    logits, target, weight = problem((2, 21, 9, 9), (65, 65), device)
    ours = partial(upsample_cross_entropy, target=target, weight=weight, ignore_index=255)
    with deeplab_fast.backend(backend):
        first, second = (loss_and_gradient(ours, logits) for _ in range(2))
    assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])


@pytest.mark.parametrize("scale", [1, 100])
@pytest.mark.parametrize("classes", [64, 65, 160, 161, 1000])
def test_many_classes(backend, device, classes, scale):
    """More than a block of a GPU holds at a time, where the emulator has that of the smallest."""
    logits, target, weight = problem((1, classes, 2, 3), (9, 11), device)
    arguments = dict(weight=weight, ignore_index=255, label_smoothing=0.1, reduction="none")
    with deeplab_fast.backend(backend), machine(device="sm_86"):
        for layout in ("contiguous", "channels_last"):
            assert_like_pytorch(with_layout(logits * scale, layout), target, **arguments)


def test_large_upsampling(backend, device):
    """Cells of more pixels than a block of a GPU has threads."""
    logits, target, _ = problem((1, 3, 2, 2), (21, 700), device)
    with deeplab_fast.backend(backend):
        assert_like_pytorch(logits, target, ignore_index=255, label_smoothing=0.1)


def test_expanded_gradient(backend, device):
    """The gradient of loss.sum() has stride 0 in all dimensions."""
    logits, target, weight = problem((2, 5, 6, 7), (25, 29), device)
    ours = partial(
        upsample_cross_entropy, target=target, weight=weight, ignore_index=255, reduction="none"
    )
    with deeplab_fast.backend(backend):
        _, expected = loss_and_gradient(ours, logits)
        _, grad = loss_and_gradient(lambda x: ours(x).sum(), logits)
    assert torch.equal(grad, expected)


def test_any_strides(backend, device):
    """Views of logits, target, weight and gradient give the bits of their contiguous copies."""
    base, _, _ = problem((2, 9, 12, 15), (1, 1), device)
    views = [
        base.transpose(2, 3),
        base.transpose(1, 3),
        base.flip(1)[:, 2:, 1:, 3:],
        base[:, :, :1, :1].expand(2, 9, 8, 6),
        base[:1].expand(3, 9, 12, 15),
        base[:, ::2, ::3, ::2],
    ]
    with deeplab_fast.backend(backend):
        for logits in views:
            n, c = logits.shape[:2]
            target = torch.randint(c, (31, 2 * n, 22), device=device).transpose(0, 1)[::2]
            weight = torch.rand(2 * c, device=device)[::2]
            grad = torch.rand(22, 31, n, device=device).permute(2, 1, 0)
            results = [
                loss_and_gradient(
                    partial(upsample_cross_entropy, target=t, weight=w, reduction="none"), x, g
                )
                for x, t, w, g in (
                    (logits, target, weight, grad),
                    [tensor.contiguous() for tensor in (logits, target, weight, grad)],
                )
            ]
            for viewed, copied in zip(*results):
                assert torch.equal(viewed, copied)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_strides_in_compiled_graphs(backend, device, layout, reduction, dtype):
    logits, target, weight = problem((2, 4, 5, 6), (11, 13), device, dtype, ignored=-100)
    logits = with_layout(logits, layout)
    ops, options = torch.ops.deeplab_fast, (-100, reduction, 0.1, False)
    forward = ops.upsample_cross_entropy, (logits, target, weight, *options)
    loss, *saved = forward[0](*forward[1], backend=backend)
    backward = (
        ops.upsample_cross_entropy_backward,
        (torch.ones_like(loss), logits, target, weight, *saved, *options),
    )
    for op, arguments in (forward, backward):
        actual = op(*arguments, backend=backend)
        with FakeTensorMode(allow_non_fake_inputs=True):
            promised = op(*arguments, backend=backend)
        if isinstance(actual, Tensor):
            actual, promised = [actual], [promised]
        for a, p in zip(actual, promised):
            assert (a.shape, a.stride(), a.dtype) == (p.shape, p.stride(), p.dtype)


def test_memory_saved_for_backward(backend, device):
    logits, target, weight = problem((2, 21, 5, 7), (40, 53), device, ignored=-100)
    logits.requires_grad_()
    kept: list[Tensor] = []
    with (
        deeplab_fast.backend(backend),
        torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t),
    ):
        upsample_cross_entropy(logits, target, weight)
    inputs = {t.data_ptr() for t in (logits, target, weight)}
    extra = sum(t.nbytes for t in kept if t.data_ptr() not in inputs)
    assert extra == 4 * target.numel() + 4


def test_gradient_of_a_scaled_loss(backend, device):
    """Loss scaling by a power of two scales the gradient exactly."""
    logits, target, _ = problem((1, 5, 6, 7), (25, 29), device)
    ours = partial(upsample_cross_entropy, target=target, ignore_index=255)
    with deeplab_fast.backend(backend):
        _, grad = loss_and_gradient(ours, logits)
        _, scaled = loss_and_gradient(ours, logits, torch.tensor(65536.0, device=device))
    assert torch.equal(scaled, 65536 * grad)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_autocast_casts_nothing(backend, device, dtype):
    logits, target, weight = problem((1, 5, 6, 7), (25, 29), device, dtype)
    ours = partial(upsample_cross_entropy, target=target, weight=weight, ignore_index=255)
    with deeplab_fast.backend(backend):
        expected = loss_and_gradient(ours, logits)
        with torch.autocast(device, torch.bfloat16):
            actual = loss_and_gradient(ours, logits)
    assert actual[0].dtype == torch.float32 and actual[1].dtype == dtype
    assert torch.equal(actual[0], expected[0]) and torch.equal(actual[1], expected[1])


def test_float64_logits(backend, device):
    logits, target, weight = problem((1, 5, 6, 7), (25, 29), device, torch.float64)
    ours = partial(upsample_cross_entropy, target=target, weight=weight, ignore_index=255)
    with deeplab_fast.backend(backend):
        loss, grad = loss_and_gradient(ours, logits)
        loss32, grad32 = loss_and_gradient(ours, logits.float())
        double_weight = loss_and_gradient(partial(ours, weight=weight.double()), logits)
    assert grad.dtype == torch.float64 and loss.dtype == torch.float32
    assert torch.equal(loss, loss32) and torch.equal(grad, grad32.double())
    assert torch.equal(loss, double_weight[0]) and torch.equal(grad, double_weight[1])


def test_gradcheck(backend, device):
    """Finite differences of the fp32 loss, with a step and a tolerance that suit fp32."""
    logits, target, weight = problem((1, 3, 2, 3), (7, 8), device, torch.float64)
    logits.requires_grad_()
    arguments = dict(weight=weight, ignore_index=255, label_smoothing=0.2)

    def ours(logits: Tensor, reduction: str) -> Tensor:
        return upsample_cross_entropy(logits, target, reduction=reduction, **arguments).double()

    with deeplab_fast.backend(backend):
        for reduction in ["mean"] if is_interpreted(backend) else REDUCTIONS:
            assert torch.autograd.gradcheck(ours, (logits, reduction), eps=1e-2, atol=1e-3)


def test_deterministic_algorithms(device, backend):
    if device != "cpu" and backend == "reference":
        pytest.skip("PyTorch's own kernels are not deterministic there")
    logits, target, _ = problem((1, 5, 6, 7), (25, 29), device)
    torch.use_deterministic_algorithms(True)
    with deeplab_fast.backend(backend):
        loss_and_gradient(partial(upsample_cross_entropy, target=target, ignore_index=255), logits)


def test_unneeded_gradients_are_not_computed(backend, device, ran):
    logits, target, _ = problem((1, 5, 6, 7), (25, 29), device, ignored=-100)
    with deeplab_fast.backend(backend):
        assert not upsample_cross_entropy(logits, target).requires_grad
        with torch.inference_mode():
            upsample_cross_entropy(logits, target)
        logits.requires_grad_()
        with torch.no_grad():
            assert not upsample_cross_entropy(logits, target).requires_grad
    assert ran == [(OP, backend)] * 3


def test_automatic_choice(ran):
    logits, target, _ = problem((1, 5, 6, 7), (25, 29), "cpu", ignored=-100)
    upsample_cross_entropy(logits.requires_grad_(), target).backward()
    assert ran == [(OP, "cpu"), (OP + "_backward", "cpu")]


def test_double_backward_is_an_error(backend, device):
    logits, target, _ = problem((1, 3, 4, 4), (9, 9), device, ignored=-100)
    logits.requires_grad_()
    with deeplab_fast.backend(backend):
        loss = upsample_cross_entropy(logits, target)
        (grad,) = torch.autograd.grad(loss, logits, create_graph=True)
        with pytest.raises(NotImplementedError, match="use F.interpolate and F.cross_entropy"):
            grad.sum().backward()


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_opcheck(opcheck, backend, device, reduction):
    logits, target, weight = problem((2, 4, 5, 6), (11, 13), device, ignored=-100)
    logits = with_layout(logits, "channels_last").requires_grad_()
    op, options = torch.ops.deeplab_fast.upsample_cross_entropy, (-100, reduction, 0.1, True)
    opcheck(op, (logits, target, weight, *options), {"backend": backend})
    opcheck(op, (logits, target, None, *options), {"backend": backend})


def test_compile_fullgraph(backend, device, ran):
    logits, target, weight = problem((2, 4, 5, 6), (11, 13), device, ignored=-100)
    logits.requires_grad_()

    def inside(logits, target):
        with deeplab_fast.backend(backend):
            return upsample_cross_entropy(logits * 2, target, weight) + 1

    def outside(logits, target):
        return upsample_cross_entropy(logits * 2, target, weight) + 1

    for function in (inside, outside):
        torch._dynamo.reset()
        compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
        with deeplab_fast.backend(backend):
            expected = loss_and_gradient(lambda x, f=function: f(x, target), logits)
            ran.clear()
            actual = loss_and_gradient(lambda x, f=compiled: f(x, target), logits)
        assert ran == [(OP, backend), (OP + "_backward", backend)]
        for a, e in zip(actual, expected):
            assert torch.equal(a, e)


def test_compile_once_for_all_sizes(backend, device):
    torch._dynamo.reset()
    frames = []

    def counting(graph, inputs):
        frames.append(graph)
        return graph

    @torch.compile(fullgraph=True, dynamic=True, backend=counting)
    def compiled(logits, target):
        return upsample_cross_entropy(logits, target)

    with deeplab_fast.backend(backend):
        for n, side in ((2, 9), (3, 17), (4, 31)):
            logits, target, _ = problem((n, 4, 5, side), (2 * side, 13), device, ignored=-100)
            assert torch.equal(compiled(logits, target), upsample_cross_entropy(logits, target))
    assert len(frames) == 1


def test_export(backend, device):
    class Loss(torch.nn.Module):
        def forward(self, logits: Tensor, target: Tensor) -> Tensor:
            return upsample_cross_entropy(logits, target, label_smoothing=0.1)

    logits, target, _ = problem((2, 4, 5, 6), (11, 13), device, ignored=-100)
    with deeplab_fast.backend(backend):
        program = torch.export.export(Loss(), (logits, target))
        assert torch.equal(program.module()(logits, target), Loss()(logits, target))


LOGITS = torch.zeros(2, 4, 5, 6)
TARGET = torch.zeros(2, 9, 8, dtype=torch.int64)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (dict(logits=LOGITS[0]), ValueError, r"logits: expected \[N, C, H, W\].*\(4, 5, 6\)"),
        (dict(logits=LOGITS[:, :0]), ValueError, "logits: expected .* C, H, W >= 1"),
        (dict(logits=LOGITS.long()), TypeError, "logits: expected a floating dtype"),
        (dict(target=TARGET[0]), ValueError, r"target: expected \[2, height, width\].*\(9, 8\)"),
        (dict(target=TARGET[:1]), ValueError, r"target: expected \[2, height, width\]"),
        (dict(target=TARGET[:, :0]), ValueError, r"target: .* at least 1x1, got shape \(2, 0, 8\)"),
        (dict(target=TARGET.float()), TypeError, "target: expected an integer dtype, got torch.f"),
        (dict(target=TARGET.bool()), TypeError, "target: expected an integer dtype, got torch.b"),
        (dict(target=TARGET.to("meta")), ValueError, "target: expected on cpu, got meta"),
        (dict(weight=torch.ones(3)), ValueError, r"weight: expected \(4,\), got \(3,\)"),
        (dict(weight=torch.ones(4).long()), TypeError, "weight: expected a floating dtype"),
        (dict(weight=torch.ones(4).to("meta")), ValueError, "weight: expected on cpu, got meta"),
        (
            dict(weight=torch.ones(4).requires_grad_()),
            ValueError,
            "weight: expected requires_grad=False",
        ),
        (dict(reduction="max"), ValueError, "reduction: expected one of none, mean, sum"),
        (dict(label_smoothing=1.5), ValueError, "label_smoothing: expected 0 to 1, got 1.5"),
        (dict(label_smoothing=math.nan), ValueError, "label_smoothing: expected 0 to 1, got nan"),
    ],
)
def test_bad_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        upsample_cross_entropy(**{"logits": LOGITS, "target": TARGET, **arguments})
