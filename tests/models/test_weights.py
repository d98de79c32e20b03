"""Pretrained weights: torchvision's, Hugging Face folders and files of save_pretrained."""

from __future__ import annotations

import json
import sys
import urllib.error
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.testing import assert_close

from deeplab_fast import upsample_argmax
from deeplab_fast.models import DeepLabV3, Preprocessing

# --- torchvision


@pytest.fixture(scope="module")
def torchvision_state() -> dict[str, Tensor]:
    segmentation = pytest.importorskip("torchvision.models.segmentation")
    torch.manual_seed(0)
    model = segmentation.deeplabv3_resnet50(weights=None, weights_backbone=None, aux_loss=True)
    return model.state_dict()


@pytest.mark.parametrize("wrapped", [False, True])
def test_torchvision_checkpoint(tmp_path, torchvision_state, wrapped):
    path = tmp_path / "checkpoint.pth"
    torch.save({"model": torchvision_state, "epoch": 3} if wrapped else torchvision_state, path)
    model = DeepLabV3.from_pretrained(path)
    assert model.config["backbone"] == "resnet50"
    assert model.config["num_classes"] == 21
    assert model.config["output_stride"] == 8
    assert not model.training
    assert model.preprocessing == Preprocessing(resize=520)
    assert_close(model.state_dict(), torchvision_state, rtol=0, atol=0)


def test_torchvision_checkpoint_determines_the_architecture(tmp_path):
    """The checkpoint is a resnet101 in half precision without auxiliary classifier."""
    state = DeepLabV3("resnet101", num_classes=4).half().state_dict()
    torch.save(state, tmp_path / "checkpoint.pt")
    model = DeepLabV3.from_pretrained(tmp_path / "checkpoint.pt", output_stride=16)
    assert model.config["backbone"] == "resnet101"
    assert model.aux_classifier is None
    assert model.classifier[4].weight.shape == (4, 256, 1, 1)
    assert model.classifier[0].convs[1][0].dilation == (6, 6)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_published_weights_are_downloaded(monkeypatch, torchvision_state):
    asked = []

    def download(url, **options):
        asked.append(url)
        assert options["weights_only"] and options["check_hash"]
        return torchvision_state

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", download)
    model = DeepLabV3.from_pretrained("deeplabv3_resnet50")
    assert asked == ["https://download.pytorch.org/models/deeplabv3_resnet50_coco-cd0a2569.pth"]
    assert model.aux_classifier is not None
    assert model.categories[0] == "__background__" and len(model.categories) == 21


def test_failed_download_is_an_error_with_advice(monkeypatch):
    pytest.importorskip("torchvision")

    def download(url, **options):
        raise urllib.error.URLError("Name or service not known")

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", download)
    with pytest.raises(ConnectionError, match="cannot download https://.*give its path"):
        DeepLabV3.from_pretrained("deeplabv3_resnet101")


def test_names_need_torchvision(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision.models", None)
    with pytest.raises(ImportError, match="pip install torchvision"):
        DeepLabV3.from_pretrained("deeplabv3_resnet50")


# --- save_pretrained


@pytest.fixture
def saved(tmp_path) -> tuple[DeepLabV3, Path]:
    torch.manual_seed(0)
    model = DeepLabV3("mobilenet_v2", 3, 16, (3, 5), aux_loss=True, align_corners=True).eval()
    model.preprocessing = Preprocessing((0.1, 0.2, 0.3), (1.0, 2.0, 3.0), 65, (33, 65))
    model.categories = ("sky", "tree", "road")
    path = tmp_path / "model.safetensors"
    model.to(memory_format=torch.channels_last).save_pretrained(path)
    return model, path


def assert_same_model(loaded: DeepLabV3, model: DeepLabV3) -> None:
    """Assert equal weights, and equal outputs up to the rounding of other memory formats."""
    assert_close(loaded.state_dict(), model.state_dict(), rtol=0, atol=0)
    images = torch.randn(1, 3, 34, 49)
    with torch.no_grad():
        assert_close(dict(loaded(images)), dict(model(images)))


def test_round_trip(saved):
    model, path = saved
    state = torch.get_rng_state()
    loaded = DeepLabV3.from_pretrained(str(path))
    assert torch.equal(torch.get_rng_state(), state)
    assert not DeepLabV3.from_pretrained(path, align_corners=False).align_corners
    with path.open("r+b") as file:  # loaded tensors must not be mapped to the file
        file.write(bytes(path.stat().st_size))
    assert loaded.config == model.config
    assert loaded.preprocessing == model.preprocessing
    assert loaded.categories == model.categories
    assert not loaded.training
    assert all(parameter.requires_grad for parameter in loaded.parameters())
    assert_same_model(loaded, model)


def test_files_of_version_0_1_0_are_read(saved):
    """Their metadata names the atrous rates "rates"."""
    model, path = saved
    with safe_open(path, framework="pt") as file:
        description = json.loads(file.metadata()["deeplab_fast"])
    description["config"]["rates"] = description["config"].pop("atrous_rates")
    save_file(load_file(path), path, metadata={"deeplab_fast": json.dumps(description)})
    loaded = DeepLabV3.from_pretrained(path)
    assert loaded.config == model.config
    assert_same_model(loaded, model)


@pytest.mark.parametrize("tf_padding, variant", [(True, "tensorflow"), (False, "torchvision")])
def test_files_of_version_0_2_0_are_read(tmp_path, tf_padding, variant):
    """Their metadata has "tf_padding" instead of "backbone_variant", and always "norm_eps"."""
    model = DeepLabV3("mobilenet_v2", 3, atrous_rates=(), backbone_variant=variant, norm_eps=1e-5)
    path = tmp_path / "model.safetensors"
    model.save_pretrained(path)
    with safe_open(path, framework="pt") as file:
        description = json.loads(file.metadata()["deeplab_fast"])
    del description["architecture"], description["config"]["backbone_variant"]
    description["config"]["tf_padding"] = tf_padding
    save_file(load_file(path), path, metadata={"deeplab_fast": json.dumps(description)})
    loaded = DeepLabV3.from_pretrained(path)
    assert loaded.config == model.config
    padding = loaded.backbone.features[0][0].padding
    assert padding == ((0, 0) if tf_padding else (1, 1))


def test_saving_after_a_new_classifier(saved):
    model, path = saved
    model.classifier[-1], model.aux_classifier = torch.nn.Conv2d(256, 7, 1), None
    model.align_corners = False
    model.save_pretrained(path)
    loaded = DeepLabV3.from_pretrained(path)
    assert_same_model(loaded, model)


def test_failed_save_keeps_the_previous_file(saved, monkeypatch):
    model, path = saved
    before = path.read_bytes()

    def fail(tensors, filename, metadata):
        Path(filename).write_bytes(b"half")
        raise OSError("No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("deeplab_fast.models.checkpoints.safetensors_file.save_file", fail)
        with pytest.raises(OSError, match="No space"):
            model.save_pretrained(path)
    assert path.read_bytes() == before
    model.save_pretrained(path)
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_saved_files_have_the_default_permissions(saved):
    path = saved[1]
    other = path.with_name("other")
    other.touch()
    assert path.stat().st_mode == other.stat().st_mode


# --- other files


def test_missing_files_are_errors(tmp_path):
    with pytest.raises(FileNotFoundError, match="absent.pth: no such file.*deeplabv3_resnet50"):
        DeepLabV3.from_pretrained(tmp_path / "absent.pth")
    with pytest.raises(FileNotFoundError, match=r"config.json: not found"):
        DeepLabV3.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "content", [b"", b"no checkpoint", b"PK\x03\x04 cut", b"\x80\x02cos\nsystem\n."]
)
@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_damaged_files(tmp_path, content, suffix):
    path = tmp_path / f"damaged.{suffix}"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"damaged.{suffix}: "):
        DeepLabV3.from_pretrained(path)


def test_truncated_file(saved):
    path = saved[1]
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(ValueError, match="model.safetensors: not a readable safetensors file"):
        DeepLabV3.from_pretrained(path)


def test_weights_of_other_networks_are_errors(tmp_path, torchvision_state):
    path = tmp_path / "other.pth"
    for content in [[1, 2], {}, {1: torch.zeros(3)}, {"model": [1]}]:
        torch.save(content, path)
        with pytest.raises(
            ValueError, match="other.pth: expected the state dict of a network, got"
        ):
            DeepLabV3.from_pretrained(path)
    torch.save({"conv1.weight": torch.zeros(3)}, path)
    with pytest.raises(
        ValueError, match="other.pth: expected .* a DeepLab of torchvision, .*conv1"
    ):
        DeepLabV3.from_pretrained(path)
    torch.save(dict(torchvision_state) | {"classifier.4.weight": 21}, path)
    with pytest.raises(ValueError, match="other.pth: expected .* a DeepLab of torchvision, .* got"):
        DeepLabV3.from_pretrained(path)
    state = dict(torchvision_state)
    del state["classifier.1.weight"]
    torch.save(state, path)
    with pytest.raises(
        ValueError, match=r"other.pth: recognised .* 1 missing \(classifier.1.weight"
    ):
        DeepLabV3.from_pretrained(path)
    save_file({"weight": torch.zeros(3)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="other.safetensors: expected the state dict of a DeepLab"):
        DeepLabV3.from_pretrained(tmp_path / "other.safetensors")
    (tmp_path / "other.txt").write_text("text")
    with pytest.raises(
        ValueError,
        match="other.txt: expected a file of torch.save or safe.*got one that starts with b'text'",
    ):
        DeepLabV3.from_pretrained(tmp_path / "other.txt")


@pytest.mark.parametrize(
    "change, message",
    [
        ("no JSON", "malformed: JSONDecodeError"),
        ([], "malformed: TypeError"),
        ({"preprocessing": None}, "malformed: AttributeError"),
        ({"preprocessing": {"resize": "big"}}, "resize: expected a positive int or None"),
        ({"preprocessing": {"crop": [1]}}, "crop: expected two positive ints or None"),
        ({"preprocessing": {"mean": [0, 0]}}, "std: expected as many numbers as mean, 2"),
        ({"config": 3}, "malformed: TypeError"),
        ({"categories": 3}, "malformed: TypeError"),
        ({"categories": ["sky"]}, "expected as many categories as classes, got 1 for 3"),
    ],
)
def test_malformed_descriptions(saved, change, message):
    path = saved[1]
    with safe_open(path, framework="pt") as file:
        description = json.loads(file.metadata()["deeplab_fast"])
    text = json.dumps(description | change if isinstance(change, dict) else change)
    text = change if isinstance(change, str) else text
    save_file(load_file(path), path, metadata={"deeplab_fast": text})
    with pytest.raises(ValueError, match=rf"model.safetensors: .*{message}"):
        DeepLabV3.from_pretrained(path)


def test_unknown_override(saved):
    with pytest.raises(
        ValueError, match="model.safetensors: .*unexpected keyword argument 'depth'"
    ):
        DeepLabV3.from_pretrained(saved[1], depth=3)


# --- Hugging Face folders

CHANNELS = (16, 24, 24, 32, 32, 32, 64, 64, 64, 64, 96, 96, 96, 160, 160, 160, 320)
STRIDES = (2, 1, 2, 1, 1, 2, 1, 1, 1, 1, 1, 1, 2, 1, 1, 1)
DILATIONS = {8: [1] * 6 + [2] * 7 + [4] * 3, 16: [1] * 13 + [2] * 3}
NORM = ("running_mean", "running_var", "weight", "bias")


def transformers_state(num_classes: int) -> dict[str, Tensor]:
    """Random weights with the keys of MobileNetV2ForSemanticSegmentation."""
    state = {}

    def layer(name: str, in_channels: int, channels: int, kernel: int = 1) -> None:
        scale = (2 / (in_channels * kernel**2)) ** 0.5
        weight = scale * torch.randn(channels, in_channels, kernel, kernel)
        state[f"{name}.convolution.weight"] = weight
        state[f"{name}.normalization.running_mean"] = 0.1 * torch.randn(channels)
        state[f"{name}.normalization.running_var"] = torch.rand(channels) / 100  # eps matters
        state[f"{name}.normalization.weight"] = 0.1 * torch.rand(channels)
        state[f"{name}.normalization.bias"] = torch.randn(channels)
        state[f"{name}.normalization.num_batches_tracked"] = torch.tensor(0)

    stem = "mobilenet_v2.conv_stem"
    layer(f"{stem}.first_conv", 3, 32, 3)
    layer(f"{stem}.conv_3x3", 1, 32, 3)
    layer(f"{stem}.reduce_1x1", 32, 16)
    for i, (in_channels, channels) in enumerate(zip(CHANNELS, CHANNELS[1:])):
        layer(f"mobilenet_v2.layer.{i}.expand_1x1", in_channels, 6 * in_channels)
        layer(f"mobilenet_v2.layer.{i}.conv_3x3", 1, 6 * in_channels, 3)
        layer(f"mobilenet_v2.layer.{i}.reduce_1x1", 6 * in_channels, channels)
    layer("mobilenet_v2.conv_1x1", 320, 1280)
    layer("segmentation_head.conv_pool", 320, 256)
    layer("segmentation_head.conv_aspp", 320, 256)
    layer("segmentation_head.conv_projection", 512, 256)
    name = "segmentation_head.classifier.convolution"
    state[f"{name}.weight"] = torch.randn(num_classes, 256, 1, 1) / 16
    state[f"{name}.bias"] = torch.randn(num_classes)
    return state


def transformers_logits(
    state: dict[str, Tensor], images: Tensor, output_stride: int, tf_padding: bool = True
) -> Tensor:
    """MobileNetV2ForSemanticSegmentation as plain functions."""

    def conv(x: Tensor, name: str, stride=1, dilation=1, activation=F.relu6, eps=1e-3) -> Tensor:
        weight = state[f"{name}.convolution.weight"]
        padding = []
        for size, kernel in ((x.size(3), weight.size(3)), (x.size(2), weight.size(2))):
            total = kernel - 1
            if tf_padding:
                total = max(kernel - (size % stride or stride), 0)
            padding += [total // 2 * dilation, (total - total // 2) * dilation]
        groups = x.size(1) // weight.size(1)
        x = F.conv2d(F.pad(x, padding), weight, None, stride, 0, dilation, groups)
        norm = [state[f"{name}.normalization.{key}"] for key in NORM]
        x = F.batch_norm(x, *norm, eps=eps)
        return activation(x) if activation else x

    x = conv(images, "mobilenet_v2.conv_stem.first_conv", stride=2)
    x = conv(x, "mobilenet_v2.conv_stem.conv_3x3")
    x = conv(x, "mobilenet_v2.conv_stem.reduce_1x1", activation=None)
    reached = 2
    for i, (stride, dilation) in enumerate(zip(STRIDES, DILATIONS[output_stride])):
        stride = 1 if reached == output_stride else stride
        reached *= stride
        y = conv(x, f"mobilenet_v2.layer.{i}.expand_1x1")
        y = conv(y, f"mobilenet_v2.layer.{i}.conv_3x3", stride, dilation)
        y = conv(y, f"mobilenet_v2.layer.{i}.reduce_1x1", activation=None)
        x = x + y if x.size(1) == y.size(1) else y
    head = {"activation": F.relu, "eps": 1e-5}
    pooled = conv(x.mean((2, 3), keepdim=True), "segmentation_head.conv_pool", **head)
    x = conv(x, "segmentation_head.conv_aspp", **head)
    x = torch.cat([pooled.expand_as(x), x], dim=1)
    x = conv(x, "segmentation_head.conv_projection", **head)
    name = "segmentation_head.classifier.convolution"
    return F.conv2d(x, state[f"{name}.weight"], state[f"{name}.bias"])


CONFIG = {
    "architectures": ["MobileNetV2ForSemanticSegmentation"],
    "id2label": {"0": "sky", "2": "road", "1": "tree"},
    "output_stride": 8,
}
PREPROCESSOR = {"size": {"shortest_edge": 65}, "crop_size": {"height": 33, "width": 65}}


@pytest.fixture
def folder(tmp_path) -> Path:
    """A folder in the format of transformers, with random weights and 3 classes."""
    save_file(transformers_state(3), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(PREPROCESSOR))
    return tmp_path


def edit(path: Path, **changes) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parity(model="DeepLabV3", backbone="mobilenet_v2", weights="Hugging Face")
@pytest.mark.parametrize("output_stride, tf_padding", [(8, True), (16, True), (8, False)])
def test_transformers_network(folder, output_stride, tf_padding):
    edit(folder / "config.json", output_stride=output_stride, tf_padding=tf_padding)
    model = DeepLabV3.from_pretrained(folder)
    state = load_file(folder / "model.safetensors")
    for size in [(65, 65), (64, 66), (34, 47), (1, 2)]:
        images = torch.randn(2, 3, *size)
        expected = transformers_logits(state, images, output_stride, tf_padding)
        tolerance = {"rtol": 1e-4, "atol": 1e-5 * expected.abs().max().item()}
        with torch.no_grad():
            assert_close(model.logits(images)["out"], expected, **tolerance)
        prepared = model.prepare_for_inference()
        assert_close(prepared.logits(images)["out"], expected, **tolerance)


def test_transformers_preprocessing_and_categories(folder):
    model = DeepLabV3.from_pretrained(folder)
    assert model.categories == ("sky", "tree", "road")
    assert model.align_corners
    assert not model.training
    assert model.preprocessing == Preprocessing((0.5,) * 3, (0.5,) * 3, 65, (33, 65))
    (folder / "preprocessor_config.json").unlink()
    edit(folder / "config.json", id2label=None)
    model = DeepLabV3.from_pretrained(folder, output_stride=16)
    assert model.config["output_stride"] == 16
    assert model.categories is None
    assert model.preprocessing == Preprocessing((0.5,) * 3, (0.5,) * 3)


@pytest.mark.parametrize("align_corners", [True, False])
def test_labels_with_and_without_aligned_corners(folder, align_corners):
    """True, the default, is TensorFlow's convention, False that of transformers."""
    options = {} if align_corners else {"align_corners": False}
    model = DeepLabV3.from_pretrained(folder, **options)
    images = torch.randn(1, 3, 97, 113)
    with torch.no_grad():
        mean = model.logits(images)["out"].mean((0, 2, 3))
        model.classifier[-1].bias -= mean  # so that every class has pixels
        logits = model.logits(images)["out"]
    upsampled = {
        corners: F.interpolate(logits, (97, 113), mode="bilinear", align_corners=corners).argmax(1)
        for corners in (True, False)
    }
    labels = model.predict(images)
    assert (labels == upsampled[align_corners]).float().mean() > 0.999  # ties within rounding
    assert (labels == upsampled[not align_corners]).float().mean() < 0.99
    assert model.config["align_corners"] is align_corners


@pytest.mark.parametrize(
    "name, changes, message",
    [
        ("config", {"architectures": ["BertModel"]}, "expected the architecture MobileNetV2For"),
        ("config", {"architectures": None}, "expected the architecture MobileNetV2For"),
        ("config", {"depth_multiplier": 0.5}, "expected depth_multiplier 1, got 0.5"),
        ("config", {"hidden_act": "relu"}, "expected hidden_act 'relu6', got 'relu'"),
        ("config", {"output_stride": 32}, "output_stride: expected 8 or 16, got 32"),
        ("preprocessor_config", {"do_normalize": False}, "expected do_normalize True"),
        ("preprocessor_config", {"rescale_factor": 1.0}, "expected rescale_factor 1/255"),
        ("preprocessor_config", {"resample": 3}, "expected resample 2, got 3"),
        ("preprocessor_config", {"size": {"height": 9, "width": 9}}, "KeyError: 'shortest_edge'"),
        ("preprocessor_config", {"size": 65}, "json: malformed: TypeError"),
        ("preprocessor_config", {"size": {"shortest_edge": -1}}, "resize: expected a positive int"),
        ("preprocessor_config", {"crop_size": {}}, "malformed: KeyError: 'height'"),
        ("preprocessor_config", {"image_mean": 0.5}, "malformed: TypeError"),
        ("preprocessor_config", {"image_std": [1, 0, 1]}, "std: expected positive numbers"),
        ("config", {"id2label": {"1": "a", "2": "b", "3": "c"}}, "config.json: malformed: KeyErr"),
        ("config", {"layer_norm_eps": "small"}, "norm_eps: expected a number, got 'small'"),
        ("config", {"layer_norm_eps": -1}, "norm_eps: expected a positive number, got -1"),
    ],
)
def test_other_transformers_configurations(folder, name, changes, message):
    edit(folder / f"{name}.json", **changes)
    with pytest.raises(ValueError, match=rf"{folder.name}.*{message}"):
        DeepLabV3.from_pretrained(folder)


def test_incomplete_folders(folder):
    weights = folder / "model.safetensors"
    state = load_file(weights)
    name = "segmentation_head.conv_aspp.convolution.weight"
    save_file({key: value for key, value in state.items() if key != name}, weights)
    with pytest.raises(ValueError, match="no tensors for classifier.0.convs.0.0"):
        DeepLabV3.from_pretrained(folder)
    name = "segmentation_head.conv_aspp.normalization.running_var"
    save_file({key: value for key, value in state.items() if key != name}, weights)
    with pytest.raises(ValueError, match="do not fit.*classifier.0.convs.0.1.running_var"):
        DeepLabV3.from_pretrained(folder)
    save_file(state | {"decoder.weight": torch.zeros(1)}, weights)
    with pytest.raises(ValueError, match="unexpected tensor decoder.weight"):
        DeepLabV3.from_pretrained(folder)
    weights.unlink()
    with pytest.raises(FileNotFoundError, match="model.safetensors: not found"):
        DeepLabV3.from_pretrained(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(ValueError, match="config.json: not JSON"):
        DeepLabV3.from_pretrained(folder)


@pytest.mark.parity(
    "outputs", "labels", model="DeepLabV3", backbone="mobilenet_v2", weights="Hugging Face"
)
def test_real_weights_give_their_reference_logits_and_labels(shared_data):
    folder = shared_data / "deeplabv3_mobilenet_v2_voc"
    reference = np.load(folder / "reference.npz")
    model = DeepLabV3.from_pretrained(folder)
    assert model.categories[1] == "aeroplane"
    images = torch.stack(
        [model.preprocessing(Image.fromarray(image)) for image in reference["images"]]
    )
    expected = torch.from_numpy(reference["labels"])
    with torch.no_grad():
        logits = model.logits(images)["out"]
    assert_close(logits, torch.from_numpy(reference["logits"]), rtol=0, atol=1e-4)
    labels = upsample_argmax(logits, images.shape[-2:], align_corners=True, dtype=torch.uint8)
    assert torch.equal(labels, expected)
    labels = model.prepare_for_inference().predict(images, dtype=torch.uint8)
    assert torch.equal(labels, expected)


# --- preprocessing


@pytest.mark.parametrize("size", [(40, 30), (30, 47), (20, 20)])
def test_preprocessing_matches_torchvision(size):
    presets = pytest.importorskip("torchvision.transforms._presets")
    pixels = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    expected = presets.SemanticSegmentation(resize_size=20)(image)
    assert_close(Preprocessing(resize=20)(image), expected)


def test_preprocessing_crops_and_converts():
    image = Image.fromarray(np.arange(35, dtype=np.uint8).reshape(5, 7))
    tensor = Preprocessing((0.0,) * 3, (1 / 255,) * 3, crop=(3, 9))(image)
    assert tensor.shape == (3, 3, 9)
    expected = F.pad(torch.arange(35.0).reshape(5, 7)[1:4], (1, 1))
    assert_close(tensor, expected.expand(3, 3, 9))


def test_preprocessing_converts_deep_and_transparent_images():
    preprocessing = Preprocessing((0.0,) * 3, (1 / 255,) * 3)
    deep = Image.fromarray(np.full((2, 3), 257 * 100, np.uint16))
    assert_close(preprocessing(deep), torch.full((3, 2, 3), 100.0))
    clear = Image.new("RGBA", (3, 2), (9, 9, 9, 0))
    assert_close(preprocessing(clear), torch.full((3, 2, 3), 255.0))
    with pytest.raises(ValueError, match="32 bits per channel"):
        preprocessing(Image.fromarray(np.ones((2, 3), np.float32)))
