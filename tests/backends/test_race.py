"""Races of kernels against cuDNN, with a clock that the tests set, and for real on a CPU."""

from __future__ import annotations

import contextlib
import logging
import re
import threading
import time
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from deeplab_fast import dilated_conv2d
from deeplab_fast.backends import race, registry
from deeplab_fast.ops.fused_conv2d import fused_conv2d, fused_conv2d_add_

from ..support.backends import set_tf32

CPU = torch.device("cpu")


class Clock:
    """A clock that stands still, except in the calls it makes."""

    def __init__(self) -> None:
        self.ms = 0.0
        self.calls: list[str] = []

    def __call__(self) -> float:
        return 1e-3 * self.ms

    def call(self, name: str, *durations: float):
        """A call that takes these times in ms, then the last of them for ever."""
        remaining = list(durations)

        def run() -> None:
            self.calls.append(name)
            duration = remaining.pop(0) if remaining[1:] else remaining[0]
            if duration < 0:
                raise RuntimeError("illegal instruction")
            self.ms += duration

        return run


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def debug_lines(caplog):
    caplog.set_level(logging.DEBUG, "deeplab_fast")
    return lambda: [record.getMessage() for record in caplog.records]


def test_calls_take_turns_until_the_budget_is_used(clock):
    calls = {"a": clock.call("a", 500, 2, 1, 3), "b": clock.call("b", 100, 2)}
    times = race.milliseconds(calls, CPU, 16, clock)  # the first calls, 600 ms, are not counted
    assert clock.calls == [*"ab"] * 5  # rounds of 4, 3, 5 and 5 ms
    assert times == pytest.approx({"a": 2.5, "b": 2})


def test_two_samples_at_least(clock):
    times = race.milliseconds({"a": clock.call("a", 50), "b": clock.call("b", 60)}, CPU, 10, clock)
    assert clock.calls == [*"ab"] * 3
    assert times == pytest.approx({"a": 50, "b": 60})


def test_far_slower_calls_get_one_sample(clock):
    calls = {name: clock.call(name, ms) for name, ms in (("a", 2.1), ("b", 1), ("c", 1.9))}
    times = race.milliseconds(calls, CPU, 10, clock)
    assert clock.calls == [*"abc", *"abc", *"bc", *"bc"]
    assert times == pytest.approx({"a": 2.1, "b": 1, "c": 1.9})


@pytest.mark.parametrize("durations", [(-1,), (1, -1), (1, 1, -1)])
def test_calls_that_raise_are_out(clock, debug_lines, durations):
    calls = {"a": clock.call("a", *durations), "b": clock.call("b", 10)}
    assert race.milliseconds(calls, CPU, 100, clock) == pytest.approx({"b": 10})
    assert clock.calls.count("a") == len(durations)
    assert debug_lines() == ["a is out of the race: RuntimeError('illegal instruction')"]
    assert race.milliseconds({"a": clock.call("a", -1)}, CPU, 100, clock) == {}
    assert race.milliseconds({}, CPU, 100, clock) == {}


def test_interrupts_end_a_race(clock):
    def interrupted() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        race.milliseconds({"a": interrupted}, CPU, 10, clock)


def test_gpu_times_are_between_events_on_the_current_stream(clock, monkeypatch):
    log = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self, *stream: object) -> None:
            assert stream == ()  # the current one
            log.append("record")

        def synchronize(self) -> None:
            log.append("synchronize")

        def elapsed_time(self, end: Event) -> float:
            clock.ms += 1
            return 0.25

    gpu = torch.device("cuda", 3)
    devices = []
    cuda = SimpleNamespace(
        Event=Event,
        _sleep=lambda cycles: log.append("sleep"),
        device=lambda device: contextlib.nullcontext(devices.append(device)),
    )
    monkeypatch.setattr(torch, "cuda", cuda)
    times = race.milliseconds({"a": lambda: log.append("call")}, gpu, 3, clock)
    assert times == {"a": 0.25}
    assert log == ["call", *["sleep", "record", "call", "record", "synchronize"] * 3]
    assert set(devices) == {gpu}


class Call(NamedTuple):
    input: Tensor
    weights: list[Tensor]
    dilations: tuple[int, ...]
    activation: str


def call(shape=(1, 2, 3, 3), dtype=torch.float32, weights=1, dilations=(1,), activation="relu"):
    return Call(
        torch.zeros(shape, dtype=dtype), [torch.zeros(2, 2)] * weights, dilations, activation
    )


def _kernel(clock: Clock):
    run = clock.call("a", 1)
    return lambda arguments: run()


@pytest.fixture
def no_races_yet(monkeypatch):
    monkeypatch.setattr(race, "_remembered", {})


DIFFERENT = {
    "shape": lambda: call(shape=(1, 2, 3, 4)),
    "stride": lambda: call()._replace(input=torch.zeros(1, 3, 3, 2).permute(0, 3, 1, 2)),
    "dtype": lambda: call(dtype=torch.float16),
    "device": lambda: call()._replace(input=torch.zeros(1, 2, 3, 3, device="meta")),
    "number of weights": lambda: call(weights=2),
    "shape of weights": lambda: call()._replace(weights=[torch.zeros(2, 3)]),
    "dilations": lambda: call(dilations=(2,)),
    "activation": lambda: call(activation="none"),
}


@pytest.mark.parametrize("change", DIFFERENT)
def test_each_shape_races_for_itself(no_races_yet, clock, change):
    kernel = {"a": _kernel(clock)}
    race.run("op", call(), kernel, clock)
    race.run("op", call(), kernel, clock)
    num_calls = len(clock.calls)
    assert race.remembered("op", DIFFERENT[change]()) is None
    assert race.remembered("other", call()) is None
    race.run("op", DIFFERENT[change](), kernel, clock)
    assert len(clock.calls) == 2 * num_calls
    assert race.remembered("op", DIFFERENT[change]()) == pytest.approx({"a": 1})
    set_tf32(True)
    assert race.remembered("op", call()) is None


def test_the_oldest_race_is_forgotten(no_races_yet, clock, monkeypatch):
    monkeypatch.setattr(race, "MAX_REMEMBERED", 2)
    kernel = _kernel(clock)
    for dilation in (1, 2, 3):
        race.run("op", call(dilations=(dilation,)), {"a": kernel}, clock)
    known = [race.remembered("op", call(dilations=(d,))) is not None for d in (1, 2, 3)]
    assert known == [False, True, True]


def test_no_memory_for_the_copy(no_races_yet, debug_lines, monkeypatch):
    def clone(self):
        raise torch.OutOfMemoryError("tried to allocate 80 GiB")

    monkeypatch.setattr(Tensor, "clone", clone)
    race.run("op_", call(), {"a": lambda arguments: None})
    assert race.remembered("op_", call()) == {}  # it does not try again at every call
    assert debug_lines()[0] == "no race: tried to allocate 80 GiB"


def test_threads_race_once(no_races_yet):
    barrier, calls = threading.Barrier(2), []

    def kernel(arguments: Call) -> None:
        calls.append(threading.get_ident())
        time.sleep(0.02)

    def first_call() -> None:
        barrier.wait()
        race.run("op", call(), {"a": kernel})

    threads = [threading.Thread(target=first_call) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(calls)) == 1 and len(calls) == 3


# For real: the emulated kernels against the reference.


def operands(dtype=torch.bfloat16) -> tuple[Tensor, Tensor, Tensor]:
    x, weight = torch.randn(1, 8, 5, 7), torch.randn(8, 8, 3, 3) / 9
    nhwc = {"memory_format": torch.channels_last}
    return x.to(dtype, **nhwc), weight.to(dtype, **nhwc), torch.randn(8).to(dtype)


GEOMETRY = (1, 1), (2, 2), (2, 2), 1, "relu"


@pytest.fixture
def benchmark(monkeypatch, pretend_gpu):
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)


@pytest.fixture
def slow_reference(monkeypatch, request):
    """Let the reference of an op sleep, so that the emulated kernel wins."""
    kernel = registry._kernels[request.param]["reference"]

    def run(arguments):
        time.sleep(0.3)
        return kernel.run(arguments)

    monkeypatch.setitem(registry._kernels[request.param], "reference", kernel._replace(run=run))


def test_race_for_real(benchmark, debug_lines):
    x, weight, bias = operands()
    expected = F.conv2d(x, weight, bias, *GEOMETRY[:4]).relu()
    state = torch.get_rng_state()
    with registry.trace() as ran:
        for _ in range(2):
            torch.testing.assert_close(fused_conv2d(x, weight, bias, *GEOMETRY), expected)
    assert torch.equal(torch.get_rng_state(), state)
    (line,) = debug_lines()
    pattern = r"race of fused_conv2d 1x8x5x7, 8x8x3x3, bfloat16: (\w+) [\d.]+ ms, (\w+) [\d.]+ ms"
    ranking = re.fullmatch(pattern, line).groups()
    assert set(ranking) == {"emulated", "reference"}
    assert ran[-1] == ("fused_conv2d", ranking[0])


@pytest.mark.parametrize("slow_reference", ["fused_conv2d_add_"], indirect=True)
def test_winner_runs_and_the_residual_is_added_once(benchmark, slow_reference):
    x, weight, bias = operands()
    residual = torch.randn(1, 8, 5, 7).bfloat16().contiguous(memory_format=torch.channels_last)
    expected = (F.conv2d(x, weight, bias, *GEOMETRY[:4]).float() + residual).relu().bfloat16()
    for _ in range(2):
        with registry.trace() as ran:
            output = fused_conv2d_add_(residual.clone(), x, weight, bias, *GEOMETRY)
        torch.testing.assert_close(output, expected, rtol=2e-2, atol=2e-2)
    assert ran == [("fused_conv2d_add_", "emulated")]


@pytest.mark.parametrize("slow_reference", ["dilated_conv2d"], indirect=True)
def test_race_of_a_call_with_gradients(benchmark, slow_reference):
    x, weight, bias = (t.requires_grad_() for t in operands())
    seen = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: seen.append(t) or t, lambda t: t):
        output = dilated_conv2d(x, weight, bias, dilation=2)
    assert len(seen) <= 3  # those of one call
    output.sum().backward()
    copies = [t.detach().float().requires_grad_() for t in (x, weight, bias)]
    F.conv2d(*copies, padding=2, dilation=2).sum().backward()
    for tensor, copy in zip((x, weight, bias), copies):
        torch.testing.assert_close(tensor.grad.float(), copy.grad, rtol=2e-2, atol=5e-2)
    values = registry.arguments("dilated_conv2d", x, weight, bias, (2, 2), 1)
    assert registry.automatic("dilated_conv2d", values) == ("emulated", "reference")
