"""accelerate() on networks that are not DeepLabs: their results stay equal."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.testing import assert_close

import deeplab_fast
from deeplab_fast import UpsampleCrossEntropyLoss
from deeplab_fast.nn.deferred import DeferredUpsampling

from ..support.batch_norm import with_statistics
from ..support.cases import assert_as_accurate_as

CLASSES = 5

pytestmark = pytest.mark.usefixtures("one_thread")


class SegNet(nn.Module):
    """Two stages of SegNet, whose decoder puts values where the encoder's max pooling found them.

    Badrinarayanan et al., SegNet, 2017, section 3.
    """

    def __init__(self) -> None:
        super().__init__()
        widths = (3, 8, 12)
        self.encoder = nn.ModuleList(map(self.stage, widths, widths[1:]))
        self.decoder = nn.ModuleList(map(self.stage, widths[:0:-1], (8, 8)))
        self.pool = nn.MaxPool2d(2, 2, return_indices=True)
        self.unpool = nn.MaxUnpool2d(2, 2)
        self.classifier = nn.Conv2d(8, CLASSES, 3, padding=1)

    @staticmethod
    def stage(in_channels: int, out_channels: int) -> nn.Sequential:
        conv = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        return nn.Sequential(conv, nn.BatchNorm2d(out_channels), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        pooled = []
        for stage in self.encoder:
            x = stage(x)
            size = x.shape
            x, indices = self.pool(x)
            pooled.append((indices, size))
        for stage, (indices, size) in zip(self.decoder, reversed(pooled)):
            x = stage(self.unpool(x, indices, output_size=size))
        return self.classifier(x)


def torchvision(name: str) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        module = "torchvision.models.segmentation"
        models = pytest.importorskip(module, reason="accelerates a model of torchvision")
        return getattr(models, name)(
            weights=None, weights_backbone=None, num_classes=CLASSES, aux_loss=None
        )

    return build


def smp(name: str, encoder: str = "mobilenet_v2", **options: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        module = "segmentation_models_pytorch"
        models = pytest.importorskip(module, reason="accelerates a model of smp")
        return getattr(models, name)(encoder, encoder_weights=None, classes=CLASSES, **options)

    return build


def transformers(name: str, **options: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        module = pytest.importorskip("transformers", reason="accelerates a model of transformers")
        config = getattr(module, f"{name}Config")(num_labels=CLASSES, **options)
        return getattr(module, f"{name}ForSemanticSegmentation")(config)

    return build


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "SegNet": SegNet,
    "fcn_resnet50": torchvision("fcn_resnet50"),
    "lraspp_mobilenet_v3_large": torchvision("lraspp_mobilenet_v3_large"),
    "Unet": smp("Unet", "resnet18"),
    "FPN": smp("FPN"),
    "PAN": smp("PAN"),
    "PSPNet": smp("PSPNet"),
    "UPerNet": smp("UPerNet", decoder_channels=32),
    "Linknet": smp("Linknet"),
    "Segformer": transformers(
        "Segformer", depths=[1, 1], hidden_sizes=[8, 16], num_attention_heads=[1, 2],
        num_encoder_blocks=2, sr_ratios=[2, 1], patch_sizes=[7, 3], strides=[4, 2],
        mlp_ratios=[2, 2], decoder_hidden_size=16,
    ),
    "MobileViT": transformers(
        "MobileViT", image_size=64, hidden_sizes=[16, 20, 24],
        neck_hidden_sizes=[8, 8, 12, 16, 20, 24, 32], num_attention_heads=2, aspp_out_channels=16,
        mlp_ratio=1.0,
    ),
}  # fmt: skip

ENDS_WITH_RESIZE = (
    "fcn_resnet50", "lraspp_mobilenet_v3_large", "FPN", "PAN", "PSPNet", "UPerNet"
)  # fmt: skip
SIZES = {"PAN": 128, "fcn_resnet50": 33}  # PAN takes no smaller images; default: 64


class Case(NamedTuple):
    name: str
    model: nn.Module  # in evaluation mode
    images: Tensor
    exact: Tensor  # logits in float64


@pytest.fixture(scope="module", params=NETWORKS)
def case(request) -> Case:
    torch.manual_seed(0)
    model = with_statistics(NETWORKS[request.param]()).eval()
    size = SIZES.get(request.param, 64)
    images = torch.randn(2, 3, size, size)
    with torch.no_grad():
        exact = logits_of(copy.deepcopy(model).double()(images.double()))
    return Case(request.param, model, images, exact)


def logits_of(output: Any) -> Tensor:
    if isinstance(output, Tensor):
        return output
    return output["out"] if "out" in output else output["logits"]


def resized(logits: Tensor, size: torch.Size) -> Tensor:
    """Logits of the size of the images, as users of transformers resize them."""
    if logits.shape[2:] == size:
        return logits
    return F.interpolate(logits, size, mode="bilinear", align_corners=False)


def training_step(model: nn.Module, images: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """The logits, and the gradients of all parameters that have one."""
    torch.manual_seed(0)  # dropout
    model.train().zero_grad(set_to_none=True)
    logits = logits_of(model(images))
    weights = torch.randn(logits.shape, dtype=logits.dtype)
    (logits * weights).mean().backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return logits.detach(), grads


def test_training_form(case):
    """The step runs in float64, because rounding would change signs, and so whole gradients."""
    plain, images = copy.deepcopy(case.model).double(), case.images.double()
    model = copy.deepcopy(plain)
    classes = [type(module) for module in model.modules()]
    parameters = dict(model.named_parameters())
    assert deeplab_fast.accelerate(model) is model
    assert list(model.state_dict()) == list(plain.state_dict())
    assert all(p is parameters[name] for name, p in model.named_parameters())
    expected, expected_grads = training_step(plain, images)
    logits, grads = training_step(model, images)
    assert_close(logits, expected, rtol=1e-9, atol=1e-9)
    assert grads.keys() == expected_grads.keys()
    largest = max(grad.abs().max().item() for grad in expected_grads.values())
    for name, grad in grads.items():
        assert_close(grad, expected_grads[name], rtol=1e-7, atol=1e-9 * largest, msg=name)
    assert_close(model.state_dict(), plain.state_dict(), rtol=1e-9, atol=1e-9)
    assert deeplab_fast.restore(model) is model
    assert [type(module) for module in model.modules()] == classes


@torch.no_grad()
def test_outputs_of_the_training_form(case):
    model = deeplab_fast.accelerate(copy.deepcopy(case.model))
    plain, last = (
        logits_of(case.model(case.images.contiguous(memory_format=memory_format)))
        for memory_format in (torch.contiguous_format, torch.channels_last)
    )
    assert_as_accurate_as(logits_of(model(case.images)), plain, case.exact, last)


@torch.no_grad()
def test_inference_form(case):
    state = copy.deepcopy(case.model.state_dict())
    fast = deeplab_fast.accelerate(case.model, inference=True)
    assert fast is not case.model
    assert_close(case.model.state_dict(), state, rtol=0, atol=0)
    plain, last = (
        logits_of(case.model(case.images.contiguous(memory_format=memory_format)))
        for memory_format in (torch.contiguous_format, torch.channels_last)
    )
    logits = logits_of(fast(case.images))
    assert_as_accurate_as(logits.contiguous(), plain, case.exact, last)
    labels, exact = fast.predict(case.images), resized(case.exact, case.images.shape[2:])
    assert labels.shape == exact[:, 0].shape and labels.dtype == torch.int64
    chosen = exact.gather(1, labels[:, None])[:, 0]
    allowed = 2 * (logits.double() - case.exact).abs().max() + 1e-6 * exact.abs().max()
    assert (exact.amax(1) - chosen).max() <= allowed


def test_loss_of_deferred_logits(case):
    """The loss before the upsampling is that after it, and so are the gradients."""
    model = copy.deepcopy(case.model)
    target = torch.randint(CLASSES, (2, *case.images.shape[2:]))
    target[:, :9] = 255
    exact = F.cross_entropy(resized(case.exact, case.images.shape[2:]), target, ignore_index=255)

    def gradient() -> Tensor:
        grads = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
        model.zero_grad(set_to_none=True)
        return torch.cat(grads)

    plain = F.cross_entropy(
        resized(logits_of(model(case.images)), case.images.shape[2:]), target, ignore_index=255
    )
    plain.backward()
    expected = gradient()
    deeplab_fast.accelerate(model)
    with deeplab_fast.deferred_upsampling():
        logits = logits_of(model(case.images))
        is_deferred = isinstance(logits, DeferredUpsampling) and logits.is_pending
        assert is_deferred == (case.name in ENDS_WITH_RESIZE)
        loss = UpsampleCrossEntropyLoss(ignore_index=255)(logits, target)
    loss.backward()
    assert_as_accurate_as(loss.detach(), plain.detach(), exact)
    assert (gradient() - expected).norm() <= 1e-3 * expected.norm()
