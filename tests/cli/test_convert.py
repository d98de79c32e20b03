"""``deeplab-fast convert``."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from deeplab_fast.cli import main
from deeplab_fast.models import DeepLab, DeepLabV3, DeepLabV3Plus

from ..support.peers import Vainf


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def vainf() -> dict[str, Tensor]:
    torch.manual_seed(0)
    return Vainf(True, "mobilenet").state_dict()


@pytest.fixture(scope="module")
def plain() -> DeepLabV3:
    """A model that torchvision has, too."""
    torch.manual_seed(0)
    return DeepLabV3("mobilenet_v3_large", 3, 16, (12, 24, 36), aux_loss=True).eval()


def convert(capsys, *arguments: str) -> tuple[int, str]:
    status = main(["convert", *arguments])
    captured = capsys.readouterr()
    return status, captured.out + captured.err


def test_a_checkpoint_of_another_project(capsys, vainf):
    torch.save({"model_state": vainf, "best_score": 0.5}, "best.pth")
    assert convert(capsys, "best.pth", "model.safetensors") == (
        0,
        "DeepLabV3Plus with mobilenet_v2, 3 classes, output stride 16, atrous rates 6/12/18: "
        "model.safetensors\n",
    )
    expected = DeepLab.from_pretrained("best.pth")
    model = DeepLab.from_pretrained("model.safetensors")
    assert model.config == expected.config
    assert_close(model.state_dict(), expected.state_dict(), rtol=0, atol=0)


def test_options(capsys, vainf):
    torch.save(vainf, "best.pth")
    options = ["--output-stride", "8", "--atrous-rates", "2", "4", "6"]
    status, line = convert(capsys, "best.pth", "model.safetensors", *options)
    assert status == 0 and "output stride 8, atrous rates 2/4/6" in line
    model = DeepLab.from_pretrained("model.safetensors")
    assert (model.config["output_stride"], model.config["atrous_rates"]) == (8, [2, 4, 6])


@pytest.mark.parametrize("backbone", ["mobilenet_v3_large", "resnet50"])
def test_torchvision_loads_what_was_converted(capsys, plain, backbone):
    segmentation = pytest.importorskip("torchvision.models.segmentation", reason="loads the file")
    model = plain if backbone == "mobilenet_v3_large" else DeepLabV3(backbone, 4).eval()
    model.save_pretrained("model.safetensors")
    assert convert(capsys, "model.safetensors", "model.pth", "--to", "torchvision")[0] == 0
    state = torch.load("model.pth", weights_only=True)
    aux, classes = model.aux_classifier is not None, model.config["num_classes"]
    with torch.device("meta"):
        theirs = getattr(segmentation, f"deeplabv3_{backbone}")(
            weights=None, weights_backbone=None, num_classes=classes, aux_loss=aux
        )
    theirs.load_state_dict(state, strict=True, assign=True)
    images = torch.randn(1, 3, 33, 49)
    with torch.no_grad():
        assert_close(dict(theirs.eval()(images)), dict(model(images)), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "model, reason",
    [
        (lambda: DeepLabV3Plus("resnet18"), "torchvision has no DeepLabV3Plus with resnet18, only"),
        (lambda: DeepLabV3("resnet18"), "torchvision has no DeepLabV3 with resnet18, only deeplab"),
        (
            lambda: DeepLabV3("mobilenet_v3_large", 3, 8, separable=True),
            "deeplabv3_mobilenet_v3_large cannot have output_stride=8 (it has 16), separable=True",
        ),
        (
            lambda: DeepLabV3("mobilenet_v3_large", 3, 16),
            "cannot have atrous_rates=(6, 12, 18) (it has (12, 24, 36))",
        ),
        (
            lambda: DeepLabV3("mobilenet_v3_large", 3, 16, (12, 24, 36), align_corners=True),
            "cannot have align_corners=True (it has False)",
        ),
    ],
)
def test_what_torchvision_does_not_have(capsys, folder, model, reason):
    model().save_pretrained("model.safetensors")
    status, line = convert(capsys, "model.safetensors", "model.pth", "--to", "torchvision")
    assert status == 2 and line.startswith("deeplab-fast: OUT: model.pth: ") and reason in line
    assert line.count("\n") == 1
    assert [path.name for path in folder.iterdir()] == ["model.safetensors"]


def test_the_input_is_never_overwritten(capsys, folder, plain):
    plain.save_pretrained("model.safetensors")
    Path("link.safetensors").symlink_to("model.safetensors")
    before = Path("model.safetensors").read_bytes()
    for output in ("model.safetensors", "./model.safetensors", "link.safetensors"):
        status, line = convert(capsys, "model.safetensors", output)
        assert status == 2 and "is a file of IN (expected another name)" in line
    status, line = convert(capsys, str(folder), "model.safetensors")
    assert status == 2 and "is a file of IN" in line
    assert Path("model.safetensors").read_bytes() == before


def test_a_failed_conversion_keeps_the_previous_file(capsys, folder, monkeypatch, plain):
    plain.save_pretrained("model.safetensors")
    Path("model.pth").write_text("previous")

    def fail(state: object, path: Path) -> None:
        path.write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(torch, "save", fail)
    status, line = convert(capsys, "model.safetensors", "model.pth", "--to", "torchvision")
    assert (status, line) == (2, "deeplab-fast: OUT: model.pth: No space left on device\n")
    assert Path("model.pth").read_text() == "previous"
    assert sorted(path.name for path in folder.iterdir()) == ["model.pth", "model.safetensors"]


def test_errors_are_one_line(capsys, plain):
    Path("page.pth").write_text("<html>")
    assert convert(capsys, "page.pth", "model.safetensors") == (
        2,
        "deeplab-fast: IN: page.pth: expected a file of torch.save or safetensors, got one that "
        "starts with b'<html>'\n",
    )
    plain.save_pretrained("model.safetensors")
    status, line = convert(capsys, "model.safetensors", "out.zip", "--to", "torchvision")
    assert status == 2 and "expected a name that ends in .pth or .pt" in line
