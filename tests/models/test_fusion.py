"""The fusion pass: values as in evaluation mode, what is fused, and memory that must not change."""

from __future__ import annotations

import copy
import operator
import pickle
import random
from collections import OrderedDict

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.testing import assert_close

from deeplab_fast.models import DeepLabV3, DeepLabV3Plus
from deeplab_fast.models.backbones.mobilenet_v2 import SameConv2d
from deeplab_fast.models.fusion import FoldedASPP, FusedConv2d, FusedModule, fuse, fuse_with_report
from deeplab_fast.nn import ASPP, conv_norm_relu
from deeplab_fast.ops.upsample import upsample

from ..support.batch_norm import with_statistics
from ..support.cases import assert_as_accurate_as


def tensors_of(value) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    values = value.values() if isinstance(value, dict) else value
    return [tensor for item in values if item is not None for tensor in tensors_of(item)]


@torch.no_grad()
def check(module: nn.Module, *inputs: Tensor) -> nn.Module:
    """Compare with evaluation mode, in float64, where no other error can hide one of the pass.

    The reference overwrites residuals too.
    """
    module = module.double()
    state = copy.deepcopy(module.state_dict())
    fused = fuse(module)
    module = copy.deepcopy(module).eval()
    inputs = tuple(x.double() for x in inputs)
    ours, theirs = ([x.clone() for x in inputs] for _ in range(2))
    expected = module(*theirs)
    for _ in range(2):
        ours = [x.clone() for x in inputs]
        actual = fused(*ours)
        assert type(actual) is type(expected)
        for a, e in zip(tensors_of(actual), tensors_of(expected), strict=True):
            assert a.dtype == e.dtype
            assert_close(a, e, rtol=1e-9, atol=1e-9 * max(1, e.abs().max().item()))
        assert_close(ours, theirs)  # a module may write to its input
    assert_close(module.state_dict(), state, rtol=0, atol=0)
    return fused


def layers(module: nn.Module) -> list[FusedConv2d]:
    return [layer for layer in module.modules() if isinstance(layer, FusedConv2d)]


def overwriting(module: FusedModule) -> int:
    """The number of calls that may overwrite their residual."""
    return module._steps.source.count(", True)")


class Net(nn.Module):
    """A module whose ``forward`` is given. The layers are ``a`` to ``d`` and ``norm``."""

    def __init__(self, forward) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Conv2d(4, 4, 3, padding=1) for _ in range(3))
        self.d = nn.Conv2d(8, 4, 1)
        self.norm, self.other_norm = nn.BatchNorm2d(4), nn.BatchNorm2d(4)
        self.relu, self.relu_ = nn.ReLU(), nn.ReLU(inplace=True)
        self.drop, self.identity = nn.Dropout(0.5), nn.Identity()
        self.pool = nn.MaxPool2d(3, 1, 1)
        self.run = forward
        with_statistics(self)

    def forward(self, x):
        return self.run(self, x)


def x() -> Tensor:
    return torch.randn(2, 4, 5, 6)


# --- what is fused

ACTIVATIONS = {
    "relu": nn.ReLU(), "relu in place": nn.ReLU(inplace=True), "relu6": nn.ReLU6(),
    "hardtanh": nn.Hardtanh(0, 6), "hardtanh of another range": nn.Hardtanh(-1, 6),
    "silu": nn.SiLU(), "elu": nn.ELU(),
}  # fmt: skip


@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize(
    "conv",
    [
        nn.Conv2d(4, 6, 3, stride=2, padding=1, bias=False),
        nn.Conv2d(4, 8, 3, padding=(2, 4), dilation=(2, 4), groups=2),
        SameConv2d(4, 4, 3, 2, groups=4),
    ],
    ids=["strided", "dilated groups", "same"],
)
def test_convolution_norm_and_activation(name, conv):
    sequence = nn.Sequential(conv, nn.BatchNorm2d(conv.out_channels), ACTIVATIONS[name])
    fused = check(with_statistics(sequence), 3 * x())
    is_fused = name in ("relu", "relu in place", "relu6", "hardtanh")
    assert [type(m) for m in fused.children()][1:] == ([] if is_fused else [type(sequence[2])])
    (layer,) = layers(fused)
    assert layer.activation == (
        "none" if not is_fused else "relu" if "relu " in f"{name} " else "relu6"
    )


@pytest.mark.parametrize(
    "activate, activation",
    [
        (F.relu, "relu"),
        (torch.relu_, "relu"),
        (lambda y: F.relu(y, inplace=True), "relu"),
        (lambda y: F.relu(y, True), "relu"),
        (lambda y: y.relu_(), "relu"),
        (F.relu6, "relu6"),
        (lambda y: F.hardtanh(y, 0, 6), None),
        (F.silu, None),
    ],
)
def test_functional_activations(activate, activation):
    fused = check(Net(lambda net, x: activate(net.norm(net.a(x)))), 3 * x())
    assert [layer.activation for layer in layers(fused)] == [activation or "none"]


def test_norms_without_affine_parameters_and_synchronised_ones():
    for norm in (nn.BatchNorm2d(4, affine=False), nn.SyncBatchNorm(4)):
        net = with_statistics_of_all(nn.Sequential(nn.Conv2d(4, 4, 1), norm, nn.ReLU()))
        assert len(list(check(net, x()).children())) == 1


def with_statistics_of_all(module):
    for norm in module.modules():
        if getattr(norm, "running_mean", None) is not None:
            norm.running_mean.normal_()
            norm.running_var.uniform_(0.5, 2)
    return module


def test_weights_are_rounded_once():
    torch.manual_seed(0)
    conv, norm = nn.Conv2d(3, 4, 3), with_statistics(nn.BatchNorm2d(4))
    fused = fuse(nn.Sequential(conv, norm))[0]
    scale = norm.weight.double() / (norm.running_var.double() + norm.eps).sqrt()
    expected = conv.weight.double() * scale[:, None, None, None]
    assert torch.equal(fused.weight, expected.float())


SUMS = {
    "a + b": lambda net, y, x: y + x, "b + a": lambda net, y, x: x + y,
    "torch.add": lambda net, y, x: torch.add(y, x), "add_": lambda net, y, x: y.add_(x),
    "+=": lambda net, y, x: operator.iadd(y, x), "x +=": lambda net, y, x: operator.iadd(x, y),
    "alpha": lambda net, y, x: torch.add(y, x, alpha=2), "scalar": lambda net, y, x: y + 2,
    "itself": lambda net, y, x: y + y, "relu": lambda net, y, x: net.relu_(y + x),
    "size": lambda net, y, x: y + x.size(2),
    "mean": lambda net, y, x: net.relu(y + x.mean((2, 3), keepdim=True)),
    "larger": lambda net, y, x: net.relu(y.mean((2, 3), keepdim=True) + x),
    "row": lambda net, y, x: y + x[0], "channel": lambda net, y, x: net.relu(y + x[:, :1]),
}  # fmt: skip


@pytest.mark.parametrize("name", SUMS)
@pytest.mark.parametrize("residual", ["input", "value", "read later", "returned", "view"])
def test_sums(name, residual):
    def forward(net, x):
        x = x if residual == "input" else net.pool(x)
        given = x.view(2, 4, 5, 6) if residual == "view" else x
        y = SUMS[name](net, net.norm(net.b(net.a(x))), given)
        if residual == "read later":
            return y, net.c(x)
        return (y, x) if residual == "returned" else y

    check(Net(forward), x())


@pytest.mark.parametrize(
    "forward, count",
    [
        (lambda net, y: y + net.b(net.a(y)), 1),
        (lambda net, y: y + net.a(y), 0),  # the convolution reads what it would write
        (lambda net, y: net.identity(y) + net.b(net.a(net.drop(y))), 1),
        (lambda net, y: (y + net.b(net.a(y)), y), 0),
        (lambda net, y: (y + net.b(net.a(y))) * y.mean(), 0),
        (lambda net, y: net.c(y) + net.b(net.a(y)), 1),
        (lambda net, y: y.view(-1, 4, 5, 6) + net.b(net.a(y)), 0),
        (lambda net, y: torch.cat([y.expand(2, -1, -1, -1) + net.b(net.a(y)), y]), 0),
        (lambda net, y: [z := net.relu_(y), y + net.b(net.a(z))], 0),
        (lambda net, y: net.relu(net.norm(y) + net.b(net.a(y))), 1),
    ],
)
def test_residuals_that_may_be_overwritten(forward, count):
    fused = check(Net(lambda net, x: forward(net, net.pool(x))), x())
    assert overwriting(fused) == count


def test_input_is_never_overwritten():
    fused = check(Net(lambda net, x: net.relu(x + net.b(net.a(x)))), x())
    assert len(layers(fused)) == 2 and overwriting(fused) == 0


# --- what stays


def shared_norm(net, x):
    return net.norm(net.a(x)) + net.norm(net.b(x))


STAY = {
    "convolution called twice": lambda net, x: net.relu(net.norm(net.a(net.a(x)))),
    "convolution with two norms": lambda net, x: net.norm(net.a(x)) * net.other_norm(net.a(x + 1)),
    "shared norm": shared_norm,
    "output of the convolution read": lambda net, x: (y := net.a(x)) * net.norm(y),
    "output of the convolution returned": lambda net, x: [y := net.a(x), net.norm(y)],
    "output of the norm read": lambda net, x: net.relu(y := net.norm(net.a(x))) * y,
    "relu in place of a read output": lambda net, x: net.relu_(y := net.norm(net.a(x))) * y,
    "input changed in between": lambda net, x: [
        y := net.pool(x), z := net.a(y), y.mul_(2), z + y
    ][3],
    "input changed before the norm": lambda net, x: [
        y := net.pool(x), z := net.a(y), y.mul_(2), net.relu(net.norm(z))
    ][3],
    "result not used": lambda net, x: [y := net.pool(x), y.add_(1), net.a(y)][2],
    "functional dropout": lambda net, x: net.a(F.dropout(x, 0.5, net.training)),
    "weights read": lambda net, x: net.norm(net.a(x)) * net.a.weight.mean(),
    "names of methods": lambda net, x: {"add": net.a(x), "relu": (x, [net.b(x)])},
    "ordered": lambda net, x: OrderedDict(out=net.a(x), aux=net.b(x)),
    "keywords": lambda net, x: net.norm(input=net.a(input=x)),
    "chunks": lambda net, x: net.d(torch.cat([*net.a(x).chunk(2, 1), net.b(x)], 1)),
    "sizes": lambda net, x: F.interpolate(net.a(x), (x.size(2) * 2, x.shape[3] + 1)),
    "three images": lambda net, x: net.relu(net.a(x[0]) + x[1]),
}  # fmt: skip


@pytest.mark.parametrize("name", STAY)
def test_values_stay(name):
    check(Net(STAY[name]), x())


KEPT = {
    "reflection": nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"),
    "same": nn.Conv2d(4, 4, 3, padding="same"),
    "transposed": nn.ConvTranspose2d(4, 4, 3, padding=1),
    "spectral norm": nn.utils.spectral_norm(nn.Conv2d(4, 4, 1)),
    "weight norm": nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 4, 1)),
    "subclass": type("Scaled", (nn.Conv2d,), {
        "forward": lambda self, x: 2 * nn.Conv2d.forward(self, x)
    })(4, 4, 1),
}  # fmt: skip


@pytest.mark.parametrize("name", KEPT)
def test_kept_convolutions(name):
    fused = check(with_statistics(nn.Sequential(KEPT[name], nn.BatchNorm2d(4), nn.ReLU())), x())
    assert not layers(fused)
    assert {nn.BatchNorm2d, nn.ReLU} <= {type(module) for module in fused.children()}


@pytest.mark.parametrize(
    "norm",
    [nn.BatchNorm2d(4, track_running_stats=False), nn.GroupNorm(2, 4), nn.InstanceNorm2d(4)],
    ids=lambda norm: type(norm).__name__,
)
def test_kept_norms(norm):
    fused = check(nn.Sequential(nn.Conv2d(4, 4, 1), norm, nn.ReLU()), x())
    assert type(norm) in {type(module) for module in fused.children()} and len(layers(fused)) == 1


@pytest.mark.parametrize("position", [0, 1, 2])
def test_hooks_still_run(position):
    sequence = with_statistics(nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.ReLU()))
    sequence[position].register_forward_hook(lambda module, args, output: output + 1)
    check(nn.Sequential(sequence), x())
    sequence.register_forward_pre_hook(lambda module, args: 2 * args[0])
    check(nn.Sequential(sequence), x())
    check(sequence, x())


def test_forward_of_an_object_stays():
    sequence = nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU())
    sequence[0].forward = lambda x: x + 1
    assert not layers(check(sequence, x()))


class Untraceable(nn.Module):
    """A module whose code depends on values, with a block that can be fused."""

    def __init__(self) -> None:
        super().__init__()
        self.block = conv_norm_relu(4, 4, 3)
        self.conv = nn.Conv2d(4, 4, 1)
        self.blocks = nn.ModuleList([Net(lambda net, x: net.norm(net.a(x)))])

    def forward(self, x, scale=None):
        if x.sum() > 0 or self.conv.stride != (1, 1):
            x = self.block(x)
        for block in self.blocks:
            x = block(x)
        return x if scale is None else x * scale


def test_blocks_of_a_module_that_cannot_be_traced():
    net = with_statistics(nn.Sequential(nn.Conv2d(4, 4, 1), Untraceable(), nn.Conv2d(4, 4, 1)))
    for sign in (1, -1):
        check(net, sign * torch.rand(1, 4, 5, 6))
    _, report = fuse_with_report(net)
    assert set(report.fused) == {"0", "2", "1.blocks.0.a"}
    # The code might read the items of a Sequential, or attributes of a convolution.
    assert set(report.kept) == {"1.conv", "1.block.0"}


class DependsOnType(nn.Module):
    def forward(self, x):
        return x * 2 if isinstance(x, Tensor) else x


class ComparesType(nn.Module):
    def forward(self, x):
        return x * 2 if type(x) is Tensor else x


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * 2

    @staticmethod
    def backward(ctx, grad):
        return grad * 2


class CallsFunction(nn.Module):
    def forward(self, x):
        return Doubled.apply(x)


class CallsC(nn.Module):
    def forward(self, x):
        return x if torch._C._functorch.is_batchedtensor(x) else x * 2


@pytest.mark.parametrize("kind", [DependsOnType, ComparesType, CallsFunction, CallsC])
def test_code_that_depends_on_the_type_of_a_value_is_not_traced(kind):
    for place in range(2):
        items = [nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)]
        items.insert(place, kind())
        assert len(layers(check(nn.Sequential(*items), x()))) == 2


class InBFloat16(nn.Module):
    """A module whose code changes the dtype of a convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.block = nn.Conv2d(4, 4, 1), Net(lambda net, x: net.norm(net.a(x)))

    def forward(self, x):
        with torch.autocast("cpu", torch.bfloat16):
            x = self.conv(x)
        return self.block(x.float())


@torch.no_grad()
def test_autocast_within_the_code_is_kept():
    model = InBFloat16().eval()
    fused, image = fuse(model), torch.randn(1, 4, 5, 5)
    assert len(layers(fused)) == 1
    assert_close(fused(image), model(image))


class Stores(nn.Module):
    """A module that keeps a value for later code."""

    def __init__(self) -> None:
        super().__init__()
        self.block, self.seen = Net(lambda net, x: net.norm(net.a(x))), None

    def forward(self, x):
        self.seen = self.block(x)
        return self.seen


class ReadsStored(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stores = Stores()

    def forward(self, x):
        y = self.stores(x)
        return y + self.stores.seen


def test_values_that_code_keeps():
    fused = check(with_statistics(ReadsStored()), x())
    assert isinstance(fused.stores.seen, Tensor) and len(layers(fused)) == 1


class CollectsByHooks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block, self.found = conv_norm_relu(4, 4), []
        self.block.register_forward_hook(Collect(self.found))

    def forward(self, x):
        self.found.clear()
        self.block(x)
        return [2 * y for y in self.found]


class Collect:
    def __init__(self, found) -> None:
        self.found = found

    def __call__(self, module, args, output) -> None:
        self.found.append(output)


def test_values_that_hooks_collect():
    net = with_statistics(CollectsByHooks())
    assert len(check(net, x())(x().double())) == 1


class Collects(nn.Module):
    """A module that changes a list, a dict, a set or a buffer of its own."""

    def __init__(self, change) -> None:
        super().__init__()
        self.net = Net(lambda net, x: net.norm(net.a(x)))
        self.values, self.named, self.sizes, self.change = [0], {}, {0}, change
        self.nested = {"a": ([],)}
        self.register_buffer("count", torch.zeros((), dtype=torch.float64))

    def forward(self, x):
        self.change(self, x)
        counts = [len(self.values), len(self.named), len(self.sizes), len(self.nested["a"][0])]
        return self.net(x) * self.count + sum(counts)


def count_calls(module, x):
    module.count += 1


@pytest.mark.parametrize(
    "change",
    [
        count_calls,
        lambda module, x: module.values.append(x),
        lambda module, x: module.named.update({len(module.named): x}),
        lambda module, x: module.sizes.add(len(module.sizes)),
        lambda module, x: module.nested["a"][0].append(x),
    ],
    ids=["buffer", "list", "dict", "set", "nested list"],
)
def test_containers_and_buffers_that_code_changes(change):
    module = Collects(change)
    fused, images = fuse(module.double()), x().double()
    assert (fused.values, fused.named, fused.sizes) == ([0], {}, {0})
    assert fused.nested == {"a": ([],)}
    assert len(layers(fused)) == 1
    with torch.no_grad():
        for _ in range(3):
            assert_close(fused(images), module.eval()(images))


class ChangesStatistics(nn.Module):
    """A module that changes a batch norm's buffer under another name."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
        self.register_buffer("mean", self.norm.running_mean)

    def forward(self, x):
        self.mean.add_(1)
        return self.norm(self.conv(x))


@torch.no_grad()
def test_statistics_that_code_changes_under_another_name():
    module, images = ChangesStatistics().double().eval(), x().double()
    fused = fuse(module)
    for _ in range(3):
        assert_close(fused(images), module(images))


class Registered(nn.Module):
    """A module whose subclasses need a keyword."""

    def __init_subclass__(cls, *, name: str) -> None:
        cls.name = name


class Named1(Registered, name="one"):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)

    def forward(self, x):
        return self.norm(self.conv(x))


def test_classes_whose_subclasses_need_a_keyword():
    fused = check(with_statistics(Named1()), x())
    assert len(layers(fused)) == 1 and fused.name == "one"


class ReadsAttributes(nn.Module):
    def __init__(self, attribute) -> None:
        super().__init__()
        self.net, self.attribute = Net(lambda net, x: net.norm(net.a(x))), attribute

    def forward(self, x):
        mask = getattr(x, self.attribute, None)
        return self.net(x if mask is None else mask(x))


def test_code_that_asks_for_an_attribute():
    assert len(layers(check(ReadsAttributes("no_mask"), x()))) == 1


class Named(nn.Module):
    """A module with names that are no identifiers, and an argument with the name of a function."""

    def __init__(self) -> None:
        super().__init__()
        self.scales = nn.ParameterList(torch.rand(4, 1, 1) for _ in range(2))
        self.by_name = nn.ParameterDict({"in": torch.rand(4, 1, 1)})
        self.add_module("it's", nn.Conv2d(4, 4, 3, padding=1))

    def forward(self, slice):
        y = getattr(self, "it's")(slice[:, :, 1:])
        return y * self.scales[1] + self.scales[0] + self.by_name["in"]


def test_names():
    fused = check(Named(), x())
    assert len(layers(fused)) == 1
    assert set(fused.state_dict()) >= {"scales.0", "scales.1", "by_name.in"}


class FreezesItself(nn.Module):
    """A module whose methods need a submodule that is folded."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)

    def train(self, mode=True):
        super().train(mode)
        self.norm.eval()
        return self

    def extra_repr(self):
        return f"{self.norm.num_features} channels"

    def forward(self, x):
        return self.norm(self.conv(x))


def test_methods_that_need_a_folded_layer():
    fused = check(FreezesItself(), x())
    assert fused.eval() is fused and not fused.train().training
    assert "FusedFreezesItself" in repr(fused)


def test_fusing_twice():
    fused = fuse(Net(residual_block).double())
    check(fused, x())
    assert len(layers(fuse(fused))) == 2


class Random(nn.Module):
    def forward(self, x):
        return x * torch.rand(())


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = torch.tensor(2.0)  # no buffer

    def forward(self, x):
        return x * self.scale


def test_tensors_that_are_no_buffers():
    assert len(layers(check(nn.Sequential(nn.Conv2d(4, 4, 1), Scaled()), x()))) == 1


def test_tensors_made_in_forward_are_made_at_each_call():
    fused = fuse(nn.Sequential(nn.Conv2d(4, 4, 1), Random()))
    image = torch.ones(1, 4, 2, 2)
    assert not torch.equal(fused(image), fused(image))


# --- random graphs


def conv(net, rng, values):
    return rng.choice([net.a, net.b, net.c])(rng.choice(values))


def residual(net, rng, values):
    y = net.norm(conv(net, rng, values))
    return rng.choice([net.relu, net.relu_, net.identity])(y + rng.choice(values))


def halves(value):
    first, second = value.chunk(2, 1)
    return first, second


OPERATIONS = [
    conv, conv, conv, conv,
    lambda net, rng, values: rng.choice([net.norm, net.other_norm])(values[-1]),
    lambda net, rng, values: rng.choice([net.norm, net.other_norm])(values[-1]),
    lambda net, rng, values: rng.choice([net.relu, net.relu_, F.relu, F.relu6])(values[-1]),
    lambda net, rng, values: net.relu_(rng.choice(values)),
    lambda net, rng, values: values[-1] + rng.choice(values),
    lambda net, rng, values: values[-1] + rng.choice(values),
    lambda net, rng, values: rng.choice(values) + values[-1],
    lambda net, rng, values: operator.iadd(values[-1], rng.choice(values)),
    lambda net, rng, values: operator.iadd(rng.choice(values), values[-1]),
    lambda net, rng, values: rng.choice(values).add_(rng.choice(values)),
    lambda net, rng, values: rng.choice(values).mul_(0.5),
    lambda net, rng, values: rng.choice([net.identity, net.drop])(rng.choice(values)),
    lambda net, rng, values: rng.choice(values).view(2, 4, 5, 6),
    lambda net, rng, values: rng.choice(values)[:, :, :, :],
    lambda net, rng, values: net.d(torch.cat([values[-1], rng.choice(values)], 1)),
    lambda net, rng, values: torch.cat([*map(net.identity, halves(rng.choice(values)))], 1),
    residual, residual, residual, residual,
    lambda net, rng, values: torch.split(rng.choice(values), 4, 1)[0],
    lambda net, rng, values: rng.choice(values) * values[-1].mean((2, 3), keepdim=True),
    lambda net, rng, values: net.pool(rng.choice(values)),
    lambda net, rng, values: values[-1] + rng.choice(values).mean((2, 3), keepdim=True),
]  # fmt: skip


def random_forward(seed: int):
    def forward(net, x):
        rng = random.Random(seed)
        values = [net.pool(x) if rng.random() < 0.8 else x]
        for _ in range(rng.randint(3, 14)):
            values.append(rng.choice(OPERATIONS)(net, rng, values))
        outputs = rng.sample(values, rng.randint(0, min(2, len(values))))
        return [values[-1], *outputs]

    return forward


@pytest.mark.parametrize("first", range(0, 300, 50))
def test_random_graphs(first):
    torch.manual_seed(first)
    for seed in range(first, first + 50):
        net = Net(random_forward(seed))
        try:
            check(net, x())
        except AssertionError as error:
            raise AssertionError(f"random_forward({seed})\n{fuse(net)._steps.source}") from error


PADDINGS = {
    "even": (lambda net, x: net.a(F.pad(x, (2, 2, 1, 1))), (2, 3)),
    "uneven": (lambda net, x: net.a(F.pad(x, (2, 1, 1, 1))), (1, 1)),
    "cropped": (lambda net, x: net.a(F.pad(x, (-1, -1, 0, 0))), (1, 1)),
    "reflected": (lambda net, x: net.a(F.pad(x, (1, 1, 1, 1), "reflect")), (1, 1)),
    "ones": (lambda net, x: net.a(F.pad(x, (1, 1, 1, 1), value=1.0)), (1, 1)),
    "horizontal": (lambda net, x: net.a(F.pad(x, (1, 1))), (1, 1)),
    "read": (lambda net, x: [y := F.pad(x, (1, 1, 1, 1)), net.a(y)], (1, 1)),
    "changed": (
        lambda net, x: [y := net.pool(x), z := F.pad(y, (1, 1, 1, 1)), y.add_(1), net.a(z)][3],
        (1, 1),
    ),
}


@pytest.mark.parametrize("name", PADDINGS)
def test_explicit_padding(name):
    forward, padding = PADDINGS[name]
    (layer,) = layers(check(Net(forward), x()))
    assert layer.geometry[1] == padding


@torch.no_grad()
def test_autocast_outside_of_the_network():
    net = Net(lambda net, x: (y := net.a(x), net.relu(y + net.norm(net.b(y))))).eval()
    fused, image = fuse(net), x()
    exact = copy.deepcopy(net).double()(image.double())
    with torch.autocast("cpu", torch.bfloat16):
        actual, expected = fused(image), net(image)
    for ours, theirs, e in zip(actual, expected, exact):
        assert ours.dtype == torch.bfloat16
        assert_as_accurate_as(ours, theirs.bfloat16(), e)


def test_only_the_main_output():
    net = Net(lambda net, x: OrderedDict(out=net.a(x), aux=net.b(net.pool(x))))
    fused, image = fuse(net), x()
    fused.b = nn.Identity()  # so that a call of it is seen
    fused.b.forward = None
    assert torch.equal(fused.main_output(image)["out"], fused.a(image))
    assert list(copy.deepcopy(fused).main_output(image)) == ["out"]


def residual_block(net, x):
    return net.relu(x + net.b(net.a(x)))


# --- modules of this package


def test_aspp():
    plain = with_statistics(ASPP(8, (1, 2), 4))
    assert type(fuse(plain.eval())) is FoldedASPP
    image = torch.randn(2, 8, 7, 6)
    for aspp in (
        plain,
        ASPP(8, (1, 2), 4, separable=True, depthwise_norm=True),
        ASPP(8, (1, 2), 4, project_size=3),
    ):
        fused = check(nn.Sequential(with_statistics(aspp), nn.Conv2d(4, 3, 1)), image)
        assert nn.BatchNorm2d not in {type(module) for module in fused.modules()}
    plain.convs[1][1] = nn.GroupNorm(2, 4).double()
    check(nn.Sequential(plain), image)


@pytest.mark.parametrize("sizes", [(3, 5), (5, 3), (8,), (2, 2, 4)], ids=str)
@pytest.mark.parametrize("norm", [False, True])
def test_separable_convolution_of_a_concatenation(sizes, norm):
    class Joined(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.parts = nn.ModuleList([nn.Conv2d(4, size, 1) for size in sizes])
            self.conv = conv_norm_relu(8, 6, 3, 2, separable=True, depthwise_norm=norm)

        def forward(self, x):
            parts = [part(x) for part in self.parts]
            parts[0] = upsample(F.interpolate(parts[0], (9, 9)), (5, 6), False)
            return self.conv(torch.cat(parts, dim=1))

    fused = check(with_statistics(Joined()), x())
    assert (torch.cat in fused._steps.names.values()) == (len(sizes) != 2)


def test_names_and_attributes_of_a_fused_backbone():
    with torch.device("meta"):
        backbone = DeepLabV3("mobilenet_v2").backbone
    backbone.note = "kept"
    fused, report = fuse_with_report(backbone, ("out",))
    assert fused.note == "kept"
    assert list(report.fused)[:3] == ["features.0.0", "features.1.conv.0.0", "features.1.conv.1"]
    assert not report.kept and len(report.fused) == 51
    assert list(fused(torch.zeros(1, 3, 33, 33, device="meta"))) == ["out"]


def test_unused_outputs_are_not_computed():
    net = Net(lambda net, x: {"out": net.a(x), "aux": net.b(net.c(x)), "low": x})
    fused = fuse(net, ("out", "low"))
    assert [name for name, _ in fused.named_children()] == ["a"]
    image = x()
    assert list(fused(image)) == ["out", "low"] and fused(image)["low"] is image


def test_copies_and_pickles():
    image = x()
    fused = fuse(Net(residual_block))
    for other in (copy.deepcopy(fused), pickle.loads(pickle.dumps(fused))):
        assert torch.equal(other(image), fused(image))
        other.a.weight.zero_()
    assert fused.a.weight.abs().sum() > 0
    assert torch.equal(
        fused.to(torch.float64)(image.double()).float(), fused(image.double()).float()
    )


def test_a_replaced_layer_is_called():
    fused = fuse(Net(lambda net, x: net.b(net.a(x))))
    fused.a = nn.Identity()
    image = x()
    assert torch.equal(fused(image), fused.b(image))


@pytest.mark.parametrize("options", [{}, {"separable": True, "depthwise_norm": True}], ids=str)
@torch.no_grad()
def test_prepared_decoder(options):
    torch.manual_seed(0)
    model = with_statistics(DeepLabV3Plus("mobilenet_v2", 5, **options)).eval()
    prepared, images = model.prepare_for_inference(), torch.randn(1, 3, 49, 33)
    exact = copy.deepcopy(model).double()(images.double())["out"]
    assert_as_accurate_as(prepared(images)["out"], model(images)["out"], exact)
    assert not {nn.BatchNorm2d, nn.Conv2d} & {type(module) for module in prepared.modules()}
    assert upsample in prepared.classifier._steps.names.values()  # torch.compile needs its branches


def test_a_backbone_of_the_user():
    model = DeepLabV3("mobilenet_v2", 5).eval()
    model.backbone = Net(
        lambda net, x: OrderedDict(out=net.norm(net.a(torch.cat([x, x[:, :1]], 1))))
    )
    model.classifier = nn.Sequential(nn.Conv2d(4, 5, 1), nn.Softmax(1))
    model.in_channels, images = 3, torch.randn(1, 3, 9, 9)
    with torch.no_grad():
        assert_close(model.prepare_for_inference()(images)["out"], model.eval()(images)["out"])


# --- other projects

NETWORKS = {
    "torchvision": ["resnet18", "mobilenet_v3_small", "shufflenet_v2_x0_5"],
    "timm": ["test_efficientnet", "resnet10t", "mobilenetv3_small_050"],
}


@pytest.mark.parametrize("project, name", [(p, n) for p, names in NETWORKS.items() for n in names])
def test_networks_of_other_projects(project, name):
    torch.manual_seed(0)
    if project == "timm":
        timm = pytest.importorskip("timm", reason="fuses a network of timm")
        net = timm.create_model(name, pretrained=False, features_only=True)
    else:
        models = pytest.importorskip("torchvision.models", reason="fuses a network of torchvision")
        net = getattr(models, name)(weights=None)
    fused = check(with_statistics(net), torch.randn(1, 3, 64, 64))
    assert not any(isinstance(module, nn.BatchNorm2d) for module in fused.modules())


@pytest.mark.parametrize("tf_padding", [False, True])
def test_a_network_of_transformers(tf_padding):
    transformers = pytest.importorskip("transformers", reason="fuses a network of transformers")
    config = transformers.MobileNetV2Config(
        num_labels=3, depth_multiplier=0.35, output_stride=16, tf_padding=tf_padding
    )
    net = with_statistics(transformers.MobileNetV2ForSemanticSegmentation(config))
    for size in (33, 36):
        fused = check(net, torch.randn(1, 3, size, size + 1))
    assert not any(isinstance(module, nn.Conv2d) for module in fused.modules())


def test_same_padding_of_timm():
    timm = pytest.importorskip("timm", reason="fuses a convolution of timm")
    for k, stride, dilation in [(3, 2, 1), (5, 2, 1), (3, 3, 1), (2, 3, 1), (3, 2, 2), (1, 2, 1)]:
        conv = timm.layers.Conv2dSame(4, 8, k, stride, dilation=dilation)
        for size in (5, 6, 7):
            fused = check(with_statistics(nn.Sequential(conv, nn.BatchNorm2d(8))), x()[:, :, :size])
            assert not any(isinstance(module, nn.Conv2d) for module in fused.modules())


def test_static_padding_of_segmentation_models_pytorch():
    name = "segmentation_models_pytorch.encoders._efficientnet"
    module = pytest.importorskip(name, reason="fuses a convolution of smp")
    for k, stride in [(3, 1), (5, 1), (3, 2), (5, 2), (1, 1)]:
        conv = module.Conv2dStaticSamePadding(4, 8, k, stride, image_size=224)
        fused = check(with_statistics(nn.Sequential(conv, nn.BatchNorm2d(8))), x())
        assert not any(isinstance(module, nn.Conv2d) for module in fused.modules())
        assert (F.pad in fused._steps.names.values()) == (stride == 2)
