"""The training form of accelerate(): training steps equal those of the original model."""

from __future__ import annotations

import copy
import io
import pickle
import random
import tempfile

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import parametrizations
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

import deeplab_fast
from deeplab_fast.acceleration.module import Accelerated
from deeplab_fast.acceleration.training import replace_parts
from deeplab_fast.nn import ASPP

from ..support.cases import assert_as_accurate_as
from ..support.pyramids import DENSE, PYRAMIDS, assert_same_training, channels_of, run, trained

pytestmark = pytest.mark.usefixtures("one_thread")


def pair(name: str = "smp") -> tuple[nn.Module, nn.Module]:
    """An accelerated module, and a copy of the original."""
    torch.manual_seed(1)
    original = trained(PYRAMIDS[name][0]())
    return deeplab_fast.accelerate(copy.deepcopy(original)), original


def input_of(module: nn.Module, height: int = 9, width: int = 8, batch: int = 2) -> Tensor:
    return torch.randn(batch, channels_of(module), height, width, dtype=torch.float64)


def classes(module: nn.Module) -> dict[str, type]:
    return {name: type(submodule) for name, submodule in module.named_modules()}


# --- pyramids of all projects


@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("name", PYRAMIDS)
def test_a_step_is_the_same(name, train):
    accelerated, original = (module.train(train) for module in pair(name))
    for _ in range(2):
        assert_same_training(accelerated, original, input_of(original))


@pytest.mark.parametrize("name", PYRAMIDS)
def test_report_keys_and_restore(name):
    torch.manual_seed(1)
    module = PYRAMIDS[name][0]()
    before, keys = classes(module), list(module.state_dict())
    parameters = list(module.parameters())
    report = replace_parts(module)
    entry = report.entries[0]
    assert (entry.name, entry.kind, entry.replacement) == ("", "ASPP", PYRAMIDS[name][1])
    assert repr(module).startswith(f"Accelerated{before[''].__name__}(")
    assert isinstance(module, before[""])
    assert list(module.state_dict()) == keys
    assert all(p is q for p, q in zip(module.parameters(), parameters, strict=True))
    during = classes(module)
    assert module._graphs.are_valid(module)
    assert replace_parts(module) == report
    assert classes(module) == during
    assert deeplab_fast.restore(module) is module
    assert classes(module) == before
    assert not any(vars(m).keys() & {"_graphs"} for m in module.modules())


@pytest.mark.parametrize("name", ["torchvision", "smp separable", "mmsegmentation"])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_accuracy_in_float32(name, memory_format):
    accelerated, exact = (module.eval() for module in pair(name))
    accelerated, original = accelerated.float(), copy.deepcopy(exact).float()
    input = input_of(exact).float().contiguous(memory_format=memory_format)
    (actual, actual_grads), (peer, peer_grads) = run(accelerated, input), run(original, input)
    exact_output, exact_grads = run(exact, input.double())
    assert_as_accurate_as(actual, peer, exact_output)
    assert actual.is_contiguous(memory_format=memory_format)
    for key, gradient in actual_grads.items():
        assert_as_accurate_as(gradient, peer_grads[key], exact_grads[key])


@pytest.mark.parametrize("size", [(1, 1), (1, 5), (2, 3), (4, 2)], ids=str)
def test_3x3_projection_at_borders(size):
    accelerated, original = pair("mmsegmentation")
    assert_same_training(accelerated, original, input_of(original, *size))


def test_the_pooled_branch_is_not_upsampled(monkeypatch):
    interpolate, calls = F.interpolate, []

    def counted(*args, **kwargs):
        calls.append(args)
        return interpolate(*args, **kwargs)

    accelerated, original = (module.eval() for module in pair())
    monkeypatch.setattr(F, "interpolate", counted)
    accelerated(input_of(original))
    assert calls == []
    original(input_of(original))
    assert len(calls) == 1


def test_dense_branches_run_as_one_op(ran):
    for name, (_, parts) in PYRAMIDS.items():
        accelerated, original = pair(name)
        ran.clear()
        run(accelerated, input_of(original))
        ops = ["parallel_dilated_conv2d_and_mean", "parallel_dilated_conv2d_backward"]
        assert [op for op, _ in ran] == (ops if parts == DENSE else []), name


def test_autocast():
    accelerated, original = (module.float().eval() for module in pair())
    input = input_of(original).float()
    with torch.autocast("cpu", torch.bfloat16):
        actual, peer = accelerated(input), original(input)
    exact = original.double()(input.double())
    assert_as_accurate_as(actual, peer, exact)


# --- what is done to models during training


class Dropping(nn.Sequential):
    """A sequence whose code depends on its mode."""

    def forward(self, x):
        return F.dropout(super().forward(x), 0.5, self.training)


def pair_with_functional_dropout() -> tuple[nn.Module, nn.Module]:
    modules = pair()
    for module in modules:
        deeplab_fast.restore(module).project.__class__ = Dropping
    assert isinstance(deeplab_fast.accelerate(modules[0]), Accelerated)
    return modules


def test_functional_dropout_follows_the_mode():
    accelerated, original = pair_with_functional_dropout()
    for train in (True, False, True):
        assert_same_training(accelerated.train(train), original.train(train), input_of(original))


def test_a_submodule_in_another_mode_than_the_module():
    modules = accelerated, original = pair_with_functional_dropout()
    for module in modules:
        module.project.eval()
    assert_same_training(accelerated, original, input_of(original))


@pytest.mark.parametrize(
    "hooked", ["", "convs.1", "convs.0.0", "convs.0.1", "convs.4.0", "project.0"]
)
@pytest.mark.parametrize("when", ["before", "after"])
def test_hooks_are_called(hooked, when):
    accelerated, original = pair()
    if when == "before":
        deeplab_fast.restore(accelerated)
    calls = []
    handle = accelerated.get_submodule(hooked).register_forward_hook(lambda *a: calls.append(a))
    if when == "before":
        report = replace_parts(accelerated)
        assert "it has hooks" in {entry.reason for entry in report.entries}
    assert_same_training(accelerated, original, input_of(original))
    assert len(calls) == 1
    handle.remove()
    assert_same_training(accelerated, original, input_of(original))
    assert len(calls) == 1


def test_backward_and_global_hooks_are_called():
    accelerated, original = pair()
    calls = []
    handle = accelerated.convs[1][0].register_full_backward_hook(lambda *a: calls.append(a))
    assert_same_training(accelerated, original, input_of(original))
    assert len(calls) == 1
    handle.remove()
    handle = nn.modules.module.register_module_forward_hook(lambda m, *a: calls.append(m))
    try:
        accelerated(input_of(original))
    finally:
        handle.remove()
    assert accelerated.convs[1][0] in calls


CHANGES = {
    "another convolution": lambda m: m.convs[1].__setitem__(0, nn.Conv2d(8, 4, 1).double()),
    "a bias": lambda m: setattr(m.convs[1][0], "bias", nn.Parameter(torch.ones(4).double())),
    "another dilation": lambda m: (
        setattr(m.convs[1][0], "dilation", (3, 3)),
        setattr(m.convs[1][0], "padding", (3, 3)),
    ),
    "padding by reflection": lambda m: setattr(m.convs[1][0], "padding_mode", "circular"),
    "another branch": lambda m: m.convs[1].append(nn.Tanh()),
    "another activation": lambda m: m.convs[1].__setitem__(2, nn.Tanh()),
    "another pooling": lambda m: m.convs[4].__setitem__(0, nn.AdaptiveMaxPool2d(1)),
    "another projection": lambda m: m.project.__setitem__(
        0, nn.Conv2d(20, 4, 1, groups=4).double()
    ),
    "another convolution of the pooled pixel": lambda m: m.convs[4].__setitem__(
        1, nn.Conv2d(8, 4, 1, padding=1, bias=False).double()
    ),
    "no dropout": lambda m: m.project.__setitem__(3, nn.Identity()),
    "group norm": lambda m: m.convs[1].__setitem__(1, nn.GroupNorm(2, 4).double()),
    "group norm in the pooled branch": lambda m: m.convs[4].__setitem__(
        2, nn.GroupNorm(2, 4).double()
    ),
    "cumulative statistics": lambda m: setattr(m.convs[1][1], "momentum", None),
    "a frozen norm": lambda m: m.convs[1][1].eval(),
    "a branch in evaluation mode": lambda m: m.convs[4].eval(),
    "frozen weights": lambda m: m.convs[1].requires_grad_(False),
    "tied weights": lambda m: setattr(m.convs[1][0], "weight", m.convs[2][0].weight),
    "spectral norm": lambda m: parametrizations.spectral_norm(m.convs[1][0]),
    "weight norm": lambda m: parametrizations.weight_norm(m.project[0]),
}


def test_changes_of_functions_and_dicts_after_acceleration():
    class Adjustable(Net):
        def __init__(self) -> None:
            super().__init__(None)
            self.activate, self.options = torch.relu, {"factors": [1.0, 2.0], "other": object()}

        def forward(self, x):
            x = self.activate(x) * self.options["factors"][1]
            return self.project(
                torch.cat([conv(x) for conv in (self.wide, self.wider, self.narrow, self.pool)], 1)
            )

    accelerated, original = deeplab_fast.accelerate(Adjustable()), Adjustable()
    original.load_state_dict(accelerated.state_dict())
    for module in (accelerated, copy.deepcopy(accelerated)):
        assert module._graphs.are_valid(module)
    for module in (accelerated, original):
        module.options["factors"][1] = 3.0
    assert_same_training(accelerated, original, input_of(original))
    deeplab_fast.accelerate(accelerated)
    for module in (accelerated, original):
        module.activate = torch.tanh
    assert_same_training(accelerated, original, input_of(original))


@pytest.mark.parametrize("name", CHANGES)
@pytest.mark.parametrize("again", [False, True], ids=["kept", "accelerated again"])
def test_changes_after_acceleration(name, again):
    accelerated, original = pair()
    for module in (accelerated, original):
        torch.manual_seed(5)
        CHANGES[name](module)
    if again:
        deeplab_fast.accelerate(accelerated)
    assert_same_training(accelerated, original, input_of(original))


def test_sync_batch_norm_before_and_after_acceleration(ran):
    for first, second in (
        (nn.SyncBatchNorm.convert_sync_batchnorm, deeplab_fast.accelerate),
        (deeplab_fast.accelerate, nn.SyncBatchNorm.convert_sync_batchnorm),
    ):
        _, original = pair()
        accelerated = second(first(copy.deepcopy(original))).eval()
        assert isinstance(accelerated.convs[0][1], nn.SyncBatchNorm)
        ran.clear()
        assert_same_training(accelerated, original.eval(), input_of(original))
        assert [op for op, _ in ran][0] == "parallel_dilated_conv2d_and_mean"


def test_a_batch_of_one_raises_pytorchs_error():
    for module in pair():
        with pytest.raises(ValueError, match="Expected more than 1 value per channel"):
            module(input_of(module, batch=1))


def test_copies():
    accelerated, original = pair()
    buffer = io.BytesIO()
    torch.save(accelerated, buffer)
    buffer.seek(0)
    copies = [
        copy.deepcopy(accelerated),
        pickle.loads(pickle.dumps(accelerated)),
        torch.load(buffer, weights_only=False),
    ]
    for other in copies:
        assert type(other) is type(accelerated)
        assert_same_training(other, copy.deepcopy(original), input_of(original))
        assert other.project[0].weight is not accelerated.project[0].weight
        assert type(deeplab_fast.restore(other)) is type(original)
    fresh = pair()[0]
    fresh.load_state_dict(original.state_dict())
    assert_same_training(fresh, original, input_of(original))


def test_distributed_data_parallel():
    with tempfile.NamedTemporaryFile() as file:
        dist.init_process_group("gloo", init_method=f"file://{file.name}", rank=0, world_size=1)
        try:
            accelerated, original = pair()
            parallel = DistributedDataParallel(accelerated)
            input = input_of(original)
            output, gradients = run(parallel, input)
        finally:
            dist.destroy_process_group()
    expected, expected_gradients = run(original, input)
    assert_close(output, expected)
    assert_close(list(gradients.values()), list(expected_gradients.values()))


@pytest.mark.parametrize("name", ["smp", pytest.param("mmsegmentation", marks=pytest.mark.slow)])
def test_compiles_to_one_graph(name):
    accelerated, original = pair(name)
    compiled = torch.compile(accelerated, fullgraph=True, backend="aot_eager")
    input = input_of(original)
    actual, expected = run(compiled, input), run(original, input)
    assert_close(actual[0], expected[0])
    assert_close(list(actual[1].values()), list(expected[1].values()))
    assert_close(dict(accelerated.named_buffers()), dict(original.named_buffers()))


def test_checkpointing_and_functional_calls():
    accelerated, original = pair()

    def checkpointed(module):
        return Wrapped(module, lambda m, x: checkpoint(m, x, use_reentrant=False))

    assert_same_training(checkpointed(accelerated), checkpointed(original), input_of(original))
    parameters = {name: 2 * p.detach() for name, p in original.named_parameters()}
    input = input_of(original)
    outputs = [
        torch.func.functional_call(module.eval(), parameters, (input,))
        for module in (accelerated, original)
    ]
    assert_close(*outputs)


class Wrapped(nn.Module):
    def __init__(self, module, call) -> None:
        super().__init__()
        self.module, self.call = module, call

    def forward(self, x):
        return self.call(self.module, x)


@pytest.mark.parametrize("name", ["torchvision", "smp separable"])
def test_other_compilers_see_the_original_code(name):
    accelerated, original = (nn.Sequential(module.eval()) for module in pair(name))
    input = input_of(original)
    assert_close(torch.fx.symbolic_trace(accelerated)(input), original(input))
    assert_close(torch.jit.script(accelerated)(input), original(input))
    assert_close(accelerated(input), original(input))
    assert_close(torch.fx.symbolic_trace(accelerated[0])(input), original(input))


def test_torch_fx_passes_values_by_name():
    class ByName(nn.Sequential):
        def forward(self, x):
            return self[0](x=x)

    accelerated, original = (ByName(module.eval()) for module in pair("torchvision"))
    input = input_of(original)
    assert_close(torch.fx.symbolic_trace(accelerated)(input), original(input))


def test_double_backward():
    """Pyramids without two dense branches keep it; the errors of the others say what to do."""

    def gradient_penalty(module, input):
        (gradient,) = torch.autograd.grad(module(input).square().sum(), input, create_graph=True)
        return torch.autograd.grad(gradient.square().sum(), input)[0]

    accelerated, original = (module.eval() for module in pair("smp separable"))
    input = input_of(original).requires_grad_()
    assert_close(gradient_penalty(accelerated, input), gradient_penalty(original, input))
    with pytest.raises(NotImplementedError, match="double backward"):
        gradient_penalty(pair("smp")[0].eval(), input)


# --- what is found, and what is not


class Net(nn.Module):
    """A pyramid whose ``forward`` is given."""

    def __init__(self, forward) -> None:
        super().__init__()
        self.run = forward
        self.narrow = branch(1, 1)
        self.wide, self.wider = branch(3, 2), branch(3, 4)
        self.pool, self.four_pixels = branch(1, 1), nn.AdaptiveAvgPool2d(2)
        self.project, self.narrow_project = nn.Conv2d(16, 4, 1), nn.Conv2d(12, 4, 1)
        trained(self)

    def forward(self, x):
        return self.run(self, x)


def branch(kernel: int, dilation: int) -> nn.Sequential:
    padding = dilation * (kernel // 2)
    conv = nn.Conv2d(8, 4, kernel, padding=padding, dilation=dilation, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(4), nn.ReLU())


def pooled(net, x):
    return net.pool(F.adaptive_avg_pool2d(x, 1)).expand(-1, -1, x.size(2), x.size(3))


def pool_after_a_branch(net, x):
    wide = net.wide(x)
    return net.project(torch.cat([pooled(net, x), wide, net.wider(x), net.narrow(x)], 1))


def in_the_middle(net, x):
    return net.project(torch.cat([net.narrow(x), pooled(net, x), net.wide(x), net.wider(x)], 1))


def by_mean(net, x):
    mean = net.pool(x.mean((2, 3), keepdim=True))
    mean = F.interpolate(mean, x.shape[2:])
    return net.project(torch.cat((net.wide(x), net.wider(x), net.narrow(x), mean), dim=1))


def without_pool(net, x):
    return net.narrow_project(torch.concat([net.narrow(x), net.wide(x), net.wider(x)], 1))


def with_other_branches(net, x):
    y = net.narrow(x) * 2
    return net.project(torch.cat([y, net.wide(x), net.wider(x), y.sigmoid()], 1))


def with_size_of_a_branch(net, x):
    wide = net.wide(x)
    pool = F.interpolate(net.pool(F.adaptive_avg_pool2d(x, (1, 1))), wide.size()[2:])
    return net.project(torch.cat([wide, pool, net.wider(x), net.narrow(x)], 1)).tanh()


def shared_norm(net, x):
    return net.narrow_project(
        torch.cat([net.wide(x), net.wide[1](net.wider[0](x)).relu(), net.narrow(x)], 1)
    )


def of_an_intermediate_map(net, x):
    x = x.relu()
    return by_mean(net, x) + x.sum(1, keepdim=True)


@pytest.mark.parametrize(
    "forward, parts",
    [
        (pool_after_a_branch, "3 branches as one convolution, pooled branch as a bias"),
        (in_the_middle, "2 branches as one convolution, pooled branch as a bias"),
        (by_mean, "3 branches as one convolution, pooled branch as a bias"),
        (without_pool, "3 branches as one convolution"),
        (with_other_branches, "2 branches as one convolution"),
        (with_size_of_a_branch, "2 branches as one convolution, pooled branch as a bias"),
        (shared_norm, "3 branches as one convolution"),
        (of_an_intermediate_map, "3 branches as one convolution, pooled branch as a bias"),
    ],
)
def test_other_pyramids(forward, parts, ran):
    accelerated, original = Net(forward), None
    original = copy.deepcopy(accelerated)
    assert replace_parts(accelerated).entries[0].replacement == parts
    for train in (True, False):
        accelerated.train(train)
        assert_same_training(accelerated, original.train(train), input_of(original))
    assert [op for op, _ in ran].count("parallel_dilated_conv2d_and_mean") == 2


def other_input(net, x):
    return net.project(torch.cat([net.narrow(x), pooled(net, x), net.wide(x + 1), net.wider(x)], 1))


def two_inputs(net, x):
    return net.narrow_project(torch.cat([net.wide(x), net.wider(x.relu()), net.narrow(x)], 1))


def changed_in_place(net, x):
    narrow, x = net.narrow(x), x * 1
    wide = net.wide(x)
    x.relu_()
    return net.project(torch.cat([narrow, wide, net.wider(x), wide], 1))


def changed_between(net, x):
    x = x * 1
    wide, wider = net.wide(x), net.wider(x)
    torch.relu_(x)
    return net.narrow_project(torch.cat([wide, wider, net.narrow(x)], 1))


def twice(net, x):
    y = net.wide(x)
    return net.project(torch.cat([y, net.wider(x), y, net.narrow(x)], 1))


def no_projection(net, x):
    return torch.cat([net.wide(x), net.wider(x), net.narrow(x)], 1)


def shared(net, x):
    y = torch.cat([net.wide(x), net.wider(x), net.narrow(x)], 1)
    return net.narrow_project(y) + y.sum(1, keepdim=True)


def size_needed_elsewhere(net, x):
    wide = net.wide(x)
    y = net.narrow_project(torch.cat([wide, net.wider(x), net.narrow(x)], 1))
    return y * wide.size(1)


def other_dim(net, x):
    return torch.cat([net.wide(x), net.wider(x)], 2)


def larger_pool(net, x):
    pool = F.interpolate(net.pool(net.four_pixels(x)), x.shape[2:])
    return net.narrow_project(torch.cat([net.wide(x), net.narrow(x), pool], 1))


@pytest.mark.parametrize(
    "forward, reason",
    [
        (changed_between, "its input is changed in place"),
        (no_projection, "no projection by a convolution"),
        (shared, "no projection by a convolution"),
        (size_needed_elsewhere, "the size of a branch is needed elsewhere"),
        (other_dim, None),
    ],
)
def test_near_misses_are_named_and_stay(forward, reason):
    accelerated = Net(forward)
    original = copy.deepcopy(accelerated)
    entries = replace_parts(accelerated).entries
    assert type(accelerated) is Net
    kept = [entry.reason for entry in entries if entry.kind == "concatenation of convolutions"]
    assert kept == ([] if reason is None else [reason])
    assert_same_outputs(accelerated, original)


def assert_same_outputs(*modules: nn.Module) -> None:
    """Compare in evaluation mode. The code may overwrite what autograd needs."""
    input = input_of(modules[0])
    assert_close(*(module.eval()(input) for module in modules), rtol=1e-9, atol=1e-10)


class Reversed(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * 1

    @staticmethod
    def backward(ctx, grad):
        return -grad


def reversed_gradient(net, x):
    return Reversed.apply(net.before(x))


def without_gradient(net, x):
    with torch.no_grad():
        return net.before(x)


def checkpointed(net, x):
    return checkpoint(net.before, x, use_reentrant=False)


def at_random(net, x):
    return net.before(x) if torch.rand(()) < 0.5 else x


def scaled_at_random(net, x):
    random.seed(torch.initial_seed())
    return net.before(x) * random.random()


@pytest.mark.parametrize(
    "prepare", [reversed_gradient, without_gradient, checkpointed, at_random, scaled_at_random]
)
def test_code_that_a_graph_does_not_contain_stays(prepare):
    class Prepared(Net):
        def __init__(self) -> None:
            super().__init__(None)
            self.before = nn.Conv2d(8, 8, 1).double()

        def forward(self, x):
            x = prepare(self, x)
            return self.project(
                torch.cat([conv(x) for conv in (self.wide, self.wider, self.narrow, self.pool)], 1)
            )

    original = Prepared()
    accelerated = deeplab_fast.accelerate(copy.deepcopy(original))
    assert type(accelerated) is Prepared
    assert_same_training(accelerated, original, input_of(original))


def test_code_that_cannot_be_traced_is_named():
    class Resizing(Net):
        def forward(self, x):
            size = [int(n) for n in x.shape[2:]]
            pool = F.interpolate(self.pool(F.adaptive_avg_pool2d(x, 1)), size)
            return self.project(torch.cat([self.wide(x), self.wider(x), self.narrow(x), pool], 1))

    module = Resizing(None)
    original = copy.deepcopy(module)
    entry = replace_parts(module).entries[0]
    assert entry.reason == "torch.fx cannot trace its code"
    assert type(module) is Resizing
    assert_same_training(module, original, input_of(original))


@pytest.mark.parametrize("forward", [other_input, two_inputs, changed_in_place, larger_pool])
def test_branches_of_other_inputs_stay(forward):
    accelerated = Net(forward)
    original = copy.deepcopy(accelerated)
    replace_parts(accelerated)
    assert_same_outputs(accelerated, original)


def not_atrous(net, x):
    return net.narrow_project(torch.cat([net.narrow(x), net.pool(x), net.pool(x + 1)], 1))


@pytest.mark.parametrize("forward", [twice, not_atrous])
def test_other_concatenations_stay(forward):
    module = Net(forward)
    original = copy.deepcopy(module)
    replace_parts(module)
    assert type(module) is Net
    assert_same_training(module, original, input_of(original))


def test_pyramid_within_a_model_that_cannot_be_traced():
    class Untraceable(nn.Module):
        def __init__(self, aspp) -> None:
            super().__init__()
            self.aspp = aspp

        def forward(self, x):
            return self.aspp(x) if x.sum() > 0 else x

    model = Untraceable(PYRAMIDS["smp"][0]())
    (entry, *_) = replace_parts(model).entries
    assert entry.name == "aspp" and type(model) is Untraceable


def test_our_models_use_the_kernels_already(caplog):
    model = ASPP(8, (2, 4), 4)
    assert classes(deeplab_fast.accelerate(model))[""] is ASPP
    assert "nothing to replace" in caplog.text
    (entry,) = replace_parts(model).entries
    assert entry.reason == "these modules use our kernels already"


def test_real_models():
    models = pytest.importorskip("torchvision.models.segmentation")
    model = models.deeplabv3_mobilenet_v3_large(weights=None, weights_backbone=None)
    before = classes(model)
    entries = replace_parts(model).entries
    assert [(entry.name, entry.kind) for entry in entries] == [
        ("classifier.0", "ASPP"),
        ("backbone.*", "depthwise convolution (12)"),
        ("backbone.*", "dilated depthwise convolution (3)"),
    ]
    changed = {name for name, kind in classes(model).items() if kind is not before[name]}
    assert changed == {"classifier.0"} | {f"backbone.{i}.block.1.0" for i in (13, 14, 15)}
    deeplab_fast.restore(model)
    assert classes(model) == before


def test_a_step_of_a_whole_model():
    smp = pytest.importorskip("segmentation_models_pytorch")
    torch.manual_seed(0)
    original = trained(smp.DeepLabV3Plus("resnet18", encoder_weights=None, classes=3))
    accelerated = deeplab_fast.accelerate(copy.deepcopy(original))
    changed = sum(isinstance(module, Accelerated) for module in accelerated.modules())
    aspp = accelerated.decoder.aspp[0]
    assert aspp._graphs.are_valid(aspp)
    assert changed == 1 + 5 + 3  # the ASPP, the last stage of the encoder, atrous depthwise ones
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    assert_same_training(accelerated, original, images)


# --- lone convolutions


class Special(nn.Conv2d):
    pass


@pytest.mark.parametrize(
    "conv, reason",
    [
        (nn.Conv2d(4, 4, 3, padding=2, dilation=2), ""),
        (nn.Conv2d(4, 4, 3, padding=(2, 3), dilation=(2, 3), groups=4), ""),
        (nn.Conv2d(4, 4, 3, padding=0, dilation=2, groups=4), ""),
        (nn.Conv2d(4, 4, 3, padding=1, groups=4), "not dilated, so PyTorch's is as fast"),
        (nn.Conv2d(4, 4, 3, 2, 2, 2), "stride (2, 2), padding (2, 2) with zeros"),
        (
            nn.Conv2d(4, 4, 3, padding=2, dilation=2, padding_mode="reflect"),
            "stride (1, 1), padding (2, 2) with reflect",
        ),
        (nn.Conv2d(4, 4, 3, padding="same", dilation=2), "stride (1, 1), padding same with zeros"),
        (Special(4, 4, 3, dilation=2), "not a plain nn.Conv2d but Special"),
        (nn.Conv2d(4, 4, 3, padding=1), None),
    ],
    ids=str,
)
def test_which_convolutions_are_replaced(conv, reason):
    model = nn.Sequential(copy.deepcopy(conv))
    entries = replace_parts(model).entries
    assert [entry.reason for entry in entries] == ([] if reason is None else [reason])
    assert isinstance(model[0], Accelerated) == (reason == "")
    assert isinstance(model[0], type(conv))
    input = torch.randn(1, 4, 9, 9)
    assert torch.equal(model(input), conv(input))
    assert type(deeplab_fast.restore(model)[0]) is type(conv)


def test_convolutions_run_our_op_where_pytorchs_is_wrong_or_slow(ran):
    depthwise = nn.Conv2d(8, 8, 3, padding=2, dilation=2, groups=8)
    model = deeplab_fast.accelerate(nn.Sequential(depthwise))
    assert repr(model[0]).startswith("AcceleratedConv2d(8, 8, kernel_size=(3, 3)")
    model(torch.randn(1, 8, 9, 9))
    assert not ran
    with torch.autocast("cpu", torch.bfloat16):
        model(torch.randn(1, 8, 9, 9)).sum().backward()
    assert [op for op, _ in ran] == ["dilated_conv2d", "dilated_conv2d_backward"]
    with FakeTensorMode(), torch.device("cuda:0"):
        conv = nn.Sequential(nn.Conv2d(8, 8, 3, padding=2, dilation=2, groups=8))
        assert on_our_op(deeplab_fast.accelerate(conv)) and not on_our_op(
            deeplab_fast.restore(conv)
        )


def on_our_op(model: nn.Module) -> bool:
    from torch.utils._python_dispatch import TorchDispatchMode

    class Names(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            names.append(function._schema.name)
            return function(*args, **(kwargs or {}))

    names: list[str] = []
    with Names():
        model(torch.randn(2, 8, 9, 9))
    return "deeplab_fast::dilated_conv2d" in names


def test_alike_convolutions_share_an_entry():
    convs = [nn.Conv2d(4, 4, 3, padding=2, dilation=2) for _ in range(3)]
    (entry,) = replace_parts(nn.ModuleDict({"stage": nn.Sequential(*convs)})).entries
    assert (entry.name, entry.kind) == ("stage.*", "dilated convolution (3)")
