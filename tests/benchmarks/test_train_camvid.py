"""Training on CamVid in all variants, on random images and at a tiny size."""

from __future__ import annotations

import importlib
import json
import sys

import pytest
import torch
from PIL import Image

from deeplab_fast.backends import registry

from ..support.runs import small_network
from .conftest import read_csv


@pytest.fixture
def script(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)  # slow to import
    script = importlib.import_module("train_camvid")
    # A new process imports torch again, which takes longer than the tests.
    monkeypatch.setattr(script, "in_process", lambda function, *arguments: function(*arguments))
    return script


@pytest.fixture
def options(tmp_path):
    """Arguments of the script, with images of noise in a folder like CamVid's."""
    for split, count in (("train", 2), ("val", 1), ("test", 1)):
        for kind, mode in (("images", "RGB"), ("labels", "L")):
            (tmp_path / kind / split).mkdir(parents=True)
            for index in range(count):
                picture = Image.effect_noise((48, 36), 60).point(lambda value: value % 12)
                picture.convert(mode).save(tmp_path / kind / split / f"{index}.png")
    output = str(tmp_path / "results")
    return [str(tmp_path), "--tiny", "--device", "cpu", "--workers", "0", "--output", output]


@pytest.fixture
def weights(tmp_path):
    small_network().save_pretrained(tmp_path / "small.safetensors")
    return ["--weights", str(tmp_path / "small.safetensors")]


def test_training_from_scratch_is_compared_with_torchvision(script, options, tmp_path, capsys):
    pytest.importorskip("torchvision")
    output = tmp_path / "results"
    options += ["--seeds", "0"]
    script.main([*options, "--variants", "torchvision"])
    before = (output / "torchvision-0.json").read_bytes()
    script.main(options)
    assert (output / "torchvision-0.json").read_bytes() == before  # not trained again
    comments, rows = read_csv(output)
    assert any(line.startswith("# recipe: Recipe(epochs=1, batch_size=2") for line in comments)
    assert [row["variant"] for row in rows] == ["deeplab_fast", "torchvision"]
    ours, theirs = (
        json.loads((output / f"{variant}-0.json").read_text())["losses"]
        for variant in ("deeplab_fast", "torchvision")
    )
    # Both make one update from the same weights, on the same batch, with the same dropout.
    assert ours == pytest.approx(theirs, rel=1e-4) and len(ours) == 1
    assert list(output.glob("*.png"))
    assert "deeplab_fast: mean test mIoU 0." in capsys.readouterr().out
    (output / "torchvision-0.json").write_bytes(
        before.replace(b"warmup_steps=100", b"warmup_steps=7")
    )
    with pytest.raises(
        SystemExit,
        match="torchvision-0.json: recipe: expected .*warmup_steps=1.*got .*warmup_steps=7,",
    ):
        script.main(options)


def test_fine_tuning_is_compared_with_the_reference(script, options, weights, tmp_path):
    backends = {}
    for variant in ("deeplab_fast", "reference"):
        with registry.trace() as ran:
            script.main([*options, *weights, "--seeds", "0", "--variants", variant])
        backends[variant] = {backend for _, backend in ran}
        ops = {op for op, _ in ran}
        assert {"upsample_argmax", "upsample_cross_entropy_backward"} < ops
    assert backends == {"deeplab_fast": {"cpu"}, "reference": {"reference"}}
    output = tmp_path / "results"
    _, rows = read_csv(output)
    assert [row["variant"] for row in rows] == ["deeplab_fast", "reference"]
    ours, plain = (json.loads((output / f"{variant}-0.json").read_text()) for variant in backends)
    assert ours["losses"] == pytest.approx(plain["losses"], rel=1e-5) and len(ours["losses"]) == 1
    assert ours["test_iou"].keys() == plain["test_iou"].keys()
    assert [epoch for epoch, _ in ours["val_miou"]] == [1]
    assert list(output.glob("*.png"))


def test_the_loss_written_in_pytorch_is_that_of_our_op(script):
    training = importlib.import_module("common.training")
    torch.manual_seed(0)
    logits, target = torch.randn(2, 3, 5, 7), torch.randint(3, (2, 33, 49))
    target[0, 0] = 255
    weight = torch.tensor([0.5, 1.0, 2.0])
    ours, plain = (
        torch.func.grad_and_value(kind(weight, 255, "sum", 0.1, align_corners=True))(logits, target)
        for kind in (training.UpsampleCrossEntropyLoss, training.InterpolateCrossEntropyLoss)
    )
    torch.testing.assert_close(plain, ours, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_variants_are_timed_in_processes_of_their_own(script, options, weights, tmp_path):
    script.main([*options, *weights, "--timing"])
    comments, rows = read_csv(tmp_path / "results")
    assert any(line.startswith("# other_load_percent: ") for line in comments)
    assert [row["variant"] for row in rows] == ["deeplab_fast", "reference", "pytorch"]
    for row in rows:
        assert 0 < float(row["min_seconds"]) <= float(row["seconds_per_update"])
        assert float(row["seconds_per_epoch"]) == pytest.approx(float(row["seconds_per_update"]))
        assert float(row["page_faults_per_update"]) >= 0
        assert float(row["peak_mib"]) > 100  # PyTorch alone takes more


def test_timing_and_variants_belong_to_an_experiment(script, options, capsys):
    for wrong, message in (
        (["--timing"], "--timing: expected --weights"),
        (["--variants", "reference"], "--variants: expected deeplab_fast or torchvision, got"),
    ):
        with pytest.raises(SystemExit):
            script.main([*options, *wrong])
        assert message in capsys.readouterr().err
