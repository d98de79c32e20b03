"""CUDA graphs of prepared models: when calls are captured, replayed and forgotten.

Most tests run on the CPU. A stand-in for the GPU records a function as a "graph", whose replay runs
the function and writes its results to the memory of the first ones. The tests at the end need a
GPU.
"""

from __future__ import annotations

import contextlib
import copy
import gc
import importlib
import logging
import pickle
import threading
import weakref
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode

from deeplab_fast import DeepLabV3, backend
from deeplab_fast._native.device_cache import cached_on_device
from deeplab_fast.backends import registry
from deeplab_fast.models import Preprocessing, cuda_graphs
from deeplab_fast.models.cuda_graphs import CAPTURED_CALL, MAX_GRAPHS, CudaGraphs, Gpu
from deeplab_fast.models.inference import InferenceModel

on_gpu = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="captures CUDA graphs: there is no GPU here"
)


class StandIn(Gpu):
    """A "GPU" on the CPU. Its log is shared by all instances."""

    device_type = "cpu"
    log: list[str] = []
    capturing = False
    error: Exception | None = None

    def is_capturing(self):
        return StandIn.capturing

    def capture(self, function, device, sharing):
        self.log.append("capture")
        StandIn.capturing = True
        try:
            if StandIn.error:
                raise StandIn.error
            output = function()
        finally:
            StandIn.capturing = False
        return StandInGraph(function, output), output

    @contextlib.contextmanager
    def turn(self, device):
        yield

    def wait(self):
        self.log.append("wait")


class StandInGraph:
    def __init__(self, function, output):
        self.function, self.output = function, output

    def replay(self):
        StandIn.log.append("replay")
        StandIn.capturing = True
        output = self.function()
        StandIn.capturing = False
        for memory, result in zip(tensors_of(self.output), tensors_of(output)):
            memory.copy_(result)


def tensors_of(output: Tensor | OrderedDict[str, Tensor]) -> list[Tensor]:
    return [output] if isinstance(output, Tensor) else list(output.values())


@pytest.fixture(autouse=True)
def log():
    """What the stand-in has done."""
    StandIn.log, StandIn.capturing, StandIn.error = [], False, None
    return StandIn.log


class Backbone(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, stride=2)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        return {"out": self.conv(images.to(self.conv.weight.dtype))}


def small_model(make_gpu=StandIn) -> InferenceModel:
    model = InferenceModel(
        Backbone(), nn.Sequential(nn.Conv2d(4, 5, 1)), None, False, Preprocessing(), None
    )
    model._cuda_graphs = CudaGraphs(make_gpu)
    return model.requires_grad_(False).eval()


@pytest.fixture
def model() -> InferenceModel:
    return small_model()


def eager(model: InferenceModel) -> InferenceModel:
    """The same model without graphs."""
    model = copy.deepcopy(model)
    model._cuda_graphs = None
    return model


def images(*size: int, batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, *(size or (9, 11)))


def captured(model: InferenceModel, *arguments, **options) -> bool:
    """Whether a fourth call with these arguments is a replay."""
    for _ in range(CAPTURED_CALL):
        model.predict(*arguments, **options)
    before = StandIn.log.count("replay")
    model.predict(*arguments, **options)
    return StandIn.log.count("replay") > before


def run_twice(model: InferenceModel, *arguments, **options) -> list[str]:
    """What the stand-in does in two calls of a model that has graphs."""
    del StandIn.log[:]
    for _ in range(2):
        model.predict(*arguments, **options)
    return StandIn.log


# --- when calls are captured and replayed


@pytest.mark.parametrize("method", ["predict", "forward"])
def test_third_call_is_captured_and_later_ones_replay_it(model, log, method):
    run, expected = getattr(model, method), getattr(eager(model), method)
    logs = []
    for _ in range(5):
        x = images()
        assert_close(run(x), expected(x), rtol=0, atol=0)
        logs.append(list(log))
    assert logs == [
        [],
        [],
        ["capture"],
        ["capture", "replay"],
        ["capture", "replay", "replay"],
    ]


def test_logits_are_not_replayed(model, log):
    for _ in range(5):
        model.logits(images())
    assert log == []


def test_results_are_not_overwritten(model):
    expected = eager(model)
    inputs = [images() for _ in range(7)]
    results = [(model.predict(x), model(x)["out"]) for x in inputs]
    for x, (labels, logits) in zip(inputs, results):
        assert_close(labels, expected.predict(x), rtol=0, atol=0)
        assert_close(logits, expected(x)["out"], rtol=0, atol=0)


def test_single_image_and_batch_of_one_share_a_graph(model, log):
    for _ in range(CAPTURED_CALL):
        model.predict(images(batch=1))
    x = images(batch=1)
    assert_close(model.predict(x[0]), eager(model).predict(x[0]), rtol=0, atol=0)
    assert log == ["capture", "replay"]


def test_images_are_not_kept_or_changed(model):
    x = images()
    before = x.clone()
    for _ in range(5):
        model.predict(x)
    assert_close(x, before, rtol=0, atol=0)
    kept = weakref.ref(x)
    del x
    gc.collect()
    assert kept() is None


@contextlib.contextmanager
def deterministic(on: bool):
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(on)
    yield
    torch.use_deterministic_algorithms(before)


@pytest.mark.parametrize(
    "change",
    [
        {"x": images(9, 12)},
        {"x": images(batch=3)},
        {"x": images().contiguous(memory_format=torch.channels_last)},
        {"x": images().double()},
        {"size": (5, 6)},
        {"size": [5, 6]},
        {"dtype": torch.uint8},
        {"context": lambda: backend("reference")},
        {"context": lambda: deterministic(False)},
        {"context": lambda: torch.backends.cudnn.flags(enabled=False)},
        {"context": lambda: torch.backends.cudnn.flags(benchmark=True)},
        {"context": lambda: torch.backends.cudnn.flags(deterministic=True)},
        {"context": lambda: torch.autocast("cpu", torch.bfloat16)},
        {"context": torch.inference_mode},
    ],
    ids=lambda change: ", ".join(f"{k}" for k in change),
)
def test_call_of_another_kind_has_its_own_graph(model, log, change):
    x = images()
    model.double() if change.get("x", x).dtype == torch.float64 else model
    for _ in range(4):
        model.predict(x)
    change = dict(change)
    context = change.pop("context", contextlib.nullcontext)
    arguments = change.pop("x", x)
    before = list(log)
    with context():
        result = model.predict(arguments, **change)
        assert log == before  # neither a replay nor a capture
        assert_close(result, eager(model).predict(arguments, **change), rtol=0, atol=0)
        for _ in range(3):
            model.predict(arguments, **change)
    assert log == [*before, "capture", "replay"]


def test_tf32_is_in_the_key(model, log, monkeypatch):
    assert captured(model, images())
    monkeypatch.setattr(cuda_graphs, "tf32_is_allowed", lambda: True)
    model.predict(images())
    assert log.count("replay") == 1
    monkeypatch.setattr(cuda_graphs, "tf32_is_allowed", lambda: False)
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = not before
    try:
        model.predict(images())
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
    assert log.count("replay") == 1


def test_new_choice_of_kernels_is_captured_anew(model, log):
    assert captured(model, images())
    registry.forget_plans()
    del log[:]
    assert captured(model, images())
    assert log == ["capture", "replay"]


def test_align_corners_is_in_the_key(model, log):
    for _ in range(4):
        model(images())
    assert log == ["capture", "replay"]
    model.align_corners = True
    model(images())
    assert log == ["capture", "replay"]


def test_least_recently_used_graph_is_dropped(model, log):
    shapes = [(9, 9 + i) for i in range(MAX_GRAPHS)]
    for shape in shapes:
        assert captured(model, images(*shape))
    model.predict(images(*shapes[0]))  # now the second shape is the least recently used
    assert captured(model, images(40, 40))
    assert len(model._cuda_graphs._graphs) == MAX_GRAPHS
    assert log[-4:-1] == ["replay", "wait", "capture"]  # not dropped while it runs
    del log[:]
    for shape in [shapes[0], *shapes[2:], (40, 40)]:
        model.predict(images(*shape))
    assert log == ["replay"] * MAX_GRAPHS
    model.predict(images(*shapes[1]))
    assert log == ["replay"] * MAX_GRAPHS


def test_dropped_graph_frees_its_memory(model):
    for i in range(MAX_GRAPHS + 1):
        assert captured(model, images(9, 9 + i))
        if i == 0:
            (graph,) = model._cuda_graphs._graphs.values()
            memory = [weakref.ref(graph.images), weakref.ref(graph.output)]
            del graph
    gc.collect()
    assert [ref() for ref in memory] == [None, None]


def test_more_shapes_than_graphs_in_turn_are_never_captured(model, log):
    for _ in range(6):
        for i in range(MAX_GRAPHS + 1):
            model.predict(images(9, 9 + i))
    assert log == []
    assert len(model._cuda_graphs._calls) == MAX_GRAPHS


def test_new_shapes_do_not_displace_graphs(model, log):
    assert captured(model, images())
    for i in range(3 * MAX_GRAPHS):
        model.predict(images(20, 20 + i))
    assert run_twice(model, images()) == ["replay", "replay"]


# --- calls that only PyTorch can run


def test_no_graphs_if_declined(log):
    torch.manual_seed(0)
    model = DeepLabV3("mobilenet_v2", 3).eval()
    assert model.prepare_for_inference()._cuda_graphs is not None
    prepared = model.prepare_for_inference(cuda_graphs=False)
    assert prepared._cuda_graphs is None
    assert prepared.to(torch.float64).predict(images(9, 9)).shape == (2, 9, 9)
    assert not hasattr(model, "_cuda_graphs")


def test_images_on_a_cpu_are_not_captured(log):
    model = small_model(Gpu)
    for _ in range(5):
        model.predict(images())
    assert not model._cuda_graphs._graphs and not model._cuda_graphs._calls


@pytest.mark.parametrize("where", ["classifier.0", "backbone", "", "global"])
@pytest.mark.parametrize("kind", ["forward_hook", "forward_pre_hook"])
def test_forward_hooks_run_at_every_call(model, log, kind, where):
    assert captured(model, images())
    seen = []
    if where == "global":
        register = getattr(nn.modules.module, f"register_module_{kind}")
    else:
        register = getattr(model.get_submodule(where), f"register_{kind}")
    handle = register(lambda module, *args: seen.append(module))
    try:
        assert run_twice(model, images()) == []
        assert len(seen) > (0 if where else -1)  # predict does not call the model's own hooks
    finally:
        handle.remove()
    assert run_twice(model, images()) == ["replay", "replay"]


def test_gradients_of_images(model, log):
    for _ in range(5):
        model(images())
    replays = log.count("replay")
    x = images().requires_grad_()
    model(x)["out"].sum().backward()
    assert x.grad is not None and log.count("replay") == replays
    with torch.no_grad():
        model(x)
    assert log.count("replay") == replays + 1


def test_gradients_of_weights(model, log):
    for _ in range(5):
        model(images())
    replays = log.count("replay")
    weight = model.classifier[0].weight.requires_grad_()
    model(images())["out"].sum().backward()
    assert weight.grad is not None and log.count("replay") == replays


@pytest.mark.parametrize(
    "where", ["trace", "dispatch", "vmap", "dual", "capture", "jit", "subclass"]
)
def test_calls_whose_ops_must_be_seen_are_not_replayed(model, log, where, monkeypatch):
    for _ in range(4):
        model(images())
        model.predict(images())
    del log[:]
    x = images()
    expected = eager(model)(x)["out"]
    if where == "trace":
        with registry.trace() as ran:
            model.predict(x)
        assert [op for op, _ in ran] == ["upsample_argmax"]
    elif where == "dispatch":
        with FlopCounterMode(display=False) as counter:
            model.predict(x)
        assert counter.get_total_flops() > 0
    elif where == "vmap":
        assert_close(torch.vmap(lambda x: model(x)["out"])(x[None])[0], expected)
    elif where == "dual":
        with torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(x, torch.ones_like(x))
            out = model(dual)["out"]
            assert torch.autograd.forward_ad.unpack_dual(out).tangent is not None
    elif where == "capture":
        monkeypatch.setattr(StandIn, "capturing", True)
        assert_close(model(x)["out"], expected)
    elif where == "jit":
        traced = torch.jit.trace(lambda x: model(x)["out"], x, check_trace=False)
        y = images()
        assert_close(traced(y), eager(model)(y)["out"])
    else:
        model(nn.Parameter(x, requires_grad=False))
    assert log == []


def test_compiles_to_one_graph_and_exports(model, log):
    for _ in range(4):
        model(images())
        model.predict(images())
    del log[:]
    x = images()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    assert_close(compiled(x), eager(model)(x))
    labels = torch.compile(model.predict, fullgraph=True, backend="eager")(x)
    assert_close(labels, eager(model).predict(x))
    for strict in (False, True):
        program = torch.export.export(model, (x,), strict=strict)
        assert_close(program.module()(x), eager(model)(x))
    assert log == []


# --- when graphs are dropped

WEIGHT = torch.ones(5, 4, 1, 1)


@pytest.mark.parametrize(
    "change",
    [
        lambda model: model.to(torch.float64),
        lambda model: model.bfloat16(),
        lambda model: model.to("cpu"),
        lambda model: model.load_state_dict(model.state_dict()),
        lambda model: model.load_state_dict(copy.deepcopy(model.state_dict()), assign=True),
        lambda model: model.classifier.double().float(),
        lambda model: setattr(model.classifier[0], "weight", nn.Parameter(WEIGHT, False)),
        lambda model: setattr(model.classifier[0].weight, "data", WEIGHT),
        lambda model: setattr(model.classifier[0], "bias", None),
        lambda model: model.classifier.append(nn.ReLU()),
        lambda model: model.set_submodule("classifier.0", nn.Conv2d(4, 6, 1).requires_grad_(False)),
        lambda model: model.classifier[0].register_buffer("more", torch.ones(1)),
        lambda model: model.register_parameter("more", nn.Parameter(torch.ones(1), False)),
    ],
    ids=[
        "to dtype", "half", "to device", "load", "load assign", "submodule to", "parameter", "data",
        "no bias", "more modules", "module", "buffer", "more parameters",
    ],
)  # fmt: skip
def test_changed_weights_drop_graphs(model, log, change):
    assert captured(model, images())
    memory = weakref.ref(next(iter(model._cuda_graphs._graphs.values())).images)
    del log[:]
    change(model)
    x = images()
    assert_close(model.predict(x), eager(model).predict(x), rtol=0, atol=0)
    assert log == ["wait"]  # not freed while it is replayed
    assert not model._cuda_graphs._graphs and memory() is None
    assert captured(model, x)
    assert_close(model.predict(x), eager(model).predict(x), rtol=0, atol=0)


def test_weights_changed_in_place_are_used(model, log):
    assert captured(model, images())
    with torch.no_grad():
        model.classifier[0].weight.neg_()
    x = images()
    del log[:]
    assert_close(model.predict(x), eager(model).predict(x), rtol=0, atol=0)
    assert log == ["replay"]


@pytest.mark.parametrize("make", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_have_no_graphs(model, log, make):
    assert captured(model, images())
    other = make(model)
    with torch.no_grad():
        other.classifier[0].weight.neg_()
    x = images()
    del log[:]
    assert_close(other.predict(x), eager(other).predict(x), rtol=0, atol=0)
    assert log == [] and not other._cuda_graphs._graphs
    assert captured(other, x)
    assert_close(model.predict(x), eager(model).predict(x), rtol=0, atol=0)


def test_shallow_copy_with_other_modules(model):
    """nn.DataParallel calls such copies, with modules that hold other weights."""
    assert captured(model, images())
    replica = copy.copy(model)
    replica._modules = {**model._modules, "classifier": copy.deepcopy(model.classifier)}
    with torch.no_grad():
        replica.classifier[0].weight.neg_()
    x = images()
    for _ in range(5):
        for one in (model, replica):
            assert_close(one.predict(x), eager(one).predict(x), rtol=0, atol=0)


def test_weights_replaced_while_threads_call_the_model(model, log):
    """The calls that began before do not count: they might capture half-replaced weights."""
    inside, replaced = threading.Barrier(CAPTURED_CALL + 1), threading.Event()

    class Waiting(InferenceModel):
        def _classify(self, features, x):
            if not replaced.is_set():
                inside.wait(20)
                replaced.wait(20)
            return super()._classify(features, x)

    model.__class__ = Waiting
    with ThreadPoolExecutor(CAPTURED_CALL) as threads:
        calls = [threads.submit(model.predict, images()) for _ in range(CAPTURED_CALL)]
        inside.wait(20)
        model.to("cpu")  # drops the graphs, and on a GPU would replace the weights
        replaced.set()
    assert [call.exception() for call in calls] == [None] * CAPTURED_CALL
    assert log == ["wait"] and not model._cuda_graphs._calls


# --- failures


def messages(caplog) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == "deeplab_fast"]


def test_failed_capture_is_logged_once_and_the_call_runs_eagerly(model, log, caplog):
    caplog.set_level(logging.DEBUG, "deeplab_fast")
    StandIn.error = RuntimeError("operation not permitted\nwhen stream is capturing")
    x = images()
    for _ in range(6):
        assert_close(model.predict(x), eager(model).predict(x), rtol=0, atol=0)
    assert log == ["capture"]
    assert messages(caplog) == [
        "predict of images (2, 3, 9, 11) runs without a CUDA graph: RuntimeError: "
        "operation not permitted"
    ]
    StandIn.error = None
    assert captured(model, images(9, 12))
    assert_close(model.predict(x), eager(model).predict(x), rtol=0, atol=0)
    assert log.count("capture") == 2


def test_interrupted_capture_is_not_hidden(model):
    StandIn.error = KeyboardInterrupt()
    for _ in range(CAPTURED_CALL - 1):
        model.predict(images())
    with pytest.raises(KeyboardInterrupt):
        model.predict(images())
    StandIn.error = None
    assert captured(model, images())


def test_errors_of_the_model_are_raised_and_not_counted(model, log, caplog):
    caplog.set_level(logging.DEBUG, "deeplab_fast")
    for _ in range(5):
        with pytest.raises(ValueError, match=r"images: expected \[N, 3, H, W\]"):
            model.predict(torch.randn(2, 4, 9, 9))
        with pytest.raises(TypeError, match="images: expected normalised floats"):
            model.predict(torch.zeros(2, 3, 9, 9, dtype=torch.uint8))
        with pytest.raises(ValueError, match="size: expected a positive number"):
            model.predict(images(), size=(0, 3))
    assert log == [] and messages(caplog) == [] and not model._cuda_graphs._calls


def test_graphs_give_way_where_memory_is_short(model, log, caplog):
    caplog.set_level(logging.DEBUG, "deeplab_fast")
    assert captured(model, images())

    def scarce(self, x, size, dtype):
        if model._cuda_graphs._graphs:
            raise torch.OutOfMemoryError("out of memory")
        return method(self, x, size, dtype)

    method = InferenceModel.__mro__[1]._predict
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(InferenceModel.__mro__[1], "_predict", scarce)
        assert model.predict(images(13, 13)).shape == (2, 13, 13)
    assert messages(caplog) == ["CUDA graphs are off, because the GPU is out of memory"]
    assert run_twice(model, images()) + run_twice(model, images()) == []


def test_out_of_memory_without_graphs_is_raised(model):
    def scarce(images, size, dtype):
        calls.append(size)
        raise torch.OutOfMemoryError("out of memory")

    calls = []
    with pytest.raises(torch.OutOfMemoryError):
        model._cuda_graphs(model, scarce, images(), None, None)
    assert len(calls) == 1


# --- threads


def test_threads_share_graphs_and_get_their_own_results(model, log):
    expected = eager(model)
    inputs = [images(9, 9 + i % 3) for i in range(60)]
    with ThreadPoolExecutor(6) as threads:
        results = list(threads.map(model.predict, inputs))
    for x, result in zip(inputs, results):
        assert_close(result, expected.predict(x), rtol=0, atol=0)
    assert log.count("capture") == 3


def test_threads_do_not_mix_their_images():
    """A second thread comes while the graph runs on the images of the first."""
    model = small_model()
    for _ in range(CAPTURED_CALL):
        model.predict(images())
    (graph,) = model._cuda_graphs._graphs.values()
    replay, entered, resume = graph.graph.replay, threading.Event(), threading.Event()

    def slow():
        if not entered.is_set():
            entered.set()
            resume.wait(5)
        replay()

    graph.graph.replay = slow
    inputs = images(), images()
    with ThreadPoolExecutor(2) as threads:
        first = threads.submit(model.predict, inputs[0])
        entered.wait(5)
        second = threads.submit(model.predict, inputs[1])
        assert not second.done()
        resume.set()
    for x, result in zip(inputs, (first.result(), second.result())):
        assert_close(result, eager(model).predict(x), rtol=0, atol=0)


# --- work lists


def test_graph_owns_the_work_lists_it_reads(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: StandIn.capturing)
    monkeypatch.setattr("deeplab_fast._native.device_cache.MAX_ENTRIES", 1)

    class WorkList:
        pass

    @cached_on_device
    def work_list(width: int) -> WorkList:
        return WorkList()

    class Model(InferenceModel):
        def _classify(self, features, x):
            work_list(x.size(3))
            return super()._classify(features, x)

    model = small_model()
    model.__class__ = Model
    for _ in range(CAPTURED_CALL):
        model.predict(images(9, 9))
    read = weakref.ref(work_list(9))
    for width in range(20, 30):  # enough to drop the entry from the cache
        work_list(width)
    gc.collect()
    assert read() is not None
    model.to(torch.float32)
    gc.collect()
    assert read() is None


# --- the CUDA calls


class Recorded:
    """Stand-in for a class of torch.cuda that writes the calls of its methods to ``calls``."""

    calls: list[tuple[str, ...]] = []
    failing = ""

    def __init__(self, *args, **options):
        self.arguments = args, options

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)

        def method(*args):
            Recorded.calls.append((type(self).__name__, name))
            if name == Recorded.failing:
                raise RuntimeError(f"{name} failed")
            return (0, 7)

        return method


class FakeGraph(Recorded):
    pass


class FakeStream(Recorded):
    pass


class FakeEvent(Recorded):
    pass


@pytest.fixture
def cuda(monkeypatch):
    """torch.cuda with stand-ins. Returns the calls, and the current stream as a list of one."""
    calls, current = [], [FakeStream()]
    Recorded.calls, Recorded.failing = calls, ""

    @contextlib.contextmanager
    def stream_context(stream):
        before, current[:] = current[:], [stream]
        try:
            yield
        finally:
            current[:] = before

    class Graph:
        """As torch.cuda.graph: the stream stays current if the end of the capture fails."""

        def __init__(self, graph, pool, stream, capture_error_mode):
            calls.append(("graph", pool, capture_error_mode))
            self.graph, self.stream = graph, stream

        def __enter__(self):
            self.before, current[:] = current[:], [self.stream]
            self.graph.capture_begin()

        def __exit__(self, *error):
            self.graph.capture_end()
            current[:] = self.before

    for name, value in {
        "CUDAGraph": FakeGraph, "Stream": FakeStream, "Event": FakeEvent, "graph": Graph,
        "stream": stream_context, "device": lambda device: contextlib.nullcontext(),
        "current_stream": lambda device=None: current[0], "graph_pool_handle": lambda: (0, 1),
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(
        torch._C,
        "_cuda_endAllocateToPool",
        lambda device, pool: calls.append(("end", device, pool)),
        raising=False,
    )
    return calls, current


GPU = torch.device("cuda", 0)


def test_captures_on_a_side_stream_and_shares_memory(cuda):
    calls, current = cuda
    gpu, caller = Gpu(), current[0]
    first, result = gpu.capture(lambda: calls.append("run") or current[0], GPU, None)
    assert isinstance(result, FakeStream) and result is not caller and current == [caller]
    assert calls == [
        ("FakeStream", "wait_stream"),
        ("graph", (0, 1), "thread_local"),
        ("FakeGraph", "capture_begin"),
        "run",
        ("FakeGraph", "capture_end"),
        ("FakeStream", "wait_stream"),
    ]
    _, other = gpu.capture(lambda: current[0], GPU, first)
    assert other is result
    assert calls[6:9] == [
        ("FakeGraph", "pool"),
        ("FakeStream", "wait_stream"),
        ("graph", (0, 7), "thread_local"),
    ]


@pytest.mark.parametrize("failing", ["", "capture_begin", "capture_end"])
def test_failed_capture_restores_stream_and_allocator(cuda, failing):
    calls, current = cuda
    caller = current[0]
    Recorded.failing = failing

    def function():
        if not failing:
            raise MemoryError("no room")

    gpu = Gpu()
    with pytest.raises(
        (RuntimeError, MemoryError), match=f"{failing} failed" if failing else "no room"
    ):
        gpu.capture(function, GPU, None)
    assert current == [caller]
    assert calls[-3:] == [
        ("FakeGraph", "reset"),
        ("end", 0, (0, 1)),
        ("FakeStream", "wait_stream"),
    ]
    Recorded.failing = ""
    gpu.capture(lambda: None, GPU, None)


def test_streams_take_turns(cuda):
    calls, _ = cuda
    gpu = Gpu()
    gpu.wait()
    assert calls == []
    with gpu.turn(GPU):
        calls.append("run")
    with pytest.raises(MemoryError), gpu.turn(GPU):
        raise MemoryError
    gpu.wait()
    turn = [("FakeStream", "wait_event"), ("FakeEvent", "record")]
    assert calls == [turn[0], "run", turn[1], *turn, ("FakeEvent", "synchronize")]


# --- on a GPU


@pytest.fixture
def on_device():
    """A prepared model on the GPU, and the same model without graphs."""
    torch.manual_seed(0)
    model = DeepLabV3("mobilenet_v2", 5).eval().cuda()
    return model.prepare_for_inference(), model.prepare_for_inference(cuda_graphs=False)


def gpu_images(*size: int, batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, *(size or (65, 65)), device="cuda")


def graphs(model: InferenceModel) -> int:
    return len(model._cuda_graphs._graphs)


@on_gpu
def test_gpu_same_results_as_eager(on_device, caplog):
    caplog.set_level(logging.DEBUG, "deeplab_fast")
    model, expected = on_device
    inputs = [gpu_images() for _ in range(6)]
    results = [(model.predict(x), model(x)["out"]) for x in inputs]
    assert graphs(model) == 2 and messages(caplog) == []
    for x, (labels, logits) in zip(inputs, results):  # after all calls: nothing was overwritten
        assert_close(labels, expected.predict(x), rtol=0, atol=0)
        assert_close(logits, expected(x)["out"], rtol=1e-4, atol=1e-4)


@on_gpu
def test_gpu_shapes_in_turn_keep_their_memory_apart(on_device):
    model, expected = on_device
    shapes = [(33, 33), (65, 65), (49, 97), (129, 65)]
    for _ in range(6):
        for shape in shapes:
            x = gpu_images(*shape)
            assert_close(model.predict(x), expected.predict(x), rtol=0, atol=0)
    assert graphs(model) == len(shapes)


@on_gpu
@pytest.mark.parametrize("num_threads", [1, 4])
def test_gpu_streams_and_threads(on_device, num_threads):
    model, expected = on_device
    shapes = [(65, 65), (33, 97)]
    inputs = [gpu_images(*shapes[i % 2]) for i in range(48)]
    for shape in shapes:
        for _ in range(CAPTURED_CALL):
            model.predict(gpu_images(*shape))
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in range(4)]

    def run(i: int) -> Tensor:
        with torch.cuda.stream(streams[i % len(streams)]):
            return model.predict(inputs[i])

    with ThreadPoolExecutor(num_threads) as threads:
        results = list(threads.map(run, range(len(inputs))))
    torch.cuda.synchronize()
    for x, labels in zip(inputs, results):
        assert_close(labels, expected.predict(x), rtol=0, atol=0)


@on_gpu
def test_gpu_memory_of_many_shapes_is_bounded(on_device):
    model, _ = on_device
    used = []
    for i in range(3 * MAX_GRAPHS):
        for _ in range(4):
            model.predict(gpu_images(65 + 16 * (i % MAX_GRAPHS), 65 + 16 * (i // MAX_GRAPHS)))
        torch.cuda.synchronize()
        used.append(torch.cuda.memory_reserved())
    assert graphs(model) == MAX_GRAPHS
    assert max(used[2 * MAX_GRAPHS :]) < 2 * max(used[:MAX_GRAPHS])
    model.cpu()
    gc.collect()
    torch.cuda.empty_cache()
    assert torch.cuda.memory_reserved() < min(used)


@on_gpu
def test_gpu_call_inside_another_capture(on_device):
    model, expected = on_device
    x = gpu_images()
    for _ in range(4):
        model.predict(x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        labels = model.predict(x)
    for _ in range(2):
        x.normal_()
        graph.replay()
        assert_close(labels, expected.predict(x), rtol=0, atol=0)


@on_gpu
def test_gpu_call_that_cannot_be_captured(on_device, caplog):
    """It waits for the GPU, which ends the capture with an error."""
    caplog.set_level(logging.DEBUG, "deeplab_fast")
    model, expected = on_device
    classify = InferenceModel._classify

    def waiting(self, features, images):
        torch.cuda.current_stream().synchronize()
        return classify(self, features, images)

    x = gpu_images()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(InferenceModel, "_classify", waiting)
        for _ in range(5):
            model.predict(x)
    assert graphs(model) == 0 and len(messages(caplog)) == 1
    assert not torch.cuda.is_current_stream_capturing()
    torch.cuda.empty_cache()
    for _ in range(5):
        y = gpu_images(33, 33)
        assert_close(model.predict(y), expected.predict(y), rtol=0, atol=0)
    assert graphs(model) == 1


@on_gpu
def test_gpu_benchmarks_capture_calls_in_their_own_graphs(on_device, monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "benchmarks")
    model, expected = on_device
    x = gpu_images()
    timing = importlib.import_module("common.timing")
    run, _ = timing.prepare(lambda: model.predict(x), x.device)
    assert_close(run(), expected.predict(x), rtol=0, atol=0)
