"""The layer of prepared networks against F.conv2d, addition and activation."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_map_only

import deeplab_fast
from deeplab_fast.ops.fused_conv2d import fused_conv2d, fused_conv2d_add_

from .cases import DTYPES, LAYOUTS, assert_as_accurate_as, with_layout
from .refusals import skip_if_refused

OP = "fused_conv2d"
GEOMETRIES = {  # input, weight, (stride, padding, dilation, groups)
    "stem": ((2, 3, 17, 19), (8, 3, 7, 7), ((2, 2), (3, 3), (1, 1), 1)),
    "pointwise": ((2, 8, 9, 7), (16, 8, 1, 1), ((1, 1), (0, 0), (1, 1), 1)),
    "atrous": ((1, 8, 13, 13), (8, 8, 3, 3), ((1, 1), (4, 4), (4, 4), 1)),
    "depthwise": ((2, 6, 12, 10), (6, 1, 3, 3), ((1, 1), (2, 2), (2, 2), 6)),
    "strided": ((1, 4, 11, 11), (4, 4, 3, 3), ((2, 2), (1, 1), (1, 1), 1)),
    "pixel": ((1, 1, 1, 1), (1, 1, 3, 3), ((1, 1), (1, 1), (1, 1), 1)),
}


def definition(input, weight, bias, residual, stride, padding, dilation, groups, activation):
    output = F.conv2d(input, weight, bias, stride, padding, dilation, groups)
    output = output if residual is None else output + residual
    return {"none": lambda x: x, "relu": F.relu, "relu6": F.relu6}[activation](output)


def fused(input, weight, bias, residual, *others):
    if residual is None:
        return fused_conv2d(input, weight, bias, *others)
    return fused_conv2d_add_(residual, input, weight, bias, *others)


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
@pytest.mark.parametrize("name", ["stem", "atrous", "depthwise", "pixel"])
def test_forward(backend, device, ran, name, dtype, with_residual, activation, layout):
    arguments = operands(name, with_residual, dtype, device, layout)
    exact = definition(*tree_map_only(Tensor, Tensor.double, arguments), activation)
    peer = definition(*arguments, activation)
    input, weight, bias, _, *geometry = arguments
    skip_if_refused(backend, OP, input, weight, bias, *geometry, activation)
    with deeplab_fast.backend(backend):
        output = fused(*arguments, activation)
    assert ran == [("fused_conv2d_add_" if with_residual else OP, backend)]
    assert not with_residual or output is arguments[3]
    assert_as_accurate_as(output, peer, exact)


@pytest.mark.parametrize("name", ["pointwise", "strided"])
@pytest.mark.parametrize("with_residual", [False, True])
def test_opcheck_and_compile(backend, device, name, with_residual):
    arguments = operands(name, with_residual, torch.float32, device)
    input, weight, bias, residual, *geometry = arguments
    skip_if_refused(backend, OP, input, weight, bias, *geometry, "relu")
    ops, rest = torch.ops.deeplab_fast, (input, weight, bias, *geometry, "relu")
    if with_residual:
        torch.library.opcheck(ops.fused_conv2d_add_, (residual, *rest), {"backend": backend})
    else:
        torch.library.opcheck(ops.fused_conv2d, rest, {"backend": backend})
    expected = definition(*arguments, "relu")
    torch._dynamo.reset()
    compiled = torch.compile(fused, fullgraph=True, backend="aot_eager")
    with deeplab_fast.backend(backend):
        torch.testing.assert_close(compiled(*arguments, "relu"), expected)


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
