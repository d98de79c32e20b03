"""Losses of low-resolution logits against segmentation_models_pytorch's and mmsegmentation's."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deeplab_fast import (
    UpsampleCrossEntropyLoss,
    UpsampleDiceLoss,
    UpsampleFocalLoss,
    deferred_upsampling,
)
from deeplab_fast.nn import mmsegmentation
from deeplab_fast.nn.deferred import DeferredUpsampling
from deeplab_fast.ops import upsample_class_sums as class_sums

from ..support.cases import assert_as_accurate_as

CLASSES = 5
SIZE = (29, 33)


@pytest.fixture(scope="module")
def smp():
    return pytest.importorskip("segmentation_models_pytorch", reason="its losses are the peers")


def problem(ignored: int | None = 255) -> tuple[Tensor, Tensor]:
    """Logits, and a target of which a part is ignored."""
    target = torch.randint(CLASSES, (2, *SIZE))
    if ignored is not None:
        target[0, :6] = ignored
    return 2 * torch.randn(2, CLASSES, 5, 7), target


def full(logits: Tensor, align_corners: bool = False) -> Tensor:
    return F.interpolate(logits, SIZE, mode="bilinear", align_corners=align_corners)


def result(loss_of: Any, logits: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    """The loss and its gradient."""
    leaf = logits.detach().requires_grad_()
    loss = loss_of(leaf, *arguments)
    (gradient,) = torch.autograd.grad(loss.sum(), leaf)
    return loss.detach(), gradient


def deferred(loss: Any, align_corners: bool = False) -> Any:
    """``loss`` of deferred logits, which it must not upsample."""

    def loss_of(logits: Tensor, *arguments: Any) -> Tensor:
        with deferred_upsampling():
            output = full(logits, align_corners)
            value = loss(output, *arguments)
        assert "_result" not in vars(output)
        return value

    return loss_of


def assert_equals_peer(loss: Any, peer: Any, logits: Tensor, *arguments: Any) -> None:
    """Values and gradients, from logits before the upsampling and from deferred ones."""
    exact = result(lambda x: peer(full(x), *arguments), logits.double())
    theirs = result(lambda x: peer(full(x), *arguments), logits)
    for ours in (
        result(loss, logits, *arguments),
        result(deferred(loss), logits, *arguments),
        result(lambda x: loss(full(x), *arguments), logits),
    ):
        for values in zip(ours, theirs, exact):
            assert_as_accurate_as(*values)


@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("smooth_factor", [0.0, 0.2])
def test_cross_entropy_is_that_of_smp(smp, smooth_factor, reduction):
    logits, target = problem(255 if reduction == "sum" else None)
    peer = smp.losses.SoftCrossEntropyLoss(reduction, smooth_factor, ignore_index=255)
    loss = UpsampleCrossEntropyLoss(
        ignore_index=255, reduction=reduction, label_smoothing=smooth_factor
    )
    assert_equals_peer(loss, peer, logits, target)


def test_mean_of_smp_counts_ignored_pixels(smp):
    logits, target = problem()
    loss = UpsampleCrossEntropyLoss(ignore_index=255, reduction="sum", label_smoothing=0.1)
    peer = smp.losses.SoftCrossEntropyLoss(smooth_factor=0.1, ignore_index=255)
    assert_equals_peer(lambda x, t: loss(x, t) / t.numel(), peer, logits, target)


LOSSES = [UpsampleCrossEntropyLoss, UpsampleFocalLoss, UpsampleDiceLoss]


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32])
def test_masks_of_other_shapes_and_dtypes(loss, dtype):
    logits, target = problem()
    criterion = loss(ignore_index=255)
    expected = criterion(logits, target)
    assert torch.equal(criterion(logits, target.to(dtype)), expected)
    assert torch.equal(criterion(logits, target.unsqueeze(1).to(dtype)), expected)
    assert torch.equal(deferred(criterion)(logits, target.unsqueeze(1).to(dtype)), expected)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("align_corners", [False, True])
def test_deferred_logits_bring_their_align_corners(loss, align_corners):
    logits, target = problem()
    expected = loss(ignore_index=255, align_corners=align_corners)(logits, target)
    criterion = loss(ignore_index=255, align_corners=not align_corners)
    assert torch.equal(deferred(criterion, align_corners)(logits, target), expected)


@pytest.mark.parametrize("loss", LOSSES)
def test_scale_that_is_not_the_ratio_of_the_sizes(loss):
    """The loss takes the result, at full resolution."""
    logits, _ = problem()
    results = []
    for context in (deferred_upsampling(), torch.enable_grad()):
        leaf = logits.clone().requires_grad_()
        with context:
            output = F.interpolate(leaf, scale_factor=3.3, mode="bilinear")
        target = torch.zeros(2, *output.shape[2:], dtype=torch.int64)
        value = loss()(output, target)
        value.backward()
        results.append((value.detach(), leaf.grad))
    torch.testing.assert_close(*results)
    assert not torch.allclose(loss()(logits, target), results[0][0], rtol=1e-4)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize(
    "use",
    [lambda y: y.mul_(2), lambda y: y[0].zero_(), lambda y: y.detach().add_(y.argmax(1, True))],
)
def test_changed_logits(loss, use):
    logits, target = problem()
    results = []
    for context in (deferred_upsampling(), torch.enable_grad()):
        leaf = logits.clone().requires_grad_()
        with context:
            output = full(leaf)
            use(output)
            value = loss(ignore_index=255)(output, target)
        value.backward()
        results.append((value.detach(), leaf.grad))
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("loss", LOSSES)
def test_gradient_seen_by_a_hook(loss):
    logits, target = problem()
    gradients = []
    with deferred_upsampling():
        output = full(logits.requires_grad_())
    output.register_hook(gradients.append)
    loss(ignore_index=255)(output, target).backward()
    assert gradients[0].shape == output.shape


@pytest.mark.parametrize("loss", [*LOSSES, mmsegmentation.UpsampleCrossEntropyLoss])
def test_target_of_another_size_than_the_deferred_logits(loss):
    logits, target = problem()
    with deferred_upsampling(), pytest.raises(ValueError, match=r"target: expected \[2, 29, 33\]"):
        loss()(full(logits), target[:, 1:])


@pytest.mark.parametrize("loss", LOSSES)
def test_bad_targets(loss):
    logits, target = problem(None)
    with pytest.raises(TypeError, match="target: expected an integer dtype"):
        loss()(logits, target.float())
    with pytest.raises(ValueError, match="target: expected"):
        loss()(logits, target[:1])
    target[1, 2, 3] = CLASSES
    with pytest.raises(IndexError, match="target: 5 is not a class"):
        loss()(logits, target)


class FocalPeer(nn.Module):
    """The focal loss of Lin et al. for several classes, of full-resolution logits."""

    def __init__(self, gamma: float, reduction: str = "mean") -> None:
        super().__init__()
        self.gamma, self.reduction = gamma, reduction

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        losses = F.cross_entropy(logits, target, reduction="none", ignore_index=255)
        losses = (1 - torch.exp(-losses)) ** self.gamma * losses
        return losses if self.reduction == "none" else getattr(losses, self.reduction)()


@pytest.mark.parametrize("gamma", [0.0, 1.0, 2.0, 2.5])
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_focal_loss(gamma, reduction):
    logits, target = problem()
    loss = UpsampleFocalLoss(gamma, 255, reduction)
    assert_equals_peer(loss, FocalPeer(gamma, reduction), logits, target)


def test_focal_loss_has_finite_gradients_where_pixels_are_ignored_or_certain():
    logits, target = problem()
    logits[1] = 1e4 * F.one_hot(torch.zeros(5, 7, dtype=torch.int64), CLASSES).movedim(-1, 0)
    target[1] = 0
    loss, gradient = result(UpsampleFocalLoss(0.5, 255), logits, target)
    assert loss.isfinite()
    assert gradient.isfinite().all()
    assert gradient.any()


@pytest.mark.parametrize(
    "options, message", [({"gamma": -1}, "gamma"), ({"reduction": "max"}, "reduction")]
)
def test_focal_options(options, message):
    with pytest.raises(ValueError, match=f"{message}: expected"):
        UpsampleFocalLoss(**options)


DICE_OPTIONS: list[dict[str, Any]] = [
    {},
    {"log_loss": True},
    {"smooth": 1.5},
    {"classes": [0, 3]},
    {"eps": 0.4, "log_loss": True},
    {"eps": 500.0},
]


@pytest.mark.parametrize("options", DICE_OPTIONS, ids=str)
def test_dice_loss_is_that_of_smp(smp, options):
    logits, target = problem()
    target[target == 3] = 2  # a class without a pixel
    peer = smp.losses.DiceLoss("multiclass", ignore_index=255, **options)
    assert_equals_peer(UpsampleDiceLoss(ignore_index=255, **options), peer, logits, target)


@pytest.mark.parametrize("stripe_bytes", [1, 4 * 33 * CLASSES * 4, 1 << 20])
@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize("size", [(1, 1), (5, 7), (3, 4)])
def test_dice_loss_in_stripes(monkeypatch, size, align_corners, stripe_bytes):
    """One row at a time, several, all; one source pixel; no upsampling; downsampling."""
    monkeypatch.setattr(class_sums, "_STRIPE_BYTES", stripe_bytes)
    logits = torch.randn(2, CLASSES, *size, dtype=torch.float64)
    target = torch.randint(CLASSES, (2, 5, 7))
    target[0, 2] = 255

    def peer(logits: Tensor) -> Tensor:
        upsampled = F.interpolate(logits, (5, 7), mode="bilinear", align_corners=align_corners)
        counts = (target != 255).unsqueeze(1)
        p = upsampled.softmax(1) * counts
        t = F.one_hot(target.where(target != 255, 0), CLASSES).movedim(-1, 1) * counts
        p, t = p.movedim(1, 0).flatten(1), t.movedim(1, 0).flatten(1)
        return (1 - 2 * (p * t).sum(1) / (p.sum(1) + t.sum(1))).mean()

    loss = UpsampleDiceLoss(ignore_index=255, align_corners=align_corners)
    torch.testing.assert_close(result(loss, logits, target), result(peer, logits))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_dice_loss_of_half_precision(dtype):
    logits, target = problem()
    logits = logits.to(dtype).contiguous(memory_format=torch.channels_last)
    loss, gradient = result(UpsampleDiceLoss(ignore_index=255), logits, target)
    expected, exact = result(UpsampleDiceLoss(ignore_index=255), logits.double(), target)
    assert (loss.dtype, gradient.dtype) == (torch.float32, dtype)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradient, exact.to(dtype))


def test_dice_loss_under_autocast():
    logits, target = problem()
    expected = result(UpsampleDiceLoss(ignore_index=255), logits, target)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = result(UpsampleDiceLoss(ignore_index=255), logits, target)
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


def test_dice_op():
    logits, target = problem()
    arguments = (logits.double().requires_grad_(), target, 255, False)
    torch.library.opcheck(torch.ops.deeplab_fast.upsample_class_sums.default, arguments)


def test_dice_loss_compiles_to_one_graph():
    logits, target = problem()
    loss = UpsampleDiceLoss(ignore_index=255)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(result(compiled, logits, target), result(loss, logits, target))


def test_dice_loss_of_no_image():
    loss = UpsampleDiceLoss()(torch.randn(0, 3, 2, 2), torch.zeros(0, 4, 4, dtype=torch.int64))
    assert loss == 0


def test_losses_of_smp_on_deferred_logits_are_unchanged(smp):
    losses, mode = smp.losses, "multiclass"
    for loss in (
        losses.SoftCrossEntropyLoss(smooth_factor=0.1, ignore_index=255),
        losses.DiceLoss(mode, ignore_index=255),
        losses.FocalLoss(mode, ignore_index=255),
        losses.LovaszLoss(mode, ignore_index=255),
        losses.LovaszLoss(mode, per_image=True, ignore_index=255),
        losses.JaccardLoss(mode),
        losses.TverskyLoss(mode, ignore_index=255),
    ):
        logits, target = problem(None if isinstance(loss, losses.JaccardLoss) else 255)
        assert_unchanged(loss, logits, target)
    for loss in (
        losses.SoftBCEWithLogitsLoss(),
        losses.DiceLoss("multilabel"),
        losses.FocalLoss("binary"),
        losses.LovaszLoss("binary"),
    ):
        logits = torch.randn(2, 1, 5, 7)
        assert_unchanged(loss, logits, torch.randint(2, (2, 1, *SIZE)).float())


def assert_unchanged(loss: Any, logits: Tensor, target: Tensor) -> None:
    expected = result(lambda x: loss(full(x), target), logits)

    def of_deferred(x: Tensor) -> Tensor:
        with deferred_upsampling():
            output = full(x)
            assert isinstance(output, DeferredUpsampling)
            return loss(output, target)

    for actual, value in zip(result(of_deferred, logits), expected):
        assert torch.equal(actual, value), type(loss).__name__


def mmseg_cross_entropy(
    logits: Tensor,
    label: Tensor,
    weight: Tensor | None,
    avg_factor: float | None,
    ignore_index: int,
    reduction: str,
    class_weight: list[float] | None,
    avg_non_ignore: bool,
) -> Tensor:
    """The formula of mmsegmentation 1.2 (mmseg/models/losses/cross_entropy_loss.py)."""
    weights = None if class_weight is None else logits.new_tensor(class_weight)
    loss = F.cross_entropy(logits, label, weights, reduction="none", ignore_index=ignore_index)
    if weight is not None:
        loss = loss * weight
    if reduction != "mean":
        return loss if reduction == "none" else loss.sum()
    if avg_factor is None:
        pixels = torch.ones_like(label, dtype=loss.dtype) if weights is None else weights[label]
        avg_factor = (pixels * ((label != ignore_index) | (not avg_non_ignore))).sum()
    return loss.sum() / avg_factor


MMSEG_CASES = list(itertools.product((None, [1.0, 2.0, 0.5, 0.0, 3.0]), (False, True)))


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("class_weight, avg_non_ignore", MMSEG_CASES)
@pytest.mark.parametrize("ignore_index", [255, 2])
@pytest.mark.parametrize("with_weight", [False, True])
def test_loss_of_mmsegmentation(reduction, class_weight, avg_non_ignore, ignore_index, with_weight):
    # mmsegmentation raises an error if there are class weights and an ignored label is no class.
    logits, label = problem(ignore_index if class_weight is None else 2)
    weight = torch.rand(label.shape) if with_weight else None
    for avg_factor in (None, 37.0) if reduction == "mean" else (None,):
        criterion = mmsegmentation.UpsampleCrossEntropyLoss(
            reduction="none",
            class_weight=class_weight,
            loss_weight=0.4,
            avg_non_ignore=avg_non_ignore,
        )
        call = (weight, avg_factor, reduction, ignore_index)

        def peer(x, label, weight, avg_factor, reduction, ignore_index):
            return 0.4 * mmseg_cross_entropy(
                *(x, label, weight, avg_factor, ignore_index, reduction),
                *(class_weight, avg_non_ignore),
            )

        assert_equals_peer(criterion, peer, logits, label, *call)


def test_loss_of_mmsegmentation_as_a_module():
    loss = mmsegmentation.UpsampleCrossEntropyLoss(
        use_sigmoid=False, class_weight=[1.0] * CLASSES, loss_name="loss_aux"
    )
    assert loss.loss_name == "loss_aux"
    assert not loss.state_dict()
    logits, label = problem()
    expected = UpsampleCrossEntropyLoss(ignore_index=255)(logits, label)
    torch.testing.assert_close(loss(logits, label, ignore_index=255), expected)
    label[:] = 255
    assert loss(logits, label, ignore_index=255) == 0
    with pytest.raises(ValueError, match="avg_factor: expected None"):
        loss(logits, label, avg_factor=3.0, reduction_override="sum")
    with pytest.raises(ValueError, match="reduction: expected"):
        loss(logits, label, reduction_override="max")
    with pytest.raises(ValueError, match="use_sigmoid: expected False"):
        mmsegmentation.UpsampleCrossEntropyLoss(use_sigmoid=True)


def test_training_step_of_a_model_of_smp(smp):
    model = smp.DeepLabV3Plus("resnet18", encoder_weights=None, classes=CLASSES)
    images, masks = torch.randn(2, 3, 64, 64), torch.randint(CLASSES, (2, 64, 64))
    masks[:, :9] = 255
    gradients = []
    for loss in (
        deferred_call(model, UpsampleCrossEntropyLoss(ignore_index=255)),
        deferred_call(model, nn.CrossEntropyLoss(ignore_index=255)),
        lambda x, t: F.cross_entropy(model(x), t, ignore_index=255),
    ):
        torch.manual_seed(0)
        model.zero_grad()
        loss(images, masks).backward()
        gradients.append(model.segmentation_head[0].weight.grad.clone())
    torch.testing.assert_close(gradients[0], gradients[2])
    torch.testing.assert_close(gradients[1], gradients[2])


def deferred_call(model: nn.Module, loss: nn.Module) -> Any:
    def call(images: Tensor, masks: Tensor) -> Tensor:
        with deferred_upsampling():
            return loss(model(images), masks)

    return call


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_logits_of_full_size(reduction):
    """The output of a network such as a U-Net, which ends with a convolution at full resolution."""
    logits = torch.randn(2, 5, 9, 11, dtype=torch.bfloat16, requires_grad=True)
    masks = torch.randint(5, (2, 9, 11))
    masks[:, 0] = 255
    weight = torch.rand(5)
    options = {"ignore_index": 255, "reduction": reduction, "label_smoothing": 0.1}
    actual = UpsampleCrossEntropyLoss(weight.double(), **options)(logits, masks)
    expected = nn.CrossEntropyLoss(weight, **options)(logits.float(), masks)
    torch.testing.assert_close(actual, expected)
    (grad,) = torch.autograd.grad(actual.sum(), logits)
    (expected_grad,) = torch.autograd.grad(expected.sum(), logits)
    assert grad.dtype == torch.bfloat16
    torch.testing.assert_close(grad, expected_grad)
