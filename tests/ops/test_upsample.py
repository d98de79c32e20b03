"""Upsampling of full-size logits, which torch.compile leaves to PyTorch's kernel on a CPU."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from deeplab_fast.ops.upsample import upsample

from ..support.cases import LAYOUTS, with_layout


@pytest.fixture
def graphs():
    """The functions called in each graph that :func:`compiled` captures."""
    return []


@pytest.fixture
def compiled(graphs):
    """``upsample`` compiled to one graph, which runs eagerly."""

    def record(graph, inputs):
        graph.graph.eliminate_dead_code()
        graphs.append([node.target for node in graph.graph.nodes if node.op == "call_function"])
        return graph

    torch._dynamo.reset()
    return torch.compile(upsample, fullgraph=True, backend=record)


def interpolated(x, size, align_corners):
    return F.interpolate(x, size, mode="bilinear", align_corners=align_corners)


def test_a_compiled_graph_on_a_cpu_keeps_the_call(compiled, graphs):
    x = torch.randn(2, 5, 4, 3)
    assert torch.equal(compiled(x, (9, 10), False), interpolated(x, (9, 10), False))
    assert graphs == [[torch.ops.deeplab_fast.upsample.default]]


def test_inductor_compiles_the_call_on_other_devices(compiled, graphs):
    assert compiled(torch.empty(2, 5, 4, 3, device="meta"), (9, 10), False).shape == (2, 5, 9, 10)
    assert graphs == [[F.interpolate]]


def test_gradients_of_a_compiled_graph(compiled, graphs):
    x = torch.randn(2, 5, 4, 3, requires_grad=True)
    compiled(x, (9, 10), True).square().sum().backward()
    actual, x.grad = x.grad, None
    interpolated(x, (9, 10), True).square().sum().backward()
    assert_close(actual, x.grad)
    with torch.no_grad():
        compiled(x, (9, 10), True)
    assert graphs == [[F.interpolate], [torch.ops.deeplab_fast.upsample.default]]


def test_a_tangent_inside_of_a_compiled_function():
    x, tangent = torch.randn(2, 2, 5, 4, 3)

    def derivative(x, tangent):
        return torch.func.jvp(lambda x: upsample(x, (9, 10), False), (x,), (tangent,))[1]

    torch._dynamo.reset()
    actual = torch.compile(derivative, backend="eager")(x, tangent)
    assert_close(actual, interpolated(tangent, (9, 10), False))


NEEDS_IS_EXPORTING = pytest.mark.skipif(
    not hasattr(torch.compiler, "is_exporting"),
    reason="this torch has no torch.compiler.is_exporting",
)


@pytest.mark.parametrize("strict", [False, pytest.param(True, marks=NEEDS_IS_EXPORTING)])
def test_exported_programs_have_no_call(strict):
    class Upsample(torch.nn.Module):
        def forward(self, x):
            return upsample(x, (9, 10), False)

    program = torch.export.export(Upsample(), (torch.randn(2, 5, 4, 3),), strict=strict)
    called = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert called and not any("deeplab_fast" in name for name in called)


@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_opcheck(opcheck, layout, align_corners):
    """The fake has the strides of the output."""
    x = with_layout(torch.randn(2, 5, 4, 3), layout)
    op = torch.ops.deeplab_fast.upsample
    opcheck(op, (x, 9, 10, align_corners), {})
    assert torch.equal(op(x, 9, 10, align_corners), interpolated(x, (9, 10), align_corners))
