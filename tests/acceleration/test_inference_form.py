"""The inference form: outputs and labels of models of any project, and copies, files and hooks."""

from __future__ import annotations

import copy
import io
import logging
from collections import OrderedDict

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.testing import assert_close

from deeplab_fast import DeepLabV3, accelerate
from deeplab_fast.acceleration import AcceleratedModel
from deeplab_fast.acceleration.inference import prepare
from deeplab_fast.models.inference import InferenceModel
from deeplab_fast.nn import conv_norm_relu

from ..support.batch_norm import with_statistics
from ..support.cases import assert_as_accurate_as


def balanced(model: nn.Module, x: Tensor) -> nn.Module:
    """Shift the biases of the classifiers, so that all classes occur."""

    def shift(module, args, output):
        module.bias -= output.mean((0, 2, 3))

    convs = [m for m in model.modules() if isinstance(m, nn.Conv2d) and m.out_channels in (1, 5)]
    handles = [conv.register_forward_hook(shift) for conv in convs if conv.bias is not None]
    with torch.no_grad():
        model(x)
    for handle in handles:
        handle.remove()
    return model


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = conv_norm_relu(8, 8, 3, 2)

    def forward(self, x):
        return self.layers(x)


class Head(nn.Module):
    """A small network of stride 4, whose last step is given."""

    def __init__(self, last=lambda logits, images: logits, classes: int = 5) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.norm = nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.BatchNorm2d(8)
        self.block = Block()
        self.pool, self.classifier = nn.MaxPool2d(2), nn.Conv2d(8, classes, 1)
        self.last = last
        balanced(with_statistics(self).eval(), images())

    def forward(self, images):
        features = self.block(F.relu(self.norm(self.conv(images))))
        return self.last(self.classifier(self.pool(features)), images)


def resize(size=None, scale_factor=None, align_corners=False):
    return lambda logits, images: F.interpolate(
        logits, size, scale_factor, "bilinear", align_corners
    )


def to_images(logits, images):
    return F.interpolate(logits, images.shape[2:], mode="bilinear")


def images(n: int = 2, height: int = 33, width: int = 37) -> Tensor:
    return torch.randn(n, 3, height, width, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def check_labels(labels: Tensor, model: nn.Module, fast: nn.Module, x: Tensor, upsampled) -> None:
    """Compare with the argmax of the original, except where two logits are as close as the error.

    Args:
        upsampled: function of the model's output that returns logits at the size of the labels.
    """
    exact = upsampled(copy.deepcopy(model).double().eval()(x.double()))
    error = (upsampled(fast(x)).double() - exact).abs().max()
    assert labels.shape == (exact.size(0), *exact.shape[2:]) and labels.dtype == torch.int64
    chosen = exact.gather(1, labels[:, None])[:, 0]
    gap = exact.amax(1) - chosen
    assert (gap <= 2 * error + 1e-6 * exact.abs().max()).all()
    assert len(labels.unique()) > 1


# --- the size of the labels

LAST = {
    "the size of the trial": resize(size=(256, 256)),
    "the images' size": to_images,
    "align_corners": lambda logits, images: F.interpolate(
        logits, images.shape[2:], mode="bilinear", align_corners=True
    ),
    "a factor": resize(scale_factor=4),
    "two factors that the sizes round": resize(scale_factor=(3.3, 4.7)),
    "a fixed size": resize(size=(40, 50), align_corners=True),
    "two resizes": lambda logits, images: to_images(
        F.interpolate(logits, scale_factor=2.0, mode="bilinear", align_corners=True), images
    ),
    "a softmax": lambda logits, images: F.softmax(to_images(logits, images), 1),
    "a log-softmax": lambda logits, images: to_images(logits, images).log_softmax(1),
    "nearest": lambda logits, images: F.interpolate(logits, images.shape[2:]),
    "changed after the resize": lambda logits, images: to_images(logits, images).mul_(-1),
}


@pytest.mark.parametrize("name", LAST)
def test_labels_are_the_argmax_of_the_output(name):
    model, x = Head(LAST[name]), images()
    fast = accelerate(model, inference=True)
    check_labels(fast.predict(x), model, fast, x, lambda output: output)


def test_logits_at_low_resolution_are_resized_to_the_images():
    model, x = Head(), images()
    fast = accelerate(model, inference=True)
    check_labels(fast.predict(x), model, fast, x, lambda logits: to_images(logits, x))
    assert "to the images' size, align_corners=False" in fast.trial.resize


@pytest.mark.parametrize("last, align_corners", [(to_images, False), (LAST["align_corners"], True)])
def test_a_given_size_is_reached_from_the_low_resolution(last, align_corners):
    model, x = Head(last), images()
    low = Head()
    fast = accelerate(model, inference=True)
    labels = fast.predict(x, size=(21, 50))
    expected = resize((21, 50), align_corners=align_corners)
    check_labels(labels, low, accelerate(low, inference=True), x, lambda y: expected(y, x))


def test_one_image_and_dtypes():
    fast, x = accelerate(Head(to_images), inference=True), images()
    labels = fast.predict(x)
    for dtype in (torch.uint8, torch.int32):
        assert_close(fast.predict(x, dtype=dtype), labels.to(dtype), rtol=0, atol=0)
    assert_close(fast.predict(x[0]), labels[0], rtol=0, atol=0)
    equal = accelerate(Head(LAST["nearest"]), inference=True).predict(x, dtype=torch.uint8)
    assert equal.dtype == torch.uint8


# --- kinds of outputs

KINDS = {
    "dict": lambda y, x: {"out": to_images(y, x), "aux": y},
    "ordered dict": lambda y, x: OrderedDict(logits=to_images(y, x)),
    "tuple": lambda y, x: (to_images(y, x), y.mean((2, 3))),
    "list": lambda y, x: [y.mean(), to_images(y, x)],
}


def first_logits(output):
    values = output.values() if isinstance(output, dict) else output
    return next(value for value in values if value.dim() == 4)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_kinds_of_outputs(kind):
    model, x = Head(KINDS[kind]).eval(), images()
    fast = accelerate(model, inference=True)
    actual, expected = fast(x), model(x)
    assert type(actual) is type(expected)
    assert_close(actual, expected, rtol=1e-4, atol=1e-5)
    check_labels(fast.predict(x), model, fast, x, first_logits)


@pytest.mark.parametrize(
    "last, found",
    [
        (lambda y, x: y.mean((2, 3)), r"a tensor \[2, 5\] of torch.float32"),
        (lambda y, x: y.argmax(1), r"a tensor \[2, 8, 9\] of torch.int64"),
        (lambda y, x: {"masks": y}, "a dict of {masks: a tensor"),
        (lambda y, x: (y.mean(), "text"), r"a tuple of \(a tensor \[\] .*, a str\)"),
    ],
)
def test_outputs_without_logits(last, found):
    fast = accelerate(Head(last), inference=True)
    fast(images())
    with pytest.raises(TypeError, match=f"expected a model that returns logits.*got {found}"):
        fast.predict(images())


def test_wrong_arguments():
    fast = accelerate(Head(LAST["nearest"]), inference=True)
    with pytest.raises(TypeError, match="images: expected a tensor"):
        fast.predict([images()])
    with pytest.raises(ValueError, match=r"images: expected \[N, C, H, W\]"):
        fast.predict(images()[None])
    with pytest.raises(TypeError, match="dtype: expected"):
        fast.predict(images(), dtype=torch.float32)
    many = accelerate(Head(to_images, classes=300), inference=True)
    for size in (None, (8, 9)):
        with pytest.raises(ValueError, match="dtype: expected one that holds 300 classes"):
            many.predict(images(), size, torch.uint8)


# --- one output channel

BINARY = {
    "logits": (to_images, 0),
    "low resolution": (lambda y, x: y, 0),
    "probabilities": (lambda y, x: torch.sigmoid(to_images(y, x)), 0.5),
    "resized probabilities": (lambda y, x: to_images(y.sigmoid(), x), 0.5),
    "bounded probabilities": (lambda y, x: to_images(y, x).sigmoid().clamp(0.01, 0.99), 0.5),
    "mirrored probabilities": (lambda y, x: to_images(y, x).sigmoid().flip(3), 0.5),
    "hard sigmoid": (lambda y, x: F.hardsigmoid(to_images(y, x)), 0.5),
    "weighted logits": (lambda y, x: to_images(y * y.sigmoid(), x), 0),
    "factor": (resize(scale_factor=(3.3, 4.7), align_corners=True), 0),
}


@pytest.mark.parametrize("kind", BINARY)
@torch.no_grad()
def test_binary_models(kind):
    last, threshold = BINARY[kind]
    model, x = Head(last, classes=1).eval(), images()
    labels = accelerate(model, inference=True).predict(x)
    output = model(x)
    if kind == "low resolution":
        output = to_images(output, x)
    is_clear = (output[:, 0] - threshold).abs() > 1e-5
    assert torch.equal(labels[is_clear], (output[:, 0] > threshold).long()[is_clear])
    assert labels.unique().tolist() == [0, 1]


def test_arithmetic_with_probabilities():
    fast = accelerate(Head(lambda y, x: (y.sigmoid() + (-y).sigmoid()) / 2, 1), inference=True)
    with pytest.raises(TypeError, match="ends with logits or a sigmoid"):
        fast.predict(images())


class ReadsValues(Head):
    def forward(self, images):
        return super().forward(images if images.sum() > 1e9 else 2 * images)


def test_a_binary_model_that_does_not_run_on_meta_tensors():
    with pytest.raises(TypeError, match="or a model that runs on meta tensors"):
        accelerate(ReadsValues(classes=1), inference=True).predict(images())
    fast = accelerate(ReadsValues(to_images), inference=True)
    check_labels(fast.predict(images()), ReadsValues(to_images), fast, images(), lambda y: y)


# --- real models


def torchvision_model(name, **options):
    models = pytest.importorskip("torchvision.models", reason="accelerates a torchvision model")
    torch.manual_seed(0)
    function = getattr(models.segmentation, name)
    return function(weights=None, weights_backbone=None, num_classes=5, **options)


def smp_model(name, encoder="resnet18", **options):
    smp = pytest.importorskip("segmentation_models_pytorch", reason="accelerates a model of smp")
    torch.manual_seed(0)
    return getattr(smp, name)(encoder, encoder_weights=None, classes=5, **options)


def transformers_model(name, **options):
    transformers = pytest.importorskip("transformers", reason="accelerates a transformers model")
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(num_labels=5, **options)
    return getattr(transformers, f"{name}ForSemanticSegmentation")(config)


def out(output):
    return output["out"]


REAL = {
    "lraspp": (lambda: torchvision_model("lraspp_mobilenet_v3_large"), 65, out),
    "deeplabv3": (lambda: torchvision_model("deeplabv3_mobilenet_v3_large"), 65, out),
    "DeepLabV3Plus": (lambda: smp_model("DeepLabV3Plus", "mobilenet_v2"), 64, lambda y: y),
    "Unet": (lambda: smp_model("Unet", aux_params={"classes": 3}), 64, lambda y: y[0]),
    "FPN": (lambda: smp_model("FPN", activation="softmax2d"), 64, lambda y: y),
    "PSPNet": (lambda: smp_model("PSPNet"), 64, lambda y: y),
    "MobileNetV2": (
        lambda: transformers_model("MobileNetV2", depth_multiplier=0.35, output_stride=16),
        66,
        lambda y: F.interpolate(y.logits, (66, 66), mode="bilinear"),
    ),
    "Segformer": (
        lambda: transformers_model(
            "Segformer", hidden_sizes=[8, 8, 16, 16], depths=[1] * 4, decoder_hidden_size=16
        ),
        64,
        lambda y: F.interpolate(y.logits, (64, 64), mode="bilinear"),
    ),
}


@pytest.mark.parametrize("name", REAL)
@torch.no_grad()
def test_models_of_other_projects(name):
    make, size, upsampled = REAL[name]
    x = images(1, size, size)
    model = balanced(with_statistics(make()).eval(), x)
    fast = accelerate(model, inference=True)
    actual, expected = fast(x), model(x)
    assert type(actual) is type(expected) and isinstance(fast, AcceleratedModel)
    exact = upsampled(copy.deepcopy(model).double()(x.double()))
    in_channels_last = upsampled(model(x.contiguous(memory_format=torch.channels_last)))
    assert_as_accurate_as(upsampled(actual), upsampled(expected), exact, in_channels_last)
    check_labels(fast.predict(x), model, fast, x, upsampled)


def test_the_auxiliary_head_does_not_run_in_predict():
    model = torchvision_model("fcn_resnet50", aux_loss=True).eval()
    fast, x, ran = accelerate(model, inference=True), images(1, 17, 17), []
    fast.network.aux_classifier.register_forward_hook(lambda *args: ran.append("module"))
    for module in fast.network.aux_classifier.modules():
        module.register_forward_hook(lambda *args: ran.append("aux"))
    labels = fast.predict(x)
    assert not ran
    assert list(fast(x)) == ["out", "aux"] and ran
    assert len(list(fast.parameters())) == len({id(p) for p in fast.network.parameters()})
    assert torch.equal(labels, fast(x)["out"].argmax(1))


# --- the copy


def test_the_copy_shares_nothing_and_the_original_stays():
    model = Head(to_images).train()
    state = copy.deepcopy(model.state_dict())
    fast = accelerate(model, inference=True)
    assert model.training and not fast.training
    x = images()
    labels, output = fast.predict(x), fast(x)
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.zero_()
    assert torch.equal(fast.predict(x), labels) and torch.equal(fast(x), output)
    model.load_state_dict(state)
    for tensor in fast.state_dict().values():
        tensor.zero_()
    assert_close(model.state_dict(), state, rtol=0, atol=0)


def test_the_copy_stays_in_evaluation_mode():
    fast = accelerate(Head(to_images), inference=True)
    assert fast.train() is fast
    assert not any(module.training for module in fast.modules())


def through_a_file(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def lasting(logits, images):
    return to_images(logits, images)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, through_a_file], ids=["copy", "file"])
def test_copies_and_files(duplicate):
    fast, x = accelerate(Head(lasting), inference=True), images()
    other = duplicate(fast)
    assert_close(other(x), fast(x)) and other.trial == fast.trial
    assert torch.equal(other.predict(x), fast.predict(x))
    other.load_state_dict(fast.state_dict())
    for parameter in other.parameters():
        parameter.data.zero_()
    assert len(fast.predict(x).unique()) > 1


@torch.no_grad()
def test_half_precision():
    model, x = Head(to_images).eval(), images()
    fast = accelerate(model, inference=True)
    exact = copy.deepcopy(model).double()(x.double())
    peer = copy.deepcopy(model).bfloat16()(x.bfloat16())
    assert_as_accurate_as(fast.to(torch.bfloat16)(x.bfloat16()), peer, exact)
    assert fast.predict(x.bfloat16()).shape == (2, 33, 37)


@torch.no_grad()
def test_autocast():
    model, x = Head(to_images).eval(), images()
    fast = accelerate(model, inference=True)
    exact = copy.deepcopy(model).double()(x.double())
    with torch.autocast("cpu", torch.bfloat16):
        actual, peer = fast(x), model(x)
        assert fast.network.conv(x).dtype == torch.bfloat16
    assert_as_accurate_as(actual, peer, exact)


@pytest.mark.parametrize("last", [to_images, KINDS["dict"]], ids=["tensor", "dict"])
@torch.no_grad()
def test_compiled(last):
    torch._dynamo.reset()
    fast, x = accelerate(Head(last), inference=True), images(1)
    compiled = torch.compile(fast, fullgraph=True, backend="aot_eager")
    assert_close(compiled(x), fast(x))
    predict = torch.compile(fast.predict, fullgraph=True, backend="aot_eager")
    assert torch.equal(predict(x), fast.predict(x))
    predict = torch.compile(fast.predict, backend="aot_eager")
    assert torch.equal(predict(x, size=(20, 30)), fast.predict(x, size=(20, 30)))


@torch.no_grad()
def test_compiled_binary_model():
    torch._dynamo.reset()
    last, _ = BINARY["probabilities"]
    fast, x = accelerate(Head(last, classes=1), inference=True), images(1)
    predict = torch.compile(fast.predict, fullgraph=True, backend="aot_eager")
    assert torch.equal(predict(x), fast.predict(x))


@pytest.mark.parametrize("strict", [False, True])
@torch.no_grad()
def test_exported(strict):
    fast, x = accelerate(Head(to_images), inference=True), images(1)
    exported = torch.export.export(fast, (x,), strict=strict).module()
    assert_close(exported(x), fast(x))


# --- NaN and Inf


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@torch.no_grad()
def test_pixels_that_are_not_finite(value):
    # Small convolutions would not be fused with ReLU.
    model, x = Head(to_images).eval(), images(2, 260, 260)
    x[0, 0, 3, 4] = value
    fast = accelerate(model, inference=True)
    expected = model(x)
    assert_close(fast(x), expected, rtol=1e-4, atol=1e-5, equal_nan=True)
    assert expected[0].isnan().any() and not expected[0].isnan().all()
    is_finite = expected.isfinite().all(1)
    assert torch.equal(fast.predict(x)[is_finite], expected.argmax(1)[is_finite])

    torch._dynamo.reset()
    compiled = torch.compile(fast, fullgraph=True, backend="aot_eager")(x)
    assert compiled[0].isnan().all()
    assert_close(compiled[1], expected[1], rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_weights_that_are_not_finite():
    model, x = Head(to_images).eval(), images(2, 260, 260)
    model.conv.weight[0, 0, 0, 0] = torch.nan
    fast = accelerate(model, inference=True)
    assert_close(fast(x), model(x), equal_nan=True)
    fast = accelerate(Head(to_images), inference=True)
    state = fast.state_dict()
    state["network.conv.weight"] = torch.full_like(state["network.conv.weight"], torch.nan)
    fast.load_state_dict(state)
    assert fast(x).isnan().any()


class Masked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mask", torch.tensor([0, 0, -torch.inf])[:, None, None])

    def forward(self, images):
        return (images + self.mask).softmax(1)


@torch.no_grad()
def test_infinite_values_of_a_mask():
    model, x = nn.Sequential(Masked(), Head(to_images)).eval(), images(1)
    fast = accelerate(model, inference=True)
    exported = torch.export.export(fast, (x,)).module()
    assert_close(exported(x), model(x), rtol=1e-4, atol=1e-5)


# --- what cannot be accelerated


class OwnFormat(Head):
    """A model whose code needs contiguous memory."""

    def forward(self, images):
        features = self.conv(images)
        scale = features.view(features.size(0), -1).mean(1)
        return super().forward(images * scale[:, None, None, None])


def test_code_that_needs_contiguous_memory():
    model, x = OwnFormat(to_images), images()
    fast = accelerate(model, inference=True)
    assert not fast.trial.in_channels_last and not fast.trial.failure
    check_labels(fast.predict(x), model, fast, x, lambda y: y)


class OwnFormatOfBatches(Head):
    """A model whose code needs contiguous memory of several images."""

    def forward(self, images):
        rows = images.view(-1, *images.shape[2:])
        return super().forward((rows / rows.amax()).view(images.shape))


def test_code_that_needs_contiguous_memory_of_several_images():
    model, x = OwnFormatOfBatches(to_images), images()
    fast = accelerate(model, inference=True)
    assert not fast.trial.in_channels_last and not fast.trial.failure
    check_labels(fast.predict(x), model, fast, x, lambda y: y)


class Standardized(nn.Conv2d):
    """A convolution whose code needs contiguous weights."""

    def forward(self, input):
        scale = self.weight.view(self.out_channels, -1).std(1)[:, None, None, None]
        return self._conv_forward(input, self.weight / scale, self.bias)


def test_code_that_needs_contiguous_weights():
    model = Head(to_images)
    model.block.layers[0] = Standardized(8, 8, 3, padding=1)
    fast, x = accelerate(model, inference=True), images()
    assert fast.trial.in_channels_last
    check_labels(fast.predict(x), model, fast, x, lambda y: y)


class CannotBeCopied(Head):
    def __deepcopy__(self, memo):
        raise TypeError("no copies")


@pytest.mark.parametrize(
    "model, reason",
    [(nn.Sequential(nn.Linear(3, 4)), ""), (CannotBeCopied(), "it cannot be copied: no copies")],
    ids=["linear", "cannot be copied"],
)
def test_models_that_come_back_unchanged(model, reason, caplog):
    with caplog.at_level(logging.WARNING, "deeplab_fast"):
        assert accelerate(model, inference=True) is model
    assert len(caplog.records) == 1
    accelerated, report = prepare(model)
    assert accelerated is model and reason in str(report) and not report.replaced()


def test_weight_norm_of_old_torch():
    conv = nn.utils.weight_norm(nn.Conv2d(3, 4, 3))
    model = nn.Sequential(conv, nn.Conv2d(4, 5, 1)).eval()
    with torch.no_grad():
        conv(images())  # as it is after a forward pass
    fast, x = accelerate(model, inference=True), images()
    assert_close(fast(x), model(x))


def test_models_of_this_package_are_prepared():
    model = DeepLabV3("mobilenet_v2", 5).train()
    fast = accelerate(model, inference=True)
    assert isinstance(fast, InferenceModel) and model.training
    assert accelerate(fast, inference=True) is fast
    accelerated = accelerate(Head(), inference=True)
    assert accelerate(accelerated, inference=True) is accelerated


# --- the report


def test_report():
    model = torchvision_model("deeplabv3_resnet50")
    with torch.device("meta"):
        model = model.to("meta")
    _, report = prepare(model)
    entries = {entry.name: entry for entry in report.entries}
    assert entries["backbone"].replacement == (
        "53 of 53 fused, 53 with batch norm, 49 with ReLU, 16 with a residual"
    )
    assert entries["classifier"].kind == "convolutions"
    assert entries[""].replacement == (
        "bilinear to the images' size, align_corners=False, fused with argmax"
    )


@pytest.mark.parametrize(
    "name, resize",
    [
        ("a factor", "to the images' size, align_corners=False, fused"),
        ("two factors that the sizes round", "by a factor of 3.3 and 4.7"),
        ("a fixed size", "to 40x50, align_corners=True"),
        ("the size of the trial", "to 256x256, align_corners=False"),
        ("two resizes", "to the images' size, align_corners=False, fused with argmax; the resize"),
        ("a softmax", "the output has the images' size"),
    ],
)
def test_report_of_the_final_resize(name, resize):
    _, report = prepare(Head(LAST[name]))
    *_, final = report.entries
    assert final.kind == "final resize" and resize in (final.replacement or final.reason)


def test_report_of_kept_convolutions_and_of_a_failed_trial():
    model = ReadsValues()
    model.classifier.padding_mode = "reflect"
    _, report = prepare(model)
    entries = {entry.name: entry for entry in report.entries}
    assert entries["classifier"].reason.startswith("padding: reflect")
    assert entries["conv"].replacement is None
    assert entries["block"].replacement == "1 of 1 fused, 1 with batch norm, 1 with ReLU"
    assert "a trial run failed: " in entries[""].reason
