"""Export to OpenVINO IR, in fp32 and in int8."""

from __future__ import annotations

import contextlib
import copy
import importlib
import io
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from deeplab_fast import DeepLabV3
from deeplab_fast.export import openvino as exporting
from deeplab_fast.export import quantization
from deeplab_fast.export.check import CheckFailed, Comparison
from deeplab_fast.export.onnx import export_onnx
from deeplab_fast.export.openvino import export_openvino, import_openvino
from deeplab_fast.export.optional import not_installed
from deeplab_fast.export.quantization import Photos, agreement, evenly_spread
from deeplab_fast.models.preprocessing import network_input

CLASSES = ("sky", "road", "tree")


@pytest.fixture(scope="module")
def model(photos) -> DeepLabV3:
    return small_model(photos)


def small_model(photos: list[Path], seed: int = 0) -> DeepLabV3:
    """A network with random weights and batch norm statistics of the photos, as after training."""
    torch.manual_seed(seed)
    model = DeepLabV3("mobilenet_v2", 3, 16, (2,), aspp_channels=16, align_corners=True)
    model.categories = CLASSES
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    model.train()(torch.stack([model.preprocessing(Image.open(photo)) for photo in photos]))
    return model.eval()


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> list[Path]:
    """Photos of 65x65 pixels with smooth coloured areas."""
    folder = tmp_path_factory.mktemp("photos")
    random = np.random.default_rng(0)
    paths = [folder / f"{name}.png" for name in "abc"]
    for path in paths:
        coarse = Image.fromarray(random.integers(0, 256, (5, 5, 3), dtype=np.uint8))
        coarse.resize((65, 65), Image.Resampling.BICUBIC).save(path)
    return paths


@pytest.fixture(scope="module")
def onnx_file(model, tmp_path_factory) -> Path:
    pytest.importorskip("openvino", reason="the format is OpenVINO's")
    pytest.importorskip("onnxscript", reason="the export goes through ONNX")
    if not hasattr(torch.compiler, "is_exporting"):
        pytest.skip("export for any size needs torch 2.7")
    path = tmp_path_factory.mktemp("onnx") / "model.onnx"
    export_onnx(model, path, dtype=torch.uint8)
    return path


@pytest.fixture
def one_onnx_export(onnx_file, monkeypatch):
    use_file(onnx_file, monkeypatch)


@pytest.fixture(scope="module")
def int8(model, photos, onnx_file, tmp_path_factory):
    """An export in int8: its path, the report and what was printed."""
    pytest.importorskip("nncf", reason="it quantises")
    path = tmp_path_factory.mktemp("int8") / "model.xml"
    printed = io.StringIO()
    with (
        pytest.MonkeyPatch.context() as patch,
        contextlib.redirect_stdout(printed),
        contextlib.redirect_stderr(printed),
    ):
        use_file(onnx_file, patch)
        report = export_openvino(model, path, dtype=torch.uint8, calibration=photos)
    return path, report, printed.getvalue()


def use_file(onnx_file: Path, patch: pytest.MonkeyPatch) -> None:
    """Copy ``onnx_file`` in all exports, because each would take seconds."""
    patch.setattr(exporting, "export_onnx", lambda _, path, **options: shutil.copy(onnx_file, path))


def import_openvino_or_skip():
    pytest.importorskip("openvino", reason="the format is OpenVINO's")
    return import_openvino()


def read(path: Path):
    return import_openvino().Core().read_model(path)


def test_fp32_labels_are_those_of_the_model(model, one_onnx_export, tmp_path):
    path = tmp_path / "model.xml"
    report = export_openvino(model, path, dtype=torch.uint8)
    assert isinstance(report, Comparison) and len(report.shapes) == 3
    assert sorted(file.name for file in tmp_path.iterdir()) == ["model.bin", "model.xml"]
    weights = sum(p.numel() for p in model.prepare_for_inference().parameters())
    assert path.with_suffix(".bin").stat().st_size >= 4 * weights
    network = read(path)
    (images,), (labels,) = network.inputs, network.outputs
    assert images.any_name == "images" and labels.any_name == "labels"
    assert [side.is_dynamic for side in images.partial_shape] == [True, False, True, True]
    assert labels.element_type.to_dtype() == np.uint8
    assert network.get_rt_info(["deeplab_fast", "categories"]).value == '["sky", "road", "tree"]'
    inputs = torch.randn(1, 3, 81, 49)
    got = exporting.compiled(network)(inputs.numpy())
    expected = model.predict(inputs, dtype=torch.uint8).numpy()
    assert got.shape == expected.shape and (got == expected).mean() > 0.999
    assert len(np.unique(expected)) > 1


def test_a_wrong_export_is_detected_and_not_written(photos, one_onnx_export, tmp_path):
    path = tmp_path / "model.xml"
    path.write_text("earlier")
    with pytest.raises(CheckFailed, match="labels: "):
        export_openvino(small_model(photos, seed=1), path, dtype=torch.uint8)
    assert path.read_text() == "earlier" and list(tmp_path.iterdir()) == [path]


def test_a_wrong_export_with_the_same_labels_is_detected(model, one_onnx_export, tmp_path):
    """As of a trained model that sees nothing but background in random images."""
    doubled = copy.deepcopy(model)
    for parameter in doubled.classifier[-1].parameters():
        parameter.data *= 2
    with pytest.raises(CheckFailed, match="logits: "):
        export_openvino(doubled, tmp_path / "model.xml", dtype=torch.uint8)


def test_wrong_arguments(model, tmp_path):
    pytest.importorskip("openvino", reason="the format is OpenVINO's")
    with pytest.raises(ValueError, match=r"path: expected .* ends in \.xml, got model.bin"):
        export_openvino(model, tmp_path / "model.bin")
    with pytest.raises(RuntimeError, match="expected evaluation mode"):
        export_openvino(DeepLabV3("mobilenet_v2", 3, 16), tmp_path / "model.xml")
    with pytest.raises(ValueError, match="calibration: expected at least one photo, got none"):
        Photos([], model, None)
    with pytest.raises(ValueError, match="calibration: expected a model with preprocessing"):
        Photos([Path("a.jpg")], nn.Identity(), None)
    with pytest.raises(ValueError, match="missing.jpg: no such file"):
        Photos([Path("missing.jpg")], model, None).input(Path("missing.jpg"))


def test_a_missing_package_is_named_with_its_extra(model, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(ImportError, match=r'openvino .*pip install "deeplab-fast\[int8\]"'):
        export_openvino(model, tmp_path / "model.xml")
    monkeypatch.setitem(sys.modules, "nncf", None)
    with pytest.raises(ImportError, match=r'nncf .*pip install "deeplab-fast\[int8\]"'):
        quantization.import_nncf()


def test_int8_convolutions_but_fp32_logits(int8):
    path, _, _ = int8
    operations = read(path).get_ordered_ops()

    def source(operation, index=0):
        return operation.input(index).get_source_output().get_node()

    kinds = ("Convolution", "GroupConvolution")
    convolutions = [op for op in operations if op.get_type_name() in kinds]
    weights = []
    for convolution in convolutions:
        constant = source(convolution, 1)
        while constant.get_type_name() != "Constant":
            constant = source(constant)
        weights.append(constant.get_element_type().to_dtype())
    assert {op.get_type_name() for op in convolutions} == set(kinds)
    assert set(weights) == {np.dtype(np.int8)}
    (step,) = (op for op in operations if op.get_type_name() == "TopK")
    path_of_logits = []
    while step.get_type_name() not in kinds:
        step = source(step)
        path_of_logits.append(step.get_type_name())
    assert "Interpolate" in path_of_logits and "FakeQuantize" not in path_of_logits


def test_int8_labels_agree_with_fp32(model, photos, int8):
    path, report, _ = int8
    assert (report.photos, report.calibrated, report.held_out) == (3, 3, False)
    run = exporting.compiled(read(path))
    inputs = [
        network_input(Image.open(photo).convert("RGB"), model.preprocessing, model.align_corners)
        for photo in photos
    ]
    equal = [(run(x.numpy()) == model.predict(x).numpy()).mean() for x in inputs]
    assert np.mean(equal) == pytest.approx(report.equal, abs=1e-3)
    assert 0.4 < report.equal < 1  # a network with random weights amplifies the rounding


def test_calibration_adapts_to_the_inputs():
    """Each ReLU of the network has the range of its input, which calibration has to find."""
    openvino = import_openvino_or_skip()
    pytest.importorskip("nncf", reason="it quantises")
    from openvino import opset13 as ops

    random = np.random.default_rng(0)
    weights = [random.standard_normal((8, 3, 1, 1)), random.standard_normal((8, 8, 1, 1))]
    images = [random.standard_normal((1, 3, 8, 8)).astype(np.float32) for _ in range(4)]

    def network():
        x = source = ops.parameter([1, 3, 8, 8], np.float32)
        for values in weights:
            options = ([1, 1], [0, 0], [0, 0], [1, 1])
            x = ops.relu(ops.convolution(x, ops.constant(np.float32(values)), *options))
        return openvino.Model([x], [source])

    def error(scale):
        """Relative error of int8 after calibration on images ``scale`` times as large."""
        int8 = quantization.quantize(network(), images, lambda x: x * np.float32(scale))
        engines = exporting.compiled(network()), exporting.compiled(int8)
        expected, got = ([engine(x) for x in images] for engine in engines)
        return np.linalg.norm(np.subtract(got, expected)) / np.linalg.norm(expected)

    assert error(1) < 0.05  # 8 bits
    assert error(0.1) > 0.3  # larger values are clipped
    assert error(100) > 0.3  # all values fall on a few of the 256 levels


def test_calibration_prints_nothing(int8):
    assert int8[2] == ""


def test_a_module_can_be_hidden():
    sys.modules.pop("this", None)
    importlib.import_module("json")
    with not_installed("this"), pytest.raises(ImportError):
        importlib.import_module("this")
    assert "this" not in sys.modules
    with not_installed("json"):
        importlib.import_module("json")  # imported before, so it stays
    assert "json" in sys.modules


@pytest.mark.slow
def test_calibration_sends_and_prints_nothing_in_a_new_process(onnx_file):
    pytest.importorskip("nncf", reason="it quantises")
    code = f"""
import sys
sys.path[:0] = {sys.path!r}
from deeplab_fast.export import quantization
from deeplab_fast.export.openvino import import_openvino
import numpy as np

network = import_openvino().Core().read_model({str(onnx_file)!r})
images = np.random.default_rng(0).standard_normal((1, 3, 65, 65), dtype=np.float32)
quantization.quantize(network, [images], lambda images: images)
assert "openvino_telemetry" not in sys.modules and "nncf.torch" not in sys.modules
import openvino_telemetry  # it is hidden no longer
"""
    command = [sys.executable, "-I", "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert (done.stdout, done.stderr, done.returncode) == ("", "", 0)


@pytest.mark.parametrize(
    ("count", "calibrated", "compared", "shared"),
    [(1, 1, 1, 1), (9, 9, 9, 9), (10, 8, 2, 0), (300, 240, 60, 0), (2000, 300, 100, 0)],
)
def test_photos_are_held_out_if_there_are_enough(model, count, calibrated, compared, shared):
    paths = [Path(f"{index:04}.jpg") for index in range(count)]
    photos = Photos(paths, model, None)
    assert len(photos.to_calibrate) == calibrated and len(photos.to_compare) == compared
    assert len({*photos.to_calibrate} & {*photos.to_compare}) == shared
    assert photos.held_out == (shared == 0)
    for chosen in (photos.to_calibrate, photos.to_compare):
        places = [paths.index(path) for path in chosen]
        assert places == sorted(places)
        assert max(np.diff([-1, *places, count])) <= 2 * count / len(chosen) + 1


def test_evenly_spread():
    assert evenly_spread("abcdef", 3) == ["a", "c", "e"]
    assert evenly_spread("abc", 5) == ["a", "b", "c"]
    assert evenly_spread(range(7), 2) == [0, 3]


def test_photos_are_the_networks_input(model, tmp_path):
    path = tmp_path / "photo.png"
    random = np.random.default_rng(0)
    photo = Image.fromarray(random.integers(0, 256, (40, 70, 3), dtype=np.uint8))
    photo.save(path)
    any_size = Photos([path], model, None).input(path)
    expected = network_input(photo, model.preprocessing, align_corners=True)
    assert any_size.shape == (1, 3, 33, 65) and np.array_equal(any_size, expected.numpy())
    fixed = Photos([path], model, (48, 80)).input(path)
    resized = photo.resize((80, 48), Image.Resampling.BILINEAR)
    assert np.array_equal(fixed[0], model.preprocessing(resized).numpy())
    assert fixed.flags.c_contiguous


class Listed(Photos):
    """Two photos whose inputs are their names' numbers."""

    def __init__(self) -> None:
        self.to_compare, self.to_calibrate, self.held_out = (
            [Path("0"), Path("1")],
            [Path("2")],
            True,
        )

    def input(self, path: Path) -> np.ndarray:
        return np.array(int(path.name))


def test_agreement_over_all_photos():
    expected = np.repeat([0, 0, 1, 1], 2500).reshape(2, 1, 50, 100)
    got = expected.copy()
    got[1, 0, :10] = 0  # 1000 pixels of class 1
    got[0, 0, 0, :9] = 7  # a class of less than a thousandth of the pixels
    report = agreement(lambda i: expected[i], lambda i: got[i].astype(np.uint8), Listed(), "labels")
    assert report.equal == pytest.approx(1 - 1009 / 10000)
    assert report.miou == pytest.approx((4991 / 6000 + 4000 / 5000) / 2)
    assert report.rare == 1 and report.warning is not None
    assert str(report) == (
        "int8 calibrated on 1 photo; labels compared with fp32 on 2 other photos: mean IoU 81.6% "
        "without 1 class of less than 0.1% of the pixels, 89.91% equal"
    )


@pytest.mark.parametrize("channels", [1, 3])
def test_agreement_of_logits(channels):
    logits = np.random.default_rng(0).standard_normal((2, 1, channels, 20, 20), dtype=np.float32)
    same = agreement(lambda i: logits[i], lambda i: 2 * logits[i], Listed(), "logits")
    assert same.equal == same.miou == 1 and same.warning is None
    opposite = agreement(lambda i: logits[i], lambda i: -logits[i], Listed(), "logits")
    assert opposite.equal < 0.2 and opposite.miou < 0.2
