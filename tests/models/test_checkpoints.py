"""Checkpoints of other projects: what is recognised, and that outputs and training are theirs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from deeplab_fast.models import DeepLab
from deeplab_fast.models.checkpoints.recognition import recognize

from ..support.cases import assert_as_accurate_as
from ..support.peers import Jfzhang, Mmseg, Vainf

TORCHVISION = "torchvision"
SMP = "segmentation_models_pytorch"
VAINF = "VainF/DeepLabV3Plus-Pytorch"
JFZHANG = "jfzhang95/pytorch-deeplab-xception"
MMSEG = "mmsegmentation"


def torchvision_model(backbone: str) -> nn.Module:
    segmentation = pytest.importorskip("torchvision.models.segmentation", reason="the peer")
    make = getattr(segmentation, f"deeplabv3_{backbone}")
    return make(weights=None, weights_backbone=None, num_classes=3, aux_loss=True)


def smp_model(architecture: str, encoder: str, **options: Any) -> nn.Module:
    smp = pytest.importorskip("segmentation_models_pytorch", reason="the peer")
    return getattr(smp, architecture)(encoder, encoder_weights=None, classes=3, **options)


# (model, backbone, project): how to make the peer, the sizes of images, and what must be recognised
# beyond model and backbone. Images of smp have sizes that are divisible by 16.
PEERS: dict[tuple[str, str, str], tuple[Callable[[], nn.Module], tuple[int, int], dict]] = {
    ("DeepLabV3", "resnet50", TORCHVISION): (
        lambda: torchvision_model("resnet50"),
        (33, 41),
        {"output_stride": 8, "aux_loss": True},
    ),
    ("DeepLabV3", "mobilenet_v3_large", TORCHVISION): (
        lambda: torchvision_model("mobilenet_v3_large"),
        (49, 65),
        {"output_stride": 16, "atrous_rates": [12, 24, 36], "aux_loss": True},
    ),
    ("DeepLabV3", "resnet18", SMP): (
        lambda: smp_model("DeepLabV3", "resnet18"),
        (64, 48),
        {"output_stride": 8, "atrous_rates": [12, 24, 36], "separable": False},
    ),
    ("DeepLabV3Plus", "resnet18", SMP): (
        lambda: smp_model("DeepLabV3Plus", "resnet18"),
        (64, 48),
        {"output_stride": 16, "atrous_rates": [12, 24, 36], "separable": True},
    ),
    ("DeepLabV3Plus", "resnet34", SMP): (
        lambda: smp_model("DeepLabV3Plus", "resnet34", decoder_channels=64, in_channels=4),
        (64, 48),
        {"aspp_channels": 64, "in_channels": 4},
    ),
    ("DeepLabV3", "resnet50", SMP): (
        lambda: smp_model("DeepLabV3", "resnet50", decoder_aspp_separable=True),
        (64, 48),
        {"separable": True},
    ),
    ("DeepLabV3Plus", "resnet50", SMP): (
        lambda: smp_model("DeepLabV3Plus", "resnet50", decoder_aspp_separable=False),
        (64, 48),
        {"separable": False, "separable_decoder": True},
    ),
    ("DeepLabV3", "mobilenet_v2", SMP): (
        lambda: smp_model("DeepLabV3", "mobilenet_v2"),
        (64, 48),
        {"last_conv": True, "dilate_first_block": True},
    ),
    ("DeepLabV3Plus", "mobilenet_v2", SMP): (
        lambda: smp_model("DeepLabV3Plus", "mobilenet_v2"),
        (64, 48),
        {"last_conv": True, "output_stride": 16},
    ),
    ("DeepLabV3", "resnet50", VAINF): (
        lambda: Vainf(False, "resnet50"),
        (49, 65),
        {"output_stride": 16, "atrous_rates": None},
    ),
    ("DeepLabV3Plus", "resnet50", VAINF): (
        lambda: Vainf(True, "resnet50"),
        (49, 65),
        {"decoder_convs": 1, "low_level_channels": 48},
    ),
    ("DeepLabV3", "mobilenet_v2", VAINF): (
        lambda: Vainf(False, "mobilenet"),
        (49, 66),
        {"pad_before_expansion": True, "pad_stem": False},
    ),
    ("DeepLabV3Plus", "mobilenet_v2", VAINF): (
        lambda: Vainf(True, "mobilenet", separable=True),
        (49, 66),
        {"separable": True, "depthwise_norm": False},
    ),
    ("DeepLabV3Plus", "mobilenet_v2", JFZHANG): (
        lambda: Jfzhang("mobilenet"),
        (49, 66),
        {"dilate_next_stage": True, "align_corners": True},
    ),
    ("DeepLabV3Plus", "resnet101", JFZHANG): (
        lambda: Jfzhang("resnet"),
        (33, 49),
        {"multi_grid": [1, 2, 4], "dilate_first_block": True},
    ),
    ("DeepLabV3", "resnet50c", MMSEG): (
        lambda: Mmseg(False, deep_stem=True, channels=512),
        (33, 41),
        {"aspp_channels": 512, "head_conv": False, "project_size": 3, "aux_loss": True},
    ),
    ("DeepLabV3Plus", "resnet50c", MMSEG): (
        lambda: Mmseg(True, deep_stem=True, channels=128),
        (33, 41),
        {"separable": True, "depthwise_norm": True, "aux_loss": True},
    ),
    ("DeepLabV3", "resnet50", MMSEG): (
        lambda: Mmseg(False, deep_stem=False, channels=64, aux=False),
        (33, 41),
        {"aspp_channels": 64, "aux_loss": False},
    ),
}


SLOW = {  # resnets of more than 18 layers, of which one for each project is enough every day
    ("DeepLabV3", "resnet50", SMP),
    ("DeepLabV3Plus", "resnet50", SMP),
    ("DeepLabV3", "resnet50", VAINF),
    ("DeepLabV3Plus", "resnet101", JFZHANG),
    ("DeepLabV3", "resnet50c", MMSEG),
    ("DeepLabV3", "resnet50", MMSEG),
}
COMBINATIONS = [
    pytest.param(*names, marks=pytest.mark.slow if names in SLOW else ()) for names in PEERS
]


def randomized(make: Callable[[], nn.Module]) -> nn.Module:
    """A model with random weights and batch norm statistics, for evaluation.

    Its own initialisation takes longer than the test, so it is made without memory. The weights
    repeat the same million numbers.
    """
    with torch.device("meta"):
        model = make()
    model.to_empty(device="cpu")
    noise = torch.randn(2**20 - 3)
    with torch.no_grad():
        for parameter in model.parameters():
            values = noise.repeat(-(-parameter.numel() // len(noise)))[: parameter.numel()]
            fan_in = parameter[0].numel()
            parameter.copy_(values.view(parameter.shape) * (2 / fan_in) ** 0.5)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
            module.num_batches_tracked.zero_()
            nn.init.uniform_(module.weight, 0.5, 1)
            nn.init.normal_(module.bias, 0, 0.1)
    return model.eval()


def outputs(model: nn.Module, images: Tensor) -> dict[str, Tensor]:
    result = model(images)
    return {"out": result} if isinstance(result, Tensor) else dict(result)


def training_step(model: nn.Module, images: Tensor) -> dict[str, Tensor]:
    """Gradients of the parameters and buffers after a step without dropout, by name."""
    model.train()
    for module in model.modules():
        if isinstance(module, (nn.Dropout, nn.Dropout2d)):
            module.p = 0.0
    generator = torch.Generator().manual_seed(1)
    loss = sum(
        (result * torch.randn(result.shape, generator=generator, dtype=result.dtype)).sum()
        for result in outputs(model, images).values()
    )
    loss.backward()
    parameters = model.named_parameters(remove_duplicate=False)  # jfzhang95 has names twice
    return model.state_dict() | {name: parameter.grad for name, parameter in parameters}


@pytest.mark.parity
@pytest.mark.parametrize("model, backbone, weights", COMBINATIONS)
def test_checkpoints_give_the_outputs_and_gradients_of_their_project(
    tmp_path, model, backbone, weights
):
    torch.manual_seed(0)
    make, size, expected = PEERS[model, backbone, weights]
    peer = randomized(make)
    torch.save(peer.state_dict(), tmp_path / "checkpoint.pth")
    ours = DeepLab.from_pretrained(tmp_path / "checkpoint.pth")
    assert type(ours).__name__ == model
    assert ours.config["num_classes"] == 3
    assert ours.config | expected | {"backbone": backbone} == ours.config

    images = torch.randn(2, ours.config["in_channels"], *size)
    with torch.no_grad():
        got, theirs = outputs(ours, images), outputs(peer, images)
        exact = outputs(peer.double(), images.double())
    assert got.keys() == theirs.keys()
    for name in got:
        assert_as_accurate_as(got[name], theirs[name], exact[name])

    # In float64, because batch norm of the two pooled values is nearly a step function: float32
    # gradients are noise in either implementation. The peer's gradients and buffers are renamed
    # and permuted as its weights are.
    got = training_step(ours.double(), images.double())
    theirs = recognize(training_step(peer, images.double()), {}).state
    assert got.keys() == theirs.keys()
    largest = max(tensor.double().abs().max().item() for tensor in theirs.values())
    for name in got:  # the gradient of a bias before a batch norm is 0 up to rounding
        scale = theirs[name].double().abs().max().item()
        atol = 1e-6 * scale + 1e-12 * largest
        assert_close(got[name], theirs[name], rtol=1e-6, atol=atol, msg=name)
