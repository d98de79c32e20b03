"""Files of torch.save: what training scripts put beside the weights, and what must never run."""

from __future__ import annotations

import argparse
import builtins
import collections
import io
import os
import pickle
import sys
import types
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.testing import assert_close

from deeplab_fast.models import DeepLab, DeepLabV3
from deeplab_fast.models.checkpoints.state_dict import state_dict_of
from deeplab_fast.models.checkpoints.torch_file import Inert, read_torch_file


@pytest.fixture(scope="module")
def state() -> dict[str, Tensor]:
    """Weights of a small network in torchvision's keys."""
    return DeepLabV3("resnet18", 3, aspp_channels=16, aux_loss=True).state_dict()


def read(path: Path) -> dict[str, Tensor]:
    return state_dict_of(read_torch_file(path))[0]


STATE = {"conv.weight": torch.arange(6.0).reshape(2, 3), "conv.bias": torch.ones(2)}


@pytest.fixture
def foreign(monkeypatch) -> types.ModuleType:
    """A module that exists while files are written, and must not be imported to read them."""
    module = types.ModuleType("mmengine_logging")

    class HistoryBuffer:
        def __init__(self) -> None:
            self.history = np.arange(3.0)

    HistoryBuffer.__module__, HistoryBuffer.__qualname__ = module.__name__, "HistoryBuffer"
    module.HistoryBuffer = HistoryBuffer  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return module


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_objects_of_training_scripts_are_ignored(tmp_path, monkeypatch, foreign, zipped):
    """The checkpoint of torchvision's references/segmentation, NumPy's scalars, mmengine's logs."""
    content = {
        "model": STATE,
        "optimizer": {"state": {}, "param_groups": [{"lr": 0.1}]},
        "args": argparse.Namespace(lr=0.02, amp=True, output_dir=None),
        "best_pred": np.float64(0.5),
        "dtype": np.dtype("float32"),
        "array": np.ones(3),
        "path": Path("runs"),
        "message_hub": {"loss": foreign.HistoryBuffer()},
    }
    path = tmp_path / "checkpoint.pth"
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    monkeypatch.delitem(sys.modules, foreign.__name__)
    assert_close(read(path), STATE, rtol=0, atol=0)
    assert isinstance(read_torch_file(path)["args"], Inert)
    assert foreign.__name__ not in sys.modules


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_dicts_and_lists_of_other_classes_become_plain_ones(tmp_path, foreign, zipped):
    """PyTorch adds items to dicts, OrderedDicts and lists only."""

    class AttributeDict(dict):  # Lightning's hyper_parameters
        pass

    AttributeDict.__module__, AttributeDict.__qualname__ = foreign.__name__, "AttributeDict"
    foreign.AttributeDict = AttributeDict  # type: ignore[attr-defined]
    options = AttributeDict(lr=0.1, optimizer=AttributeDict(name="sgd", nesterov=True))
    options.frozen = True  # an attribute beside the items
    path = tmp_path / "checkpoint.ckpt"
    for value, plain in (
        (options, {"lr": 0.1, "optimizer": {"name": "sgd", "nesterov": True}}),
        (AttributeDict(lr=0.1), {"lr": 0.1}),
        (AttributeDict(lr=0.1, momentum=0.9), {"lr": 0.1, "momentum": 0.9}),
        ([AttributeDict(), AttributeDict(lr=0.1)], [{}, {"lr": 0.1}]),
        (collections.defaultdict(list, loss=[1.0]), {"loss": [1.0]}),
        (collections.deque([1]), [1]),
        (collections.deque([1, 2, 3], maxlen=3), [1, 2, 3]),
    ):
        content = {"state_dict": STATE, "value": value}
        torch.save(content, path, _use_new_zipfile_serialization=zipped)
        assert read_torch_file(path)["value"] == plain
        assert_close(read(path), STATE, rtol=0, atol=0)
    torch.save(AttributeDict(STATE), path, _use_new_zipfile_serialization=zipped)
    assert_close(read(path), STATE, rtol=0, atol=0)


class Call:
    """Pickled as a call of a function."""

    def __init__(self, function: Any, *args: Any) -> None:
        self.call = function, args

    def __reduce__(self) -> Any:
        return self.call


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize(
    "function",
    [os.system, builtins.eval, builtins.exec, builtins.getattr, builtins.__import__, torch.load,
     torch.hub.load, pickle.loads, torch.jit.load, os.mkdir, io.open],
    ids=lambda function: f"{function.__module__}.{function.__name__}",
)  # fmt: skip
def test_functions_in_a_file_are_never_called(tmp_path, monkeypatch, function, zipped):
    """They are inert or refused: the marker that each of them would leave is not there."""
    marker = tmp_path / "marker"
    argument: Any = {
        os.system: f"touch {marker}",
        builtins.eval: f"open({str(marker)!r}, 'w')",
        builtins.exec: f"open({str(marker)!r}, 'w')",
        os.mkdir: str(marker),
    }.get(function, str(marker))
    extra = ("w",) if function is io.open else ()
    path = tmp_path / "checkpoint.pth"
    content = {"model": STATE, "evil": Call(function, argument, *extra)}
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    try:
        evil = read_torch_file(path)["evil"]
    except ValueError as error:
        assert "blocked" in str(error) and "\n" not in str(error)
    else:
        assert isinstance(evil, Inert)
    assert not marker.exists()


def test_names_of_the_standard_library_and_of_torch_are_not_looked_up(tmp_path, monkeypatch):
    """Neither by attribute nor by import: the stand-in of a name is made from the name alone."""

    class Watched(types.ModuleType):
        def __getattr__(self, name: str) -> Any:
            raise AssertionError(f"{name} was looked up")

    monkeypatch.setitem(sys.modules, "watched", Watched("watched"))
    pickled = b"\x80\x02cwatched\nfunction\n)R."
    path = tmp_path / "checkpoint.pth"
    torch.save({}, path)
    with zipfile.ZipFile(path) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in entries.items():
            archive.writestr(name, pickled if name.endswith("data.pkl") else data)
    loaded = read_torch_file(path)
    assert isinstance(loaded, Inert) and type(loaded).__name__ == "function"


def test_a_stand_in_does_not_replace_names_of_torch(tmp_path):
    """A file cannot redefine OrderedDict or the functions that rebuild tensors."""
    path = tmp_path / "checkpoint.pth"
    torch.save(collections.OrderedDict(STATE), path)
    assert type(read_torch_file(path)) is collections.OrderedDict
    assert_close(read(path), STATE, rtol=0, atol=0)


def test_names_that_the_program_allows_stay_allowed(tmp_path):
    path = tmp_path / "checkpoint.pth"
    torch.save({"model": STATE, "args": argparse.Namespace(lr=1)}, path)
    before = torch.serialization.get_safe_globals()
    with torch.serialization.safe_globals([argparse.Namespace]):
        assert read_torch_file(path)["args"].lr == 1
        assert argparse.Namespace in torch.serialization.get_safe_globals()
    assert set(torch.serialization.get_safe_globals()) == set(before)
    assert isinstance(read_torch_file(path)["args"], Inert)
    assert set(torch.serialization.get_safe_globals()) == set(before)


def test_pickled_models_are_read_without_their_classes(tmp_path):
    """torch.save(model) saves objects of the project's classes."""
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Sequential(nn.BatchNorm2d(4)), nn.ReLU())
    for content in (model, {"model": model}):
        torch.save(content, tmp_path / "model.pth")
        state = read(tmp_path / "model.pth")
        assert_close(state, dict(model.state_dict()), rtol=0, atol=0)


@pytest.mark.parametrize(
    "prefix",
    ["module.", "_orig_mod.", "model.", "net.", "model._orig_mod.", "module.model.module."],
)
@pytest.mark.parametrize(
    "wrapper", [None, "model", "state_dict", "model_state", "model_state_dict"]
)
def test_wrappers_and_prefixes(wrapper, prefix):
    content: dict[str, Any] = {prefix + key: value for key, value in STATE.items()}
    content["criterion.weight"] = torch.ones(3)  # a LightningModule has more than the network
    if wrapper:
        content = {"epoch": 3, "optimizer": {"state": {}}, wrapper: content}
    assert_close(state_dict_of(content)[0], STATE, rtol=0, atol=0)


def test_tensors_beside_the_state_dict_are_left_out():
    """Such as the best accuracy in PyTorch's ImageNet example."""
    content = {"epoch": 3, "state_dict": STATE, "best_acc1": torch.tensor(70.0)}
    assert_close(state_dict_of(content)[0], STATE, rtol=0, atol=0)


def test_prefixes_that_few_keys_have_are_names_of_modules():
    state = {"model.weight": torch.ones(1), "head.weight": torch.ones(1), "bias": torch.ones(1)}
    assert state_dict_of(state)[0] == state


@pytest.mark.parametrize("suffix", ["pth", "pt", "tar", "bin", "ckpt", "pth.tar", "safetensors"])
def test_suffixes(tmp_path, state, suffix):
    path = tmp_path / f"checkpoint.{suffix}"
    if suffix == "safetensors":
        save_file({f"module.{key}": tensor for key, tensor in state.items()}, path)
    else:
        torch.save({"state_dict": state}, path)
    model = DeepLab.from_pretrained(path)
    assert model.config["backbone"] == "resnet18"
    assert_close(model.state_dict(), dict(state), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_become_float32(tmp_path, state, dtype):
    path = tmp_path / "checkpoint.pth"
    torch.save({k: v.to(dtype) if v.is_floating_point() else v for k, v in state.items()}, path)
    model = DeepLab.from_pretrained(path)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert_close(model.classifier[4].weight, state["classifier.4.weight"].to(dtype).float())


def test_overrides(tmp_path, state):
    path = tmp_path / "checkpoint.pth"
    torch.save(state, path)
    model = DeepLab.from_pretrained(path, output_stride=16, atrous_rates=(1, 2, 3), aux_loss=False)
    assert model.config["output_stride"] == 16
    assert [branch[0].dilation for branch in model.classifier[0].convs[1:4]] == [
        (1, 1), (2, 2), (3, 3)
    ]  # fmt: skip
    assert model.aux_classifier is None


def test_counters_of_batch_norm_may_be_missing(tmp_path, state):
    """PyTorch 0.4.0 and earlier had none."""
    path = tmp_path / "checkpoint.pth"
    torch.save({k: v for k, v in state.items() if not k.endswith("num_batches_tracked")}, path)
    assert_close(DeepLab.from_pretrained(path).state_dict(), dict(state), rtol=0, atol=0)


def message_of(path: Path) -> str:
    with pytest.raises(ValueError) as caught:
        DeepLab.from_pretrained(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert "\n" not in message and "\x1b" not in message and len(message) < 700
    return message


def test_tensors_that_do_not_fit_are_named(tmp_path, state):
    path = tmp_path / "checkpoint.pth"
    wrong = dict(state) | {"extra.weight": torch.ones(1), "classifier.1.weight": torch.ones(3)}
    del wrong["backbone.bn1.weight"], wrong["backbone.bn1.bias"]
    torch.save(wrong, path)
    message = message_of(path)
    assert "recognised a torchvision DeepLabV3 with resnet18 and 3 classes" in message
    assert "2 missing (backbone.bn1.weight, backbone.bn1.bias)" in message
    assert "1 unexpected (extra.weight)" in message
    assert "1 of another shape (classifier.1.weight [3] instead of [16, 16, 3, 3])" in message


@pytest.mark.parametrize(
    "content, expected",
    [
        (b"", "got an empty file"),
        (b"<!DOCTYPE html><html>", "got one that starts with b'<!DOCTYPE html>"),
        (b"version https://git-lfs", "got one that starts with b'version https:/"),
        (b"PK\x03\x04 cut off", "a complete file of torch.save"),
        (b"\x80\x02cut off", "a complete file of torch.save"),
        (pickle.dumps({"a": 1}, protocol=2), "a complete file of torch.save"),
        (b"\x08\x00\x00\x00\x00\x00\x00\x00{}", "one of safetensors, whose name must end in"),
    ],
)
@pytest.mark.parametrize("name", ["checkpoint.pth", "checkpoint"])
def test_other_files(tmp_path, content, expected, name):
    path = tmp_path / name
    path.write_bytes(content)
    assert expected in message_of(path)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_truncated_files(tmp_path, zipped):
    path = tmp_path / "checkpoint.pth"
    torch.save({"x": torch.ones(1000)}, path, _use_new_zipfile_serialization=zipped)
    whole = path.read_bytes()
    for size in (len(whole) // 3, len(whole) - 100):
        path.write_bytes(whole[:size])
        assert "a complete file of torch.save" in message_of(path)


def test_other_archives(tmp_path):
    path = tmp_path / "script.pt"
    torch.jit.save(torch.jit.script(nn.ReLU()), path)
    assert "a TorchScript archive" in message_of(path)
    np.savez(tmp_path / "arrays.npz", x=np.ones(3))
    assert "zip archive without data.pkl" in message_of(tmp_path / "arrays.npz")


def test_other_networks(tmp_path):
    """A classifier, and a DeepLab whose backbone we do not have."""
    path = tmp_path / "checkpoint.pth"
    torch.save({"model": {"layer1.0.conv1.weight": torch.ones(1), "fc.bias": torch.ones(1)}}, path)
    assert "expected the state dict of a DeepLab of torchvision," in message_of(path)
    xception = {"aspp.aspp1.atrous_conv.weight", "decoder.last_conv.8.weight", "backbone.block1.x"}
    torch.save(dict.fromkeys(xception, torch.ones(2, 1, 1, 1)), path)
    assert "its xception and drn are not supported" in message_of(path)
    timm = {"decoder.aspp.0.project.0.weight", "decoder.block1.0.weight", "encoder.model.x"}
    timm.add("segmentation_head.0.weight")
    torch.save(dict.fromkeys(timm, torch.ones(2, 1, 1, 1)), path)
    assert "an encoder of timm, whose name is not in the file: expected the folder" in message_of(
        path
    )
