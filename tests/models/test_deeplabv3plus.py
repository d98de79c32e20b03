"""DeepLabV3Plus against plain PyTorch: options, outputs, gradients, files, compile and export."""

from __future__ import annotations

import copy
import json
import pickle

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.testing import assert_close

from deeplab_fast import DeepLabV3, DeepLabV3Plus
from deeplab_fast.models import DeepLab, Preprocessing
from deeplab_fast.models.fusion import FusedConv2d
from deeplab_fast.nn import Conv2d, SeparableConv2d

from ..support import batch_norm
from ..support.plain_deeplab import PlainDecoder, PlainDeepLabV3Plus, plain_resnet50

pytestmark = pytest.mark.usefixtures("one_thread")

SMALL = {"num_classes": 5, "aspp_channels": 16, "low_level_channels": 8}


def with_statistics(model: nn.Module) -> nn.Module:
    torch.manual_seed(4)
    return batch_norm.with_statistics(model)


@pytest.fixture(scope="module")
def shared() -> DeepLabV3Plus:
    """A small network with auxiliary classifier; tests must not change it."""
    torch.manual_seed(0)
    model = DeepLabV3Plus("mobilenet_v2", atrous_rates=(1, 2), aux_loss=True, **SMALL)
    return with_statistics(model).eval()


# --- the decoder and its options


OPTIONS = [
    {},
    {"separable": True},
    {"separable": True, "separable_decoder": False},
    {"separable_decoder": True, "depthwise_norm": True},
    {"separable": True, "depthwise_norm": True, "aspp_conv": True},
    {"aspp_conv": True, "align_corners": True},
    {"project_size": 3, "dropout": 0.1},
    {"decoder_convs": 1, "low_level_channels": 3},
    {"decoder_convs": 3, "aspp_channels": 8},
]


@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_head_matches_plain_pytorch(options, train):
    """Outputs, gradients and statistics of the whole head, with the same dropout."""
    torch.manual_seed(0)
    options = {"aspp_channels": 12, "low_level_channels": 4} | options
    ours: nn.Module = DeepLabV3Plus("mobilenet_v2", 5, atrous_rates=(1, 2), **options).classifier
    theirs: nn.Module = nn.Sequential(
        PlainDecoder(320, 24, (1, 2), options.pop("aspp_channels"), **options),
        copy.deepcopy(ours[1]),
    )
    with_statistics(ours)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    results = []
    for head in (ours, theirs):
        head.double().train(train)
        torch.manual_seed(2)
        inputs = {
            "out": torch.randn(2, 320, 3, 4, dtype=torch.float64, requires_grad=True),
            "low": torch.randn(2, 24, 9, 13, dtype=torch.float64, requires_grad=True),
        }
        output = head(inputs)
        (output * torch.randn_like(output)).sum().backward()
        gradients = {name: parameter.grad for name, parameter in head.named_parameters()}
        gradients |= {name: input.grad for name, input in inputs.items()}
        results.append((output.detach(), gradients, dict(head.named_buffers())))
    assert results[0][0].shape == (2, 5, 9, 13)
    assert_close(*results, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("backbone, low, out", [("resnet50", 256, 2048), ("mobilenet_v2", 24, 320)])
def test_defaults_are_those_of_the_paper(backbone, low, out):
    """Section 4.1: 48 channels of the low-level features, two 3x3 convolutions of 256 channels."""
    with torch.device("meta"):
        model = DeepLabV3Plus(backbone)
    shapes = {
        name: tuple(weight.shape)
        for name, weight in model.classifier.state_dict().items()
        if weight.dim() == 4
    }
    dilations = [branch[0].dilation[0] for branch in list(model.classifier[0].aspp.convs)[1:-1]]
    assert shapes == {
        "0.aspp.convs.0.0.weight": (256, out, 1, 1),
        **{f"0.aspp.convs.{i}.0.weight": (256, out, 3, 3) for i in (1, 2, 3)},
        "0.aspp.convs.4.1.weight": (256, out, 1, 1),
        "0.aspp.project.0.weight": (256, 1280, 1, 1),
        "0.low_level.0.weight": (48, low, 1, 1),
        "0.convs.0.0.weight": (256, 304, 3, 3),
        "0.convs.1.0.weight": (256, 256, 3, 3),
        "1.weight": (21, 256, 1, 1),
    }
    assert model.config["output_stride"] == 16 and dilations == [6, 12, 18]


@pytest.mark.parametrize("separable", [False, True])
def test_separable_convolutions_of_deeplabv3(separable):
    """Only the 3x3 branches of ASPP are separable, as in the paper's section 3.1."""
    with torch.device("meta"):
        model = DeepLabV3("mobilenet_v2", separable=separable)
    kinds = [name for name, module in model.named_modules() if isinstance(module, SeparableConv2d)]
    assert kinds == [f"classifier.0.convs.{i}.0" for i in (1, 2, 3)] * separable


@pytest.mark.parametrize(
    "kind, name, value, expected",
    [
        *(
            (kind, *case)
            for kind in (DeepLabV3, DeepLabV3Plus)
            for case in (
                ("dropout", 1.5, "0 to 1, got 1.5"),
                ("dropout", -0.1, "0 to 1, got -0.1"),
                ("dropout", float("nan"), "0 to 1, got nan"),
                ("project_size", 2, "1 or 3, got 2"),
                ("aspp_channels", 0, "a positive int, got 0"),
                ("in_channels", 0, "a positive int, got 0"),
                ("num_classes", 0, "a positive int, got 0"),
                ("output_stride", 4, "8 or 16, got 4"),
                ("atrous_rates", (6, 0), r"positive ints, got \[6, 0\]"),
            )
        ),
        (DeepLabV3Plus, "decoder_convs", 0, "a positive int, got 0"),
        (DeepLabV3Plus, "low_level_channels", 0, "a positive int, got 0"),
    ],
)
def test_bad_options(kind, name, value, expected):
    with torch.device("meta"), pytest.raises(ValueError, match=f"^{name}: expected {expected}$"):
        kind("mobilenet_v2", **{name: value})


@pytest.mark.parametrize(
    "name, value, expected",
    [
        ("num_classes", 2.5, "an int, got 2.5"),
        ("num_classes", None, "an int, got None"),
        ("decoder_convs", 1.5, "an int, got 1.5"),
        ("output_stride", "16", "an int, got '16'"),
        ("atrous_rates", 6, "a list of ints, got 6"),
        ("multi_grid", 2, "a list of ints, got 2"),
        ("dropout", "0.5", "a number, got '0.5'"),
        ("norm_eps", "tiny", "a number, got 'tiny'"),
        ("align_corners", None, "True or False, got None"),
    ],
)
def test_options_of_wrong_types(name, value, expected):
    with torch.device("meta"), pytest.raises(TypeError, match=f"^{name}: expected {expected}$"):
        DeepLabV3Plus("resnet18", **{name: value})
    with torch.device("meta"), pytest.raises(TypeError, match=r"^atrous_rates\[1\]: expected an"):
        DeepLabV3Plus("resnet18", atrous_rates=(1, 2.5))


@pytest.mark.parametrize("kind", [DeepLabV3, DeepLabV3Plus])
def test_numbers_of_numpy(kind):
    """They become Python's, which json can write."""
    with torch.device("meta"):
        model = kind(
            "resnet18",
            np.int64(3),
            np.int32(8),
            np.array([1, 2]),
            (np.int8(1), 2),
            in_channels=np.uint8(4),
            aspp_channels=np.int64(8),
            dropout=np.float32(0.25),
            norm_eps=np.float32(0.5),
            separable=np.bool_(True),
        )
    config = json.loads(json.dumps(model.config))
    assert config["num_classes"] == 3 and config["atrous_rates"] == [1, 2]
    assert (config["dropout"], config["norm_eps"], config["separable"]) == (0.25, 0.5, True)
    with torch.device("meta"):
        assert kind(**config).config == config


# --- the whole network


def test_outputs_match_plain_pytorch():
    """Errors against float64 at most twice PyTorch's own."""
    pytest.importorskip("torchvision", reason="the plain network has torchvision's backbone")
    torch.manual_seed(0)
    ours = with_statistics(DeepLabV3Plus("resnet50", 5, aux_loss=True)).eval()
    theirs = PlainDeepLabV3Plus(plain_resnet50(16), (256, 1024, 2048), 5, 16).eval()
    theirs.load_state_dict(ours.state_dict(), strict=True)
    images = torch.randn(1, 3, 65, 49)
    with torch.no_grad():
        actual, plain = ours(images), theirs(images)
        exact = theirs.double()(images.double())
    assert list(actual) == ["out", "aux"]
    for name, value in exact.items():
        assert actual[name].shape == value.shape == (1, 5, 65, 49)
        scale = value.abs().max()
        bound = 2 * (plain[name] - value).abs().max() + 1e-6 * scale
        assert (actual[name] - value).abs().max() <= bound


@pytest.mark.parametrize("size", [(33, 47), (64, 32), (2, 9), (1, 1)], ids=str)
def test_any_image_size(shared, size):
    images = torch.randn(2, 3, *size)
    with torch.no_grad():
        outputs, logits = shared(images), shared.logits(images)
    for stride, name in ((4, "out"), (16, "aux")):
        low = [-(-side // stride) for side in size]
        assert logits[name].shape == (2, 5, *low)
        assert_close(outputs[name], F.interpolate(logits[name], size, mode="bilinear"))
    labels = shared.predict(images)
    assert labels.shape == (2, *size)
    chosen = outputs["out"].gather(1, labels[:, None])[:, 0]
    assert (outputs["out"].amax(1) - chosen).max() <= 1e-5
    assert shared.predict(images[0], size=(5, 6), dtype=torch.uint8).shape == (5, 6)


def test_align_corners_of_both_upsamplings(tmp_path):
    """The attribute changes them together, and a file keeps them."""
    model = DeepLabV3Plus("mobilenet_v2", atrous_rates=(1,), **SMALL).eval()
    aligned = DeepLabV3Plus("mobilenet_v2", atrous_rates=(1,), align_corners=True, **SMALL).eval()
    aligned.load_state_dict(model.state_dict())
    images = torch.randn(1, 3, 49, 65)
    with torch.no_grad():
        before, expected = model(images)["out"], aligned(images)["out"]
        assert not torch.allclose(before, expected)
        model.align_corners = True
        assert_close(model(images)["out"], expected)
        model.save_pretrained(tmp_path / "model.safetensors")
        loaded = DeepLabV3Plus.from_pretrained(tmp_path / "model.safetensors")
        assert_close(loaded(images)["out"], expected)


@pytest.mark.parametrize("aspp_conv", [False, True])
def test_batch_of_one_in_training_mode(aspp_conv):
    """The error names the branch whose batch norm has to use its running statistics."""
    model = DeepLabV3Plus("mobilenet_v2", atrous_rates=(1,), aspp_conv=aspp_conv, **SMALL)
    path = r"model.classifier[0].aspp" + ("[0]" if aspp_conv else "") + ".convs[-1].eval()"
    with pytest.raises(ValueError) as caught:
        model(torch.randn(1, 3, 33, 33))
    assert path in str(caught.value)
    eval(path, {"model": model})
    model(torch.randn(1, 3, 33, 33))["out"].sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_hooked_and_replaced_submodules_are_used(shared):
    model = copy.deepcopy(shared)
    images, seen = torch.randn(1, 3, 33, 33), []
    names = ("classifier.0", "classifier.0.aspp", "classifier.0.aspp.convs.1.0",
             "classifier.0.low_level.0", "classifier.0.convs.1.0")  # fmt: skip
    for name in names:
        module = model.get_submodule(name)
        module.register_forward_hook(lambda *args, name=name: seen.append(name))
    with torch.no_grad():
        expected = shared(images)["out"]
        assert_close(model(images)["out"], expected)
        assert set(seen) == set(names)
        model.classifier[0].low_level = nn.Conv2d(24, 8, 1)
        model.classifier[0].convs[0][1] = nn.GroupNorm(2, 16)
        assert not torch.allclose(model(images)["out"], expected)


def test_channels_last_and_copies(shared):
    """The memory format is kept, and copies and pickles have the same outputs."""
    images = torch.randn(2, 3, 33, 47)
    model = copy.deepcopy(shared).to(memory_format=torch.channels_last)
    formats = []
    model.classifier.register_forward_hook(
        lambda module, inputs, output: formats.append([
            x.is_contiguous(memory_format=torch.channels_last)
            for x in (inputs[0]["out"], inputs[0]["low"], output)
        ])
    )  # fmt: skip
    with torch.no_grad():
        expected = shared(images)["out"]
        actual = model(images.to(memory_format=torch.channels_last))["out"]
        assert_close(actual, expected, rtol=1e-4, atol=1e-5)
        assert formats == [[True, True, True]]
        unpickled = pickle.loads(pickle.dumps(shared))
        assert_close(unpickled(images)["out"], expected)
    assert unpickled.config == shared.config


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(shared, dtype):
    images = torch.randn(1, 3, 33, 49)
    with torch.no_grad():
        expected = shared(images)["out"]
        converted = copy.deepcopy(shared).to(dtype)(images.to(dtype))["out"]
        with torch.autocast("cpu", dtype):
            cast = shared(images)["out"]
    for actual in (converted, cast):
        assert actual.dtype == dtype
        assert (actual.float() - expected).norm() <= 0.05 * expected.norm()


def test_gradients_under_autocast():
    """bfloat16 gradients of the separable dilated layers, which PyTorch's own get wrong on many
    CPUs (docs/onednn_bf16_weight_gradient.md)."""
    torch.manual_seed(0)
    model = DeepLabV3Plus("mobilenet_v2", atrous_rates=(1, 2), separable=True, **SMALL)
    head = with_statistics(model.classifier).eval()
    features = {"out": torch.randn(2, 320, 9, 9), "low": torch.randn(2, 24, 33, 33)}
    weight = torch.randn(2, 5, 33, 33)
    gradients = []
    for enabled in (False, True):
        head.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            output = head(features)
        (output.float() * weight).sum().backward()
        gradients.append([parameter.grad for parameter in head.parameters()])
    for exact, actual in zip(*gradients):  # a wrong gradient differs by about its own norm
        assert (actual - exact).norm() <= 0.25 * exact.norm() + 1e-4


# --- prepared for inference


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_prepared_model_has_the_same_outputs(options):
    torch.manual_seed(0)
    model = DeepLabV3Plus("mobilenet_v2", atrous_rates=(1, 2), **SMALL | options)
    prepared = with_statistics(model).eval().prepare_for_inference()
    kinds = {type(module) for module in prepared.modules()}
    assert FusedConv2d in kinds and not kinds & {nn.BatchNorm2d, nn.Conv2d, Conv2d}
    for size in [(33, 47), (1, 1)]:
        images = torch.randn(2, 3, *size)
        with torch.no_grad():
            expected, actual = model(images)["out"], prepared(images)
        assert list(actual) == ["out"]
        bound = 1e-4 * expected.abs().max()
        assert_close(actual["out"], expected, rtol=0, atol=bound.item())
        chosen = expected.gather(1, prepared.predict(images)[:, None])[:, 0]
        assert (expected.amax(1) - chosen).max() <= bound


def test_prepared_model_in_bfloat16(shared):
    prepared = copy.deepcopy(shared).prepare_for_inference(torch.bfloat16)
    images = torch.randn(1, 3, 33, 49)
    with torch.no_grad():
        actual, expected = prepared(images)["out"], shared(images)["out"]
    assert actual.dtype == torch.bfloat16
    assert (actual.float() - expected).norm() <= 0.05 * expected.norm()


# --- files


def test_round_trip(tmp_path):
    torch.manual_seed(0)
    options = {"separable": True, "separable_decoder": False, "decoder_convs": 1, "dropout": 0.1}
    model = DeepLabV3Plus("mobilenet_v2", output_stride=8, atrous_rates=(2,), **SMALL, **options)
    model.preprocessing = Preprocessing(resize=65)
    model.categories = tuple("abcde")
    path = tmp_path / "model.safetensors"
    with_statistics(model).eval().save_pretrained(path)
    images = torch.randn(1, 3, 33, 33)
    for kind in (DeepLabV3Plus, DeepLab):
        loaded = kind.from_pretrained(path)
        assert type(loaded) is DeepLabV3Plus and loaded.config == model.config
        assert loaded.preprocessing == model.preprocessing
        assert loaded.categories == model.categories
        assert_close(loaded.state_dict(), model.state_dict(), rtol=0, atol=0)
        with torch.no_grad():
            assert_close(loaded(images)["out"], model(images)["out"])
    assert DeepLabV3Plus.from_pretrained(path, output_stride=16).config["output_stride"] == 16


def test_loading_with_the_other_class_is_an_error(shared, tmp_path):
    """The error has one line, and names the class that loads the file."""
    path = tmp_path / "model.safetensors"
    shared.save_pretrained(path)
    with pytest.raises(ValueError) as caught:
        DeepLabV3.from_pretrained(path)
    assert str(caught.value) == (
        f"{path}: expected a DeepLabV3, got a DeepLabV3Plus: load it with "
        "DeepLabV3Plus.from_pretrained"
    )


def test_derived_classes(tmp_path):
    """A file of a derived class loads as that class and as the class it is derived from."""

    class Derived(DeepLabV3Plus):
        pass

    path = tmp_path / "model.safetensors"
    Derived("mobilenet_v2", atrous_rates=(), **SMALL).save_pretrained(path)
    assert type(Derived.from_pretrained(path)) is Derived
    assert type(DeepLabV3Plus.from_pretrained(path)) is DeepLabV3Plus


# --- compile, export, and the choice of kernels


class TwoConvolutions(nn.Module):
    """A backbone with MobileNetV2's numbers of channels, which compiles quickly."""

    def __init__(self) -> None:
        super().__init__()
        self.low = nn.Conv2d(3, 24, 3, 4, 1)
        self.aux = nn.Conv2d(24, 96, 3, 4, 1)
        self.out = nn.Conv2d(96, 320, 1)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        low = self.low(images)
        aux = self.aux(low)
        return {"low": low, "aux": aux, "out": self.out(aux)}


@pytest.fixture
def tiny(shared) -> DeepLabV3Plus:
    """Two convolutions and the head, without dropout, for which compiled graphs draw others."""
    torch.manual_seed(0)
    model = copy.deepcopy(shared)
    model.backbone = TwoConvolutions()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


def test_predict_and_training_step_compile_to_one_graph(tiny):
    images, target = torch.randn(2, 3, 33, 33), torch.randint(5, (2, 33, 33))
    compiled = torch.compile(tiny.predict, fullgraph=True, backend="eager")
    assert torch.equal(compiled(images), tiny.predict(images))

    results = []
    for compile in (False, True):
        model = copy.deepcopy(tiny).train()

        def step(images: Tensor, target: Tensor, model=model) -> Tensor:
            outputs = model(images)
            return sum(F.cross_entropy(x, target) for x in outputs.values())

        if compile:
            step = torch.compile(step, fullgraph=True, backend="eager")
        loss = step(images, target)
        loss.backward()
        gradients = [parameter.grad for parameter in model.parameters()]
        results.append((loss.detach(), gradients, dict(model.named_buffers())))
    assert_close(*results, rtol=1e-3, atol=1e-5)


def test_exports_with_dynamic_sizes(tiny):
    dynamic = torch.export.Dim.DYNAMIC
    program = torch.export.export(
        tiny, (torch.randn(2, 3, 33, 41),), dynamic_shapes=({0: dynamic, 2: dynamic, 3: dynamic},)
    )
    images = torch.randn(3, 3, 50, 34)
    assert_close(program.module()(images)["out"], tiny(images)["out"], rtol=1e-4, atol=1e-5)
