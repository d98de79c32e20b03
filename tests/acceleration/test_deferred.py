"""deferred_upsampling: its tensors equal those of F.interpolate, which only runs later."""

from __future__ import annotations

import copy
import gc
import io
import itertools
import threading
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from deeplab_fast import UpsampleCrossEntropyLoss, deferred_upsampling
from deeplab_fast.nn.deferred import DeferredUpsampling

SHAPE = (2, 5, 4, 6)


def upsample(input: Tensor, **arguments: Any) -> Tensor:
    return F.interpolate(input, **(arguments or {"scale_factor": 4}), mode="bilinear")


def deferred(input: Tensor, **arguments: Any) -> DeferredUpsampling:
    with deferred_upsampling():
        output = upsample(input, **arguments)
    assert isinstance(output, DeferredUpsampling)
    assert output.is_pending
    return output


def has_run(output: Tensor) -> bool:
    return "_result" in vars(output)


class Double(torch.autograd.Function):
    """Doubles its input; the gradient depends on a saved tensor."""

    @staticmethod
    def forward(ctx, input):
        ctx.save_for_backward(input)
        return input * 2

    @staticmethod
    def backward(ctx, grad):
        (input,) = ctx.saved_tensors
        return grad * input


class TripleInPlace(torch.autograd.Function):
    @staticmethod
    def forward(ctx, input):
        ctx.mark_dirty(input)
        return input.mul_(3)

    @staticmethod
    def backward(ctx, grad):
        return 3 * grad


class Unchanged(torch.autograd.Function):
    """Returns its input; the gradient is another one."""

    @staticmethod
    def forward(ctx, input):
        return input

    @staticmethod
    def backward(ctx, grad):
        return 5 * grad


# Uses of the output y of an upsampling of x. A returned tensor is part of what is compared.


def in_place(y, x):
    y.mul_(2)
    y[0].zero_()
    y[:, :, 1:3] = 7
    y += 1
    return y + 0


def in_place_on_a_view(y, x):
    view = y.view(2, 5, -1) if y.is_contiguous() else y.permute(0, 2, 3, 1)
    view.mul_(y.detach().clone().view_as(view) if y.is_contiguous() else 3)
    return y + 0, view + 0


def in_place_without_gradient(y, x):
    with torch.no_grad():
        y[0].zero_()
        torch.add(y, 1, out=y)
    return y * y


def masked_assignment(y, x):
    y[y > 0.5] = 2.0
    return y * y


def new_shape(y, x):
    y.transpose_(1, 2)
    y.unsqueeze_(0)
    return y.shape, y.stride(), y * torch.arange(24.0)


def other_memory(y, x):
    y.data = torch.ones(3, 4) + y.data[0, 0, :3, :4]
    return y.shape, y + 0


def written_through_data(y, x):
    y.data.mul_(2)
    return y * y


def written_through_numpy(y, x):
    y.detach().numpy()[:] = 3
    return y * y


def hooked(y, x):
    gradients = []
    y.register_hook(lambda gradient: gradients.append(gradient) or 2 * gradient)
    (y * y).sum().backward()
    return gradients


def retained(y, x):
    y.retain_grad()
    (y * y).sum().backward()
    return y.grad


def made_a_leaf(y, x):
    y = y.detach_().requires_grad_()
    (y * y).sum().backward()
    return y.grad


def backward_twice(y, x):
    loss = y.exp().sum()
    loss.backward(retain_graph=True)
    loss.backward()
    return loss


def double_backward(y, x):
    (gradient,) = torch.autograd.grad((y**3).sum(), x, create_graph=True)
    return gradient * gradient


def gradient_of_the_output(y, x):
    return torch.autograd.grad((y * y).sum(), y)


def saved(y, x):
    file = io.BytesIO()
    torch.save(y, file)
    file.seek(0)
    loaded = torch.load(file)
    return type(loaded) is Tensor, loaded


def used_in_inference_mode(y, x):
    with torch.inference_mode():
        labels = y.argmax(1)
    return labels.clone(), y * y


def checkpointed(y, x):
    return checkpoint(lambda tensor: tensor.exp() * tensor, y, use_reentrant=False)


def layers(y, x):
    return F.conv2d(torch.cat([y, y * y], 1).relu_(), torch.ones(3, 10, 3, 3), padding=1)


def words(y, x):
    text = repr(y)
    return type(y + 0).__name__, text[: text.find("grad_fn")]


USES: dict[str, Callable[[Tensor, Tensor], Any]] = {
    use.__name__: use
    for use in (
        *(in_place, in_place_on_a_view, in_place_without_gradient, masked_assignment, new_shape),
        *(other_memory, written_through_data, written_through_numpy, hooked, retained),
        *(made_a_leaf, backward_twice, double_backward, gradient_of_the_output, saved),
        *(used_in_inference_mode, checkpointed, layers, words),
    )
}
USES |= {
    "custom function": lambda y, x: Double.apply(y),
    "custom function in place": lambda y, x: (TripleInPlace.apply(y) ** 2, y + 0),
    "custom function that returns its input": lambda y, x: Unchanged.apply(y) ** 2,
    "numpy": lambda y, x: y.numpy(),
    "np.asarray": lambda y, x: np.asarray(y),
    "dlpack": lambda y, x: torch.from_dlpack(y).clone(),
    "tolist": lambda y, x: y.tolist(),
    "deepcopy": lambda y, x: copy.deepcopy(y),
    "copy": lambda y, x: copy.copy(y) + 0,
    "to": lambda y, x: (y.to(torch.float64), y.cpu() + 0, y.half(), y.type(torch.int32)),
    "storage": lambda y, x: (y.untyped_storage().nbytes(), y.data_ptr() > 0, y.is_shared()),
    "metadata": lambda y, x: (
        *(y.shape, y.dtype, y.device, y.layout, y.stride(), y.is_leaf, y.requires_grad),
        *(y.is_contiguous(), y.is_contiguous(memory_format=torch.channels_last), y.nbytes),
    ),
    "indexing": lambda y, x: (y[0, 1, 2, 3].item(), y[:, ::2] + 0, y[y > 0], len(y)),
    "iteration": lambda y, x: [image + 0 for image in y],
    "views": lambda y, x: (y.unbind(0)[1] * 2, y.split(2, 1)[1] * 2, y.flatten(2) * 2),
    "a shape that does not fit": lambda y, x: y.view(3, -1),
    "detach": lambda y, x: (y.detach() + 0, y * y),
    "cross entropy": lambda y, x: F.cross_entropy(y, torch.arange(768).view(2, 16, 24) % 5),
    "upsampled again": lambda y, x: upsample(y, size=(17, 9)).exp(),
    "share_memory_": lambda y, x: y.share_memory_().is_shared(),
}


def outcome(use: Any, input: Tensor, defer: bool) -> tuple[Any, Tensor | None]:
    """The result of a use, or its error; and the gradient of the input."""
    x = input.detach().clone().requires_grad_(input.requires_grad)
    try:
        y = deferred(x * 1) if defer else upsample(x * 1)
        result = use(y, x)
        tensors = [t for t in (result if isinstance(result, tuple) else (result,)) if is_graph(t)]
        if tensors and tensors[0].is_floating_point():
            sum((t.sum() for t in tensors), torch.zeros(())).backward()
    except Exception as error:
        return f"{type(error).__name__}: {str(error)[:60]}", None
    return result, x.grad


def is_graph(value: Any) -> bool:
    return isinstance(value, Tensor) and value.grad_fn is not None


def assert_same(actual: Any, expected: Any) -> None:
    if isinstance(expected, Tensor):
        assert isinstance(actual, Tensor)
        assert torch.equal(actual, expected)
        assert (actual.dtype, actual.stride()) == (expected.dtype, expected.stride())
        assert actual.requires_grad == expected.requires_grad
    elif isinstance(expected, np.ndarray):
        assert np.array_equal(actual, expected)
    elif isinstance(expected, (tuple, list)):
        assert len(actual) == len(expected)
        for pair in zip(actual, expected):
            assert_same(*pair)
    else:
        assert actual == expected


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("use", USES.values(), ids=USES)
def test_every_use_gives_what_it_gives_without_the_context(use):
    for requires_grad, memory_format in itertools.product(
        (True, False), (torch.contiguous_format, torch.channels_last)
    ):
        input = torch.randn(SHAPE).contiguous(memory_format=memory_format)
        input.requires_grad_(requires_grad)
        expected, gradient = outcome(use, input, defer=False)
        actual, actual_gradient = outcome(use, input, defer=True)
        assert_same(actual, expected)
        assert_same(actual_gradient, gradient)


INPUTS: dict[str, Any] = {
    "float32": torch.randn(SHAPE),
    "float64": torch.randn(SHAPE, dtype=torch.float64),
    "float16": torch.randn(SHAPE).half(),
    "bfloat16": torch.randn(SHAPE).bfloat16(),
    "int32": torch.ones(SHAPE, dtype=torch.int32),
    "uint8": torch.ones(SHAPE, dtype=torch.uint8),
    "channels_last": torch.randn(SHAPE).contiguous(memory_format=torch.channels_last),
    "one channel": torch.randn(2, 1, 4, 6),
    "one channel of channels_last": torch.randn(2, 4, 6, 1).permute(0, 3, 1, 2),
    "sliced": torch.randn(SHAPE)[:, :, ::2, 1::2],
    "sliced channels_last": torch.randn(2, 4, 6, 5).permute(0, 3, 1, 2)[:, :, 1:, 1:],
    "expanded": torch.randn(1, 5, 4, 6).expand(SHAPE),
    "transposed": torch.randn(SHAPE).transpose(2, 3),
    "one pixel": torch.randn(1, 1, 1, 1),
    "no image": torch.randn(0, 5, 4, 6),
    "no channel": torch.randn(2, 0, 4, 6),
    "no row": torch.randn(2, 5, 0, 6),
    "three dimensions": torch.randn(5, 4, 6),
    "five dimensions": torch.randn(2, 5, 4, 6, 3),
    "no tensor": "text",
}
ARGUMENTS: list[dict[str, Any]] = [
    *({"size": size} for size in (7, (7, 9), [7, 9], torch.Size([7, 9]), (7,), 0, -1, 7.5)),
    {"size": (torch.tensor(7), torch.tensor(9))},
    {"size": torch.tensor(7)},
    {"size": (7, 9), "scale_factor": 2},
    {"size": (7, 9), "recompute_scale_factor": True},
    {"size": (7, 9), "antialias": True},
    *({"scale_factor": factor} for factor in (2, 2.5, (2, 1.3), [2.0, 1.3], (2,), 0, -1, 0.1)),
    {"scale_factor": torch.tensor(2.0)},
    {"scale_factor": 1.7, "recompute_scale_factor": True},
    {"scale_factor": 1.7, "recompute_scale_factor": False},
    {},
]
MODES: list[dict[str, Any]] = [
    {"mode": "bilinear"},
    {"mode": "bilinear", "align_corners": True},
    {"mode": "bilinear", "align_corners": False},
    {"mode": "bicubic"},
    {"mode": "nearest", "align_corners": True},
    {"mode": "trilinear"},
    {"mode": "unknown"},
    {"mode": "bilinear", "unknown": 1},
    {},
]


def interpolated(input: Any, arguments: dict[str, Any]) -> tuple[Any, ...]:
    """Strides, values and gradient of an interpolation, or its error."""
    try:
        if isinstance(input, Tensor) and input.is_floating_point():
            input = input.detach().requires_grad_()
        output = F.interpolate(input, **arguments)
        values = output + 0
        if not values.requires_grad:
            return output.stride(), values, None
        return output.stride(), values, torch.autograd.grad(values.sum(), input)[0]
    except Exception as error:
        return type(error), str(error)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", INPUTS)
def test_arguments_and_errors_are_those_of_pytorch(name):
    input = INPUTS[name]
    for arguments, mode in itertools.product(ARGUMENTS, MODES):
        expected = interpolated(input, arguments | mode)
        with deferred_upsampling():
            actual = interpolated(input, arguments | mode)
        assert_same(actual, expected)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "module",
    [
        nn.Upsample(scale_factor=4, mode="bilinear"),
        nn.Upsample(size=(7, 9), mode="bilinear", align_corners=True),
        nn.UpsamplingBilinear2d(scale_factor=4),
        lambda input: F.upsample(input, scale_factor=2, mode="bilinear"),
        lambda input: F.upsample_bilinear(input, size=9),
        lambda input: F.interpolate(input, None, 3.0, "bilinear", True),
    ],
)
def test_every_form_of_the_call_is_deferred(module):
    input = torch.randn(SHAPE)
    with deferred_upsampling():
        output = module(input)
    assert isinstance(output, DeferredUpsampling)
    assert not has_run(output)
    assert torch.equal(output + 0, module(input))


@pytest.mark.parametrize(
    "arguments, align_corners, is_ratio_of_sizes",
    [
        ({"size": (7, 9)}, False, True),
        ({"scale_factor": 4}, False, True),
        ({"scale_factor": (1.5, 3.0)}, False, True),
        ({"scale_factor": 1.3}, False, False),
        ({"scale_factor": 1.3}, True, True),
        ({"scale_factor": 1.3, "recompute_scale_factor": True}, False, True),
    ],
)
def test_scale_factors_are_kept_only_if_the_sizes_do_not_give_them(
    arguments, align_corners, is_ratio_of_sizes
):
    output = deferred(torch.randn(SHAPE), **arguments, align_corners=align_corners)
    assert (output.interpolation.scale_factors is None) == is_ratio_of_sizes
    assert output.interpolation.align_corners == align_corners
    assert output.interpolation.size == tuple(output.shape[2:])


EXPOSING: dict[str, Callable[[Tensor], Any]] = {
    "in place": lambda y: y.mul_(2),
    "view": lambda y: y[0],
    "detach": lambda y: y.detach(),
    "data": lambda y: y.data,
    "out": lambda y: torch.add(y.detach(), 1, out=y.detach()),
    "numpy": lambda y: y.detach().numpy(),
    "hook": lambda y: y.register_hook(lambda gradient: None),
    "retain_grad": lambda y: y.retain_grad(),
    "hook on the node": lambda y: y.grad_fn.register_prehook(lambda gradients: None),
    "custom function in place": TripleInPlace.apply,
}


@pytest.mark.parametrize("use", EXPOSING.values(), ids=EXPOSING)
def test_tensor_that_others_can_change_or_watch_is_not_pending(use):
    output = deferred(torch.randn(SHAPE, requires_grad=True))
    use(output)
    assert not output.is_pending


def test_leaf_that_requires_a_gradient_is_not_pending():
    output = deferred(torch.randn(SHAPE)).requires_grad_()
    assert not output.is_pending
    UpsampleCrossEntropyLoss()(output, torch.zeros(2, 16, 24, dtype=torch.int64)).backward()
    assert output.grad is not None


def test_operations_that_only_read_leave_it_pending():
    output = deferred(torch.randn(SHAPE, requires_grad=True))
    output.argmax(1), output + 1, output.sum().backward(), output.shape
    assert output.is_pending


def test_output_of_a_function_with_a_graph_of_its_own():
    """The function's gradient replaces that of the interpolation."""

    class Upsample(torch.autograd.Function):
        @staticmethod
        def forward(ctx, input):
            with torch.enable_grad():
                return upsample(input.detach().requires_grad_())

        @staticmethod
        def backward(ctx, grad):
            return 5 * torch.ones(SHAPE)

    input = torch.randn(SHAPE, requires_grad=True)
    with deferred_upsampling():
        output = Upsample.apply(input)
    assert not output.is_pending
    UpsampleCrossEntropyLoss()(output, torch.zeros(2, 16, 24, dtype=torch.int64)).backward()
    assert torch.equal(input.grad, 5 * torch.ones(SHAPE))


def test_output_of_a_reentrant_checkpoint_keeps_its_gradient():
    """Its logits were computed without a gradient."""
    target = torch.zeros(2, 16, 24, dtype=torch.int64)
    gradients = []
    for context in (deferred_upsampling(), torch.enable_grad()):
        torch.manual_seed(0)
        input = torch.randn(SHAPE, requires_grad=True)
        with context:
            output = checkpoint(lambda tensor: upsample(tensor * 1), input, use_reentrant=True)
            UpsampleCrossEntropyLoss()(output, target).backward()
        gradients.append(input.grad)
    torch.testing.assert_close(*gradients)


def test_input_changed_after_the_interpolation():
    input = torch.randn(SHAPE, requires_grad=True)
    features = input * 1
    expected = upsample(features).detach()
    output = deferred(features)
    features.zero_()
    assert torch.equal(output + 0, expected)
    (gradient,) = torch.autograd.grad(output.sum(), input)
    assert gradient.sum() > 0


def test_contexts_nest_and_end():
    input, context = torch.randn(SHAPE), deferred_upsampling()
    with context:
        with context, pytest.raises(KeyError), deferred_upsampling():
            raise KeyError
        with torch.device("cpu"):
            assert isinstance(upsample(input), DeferredUpsampling)
    assert type(upsample(input)) is Tensor


def test_context_belongs_to_its_thread():
    types = []
    with deferred_upsampling():
        thread = threading.Thread(target=lambda: types.append(type(upsample(torch.ones(SHAPE)))))
        thread.start()
        thread.join()
    assert types == [Tensor]


def test_threads_share_one_result():
    output, pointers = deferred(torch.randn(2, 5, 40, 40)), []
    barrier = threading.Barrier(4)

    def detach():
        barrier.wait()
        pointers.append(output.detach().data_ptr())

    threads = [threading.Thread(target=detach) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(pointers)) == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("source", [torch.float32, torch.bfloat16], ids=str)
def test_autocast(dtype, source):
    results = []
    for context in (deferred_upsampling(), torch.enable_grad()):
        torch.manual_seed(0)
        input = torch.randn(SHAPE).to(source).requires_grad_()
        with torch.autocast("cpu", dtype=dtype):
            with context:
                output = upsample(input)
            square = output * output
        square.float().sum().backward()
        results.append((output + 0, square, input.grad))
    assert_same(*results)
    half = torch.randn(SHAPE).to(dtype)
    output = deferred(half)
    with torch.autocast("cpu", dtype=dtype):
        assert_same(output + 0, upsample(half))


def test_autocast_to_another_dtype(monkeypatch):
    """On CUDA autocast interpolates in float32."""
    interpolate = torch._C._nn.upsample_bilinear2d
    monkeypatch.setattr(
        torch._C._nn,
        "upsample_bilinear2d",
        lambda input, *options: interpolate(input.float(), *options),
    )
    input = torch.randn(SHAPE).bfloat16().requires_grad_()
    output = deferred(input)
    assert output.dtype == output.logits.dtype == torch.float32
    gradients = [torch.autograd.grad((y * y).sum(), input)[0] for y in (output, upsample(input))]
    assert_same(*gradients)


def test_inference_mode():
    input = torch.randn(SHAPE)
    with torch.inference_mode():
        output, expected = deferred(input), upsample(input)
        assert torch.equal(output + 1, expected + 1)
        assert output.is_pending
        for tensor in (output, expected):
            tensor.mul_(2)
            tensor[0].add_(1)
        assert torch.equal(output + 0, expected)
        assert not output.is_pending


def test_gradient_checks():
    input = torch.randn(1, 2, 2, 3, dtype=torch.float64, requires_grad=True)

    def square(input):
        return deferred(input) ** 2

    assert torch.autograd.gradcheck(square, input)
    assert torch.autograd.gradgradcheck(square, input)


def test_gradient_under_deterministic_algorithms_elsewhere_than_on_a_cpu():
    """A GPU uses other operations then; here they run on a CPU."""
    from deeplab_fast.nn import deferred as module

    context = type("Context", (), {"shape": SHAPE})()
    for scale_factors in (None, (1.3, 1.3)):
        context.interpolation = module.Interpolation((5, 7), scale_factors, False)
        grad = torch.randn(2, 5, 5, 7)
        expected, *_ = module._Defer.backward(context, grad)
        assert torch.are_deterministic_algorithms_enabled()
        with deferred_upsampling():
            actual, *_ = module._Defer.backward(context, NotOnCpu(grad))
        assert type(actual) is Tensor
        torch.testing.assert_close(actual, expected)


class NotOnCpu(Tensor):
    """A tensor that pretends to be on a GPU."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @property
    def device(self):
        return torch.device("cuda")


class Model(nn.Module):
    def __init__(self, scale: int = 4) -> None:
        super().__init__()
        self.conv = nn.Conv2d(5, 3, 1)
        self.unused = nn.Linear(1, 1)
        self.scale = scale

    def forward(self, input: Tensor) -> Tensor:
        return upsample(self.conv(input), scale_factor=self.scale)


NOT_DEFERRED: dict[str, Callable[[nn.Module, Tensor], Any]] = {
    "compile": lambda model, x: torch.compile(model, fullgraph=True, backend="aot_eager")(x),
    "export": lambda model, x: torch.export.export(model, (x,)).module()(x),
    "trace": lambda model, x: torch.jit.trace(model, x)(x),
    "fx": lambda model, x: torch.fx.symbolic_trace(model).code,
    "vmap": lambda model, x: torch.func.vmap(model)(x[None])[0],
    "vjp": lambda model, x: torch.func.vjp(model, x)[0],
    "jvp": lambda model, x: torch.func.jvp(model, (x,), (x,))[0],
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("use", NOT_DEFERRED.values(), ids=NOT_DEFERRED)
def test_nothing_is_deferred_by(use):
    model, input = Model(), torch.randn(SHAPE)
    expected = model(input)
    with deferred_upsampling():
        output = use(model, input)
    assert not isinstance(output, DeferredUpsampling)
    if isinstance(output, str):
        assert "interpolate" in output
    elif not output.is_meta:
        torch.testing.assert_close(output, expected)


def test_transforms_of_a_deferred_tensor():
    input = torch.randn(SHAPE)
    expected = upsample(input)
    assert torch.equal(torch.func.grad(lambda y: (y * y).sum())(deferred(input)), 2 * expected)
    assert torch.equal(torch.func.vmap(lambda y: 2 * y)(deferred(input)), 2 * expected)
    output, tangent = torch.func.jvp(lambda y: 2 * y, (deferred(input),), (expected,))
    assert torch.equal(output, tangent)


@pytest.mark.filterwarnings("ignore")
def test_compiled_function_of_a_deferred_tensor():
    results = []
    for output_of in (deferred, upsample):
        torch.manual_seed(0)
        input = torch.randn(SHAPE, requires_grad=True)
        function = torch.compile(lambda y: (y * y).sum(1), backend="aot_eager")
        result = function(output_of(input * 1))
        result.sum().backward()
        results.append((result.detach(), input.grad))
    torch.testing.assert_close(*results)


def test_memory_is_that_of_the_result():
    """Neither the tensor nor its graph keeps the features or the result alive."""
    features = torch.randn(SHAPE, requires_grad=True).exp()
    original = weakref.ref(features)
    output = deferred(features)
    result = weakref.ref(output.run())
    logits = weakref.ref(output.logits)
    loss = output.sum()
    del features, output
    assert result() is None
    assert logits() is None
    loss.backward()
    del loss
    assert original() is None


def test_no_garbage_is_left():
    input = torch.randn(SHAPE, requires_grad=True)
    gc.collect()
    gc.disable()
    try:
        output = deferred(input)
        (output * output).sum().backward()
        logits = weakref.ref(output.logits)
        del output
        assert logits() is None
    finally:
        gc.enable()


def test_grad_scaler():
    gradients = []
    for context in (deferred_upsampling(), torch.enable_grad()):
        torch.manual_seed(0)
        model, target = Model(), torch.randint(3, (2, 16, 24))
        scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        with context:
            loss = F.cross_entropy(model(torch.randn(SHAPE)), target)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        gradients.append([model.conv.weight.grad, model.conv.weight.detach()])
    assert_same(*gradients)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "options",
    [{}, {"find_unused_parameters": True}, {"static_graph": True}],
    ids=["plain", "unused", "static"],
)
def test_distributed_data_parallel(options, tmp_path):
    if not torch.distributed.is_available():
        pytest.skip("torch has no distributed package")
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1
    )
    try:
        gradients = []
        for loss_of, context in (
            (UpsampleCrossEntropyLoss(), deferred_upsampling()),
            (F.cross_entropy, deferred_upsampling()),
            (F.cross_entropy, torch.enable_grad()),
        ):
            torch.manual_seed(0)
            model = Model()
            if not options.get("find_unused_parameters"):
                del model.unused
            wrapped = nn.parallel.DistributedDataParallel(model, **options)
            for _ in range(2):
                with context:
                    loss = loss_of(wrapped(torch.randn(SHAPE)), torch.randint(3, (2, 16, 24)))
                loss.backward()
            gradients.append(model.conv.weight.grad)
        torch.testing.assert_close(gradients[0], gradients[2])
        assert_same(gradients[1], gradients[2])
    finally:
        torch.distributed.destroy_process_group()


def test_no_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        output = deferred(torch.randn(SHAPE, requires_grad=True))
        (output * output).sum().backward()
        assert output.is_pending
