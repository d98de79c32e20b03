"""Training runs: files, checkpoints, resume and errors."""

from __future__ import annotations

import builtins
import contextlib
import errno
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from deeplab_fast.cli import main
from deeplab_fast.models import DeepLab, DeepLabV3, DeepLabV3Plus
from deeplab_fast.training import (
    Objective,
    Recipe,
    Scores,
    SegmentationData,
    TrainingError,
    checkpoint,
    log,
    loop,
    train,
)

from ..support.runs import signal_in_update, small_network
from ..support.shapes import CLASSES, read_shapes, write_shapes

RECIPE = Recipe(epochs=3, batch_size=2, crop_size=(32, 32), learning_rate=0.05, ema_decay=0.9)
STEPS = 9  # updates of RECIPE with 6 images
SMALL = ["--backbone", "mobilenet_v2", "--output-stride", "16", "--device", "cpu"]
SMALL += ["--epochs", "3", "--batch-size", "2", "--crop-size", "32", "32", "--log-every", "1"]


pytestmark = pytest.mark.usefixtures("one_thread")


def run(shapes: Path, output: Path, recipe: Recipe = RECIPE, **options) -> DeepLabV3:
    data = read_shapes(shapes)
    return train(small_network(), *data, recipe, output, **{"workers": 0, "log_every": 1} | options)


def curve(folder: Path, name: str = "loss") -> dict[int, float]:
    rows = map(json.loads, (folder / "log.jsonl").read_text().splitlines())
    points = [(row["step"], row[name]) for row in rows if name in row]
    assert len(points) == len(dict(points))  # no update is logged twice
    return dict(points)


@pytest.fixture(scope="module")
def whole_run(shapes, tmp_path_factory) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "torch.utils.tensorboard", None)
        folder = tmp_path_factory.mktemp("run") / "whole"
        run(shapes, folder)
    return folder


def test_output_files_of_a_run(whole_run, shapes):
    assert sorted(path.name for path in whole_run.iterdir()) == [
        "best.safetensors", "config.json", "last.pt", "last.safetensors", "log.jsonl",
    ]  # fmt: skip
    losses = curve(whole_run)
    assert list(losses) == list(range(1, STEPS + 1))
    rates = curve(whole_run, "learning_rate")
    assert list(rates.values()) == pytest.approx([0.05 * (1 - i / 9) ** 0.9 for i in range(9)])
    miou = curve(whole_run, "val_miou")
    assert list(miou) == [3, 6, 9]
    config = json.loads((whole_run / "config.json").read_text())
    assert config["recipe"]["crop_size"] == [32, 32] and config["architecture"]["num_classes"] == 3
    state = torch.load(whole_run / "last.pt", weights_only=True)
    model = DeepLabV3.from_pretrained(whole_run / "last.safetensors")
    assert model.categories == CLASSES
    # The weights are in channels_last.
    weight = state["model"]["backbone.features.0.0.weight"]
    assert weight.is_contiguous(memory_format=torch.channels_last)
    assert state["best_miou"] == pytest.approx(max(miou.values()))
    with pytest.raises(ValueError, match="last.pt: the state of a training run, .*best.safetens"):
        DeepLabV3.from_pretrained(whole_run / "last.pt")
    with pytest.raises(ValueError, match="the folder of a training run, .*best.safetensors or .*"):
        DeepLabV3.from_pretrained(whole_run)


def test_best_model_is_saved(shapes, tmp_path, monkeypatch):
    mious, kept = iter((0.2, 0.6, 0.4)), []

    def pretend(model, data, **options):
        kept.append({name: value.clone() for name, value in model.state_dict().items()})
        right = round(1e4 * next(mious))
        return Scores(np.array([[right, 10**4 - right], [0, 0]]), ("a", "b"))

    monkeypatch.setattr(loop, "evaluate", pretend)
    run(shapes, tmp_path)
    best = DeepLabV3.from_pretrained(tmp_path / "best.safetensors").state_dict()
    torch.testing.assert_close(best, kept[1], rtol=0, atol=0)
    assert not torch.equal(kept[1]["classifier.1.bias"], kept[2]["classifier.1.bias"])


def test_loss_decreases(shapes, tmp_path):
    recipe = Recipe(epochs=25, batch_size=6, crop_size=(56, 72), scale=(1, 1), learning_rate=0.1)
    losses = curve(run(shapes, tmp_path, recipe, evaluate_every=25) and tmp_path)
    assert losses[25] < 0.3 * losses[1]


def test_settings_that_may_change_on_resume(shapes, tmp_path):
    """Folder, processes, micro-batches, and epochs with a constant learning rate."""
    recipe = Recipe(**vars(RECIPE) | {"batch_size": 4, "power": 0, "epochs": 2})
    run(shapes, tmp_path / "whole", recipe)
    first = tmp_path / "first"
    run(shapes, first, Recipe(**vars(recipe) | {"epochs": 1, "grad_accum_steps": 2}))
    before = curve(first)
    moved = first.rename(tmp_path / "moved")
    state = torch.load(moved / "last.pt", weights_only=True)
    torch.save({**state, "random": state["random"] * 2}, moved / "last.pt")
    run(shapes, moved, recipe, resume=True, evaluate_every=2, log_every=2)
    assert list(curve(moved)) == [1, 2, 4]
    assert before.items() <= curve(moved).items()
    assert list(curve(moved, "learning_rate").values()) == [0.05] * 3


def command(shapes: Path, output: Path, *arguments: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-I", "-c", "import sys; from deeplab_fast.cli import main; "
         "sys.modules['torch.utils.tensorboard'] = None; sys.exit(main(sys.argv[1:]))",
         "train", str(shapes), *SMALL, "--workers", "1", "--output", str(output), *arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )  # fmt: skip


def wait_for(condition, process: subprocess.Popen) -> None:
    for _ in range(6000):
        if condition():
            return
        if process.poll() is not None:
            break
        time.sleep(0.01)
    raise AssertionError(process.communicate()[1])


def test_interrupted_and_killed_runs_resume_exactly(shapes, tmp_path, capsys):
    """A process is interrupted together with its workers, as by a terminal, then one is killed."""
    stopped, whole = tmp_path / "stopped", tmp_path / "whole"
    # A new network amplifies rounding errors of convolutions, which depend on the CPU and on the
    # addresses of the weights, from update to update. With a learning rate of nearly 0 the losses
    # show which images, crops and dropout each update had.
    epochs = ["--epochs", "60", "--crop-size", "48", "56", "--learning-rate", "1e-15"]

    def logged(step: int) -> bool:
        path = stopped / "log.jsonl"
        return path.exists() and len(path.read_text().splitlines()) >= step

    process = command(shapes, stopped, *epochs)
    wait_for(lambda: logged(4), process)
    os.killpg(process.pid, signal.SIGINT)
    out, err = process.communicate()
    assert process.returncode == 130, err
    (line,) = [line for line in err.splitlines() if line.startswith("deeplab-fast: ")]
    match = re.match(r"deeplab-fast: interrupted after update (\d+) of 180, saved .*last.pt", line)
    assert match and "Traceback" not in err
    step = int(match[1])
    assert torch.load(stopped / "last.pt", weights_only=True)["step"] == step

    process = command(shapes, stopped, *epochs, "--resume")
    rows = len((stopped / "log.jsonl").read_text().splitlines())
    wait_for(lambda: logged(rows + 6), process)
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    saved = torch.load(stopped / "last.pt", weights_only=True)["step"]
    assert saved >= step

    # Both runs stop a few updates later.
    def limited(folder: Path, *arguments: str) -> None:
        with pytest.MonkeyPatch.context() as patch:
            signal_in_update(patch, saved + 4, signal.SIGTERM)
            arguments = [*SMALL, *epochs, "--workers", "0", "--output", str(folder), *arguments]
            assert main(["train", str(shapes), *arguments]) == 130

    limited(stopped, "--resume")
    limited(whole)
    assert list(curve(stopped)) == list(curve(whole)) == list(range(1, saved + 5))
    assert list(curve(stopped).values()) == pytest.approx(list(curve(whole).values()), rel=1e-3)
    assert curve(stopped, "learning_rate") == curve(whole, "learning_rate")
    one, other = (torch.load(p / "last.pt", weights_only=True) for p in (stopped, whole))
    torch.testing.assert_close(one["random"], other["random"], rtol=0, atol=0)
    assert one["step"] == other["step"] == saved + 4
    mean = "backbone.features.0.1.running_mean"  # the first layer has small rounding errors
    torch.testing.assert_close(one["model"][mean], other["model"][mean], rtol=1e-4, atol=1e-5)


def test_log_lines_after_the_checkpoint_are_dropped(tmp_path):
    rows = [json.dumps({"step": step, "loss": 1.0}) for step in range(1, 6)]
    (tmp_path / "log.jsonl").write_text(
        "\n".join(rows) + '\n{"step": 6, "lo'
    )  # killed while it wrote
    with contextlib.closing(log.Log(tmp_path, 3, 0)) as lines:
        lines.scalars(3, val_miou=0.5)
        lines.scalars(4, loss=2.0)
    assert curve(tmp_path) == {1: 1.0, 2: 1.0, 3: 1.0, 4: 2.0}
    for evaluated in (3, 0):
        log.Log(tmp_path, 3, evaluated).close()
        assert list(curve(tmp_path)) == [1, 2, 3]
        assert list(curve(tmp_path, "val_miou")) == [3][:evaluated]
    (tmp_path / "log.jsonl").write_text("hello\n")
    with pytest.raises(TrainingError, match=r"log.jsonl: b'hello.n' \(expected a JSON object"):
        log.Log(tmp_path, 3, 0)


def test_full_disk_is_reported_in_one_line(shapes, tmp_path, monkeypatch, capsys):
    output = tmp_path / "run"
    assert main(["train", str(shapes), *SMALL, "--epochs", "1", "--output", str(output)]) == 0
    (output / "last.pt").rename(tmp_path / "keep")
    before = {path.name: path.read_bytes() for path in output.glob("*.safetensors")}
    real = builtins.open

    def open_full(path, mode="r", *arguments, **options):
        file = real(path, mode, *arguments, **options)
        if "last.pt" in str(path) and "w" in mode:
            file.close()
            file = real("/dev/full", mode, *arguments, **options)
        return file

    monkeypatch.setattr(builtins, "open", open_full)
    capsys.readouterr()
    again = ["--epochs", "1", "--resume", "--output", str(output)]
    assert main(["train", str(shapes), *SMALL, *again]) == 2
    (*_, line) = capsys.readouterr().err.splitlines()
    assert line == (
        f"deeplab-fast: {output}/last.pt: cannot write: No space left on device. "
        "Files written before are complete"
    )
    for name, content in before.items():
        assert (output / name).read_bytes() == content
    assert not (output / "last.pt").exists() and not list(output.glob(".*"))


@pytest.mark.parametrize("name", ["last.pt", "best.safetensors"])
def test_failed_write_keeps_the_previous_file(name, whole_run, tmp_path, monkeypatch):
    path = tmp_path / name
    path.write_bytes(b"before")

    def fail(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(TrainingError, match=f"{name}: cannot write: No space left on device"):
        checkpoint.save(path, {"a": 1})
    assert os.listdir(tmp_path) == [name] and path.read_bytes() == b"before"


def test_folder_with_a_run_is_not_overwritten(whole_run, shapes, tmp_path):
    before = (whole_run / "last.pt").read_bytes()
    with pytest.raises(TrainingError, match=f"^{whole_run}: there is a run in that folder"):
        run(shapes, whole_run)
    assert (whole_run / "last.pt").read_bytes() == before
    (tmp_path / "log.jsonl").write_text(
        '{"step": 10, "loss": 1.0}\n'
    )  # a run without a checkpoint yet
    with pytest.raises(TrainingError, match=f"^{tmp_path}: there is a run in that folder"):
        run(shapes, tmp_path)


@pytest.mark.parametrize(
    "model, recipe, message",
    [
        ({"head_conv": True}, {}, "head_conv False, not True "),
        ({"aux_loss": True}, {}, "aux_loss False, not True "),
        ({}, {"learning_rate": 0.1}, "learning_rate 0.05, not 0.1 "),
        ({}, {"crop_size": (32, 48)}, r"crop_size \[32, 32\], not \[32, 48\] "),
    ],
)
def test_resume_rejects_another_run(model, recipe, message, whole_run, shapes):
    data = read_shapes(shapes)
    recipe = Recipe(**vars(RECIPE) | recipe)
    with pytest.raises(TrainingError, match=rf"^{whole_run}/last.pt: saved with {message}"):
        train(small_network(**model), *data, recipe, whole_run, resume=True)


@pytest.mark.parametrize("content", [b"", b"hello", "half", "other"])
def test_damaged_checkpoint_is_rejected(content, whole_run, shapes, tmp_path):
    path = tmp_path / "last.pt"
    if content == "other":
        torch.save({"weight": torch.ones(2)}, path)
    else:
        whole = (whole_run / "last.pt").read_bytes()
        path.write_bytes(whole[: len(whole) // 2] if content == "half" else content)
    with pytest.raises(TrainingError, match=rf"^{path}: (damaged|not a checkpoint)"):
        run(shapes, tmp_path, resume=True)


def test_resume_of_an_empty_folder_and_of_a_finished_run(shapes, tmp_path):
    recipe = Recipe(**vars(RECIPE) | {"epochs": 1})
    first = run(shapes, tmp_path, recipe, resume=True)
    (tmp_path / ".last.pt.1.partial").touch()  # left by a run that was killed while it wrote
    again = run(shapes, tmp_path, recipe, resume=True)
    torch.testing.assert_close(first.state_dict(), again.state_dict(), rtol=0, atol=0)
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize(
    "options, message",
    [
        ({"learning_rate": 1e18}, r"the loss is (nan|inf) at update \d"),
        ({"learning_rate": 3e38, "batch_size": 6}, "a weight is not finite at update 1"),
    ],
)
def test_diverged_run_is_not_saved(options, message, shapes, tmp_path):
    recipe = Recipe(**vars(RECIPE) | {"epochs": 1, "ema_decay": None} | options)
    with pytest.raises(TrainingError, match=message):
        run(shapes, tmp_path, recipe)
    assert not list(tmp_path.glob("*last*"))


@pytest.mark.parametrize(
    "file, updates",
    [
        ("labels/train/3.png", 0),  # in the first batch
        ("images/train/5.png", 1),
        ("images/val/1.png", 3),
    ],
)
def test_unreadable_file_is_named_and_the_run_resumes(file, updates, whole_run, tmp_path, capsys):
    bad = write_shapes(tmp_path / "shapes") / file
    good = bad.read_bytes()
    if file.startswith("images"):
        bad.write_bytes(good[:200])
    else:
        Image.fromarray(np.full((56, 72), 9, np.uint8)).save(bad)
    output = tmp_path / "run"
    arguments = [str(tmp_path / "shapes"), *SMALL, "--workers", "1", "--output", str(output)]
    arguments.append("--no-check")
    assert main(["train", *arguments]) == 2
    (*_, line) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"deeplab-fast: {bad}: ") and "(expected" in line
    assert list(curve(output)) == list(range(1, updates + 1))
    # With the file restored, the run resumes at the update that failed.
    if updates:
        assert torch.load(output / "last.pt", weights_only=True)["step"] == updates
        arguments.append("--resume")
    bad.write_bytes(good)
    assert main(["train", *arguments]) == 0
    assert list(curve(output)) == list(range(1, STEPS + 1))
    assert list(curve(output, "val_miou")) == [3, 6, 9]


def test_class_weights_top_k_pixels_and_frozen_batch_norm(shapes, tmp_path):
    options = {
        "class_weights": (1.0, 3.0, 2.0), "top_k_pixels": 0.3, "freeze_batch_norm": True,
        "epochs": 1, "label_smoothing": 0.1, "head_learning_rate": 0.1, "warmup_steps": 2,
        "grad_accum_steps": 2,
    }  # fmt: skip
    before = small_network().state_dict()
    model = run(shapes, tmp_path, Recipe(**vars(RECIPE) | options | {"ema_decay": None}))
    norms = re.compile("running_|num_batches")
    for name, value in model.state_dict().items():
        frozen = bool(norms.search(name)) or before[name].dim() == 1 and "classifier.1" not in name
        assert torch.equal(value, before[name]) == frozen, name


def test_gradients_of_micro_batches_add_up_to_that_of_the_batch():
    """The images have different numbers of ignored pixels; classes are weighted."""
    torch.manual_seed(0)
    images = torch.randn(4, 3, 32, 32)
    target = torch.randint(3, (4, 32, 32))
    target[0, :30] = target[1, 4:] = target[2] = 255
    model = small_network(aux_loss=True).eval()
    gradients = []
    for size in (4, 1):
        objective = Objective(model, Recipe(class_weights=(1.0, 4.0, 0.5)))
        normalizer = objective.loss_normalizer(target)
        objective.zero_grad()
        for x, y in zip(images.split(size), target.split(size)):
            objective(x, y, normalizer).backward()
        gradients.append({name: p.grad.clone() for name, p in objective.named_parameters()})
    torch.testing.assert_close(gradients[0], gradients[1])
    loss = objective(images, target, normalizer)
    full = {
        name: torch.nn.functional.cross_entropy(
            logits, target, torch.tensor([1.0, 4.0, 0.5]), ignore_index=255
        )
        for name, logits in model(images).items()
    }
    torch.testing.assert_close(loss, full["out"] + 0.5 * full["aux"])


def test_top_k_pixels_have_the_largest_losses():
    torch.manual_seed(0)
    model, images = small_network().eval(), torch.randn(2, 3, 32, 32)
    target = torch.randint(3, (2, 32, 32))
    objective = Objective(model, Recipe(top_k_pixels=0.25))
    losses = torch.nn.functional.cross_entropy(model(images)["out"], target, reduction="none")
    expected = losses.flatten().sort(descending=True).values[:512].mean()
    torch.testing.assert_close(
        objective(images, target, objective.loss_normalizer(target)), expected
    )


def test_loss_of_ignored_pixels_is_zero():
    objective = Objective(small_network(), Recipe())
    target = torch.full((2, 32, 32), 255)
    loss = objective(torch.randn(2, 3, 32, 32), target, objective.loss_normalizer(target))
    loss.backward()
    assert loss == 0
    assert all((p.grad == 0).all() for p in objective.parameters())


@pytest.mark.parametrize(
    "options, message",
    [
        ({"grad_accum_steps": 4}, r"batch_size: expected a multiple of 4 \(1 processes, 4 micro-"),
        ({"grad_accum_steps": 2}, r"batch_size: expected at least 2 images at a time .* got 1"),
        ({"class_weights": (1.0,)}, "class_weights: expected 3 numbers, got 1"),
    ],
)
def test_incompatible_recipes_are_rejected(options, message, shapes, tmp_path):
    with pytest.raises(TrainingError, match=message):
        run(shapes, tmp_path, Recipe(**vars(RECIPE) | options))
    assert not list(tmp_path.iterdir())


def test_empty_data_sets_are_rejected(shapes, tmp_path):
    none = SegmentationData([], CLASSES)
    with pytest.raises(TrainingError, match="train_data: expected images, got none"):
        train(small_network(), none, None, RECIPE, tmp_path)
    with pytest.raises(TrainingError, match="val_data: expected images, got none"):
        train(small_network(), read_shapes(shapes)[0], none, RECIPE, tmp_path)


def test_curves_and_pictures_in_tensorboard(tensorboard, shapes, tmp_path):
    run(shapes, tmp_path, Recipe(**vars(RECIPE) | {"epochs": 1}))
    events = tensorboard.EventAccumulator(str(tmp_path)).Reload()
    assert {"loss", "learning_rate", "val/miou", "val/iou/red"} <= set(events.Tags()["scalars"])
    assert [event.step for event in events.Scalars("loss")] == [1, 2, 3]
    assert [event.value for event in events.Scalars("loss")] == pytest.approx(
        list(curve(tmp_path).values())
    )
    assert len(events.Tags()["images"]) == 2
    picture = events.Images(events.Tags()["images"][0])[0]
    assert (picture.width, picture.height) == (3 * 72, 56)


def test_missing_tensorboard_is_reported_in_one_line(shapes, tmp_path, capsys):
    run(shapes, tmp_path, Recipe(**vars(RECIPE) | {"epochs": 1}), check=False)
    assert capsys.readouterr().err.splitlines() == [log.NO_TENSORBOARD]


def test_progress_bar_shows_loss_speed_and_time_left(shapes, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    run(shapes, tmp_path, Recipe(**vars(RECIPE) | {"epochs": 1}))
    err = capsys.readouterr().err
    assert re.search(r"training: .*3/3 \[\d\d:\d\d<\d\d:\d\d.*loss \d\.\d+, [\d.]+ images/s", err)


def test_fine_tuning_from_weights_with_other_classes(shapes, tmp_path, capsys):
    weights = tmp_path / "voc.safetensors"
    small_network(num_classes=21).save_pretrained(weights)
    one = ["--epochs", "1", "--learning-rate", "1e-9", "--output", str(tmp_path / "run")]
    assert main(["train", str(shapes), *SMALL, *one, "--weights", str(weights)]) == 0
    model = DeepLabV3.from_pretrained(tmp_path / "run/last.safetensors")
    before, after = DeepLabV3.from_pretrained(weights).state_dict(), model.state_dict()
    assert model.config["num_classes"] == 3 and not model.config["head_conv"]
    torch.testing.assert_close(
        after["backbone.features.0.0.weight"], before["backbone.features.0.0.weight"]
    )
    assert after["classifier.1.weight"].shape[0] == 3
    arguments = [*SMALL, "--backbone", "resnet50", "--weights", str(weights)]
    assert main(["train", str(shapes), *arguments]) == 2
    assert capsys.readouterr().err.splitlines()[-1] == (
        f"deeplab-fast: --weights: {weights} has the backbone mobilenet_v2 (expected resnet50, as "
        "--backbone says)"
    )


# DeepLab-v3+

PLUS = ["--model", "deeplabv3plus", "--backbone", "mobilenet_v2", "--separable"]
PLUS += ["--atrous-rates", "2", "--device", "cpu", "--workers", "0", "--epochs", "1"]
PLUS += ["--batch-size", "4", "--crop-size", "32", "32", "--evaluate-every", "1"]


@pytest.fixture(scope="module")
def plus_run(shapes, tmp_path_factory) -> Path:
    """A run of two updates, each of two micro-batches, with frozen batch norm and average."""
    output = tmp_path_factory.mktemp("plus") / "run"
    more = ["--ema-decay", "0.5", "--freeze-batch-norm", "--grad-accum-steps", "2"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "torch.utils.tensorboard", None)
        assert main(["train", str(shapes), *PLUS, *more, "--output", str(output)]) == 0
    return output


def test_deeplabv3plus_is_trained_with_its_options(plus_run):
    for name in ("best", "last"):
        model = DeepLab.from_pretrained(plus_run / f"{name}.safetensors")
        assert type(model) is DeepLabV3Plus
        assert model.config["separable"] and model.config["atrous_rates"] == [2]
        assert model.config["output_stride"] == 16 and model.config["num_classes"] == 3
        assert model.aux_classifier is not None
    config = json.loads((plus_run / "config.json").read_text())
    assert config["architecture"]["model"] == "DeepLabV3Plus"
    assert set(curve(plus_run, "val_miou")) == {2}


@pytest.mark.parametrize(
    "options, message",
    [
        (["--model", "deeplabv3"], "saved with model 'DeepLabV3Plus', not 'DeepLabV3' "),
        (["--atrous-rates", "3"], "saved with atrous_rates [2], not [3] "),
        (["--output-stride", "8"], "saved with output_stride 16, not 8 "),
    ],
)
def test_resume_of_another_network_is_an_error(options, message, plus_run, shapes, capsys):
    before = (plus_run / "last.pt").read_bytes()
    arguments = [*PLUS, *options, "--resume", "--output", str(plus_run)]
    assert main(["train", str(shapes), *arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"deeplab-fast: {plus_run}/last.pt: {message}")
    assert (plus_run / "last.pt").read_bytes() == before


def test_fine_tuning_of_deeplabv3plus_with_other_classes(plus_run, shapes, tmp_path, capsys):
    """The weights determine the model, and only the last layers are new."""
    weights = tmp_path / "five.safetensors"
    model = DeepLabV3Plus("mobilenet_v2", 5, atrous_rates=(), aspp_channels=8, aux_loss=True)
    model.save_pretrained(weights)
    arguments = ["--weights", str(weights), "--device", "cpu", "--epochs", "1", "--workers", "0"]
    arguments += ["--batch-size", "6", "--crop-size", "32", "32", "--learning-rate", "1e-9"]
    output = tmp_path / "run"
    assert main(["train", str(shapes), *arguments, "--output", str(output)]) == 0
    tuned = DeepLabV3Plus.from_pretrained(output / "last.safetensors")
    assert tuned.config["num_classes"] == 3 and tuned.config["aspp_channels"] == 8
    before, after = model.state_dict(), tuned.state_dict()
    changed = {name for name in before if before[name].shape != after[name].shape}
    heads = ("classifier.1", "aux_classifier.4")
    assert changed == {f"{head}.{name}" for head in heads for name in ("weight", "bias")}
    for name, _ in model.named_parameters():
        if name not in changed:
            torch.testing.assert_close(after[name], before[name])


@pytest.mark.parametrize(
    "options, message",
    [
        (
            ["--model", "deeplabv3"],
            "--weights: {weights} is a DeepLabV3Plus (expected deeplabv3, as --model says)",
        ),
        (
            ["--separable"],
            "--weights: {weights} has dense convolutions (expected depthwise separable ones, as "
            "--separable says)",
        ),
        (["--atrous-rates", "0"], "--weights: {weights}: atrous_rates: expected positive ints, "
         "got [0]"),
    ],
)  # fmt: skip
def test_options_that_contradict_the_weights(options, message, shapes, tmp_path, capsys):
    weights = tmp_path / "plus.safetensors"
    model = DeepLabV3Plus("mobilenet_v2", 3, atrous_rates=(), aspp_channels=8)
    model.save_pretrained(weights)
    arguments = ["--weights", str(weights), *SMALL[4:], "--workers", "0", *options]
    assert main(["train", str(shapes), *arguments, "--output", str(tmp_path / "run")]) == 2
    assert capsys.readouterr().err == f"deeplab-fast: {message.format(weights=weights)}\n"


def test_wrong_atrous_rates(shapes, tmp_path, capsys):
    arguments = [*SMALL, "--atrous-rates", "0", "--output", str(tmp_path / "run")]
    assert main(["train", str(shapes), *arguments]) == 2
    line = "deeplab-fast: atrous_rates: expected positive ints, got [0]"
    assert capsys.readouterr().err.splitlines() == [line]


def test_backbones_of_train(shapes, monkeypatch, capsys):
    made = []
    monkeypatch.setattr("deeplab_fast.cli.train.train", lambda model, *a, **k: made.append(model))
    arguments = ["train", str(shapes), "--device", "cpu", "--backbone"]
    assert main([*arguments, "resnet18"]) == 0
    assert made[0].config["backbone"] == "resnet18"
    assert main([*arguments, "resnet19"]) == 2
    assert "'timm/' and the name of a model of timm, got 'resnet19'" in capsys.readouterr().err


def test_default_networks_of_train(shapes, monkeypatch):
    """--model, --backbone and --output-stride without --weights."""
    made = []
    monkeypatch.setattr("deeplab_fast.cli.train.train", lambda model, *a, **k: made.append(model))
    small = ["--backbone", "mobilenet_v2", "--device", "cpu"]
    for options in ([], ["--model", "deeplabv3"], ["--model", "deeplabv3plus"],
                    ["--model", "deeplabv3plus", "--output-stride", "8"]):  # fmt: skip
        assert main(["train", str(shapes), *small, *options]) == 0
    assert [(type(model), model.config["output_stride"]) for model in made] == [
        (DeepLabV3, 8), (DeepLabV3, 8), (DeepLabV3Plus, 16), (DeepLabV3Plus, 8),
    ]  # fmt: skip
    assert not any(model.config["separable"] for model in made)


def test_head_learning_rate_of_deeplabv3plus():
    """The decoder, its low-level convolution included, belongs to the head."""
    model = DeepLabV3Plus("mobilenet_v2", 3, aux_loss=True)
    recipe = Recipe(learning_rate=0.1, head_learning_rate=0.5)
    groups = {group["lr"]: set(map(id, group["params"])) for group in
              recipe.optimizer(model).param_groups}  # fmt: skip
    assert groups[0.1] == set(map(id, model.backbone.parameters()))
    assert groups[0.5] == {id(p) for p in model.parameters()} - groups[0.1]
    assert id(model.classifier[0].low_level[0].weight) in groups[0.5]


def test_backbone_weights(shapes, tmp_path, capsys):
    models = pytest.importorskip("torchvision.models")
    torch.save(models.mobilenet_v2().state_dict(), tmp_path / "imagenet.pth")
    torch.save(models.resnet18().state_dict(), tmp_path / "other.pth")
    arguments = [*SMALL, "--epochs", "1", "--backbone-weights"]
    imagenet = str(tmp_path / "imagenet.pth")
    output = ["--output", str(tmp_path / "run")]
    assert main(["train", str(shapes), *arguments, imagenet, *output]) == 0
    wrong = "expected weights of mobilenet_v2, but tensors do not fit: "
    for name, message in (("other", wrong), ("none", "No such file")):
        path = tmp_path / f"{name}.pth"
        assert main(["train", str(shapes), *arguments, str(path)]) == 2
        line = capsys.readouterr().err.splitlines()[-1]
        assert line.startswith(f"deeplab-fast: --backbone-weights: {path}: ") and message in line
