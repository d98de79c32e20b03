"""Models with one output channel: labels 1 where the upsampled logit is above 0."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from deeplab_fast import DeepLabV3, DeepLabV3Plus, upsample_cross_entropy
from deeplab_fast.models.sliding_window import predict_labels
from deeplab_fast.nn import UpsampleCrossEntropyLoss, UpsampleDiceLoss, UpsampleFocalLoss


@pytest.fixture(scope="module")
def images():
    return torch.randn(2, 3, 33, 49, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def model(images):
    """A model whose logits are above 0 in about half of the pixels."""
    torch.manual_seed(0)
    model = DeepLabV3Plus("mobilenet_v2", 1, 16).eval()
    with torch.no_grad():
        model.classifier[-1].bias -= model(images)["out"].median()
    return model


@pytest.mark.parametrize("prepared", [False, True])
def test_labels(model, images, prepared):
    used = model.prepare_for_inference() if prepared else model
    with torch.no_grad():
        logits = used(images)["out"]
    assert logits.shape == (2, 1, 33, 49)
    for dtype in (torch.int64, torch.uint8):
        labels = used.predict(images, dtype=dtype)
        assert labels.dtype == dtype
        # Rounding decides where a logit is nearly 0.
        wrong = (labels != (logits[:, 0] > 0)) & (logits[:, 0].abs() > 1e-5)
        assert not wrong.any()
        assert 0.3 < labels.float().mean() < 0.7


def test_ties_are_background():
    model = DeepLabV3("resnet18", 1, 16).eval()
    with torch.no_grad():
        model.classifier[-1].weight.zero_()
        model.classifier[-1].bias.zero_()
    assert not model.predict(torch.randn(1, 3, 33, 33)).any()


@pytest.mark.parametrize(
    "views", [{}, {"scales": (0.75, 1.0), "flip": True}, {"window": (32, 32)}], ids=str
)
def test_predict_labels(model, images, views):
    labels = predict_labels(model, images[:1], **views)
    assert labels.dtype == torch.uint8
    assert labels.unique().tolist() == [0, 1]
    if not views:
        assert torch.equal(labels, model.predict(images[:1], dtype=torch.uint8)[0])
    if "scales" in views:  # the mean of the sigmoids of all views
        total = 0
        for scale in (0.75, 1.0):
            size = [round(side * scale) for side in (33, 49)]
            for mirrored in (False, True):
                view = images[:1].flip(3) if mirrored else images[:1]
                if scale != 1:
                    view = F.interpolate(view, size, mode="bilinear", antialias=True)
                with torch.no_grad():
                    low = model.logits(view)["out"]
                    output = F.interpolate(low, (33, 49), mode="bilinear").sigmoid()
                total = total + (output.flip(3) if mirrored else output) / 4
        assert (labels != (total[0, 0] > 0.5)).float().mean() < 0.01


def test_segment(model):
    labels = model.segment(np.random.default_rng(0).integers(0, 255, (40, 30, 3), np.uint8))
    assert labels.shape == (40, 30)
    assert set(np.unique(labels)) <= {0, 1}


def test_names_of_labels(model):
    model = DeepLabV3("resnet18", 1, 16)
    assert (model.label_names, model.num_labels) == (None, 2)
    model.categories = ("road",)
    assert model.label_names == ("background", "road")
    model = DeepLabV3("resnet18", 2, 16)
    model.categories = ("other", "road")
    assert (model.label_names, model.num_labels) == (("other", "road"), 2)


def test_exported_labels(model, images):
    class Predict(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, images):
            return self.model.predict(images)

    program = torch.export.export(Predict(), (images,))
    assert torch.equal(program.module()(images), model.predict(images))


def test_weights_of_segmentation_models_pytorch(tmp_path):
    smp = pytest.importorskip("segmentation_models_pytorch", reason="the peer")
    other = smp.DeepLabV3Plus("mobilenet_v2", encoder_weights=None, classes=1).eval()
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        other.segmentation_head[0].bias -= other(images).median()
        logits = other(images)[:, 0]
    torch.save(other.state_dict(), tmp_path / "other.pth")
    model = DeepLabV3Plus.from_pretrained(tmp_path / "other.pth")
    assert model.num_labels == 2
    labels = model.predict(images)
    assert not ((labels != (logits > 0)) & (logits.abs() > 1e-4)).any()
    assert 0 < labels.sum() < labels.numel()


def test_losses_are_binary():
    torch.manual_seed(0)
    logits, target = torch.randn(2, 1, 5, 5), torch.randint(2, (2, 17, 17))
    upsampled = F.interpolate(logits, (17, 17), mode="bilinear")[:, 0]
    expected = F.binary_cross_entropy_with_logits(upsampled, target.float())
    torch.testing.assert_close(upsample_cross_entropy(logits, target), expected)
    torch.testing.assert_close(UpsampleCrossEntropyLoss()(logits, target), expected)
    full = UpsampleCrossEntropyLoss()(upsampled[:, None], target)  # no upsampling
    torch.testing.assert_close(full, expected)
    each = F.binary_cross_entropy_with_logits(upsampled, target.float(), reduction="none")
    focal = ((1 - torch.exp(-each)) ** 2 * each).mean()
    torch.testing.assert_close(UpsampleFocalLoss()(logits, target), focal)
    p, t = upsampled.sigmoid(), target.float()
    dice = 1 - 2 * (p * t).sum() / (p.sum() + t.sum())
    torch.testing.assert_close(UpsampleDiceLoss(classes=[1])(logits, target), dice)
    with pytest.raises(IndexError, match="2 is not a class: expected 0 to 1"):
        upsample_cross_entropy(logits, target + 1)


def test_learns():
    """A training step lowers the loss, whose gradient was 0 as the cross entropy of one class."""
    torch.manual_seed(0)
    model = DeepLabV3("resnet18", 1, 16).eval()
    images, target = torch.randn(2, 3, 33, 33), torch.ones(2, 33, 33, dtype=torch.uint8)
    loss = upsample_cross_entropy(model.logits(images)["out"], target)
    (grad,) = torch.autograd.grad(loss, model.classifier[-1].bias)
    assert grad < -0.1
