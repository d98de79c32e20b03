"""Backbones against those of other projects, their input channels and ImageNet weights."""

from __future__ import annotations

import copy
import sys
import urllib.error
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.testing import assert_close

from deeplab_fast.cli import main
from deeplab_fast.models import DeepLabV3, DeepLabV3Plus, Preprocessing
from deeplab_fast.models.backbones import imagenet, make_backbone
from deeplab_fast.models.fusion import FusedConv2d
from deeplab_fast.training import Recipe, SegmentationData, TrainingError, evaluate, train
from deeplab_fast.training.step import to_grey

from ..support.batch_norm import with_statistics

MODELS = {"DeepLabV3": DeepLabV3, "DeepLabV3Plus": DeepLabV3Plus}
OURS = (
    *("resnet18", "resnet34", "resnet50", "resnet101", "resnet152", "resnet50c", "resnet101c"),
    *("mobilenet_v2", "mobilenet_v3_large"),
)
# The smallest of each family that timm can dilate, and larger or rarer ones.
SMALL = (
    *("test_resnet", "mobilenetv2_035", "mobilenetv3_small_050", "mobilenetv4_conv_small_035"),
    *("test_efficientnet", "convnext_atto", "regnetx_002"),
)
LARGE = (
    *("resnet18", "resnext50_32x4d", "xception65", "xception71", "res2net50_48w_2s"),
    *("efficientnet_b0", "tf_efficientnet_b0", "convnextv2_atto", "regnety_002", "resnetblur18"),
    *("mobilenetv2_100", "mobilenetv4_conv_medium", "resnetv2_18", "cspdarknet53"),
)


@pytest.fixture(scope="module")
def timm():
    return pytest.importorskip("timm", reason="its models are backbones")


@pytest.fixture(scope="module")
def torchvision():
    return pytest.importorskip("torchvision", reason="its models are the expectation")


def assert_same_features(actual: Tensor, expected: Tensor) -> None:
    """Assert that float64 features agree. Rounding alone explains a difference of 1e-9."""
    assert_close(actual, expected, rtol=1e-6, atol=1e-9 * expected.abs().max().item())


def dilations(module: nn.Module, kernel: int = 3) -> list[int]:
    """Dilations of the convolutions of some size, without those of the stem."""
    convs = [m for m in module.modules() if isinstance(m, nn.Conv2d)]
    return [c.dilation[0] for c in convs if c.kernel_size[0] == kernel and c.in_channels > 32]


# --- interface


@pytest.mark.parametrize(
    "name, output_stride",
    [*((name, 16) for name in OURS), ("resnet18", 8), ("resnet50c", 8), ("mobilenet_v3_large", 8)],
)
def test_shapes_of_features(name, output_stride):
    with torch.device("meta"):
        backbone = make_backbone(name, output_stride)
        features = backbone(torch.empty(2, 3, 65, 33))
    for key, stride in (("low", 4), ("out", output_stride)):
        channels = getattr(backbone, f"{key}_channels")
        assert features[key].shape == (2, channels, -(-65 // stride), -(-33 // stride))
    assert features["aux"].shape[:2] == (2, backbone.aux_channels)
    assert features["aux"].size(2) >= features["out"].size(2)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"name": "resnet19"}, "backbone: expected .*'mobilenet_v3_large' or 'timm/'.*'resnet19'"),
        ({"name": "resnet18", "multi_grid": (1, 2, 4)}, "multi_grid: expected 2 positive ints"),
        ({"name": "timm/resnet18", "multi_grid": (1, 2)}, "multi_grid: only resnets have it"),
        (
            {"name": "timm/resnet18", "backbone_variant": "VainF"},
            "backbone_variant: expected 'torchvision' for timm/resnet18, got 'VainF'",
        ),
        (
            {"name": "mobilenet_v3_large", "backbone_variant": "tensorflow"},
            "backbone_variant: expected 'torchvision' for mobilenet_v3_large, got 'tensorflow'",
        ),
        (
            {"name": "resnet18", "backbone_variant": "tensorflow"},
            "backbone_variant: expected 'torchvision', 'segmentation_models_pytorch', 'VainF', "
            "'jfzhang95' for resnet18, got 'tensorflow'",
        ),
        (
            {"name": "mobilenet_v2", "backbone_variant": "smp"},
            "backbone_variant: expected 'torchvision', 'tensorflow', "
            "'segmentation_models_pytorch', 'VainF', 'jfzhang95' for mobilenet_v2, got 'smp'",
        ),
        ({"name": "resnet18", "in_channels": 0}, "in_channels: expected at least 1, got 0"),
        ({"name": "resnet18", "norm_eps": 0}, "norm_eps: expected a positive number, got 0"),
    ],
)
def test_bad_options(options, message):
    with torch.device("meta"), pytest.raises(ValueError, match=message):
        make_backbone(**({"output_stride": 16} | options))


def test_norm_eps():
    with torch.device("meta"):
        for name, default in (("resnet18", 1e-5), ("mobilenet_v2", 1e-5)):
            eps = {m.eps for m in make_backbone(name, 16).modules() if hasattr(m, "eps")}
            assert eps == {default}
        norms = [m for m in make_backbone("mobilenet_v3_large", 16).modules() if hasattr(m, "eps")]
        assert {(m.eps, m.momentum) for m in norms} == {(1e-3, 0.01)}
        norms = make_backbone("mobilenet_v3_large", 16, norm_eps=0.5).modules()
        assert {m.eps for m in norms if hasattr(m, "eps")} == {0.5}


# --- resnets


@pytest.mark.parametrize("name", ["resnet18", "resnet34"])
def test_same_seed_gives_torchvisions_resnet(torchvision, name):
    torch.manual_seed(2)
    theirs = getattr(torchvision.models, name)().state_dict()
    torch.manual_seed(2)
    ours = DeepLabV3(name).backbone.state_dict()
    expected = {key: tensor for key, tensor in theirs.items() if not key.startswith("fc.")}
    assert list(ours) == list(expected)
    assert_close(ours, expected, rtol=0, atol=0)


def test_resnet152_has_torchvisions_state_dict(torchvision):
    with torch.device("meta"):
        theirs = torchvision.models.resnet152().state_dict()
        ours = make_backbone("resnet152", 8).state_dict()
    shapes = {key: tensor.shape for key, tensor in theirs.items() if not key.startswith("fc.")}
    assert {key: tensor.shape for key, tensor in ours.items()} == shapes


def test_dilations():
    with torch.device("meta"):
        assert dilations(make_backbone("resnet18", 8))[-8:] == [1, 1, 2, 2, 2, 2, 4, 4]
        assert dilations(make_backbone("resnet34", 16))[-6:] == [1, 1, 2, 2, 2, 2]
        assert dilations(make_backbone("resnet18", 8, backbone_variant="VainF"))[-4:] == [
            2,
            2,
            4,
            4,
        ]
        backbone = make_backbone("resnet18", 8, backbone_variant="segmentation_models_pytorch")
        assert dilations(backbone)[-8:] == [2, 2, 2, 2, 4, 4, 4, 4]
        backbone = make_backbone("resnet50", 8, multi_grid=(1, 2, 4), backbone_variant="jfzhang95")
        assert dilations(backbone)[-9:] == [2] * 6 + [4, 8, 16]
        backbone = make_backbone("resnet18", 16, multi_grid=(1, 2))
        assert dilations(backbone)[-4:] == [2, 2, 4, 4]
        for variant, last in (
            ("torchvision", [1, 1, 1] + [1, 2, 2] + [2]),
            ("tensorflow", [1, 1, 1] + [1, 2, 2] + [2]),
            ("segmentation_models_pytorch", [1, 1, 1] + [2, 2, 2] + [2]),
            ("VainF", [1, 1, 1] + [1, 2, 2] + [2]),
            ("jfzhang95", [1, 1, 1] + [1, 1, 1] + [2]),
        ):
            backbone = make_backbone("mobilenet_v2", 16, backbone_variant=variant)
            assert dilations(backbone)[-7:] == last
        backbone = make_backbone("mobilenet_v2", 8, backbone_variant="jfzhang95")
        assert dilations(backbone)[-11:] == [1] * 4 + [2] * 3 + [2] * 3 + [4]
        assert dilations(make_backbone("mobilenet_v3_large", 16), 5) == [1] * 3 + [2] * 3
        backbone = make_backbone("mobilenet_v3_large", 8)
        assert dilations(backbone) == [1, 1, 2, 2, 2, 2, 2, 2]
        assert dilations(backbone, 5) == [1] * 3 + [4] * 3


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2"])
def test_variant_of_segmentation_models_pytorch(name):
    smp = pytest.importorskip("segmentation_models_pytorch", reason="it dilates this way")
    theirs = smp.encoders.get_encoder(name, weights=None, output_stride=8)
    theirs = with_statistics(theirs).double().eval()
    ours = make_backbone(name, 8, backbone_variant="segmentation_models_pytorch").double().eval()
    images = torch.randn(1, 3, 33, 47, dtype=torch.float64)
    assert not ours.load_state_dict(theirs.state_dict(), strict=False).missing_keys
    with torch.no_grad():
        assert_same_features(ours(images)["out"], theirs(images)[-1])


def test_deep_stem_is_that_of_timm(timm):
    """timm's keys of the stem differ; its weights, Gluon's, are ImageNet weights of resnet50c."""
    theirs = timm.create_model("resnet50c", features_only=True, output_stride=8)
    theirs = with_statistics(theirs).double().eval()
    ours = make_backbone("resnet50c", 8).double().eval()
    ours.load_state_dict(imagenet._deep_stem(theirs.state_dict()), strict=True)
    images = torch.randn(1, 3, 33, 47, dtype=torch.float64)
    with torch.no_grad():
        actual, expected = ours(images), theirs(images)
    for key, index in (("low", 1), ("aux", 3), ("out", 4)):
        assert_same_features(actual[key], expected[index])


def test_deep_stem_has_the_keys_of_mmsegmentation():
    with torch.device("meta"):
        state = make_backbone("resnet50c", 8).state_dict()
    stem = {key: tuple(tensor.shape) for key, tensor in state.items() if "stem." in key}
    assert {key: shape for key, shape in stem.items() if len(shape) == 4} == {
        "stem.0.weight": (32, 3, 3, 3),
        "stem.3.weight": (32, 32, 3, 3),
        "stem.6.weight": (64, 32, 3, 3),
    }
    assert {"stem.1.running_mean", "stem.4.running_mean", "stem.7.running_mean"} <= set(stem)
    assert not any(key.startswith(("conv1", "bn1")) for key in state)


# --- mobilenets


def padded_first(features: nn.Sequential, images: Tensor) -> Tensor:
    """torchvision's MobileNetV2 with zeros around the input of each block.

    VainF's DeepLabV3Plus-Pytorch (network/backbone/mobilenetv2.py) and jfzhang95's
    pytorch-deeplab-xception (modeling/backbone/mobilenet.py) compute this.
    """
    x = features[0](images)
    for block in features[1:18]:
        depthwise = block.conv[-3][0]
        padding = depthwise.padding[0]
        depthwise.padding = (0, 0)
        output = block.conv(F.pad(x, [padding] * 4))
        depthwise.padding = (padding, padding)
        x = x + output if block.use_res_connect else output
    return x


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("variant, dilated", [("VainF", (15, 16, 17)), ("jfzhang95", (17,))])
def test_padding_before_the_expansion(torchvision, variant, dilated, training):
    theirs = with_statistics(torchvision.models.mobilenet_v2()).double().train(training)
    if variant == "VainF":
        theirs.features[0][0].padding = (0, 0)
    theirs.features[14].conv[-3][0].stride = (1, 1)
    for block in dilated:
        depthwise = theirs.features[block].conv[-3][0]
        depthwise.dilation, depthwise.padding = (2, 2), (2, 2)
    ours = make_backbone("mobilenet_v2", 16, backbone_variant=variant).double().train(training)
    ours.load_state_dict(theirs.state_dict(), strict=False)
    images = torch.randn(2, 3, 33, 47, dtype=torch.float64)
    with torch.no_grad():
        actual = ours(images)["out"]
        expected = padded_first(theirs.features, images)
    assert_same_features(actual, expected)
    statistics = dict(theirs.named_buffers())
    for name, buffer in ours.named_buffers():
        assert_close(buffer, statistics[name])


def test_bfloat16_gradient_with_padding_before_the_expansion(ran):
    """In channels_last, oneDNN computes wrong weight gradients for this convolution."""
    with torch.device("meta"):
        block = make_backbone("mobilenet_v2", 16, backbone_variant="VainF").features[17]
    conv = block.conv[1][0].to_empty(device="cpu")
    assert conv.padding == (0, 0) and conv.dilation == (2, 2)
    torch.manual_seed(0)
    nn.init.normal_(conv.weight)
    input, grad_output = torch.randn(1, 960, 7, 37), torch.randn(1, 960, 3, 33)

    def weight_gradient(convolve, dtype: torch.dtype, memory_format: torch.memory_format) -> Tensor:
        weight = conv.weight.detach().to(dtype).requires_grad_()
        operands = (
            x.bfloat16().to(dtype, memory_format=memory_format) for x in (input, grad_output)
        )
        x, gradient = operands
        return torch.autograd.grad(convolve(x, weight), weight, gradient)[0].double()

    def torchs(x: Tensor, weight: Tensor) -> Tensor:
        return F.conv2d(x, weight, dilation=2, groups=960)

    def ours(x: Tensor, weight: Tensor) -> Tensor:
        return conv._conv_forward(x, weight, None)

    conv.weight.data = conv.weight.data.bfloat16().float()
    exact = weight_gradient(torchs, torch.float64, torch.contiguous_format)
    sound = weight_gradient(torchs, torch.bfloat16, torch.contiguous_format)
    actual = weight_gradient(ours, torch.bfloat16, torch.channels_last)
    assert ("dilated_conv2d", "cpu") in ran
    assert (actual - exact).norm() <= 2 * (sound - exact).norm() + 1e-6 * exact.norm()


@pytest.fixture(scope="module")
def mobilenets(torchvision) -> tuple[DeepLabV3, nn.Module]:
    """Our and torchvision's mobilenet_v3_large model, from the same seed."""
    torch.manual_seed(3)
    theirs = torchvision.models.segmentation.deeplabv3_mobilenet_v3_large(
        weights=None, weights_backbone=None, num_classes=5, aux_loss=True
    )
    torch.manual_seed(3)
    return DeepLabV3("mobilenet_v3_large", 5, 16, (12, 24, 36), aux_loss=True), theirs


@pytest.mark.parametrize(
    "model, backbone, weights",
    [pytest.param("DeepLabV3", "mobilenet_v3_large", "torchvision", marks=pytest.mark.parity)],
)
def test_mobilenet_v3_matches_torchvision(mobilenets, model, backbone, weights):
    """State dict, outputs, gradients and statistics; float64, because 50 batch norms amplify."""
    ours, theirs = mobilenets
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert_close(ours.state_dict(), theirs.state_dict(), rtol=0, atol=0)
    trained = with_statistics(copy.deepcopy(theirs)).double()
    ours = MODELS[model](backbone, 5, 16, (12, 24, 36), aux_loss=True).double()
    ours.load_state_dict(trained.state_dict(), strict=True)
    images = torch.randn(2, 3, 33, 49, dtype=torch.float64)
    target = torch.randint(5, (2, 33, 49))
    with torch.no_grad():
        actual, expected = (network.eval()(images) for network in (ours, trained))
    assert list(actual) == list(expected) == ["out", "aux"]
    for name in expected:
        assert_same_features(actual[name], expected[name])
    results = []
    for network in (ours.train(), trained.train()):
        torch.manual_seed(4)  # for dropout
        outputs = network(images)
        loss = F.cross_entropy(outputs["out"], target) + F.cross_entropy(outputs["aux"], target)
        loss.backward()
        grads = {name: parameter.grad for name, parameter in network.named_parameters()}
        results.append((dict(outputs), grads, dict(network.named_buffers())))
    assert_close(*results, rtol=1e-6, atol=1e-9)


def test_mobilenet_v3_round_trip(tmp_path, mobilenets):
    model = mobilenets[0].eval()
    model.save_pretrained(tmp_path / "model.safetensors")
    loaded = DeepLabV3.from_pretrained(tmp_path / "model.safetensors")
    assert loaded.config == model.config
    assert_close(loaded.state_dict(), model.state_dict(), rtol=0, atol=0)


# --- timm


@pytest.mark.parametrize(
    "model, backbone, weights",
    [
        pytest.param(
            model,
            f"timm/{name}",
            "timm",
            marks=[pytest.mark.parity("features"), *([pytest.mark.slow] if name in LARGE else [])],
        )
        for name in (*SMALL, *LARGE)
        for model in MODELS
    ],
)
def test_models_of_timm(timm, model, backbone, weights):
    """Features are those of timm's own network, and all weights get gradients."""
    torch.manual_seed(0)
    output_stride = 8 if model == "DeepLabV3" else 16
    theirs = timm.create_model(
        backbone.removeprefix("timm/"), features_only=True, output_stride=output_stride
    ).eval()
    ours = MODELS[model](backbone, 5, output_stride, aux_loss=True).eval()
    ours.backbone.model.load_state_dict(theirs.state_dict(), strict=True)
    images = torch.randn(2, 3, 65, 65)
    with torch.no_grad():
        expected, actual = theirs(images), ours.backbone(images)
    reductions = theirs.feature_info.reduction()
    assert reductions[-1] == output_stride
    low = len(reductions) - 1 - reductions[::-1].index(4)
    for key, index in (("low", low), ("aux", -2), ("out", -1)):
        assert_close(actual[key], expected[index])
    outputs = ours.train()(images)
    assert {key: output.shape for key, output in outputs.items()} == dict.fromkeys(
        ["out", "aux"], (2, 5, 65, 65)
    )
    (outputs["out"].square().sum() + outputs["aux"].square().sum()).backward()
    without = [name for name, parameter in ours.named_parameters() if parameter.grad is None]
    assert without == []


@pytest.mark.parametrize(
    "name, message",
    [
        ("nosuchnet", "timm .* has no model 'nosuchnet'"),
        ("test_resnet.nosuchtag", "test_resnet.nosuchtag cannot be made.*Invalid pretrained tag"),
        ("hf-hub:timm/resnet18", "timm .* has no model 'hf-hub:timm/resnet18'"),
        ("densenet121", "timm's densenet121 cannot be made with output stride 16"),
        ("hrnet_w18_small", "timm's hrnet_w18_small cannot be made with output stride 16"),
        ("ghostnet_100", "timm's ghostnet_100 cannot be made with output stride 16"),
        ("vit_tiny_patch16_224", "timm's vit_tiny_patch16_224 cannot be made with output stride"),
    ],
)
def test_models_of_timm_that_are_no_backbones(timm, name, message):
    with torch.device("meta"), pytest.raises(ValueError, match=message):
        make_backbone(f"timm/{name}", 16)


class Undilated(nn.Module):
    """A network that ignores the output stride, but reports it."""

    def __init__(self, strides: list[int], reported: list[int]) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(4, 4, 1, stride) for stride in strides)
        self.feature_info = SimpleNamespace(reduction=lambda: reported)

    def forward(self, images: Tensor) -> list[Tensor]:
        features, x = [], F.pad(images, (0, 0, 0, 0, 0, 1))
        for conv in self.convs:
            x = conv(x)
            features.append(x)
        return features


@pytest.mark.parametrize(
    "strides, reported, message",
    [
        ([4, 2, 2, 2], [4, 8, 16, 16], "has features of stride 32, expected 16"),
        ([4, 2, 2, 2], [4, 8, 16, 32], "has features of stride 32, expected 16"),
        ([2, 4, 2], [2, 8, 16], r"expected features of stride 4, timm's resnet18 has \[2, 8, 16\]"),
    ],
)
def test_sizes_of_features_are_checked(timm, monkeypatch, strides, reported, message):
    monkeypatch.setattr(timm, "create_model", lambda *args, **kwargs: Undilated(strides, reported))
    with pytest.raises(ValueError, match=message):
        make_backbone("timm/resnet18", 16)


def test_timm_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ImportError, match="timm/resnet18: needs timm: pip install timm"):
        DeepLabV3("timm/resnet18")


@pytest.mark.parametrize("name", ["test_resnet", pytest.param("resnetblur18", id="buffers")])
def test_round_trip_of_models_of_timm(timm, tmp_path, name):
    """resnetblur18 has a buffer outside of its state dict."""
    torch.manual_seed(0)
    model = DeepLabV3Plus(f"timm/{name}", 3, in_channels=2).eval()
    model.save_pretrained(tmp_path / "model.safetensors")
    loaded = DeepLabV3Plus.from_pretrained(tmp_path / "model.safetensors")
    assert loaded.config == model.config and loaded.config["backbone"] == f"timm/{name}"
    images = torch.randn(1, 2, 33, 33)
    with torch.no_grad():
        assert_close(loaded(images)["out"], model(images)["out"])


def test_norm_eps_of_models_of_timm(timm):
    def epsilons(**options) -> set[float]:
        backbone = make_backbone("timm/mobilenetv3_small_050", 16, **options)
        return {m.eps for m in backbone.modules() if isinstance(m, nn.BatchNorm2d)}

    with torch.device("meta"):
        expected = timm.create_model("mobilenetv3_small_050").bn1.eps
        assert epsilons() == {expected}
        assert epsilons(norm_eps=0.25) == {0.25}
        with pytest.raises(ValueError, match="norm_eps: expected None, since timm/convnext_atto"):
            make_backbone("timm/convnext_atto", 16, norm_eps=1e-3)


def test_dilated_convolutions_of_timm_are_ours(timm, ran):
    """oneDNN computes wrong weight gradients for them in bfloat16."""
    backbone = make_backbone("timm/mobilenetv2_035", 8).bfloat16()
    backbone(torch.randn(1, 3, 33, 33).bfloat16())["out"].sum().backward()
    assert ("dilated_conv2d", "cpu") in ran


# --- channels of the images


@pytest.mark.parametrize(
    "name, channels",
    [
        *(("resnet18", 1), ("resnet18", 12), ("resnet50c", 4)),
        *(("mobilenet_v2", 4), ("mobilenet_v3_large", 2), ("timm/test_resnet", 5)),
    ],
)
def test_in_channels(name, channels):
    if name.startswith("timm/"):
        pytest.importorskip("timm", reason="it has the backbone")
    with torch.device("meta"):
        model = DeepLabV3(name, in_channels=channels).eval()
    first = next(p for p in model.backbone.parameters() if p.dim() == 4)
    assert first.size(1) == channels
    with pytest.raises(ValueError, match=rf"images: expected \[N, {channels}, H, W\]"):
        model(torch.empty(1, 3, 33, 33))
    assert len(model.preprocessing.mean) == len(model.preprocessing.std) == channels


@pytest.mark.parametrize("channels", [1, 2, 3, 4, 12])
def test_adapted_weights_are_those_of_timm(timm, channels):
    from timm.models import adapt_input_conv

    state = {"stem.weight": torch.randn(8, 3, 3, 3), "next.weight": torch.randn(8, 8, 3, 3)}
    expected = {key: tensor.clone() for key, tensor in state.items()}
    expected["stem.weight"] = adapt_input_conv(channels, expected["stem.weight"])
    shapes = {"stem.weight": torch.empty(8, channels, 3, 3), "next.weight": torch.empty(8, 8, 3, 3)}
    assert_close(imagenet.adapt_input_channels(state, shapes), expected)


@pytest.fixture(scope="module")
def rgb_file(tmp_path_factory):
    """A small model for RGB images, in a file."""
    torch.manual_seed(6)
    model = DeepLabV3("resnet18", 3, 16, atrous_rates=(6,))
    model.preprocessing = Preprocessing((0.2, 0.3, 0.4), (0.1, 0.2, 0.3), resize=40)
    path = tmp_path_factory.mktemp("rgb") / "model.safetensors"
    model.save_pretrained(path)
    return path, model.eval()


def test_checkpoint_for_other_channels(rgb_file):
    path, rgb = rgb_file
    grey = DeepLabV3.from_pretrained(path, in_channels=1)
    assert grey.config["in_channels"] == grey.in_channels == 1
    assert_close(grey.preprocessing.mean, (0.3,)) and assert_close(grey.preprocessing.std, (0.2,))
    assert grey.preprocessing.resize == 40
    images = torch.randn(1, 1, 33, 33)
    with torch.no_grad():
        expected = rgb(images.expand(1, 3, 33, 33))["out"]
        assert_close(grey(images)["out"], expected, rtol=1e-3, atol=1e-3 * expected.abs().max())
        four = DeepLabV3.from_pretrained(path, in_channels=4)
        assert four.preprocessing.mean == (0.2, 0.3, 0.4, 0.2)
        assert_close(four.backbone.conv1.weight[:, 3], four.backbone.conv1.weight[:, 0])
    assert DeepLabV3.from_pretrained(path).preprocessing == rgb.preprocessing


def test_checkpoint_for_other_channels_is_for_rgb(tmp_path):
    DeepLabV3("resnet18", 2, in_channels=2).save_pretrained(tmp_path / "two.safetensors")
    with pytest.raises(ValueError, match="two.safetensors: recognised.*tensors do not fit"):
        DeepLabV3.from_pretrained(tmp_path / "two.safetensors", in_channels=4)


def test_preprocessing_of_one_channel():
    image = Image.fromarray(torch.randint(256, (5, 5, 3), dtype=torch.uint8).numpy())
    pixels = Preprocessing((0.0,), (1 / 255,), resize=4)(image)
    expected = np.asarray(image.convert("L").resize((4, 4), Image.Resampling.BILINEAR))
    assert_close(pixels, torch.from_numpy(expected.astype(np.float32))[None])
    deep = Image.fromarray(np.full((2, 3), 100 * 257, np.uint16))
    assert_close(Preprocessing((0.0,), (1 / 255,))(deep), torch.full((1, 2, 3), 100.0))
    with torch.device("meta"):
        model = DeepLabV3("resnet18", in_channels=1)
    grey = Image.fromarray(np.full((2, 2), 128, np.uint8))
    rgb = Preprocessing()(grey)
    assert rgb.min() < model.preprocessing(grey).mean() < rgb.max()


@pytest.mark.parametrize(
    "options, message",
    [
        ({"mean": (), "std": ()}, "mean: expected finite numbers, got"),
        ({"mean": (0.5,)}, "std: expected as many numbers as mean, 1, got"),
        ({"mean": (0.5,), "std": (0.0,)}, "std: expected positive numbers"),
    ],
)
def test_bad_statistics(options, message):
    with pytest.raises(ValueError, match=message):
        Preprocessing(**options)


def test_to_grey_rounds_like_pillow():
    images = torch.randint(256, (1, 64, 64, 3), dtype=torch.uint8)
    expected = np.asarray(Image.fromarray(images[0].numpy()).convert("L"))
    assert to_grey(images).shape == (1, 64, 64, 1)
    assert torch.equal(to_grey(images)[0, ..., 0].byte(), torch.from_numpy(expected.copy()))


@pytest.fixture
def data(tmp_path) -> SegmentationData:
    pairs = []
    for i in range(2):
        image, labels = tmp_path / f"{i}.jpg", tmp_path / f"{i}.png"
        Image.fromarray(torch.randint(256, (20, 24, 3), dtype=torch.uint8).numpy()).save(image)
        Image.fromarray(torch.randint(2, (20, 24), dtype=torch.uint8).numpy()).save(labels)
        pairs.append((image, labels))
    return SegmentationData(pairs, ("a", "b"))


def test_grey_model_is_trained_and_evaluated(tmp_path, data):
    model = DeepLabV3("resnet18", 2, 16, atrous_rates=(), in_channels=1)
    recipe = Recipe(epochs=1, batch_size=2, crop_size=(17, 17), dtype="float32")
    train(model, data, data, recipe, tmp_path / "run", workers=0)
    loaded = DeepLabV3.from_pretrained(tmp_path / "run" / "last.safetensors")
    assert loaded.in_channels == len(loaded.preprocessing.mean) == 1
    assert evaluate(loaded, data, workers=0, quiet=True, window=(16, 16), flip=True).miou >= 0


def test_models_of_other_channels_take_no_photos(tmp_path, data):
    model = DeepLabV3("resnet18", 2, 16, atrous_rates=(), in_channels=4)
    message = "image: expected a network of 1 or 3 channels, got one of 4"
    with pytest.raises(ValueError, match=message):
        model.preprocessing(Image.new("RGB", (8, 8)))
    with pytest.raises(TrainingError, match=message):
        evaluate(model, data, workers=0)
    with pytest.raises(TrainingError, match=message):
        train(model, data, data, Recipe(), tmp_path / "run")


def test_command_line_with_other_channels(tmp_path, data, rgb_file, capsys):
    path, output, photo = rgb_file[0], tmp_path / "out", str(data.pairs[0][0])
    for channels in (1, 4):
        model = DeepLabV3.from_pretrained(path, in_channels=channels)
        model.save_pretrained(tmp_path / f"{channels}.safetensors")
    segment = ["segment", photo, "--output", str(output), "--device", "cpu", "--weights"]
    assert main([*segment, str(tmp_path / "1.safetensors")]) == 0
    assert (output / "0_labels.png").exists()
    size = ["--size", "33", "33", "--device", "cpu"]
    assert main(["info", "--model", str(tmp_path / "1.safetensors"), *size]) == 0
    assert "1x1x33x33" in capsys.readouterr().out
    assert main([*segment, str(tmp_path / "4.safetensors")]) != 0
    assert "4.safetensors: image: expected a network of 1 or 3 channels" in capsys.readouterr().err


# --- ImageNet weights


@pytest.fixture
def published(torchvision, monkeypatch):
    """Random weights under the addresses of torchvision's published ones, and those asked for."""
    asked = []

    def download(url, **options):
        assert options["check_hash"] and options["weights_only"]
        asked.append(url)
        name = next(
            name for name in ("mobilenet_v3_large", "mobilenet_v2", "resnet18") if name in url
        )
        torch.manual_seed(8)
        return with_statistics(getattr(torchvision.models, name)()).state_dict()

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", download)
    return asked


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2", "mobilenet_v3_large"])
def test_pretrained_backbone(torchvision, published, name):
    model = DeepLabV3Plus(name, 3, pretrained_backbone=True).eval()
    assert published == [torchvision.models.get_model_weights(name).IMAGENET1K_V1.url]
    torch.manual_seed(8)
    theirs = with_statistics(getattr(torchvision.models, name)()).eval()
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        if name == "resnet18":
            expected = theirs.layer1(theirs.maxpool(theirs.relu(theirs.bn1(theirs.conv1(images)))))
        else:
            expected = theirs.features[:4](images)
        assert_close(model.backbone(images)["low"], expected)
    ours = model.backbone.state_dict()
    theirs = {key.removeprefix("features."): t for key, t in theirs.state_dict().items()}
    assert all(torch.equal(ours[key], theirs[key.removeprefix("features.")]) for key in ours)
    assert model.preprocessing == Preprocessing()
    assert "pretrained_backbone" not in model.config


def test_pretrained_backbone_for_grey_images(published):
    grey = DeepLabV3("resnet18", in_channels=1, pretrained_backbone=True).eval()
    rgb = DeepLabV3("resnet18", pretrained_backbone=True).eval()
    image = torch.randn(1, 1, 33, 33)
    with torch.no_grad():
        actual, expected = grey.backbone(image), rgb.backbone(image.expand(1, 3, 33, 33))
    assert_close(actual["out"], expected["out"], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", ["timm/test_resnet", "timm/mobilenetv3_small_050", "resnet50c"])
def test_pretrained_backbone_of_timm(timm, monkeypatch, name):
    create, asked = timm.create_model, []

    def published(name, pretrained=False, **options):
        if pretrained:
            asked.append(name)
            torch.manual_seed(8)
        model = create(name, **options)
        return with_statistics(model) if pretrained else model

    monkeypatch.setattr(timm, "create_model", published)
    model = DeepLabV3(name, 3, 16, pretrained_backbone=True).eval()
    short = name.removeprefix("timm/")
    assert asked == [short]
    theirs = published(short, True, features_only=True, output_stride=16).eval()
    images = torch.randn(1, 3, 33, 33)
    with torch.no_grad():
        assert_close(model.backbone(images)["out"], theirs(images)[-1])
    cfg = timm.get_pretrained_cfg(short)
    assert (model.preprocessing.mean, model.preprocessing.std) == (cfg.mean, cfg.std)


def test_failed_downloads_say_what_to_do(torchvision, timm, monkeypatch):
    def offline(*args, **options):
        raise urllib.error.URLError("no network")

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", offline)
    message = r"resnet18: cannot download https.*resnet18-f37072fd.pth: .*no network.*/checkpoints"
    with pytest.raises(ConnectionError, match=message):
        DeepLabV3("resnet18", pretrained_backbone=True)
    create = timm.create_model
    monkeypatch.setattr(
        timm,
        "create_model",
        lambda name, pretrained=False, **options: (offline if pretrained else create)(
            name, **options
        ),
    )
    message = r"timm/test_resnet: cannot download timm/test_resnet.r160_in1k: .*hf download timm/"
    with pytest.raises(ConnectionError, match=message):
        DeepLabV3("timm/test_resnet", pretrained_backbone=True)
    with pytest.raises(ValueError, match="mobilenetv4_conv_small_035: timm publishes no weights"):
        DeepLabV3("timm/mobilenetv4_conv_small_035", pretrained_backbone=True)
    monkeypatch.setitem(sys.modules, "torchvision.models", None)
    with pytest.raises(ImportError, match="resnet18: torchvision knows .*pip install torchvision"):
        DeepLabV3("resnet18", pretrained_backbone=True)


# --- prepare_for_inference


@pytest.mark.parametrize(
    "name, options",
    [
        ("resnet18", {"in_channels": 1}),
        ("resnet50c", {"multi_grid": (1, 2, 4)}),
        ("mobilenet_v2", {"backbone_variant": "VainF"}),
        ("mobilenet_v3_large", {}),
        ("timm/test_resnet", {"in_channels": 4}),
        *((f"timm/{name}", {}) for name in SMALL if name != "test_resnet"),
        *(pytest.param(f"timm/{name}", {}, marks=pytest.mark.slow) for name in LARGE),
    ],
    ids=str,
)
def test_prepared_models(name, options):
    """The error against float64 is at most twice that of the model itself."""
    if name.startswith("timm/"):
        pytest.importorskip("timm", reason="it has the backbone")
    torch.manual_seed(0)
    model = with_statistics(DeepLabV3Plus(name, 3, atrous_rates=(6,), **options)).eval()
    prepared = model.prepare_for_inference()
    images = torch.randn(1, model.in_channels, 64, 80)
    with torch.no_grad():
        actual, own = prepared(images)["out"].double(), model(images)["out"].double()
        labels = prepared.predict(images)
        expected = model.double()(images.double())["out"]
    bound = 2 * (own - expected).norm() + 1e-5 * expected.norm()
    assert (actual - expected).norm() <= bound
    chosen = actual.gather(1, labels[:, None])[:, 0]
    assert (actual.amax(1) - chosen).max() <= 1e-5 * actual.abs().max()
    fused = [module for module in prepared.modules() if isinstance(module, FusedConv2d)]
    assert len(fused) > 5
