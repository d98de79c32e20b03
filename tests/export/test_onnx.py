"""Export to ONNX: export_onnx, and torch.onnx.export as users call it."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import deeplab_fast
from deeplab_fast import export_onnx
from deeplab_fast.export import check
from deeplab_fast.export import onnx as exporter
from deeplab_fast.export.check import CheckFailed
from deeplab_fast.models import DeepLabV3, DeepLabV3Plus

from ..support.small_model import CATEGORIES, other_model, small_model, varied

onnx = pytest.importorskip("onnx", reason="the extra export is not installed")
pytest.importorskip("onnxscript", reason="the extra export is not installed")
onnxruntime = pytest.importorskip("onnxruntime", reason="the extra export is not installed")

SHAPES = [(1, 3, 65, 81), (2, 3, 48, 33), (3, 3, 97, 64)]
ANY_SIZE = {0: torch.export.Dim.DYNAMIC, 2: torch.export.Dim.DYNAMIC, 3: torch.export.Dim.DYNAMIC}


def onnx_runtime(path: Path) -> Any:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda images: session.run(None, {name: images})[0]


def openvino(path: Path) -> Any:
    core = pytest.importorskip("openvino", reason="OpenVINO is not installed").Core()
    # OpenVINO computes in bfloat16 by default, where the CPU can.
    compiled = core.compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return lambda images: np.asarray(compiled(images)[0])


def logits_of(model: nn.Module) -> Any:
    def logits(images: Tensor) -> Tensor:
        output = model(images)
        return output if isinstance(output, Tensor) else output["out"]

    return logits


def assert_standard(path: Path) -> list[str]:
    """The operators of a file, which are all of ONNX's own domain."""
    model = onnx.load(path)
    assert {(entry.domain, entry.version >= 18) for entry in model.opset_import} == {("", True)}
    assert {node.domain for node in model.graph.node} == {""}
    assert not model.functions
    return [node.op_type for node in model.graph.node]


def dimensions(value: Any) -> list[int | str]:
    return [d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim]


@pytest.fixture(scope="module")
def model():
    return small_model()


@pytest.fixture(scope="module")
def exported(model, tmp_path_factory):
    """Labels of uint8, for any size."""
    path = tmp_path_factory.mktemp("onnx") / "model.onnx"
    state = {name: value.clone() for name, value in model.state_dict().items()}
    comparison = export_onnx(model, path, dtype=torch.uint8)
    assert all(value.equal(state[name]) for name, value in model.state_dict().items())
    return path, comparison


@pytest.fixture(scope="module")
def exported_logits(tmp_path_factory):
    """Logits of a model with align_corners, for one size."""
    path, model = tmp_path_factory.mktemp("onnx") / "logits.onnx", small_model(align_corners=True)
    comparison = export_onnx(model, path, result="logits", size=(65, 81), batch=1)
    return path, comparison, model


def test_the_file_has_standard_operators_and_named_sizes(exported):
    path, _ = exported
    operators = assert_standard(path)
    assert operators.count("Resize") == operators.count("ArgMax") == 1
    assert not {"ReduceSum", "IsNaN", "BatchNormalization"} & {*operators}  # folded; no NaN repair
    graph = onnx.load(path).graph
    (images,), (labels,) = graph.input, graph.output
    assert images.name == "images" and labels.name == "labels"
    assert dimensions(images) == ["batch", 3, "height", "width"]
    assert dimensions(labels) == ["batch", "height", "width"]
    assert images.type.tensor_type.elem_type == onnx.TensorProto.FLOAT
    assert labels.type.tensor_type.elem_type == onnx.TensorProto.UINT8


def test_the_file_is_alone_and_names_no_path_of_this_machine(exported):
    path, _ = exported
    assert [*path.parent.iterdir()] == [path]
    assert os.path.dirname(deeplab_fast.__file__).encode() not in path.read_bytes()
    assert b"stack_trace" not in path.read_bytes()


def test_the_export_reports_its_check(exported):
    _, comparison = exported
    assert len(comparison.shapes) == len({shape[2:] for shape in comparison.shapes}) == 3
    assert comparison.differing == 0
    assert 0 < comparison.largest_difference < 1e-5  # of the logits in the file


@pytest.mark.parametrize("engine", [onnx_runtime, openvino])
def test_labels_of_any_size_agree(engine, exported, model):
    path, _ = exported
    run = engine(path)
    comparison = check.compare(run, logits_of(model), "labels", SHAPES)
    assert comparison.labels == sum(n * h * w for n, _, h, w in SHAPES)
    assert run(check.images_of(SHAPES[0]).numpy()).dtype == np.uint8


@pytest.mark.parametrize("engine", [onnx_runtime, openvino])
def test_logits_of_a_fixed_size_agree(engine, exported_logits):
    path, _, model = exported_logits
    assert_standard(path)
    graph = onnx.load(path).graph
    assert dimensions(graph.input[0]) == [1, 3, 65, 81]
    assert dimensions(graph.output[0]) == [1, 5, 65, 81] and graph.output[0].name == "logits"
    check.compare(engine(path), logits_of(model), "logits", [(1, 3, 65, 81)])


def test_the_check_of_logits_measures_their_difference(exported_logits):
    _, comparison, _ = exported_logits
    assert comparison.shapes == ((1, 3, 65, 81),)
    assert 0 < comparison.largest_difference < 1e-5


def test_metadata(exported, exported_logits):
    found = onnxruntime.InferenceSession(exported[0]).get_modelmeta().custom_metadata_map
    assert found["deeplab_fast_version"] == deeplab_fast.__version__
    assert found["result"] == "labels" and found["labels_dtype"] == "uint8"
    assert json.loads(found["categories"]) == [*CATEGORIES]
    assert json.loads(found["preprocessing"]) == {
        "channels": "RGB",
        "mean": [0.485, 0.456, 0.406],
        "std": [0.229, 0.224, 0.225],
        "resize": 520,
        "crop": None,
        "side_multiple": 1,
        "side_remainder": 0,
    }
    found = onnxruntime.InferenceSession(exported_logits[0]).get_modelmeta().custom_metadata_map
    assert found["result"] == "logits" and "labels_dtype" not in found
    preprocessing = json.loads(found["preprocessing"])
    assert (preprocessing["side_multiple"], preprocessing["side_remainder"]) == (16, 1)


def test_nan_of_an_image_does_not_reach_others(exported, model):
    images = check.images_of((2, 3, 33, 33))
    expected = onnx_runtime(exported[0])(images.numpy())
    images[0] = torch.nan
    assert (onnx_runtime(exported[0])(images.numpy())[1] == expected[1]).all()


def test_large_weights_go_to_a_second_file(model, tmp_path, monkeypatch):
    monkeypatch.setattr(exporter, "_MAX_FILE", 0)
    export_onnx(model, tmp_path / "model.onnx", size=(33, 33), batch=1)
    assert {path.name for path in tmp_path.iterdir()} == {"model.onnx", "model.onnx.data"}
    (tmp_path / "model.onnx").rename(tmp_path / "renamed.onnx")
    check.compare(
        onnx_runtime(tmp_path / "renamed.onnx"), logits_of(model), "labels", [(1, 3, 33, 33)]
    )


def test_a_failed_check_leaves_the_file_as_it_was(model, tmp_path, monkeypatch):
    path = tmp_path / "model.onnx"
    path.write_text("an older file")
    prepare = exporter.job_of

    def changed(*args: Any) -> Any:
        job = prepare(*args)
        with torch.no_grad():
            job.prepared.model.classifier[-1].bias.add_(torch.linspace(-0.1, 0.1, 5))
        return job

    monkeypatch.setattr(exporter, "job_of", changed)
    with pytest.raises(CheckFailed, match="labels: .* differ by more than rounding"):
        export_onnx(model, path, size=(33, 33), batch=1)
    assert path.read_text() == "an older file" and [*tmp_path.iterdir()] == [path]


@pytest.mark.parametrize("num_classes", [1, 5])
def test_a_model_that_sees_one_class_is_checked_by_its_logits(num_classes, tmp_path, monkeypatch):
    """Random images look like background to most trained models."""
    path, prepare, wrong = tmp_path / "model.onnx", exporter.job_of, False
    model = small_model(num_classes=num_classes)
    model.classifier[-1].bias.data[0] += 100.0

    def changed(*args: Any) -> Any:
        job = prepare(*args)
        if wrong:
            job.prepared.model.classifier[-1].bias.data[-1] += 1.0
        return job

    monkeypatch.setattr(exporter, "job_of", changed)
    comparison = export_onnx(model, path, size=(33, 33), batch=1)
    assert comparison is not None and comparison.largest_difference is not None
    wrong = True
    with pytest.raises(CheckFailed, match="logits: expected a difference of at most"):
        export_onnx(model, path, size=(33, 33), batch=1)


def test_without_onnx_runtime_nothing_is_checked(model, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    assert export_onnx(model, tmp_path / "model.onnx", size=(33, 33), batch=1) is None
    assert (tmp_path / "model.onnx").exists()


@pytest.mark.parametrize("name", ["onnx", "onnxscript"])
def test_a_missing_package_is_named(name, model, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match=rf'{name}.*pip install "deeplab-fast\[export\]"'):
        export_onnx(model, tmp_path / "model.onnx")


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"result": "masks"}, ValueError, 'result: expected "labels" or "logits"'),
        ({"dtype": torch.int16}, TypeError, "dtype: expected torch.int64"),
        ({"dtype": "uint8"}, TypeError, "dtype: expected torch.int64"),
        ({"size": (0, 3)}, ValueError, "size: expected a positive"),
        ({"size": (33.0, 33)}, TypeError, r"size: expected an int"),
        ({"batch": 0}, ValueError, "batch: expected a positive int"),
    ],
)
def test_wrong_arguments(options, error, message, model, tmp_path):
    with pytest.raises(error, match=message):
        export_onnx(model, tmp_path / "model.onnx", **options)


def test_wrong_models(model, tmp_path):
    path = tmp_path / "model.onnx"
    with pytest.raises(RuntimeError, match="expected evaluation mode"):
        export_onnx(small_model().train(), path)
    partly = small_model().eval()
    partly.classifier[1].train()
    with pytest.raises(RuntimeError, match="expected evaluation mode of classifier.1: call"):
        export_onnx(partly, path)
    with pytest.raises(TypeError, match=r"expected weights of float32, got torch.float16"):
        export_onnx(small_model().half(), path)
    with pytest.raises(TypeError, match="model: expected an nn.Module"):
        export_onnx("model.pth", path)
    with pytest.raises(ValueError, match="model: expected a convolution"):
        export_onnx(nn.Identity().eval(), path)
    with pytest.raises(ValueError, match="300 classes"):
        export_onnx(small_model(num_classes=300), path, dtype=torch.uint8)
    with pytest.raises(ValueError, match="model: expected weights, got tensors on the device meta"):
        export_onnx(small_model().to("meta"), path)
    assert not path.exists()


@pytest.mark.parametrize("form", ["training", "inference"])
def test_models_of_accelerate(form, tmp_path):
    """Both forms, with a model whose output is one tensor."""
    model = deeplab_fast.accelerate(other_model(), inference=form == "inference")
    assert any("ccelerated" in type(module).__name__ for module in model.modules())
    path = tmp_path / "model.onnx"
    comparison = export_onnx(model, path, dtype=torch.int32)
    assert comparison is not None and comparison.differing == 0
    assert_standard(path)
    check.compare(onnx_runtime(path), logits_of(other_model()), "labels", SHAPES)


def test_a_model_of_one_channel_is_binary(tmp_path):
    model = deeplab_fast.accelerate(other_model(num_classes=1), inference=True)
    export_onnx(model, tmp_path / "model.onnx", size=(64, 64), batch=1)
    images = check.images_of((1, 3, 64, 64))
    labels = onnx_runtime(tmp_path / "model.onnx")(images.numpy())
    assert (labels == (model(images)[:, 0] > 0).numpy()).mean() > 0.99
    assert 0.1 < labels.mean() < 0.9


class Labels(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.eval()

    def forward(self, images: Tensor) -> Tensor:
        return self.model.predict(images, dtype=torch.uint8)


class OwnModel(nn.Module):
    """A module of a user that calls our functions."""

    def __init__(self) -> None:
        super().__init__()
        self.pyramid = deeplab_fast.ASPP(4, (1, 2), 4)
        self.weight = nn.Parameter(torch.randn(4, 3, 3, 3))
        self.weights = nn.ParameterList([torch.randn(4, 4, 1, 1), torch.randn(4, 4, 3, 3)])
        self.pool, self.project = torch.randn(4, 4, 1, 1), torch.randn(5, 12, 1, 1)

    def forward(self, images: Tensor) -> Tensor:
        x = deeplab_fast.dilated_conv2d(images[:, :, ::2, ::2], self.weight, dilation=2)
        x = self.pyramid(x) + x
        biases, dilations = [torch.zeros(4)] * 2, [1, 3]
        x = deeplab_fast.aspp(
            x, list(self.weights), biases, dilations, self.pool, biases[0], self.project,
            torch.linspace(-0.1, 0.1, 5),
        )  # fmt: skip
        x = deeplab_fast.parallel_dilated_conv2d(x, [torch.eye(5)[..., None, None]], None, [1])
        return deeplab_fast.upsample_argmax(x, images.shape[2:])


def own_model() -> nn.Module:
    torch.manual_seed(0)
    return OwnModel().eval()


def export_by_user(module: nn.Module, path: Path, dynamic: bool, from_program: bool) -> None:
    args = (torch.randn(2, 3, 64, 80),)
    sizes = ((ANY_SIZE,) if dynamic else None,)
    # The one parameter of AcceleratedModel.forward is *args.
    is_variadic = isinstance(module, deeplab_fast.acceleration.AcceleratedModel)
    options: dict[str, Any] = {"dynamic_shapes": (sizes if is_variadic else sizes[0])}
    if not dynamic:
        options = {}
    if from_program:
        module, args = torch.export.export(module, args, strict=False, **options), ()  # type: ignore
        options = {}
    program = torch.onnx.export(
        module, args, dynamo=True, opset_version=18, verbose=False, **options
    )
    program.save(path)


USERS = {
    "plain": small_model,
    "prepared": lambda: deeplab_fast.models.inference.prepare(small_model(), None, False),
    "labels of prepared": lambda: Labels(
        deeplab_fast.models.inference.prepare(small_model(True), None, False)
    ),
    "accelerated": lambda: deeplab_fast.accelerate(other_model()),
    "accelerated for inference": lambda: deeplab_fast.accelerate(other_model(), inference=True),
    "labels of accelerated": lambda: Labels(deeplab_fast.accelerate(other_model(), inference=True)),
    "own": own_model,
}


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("name", "dynamic", "from_program"),
    [
        ("own", True, False),
        ("labels of prepared", True, False),
        ("accelerated", True, False),
        ("labels of accelerated", True, True),
        *(pytest.param(name, True, False, marks=SLOW) for name in ("plain", "prepared")),
        pytest.param("accelerated for inference", True, False, marks=SLOW),
        pytest.param("labels of prepared", False, False, marks=SLOW),
        pytest.param("labels of accelerated", True, False, marks=SLOW),
        pytest.param("accelerated for inference", False, False, marks=SLOW),
        pytest.param("prepared", True, True, marks=SLOW),
    ],
)
def test_torch_onnx_export(name, dynamic, from_program, tmp_path):
    """As users call it: standard operators, and the same results."""
    module, path = USERS[name](), tmp_path / "model.onnx"
    export_by_user(module, path, dynamic, from_program)
    operators = assert_standard(path)
    assert not {"ReduceSum", "IsNaN"} & {*operators}
    run = onnx_runtime(path)
    for shape in ((1, 3, 64, 80), (3, 3, 96, 32)) if dynamic else ((2, 3, 64, 80),):
        images = check.images_of(shape)
        with torch.no_grad():
            expected = module(images)
        expected = expected["out"] if isinstance(expected, dict) else expected
        got = torch.from_numpy(run(images.numpy()))
        if expected.is_floating_point():
            check.check_logits(got, expected)
        else:
            assert got.dtype == expected.dtype and got.shape == expected.shape
            assert (got != expected).double().mean() < 0.001
            assert got.unique().numel() > 1


def zoo() -> dict[str, Any]:
    """Models of all kinds, small images."""
    models: dict[str, Any] = {}
    for backbone in ("resnet50", "mobilenet_v2", "mobilenet_v3_large", "timm/test_resnet"):
        models[f"v3 {backbone}"] = lambda b=backbone: DeepLabV3(b, 5)
        models[f"v3+ {backbone}"] = lambda b=backbone: DeepLabV3Plus(b, 5, align_corners=True)
    models["v3+ separable"] = lambda: DeepLabV3Plus("mobilenet_v2", 5, separable=True)
    models["v3 align_corners"] = lambda: DeepLabV3("mobilenet_v2", 5, align_corners=True)
    models["v3 4 channels"] = lambda: DeepLabV3("mobilenet_v2", 5, in_channels=4)
    models["v3 grey"] = lambda: DeepLabV3("mobilenet_v2", 5, in_channels=1, output_stride=8)
    return models


@pytest.mark.slow
@pytest.mark.parametrize("name", zoo())
@pytest.mark.parametrize("result", ["labels", "logits"])
def test_all_models_export(name, result, tmp_path):
    if "timm" in name:
        pytest.importorskip("timm", reason="timm is not installed")
    torch.manual_seed(0)
    model, path = varied(zoo()[name]()), tmp_path / "model.onnx"
    comparison = export_onnx(model, path, result=result)
    assert comparison is not None
    assert_standard(path)
    check.compare(openvino(path), logits_of(model), result, comparison.shapes)


def torchvision_model() -> nn.Module:
    models = pytest.importorskip("torchvision", reason="torchvision is not installed").models
    return models.segmentation.deeplabv3_mobilenet_v3_large(
        weights=None, weights_backbone=None, num_classes=5, aux_loss=True
    )


def smp_model() -> nn.Module:
    smp = pytest.importorskip("segmentation_models_pytorch", reason="smp is not installed")
    return smp.DeepLabV3Plus("mobilenet_v2", encoder_weights=None, classes=5)


def huggingface_model() -> nn.Module:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    config = transformers.MobileNetV2Config(num_labels=5, depth_multiplier=0.35)
    return transformers.MobileNetV2ForSemanticSegmentation(config)


@pytest.mark.slow
@pytest.mark.parametrize("make", [torchvision_model, smp_model, huggingface_model])
@pytest.mark.parametrize("result", ["labels", "logits"])
@pytest.mark.parametrize("inference", [True, False])
def test_models_of_other_projects_export(make, result, inference, tmp_path):
    torch.manual_seed(0)
    model, path = make().eval(), tmp_path / "model.onnx"
    accelerated = deeplab_fast.accelerate(model, inference=inference)
    comparison = export_onnx(accelerated, path, result=result)
    assert comparison is not None and comparison.differing < 0.01 * comparison.labels
    assert_standard(path)
