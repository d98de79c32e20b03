"""UpsampleCrossEntropyLoss against F.interpolate followed by torch.nn.CrossEntropyLoss."""

from __future__ import annotations

import copy
import inspect
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

import deeplab_fast
from deeplab_fast import upsample_cross_entropy
from deeplab_fast.nn import UpsampleCrossEntropyLoss, UpsampleDiceLoss

from ..support.cases import DTYPES, assert_as_accurate_as, upsampled

CLASSES = 5
WEIGHT = torch.tensor([0.5, 1.0, 2.0, 0.0, 3.0])
OPTIONS: list[dict[str, Any]] = [
    {},
    {"weight": WEIGHT},
    {"ignore_index": 255},
    {"ignore_index": 2},
    {"reduction": "sum"},
    {"reduction": "none"},
    {"label_smoothing": 0.2},
    {"align_corners": True},
    {
        "weight": WEIGHT,
        "ignore_index": 255,
        "reduction": "sum",
        "label_smoothing": 0.1,
        "align_corners": True,
    },
]


def problem(ignore_index: int) -> tuple[Tensor, Tensor]:
    """Logits, and a target of which a part is ignored."""
    target = torch.randint(CLASSES, (2, 19, 23))
    target[0, :4] = ignore_index
    return 3 * torch.randn(2, CLASSES, 4, 6), target


def loss_and_gradient(criterion: Any, logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    leaf = logits.detach().requires_grad_()
    loss = criterion(leaf, target)
    (gradient,) = torch.autograd.grad(loss.sum(), leaf)
    return loss.detach(), gradient


class Peer(nn.Module):
    """PyTorch's loss of upsampled logits, in float64 if the logits are, else in float32."""

    def __init__(self, align_corners: bool = False, **options: Any) -> None:
        super().__init__()
        self.align_corners = align_corners
        self.cross_entropy = nn.CrossEntropyLoss(**options)

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        logits = logits if logits.dtype == torch.float64 else logits.float()
        full = upsampled(logits, tuple(target.shape[1:]), align_corners=self.align_corners)
        return self.cross_entropy(full, target)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: ", ".join(options) or "defaults")
def test_loss_and_gradient_are_those_of_pytorch(options, dtype):
    logits, target = problem(options.get("ignore_index", -100))
    logits = logits.to(dtype)
    actual = loss_and_gradient(UpsampleCrossEntropyLoss(**options), logits, target)
    peer = loss_and_gradient(Peer(**options), logits, target)
    exact = loss_and_gradient(Peer(**options).double(), logits.double(), target)
    for results in zip(actual, peer, exact):
        assert_as_accurate_as(*results)


def test_loss_is_that_of_the_function():
    """All options by position, in the order of the function's arguments."""
    logits, target = problem(255)
    options = WEIGHT, 255, "none", 0.1, True
    expected = upsample_cross_entropy(logits, target, *options)
    assert_close(UpsampleCrossEntropyLoss(*options)(logits, target), expected, rtol=0, atol=0)


def test_options_and_defaults_are_those_of_the_function():
    function = inspect.signature(upsample_cross_entropy).parameters
    module = inspect.signature(UpsampleCrossEntropyLoss).parameters
    assert [(p.name, p.default) for p in module.values()] == [
        (p.name, p.default) for p in list(function.values())[2:]
    ]


@pytest.mark.parametrize("weight", [None, WEIGHT], ids=["no weight", "weight"])
def test_state_dict_is_that_of_pytorchs_loss(weight):
    ours, theirs = UpsampleCrossEntropyLoss(weight), nn.CrossEntropyLoss(weight)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert [name for name, _ in ours.named_buffers()] == [
        name for name, _ in theirs.named_buffers()
    ]
    assert not list(ours.parameters())
    ours.load_state_dict(theirs.state_dict())
    theirs.load_state_dict(ours.state_dict())


def test_loaded_weight_is_used():
    logits, target = problem(-100)
    criterion = UpsampleCrossEntropyLoss(torch.ones(CLASSES))
    criterion.load_state_dict({"weight": WEIGHT})
    expected = UpsampleCrossEntropyLoss(WEIGHT)(logits, target)
    assert_close(criterion(logits, target), expected, rtol=0, atol=0)


def test_weight_moves_with_the_module():
    criterion = UpsampleCrossEntropyLoss(WEIGHT)
    assert criterion.to(torch.float64).weight.dtype == torch.float64
    assert criterion.to("meta").weight.device.type == "meta"


def test_copies_do_not_share_the_weight():
    logits, target = problem(-100)
    criterion = UpsampleCrossEntropyLoss(WEIGHT.clone(), label_smoothing=0.1)
    duplicate = copy.deepcopy(criterion)
    expected = criterion(logits, target)
    criterion.weight.zero_()
    assert_close(duplicate(logits, target), expected, rtol=0, atol=0)


def test_compiles_to_one_graph():
    logits, target = problem(255)
    criterion = UpsampleCrossEntropyLoss(WEIGHT, ignore_index=255, label_smoothing=0.1)
    compiled = torch.compile(criterion, fullgraph=True, backend="aot_eager")
    actual = loss_and_gradient(compiled, logits, target)
    assert_close(actual, loss_and_gradient(criterion, logits, target), rtol=0, atol=0)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"reduction": "max"}, "reduction: expected one of none, mean, sum, got 'max'"),
        ({"label_smoothing": 1.5}, "label_smoothing: expected 0 to 1, got 1.5"),
        ({"weight": torch.ones(3)}, r"weight: expected \(5,\), got \(3,\)"),
    ],
    ids=["reduction", "label_smoothing", "weight"],
)
def test_errors_name_the_argument(options, message):
    with pytest.raises(ValueError, match=message):
        UpsampleCrossEntropyLoss(**options)(*problem(-100))


def test_module_is_exported():
    assert deeplab_fast.UpsampleCrossEntropyLoss is UpsampleCrossEntropyLoss


def test_no_transforms_of_the_dice_loss():
    target = torch.zeros(1, 9, 9, dtype=torch.int64)
    with pytest.raises(NotImplementedError, match="UpsampleDiceLoss: torch.func transforms"):
        torch.func.grad(lambda x: UpsampleDiceLoss()(x, target))(torch.randn(1, 2, 4, 4))
