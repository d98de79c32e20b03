"""DeepLabV3 against torchvision's models; predict and prepare_for_inference."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.testing import assert_close

from deeplab_fast.models import DeepLabV3
from deeplab_fast.models.fusion import FusedConv2d

from ..support.batch_norm import with_statistics


def torchvision_models():
    return pytest.importorskip("torchvision.models", reason="needs torchvision")


def torchvision_model(backbone="resnet50", num_classes=21, aux_loss=None) -> nn.Module:
    build = getattr(torchvision_models().segmentation, f"deeplabv3_{backbone}")
    return build(weights=None, weights_backbone=None, num_classes=num_classes, aux_loss=aux_loss)


@pytest.fixture(scope="module")
def pair() -> tuple[DeepLabV3, nn.Module]:
    """Our and torchvision's resnet50 model with auxiliary classifier and the same weights."""
    torch.manual_seed(0)
    theirs = with_statistics(torchvision_model(num_classes=5, aux_loss=True)).eval()
    ours = DeepLabV3("resnet50", num_classes=5, aux_loss=True).eval()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return ours, theirs


@pytest.fixture(scope="module")
def mobilenet() -> DeepLabV3:
    torch.manual_seed(0)
    return with_statistics(DeepLabV3("mobilenet_v2", num_classes=5)).eval()


def assert_labels_of(labels: Tensor, logits: Tensor) -> None:
    """Assert that ``labels`` have the largest ``logits``, except for ties within rounding."""
    chosen = logits.gather(1, labels[:, None].long())[:, 0]
    assert labels.shape == chosen.shape
    assert (logits.amax(1) - chosen).max() <= 1e-4 * logits.abs().max()


# --- torchvision parity


@pytest.mark.parametrize("backbone, aux_loss", [("resnet50", None), ("resnet101", True)])
def test_same_seed_gives_torchvisions_state_dict(backbone, aux_loss):
    torch.manual_seed(3)
    theirs = torchvision_model(backbone, 7, aux_loss).state_dict()
    torch.manual_seed(3)
    ours = DeepLabV3(backbone, 7, aux_loss=aux_loss).state_dict()
    assert list(ours) == list(theirs)
    assert_close(ours, theirs, rtol=0, atol=0)


@pytest.mark.parity(model="DeepLabV3", weights="torchvision")
@pytest.mark.parametrize("backbone", ["resnet50", "resnet101"])
def test_expected_output_recipe_of_torchvision(backbone):
    """torchvision's test_segmentation_model: seed 0, 10 classes, a random 32x32 image."""

    def recipe(build):
        torch.manual_seed(0)
        model = build()
        model.eval()
        return model(torch.rand(1, 3, 32, 32))["out"]

    actual = recipe(lambda: DeepLabV3(backbone, num_classes=10))
    expected = recipe(lambda: torchvision_model(backbone, num_classes=10))
    assert actual.shape == (1, 10, 32, 32)
    assert_close(actual, expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())


@pytest.mark.parity(model="DeepLabV3", backbone="resnet50", weights="torchvision")
@pytest.mark.parametrize("size", [(65, 65), (33, 47), (32, 64), (1, 1), (2, 9)], ids=str)
@pytest.mark.parametrize("seed", [0, 1])
def test_outputs_match_torchvision_in_evaluation_mode(pair, size, seed):
    torch.manual_seed(seed)
    images = torch.randn(2, 3, *size)
    with torch.no_grad():
        actual, expected = (model(images) for model in pair)
    assert list(actual) == list(expected) == ["out", "aux"]
    for name in expected:
        assert actual[name].shape == (2, 5, *size)
        scale = expected[name].abs().max().item()
        assert_close(actual[name], expected[name], rtol=1e-4, atol=1e-5 * scale)


@pytest.mark.parity(model="DeepLabV3", backbone="resnet50", weights="torchvision")
@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
def test_outputs_gradients_and_statistics_match_torchvision(pair, train):
    """The models run in float64, because fifty batch norms amplify rounding errors."""
    results = []
    images = torch.randn(2, 3, 33, 25, dtype=torch.float64)
    target = torch.randint(5, (2, 33, 25))
    for model in (copy.deepcopy(model).double().train(train) for model in pair):
        torch.manual_seed(4)  # for dropout
        outputs = model(images)
        loss = F.cross_entropy(outputs["out"], target) + F.cross_entropy(outputs["aux"], target)
        loss.backward()
        grads = {name: parameter.grad for name, parameter in model.named_parameters()}
        results.append((dict(outputs), grads, dict(model.named_buffers())))
    assert_close(*results, rtol=1e-6, atol=1e-9)


def test_state_dict_goes_both_ways_without_auxiliary_classifier():
    ours, theirs = DeepLabV3(num_classes=3), torchvision_model(num_classes=3)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    theirs.load_state_dict(ours.state_dict(), strict=True)


@pytest.mark.parametrize("name", ["resnet50", "resnet101", "mobilenet_v2"])
def test_backbones_load_torchvision_weights(name):
    classifier = getattr(torchvision_models(), name)(weights=None).state_dict()
    backbone = DeepLabV3(name).backbone
    missing, unexpected = backbone.load_state_dict(classifier, strict=False)
    assert missing == []
    assert all(key.startswith(("fc.", "classifier.", "features.18.")) for key in unexpected)


def test_mobilenet_v2_features_match_torchvision():
    theirs = with_statistics(torchvision_models().mobilenet_v2(weights=None)).eval()
    ours = DeepLabV3("mobilenet_v2", output_stride=16).eval().backbone
    ours.load_state_dict(theirs.state_dict(), strict=False)
    images = torch.randn(1, 3, 40, 57)
    with torch.no_grad():
        expected = theirs.features[:14](images)  # up to output stride 16
        assert_close(ours(images)["aux"], expected)


# --- architecture


@pytest.mark.parametrize("backbone", ["resnet50", "mobilenet_v2"])
@pytest.mark.parametrize("output_stride", [8, 16])
def test_output_stride(backbone, output_stride):
    model = DeepLabV3(backbone, output_stride=output_stride, aux_loss=True).eval()
    for height, width in [(65, 64), (33, 1)]:
        with torch.no_grad():
            logits = model.logits(torch.randn(1, 3, height, width))
        expected = (-(-height // output_stride), -(-width // output_stride))
        assert all(x.shape == (1, 21, *expected) for x in logits.values())
    atrous_rates = [branch[0].dilation[0] for branch in list(model.classifier[0].convs)[1:-1]]
    assert atrous_rates == {8: [12, 24, 36], 16: [6, 12, 18]}[output_stride]


def dilations(model: DeepLabV3) -> list[int]:
    """Dilations of all 3x3 convolutions of the backbone but the first."""
    convs = [m for m in model.backbone.modules() if isinstance(m, nn.Conv2d)]
    return [conv.dilation[0] for conv in convs[1:] if conv.kernel_size == (3, 3)]


def test_dilations():
    with torch.device("meta"):
        assert dilations(DeepLabV3("resnet50"))[7:] == [1, 2, 2, 2, 2, 2, 2, 4, 4]
        assert dilations(DeepLabV3("resnet50", output_stride=16))[-3:] == [1, 2, 2]
        assert dilations(DeepLabV3("resnet50", multi_grid=(1, 2, 4)))[-3:] == [4, 8, 16]
        model = DeepLabV3("resnet50", output_stride=16, multi_grid=(1, 2, 4))
        assert dilations(model)[-4:] == [1, 2, 4, 8]  # section 3.2.1 of the paper
        assert dilations(DeepLabV3("mobilenet_v2")) == [1] * 7 + [2] * 7 + [4] * 3
        model = DeepLabV3("mobilenet_v2", output_stride=16)
        assert dilations(model) == [1] * 14 + [2] * 3


def test_multi_grid_changes_dilations_only(pair):
    model = DeepLabV3("resnet50", 5, multi_grid=(1, 2, 4), aux_loss=True).eval()
    model.load_state_dict(pair[0].state_dict(), strict=True)
    images = torch.randn(1, 3, 65, 65)
    with torch.no_grad():
        actual, expected = model(images), pair[0](images)
    assert_close(actual["aux"], expected["aux"])
    assert not torch.allclose(actual["out"], expected["out"])


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"backbone": "vgg16"}, "backbone: expected .*'resnet50'.*got 'vgg16'"),
        ({"num_classes": 0}, "num_classes: expected a positive int, got 0"),
        ({"output_stride": 32}, "output_stride: expected 8 or 16, got 32"),
        ({"atrous_rates": (6, 0)}, "atrous_rates: expected positive ints"),
        ({"multi_grid": (1, 2)}, "multi_grid: expected 3 positive ints"),
        ({"multi_grid": (1, 2, 4), "backbone": "mobilenet_v2"}, "multi_grid: only resnets"),
        ({"backbone_variant": "tensorflow"}, "backbone_variant: expected .*for resnet50, got"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        DeepLabV3(**arguments)


# --- training


def test_batch_of_one_in_training_mode():
    model = DeepLabV3("mobilenet_v2", num_classes=3, aux_loss=True)
    images = torch.randn(1, 3, 33, 33)
    with pytest.raises(ValueError, match=r"model.classifier\[0\].convs\[-1\].eval\(\)"):
        model(images)
    model.classifier[0].convs[-1].eval()
    model(images)["out"].sum().backward()
    assert all(parameter.grad is not None for parameter in model.backbone.parameters())


def test_mobilenet_learns():
    torch.manual_seed(0)
    model = DeepLabV3("mobilenet_v2", num_classes=2, aux_loss=True).train()
    images = torch.randn(4, 3, 33, 33)
    images[..., 17:] += 2
    target = torch.zeros(4, 33, 33, dtype=torch.int64)
    target[..., 17:] = 1
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    losses = []
    for _ in range(5):
        outputs = model(images)
        loss = F.cross_entropy(outputs["out"], target) + F.cross_entropy(outputs["aux"], target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


# --- predict


@pytest.mark.parametrize("size", [(65, 65), (33, 47), (1, 1)], ids=str)
def test_predict(pair, size, ran):
    model = pair[0]
    images = torch.randn(2, 3, *size)
    labels = model.predict(images)
    assert labels.dtype == torch.int64 and labels.shape == (2, *size)
    assert "upsample_argmax" in [op for op, _ in ran]
    with torch.no_grad():
        assert_labels_of(labels, model(images)["out"])
    assert torch.equal(model.predict(images[1]), model.predict(images[1:])[0])
    assert torch.equal(model.predict(images, dtype=torch.uint8), labels.to(torch.uint8))


def test_predict_at_another_size(pair):
    images = torch.randn(1, 3, 33, 33)
    with torch.no_grad():
        logits = F.interpolate(pair[0].logits(images)["out"], (50, 20), mode="bilinear")
    assert_labels_of(pair[0].predict(images, size=(50, 20)), logits)


def test_predict_runs_neither_auxiliary_classifier_nor_autograd(pair):
    model = copy.deepcopy(pair[0])
    model.aux_classifier.register_forward_hook(lambda *args: pytest.fail("aux_classifier ran"))
    logits = []
    model.classifier.register_forward_hook(lambda module, args, output: logits.append(output))
    labels = model.predict(torch.randn(1, 3, 33, 33))
    assert not logits[0].requires_grad
    weight = torch.randn(5, requires_grad=True)
    weight[labels].sum().backward()  # fails for tensors of inference mode


def test_predict_rejects_wrong_inputs(pair, mobilenet):
    with pytest.raises(RuntimeError, match=r"call model.eval\(\) first"):
        DeepLabV3("mobilenet_v2").predict(torch.randn(1, 3, 33, 33))
    for model in (mobilenet, mobilenet.prepare_for_inference()):
        for shape in [(3, 33), (1, 4, 33, 33), (1, 3, 0, 33)]:
            with pytest.raises(ValueError, match=r"images: expected \[N, 3, H, W\]"):
                model.predict(torch.randn(shape))
        with pytest.raises(TypeError, match="images: expected normalised floats.*uint8"):
            model.predict(torch.zeros(1, 3, 33, 33, dtype=torch.uint8))
        with pytest.raises(
            TypeError, match="^images: expected a tensor .*model.segment.*got 'photo.jpg'$"
        ):
            model.predict("photo.jpg")
    prepared, images = mobilenet.prepare_for_inference(), torch.randn(1, 3, 33, 33, device="meta")
    with pytest.raises(ValueError, match="^images: expected on cpu, like the weights, got meta$"):
        prepared.predict(images)


@pytest.mark.parametrize("dtype", ["bfloat16", torch.int8, False])
def test_prepare_rejects_wrong_dtypes(mobilenet, dtype):
    with pytest.raises(TypeError, match="^dtype: expected a floating-point torch.dtype or None"):
        mobilenet.prepare_for_inference(dtype)


# --- prepare_for_inference


@pytest.mark.parametrize(
    "backbone, options",
    [
        ("resnet50", {"aux_loss": True}),
        ("resnet50", {"output_stride": 16, "multi_grid": (1, 2, 4)}),
        ("mobilenet_v2", {}),
        (
            "mobilenet_v2",
            {
                "backbone_variant": "tensorflow",
                "atrous_rates": (),
                "head_conv": False,
                "norm_eps": 1e-3,
            },
        ),
        (
            "mobilenet_v2",
            {"backbone_variant": "tensorflow", "align_corners": True, "output_stride": 16},
        ),
    ],
    ids=str,
)
def test_prepared_model_has_the_same_outputs(backbone, options, ran):
    torch.manual_seed(5)
    model = with_statistics(DeepLabV3(backbone, 5, **options)).eval()
    state = copy.deepcopy(model.state_dict())
    prepared = model.prepare_for_inference()
    for size in [(65, 65), (34, 49), (1, 1)]:
        images = torch.randn(2, 3, *size)
        with torch.no_grad():
            expected = model(images)["out"]
            actual = prepared(images)
        assert list(actual) == ["out"]
        assert_close(actual["out"], expected, rtol=1e-3, atol=1e-4 * expected.abs().max().item())
        assert_labels_of(prepared.predict(images), expected)
    assert "aspp" in [op for op, _ in ran]
    assert_close(model.state_dict(), state, rtol=0, atol=0)


def test_prepared_model_is_folded_and_channels_last(pair):
    prepared = pair[0].prepare_for_inference()
    kinds = {type(module) for module in prepared.modules()}
    assert nn.BatchNorm2d not in kinds and nn.Conv2d not in kinds and FusedConv2d in kinds
    assert not any(parameter.requires_grad for parameter in prepared.parameters())
    weights = [p for p in prepared.parameters() if p.dim() == 4]
    assert all(p.is_contiguous(memory_format=torch.channels_last) for p in weights)
    seen = []
    prepared.classifier.register_forward_hook(lambda module, args, output: seen.append(args[0]))
    prepared.predict(torch.randn(1, 3, 65, 65))
    assert seen[0].is_contiguous(memory_format=torch.channels_last)
    assert prepared.categories == pair[0].categories
    assert prepared.preprocessing == pair[0].preprocessing


def test_prepared_model_in_bfloat16(mobilenet):
    prepared = mobilenet.prepare_for_inference(torch.bfloat16)
    images = torch.randn(2, 3, 65, 65)
    with torch.no_grad():
        actual, expected = prepared(images)["out"], mobilenet(images)["out"]
    assert actual.dtype == torch.bfloat16
    assert (actual - expected).abs().max() < 0.05 * expected.abs().max()
    agree = prepared.predict(images) == mobilenet.predict(images)
    assert agree.float().mean() > 0.9


def test_prepared_model_stays_in_evaluation_mode(mobilenet):
    """Also as the frozen teacher of a model that is trained."""
    prepared = mobilenet.prepare_for_inference()
    student = nn.ModuleDict({"teacher": prepared, "student": nn.Dropout()})
    for mode in (True, False, True):
        student.train(mode)
        assert student["student"].training is mode
        assert not any(module.training for module in prepared.modules())
    assert prepared.train() is prepared and not prepared.training


@pytest.mark.parametrize(
    "name, replacement",
    [
        ("classifier.2", nn.GroupNorm(2, 256)),
        ("classifier.2", nn.BatchNorm2d(256, track_running_stats=False)),
        ("classifier.3", nn.ELU()),
        ("classifier.0", nn.Conv2d(320, 256, 1)),
        ("classifier.0.convs.1.2", nn.ReLU6()),
        ("classifier.0.convs.1.1", nn.GroupNorm(2, 256)),
        ("classifier", nn.Sequential(nn.Dropout(), nn.Conv2d(320, 5, 1, padding_mode="circular"))),
        ("backbone.features.0.0", nn.Conv2d(3, 32, 3, 2, 1, padding_mode="reflect")),
        ("backbone.features.0.2", nn.SiLU()),
    ],
    ids=str,
)
@torch.no_grad()
def test_modules_that_cannot_be_fused_stay(mobilenet, name, replacement):
    model = copy.deepcopy(mobilenet)
    model.set_submodule(name, replacement)
    images = torch.randn(2, 3, 33, 41)
    expected = model.eval()(images)["out"]
    actual = model.prepare_for_inference()(images)["out"]
    assert_close(actual, expected, rtol=1e-3, atol=1e-4 * expected.abs().max().item())


# --- compile and export


def test_compiles_to_one_graph(mobilenet):
    images = torch.randn(2, 3, 33, 33)
    compiled = torch.compile(mobilenet, fullgraph=True, backend="eager")
    with torch.no_grad():
        assert_close(compiled(images)["out"], mobilenet(images)["out"])


def test_exports(mobilenet):
    """A prepared model is exported with dynamic sizes."""
    model = mobilenet.prepare_for_inference()
    sizes = {0: torch.export.Dim.DYNAMIC, 2: torch.export.Dim.DYNAMIC, 3: torch.export.Dim.DYNAMIC}
    program = torch.export.export(model, (torch.randn(2, 3, 33, 41),), dynamic_shapes=(sizes,))
    images = torch.randn(3, 3, 50, 34)
    assert_close(program.module()(images)["out"], model(images)["out"])
