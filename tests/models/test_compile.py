"""torch.compile of models prepared for inference."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from deeplab_fast.backends import registry
from deeplab_fast.models import DeepLabV3

from ..support.batch_norm import with_statistics
from .test_models import assert_labels_of


@pytest.fixture(scope="module")
def images():
    torch.manual_seed(0)
    return torch.randn(2, 3, 33, 41)


@pytest.fixture(scope="module")
@torch.no_grad()
def prepared(images):
    """Prepared models by backbone, which give the pixels of ``images`` different labels."""
    models = {}
    for name in ("resnet50", "mobilenet_v2"):
        model = with_statistics(DeepLabV3(name, num_classes=5)).eval().prepare_for_inference()
        model.classifier[-1].bias -= model(images)["out"].mean((0, 2, 3))
        models[name] = model
    return models


@pytest.fixture
def calls(monkeypatch):
    """The arguments of each fused convolution on the CPU."""
    calls = []

    def recorded(run):
        return lambda arguments: calls.append(arguments) or run(arguments)

    for op in ("fused_conv2d", "fused_conv2d_add_"):
        kernel = registry._kernels[op]["cpu"]
        monkeypatch.setitem(registry._kernels[op], "cpu", kernel._replace(run=recorded(kernel.run)))
    return calls


def compiled(function, **options):
    torch._dynamo.reset()
    return torch.compile(function, fullgraph=True, **options)


@pytest.mark.parametrize(
    "backbone", ["mobilenet_v2", pytest.param("resnet50", marks=pytest.mark.slow)]
)
@torch.no_grad()
def test_forward_and_predict_compile_to_one_graph(prepared, backbone, images):
    model = prepared[backbone]
    logits = compiled(model, backend="eager")(images)["out"]
    assert_close(logits, model(images)["out"])
    labels = compiled(model.predict, backend="eager")(images, dtype=torch.uint8)
    assert labels.dtype == torch.uint8 and len(labels.unique()) > 1
    assert_labels_of(labels, logits)


@pytest.mark.parametrize("backbone, blocks", [("resnet50", 16), ("mobilenet_v2", 10)])
def test_inductor_copies_no_activation(prepared, backbone, blocks, images, calls):
    """Residuals are overwritten in place, and inputs stay channels_last."""
    labels = compiled(prepared[backbone].predict)(images)
    residuals = [call.residual for call in calls if hasattr(call, "residual")]
    assert len(residuals) == blocks
    addresses = {(residual.shape, residual.data_ptr()) for residual in residuals}
    shapes = {shape for shape, _ in addresses}  # those of each stage differ
    assert len(addresses) == len(shapes) < blocks
    for call in calls[1:]:
        assert call.input.is_contiguous(memory_format=torch.channels_last)
    assert_labels_of(labels, prepared[backbone](images)["out"])
