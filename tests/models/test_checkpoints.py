"""Checkpoints of other projects: what is recognised, and that outputs and training are theirs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from deeplab_fast.models import DeepLab, DeepLabV3
from deeplab_fast.models.checkpoints.huggingface import read_model
from deeplab_fast.models.checkpoints.recognition import recognize
from deeplab_fast.models.checkpoints.state_dict import renamed

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
        (32, 48),
        {"output_stride": 8, "atrous_rates": [12, 24, 36], "separable": False},
    ),
    ("DeepLabV3Plus", "resnet18", SMP): (
        lambda: smp_model("DeepLabV3Plus", "resnet18", decoder_channels=64, in_channels=4),
        (32, 48),
        {"output_stride": 16, "separable": True, "aspp_channels": 64, "in_channels": 4},
    ),
    ("DeepLabV3Plus", "resnet34", SMP): (
        lambda: smp_model("DeepLabV3Plus", "resnet34"),
        (32, 48),
        {"output_stride": 16, "atrous_rates": [12, 24, 36], "separable": True},
    ),
    ("DeepLabV3", "resnet50", SMP): (
        lambda: smp_model("DeepLabV3", "resnet50", decoder_aspp_separable=True),
        (32, 48),
        {"separable": True},
    ),
    ("DeepLabV3Plus", "resnet50", SMP): (
        lambda: smp_model("DeepLabV3Plus", "resnet50", decoder_aspp_separable=False),
        (32, 48),
        {"separable": False, "separable_decoder": True},
    ),
    ("DeepLabV3", "mobilenet_v2", SMP): (
        lambda: smp_model("DeepLabV3", "mobilenet_v2"),
        (32, 48),
        {"backbone_variant": SMP, "output_stride": 8},
    ),
    ("DeepLabV3Plus", "mobilenet_v2", SMP): (
        lambda: smp_model("DeepLabV3Plus", "mobilenet_v2"),
        (32, 48),
        {"backbone_variant": SMP, "output_stride": 16},
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
        {"backbone_variant": "VainF"},
    ),
    ("DeepLabV3Plus", "mobilenet_v2", VAINF): (
        lambda: Vainf(True, "mobilenet", separable=True),
        (49, 66),
        {"separable": True, "depthwise_norm": False},
    ),
    ("DeepLabV3Plus", "mobilenet_v2", JFZHANG): (
        lambda: Jfzhang("mobilenet"),
        (49, 66),
        {"backbone_variant": "jfzhang95", "align_corners": True},
    ),
    ("DeepLabV3Plus", "resnet101", JFZHANG): (
        lambda: Jfzhang("resnet"),
        (33, 49),
        {"multi_grid": [1, 2, 4], "backbone_variant": "jfzhang95"},
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


SLOW = {  # large networks whose keys and options are also those of smaller ones
    ("DeepLabV3Plus", "resnet34", SMP),
    ("DeepLabV3", "mobilenet_v2", SMP),
    ("DeepLabV3Plus", "resnet50", VAINF),
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


@pytest.mark.parity("outputs", "one training step")
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


@pytest.mark.parametrize(
    "architecture, encoder, options",
    [
        ("DeepLabV3", "resnet18", {"encoder_output_stride": 16, "decoder_atrous_rates": (2, 4, 6)}),
        ("DeepLabV3Plus", "tu-resnet18", {"encoder_output_stride": 8, "in_channels": 4}),
        ("DeepLabV3Plus", "tu-mobilenetv3_small_050", {"decoder_channels": 32}),
    ],
)
def test_folders_of_segmentation_models_pytorch(tmp_path, architecture, encoder, options):
    """Their config.json names an encoder of timm, the output stride and the rates."""
    torch.manual_seed(0)
    peer = smp_model(architecture, encoder, **options).eval()
    peer.save_pretrained(tmp_path)
    ours = DeepLab.from_pretrained(tmp_path)
    assert type(ours).__name__ == architecture
    images = torch.randn(1, ours.config["in_channels"], 32, 48)
    with torch.no_grad():
        got, theirs = ours(images)["out"], peer(images)
        exact = peer.double()(images.double())
    assert_as_accurate_as(got, theirs, exact)


def test_old_names_of_segmentation_models_pytorch(tmp_path):
    """Up to version 0.3 the decoder of DeepLabV3 was a sequence. Auxiliary heads are left out."""
    torch.manual_seed(0)
    peer = smp_model("DeepLabV3", "resnet18", decoder_channels=16, aux_params={"classes": 2})
    expected = recognize(peer.state_dict(), {})
    names = {
        "decoder.aspp.": "decoder.0.",
        "decoder.conv.": "decoder.1.",
        "decoder.bn.": "decoder.2.",
    }
    old = renamed(peer.state_dict(), names)
    assert old.keys() != peer.state_dict().keys()
    actual = recognize(old, {})
    assert actual.config == expected.config
    assert_close(actual.state, expected.state, rtol=0, atol=0)
    assert not any(key.startswith("classification_head") for key in actual.state)


@pytest.mark.parametrize(
    "description",
    [
        {"meta": {"CLASSES": ("sky", "road", "tree"), "PALETTE": [[0, 0, 0]]}},
        {"meta": {"dataset_meta": {"classes": ("sky", "road", "tree")}}},
        {"dataset_meta": {"classes": ("sky", "road", "tree")}},
    ],
)
def test_mmsegmentation_names_the_classes(tmp_path, description):
    with torch.device("meta"):
        state = Mmseg(False, deep_stem=True, channels=8).state_dict()
    assert recognize(state, description | {"state_dict": state}).categories == (
        "sky",
        "road",
        "tree",
    )
    assert recognize(state, {"meta": None}).categories is None


@pytest.mark.parametrize(
    "make, first_conv",
    [
        (lambda: Vainf(False, "resnet50"), "backbone.conv1.weight"),
        (lambda: Vainf(True, "mobilenet"), "backbone.low_level_features.0.0.weight"),
        (lambda: Jfzhang("resnet"), "backbone.conv1.weight"),
        (lambda: Jfzhang("mobilenet"), "backbone.low_level_features.0.0.weight"),
        (lambda: Mmseg(True, deep_stem=True, channels=8), "backbone.stem.0.weight"),
        (lambda: torchvision_model("resnet50"), "backbone.conv1.weight"),
        (lambda: torchvision_model("mobilenet_v3_large"), "backbone.0.0.weight"),
    ],
)
def test_the_first_convolution_tells_the_channels_of_the_images(make, first_conv):
    with torch.device("meta"):
        state = make().state_dict()
    for key in {first_conv, first_conv.replace("low_level_features", "features")} & state.keys():
        state[key] = state[key][:, :1]
    assert recognize(state, {}).config["in_channels"] == 1


@pytest.mark.parametrize(
    "change, project",
    [
        (lambda key: key.replace("downsample.0", "downsample.1"), "torchvision"),  # ResNet-D
        (lambda key: key.replace("layer4.2", "layer4.3.0"), "torchvision"),
        (lambda key: key.replace("backbone.layer1", "backbone.stages"), "torchvision"),
    ],
)
def test_relatives_of_resnets_are_not_mistaken_for_them(change, project):
    with torch.device("meta"):
        state = DeepLabV3("resnet50").state_dict()
    assert recognize(state, {}).config["backbone"] == "resnet50"
    with pytest.raises(ValueError, match=f"{project} .*unsupported backbone"):
        recognize({change(key): value for key, value in state.items()}, {})
    state["backbone.layer1.0.conv2.weight"] = torch.empty(128, 4, 3, 3)  # ResNeXt
    with pytest.raises(ValueError, match=f"{project} .*unsupported backbone"):
        recognize(state, {})


@pytest.mark.parity("outputs", "one training step")
@pytest.mark.parametrize(
    "model, backbone, weights", [("DeepLabV3", "mobilenet_v2", "Hugging Face")]
)
def test_hugging_face_gives_the_same_logits_and_gradients(tmp_path, model, backbone, weights):
    transformers = pytest.importorskip("transformers", reason="the peer")
    torch.manual_seed(0)
    config = transformers.MobileNetV2Config(
        num_labels=3, output_stride=16, classifier_dropout_prob=0.0
    )
    peer = transformers.MobileNetV2ForSemanticSegmentation(config)
    for module in peer.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            nn.init.uniform_(module.weight, 0.5, 1)
            nn.init.normal_(module.bias, 0, 0.1)
    peer.eval().save_pretrained(tmp_path)
    weights_file = tmp_path / "model.safetensors"
    ours = DeepLab.from_pretrained(weights_file)  # config.json is beside it
    assert type(ours).__name__ == model and ours.config["backbone"] == backbone
    assert_close(ours.state_dict(), DeepLab.from_pretrained(tmp_path).state_dict())

    images = torch.randn(2, 3, 49, 66)
    with torch.no_grad():
        got, theirs = ours.logits(images)["out"], peer(images).logits
        exact = peer.double()(images.double()).logits
    assert_as_accurate_as(got, theirs, exact)

    ours.double().train()
    peer.train()
    ours.classifier[0].project[-1].p = 0.0
    for logits in (ours.logits(images.double())["out"], peer(images.double()).logits):
        generator = torch.Generator().manual_seed(1)
        (
            logits * torch.randn(logits.shape, generator=generator, dtype=logits.dtype)
        ).sum().backward()
    gradients = {name: parameter.grad for name, parameter in peer.named_parameters()}
    unused = {name for name, gradient in gradients.items() if gradient is None}
    assert all("conv_1x1" in name for name in unused)  # of the classifier
    state = {k: gradients.get(k, v) for k, v in peer.state_dict().items() if k not in unused}
    theirs = read_model(tmp_path, weights_file, state).state
    largest = max(parameter.grad.abs().max().item() for parameter in ours.parameters())
    for name, parameter in ours.named_parameters():
        atol = 1e-6 * theirs[name].abs().max().item() + 1e-12 * largest
        assert_close(parameter.grad, theirs[name], rtol=1e-6, atol=atol, msg=name)


@pytest.mark.parametrize(
    "make",
    [
        lambda: Vainf(True, "mobilenet", output_stride=8),
        lambda: Jfzhang("mobilenet", output_stride=8),
        lambda: smp_model("DeepLabV3Plus", "resnet18", encoder_output_stride=8),
    ],
    ids=[VAINF, JFZHANG, SMP],
)
def test_other_output_strides_are_overrides(tmp_path, make):
    torch.manual_seed(0)
    peer = randomized(make)
    torch.save(peer.state_dict(), tmp_path / "checkpoint.pth")
    ours = DeepLab.from_pretrained(tmp_path / "checkpoint.pth", output_stride=8)
    images = torch.randn(1, 3, 32, 48)
    with torch.no_grad():
        got, theirs = ours(images)["out"], peer(images)
        assert_as_accurate_as(got, theirs, peer.double()(images.double()))
