"""Training steps: against torchvision, in two processes, compiled, and on real images."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.testing import assert_close

from deeplab_fast import ASPP
from deeplab_fast.models import DeepLabV3, DeepLabV3Plus, Preprocessing
from deeplab_fast.models.segmentation import SegmentationModel
from deeplab_fast.training import (
    Objective,
    Recipe,
    SegmentationData,
    evaluate,
    folder,
    train,
)

from ..support import two_processes
from ..support.plain_deeplab import PlainDeepLabV3Plus
from ..support.runs import small_network
from ..support.shapes import write_shapes

pytestmark = pytest.mark.usefixtures("one_thread")


# Against torchvision


class Track:
    """Losses, gradients and weights of the first steps of SGD."""

    def __init__(self, model: nn.Module, recipe: Recipe, loss_of) -> None:
        optimizer = recipe.optimizer(model)
        torch.manual_seed(2)
        steps = [(torch.randn(4, 3, 33, 33), torch.randint(5, (4, 33, 33))) for _ in range(2)]
        torch.manual_seed(3)  # for dropout
        self.losses, self.gradients = [], []
        dtype = next(model.parameters()).dtype
        for index, (images, target) in enumerate(steps):
            target[:, index] = 255
            recipe.set_learning_rates(optimizer, index, 10)
            loss = loss_of(model, images.to(dtype), target)
            optimizer.zero_grad()
            loss.backward()
            gradients = [parameter.grad for parameter in model.parameters()]
            self.gradients.append(torch.cat([g.flatten() for g in gradients]).double())
            self.losses.append(loss.detach().double())
            optimizer.step()


def our_loss(recipe: Recipe):
    def loss_of(model, images, target):
        objective = Objective(model, recipe)
        return objective(images, target, objective.loss_normalizer(target))

    return loss_of


def torchvisions_loss(model, images, target):
    """The loss of torchvision's references/segmentation/train.py."""
    output = model(images)
    losses = {name: F.cross_entropy(x, target, ignore_index=255) for name, x in output.items()}
    return losses["out"] + 0.5 * losses["aux"]


@pytest.mark.slow
def test_first_steps_match_torchvision():
    """ResNet-50 with ASPP, from the same seed, on the same batches with the same dropout.

    In float64 the only difference is that our loss rounds logits to fp32. In fp32 a new network is
    chaotic, and ours may differ from float64 by twice as much as torchvision's own.
    """
    segmentation = pytest.importorskip("torchvision.models.segmentation")
    recipe = Recipe(learning_rate=1e-4)

    def theirs() -> nn.Module:
        torch.manual_seed(0)
        options = {"weights": None, "weights_backbone": None, "aux_loss": True}
        return segmentation.deeplabv3_resnet50(num_classes=5, **options).train()

    torch.manual_seed(0)
    ours = DeepLabV3("resnet50", 5, aux_loss=True).train()
    assert_close(ours.state_dict(), theirs().state_dict(), rtol=0, atol=0)
    exact = Track(theirs().double(), recipe, torchvisions_loss)
    double = Track(copy.deepcopy(ours).double(), recipe, our_loss(recipe))
    peer = Track(theirs(), recipe, torchvisions_loss)
    actual = Track(ours, recipe, our_loss(recipe))
    for step in range(2):
        assert_close(double.losses[step], exact.losses[step], rtol=1e-6, atol=0)
        assert error(double, exact, step) <= 100 * 2**-24
        assert abs(actual.losses[step] - exact.losses[step]) <= 1e-6 + 2 * abs(
            peer.losses[step] - exact.losses[step]
        )
        assert error(actual, exact, step) <= 2 * error(peer, exact, step)


@pytest.mark.parametrize("output_stride", [8, 16])
def test_first_steps_of_deeplabv3plus_match_plain_pytorch(output_stride):
    """DeepLab-v3+, whose logits "out" and "aux" have different sizes, in float64 as above.

    In fp32 the rounding of either network can flip a ReLU, which changes the gradient by 1 %.
    """
    recipe = Recipe(learning_rate=1e-4)
    torch.manual_seed(0)
    ours = DeepLabV3Plus("mobilenet_v2", 5, output_stride, aux_loss=True, aspp_channels=32).train()

    def theirs() -> nn.Module:
        backbone = copy.deepcopy(ours.backbone)  # compared with torchvision's in tests/models
        model = PlainDeepLabV3Plus(backbone, (24, 96, 320), 5, output_stride, 32).train()
        model.load_state_dict(ours.state_dict(), strict=True)
        return model

    exact = Track(theirs().double(), recipe, torchvisions_loss)
    actual = Track(ours.double(), recipe, our_loss(recipe))
    for step in range(2):
        assert_close(actual.losses[step], exact.losses[step], rtol=1e-6, atol=0)
        assert error(actual, exact, step) <= 100 * 2**-24


def error(track: Track, exact: Track, step: int) -> float:
    difference = track.gradients[step] - exact.gradients[step]
    return (difference.norm() / exact.gradients[step].norm()).item()


# Two processes


def torchrun(folder: Path, data: Path, processes: int) -> None:
    """Run tests/support/two_processes.py, which writes to ``folder``."""
    folder.mkdir()
    script = Path(__file__).parents[1] / "support" / "two_processes.py"
    command = [sys.executable]
    if processes > 1:
        command += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    result = subprocess.run(
        [*command, str(script), str(folder), str(data)],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr


@pytest.fixture(scope="module")
def one_and_two(tmp_path_factory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("processes")
    data = write_shapes(root / "shapes")
    for processes in (1, 2):
        torchrun(root / str(processes), data, processes)
    return root / "1", root / "2"


@pytest.mark.parametrize("name", ["step.pt", "step_plus.pt"])
def test_sync_batch_norm_in_two_processes_is_batch_norm_in_one(name, one_and_two):
    """DistributedDataParallel and SyncBatchNorm through ASPP: gradients and statistics."""
    one, two = (torch.load(folder / name) for folder in one_and_two)
    for expected, actual in zip(one, two):
        assert list(expected) == list(actual)
        for name, value in expected.items():
            bound = 1e-9 * value.double().norm() + 1e-12
            assert (actual[name] - value).double().norm() <= bound, name


def test_run_of_two_processes_equals_that_of_one(one_and_two):
    """Updates have the same images, whose numbers of ignored pixels and class weights differ."""
    losses = []
    for output in one_and_two:
        rows = map(json.loads, (output / "run/log.jsonl").read_text().splitlines())
        losses.append([value for row in rows for name, value in row.items() if name == "loss"])
        assert (output / "run/last.safetensors").exists()
    assert len(losses[0]) == 4
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    states = [two_processes.network().state_dict()]
    for output in one_and_two:
        states.append(DeepLabV3.from_pretrained(output / "run/last.safetensors").state_dict())
    start, one, two = (torch.cat([x.flatten() for x in state.values()]) for state in states)
    assert (two - one).norm() <= 1e-4 * (one - start).norm()


def test_scores_of_two_processes_equal_those_of_one(one_and_two):
    one, two = (torch.load(folder / "scores.pt") for folder in one_and_two)
    assert (
        torch.equal(one, two) and one.sum() == 5 * 56 * 72 - 5 * 72
    )  # one row of each image is ignored
    assert (one.diag() > 0).all() and one.diag().sum() < one.sum()


# torch.compile


class Features(nn.Module):
    """A backbone of two convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, 4, 1), nn.BatchNorm2d(8), nn.ReLU())
        self.body = nn.Sequential(nn.Conv2d(8, 16, 3, 2, 1), nn.BatchNorm2d(16), nn.ReLU())

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        aux = self.stem(images)
        return {"aux": aux, "out": self.body(aux)}


def tiny_network() -> SegmentationModel:
    torch.manual_seed(0)
    head = nn.Sequential(ASPP(16, (1, 2), 8), nn.Conv2d(8, 3, 1))
    head[0].project[3].p = 0.0  # compiled graphs draw other random numbers
    aux = nn.Conv2d(8, 3, 1)
    return SegmentationModel(Features(), head, aux, False, Preprocessing(), None)


def test_whole_step_compiles_to_one_graph():
    """Autocast, model, loss of both heads and their gradients, with a GradScaler."""
    torch.manual_seed(1)
    images, target = torch.randn(2, 3, 33, 49), torch.randint(3, (2, 33, 49))
    target[0, :9] = 255
    results = []
    for compiled in (False, True):
        model = tiny_network()
        objective = Objective(model, Recipe(class_weights=(1.0, 2.0, 0.5)))

        def step(images, target, objective=objective):
            with torch.autocast("cpu", torch.bfloat16):
                return objective(images, target, objective.loss_normalizer(target))

        if compiled:
            step = torch.compile(step, fullgraph=True, backend="aot_eager")
        optimizer = Recipe().optimizer(model)
        scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
        losses = []
        for _ in range(3):
            loss = step(images, target)
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            losses.append(loss.item())
        results.append((losses, model.state_dict()))
    (eager, expected), (losses, weights) = results
    assert eager[2] < eager[0]
    # A compiled graph rounds at other places; 2^-9 is half an ulp of bfloat16.
    assert losses == pytest.approx(eager, rel=2**-8)
    initial = tiny_network().state_dict()
    for name, value in expected.items():
        moved = (value - initial[name]).float().norm()
        assert (weights[name] - value).float().norm() <= 2**-5 * moved + 1e-6, name


# Real images


def test_four_frames_of_camvid_are_memorised(shared_data, tmp_path):
    camvid = shared_data / "camvid"
    if not camvid.is_dir():
        pytest.skip("CamVid is absent")
    whole = folder(camvid, "train", [f"class {i}" for i in range(11)], ignore=[11])
    pairs = []
    for index in (0, 100, 200, 300):
        image, labels = whole.read(index)
        paths = tmp_path / f"{index}.png", tmp_path / f"{index}_labels.png"
        image.resize((96, 72), Image.Resampling.BOX).save(paths[0])
        Image.fromarray(labels).resize((96, 72), Image.Resampling.NEAREST).save(paths[1])
        pairs.append(paths)
    data = SegmentationData(pairs, whole.classes)
    torch.manual_seed(0)
    model = small_network(num_classes=11, head_conv=True)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 0.3  # converges within a few updates
    recipe = Recipe(
        epochs=80, batch_size=4, crop_size=(72, 96), scale=(1, 1), flip=0, color_jitter=0,
        learning_rate=0.05, warmup_steps=5, weight_decay=0,
    )  # fmt: skip
    before = evaluate(model.eval(), data, workers=0, quiet=True)
    train(model, data, None, recipe, tmp_path / "run", workers=0, evaluate_every=80)
    scores = evaluate(model, data, workers=0, quiet=True)
    assert before.pixel_accuracy < 0.4
    assert scores.pixel_accuracy > 0.85
