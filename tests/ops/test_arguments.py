"""Arguments of the public ops: NumPy's numbers, wrong types, dtypes and autocast."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing import assert_close
from torch.utils._pytree import tree_leaves, tree_map_only

import deeplab_fast
from deeplab_fast import (
    aspp,
    dilated_conv2d,
    parallel_dilated_conv2d,
    upsample_argmax,
    upsample_cross_entropy,
)
from deeplab_fast.ops.dilated_conv2d_and_mean import parallel_dilated_conv2d_and_mean

X, W, B = torch.zeros(1, 4, 5, 5), torch.zeros(6, 4, 3, 3), torch.zeros(6)
LOGITS, TARGET = torch.zeros(1, 3, 4, 4), torch.zeros(1, 9, 9, dtype=torch.int64)


class Op(NamedTuple):
    function: Callable[..., Any]
    arguments: dict[str, Any]  # by their names

    def __call__(self, **changed: Any) -> Any:
        return self.function(**self.arguments | changed)


OPS = {
    "dilated_conv2d": Op(dilated_conv2d, dict(input=X, weight=W, bias=B, dilation=1, groups=1)),
    "parallel_dilated_conv2d": Op(
        parallel_dilated_conv2d, dict(input=X, weights=[W, W], dilations=[1, 2], biases=[B, B])
    ),
    "parallel_dilated_conv2d_and_mean": Op(
        parallel_dilated_conv2d_and_mean, dict(input=X, weights=[W, W], dilations=[1, 2])
    ),
    "aspp": Op(
        aspp,
        dict(
            input=X,
            weights=[W, W],
            biases=[B, B],
            dilations=[1, 2],
            pool_weight=torch.zeros(2, 4, 1, 1),
            pool_bias=torch.zeros(2),
            project_weight=torch.zeros(3, 14, 1, 1),
            project_bias=torch.zeros(3),
        ),
    ),
    "upsample_argmax": Op(
        upsample_argmax,
        dict(logits=LOGITS, size=9, scale_factor=None, align_corners=False, dtype=torch.int64),
    ),
    "upsample_cross_entropy": Op(
        upsample_cross_entropy,
        dict(
            logits=LOGITS,
            target=TARGET,
            weight=torch.ones(3),
            ignore_index=255,
            reduction="mean",
            label_smoothing=0.1,
            align_corners=False,
        ),
    ),
}


# Types of arguments.


def random_operands(op: Op) -> dict[str, Any]:
    def random(tensor: Tensor) -> Tensor:
        floating = tensor.is_floating_point()
        return torch.rand(tensor.shape) if floating else torch.randint(3, tensor.shape)

    return tree_map_only(Tensor, random, op.arguments)


TWO = np.int64(2)
BOTH = {"dilations": np.array([2, 1])}, {"dilations": [2, 1]}


@pytest.mark.parametrize(
    ("name", "given", "meant"),
    [
        ("dilated_conv2d", {"dilation": TWO}, {"dilation": 2}),
        ("dilated_conv2d", {"dilation": (TWO, 1)}, {"dilation": (2, 1)}),
        ("dilated_conv2d", {"dilation": [1, np.uint8(2)]}, {"dilation": (1, 2)}),
        ("dilated_conv2d", {"dilation": torch.tensor(2)}, {"dilation": 2}),
        ("dilated_conv2d", {"groups": np.int32(1)}, {"groups": 1}),
        ("parallel_dilated_conv2d", *BOTH),
        ("parallel_dilated_conv2d", {"dilations": (TWO, 1)}, {"dilations": [2, 1]}),
        ("parallel_dilated_conv2d_and_mean", *BOTH),
        ("aspp", *BOTH),
        ("upsample_argmax", {"size": np.int64(9)}, {"size": 9}),
        ("upsample_argmax", {"size": [np.int64(9), 7]}, {"size": (9, 7)}),
        ("upsample_argmax", {"size": torch.Size([9, 7])}, {"size": (9, 7)}),
        (
            "upsample_argmax",
            {"size": None, "scale_factor": np.float32(2.5)},
            {"size": None, "scale_factor": 2.5},
        ),
        (
            "upsample_argmax",
            {"size": None, "scale_factor": [TWO, 2.5]},
            {"size": None, "scale_factor": (2.0, 2.5)},
        ),
        ("upsample_argmax", {"align_corners": np.bool_(True)}, {"align_corners": True}),
        ("upsample_argmax", {"align_corners": np.bool_(False)}, {"align_corners": False}),
        ("upsample_cross_entropy", {"ignore_index": np.int64(0)}, {"ignore_index": 0}),
        ("upsample_cross_entropy", {"ignore_index": -(2**63)}, {"ignore_index": 255}),
        ("upsample_cross_entropy", {"label_smoothing": np.float32(0.5)}, {"label_smoothing": 0.5}),
        (
            "upsample_cross_entropy",
            {"label_smoothing": torch.tensor(0.5)},
            {"label_smoothing": 0.5},
        ),
        ("upsample_cross_entropy", {"label_smoothing": 1}, {"label_smoothing": 1.0}),
        ("upsample_cross_entropy", {"align_corners": np.bool_(True)}, {"align_corners": True}),
    ],
    ids=str,
)
def test_numbers_of_numpy_and_torch(name, given, meant):
    operands = random_operands(OPS[name])
    actual, expected = (OPS[name].function(**operands | change) for change in (given, meant))
    assert_close(actual, expected, rtol=0, atol=0)


def test_options_reach_the_kernel(monkeypatch):
    """All values as they were passed, in the order of the schema."""
    received = {}
    for op in ("dilated_conv2d", "upsample_argmax", "upsample_cross_entropy"):
        right = deeplab_fast.backends.registry._kernels[op]["cpu"]

        def spy(arguments, op=op, right=right):
            received[op] = [a for a in arguments if not isinstance(a, Tensor)]
            return right.run(arguments)

        monkeypatch.setitem(
            deeplab_fast.backends.registry._kernels[op], "cpu", right._replace(run=spy)
        )
    x = torch.rand(1, 4, 5, 5)
    dilated_conv2d(x, torch.rand(4, 2, 3, 3), B[:4], (3, 2), 2)
    assert received["dilated_conv2d"] == [[3, 2], 2]
    OPS["upsample_argmax"](size=None, scale_factor=(2, 1.5), align_corners=True, dtype=torch.uint8)
    assert received["upsample_argmax"] == [[8, 6], [2.0, 1.5], True, torch.uint8]
    OPS["upsample_argmax"](size=(7, 6), dtype=torch.int32)
    assert received["upsample_argmax"] == [[7, 6], None, False, torch.int32]
    OPS["upsample_cross_entropy"](
        weight=None, ignore_index=-7, reduction="sum", label_smoothing=0.25, align_corners=True
    )
    assert received["upsample_cross_entropy"] == [None, -7, "sum", 0.25, True]


def test_labels_hold_the_classes():
    """256 classes fit into a byte."""
    argmax = OPS["upsample_argmax"]
    logits = torch.zeros(1, 256, 2, 2)
    logits[:, 255] = 1
    assert (argmax(logits=logits, dtype=torch.uint8) == 255).all()
    with pytest.raises(
        ValueError, match="^dtype: expected one that holds 257 classes, got torch.uint8"
    ):
        argmax(logits=torch.zeros(1, 257, 2, 2), dtype=torch.uint8)
    for size, scale_factor in ((None, None), (9, 2.0)):
        with pytest.raises(
            ValueError, match="size and scale_factor: expected exactly one, got (both|neither)"
        ):
            argmax(size=size, scale_factor=scale_factor)


def test_lists_of_parameters():
    """nn.ParameterList and tuples are accepted."""
    operands = random_operands(OPS["aspp"])
    expected = aspp(**operands)
    assert_close(aspp(**operands | {"weights": nn.ParameterList(operands["weights"])}), expected)
    assert_close(aspp(**operands | {"biases": tuple(operands["biases"])}), expected)


TENSORS = [
    (name, argument)
    for name, op in OPS.items()
    for argument, value in op.arguments.items()
    if isinstance(value, Tensor)
]
LISTS = [
    (name, argument)
    for name, op in OPS.items()
    for argument, value in op.arguments.items()
    if isinstance(value, list) and isinstance(value[0], Tensor)
]


@pytest.mark.parametrize(("name", "argument"), TENSORS)
def test_invalid_tensors(name, argument):
    op = OPS[name]
    optional = argument in ("bias", "weight") and name != "dilated_conv2d" or argument == "bias"
    wrong = [([op.arguments[argument]], "a list"), (np.ones(3), "a ndarray"), (2.5, "2.5")]
    if not optional:
        wrong.append((None, "None"))
    for value, got in wrong:
        with pytest.raises(TypeError, match=f"^{argument}: expected a tensor, got {got}$"):
            op(**{argument: value})


@pytest.mark.parametrize(("name", "argument"), LISTS)
def test_invalid_tensor_lists(name, argument):
    op = OPS[name]
    stack = torch.stack(op.arguments[argument])
    wrong = [(stack, "a Tensor"), ("ab", "'ab'"), (3, "3"), (iter([W]), "a list_iterator")]
    if argument == "weights" or name == "aspp":
        wrong.append((None, "None"))
    for value, got in wrong:
        message = f"^{argument}: expected a list of tensors, got {got}$"
        with pytest.raises(TypeError, match=message):
            op(**{argument: value})
    one, _ = op.arguments[argument]
    for value, got in (([one, None], "None"), ([one, [one]], "a list"), ([one, 1], "1")):
        message = rf"^{argument}\[1\]: expected a tensor, got {got}$"
        with pytest.raises(TypeError, match=message):
            op(**{argument: value})


@pytest.mark.parametrize(
    ("name", "argument", "value", "message"),
    [
        ("dilated_conv2d", "dilation", 2.0, "expected an int, got 2.0"),
        ("dilated_conv2d", "dilation", (2, 2.0), "expected an int, got 2.0"),
        ("dilated_conv2d", "dilation", "12", "expected an int, got '12'"),
        ("dilated_conv2d", "dilation", None, "expected an int, got None"),
        ("dilated_conv2d", "dilation", {1, 2}, "expected an int, got a set"),
        ("dilated_conv2d", "groups", 1.0, "expected an int, got 1.0"),
        ("dilated_conv2d", "groups", np.float64(1), r"expected an int, got np.float64\(1.0\)"),
        ("dilated_conv2d", "groups", None, "expected an int, got None"),
        ("upsample_argmax", "size", (33.0, 33), "expected an int, got 33.0"),
        ("upsample_argmax", "size", "9", "expected an int, got '9'"),
        ("upsample_argmax", "dtype", "uint8", "expected a torch.dtype, got 'uint8'"),
        ("upsample_argmax", "dtype", np.uint8, "expected a torch.dtype, got a type"),
        ("upsample_argmax", "dtype", None, "expected a torch.dtype, got None"),
        ("upsample_argmax", "align_corners", None, "expected True or False, got None"),
        ("upsample_argmax", "align_corners", 1, "expected True or False, got 1"),
        ("upsample_argmax", "align_corners", "no", "expected True or False, got 'no'"),
        ("upsample_cross_entropy", "ignore_index", None, "expected an int, got None"),
        ("upsample_cross_entropy", "ignore_index", 255.0, "expected an int, got 255.0"),
        ("upsample_cross_entropy", "reduction", None, "expected one of none, mean, sum, got None"),
        ("upsample_cross_entropy", "reduction", 1, "expected one of none, mean, sum, got 1"),
        ("upsample_cross_entropy", "label_smoothing", "x", "expected a number, got 'x'"),
        ("upsample_cross_entropy", "label_smoothing", None, "expected a number, got None"),
        ("upsample_cross_entropy", "label_smoothing", 1j, "expected a number, got 1j"),
        ("upsample_cross_entropy", "label_smoothing", X, "expected a number, got a Tensor"),
        ("upsample_cross_entropy", "align_corners", None, "expected True or False, got None"),
    ],
)
def test_wrong_types(name, argument, value, message):
    with pytest.raises(TypeError, match=f"^{argument}: {message}$"):
        OPS[name](**{argument: value})


@pytest.mark.parametrize("value", ["2", (2.0, "2"), (2.0, None), 1j, {}], ids=str)
def test_wrong_type_of_scale_factor(value):
    with pytest.raises(TypeError, match="^scale_factor: expected a number, got "):
        OPS["upsample_argmax"](size=None, scale_factor=value)


@pytest.mark.parametrize("name", [name for name, op in OPS.items() if "dilations" in op.arguments])
def test_wrong_dilations_of_branches(name):
    for value, message in (
        (2, "dilations: expected a list of ints, got 2"),
        ("12", "dilations: expected a list of ints, got '12'"),
        (None, "dilations: expected a list of ints, got None"),
        ([1, 2.0], r"dilations\[1\]: expected an int, got 2.0"),
        ([(1, 2), 1], r"dilations\[0\]: expected an int, got a tuple"),
    ):
        with pytest.raises(TypeError, match=f"^{message}$"):
            OPS[name](dilations=value)
    for value in ([1, 0], [-1, 1], [1, 2**63]):
        with pytest.raises(ValueError, match="^dilations: expected positive ints, got "):
            OPS[name](dilations=value)


@pytest.mark.parametrize(
    ("name", "argument", "values"),
    [
        ("dilated_conv2d", "dilation", [0, -1, (1, 0), (0, 1), (1, 1, 1), (), 2**63, (1, 2**64)]),
        ("upsample_argmax", "size", [0, -1, (1, 0), (0, 1), (1, 1, 1), (), (1,), 2**63]),
    ],
)
def test_values_of_pairs(name, argument, values):
    for value in values:
        message = f"^{argument}: expected a positive (int|number) or two of them, got "
        with pytest.raises(ValueError, match=message):
            OPS[name](**{argument: value})


@pytest.mark.parametrize("value", [0, -1.0, math.nan, math.inf, (1.0, math.inf), (2.0,), ()])
def test_values_of_scale_factor(value):
    message = "^scale_factor: expected a positive number or two of them, got "
    with pytest.raises(ValueError, match=message):
        OPS["upsample_argmax"](size=None, scale_factor=value)


def test_other_values():
    argmax, entropy = OPS["upsample_argmax"], OPS["upsample_cross_entropy"]
    for ignore_index in (2**63, -(2**63) - 1):
        with pytest.raises(ValueError, match="^ignore_index: expected an int of 64 bits, got "):
            entropy(ignore_index=ignore_index)
    for label_smoothing in (-0.01, 1.01, math.nan):
        with pytest.raises(ValueError, match="^label_smoothing: expected 0 to 1, got "):
            entropy(label_smoothing=label_smoothing)
    for dtype in (torch.int16, torch.int8, torch.float32):
        with pytest.raises(ValueError, match="^dtype: expected torch.int64, torch.int32 or torch"):
            argmax(dtype=dtype)
    with pytest.raises(
        ValueError, match="^scale_factor: expected an output of at least 1x1, got 1x0 "
    ):
        argmax(size=None, scale_factor=(0.3, 0.2))
    with pytest.raises(
        ValueError, match="^scale_factor: expected an output of at least 1x1, got 0x1 "
    ):
        argmax(size=None, scale_factor=(0.2, 0.3))


def wrong_tensors() -> list[tuple[str, dict[str, Any], type[Exception], str]]:
    """Each tensor of every op has a dimension less, one channel more, or another device."""
    cases: list[tuple[str, dict[str, Any], type[Exception], str]] = []
    for name, argument in TENSORS:
        tensor = OPS[name].arguments[argument]
        named = f"{argument}|{argument.removeprefix('pool_').removeprefix('project_')}"
        cases.append((name, {argument: tensor[0]}, ValueError, named))
        if argument not in ("input", "logits"):
            larger = torch.cat([tensor, tensor])
            if "weight" not in argument or name == "upsample_cross_entropy":
                cases.append((name, {argument: larger}, ValueError, named))
        if tensor.is_floating_point() and argument not in ("input", "logits", "weight"):
            cases.append(
                (
                    name,
                    {argument: tensor.double()},
                    TypeError,
                    "weights and biases: expected torch.float32",
                )
            )
        if argument not in ("input", "logits"):
            cases.append((name, {argument: tensor.to("meta")}, ValueError, "on cpu, got meta"))
    for name, argument in LISTS:
        first, second = OPS[name].arguments[argument]
        shorter = (argument.removesuffix("s").replace("biase", "bias"), ValueError)
        cases.append((name, {argument: [first, second[0]]}, shorter[1], shorter[0]))
        cases.append((name, {argument: [first]}, ValueError, "expected one"))
        cases.append(
            (name, {argument: [first, second.double()]}, TypeError, "expected torch.float32")
        )
        cases.append((name, {argument: [first, second.to("meta")]}, ValueError, "on cpu, got meta"))
    return cases


@pytest.mark.parametrize(("name", "change", "error", "message"), wrong_tensors())
def test_wrong_shapes_dtypes_and_devices(name, change, error, message):
    with pytest.raises(error, match=message):
        OPS[name](**change)


@pytest.mark.parametrize(
    ("weight_shape", "groups", "fits"),
    [
        ((6, 2, 3, 3), 2, True),
        ((6, 1, 1, 5), 4, False),  # outputs that groups do not divide
        ((4, 1, 1, 5), 4, True),
        ((4, 2, 3, 3), 1, False),
        ((4, 2, 3, 3), -2, False),
        ((4, 4, 2, 3), 1, False),
        ((4, 4, 3, 2), 1, False),
        ((4, 4, 3, 3, 1), 1, False),
    ],
    ids=str,
)
def test_weights_and_groups(weight_shape, groups, fits):
    weight = torch.randn(weight_shape)
    if fits:
        output = dilated_conv2d(X, weight, groups=groups)
        assert_close(output, F.conv2d(X, weight, padding="same", groups=groups))
    else:
        with pytest.raises(ValueError, match="^weight"):
            dilated_conv2d(X, weight, groups=groups)


@pytest.mark.parametrize("kernel", [(3, 3), (1, 3), (3, 1)])
def test_pooling_and_projection_are_pointwise(kernel):
    for argument, channels in (("pool_weight", 4), ("project_weight", 14)):
        message = rf"^{argument}: expected \[K, {channels}, 1, 1\], got "
        with pytest.raises(ValueError, match=message):
            OPS["aspp"](**{argument: torch.zeros(3, channels, *kernel)})
        with pytest.raises(ValueError, match=message):
            OPS["aspp"](**{argument: torch.zeros(3, channels + 1, 1, 1)})


def test_strided_biases_of_aspp():
    operands = random_operands(OPS["aspp"])
    expected = aspp(**operands)
    strided = [torch.stack([bias, -bias], dim=1)[:, 0] for bias in operands["biases"]]
    assert_close(aspp(**operands | {"biases": strided}), expected)


@pytest.mark.parametrize("function", ["size", "scale_factor", "dilation"])
def test_symbolic_numbers_stay_symbolic(function):
    """One graph for all sizes; a dilation is a constant of its graph."""

    def convolve(x):
        return dilated_conv2d(x, W, dilation=2) + x.shape[2]

    functions = {
        "size": lambda x: upsample_argmax(x, (2 * x.shape[2], x.shape[3] + 3)),
        "scale_factor": lambda x: upsample_argmax(x, scale_factor=(2, 1.5)),
        "dilation": convolve,
    }
    graphs = []

    def counting(graph, inputs):
        graphs.append(graph)
        return graph

    torch._dynamo.reset()
    compiled = torch.compile(functions[function], fullgraph=True, dynamic=True, backend=counting)
    for height, width in ((5, 7), (8, 9), (11, 6)):
        x = torch.randn(1, 4, height, width)
        assert_close(compiled(x), functions[function](x))
    assert len(graphs) == 1


def test_export_with_dynamic_sizes():
    class Labels(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            y = dilated_conv2d(x, torch.ones(3, 4, 3, 3), dilation=(x.size(1) // 2, 1))
            return upsample_argmax(y, (x.shape[2] * 2, x.shape[3] * 3))

    sizes = {2: torch.export.Dim.DYNAMIC, 3: torch.export.Dim.DYNAMIC}
    arguments = (torch.randn(1, 4, 5, 6),)
    program = torch.export.export(Labels(), arguments, dynamic_shapes=(sizes,), strict=False)
    x = torch.randn(1, 4, 8, 7)
    assert torch.equal(program.module()(x), Labels()(x))


# Dtypes, with and without autocast.

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
MODES = {
    "off": [],
    "bfloat16": [(torch.bfloat16, True)],
    "float16": [(torch.float16, True)],
    "off inside": [(torch.bfloat16, True), (torch.bfloat16, False)],
    "another inside": [(torch.bfloat16, True), (torch.float16, True)],
}


@contextlib.contextmanager
def autocast(mode: str):
    with contextlib.ExitStack() as stack:
        for dtype, enabled in MODES[mode]:
            stack.enter_context(torch.autocast("cpu", dtype, enabled=enabled))
        yield


def outcome(function: Callable[..., Any], tensors: dict[str, Tensor]) -> Any:
    """The output, or None if the dtypes are an error."""
    try:
        return function(**tensors)
    except (RuntimeError, TypeError):
        return None


def conv2d(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return F.conv2d(input, weight, bias, padding="same")


def one_of_two(branches: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Like conv2d: the first half of the channels of two branches."""

    def convolve(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return branches(input, weight, bias)[:, : weight.size(0)]

    return convolve


def project(input: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """aspp whose branches are identities, so that the convolution of its projection is left."""
    eye = torch.eye(3)[:, :, None, None]
    zeros = torch.zeros(3)
    tensors = [t.to(input.dtype) for t in (eye, zeros, torch.zeros(1, 3, 1, 1), torch.zeros(1))]
    joined = F.pad(weight, (0, 0, 0, 0, 0, 1))
    return aspp(input, [tensors[0]], [tensors[1]], [1], *tensors[2:], joined, bias)


CONVOLUTIONS: dict[str, tuple[Callable[..., Any], Callable[..., Any], int]] = {
    "dilated_conv2d": (dilated_conv2d, conv2d, 3),
    "parallel": (
        one_of_two(lambda x, w, b: parallel_dilated_conv2d(x, [w, w], [b, b], [1, 1])),
        conv2d,
        3,
    ),
    "and_mean": (
        one_of_two(lambda x, w, b: parallel_dilated_conv2d_and_mean(x, [w, w], [1, 1])[0]),
        lambda input, weight, bias: conv2d(input, weight),
        3,
    ),
    "aspp": (project, lambda input, weight, bias: conv2d(input.relu(), weight, bias).relu(), 1),
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_dtypes_are_those_of_conv2d(name, mode):
    """Output, gradients and errors, for every dtype of input, weight and bias."""
    ours, theirs, size = CONVOLUTIONS[name]
    values = {
        "input": torch.randn(1, 3, 4, 5),
        "weight": torch.randn(2, 3, size, size),
        "bias": 5 + torch.randn(2),
    }

    def cast(dtype: torch.dtype) -> torch.dtype:
        return torch.float32 if "off" not in mode and dtype != torch.float64 else dtype

    errors = 0
    for input in DTYPES:
        for weight in DTYPES:
            for bias in DTYPES if name == "dilated_conv2d" else (weight,):
                dtypes = {"input": input, "weight": weight, "bias": bias}
                leaves = [
                    {k: v.to(dtypes[k], copy=True).requires_grad_() for k, v in values.items()}
                    for _ in range(2)
                ]
                with autocast(mode):
                    actual, expected = outcome(ours, leaves[0]), outcome(theirs, leaves[1])
                if cast(input) == cast(weight) != cast(bias):
                    expected = None  # some of PyTorch's kernels convert the bias, ours never do
                assert (actual is None) == (expected is None), dtypes
                if expected is None:
                    errors += 1
                    continue
                assert actual.dtype == expected.dtype, dtypes
                close = {"rtol": 3e-2, "atol": 3e-2} if actual.dtype.itemsize == 2 else {}
                assert_close(actual, expected, **close)
                actual.float().sum().backward()
                expected.float().sum().backward()
                for a, e in zip(leaves[0].values(), leaves[1].values()):
                    assert (a.grad is None) == (e.grad is None)
                    assert a.grad is None or a.grad.dtype == a.dtype == e.grad.dtype
    assert errors > 0


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_upsampling_is_not_autocast(dtype, mode):
    logits = torch.randn(1, 3, 4, 4).to(dtype)
    target = torch.randint(3, (1, 9, 9))
    results = []
    for inner in ("off", mode):
        for weight in (None, torch.tensor([0.3, 1.2, 0.7])):
            leaf = logits.clone().requires_grad_()
            with autocast(inner):
                labels = upsample_argmax(leaf, 9)
                loss = upsample_cross_entropy(leaf, target, weight)
                loss.backward()
            assert loss.dtype == torch.float32 and leaf.grad.dtype == dtype
            results.append((labels, loss.detach(), leaf.grad))
    for actual, expected in zip(results[2:], results[:2]):
        assert all(map(torch.equal, actual, expected))
    exact = F.cross_entropy(F.interpolate(logits.float(), (9, 9), mode="bilinear"), target)
    assert_close(results[0][1], exact)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_mean_has_the_dtype_of_the_input(dtype):
    x, weight = torch.randn(2, 3, 4, 5).to(dtype), torch.randn(2, 3, 1, 1).to(dtype)
    for mode in MODES:
        with autocast(mode):
            _, mean = parallel_dilated_conv2d_and_mean(x, [weight], [1])
            expected = F.adaptive_avg_pool2d(x, 1)
        assert mean.dtype == expected.dtype and mean.shape == expected.shape


@pytest.mark.parametrize("mode", ["bfloat16", "float16"])
def test_an_op_called_by_itself_is_not_autocast(mode):
    """An op called directly matches its fake: compiled graphs call it under autocast, too."""
    ops = torch.ops.deeplab_fast
    x, w, b = torch.randn(1, 8, 5, 4), torch.randn(8, 8, 3, 3), torch.randn(8)
    one, mask = torch.randn(8, 8, 1, 1), [True, True, True]
    geometry = [1, 1], [1, 1], [1, 1], 1
    logits, target = torch.randn(1, 8, 5, 4), torch.randint(8, (1, 9, 9))
    options = (-100, "mean", 0.0, False)
    _, *saved = ops.upsample_cross_entropy(logits, target, None, *options)
    calls = [
        (ops.dilated_conv2d, (x, w, b, [1, 1], 1)),
        (ops.dilated_conv2d_backward, (x, x, w, [1, 1], 1, mask)),
        (ops.parallel_dilated_conv2d, (x, [w], [b], [1])),
        (ops.parallel_dilated_conv2d_and_mean, (x, [w], [1])),
        (ops.parallel_dilated_conv2d_backward, (x, x, [w], [1], mask)),
        (ops.aspp, (x, [w], [b], [1], one, b, torch.randn(8, 16, 1, 1), b)),
        (ops.fused_conv2d, (x, w, b, *geometry, "relu")),
        (ops.upsample_argmax, (logits, [9, 9], None, False, torch.int64)),
        (ops.upsample_cross_entropy, (logits, target, None, *options)),
        (
            ops.upsample_cross_entropy_backward,
            (torch.tensor(1.0), logits, target, None, *saved, *options),
        ),
    ]
    assert {op.__name__ for op, _ in calls} == set(deeplab_fast.backends.registry.ops()) - {
        "fused_conv2d_add_"
    }
    for backend in ("cpu", "reference"):
        for op, arguments in calls:
            expected = tree_leaves(op(*arguments, backend=backend))
            with autocast(mode):
                actual = tree_leaves(op(*arguments, backend=backend))
            with FakeTensorMode(allow_non_fake_inputs=True):
                promised = tree_leaves(op(*arguments, backend=backend))
            for a, e, p in zip(actual, expected, promised, strict=True):
                assert a.dtype == e.dtype == p.dtype and a.shape == p.shape, op
                assert_close(a, e)


def test_meta_tensors():
    """Shapes and dtypes on the meta device, which has no autocast, also under autocast."""
    for name, op in OPS.items():
        on_meta = tree_map_only(Tensor, lambda t: t.to("meta"), op.arguments)
        for mode in ("off", "bfloat16"):
            with autocast(mode):
                actual = tree_leaves(op.function(**on_meta))
            for a, e in zip(actual, tree_leaves(op()), strict=True):
                assert (a.shape, a.dtype, a.device.type) == (e.shape, e.dtype, "meta"), name
