"""Choice of a backend, errors of a forced one, and registration of the ops."""

from __future__ import annotations

import itertools
import subprocess
import sys
import warnings
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves

import deeplab_fast
from deeplab_fast import (
    _C,
    aspp,
    dilated_conv2d,
    parallel_dilated_conv2d,
    upsample_argmax,
    upsample_cross_entropy,
)
from deeplab_fast._native.limits import unsupported_geometry
from deeplab_fast._native.memory_format import _strides, empty_like_format, in_format_of
from deeplab_fast.backends import registry
from deeplab_fast.backends.cuda import device
from deeplab_fast.ops.dilated_conv2d_and_mean import parallel_dilated_conv2d_and_mean
from deeplab_fast.ops.fused_conv2d import fused_conv2d, fused_conv2d_add_

from ..support.backends import GpuTensor
from ..support.cases import with_layout

X, W = torch.randn(1, 2, 5, 5), torch.randn(2, 2, 3, 3)


def test_available_on_the_cpu():
    available = deeplab_fast.available_backends("cpu")
    assert "cpu" in available and "reference" in available
    assert "cuda" not in available


def test_unknown_name():
    with pytest.raises(
        ValueError, match="unknown backend 'cudnn': expected one of cuda, cuda/sm90"
    ):
        deeplab_fast.backend("cudnn")


def test_forcing_nests_and_ends(ran):
    with deeplab_fast.backend("reference"):
        with deeplab_fast.backend("cpu"):
            dilated_conv2d(X, W)
        dilated_conv2d(X, W)
        with pytest.raises(KeyError), deeplab_fast.backend("cpu"):
            raise KeyError
        dilated_conv2d(X, W)
    dilated_conv2d(X, W)
    assert [name for _, name in ran] == ["cpu", "reference", "reference", "cpu"]
    assert registry.current() == ""


@pytest.mark.parametrize("name", ["cuda", "cuda/sm90", "cuda/sm80", "triton"])
def test_forced_gpu_backend_on_cpu_tensors_raises(name):
    if name in deeplab_fast.available_backends("cpu"):
        pytest.skip(f"{name} runs on CPU tensors here")
    message = f"backend '{name}' cannot run dilated_conv2d on this input: .+"
    with deeplab_fast.backend(name), pytest.raises(RuntimeError, match=message):
        dilated_conv2d(X, W)


def test_unsupported_call_falls_back_only_if_automatic(monkeypatch, ran):
    unsupported = registry._kernels["dilated_conv2d"]["cpu"]._replace(
        unsupported_reason=lambda arguments: "odd shape"
    )
    monkeypatch.setitem(registry._kernels["dilated_conv2d"], "cpu", unsupported)
    dilated_conv2d(X, W)
    assert ran == [("dilated_conv2d", "reference")]
    with deeplab_fast.backend("cpu"), pytest.raises(RuntimeError, match="odd shape"):
        dilated_conv2d(X, W)


@pytest.fixture
def old_driver(monkeypatch):
    """A GPU whose driver is for CUDA 12.8, and kernels built with CUDA 13.0."""
    versions = {"driver_version": 12080, "runtime_version": 13000}
    fake = SimpleNamespace(device_info=lambda: versions)
    monkeypatch.setattr(_C, "cuda", fake, raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for cached in (device._problem, registry._warn_once):
        cached.cache_clear()
    yield
    device._problem.cache_clear()
    registry._warn_once.cache_clear()


def test_warning_about_an_old_driver_is_given_once(old_driver, monkeypatch):
    kernel = registry.Kernel(lambda arguments: "ran", registry._supports_everything)
    monkeypatch.setitem(registry._kernels, "an_op", dict.fromkeys(("cuda", "reference"), kernel))
    monkeypatch.setitem(registry._argument_types, "an_op", lambda *values: values)
    tensor = GpuTensor()
    with registry.trace() as ran, pytest.warns(UserWarning) as warned:
        for _ in range(3):
            assert registry.run("an_op", tensor) == "ran"
    assert ran == [("an_op", "reference")] * 3
    (warning,) = warned
    assert (
        "'cuda' is not used: built with CUDA 13.0, but this machine's driver supports CUDA 12.8"
        in str(warning.message)
    )
    with pytest.raises(RuntimeError, match="backend 'cuda' cannot run an_op.*driver"):
        registry.run("an_op", tensor, backend="cuda")


def test_no_warning_without_a_gpu():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        dilated_conv2d(X, W)


def test_every_op_has_a_reference():
    for op in registry.ops():
        assert "reference" in registry.backends_of(op)


def test_compiled_graphs_keep_the_strides_of_inputs():
    """Without the tag, torch 2.6 converts every input to NCHW."""
    tag = getattr(torch.Tag, "needs_exact_strides", torch.Tag.needs_fixed_stride_order)
    for op in registry.ops():
        assert tag in getattr(torch.ops.deeplab_fast, op).default.tags


def test_imports_without_a_gpu_or_side_effects():
    """Importing must not initialise CUDA, so that a process can fork after it."""
    code = "import torch, deeplab_fast; assert not torch.cuda.is_initialized()"
    subprocess.run([sys.executable, "-I", "-c", code], check=True)


# Registration: fakes, needed gradients, and the backend of the gradients.

OPS = torch.ops.deeplab_fast
MASKS = [list(map(bool, mask)) for mask in itertools.product((0, 1), repeat=3)]


def calls_of_all_ops(layout: str, dtype: torch.dtype, channels: int) -> list[tuple[Any, tuple]]:
    """Calls of all functional ops, with weights of several sizes and images that are not square."""
    x = with_layout(torch.randn(2, channels, 5, 6).to(dtype), layout)
    w1, w3 = (torch.randn(k, channels, k, k).to(dtype) for k in (1, 3))
    w3 = w3.contiguous(memory_format=torch.channels_last)
    b1, b3 = torch.randn(1).to(dtype), torch.randn(3).to(dtype)
    grads = [torch.randn(2, k, 5, 6).to(dtype) for k in (3, 4)]
    mean, dilations = torch.randn(2, channels), [1, 2]
    pool, pool_bias = torch.randn(2, channels, 1, 1).to(dtype), torch.randn(2).to(dtype)
    project, project_bias = torch.randn(7, 6, 1, 1).to(dtype), torch.randn(7).to(dtype)
    geometry = [2, 1], [1, 3], [1, 2], 1
    target, weight = torch.randint(channels, (2, 9, 8)), torch.rand(channels)
    calls = [
        (OPS.dilated_conv2d, (x, w3, b3, [2, 1], 1)),
        (OPS.parallel_dilated_conv2d, (x, [w1, w3], [b1, b3], dilations)),
        (OPS.parallel_dilated_conv2d_and_mean, (x, [w1, w3], dilations)),
        (OPS.aspp, (x, [w1, w3], [b1, b3], dilations, pool, pool_bias, project, project_bias)),
        (OPS.fused_conv2d, (x, w3, b3, *geometry, "relu")),
        *(
            (OPS.upsample_argmax, (x, [9, 8], None, False, labels))
            for labels in (torch.int64, torch.int32, torch.uint8)
        ),
    ]
    for mask in MASKS:
        calls.append((OPS.dilated_conv2d_backward, (grads[0], x, w3, [2, 1], 1, mask)))
        branches = grads[1], x, [w1, w3], dilations, mask
        calls.append((OPS.parallel_dilated_conv2d_backward, branches))
        calls.append((OPS.parallel_dilated_conv2d_backward, (*branches, mean)))
    for reduction in ("none", "mean", "sum"):
        options = (-100, reduction, 0.1, False)
        forward = (x, target, weight, *options)
        loss, *saved = OPS.upsample_cross_entropy(*forward)
        calls.append((OPS.upsample_cross_entropy, forward))
        backward = (torch.ones_like(loss), x, target, weight, *saved, *options)
        calls.append((OPS.upsample_cross_entropy_backward, backward))
    return calls


@pytest.mark.parametrize("name", ["cpu", "reference"])
@pytest.mark.parametrize("channels", [1, 4])
@pytest.mark.parametrize(
    ("layout", "dtype"),
    [
        ("contiguous", torch.float32),
        ("channels_last", torch.float32),
        ("channels_last", torch.float64),
        ("sliced", torch.float64),
        ("sliced", torch.bfloat16),
    ],
)
def test_fakes_match_outputs(layout, dtype, channels, name):
    """All outputs have the shape, strides and dtype of the fake, for every mask of gradients."""
    seen = set()
    for op, arguments in calls_of_all_ops(layout, dtype, channels):
        seen.add(op.__name__)
        if registry.unsupported_reason(
            op.__name__, name, registry.arguments(op.__name__, *arguments)
        ):
            continue
        actual = tree_leaves(op(*arguments, backend=name))
        with FakeTensorMode(allow_non_fake_inputs=True):
            fakes = tree_leaves(op(*arguments, backend=name))
        described = [[(t.shape, t.stride(), t.dtype) for t in ts] for ts in (actual, fakes)]
        assert described[0] == described[1], op
    assert seen == set(registry.ops()) - {"fused_conv2d_add_"}


def test_in_format_of():
    """Values do not change, and a result is copied only if its strides are unexpected."""
    nchw = torch.randn(2, 3, 4, 5)
    nhwc = nchw.contiguous(memory_format=torch.channels_last)
    for result, input in itertools.product((nchw, nhwc, nchw.flip(3)), (nchw, nhwc)):
        expected = result.contiguous(
            memory_format=torch.channels_last if input is nhwc else torch.contiguous_format
        )
        actual = in_format_of(result, input)
        assert torch.equal(actual, expected) and actual.stride() == expected.stride()
    assert in_format_of(nchw, nchw) is nchw and in_format_of(nhwc, nhwc) is nhwc
    # One channel has the strides of both formats, and no format of its own to keep.
    for one in (nchw[:, :1], nchw[:, :1].contiguous(memory_format=torch.channels_last)):
        assert empty_like_format(one, (2, 3, 4, 5)).is_contiguous()
        assert in_format_of(nhwc, one).is_contiguous()


def test_output_strides_match_torch():
    for sizes in itertools.product((0, 1, 2, 5), repeat=4):
        for memory_format in (torch.contiguous_format, torch.channels_last):
            expected = torch.empty(sizes, device="meta", memory_format=memory_format).stride()
            assert _strides(sizes, memory_format) == expected, (sizes, memory_format)
    for sizes in ((), (0,), (3,), (2, 0, 3), (2, 3, 4), (2, 3, 4, 5, 6)):
        expected = torch.empty(sizes, device="meta").stride()
        assert _strides(sizes, torch.contiguous_format) == expected, sizes


def convolve(x, w1, w3, b1, b3):
    return dilated_conv2d(x, w3, b3, (2, 1))


def branches(x, w1, w3, b1, b3):
    return parallel_dilated_conv2d(x, [w1, w3], [b1, b3], [1, 2])


def branches_without_biases(x, w1, w3, b1, b3):
    return parallel_dilated_conv2d(x, [w1, w3], None, [1, 2])


def branches_and_mean(x, w1, w3, b1, b3):
    output, mean = parallel_dilated_conv2d_and_mean(x, [w1, w3], [1, 2])
    return torch.cat([output.flatten(1), mean.flatten(1)], dim=1)


def only_mean(x, w1, w3, b1, b3):
    return parallel_dilated_conv2d_and_mean(x, [w1, w3], [1, 2])[1]


def inference_aspp(x, w1, w3, b1, b3):
    others = torch.ones(2, 2, 1, 1), torch.ones(2), torch.ones(3, 6, 1, 1), torch.ones(3)
    return aspp(x, [w1, w3], [b1, b3], [1, 2], *others)


def cross_entropy(x, w1, w3, b1, b3):
    return upsample_cross_entropy(x, torch.arange(144).view(2, 9, 8) % 2)


# Functions, the arguments that they depend on, and the groups of arguments in ``output_mask``.
DIFFERENTIABLE = [
    (convolve, (1, 0, 1, 0, 1), [(0,), (2,), (4,)]),
    (branches, (1, 1, 1, 1, 1), [(0,), (1, 2), (3, 4)]),
    (branches_without_biases, (1, 1, 1, 0, 0), [(0,), (1, 2), ()]),
    (branches_and_mean, (1, 1, 1, 0, 0), [(0,), (1, 2), ()]),
    (only_mean, (1, 0, 0, 0, 0), None),
    (inference_aspp, (1, 1, 1, 1, 1), None),
    (cross_entropy, (1, 0, 0, 0, 0), None),
]


def leaves_of(needed: tuple[int, ...]) -> list[torch.Tensor]:
    torch.manual_seed(0)
    shapes = (2, 2, 5, 6), (1, 2, 1, 1), (3, 2, 3, 3), (1,), (3,)
    return [torch.randn(shape, requires_grad=bool(n)) for shape, n in zip(shapes, needed)]


@pytest.mark.parametrize(("function", "used", "groups"), DIFFERENTIABLE)
def test_only_needed_gradients(function, used, groups, monkeypatch):
    """For every subset of the arguments, only the gradients of that subset are computed."""
    masks = []
    for op in ("dilated_conv2d_backward", "parallel_dilated_conv2d_backward"):
        right = registry._kernels[op]["cpu"]

        def spy(arguments, right=right):
            masks.append(arguments.output_mask)
            return right.run(arguments)

        monkeypatch.setitem(registry._kernels[op], "cpu", right._replace(run=spy))
    leaves = leaves_of((1, 1, 1, 1, 1))
    function(*leaves).square().sum().backward()
    expected = [leaf.grad for leaf in leaves]
    for needed in itertools.product((0, 1), repeat=5):
        if not any(n and u for n, u in zip(needed, used)):
            continue
        masks.clear()
        leaves = leaves_of(needed)
        function(*leaves).square().sum().backward()
        for leaf, e, n, u in zip(leaves, expected, needed, used):
            assert (leaf.grad is not None) == bool(n and u)
            assert leaf.grad is None or torch.equal(leaf.grad, e)
        if groups:
            assert masks == [[any(needed[i] for i in group) for group in groups]]


@pytest.mark.parametrize("forced", ["reference", "cpu"])
@pytest.mark.parametrize("function", [function for function, _, _ in DIFFERENTIABLE])
def test_gradients_use_the_backend_of_the_output(function, forced, ran):
    leaves = leaves_of((1, 1, 1, 1, 1))
    with deeplab_fast.backend(forced):
        output = function(*leaves)
    other = "cpu" if forced == "reference" else "reference"
    with deeplab_fast.backend(other):
        output.square().sum().backward()
    assert {name for _, name in ran} == {forced}


def test_public_functions_use_the_forced_backend(ran):
    x, weight = torch.randn(1, 4, 5, 6), torch.randn(4, 4, 3, 3)
    geometry = (1, 1), (1, 1), (1, 1), 1
    zeros = torch.zeros(4)
    with deeplab_fast.backend("reference"):
        upsample_argmax(x, 9)
        fused_conv2d(x, weight, zeros, *geometry, "relu")
        fused_conv2d_add_(x.clone(), x, weight, zeros, *geometry, "relu")
    assert [name for _, name in ran] == ["reference"] * 3


def test_no_copies_are_saved_for_backward():
    """Backward saves the arguments and small outputs themselves, not copies of them."""
    for function, _, _ in DIFFERENTIABLE:
        leaves, kept = leaves_of((1, 1, 1, 1, 1)), []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):  # noqa: B023
            output = function(*leaves)
        own = {t.data_ptr() for t in (*leaves, output)}
        copies = [t for t in kept if t.shape == leaves[0].shape and t.data_ptr() not in own]
        assert not copies, function


def test_labels_require_no_gradient():
    x = torch.randn(1, 3, 4, 4, requires_grad=True)
    labels = upsample_argmax(x, 9)
    assert not labels.requires_grad and labels.grad_fn is None
    _, log_sum_exp, total_weight = OPS.upsample_cross_entropy(
        x, labels, None, -100, "mean", 0.0, False
    )
    assert not log_sum_exp.requires_grad and not total_weight.requires_grad


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("dilated_conv2d_backward", (X, X, W, [1, 1], 1, [True] * 3)),
        ("parallel_dilated_conv2d_backward", (X, X, [W], [1], [True] * 3)),
    ],
)
def test_backward_ops_are_not_differentiable(name, arguments):
    leaf = X.clone().requires_grad_()
    outputs = getattr(OPS, name)(leaf, *arguments[1:])
    with pytest.raises(NotImplementedError, match=f"{name} cannot be differentiated: there is no"):
        tree_leaves(outputs)[0].sum().backward()


# The order of preference.


def test_automatic_orders():
    assert registry.order("cpu") == ("cpu", "reference")
    assert registry.order("cuda") == ("cuda", "triton", "reference")
    for other in ("mps", "xpu", "meta"):
        assert registry.order(other) == ("reference",)
    assert registry.backends_of("dilated_conv2d")[: len(registry.NAMES)] == list(registry.NAMES)
    assert deeplab_fast.available_backends("mps") == ["reference"]
    # On a GPU, measurements decide about ops that a vendor library has, too.
    assert registry.depends_on_measurements("aspp", "cuda")
    assert not registry.depends_on_measurements("aspp", "cpu")
    assert not registry.depends_on_measurements("upsample_argmax", "cuda")


@pytest.mark.parametrize(
    ("faster", "chosen"),
    [
        (None, ("reference",)),
        ({}, ("reference",)),
        ({"a bucket": ("cuda",)}, ("cuda", "reference")),
    ],
)
def test_faster_kernels_precede_the_vendor_library(monkeypatch, faster, chosen):
    monkeypatch.setitem(registry.shape_buckets, "an_op", lambda arguments: "a bucket")
    table = {} if faster is None else {"an_op": faster}
    monkeypatch.setattr(registry.dispatch_table, "fastest_kernels", lambda device: table)
    torch.use_deterministic_algorithms(False)
    tensor = GpuTensor()
    assert registry.automatic("an_op", (tensor, 3)) == chosen
    assert registry.automatic("upsample_argmax", (tensor,)) == ("cuda", "triton", "reference")


def test_shape_buckets_of_ops():
    """The bucket of a call depends on its groups, branches and needed gradients."""
    buckets = registry.shape_buckets
    x, w1, w3 = torch.zeros(1, 4, 8, 8), torch.zeros(5, 4, 1, 1), torch.zeros(6, 4, 3, 3)
    depthwise, mask = torch.zeros(4, 1, 3, 3), [True, False, True]
    branches, kernels = ([w1, w3], [1, 2]), "4->11 1x1,3x3"
    expected = {
        "dilated_conv2d": ((x, depthwise, None, [1, 1], 4), "4->4 3x3 groups 4"),
        "dilated_conv2d_backward": (
            (x, x, depthwise, [1, 1], 4, mask), "4->4 3x3 groups 4",
        ),
        "parallel_dilated_conv2d": ((x, branches[0], [], branches[1]), kernels),
        "parallel_dilated_conv2d_and_mean": ((x, *branches), kernels),
        "parallel_dilated_conv2d_backward": ((x, x, *branches, mask), kernels),
        "aspp": ((x, branches[0], [], branches[1], None, None, None, None), kernels),
        "fused_conv2d": ((x, depthwise, None, [1, 1], [1, 1], [1, 1], 4, "relu"), "groups 4"),
        "fused_conv2d_add_": (
            (x[:, :, :1], x, depthwise, None, [1, 1], [1, 1], [1, 1], 4, "relu"), "groups 4",
        ),
    }  # fmt: skip
    assert set(expected) == set(buckets)
    for op, (arguments, text) in expected.items():
        found = buckets[op](registry.arguments(op, *arguments))
        assert text in found and "pixels 2^6" in found
        assert found.endswith(" dinput dbias") == op.endswith("backward")
        assert ("dinput" in found) == op.endswith("backward")


@pytest.mark.parametrize(
    ("kernel", "stride", "padding", "dilation", "reason"),
    [
        ((3, 3), (1, 1), (2, 1), (2, 1), None),
        ((1, 5), (1, 1), (0, 6), (4, 3), None),
        ((3, 3), (1, 2), (1, 1), (1, 1), "supports stride (1, 1), got (1, 2)"),
        ((3, 3), (2, 1), (1, 1), (1, 1), "supports stride (1, 1), got (2, 1)"),
        (
            (3, 3),
            (1, 1),
            (1, 2),
            (1, 1),
            "got a (3, 3) weight padded by (1, 2)",
        ),
        (
            (3, 3),
            (1, 1),
            (2, 1),
            (1, 1),
            "got a (3, 3) weight padded by (2, 1)",
        ),
        (
            (3, 2),
            (1, 1),
            (1, 1),
            (1, 2),
            "got a (3, 2) weight padded by (1, 1)",
        ),
    ],
)
def test_supported_geometries(kernel, stride, padding, dilation, reason):
    found = unsupported_geometry(torch.zeros(4, 4, *kernel), stride, padding, dilation)
    assert (found is None) == (reason is None) and (reason or "") in (found or "")


def test_traces_nest_and_end(ran):
    with registry.trace() as outer:
        upsample_argmax(X, 9)
        with pytest.raises(KeyError), registry.trace() as inner:
            upsample_argmax(X, 9)
            raise KeyError
        upsample_argmax(X, 9)
    upsample_argmax(X, 9)
    one = [("upsample_argmax", "cpu")]
    assert (inner, outer, ran) == (one, one * 2, one)


def test_backend_as_decorator(ran):
    @deeplab_fast.backend("reference")
    def labels():
        return upsample_argmax(X, 9)

    labels()
    with pytest.raises(KeyError), deeplab_fast.backend("reference"):
        raise KeyError
    assert registry.current() == ""
    upsample_argmax(X, 9)
    assert [name for _, name in ran] == ["reference", "cpu"]


def test_forced_backend_without_the_op_raises(monkeypatch):
    monkeypatch.delitem(registry._kernels["upsample_argmax"], "cpu")
    with deeplab_fast.backend("cpu"), pytest.raises(RuntimeError, match="no upsample_argmax kern"):
        upsample_argmax(X, 9)
    assert registry.unavailable_reason("nothing", "cpu") == "this installation has no such kernels"


def test_no_warning_about_unsupported_calls(monkeypatch):
    unsupported = registry._kernels["upsample_argmax"]["cpu"]._replace(
        unsupported_reason=lambda arguments: "shape"
    )
    monkeypatch.setitem(registry._kernels["upsample_argmax"], "cpu", unsupported)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        upsample_argmax(X, 9)


def test_backend_as_decorator_of_a_recursive_function(ran):
    @deeplab_fast.backend("reference")
    def label(depth: int) -> None:
        if depth > 0:
            label(depth - 1)
        upsample_argmax(X, 9)

    label(2)
    assert registry.current() == ""
    upsample_argmax(X, 9)
    assert [name for _, name in ran] == ["reference"] * 3 + ["cpu"]


def test_one_backend_object_nests_in_itself_and_in_others():
    outer, inner = deeplab_fast.backend("reference"), deeplab_fast.backend("cpu")
    with outer:
        with inner:
            with outer:
                assert registry.current() == "reference"
            assert registry.current() == "cpu"
        assert registry.current() == "reference"
    assert registry.current() == ""
