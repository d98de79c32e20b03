"""The layer of prepared networks against F.conv2d, addition and activation."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import deeplab_fast
from deeplab_fast.ops.fused_conv2d import fused_conv2d

from .cases import DTYPES, assert_as_accurate_as, with_layout

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


def operands(name: str, with_residual: bool, dtype, device):
    input_shape, weight_shape, geometry = GEOMETRIES[name]
    input = torch.randn(input_shape)
    weight = 3 * torch.randn(weight_shape) / weight_shape[1] ** 0.5
    bias = torch.randn(weight_shape[0])
    tensors = [t.to(device, dtype) for t in (input, weight, bias)]
    shape = F.conv2d(*tensors, *geometry).shape
    residual = torch.randn(shape).to(device, dtype) if with_residual else None
    return [*tensors, residual, *geometry]


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("activation", ["none", "relu", "relu6"])
@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", GEOMETRIES)
def test_forward(backend, device, ran, name, dtype, with_residual, activation, layout):
    arguments = operands(name, with_residual, dtype, device)
    arguments[0] = with_layout(arguments[0], layout)
    if why := deeplab_fast.backends.why_not(OP, backend, device, *arguments, activation):
        pytest.skip(why)
    with deeplab_fast.backend(backend):
        output = fused_conv2d(*arguments, activation)
    assert ran == [(OP, backend)]
    doubles = [t.double() if isinstance(t, torch.Tensor) else t for t in arguments]
    exact = definition(*doubles, activation)
    assert_as_accurate_as(output, definition(*arguments, activation), exact)


def test_opcheck_and_compile(backend, device):
    arguments = operands("strided", True, torch.float32, device)
    op = torch.ops.deeplab_fast.fused_conv2d
    torch.library.opcheck(op, (*arguments, "relu"), {"backend": backend})
    torch._dynamo.reset()
    compiled = torch.compile(fused_conv2d, fullgraph=True, backend="aot_eager")
    with deeplab_fast.backend(backend):
        output = compiled(*arguments, "relu")
    torch.testing.assert_close(output, definition(*arguments, "relu"))


def test_inputs_are_not_changed():
    arguments = operands("atrous", True, torch.float32, "cpu")
    arguments = [with_layout(t, "channels_last") if torch.is_tensor(t) and t.dim() == 4 else t
                 for t in arguments]  # fmt: skip
    before = [t.clone() if torch.is_tensor(t) else t for t in arguments]
    fused_conv2d(*arguments, "relu")
    for a, b in zip(arguments, before, strict=True):
        assert torch.equal(a, b) if torch.is_tensor(a) else a == b


def test_gradient_is_an_error():
    arguments = operands("atrous", False, torch.float32, "cpu")
    arguments[0].requires_grad_()
    with pytest.raises(NotImplementedError, match="it is for inference"):
        fused_conv2d(*arguments, "relu").sum().backward()
