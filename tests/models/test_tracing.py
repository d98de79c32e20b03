"""torch.fx and torch.jit.trace: the graphs that other tools make of the models."""

import copy
import io
import pickle

import pytest
import torch
from torch import fx, nn
from torch.ao.quantization import get_default_qat_qconfig_mapping, get_default_qconfig_mapping
from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx, prepare_qat_fx
from torch.fx.passes.shape_prop import ShapeProp
from torch.fx.proxy import TraceError

from deeplab_fast import ASPP, DeepLabV3, DeepLabV3Plus, accelerate, restore, upsample_argmax
from deeplab_fast.nn import Conv2d

pytestmark = [
    pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning"),
    pytest.mark.filterwarnings("ignore:.*torch.jit.*deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*torch.ao.quantization.*deprecated:DeprecationWarning"),
]

BACKBONES = [
    ("resnet18", "torchvision"),
    pytest.param("resnet50c", "torchvision", marks=pytest.mark.slow),
    ("mobilenet_v2", "torchvision"),
    ("mobilenet_v2", "tensorflow"),
    pytest.param("mobilenet_v2", "VainF", marks=pytest.mark.slow),
    ("mobilenet_v3_large", "torchvision"),
]
IMAGES = torch.randn(2, 3, 33, 49, generator=torch.Generator().manual_seed(0))
OTHERS = torch.randn(3, 3, 65, 40, generator=torch.Generator().manual_seed(1))


def assert_same_outputs(traced, model, images, tolerance=1e-4):
    torch.manual_seed(0)
    expected = copy.deepcopy(model)(images)
    torch.manual_seed(0)
    outputs = copy.deepcopy(traced)(images)
    assert list(outputs) == list(expected)
    for name, output in outputs.items():
        error = (output - expected[name]).abs().max() / expected[name].abs().max()
        assert error < tolerance, name


@pytest.fixture(scope="module")
def small():
    torch.manual_seed(0)
    return DeepLabV3("resnet18", 5, 16).eval()


class Predict(nn.Module):
    def __init__(self, model, dtype=torch.int64):
        super().__init__()
        self.model, self.dtype = model, dtype

    def forward(self, images):
        return self.model.predict(images, dtype=self.dtype)


# --- torch.fx


@pytest.mark.parametrize(("backbone", "variant"), BACKBONES)
@pytest.mark.parametrize("network", [DeepLabV3, DeepLabV3Plus])
def test_symbolic_trace_gives_the_same_outputs(network, backbone, variant):
    model = network(backbone, 5, 16, backbone_variant=variant, aux_loss=True)
    for mode in (True, False):
        traced = fx.symbolic_trace(model.train(mode))
        for images in (IMAGES, OTHERS):
            assert_same_outputs(traced, model, images)


@pytest.mark.parametrize("network", [DeepLabV3, DeepLabV3Plus])
def test_symbolic_trace_of_a_timm_backbone(network):
    pytest.importorskip("timm", reason="the backbone is timm's")
    model = network("timm/mobilenetv3_small_050", 5, 16).eval()
    assert_same_outputs(fx.symbolic_trace(model), model, OTHERS)


@pytest.mark.parametrize("options", [{}, {"separable": True}, {"project_size": 3}])
def test_symbolic_trace_of_aspp(options):
    aspp = ASPP(16, (2, 4), 8, **options)
    for mode in (True, False):
        traced = fx.symbolic_trace(aspp.train(mode))
        for shape in ((2, 16, 9, 9), (3, 16, 5, 12)):
            x = torch.randn(shape)
            torch.manual_seed(0)
            expected = copy.deepcopy(aspp)(x)
            torch.manual_seed(0)
            torch.testing.assert_close(copy.deepcopy(traced)(x), expected, rtol=1e-4, atol=1e-5)


def test_layers_keep_their_names():
    segmentation = pytest.importorskip("torchvision.models.segmentation", reason="the peer")
    from torchvision.models.feature_extraction import get_graph_node_names

    other = segmentation.deeplabv3_resnet50(weights=None, weights_backbone=None)
    names = [set(get_graph_node_names(m)[1]) for m in (other, DeepLabV3("resnet50"))]
    # The name of the argument, sizes, and how the pooled branch is repeated
    pooled = {f"classifier.0.convs.4.{name}" for name in ("getattr", "getitem", "interpolate")}
    assert names[0] - names[1] == {"x", "getattr", "getitem", *pooled}
    assert names[1] - names[0] == {
        "images", "size", "size_1",
        *(f"classifier.0.{name}" for name in ("size", "size_1", "expand")),
    }  # fmt: skip


def test_feature_extractor(small):
    extraction = pytest.importorskip("torchvision.models.feature_extraction", reason="the tool")
    nodes = {"backbone.layer4": "deep", "classifier.0.project": "aspp", "classifier.4": "logits"}
    features = extraction.create_feature_extractor(small, nodes)(OTHERS)
    assert list(features) == ["deep", "aspp", "logits"]
    torch.testing.assert_close(features["deep"], small.backbone(OTHERS)["out"])
    assert features["aspp"].shape == (3, 256, 5, 3)
    torch.testing.assert_close(
        features["logits"], small.logits(OTHERS)["out"], rtol=1e-4, atol=1e-5
    )


def test_interpreter_and_transformer(small):
    traced = fx.symbolic_trace(small)
    ShapeProp(traced).propagate(IMAGES)
    shapes = {node.name: node.meta["tensor_meta"].shape for node in traced.graph.nodes
              if hasattr(node.meta.get("tensor_meta"), "shape")}  # fmt: skip
    assert shapes["classifier_0_project_0"] == (2, 256, 3, 4)
    expected = small(OTHERS)["out"]
    for run in (fx.Interpreter(traced).run, fx.Transformer(traced).transform()):
        torch.testing.assert_close(run(OTHERS)["out"], expected, rtol=1e-4, atol=1e-5)


def test_a_prepared_model_says_what_to_trace(small):
    with pytest.raises(TraceError, match="trace the model on which prepare_for_inference"):
        fx.symbolic_trace(small.prepare_for_inference())


def test_an_accelerated_copy_says_what_to_trace():
    conv = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).eval()
    for module in (
        accelerate(conv, inference=True),
        nn.Sequential(accelerate(conv, inference=True)),
    ):
        with pytest.raises(TraceError, match="trace the model on which accelerate"):
            fx.symbolic_trace(module)


# --- quantisation


def trained_a_little(model):
    """``model`` with running statistics of its batch norms, in evaluation mode."""
    with torch.no_grad():
        for _ in range(3):
            model.train()(torch.randn(4, 3, 65, 65))
    return model.eval()


def int8(model, images):
    prepared = prepare_fx(copy.deepcopy(model), get_default_qconfig_mapping("x86"), (images,))
    with torch.no_grad():
        prepared(images)
    return convert_fx(prepared)


def difference(model, other, images):
    """Relative difference of the logits, and the share of pixels whose label differs."""
    with torch.no_grad():
        expected, logits = model(images)["out"], other(images)["out"]
    labels = (expected.argmax(1) != logits.argmax(1)).float().mean()
    return float((logits - expected).norm() / expected.norm()), float(labels)


@pytest.fixture
def quantized_engine():
    if "x86" not in torch.backends.quantized.supported_engines:
        pytest.skip("this torch has no int8 kernels for x86")
    before = torch.backends.quantized.engine
    torch.backends.quantized.engine = "x86"
    yield
    torch.backends.quantized.engine = before


def test_int8_is_as_close_as_torchvisions(quantized_engine):
    segmentation = pytest.importorskip("torchvision.models.segmentation", reason="the peer")
    torch.manual_seed(0)
    other = segmentation.deeplabv3_mobilenet_v3_large(weights=None, weights_backbone=None)
    trained_a_little(other)
    model = DeepLabV3("mobilenet_v3_large", 21, 16, (12, 24, 36), aux_loss=False).eval()
    model.load_state_dict(other.state_dict())
    images = torch.randn(2, 3, 65, 65)
    converted, converted_other = int8(model, images), int8(other, images)
    error, labels = difference(model, converted, OTHERS)
    other_error, other_labels = difference(other, converted_other, OTHERS)
    assert error <= 1.5 * other_error
    assert labels <= 2 * other_labels + 0.01
    kinds = {type(module) for module in converted.modules()}
    assert not {nn.Conv2d, Conv2d, nn.BatchNorm2d} & {*kinds}


def test_quantisation_aware_training(quantized_engine):
    torch.manual_seed(0)
    model = DeepLabV3Plus("resnet18", 5).train()
    prepared = prepare_qat_fx(model, get_default_qat_qconfig_mapping("x86"), (IMAGES,))
    prepared(IMAGES)["out"].sum().backward()
    layers = [m for m in prepared.modules() if isinstance(m, nn.Conv2d)]
    assert len(layers) == sum(isinstance(m, nn.Conv2d) for m in model.modules())
    assert all(layer.weight.grad is not None for layer in layers)
    assert all(type(layer).__module__.startswith("torch.ao.nn") for layer in layers)
    assert convert_fx(prepared.eval())(OTHERS)["out"].shape == (3, 5, 65, 40)


def test_int8_of_a_model_accelerated_in_place(quantized_engine):
    network = nn.Sequential(nn.Conv2d(3, 4, 3, padding=2, dilation=2), nn.BatchNorm2d(4), nn.ReLU())
    accelerated = accelerate(network.eval())
    assert type(accelerated[0]) is not nn.Conv2d
    kinds = [type(module).__name__ for module in int8(accelerated, IMAGES).modules()]
    assert "ConvReLU2d" in kinds
    assert "BatchNorm2d" not in kinds
    assert type(restore(accelerated)[0]) is nn.Conv2d


def test_our_convolution_is_found_by_its_type():
    class Other(Conv2d):
        def forward(self, input):
            return input

    assert (Conv2d == nn.Conv2d, Conv2d != nn.Conv2d, nn.Conv2d == Conv2d) == (True, False, True)
    assert {nn.Conv2d: "found"}[Conv2d] == "found"
    assert Conv2d != nn.ConvTranspose2d
    assert Other != nn.Conv2d
    assert type(pickle.loads(pickle.dumps(Conv2d(1, 1, 1)))) is Conv2d


# --- torch.jit.trace


def saved_and_loaded(traced):
    file = io.BytesIO()
    torch.jit.save(traced, file)
    file.seek(0)
    return torch.jit.load(file)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8])
@pytest.mark.parametrize("target", [{"size": (33, 40)}, {"scale_factor": (0.29, 3.7)}])
def test_jit_trace_of_upsample_argmax(dtype, target):
    def labels(logits):
        return upsample_argmax(logits, dtype=dtype, **target)

    traced = torch.jit.trace(labels, torch.randn(1, 5, 9, 9))
    logits = torch.randn(2, 5, 100, 12)
    assert traced(logits).dtype == dtype
    assert torch.equal(traced(logits), labels(logits))


@pytest.mark.parametrize(
    ("prepared", "align_corners", "dtype"),
    [(False, False, torch.int64), (True, False, torch.int64), (True, True, torch.uint8)],
)
def test_jit_trace_of_predict(small, prepared, align_corners, dtype):
    model = copy.deepcopy(small)
    model.align_corners = align_corners
    model = model.prepare_for_inference() if prepared else model
    traced = torch.jit.trace(Predict(model, dtype).eval(), IMAGES)
    for function in (traced, torch.jit.freeze(saved_and_loaded(traced))):
        for images in (IMAGES, OTHERS):
            labels = function(images)
            assert labels.dtype == dtype
            expected = model.predict(images, dtype=dtype)
            assert labels.shape == expected.shape
            assert (labels != expected).float().mean() < 1e-3


@pytest.mark.parametrize(("network", "prepared"), [(DeepLabV3, False), (DeepLabV3Plus, True)])
def test_jit_trace_of_forward(network, prepared):
    model = network("mobilenet_v2", 5, 16, backbone_variant="tensorflow").eval()
    model = model.prepare_for_inference() if prepared else model
    traced = torch.jit.trace(model, IMAGES, strict=False)
    for function in (traced, torch.jit.optimize_for_inference(saved_and_loaded(traced))):
        with torch.no_grad():
            expected, logits = model(OTHERS)["out"], function(OTHERS)["out"]
        assert (logits - expected).abs().max() < 1e-4 * expected.abs().max()


def test_jit_trace_of_an_accelerated_model():
    segmentation = pytest.importorskip("torchvision.models.segmentation", reason="the peer")
    torch.manual_seed(0)
    other = segmentation.deeplabv3_mobilenet_v3_large(weights=None, weights_backbone=None).eval()
    model = accelerate(other, inference=True)
    traced = torch.jit.trace(Predict(model).eval(), IMAGES)
    for function in (traced, saved_and_loaded(traced)):
        labels = function(OTHERS)
        assert labels.shape == (3, 65, 40)
        assert (labels != model.predict(OTHERS)).float().mean() < 1e-3


def test_jit_trace_of_the_method(small):
    traced = torch.jit.trace_module(small, {"predict": IMAGES})
    assert (traced.predict(OTHERS) != small.predict(OTHERS)).float().mean() < 1e-3
