"""Weights for backbones: classifiers of torchvision and timm, and backbones of any DeepLab."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from deeplab_fast.cli import train
from deeplab_fast.cli.errors import UserError
from deeplab_fast.models import DeepLab, DeepLabV3, DeepLabV3Plus
from deeplab_fast.models.backbones import make_backbone
from deeplab_fast.models.checkpoints import read_backbone

from ..support.cases import assert_as_accurate_as
from ..support.peers import Jfzhang, Vainf


def loaded(path: Path, name: str, **options) -> nn.Module:
    backbone = make_backbone(name, 16, **options)
    backbone.load_state_dict(read_backbone(path, name, backbone.state_dict()))
    return backbone.eval()


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2", "mobilenet_v3_large"])
def test_classifiers_of_torchvision(tmp_path, name):
    models = pytest.importorskip("torchvision.models", reason="the peer")
    classifier = getattr(models, name)()
    wrapped = {f"module.{key}": value for key, value in classifier.state_dict().items()}
    torch.save({"model": wrapped, "epoch": 3}, tmp_path / "classifier.pth")
    backbone = loaded(tmp_path / "classifier.pth", name)
    state = {k.removeprefix("features."): v for k, v in classifier.state_dict().items()}
    ours = {k.removeprefix("features."): v for k, v in backbone.state_dict().items()}
    assert_close(ours, {key: state[key] for key in ours}, rtol=0, atol=0)


@pytest.mark.parametrize(
    "theirs, name",
    [("resnet18", "resnet18"), ("resnet50c", "resnet50c"), ("mobilenetv2_100", "mobilenet_v2")],
)
def test_classifiers_of_timm(tmp_path, theirs, name):
    """Features of stride 16 are equal, whatever the keys are."""
    timm = pytest.importorskip("timm", reason="the peer")
    torch.manual_seed(0)
    classifier = timm.create_model(theirs)
    for module in classifier.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            nn.init.normal_(module.bias, 0, 0.1)
    torch.save(classifier.state_dict(), tmp_path / "classifier.pth")
    ours = loaded(tmp_path / "classifier.pth", name)
    images = torch.randn(1, 3, 33, 49)
    features = timm.create_model(theirs, features_only=True, output_stride=16)
    features.load_state_dict(classifier.state_dict(), strict=False)
    features.eval()
    with torch.no_grad():
        actual = ours(images)["out"]
        expected, exact = features(images)[-1], features.double()(images.double())[-1]
    assert_as_accurate_as(actual, expected, exact)


@pytest.mark.parametrize("name", ["resnet10t", "convnext_atto"])
def test_models_of_timm(tmp_path, name):
    timm = pytest.importorskip("timm", reason="the peer")
    classifier = timm.create_model(name)
    torch.save(classifier.state_dict(), tmp_path / "classifier.pth")
    backbone = loaded(tmp_path / "classifier.pth", f"timm/{name}")
    theirs = list(classifier.state_dict().values())
    for tensor in backbone.state_dict().values():
        assert any(torch.equal(tensor, other) for other in theirs)


def check_backbone(path: Path, model: DeepLab) -> None:
    expected = model.backbone.state_dict()
    state = read_backbone(path, model.config["backbone"], expected)
    assert_close(state, dict(expected), rtol=0, atol=0)


def test_backbones_of_deeplabs(tmp_path):
    model = DeepLabV3Plus("mobilenet_v2", 3)
    model.save_pretrained(tmp_path / "own.safetensors")
    check_backbone(tmp_path / "own.safetensors", model)
    for peer in (Vainf(True, "mobilenet"), Jfzhang("mobilenet")):
        torch.save({"state_dict": peer.state_dict()}, tmp_path / "peer.pth")
        check_backbone(tmp_path / "peer.pth", DeepLab.from_pretrained(tmp_path / "peer.pth"))


@pytest.mark.parametrize("prefix", ["backbone.", "encoder."])
def test_backbones_of_other_segmentation_networks(tmp_path, prefix):
    model = DeepLabV3("resnet18", 3)
    state = {prefix + key: value for key, value in model.backbone.state_dict().items()}
    torch.save(state | {"head.weight": torch.ones(1)}, tmp_path / "unet.pth")
    check_backbone(tmp_path / "unet.pth", model)


def test_classifiers_inside_a_backbone(tmp_path):
    """Self-supervised training saves "backbone." with the last layer of the classifier."""
    model = DeepLabV3("resnet18", 3)
    state = model.backbone.state_dict() | {"fc.weight": torch.ones(1)}
    torch.save({f"backbone.{key}": value for key, value in state.items()}, tmp_path / "ssl.pth")
    check_backbone(tmp_path / "ssl.pth", model)


def test_encoders_of_timm_in_a_deeplab(tmp_path):
    """The file does not tell the name of the encoder, which is known here."""
    smp = pytest.importorskip("segmentation_models_pytorch", reason="the peer")
    peer = smp.DeepLabV3Plus("tu-resnet10t", encoder_weights=None)
    torch.save(peer.state_dict(), tmp_path / "peer.pth")
    backbone = loaded(tmp_path / "peer.pth", "timm/resnet10t")
    expected = {f"model.{key}": value for key, value in peer.encoder.model.state_dict().items()}
    assert_close(dict(backbone.state_dict()), expected, rtol=0, atol=0)


def message_of(path: Path, name: str) -> str:
    with pytest.raises(ValueError) as caught:
        loaded(path, name)
    message = str(caught.value)
    assert message.startswith(f"{path}: ") and "\n" not in message and "\x1b" not in message
    return message


def test_weights_that_do_not_fit(tmp_path):
    path = tmp_path / "classifier.pth"
    state: dict[str, Tensor] = dict(make_backbone("resnet34", 16).state_dict())
    del state["bn1.weight"]
    torch.save(state, path)
    message = message_of(path, "resnet18")
    assert "expected weights of resnet18, but tensors do not fit: 1 missing (bn1.weight)" in message
    assert (
        "unexpected (layer1.2.conv1.weight, layer1.2.bn1.weight, layer1.2.bn1.bias, ...)" in message
    )
    path.write_text("<html>")
    assert "got one that starts with b'<html>'" in message_of(path, "resnet18")


def test_imagenet_is_downloaded(monkeypatch):
    """``--backbone-weights imagenet`` loads what torchvision publishes."""
    pytest.importorskip("torchvision", reason="knows the address")
    model = DeepLabV3("resnet18", 3)
    published = {k: torch.full_like(v, 2) for k, v in model.backbone.state_dict().items()}
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", lambda url, **options: published)
    train._load_backbone(model, "imagenet")
    assert_close(model.backbone.conv1.weight, torch.full_like(model.backbone.conv1.weight, 2))

    def fail(url, **options):
        raise OSError("no network")

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", fail)
    with pytest.raises(UserError, match="--backbone-weights: imagenet: .*cannot download"):
        train._load_backbone(model, "imagenet")
