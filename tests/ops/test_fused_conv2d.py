"""The layer of prepared networks against F.conv2d, addition and activation."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_map_only

import deeplab_fast
from deeplab_fast.ops.fused_conv2d import fused_conv2d, fused_conv2d_add_

from ..support.cases import DTYPES, LAYOUTS, assert_as_accurate_as, with_layout
from ..support.unsupported import skip_if_unsupported

OP = "fused_conv2d"
GEOMETRIES = {  # input, weight, (stride, padding, dilation, groups)
    "stem": ((2, 3, 17, 19), (8, 3, 7, 7), ((2, 2), (3, 3), (1, 1), 1)),
    "pointwise": ((2, 8, 9, 7), (16, 8, 1, 1), ((1, 1), (0, 0), (1, 1), 1)),
    "atrous": ((1, 8, 13, 13), (8, 8, 3, 3), ((1, 1), (4, 4), (4, 4), 1)),
    "blocks": ((2, 136, 7, 5), (133, 136, 3, 3), ((1, 1), (2, 3), (2, 3), 1)),
    "depthwise": ((2, 6, 12, 10), (6, 1, 3, 3), ((1, 1), (2, 2), (2, 2), 6)),
    "vectors": ((1, 16, 9, 11), (16, 1, 5, 5), ((1, 1), (2, 6), (1, 3), 16)),
    "strided": ((1, 4, 11, 11), (4, 4, 3, 3), ((2, 2), (1, 1), (1, 1), 1)),
    "wide": ((1, 1030, 7, 9), (6, 1030, 3, 3), ((1, 1), (3, 3), (3, 3), 1)),
    "pixel": ((1, 1, 1, 1), (1, 1, 3, 3), ((1, 1), (1, 1), (1, 1), 1)),
}


CLOSE = {torch.float32: {}, torch.bfloat16: {"rtol": 2e-2, "atol": 5e-2}}


def definition(input, weight, bias, residual, stride, padding, dilation, groups, activation):
    output = F.conv2d(input, weight, bias, stride, padding, dilation, groups)
    output = output if residual is None else output + residual
    return {"none": lambda x: x, "relu": F.relu, "relu6": F.relu6}[activation](output)


def fused(input, weight, bias, residual, *others):
    if residual is None:
        return fused_conv2d(input, weight, bias, *others)
    return fused_conv2d_add_(residual, input, weight, bias, *others)


def call(arguments: list, activation: str) -> tuple:
    """The name of the op and its arguments."""
    input, weight, bias, residual, *geometry = arguments
    rest = input, weight, bias, *geometry, activation
    return ("fused_conv2d", *rest) if residual is None else ("fused_conv2d_add_", residual, *rest)


def operands(name: str, with_residual: bool, dtype, device, layout="channels_last"):
    input_shape, weight_shape, geometry = GEOMETRIES[name]
    input = torch.randn(input_shape)
    weight = 3 * torch.randn(weight_shape) / weight_shape[1] ** 0.5
    bias = torch.randn(weight_shape[0])
    residual = torch.randn(F.conv2d(input, weight, bias, *geometry).shape)
    input, weight, bias, residual = (t.to(device, dtype) for t in (input, weight, bias, residual))
    residual = with_layout(residual, layout) if with_residual else None
    return [with_layout(input, layout), weight, bias, residual, *geometry]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("activation", ["none", "relu", "relu6"])
@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "name", ["stem", "pointwise", "atrous", "blocks", "depthwise", "vectors", "wide", "pixel"]
)
def test_forward(backend, device, ran, name, dtype, with_residual, activation, layout):
    arguments = operands(name, with_residual, dtype, device, layout)
    exact = definition(*tree_map_only(Tensor, Tensor.double, arguments), activation)
    peer = definition(*arguments, activation)
    channels_last = [with_layout(arguments[0], "channels_last"), *arguments[1:]]
    other_peer = definition(*channels_last, activation)
    skip_if_unsupported(backend, *call(arguments, activation))
    with deeplab_fast.backend(backend):
        output = fused(*arguments, activation)
    assert ran == [("fused_conv2d_add_" if with_residual else OP, backend)]
    assert not with_residual or output is arguments[3]
    assert_as_accurate_as(output, peer, exact, other_peer)


def accepted_operands(backend, device, name, with_residual):
    dtype = torch.bfloat16 if backend in ("cuda", "cuda/sm80", "emulated") else torch.float32
    arguments = operands(name, with_residual, dtype, device)
    skip_if_unsupported(backend, *call(arguments, "relu"))
    return arguments


@pytest.mark.parametrize("name", ["pointwise", "depthwise", "strided"])
@pytest.mark.parametrize("with_residual", [False, True])
def test_opcheck(opcheck, backend, device, name, with_residual):
    op, *rest = call(accepted_operands(backend, device, name, with_residual), "relu")
    opcheck(getattr(torch.ops.deeplab_fast, op), tuple(rest), {"backend": backend})


@pytest.mark.parametrize("name", ["pointwise", "depthwise", "strided"])
@pytest.mark.parametrize("with_residual", [False, True])
def test_compile(backend, device, name, with_residual):
    arguments = accepted_operands(backend, device, name, with_residual)
    expected = definition(*arguments, "relu")
    torch._dynamo.reset()
    compiled = torch.compile(fused, fullgraph=True, backend="aot_eager")
    close = CLOSE[arguments[0].dtype]
    with deeplab_fast.backend(backend):
        torch.testing.assert_close(compiled(*arguments, "relu"), expected, **close)


@pytest.mark.parametrize("name", ["atrous", "depthwise"])
def test_the_residual_may_be_the_input(backend, device, name):
    input, weight, bias, _, *geometry = operands(name, False, torch.bfloat16, device)
    skip_if_unsupported(backend, *call([input, weight, bias, input, *geometry], "relu"))
    expected = definition(input, weight, bias, input, *geometry, "relu")
    with deeplab_fast.backend(backend):
        output = fused_conv2d_add_(input, input, weight, bias, *geometry, "relu")
    assert output is input
    torch.testing.assert_close(output, expected, **CLOSE[torch.bfloat16])


@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("name", ["atrous", "depthwise"])
def test_strides_of_the_bias(backend, device, name, with_residual):
    arguments = operands(name, with_residual, torch.bfloat16, device)
    arguments[2] = torch.randn(2 * len(arguments[2])).to(device, torch.bfloat16)[::2]
    skip_if_unsupported(backend, *call(arguments, "relu"))
    expected = definition(*arguments, "relu")
    with deeplab_fast.backend(backend):
        output = fused(*arguments, "relu")
    torch.testing.assert_close(output, expected, **CLOSE[torch.bfloat16])


def test_only_the_residual_is_written():
    arguments = operands("atrous", True, torch.float32, "cpu")
    before = tree_map_only(Tensor, Tensor.clone, arguments)
    fused(*arguments, "relu")
    for position in (0, 1, 2):
        assert torch.equal(arguments[position], before[position])
    assert not torch.equal(arguments[3], before[3])


def test_gradient_is_an_error():
    arguments = operands("atrous", False, torch.float32, "cpu")
    arguments[0].requires_grad_()
    with pytest.raises(NotImplementedError, match="it is for inference"):
        fused(*arguments, "relu").sum().backward()


@pytest.mark.parametrize("with_residual", [False, True])
def test_emulated_keeps_nan(with_residual):
    arguments = operands("depthwise", with_residual, torch.float32, "cpu")
    arguments[0][0, 2, 5, 5] = float("nan")
    with deeplab_fast.backend("emulated"):
        output = fused(*arguments, "relu6")
    expected = definition(*arguments[:3], None, *arguments[4:], "relu6")
    assert torch.equal(output.isnan(), expected.isnan())


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"stride": (2, 2)}, r"takes stride \(1, 1\) only, got \(2, 2\)"),
        ({"padding": (2, 1)}, r'"same" .* only, got a \(3, 3\) weight with padding \(2, 1\)'),
        ({"weight": torch.zeros(6, 1, 2, 3)}, r"got a \(2, 3\) weight"),
        ({"bias": torch.zeros(6).half()}, "input and the bias differ in dtype"),
        ({"bias": torch.zeros(5)}, "shapes of weight and bias do not fit"),
        ({"residual": torch.zeros(2, 6, 12, 10).half()}, "input and the residual differ in dtype"),
        ({"residual": torch.zeros(2, 6, 12, 9)}, "residual does not have the shape of the output"),
    ],
)
def test_emulated_depthwise_refuses(change, reason):
    names = ("input", "weight", "bias", "residual", "stride", "padding", "dilation", "groups")
    named = dict(zip(names, operands("depthwise", True, torch.float32, "cpu"))) | change
    with deeplab_fast.backend("emulated"), pytest.raises(RuntimeError, match=reason):
        fused(*named.values(), "none")
