"""Tuning of the dispatch table on a simulated GPU, and the record of a model's calls."""

from __future__ import annotations

import math
import re
import threading
import time
import weakref
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from deeplab_fast import ASPP, DeepLabV3, dilated_conv2d
from deeplab_fast.backends import calls, dispatch_table, race, registry, tuning
from deeplab_fast.backends.race import milliseconds

from ..support.pretend_gpu import PretendGPU

pytestmark = pytest.mark.usefixtures("one_thread")

SMALL, LARGE = torch.randn(1, 8, 6, 6), torch.randn(1, 8, 24, 24)
WEIGHT = torch.randn(16, 8, 3, 3)
CPU = torch.device("cpu")


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    return PretendGPU(monkeypatch, tmp_path)


def convolve(*inputs):
    """A function that runs a convolution of each of the inputs."""
    return lambda: [dilated_conv2d(x, WEIGHT, dilation=2) for x in inputs]


def small_is_fast(name, output):
    """Times in ms: each kernel is the fastest for one of the two sizes, cuDNN never."""
    if name == "cuda/sm90":
        return 0.5 if output.size(2) < 10 else 3.0
    return {"triton": 0.9, "cuDNN": 2.0, "cuDNN, benchmark": 1.0}[name]


def chosen(x):
    with registry.trace() as ran:
        dilated_conv2d(x, WEIGHT, dilation=2)
    return [name for _, name in ran]


def test_fastest_kernel_of_each_shape_is_chosen(gpu):
    gpu.times = small_is_fast
    assert chosen(SMALL) == chosen(LARGE) == ["reference"]
    tuned = tuning.tune(convolve(SMALL, LARGE, SMALL), "cpu")
    assert gpu.timed == [(1, 16, 6, 6), (1, 16, 24, 24)]  # the third call equals the first
    assert chosen(SMALL) == ["cuda/sm90"] and chosen(LARGE) == ["triton"]
    assert tuned.failures == []
    times = {(row.shape, row.kernel): (row.median_ms, row.cudnn_ms) for row in gpu.rows()}
    assert times == {
        ("1x8x6x6 16x8x3x3 None 2 2 1", "cuda/sm90"): (0.5, 1.0),
        ("1x8x6x6 16x8x3x3 None 2 2 1", "triton"): (0.9, 1.0),
        ("1x8x24x24 16x8x3x3 None 2 2 1", "cuda/sm90"): (3.0, 1.0),
        ("1x8x24x24 16x8x3x3 None 2 2 1", "triton"): (0.9, 1.0),
    }
    row = gpu.rows()[0]
    assert (row.device, row.gpu, row.op) == ("a pretended GPU", "PretendGPU 1000", "dilated_conv2d")
    assert row.shape_bucket == "fp32 NCHW 8->16 3x3 inside 5/8 pixels 2^5"
    assert row.versions == dispatch_table.versions() and row.commit and row.date


def test_measured_times(gpu, monkeypatch):
    """With the real clock: a kernel that takes 20 ms, and one that takes no time."""
    monkeypatch.setattr(race, "milliseconds", milliseconds)
    monkeypatch.setattr(tuning, "BUDGET_MS", 1)
    outputs = []

    def first_output(output):
        outputs.append(output)
        return outputs[0]

    def slow(output):
        time.sleep(0.02)
        return output

    gpu.wrong = {"triton": slow, "cuda/sm90": first_output}
    tuning.tune(convolve(SMALL), "cpu")
    times = {row.kernel: row.median_ms for row in gpu.rows()}
    assert times["triton"] > 20 > times["cuda/sm90"] > 0
    assert len(outputs) >= 4  # the check, a warm-up and two samples


def test_slower_kernels_are_not_chosen(gpu):
    gpu.times = lambda name, output: {"cuDNN": 1.0, "cuDNN, benchmark": 2.0}.get(name, 1.1)
    tuned = tuning.tune(convolve(SMALL), "cpu")
    assert chosen(SMALL) == ["reference"]
    assert {row.cudnn_ms for row in gpu.rows()} == {1.0}  # the faster of cuDNN's two times
    assert str(tuned).endswith("1.0000   1.1000  cuDNN")


def test_table_of_a_model(gpu):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList(Block() for _ in range(3))

        def forward(self, x):
            return [block(x) for block in self.blocks], dilated_conv2d(LARGE, WEIGHT, dilation=2)

    class Block(nn.Module):
        def forward(self, x):
            return dilated_conv2d(x, WEIGHT, dilation=2)

    gpu.times = small_is_fast
    model = Model()
    tuned = tuning.tune(lambda: model(SMALL), "cpu", model)
    assert str(tuned).splitlines() == [
        "layer                op              shapes                        cuDNN ms  ours ms  "
        "choice",
        "blocks.0 and 2 more  dilated_conv2d  1x8x6x6, 16x8x3x3, float32      1.0000   0.5000  "
        "cuda/sm90",
        "-                    dilated_conv2d  1x8x24x24, 16x8x3x3, float32    1.0000   0.9000  "
        "triton",
    ]
    assert [result.layers for result in tuned.results] == [[f"blocks.{i}" for i in range(3)], [""]]


def test_choice_depends_on_the_other_shapes_of_the_bucket(gpu):
    """A kernel has to be faster than cuDNN for all of them."""
    times = {"cuda/sm90": (0.5, 1.5), "triton": (0.9, 0.9)}
    gpu.times = lambda name, output: times.get(name, (1.0, 1.0))[output.size(2) - 30]
    tuned = tuning.tune(convolve(torch.randn(1, 8, 30, 30), torch.randn(1, 8, 31, 30)), "cpu")
    buckets = {row.shape_bucket for row in gpu.rows()}
    assert buckets == {"fp32 NCHW 8->16 3x3 inside 8/8 pixels 2^9"}
    assert [line.split()[-2:] for line in str(tuned).splitlines()[1:]] == [
        ["0.5000", "triton"], ["0.9000", "triton"]
    ]  # fmt: skip


def test_calls_that_only_cudnn_supports_are_not_timed(gpu):
    gpu.unsupported = {
        "cuda/sm90": lambda arguments: "no",
        "triton": lambda arguments: "small" if arguments.input.size(2) < 10 else None,
    }
    tuned = tuning.tune(convolve(SMALL, LARGE), "cpu")
    assert gpu.timed == [(1, 16, 24, 24)]
    assert str(tuned).splitlines()[1].split()[-3:] == ["-", "-", "cuDNN"]
    assert [row.kernel for row in gpu.rows()] == ["triton"]


def _zeros_at_the_border(outputs):
    return outputs * (torch.arange(outputs.size(2)) > 0)[:, None]


def _raises(outputs):
    raise RuntimeError("no kernel image is available\nfor this device")


@pytest.mark.parametrize(
    "wrong, message",
    [
        (lambda outputs: outputs * 1.01, r"relative error 0\.01 \(expected at most 1e-05\)"),
        (lambda outputs: outputs * float("nan"), r"relative error nan \(expected"),
        (lambda outputs: outputs[:, :, 1:], r"relative error inf \(expected"),
        (_zeros_at_the_border, r"relative error 0\.\d+ \(expected"),
        (_raises, "RuntimeError: no kernel image is available"),
    ],
)
def test_wrong_kernel_is_reported_and_not_chosen(gpu, capsys, wrong, message):
    gpu.times = small_is_fast
    gpu.wrong = {"cuda/sm90": wrong}
    tuned = tuning.tune(convolve(SMALL), "cpu")
    (line,) = tuned.failures
    assert capsys.readouterr().err == f"deeplab_fast: {line}\n"
    start, _, why = line.partition(" 1x8x6x6 16x8x3x3 None 2 2 1: ")
    assert start == "cuda/sm90: dilated_conv2d"
    assert re.fullmatch(message + ".*", why)
    assert {row.kernel: row.median_ms for row in gpu.rows()} == {
        "cuda/sm90": math.inf, "triton": 0.9
    }  # fmt: skip
    assert chosen(SMALL) == ["triton"]


def test_wrong_kernel_is_not_chosen_for_similar_shapes(gpu):
    """It was correct, and the fastest, for another shape of the same bucket."""
    first, second = torch.randn(1, 8, 30, 30), torch.randn(1, 8, 31, 30)
    gpu.times = lambda name, output: {"cuda/sm90": 0.5, "triton": 0.9}.get(name, 1.0)
    gpu.wrong = {"cuda/sm90": lambda outputs: outputs + (outputs.size(2) == 31)}
    tuned = tuning.tune(convolve(first), "cpu")
    assert chosen(first) == chosen(second) == ["cuda/sm90"] and not tuned.failures
    tuned = tuning.tune(convolve(second), "cpu")
    assert chosen(first) == chosen(second) == ["triton"] and len(tuned.failures) == 1


def test_kernel_that_writes_nothing_is_wrong(gpu):
    """Even if an allocator would give it the memory of the correct output of another kernel."""
    correct = []

    def remembered(output):
        correct.append((weakref.ref(output), output.clone()))
        return output

    def not_written(output):
        is_freed, values = correct[0][0]() is None, correct[0][1]
        return values if is_freed else torch.zeros_like(output)

    gpu.wrong = {"cuda/sm90": remembered, "triton": not_written}
    (failure,) = tuning.tune(convolve(SMALL), "cpu").failures
    assert failure.startswith("triton: ")


def test_call_without_a_correct_kernel(gpu):
    gpu.wrong = dict.fromkeys(("cuda/sm90", "triton"), lambda outputs: outputs + 1)
    tuned = tuning.tune(convolve(SMALL), "cpu")
    assert [row.median_ms for row in gpu.rows()] == [math.inf, math.inf]
    assert len(tuned.failures) == 2 and str(tuned).endswith("1.0000   failed  cuDNN")
    assert tuning.tune(convolve(SMALL), "cpu").failures == []  # it was measured already


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
def test_interrupted_tuning_goes_on(gpu, error):
    def times(name, output):
        if output.size(2) > 20:
            raise error
        return small_is_fast(name, output)

    middle = torch.randn(1, 8, 12, 12)
    gpu.times = times
    with pytest.raises(error):
        tuning.tune(convolve(SMALL, middle, LARGE), "cpu")
    assert len(gpu.rows()) == 4
    assert chosen(SMALL) == ["cuda/sm90"] and chosen(LARGE) == ["reference"]

    gpu.times, gpu.timed = small_is_fast, []
    tuned = tuning.tune(convolve(SMALL, middle, LARGE), "cpu")
    assert gpu.timed == [(1, 16, 24, 24)]
    assert len(gpu.rows()) == 6 and chosen(LARGE) == ["triton"]
    assert [len(result.rows) for result in tuned.results] == [2, 2, 2]  # the earlier ones too


@pytest.mark.parametrize("outdated", ["device_class", "versions"])
def test_rows_of_other_gpus_and_versions_do_not_count(gpu, monkeypatch, outdated):
    tuning.tune(convolve(SMALL), "cpu")
    monkeypatch.setattr(dispatch_table, outdated, lambda *args: "another")
    tuning.tune(convolve(SMALL), "cpu")
    assert gpu.timed == [(1, 16, 6, 6)] * 2


def test_table_that_cannot_be_written(gpu, tmp_path):
    gpu.table.parent.write_text("a file, where a folder has to be")
    with pytest.raises(OSError, match=f"cannot write your dispatch table {gpu.table}: "):
        tuning.tune(convolve(SMALL), "cpu")
    assert gpu.timed == [(1, 16, 6, 6)]


def test_nothing_to_tune_on_a_cpu():
    tuned = tuning.tune(pytest.fail, "cpu")
    assert str(tuned) == "nothing to tune on cpu: kernels are chosen by their speed on GPUs only"
    assert not tuning.can_tune(CPU) and tuning.can_tune(torch.device("cuda"))


def test_function_is_expected(gpu):
    with pytest.raises(TypeError, match="^run: expected a function, got Tensor$"):
        tuning.tune(SMALL, "cpu")


def test_nothing_to_tune_in_a_model_without_our_ops(gpu):
    tuned = tuning.tune(lambda: nn.Conv2d(8, 8, 3)(SMALL), "cpu")
    assert str(tuned) == "nothing to tune: the model called none of the ops that cuDNN has too"


def test_deterministic_algorithms_are_not_tuned(gpu, monkeypatch):
    torch.use_deterministic_algorithms(True)
    with pytest.raises(RuntimeError, match="^tune: expected .*use_deterministic_algorithms"):
        tuning.tune(pytest.fail, "cpu")
    torch.use_deterministic_algorithms(False)
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    with pytest.raises(RuntimeError, match="deterministic = False"):
        tuning.tune(pytest.fail, "cpu")


def test_tuning_leaves_the_random_state_alone(gpu):
    state = torch.random.get_rng_state()
    tuning.tune(convolve(SMALL), "cpu")
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize("benchmark", [False, True])
def test_each_algorithm_of_cudnn_is_chosen_in_its_own_thread(monkeypatch, benchmark):
    """In one thread cuDNN would keep the algorithm that it chose first."""
    seen = []

    def captured(run):
        run()
        seen.append((threading.get_ident(), torch.backends.cudnn.benchmark))
        return SimpleNamespace(replay=lambda: "replayed"), None

    monkeypatch.setattr(tuning, "captured", captured)
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    grad = []
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", not benchmark)
    replay = tuning._replay(
        lambda: grad.append(torch.is_grad_enabled()), torch.device("cuda"), benchmark
    )
    assert replay() == "replayed" and grad == [False]
    ((thread, flag),) = seen
    assert thread != threading.get_ident() and flag is benchmark
    assert torch.backends.cudnn.benchmark is not benchmark


def test_gpu_that_fails_to_synchronize_is_unusable(monkeypatch):
    def lost(device):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "synchronize", lost)
    assert tuning.is_unusable(torch.device("cuda")) and not tuning.is_unusable(CPU)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    assert not tuning.is_unusable(torch.device("cuda"))


def test_tuning_stops_when_the_gpu_is_unusable(gpu, monkeypatch):
    gpu.times = small_is_fast
    gpu.wrong = {"triton": lambda outputs: outputs if outputs.size(2) < 10 else _raises(outputs)}
    monkeypatch.setattr(tuning, "is_unusable", lambda device: True)
    expected = r"triton: dilated_conv2d 1x8x24x24 .*: RuntimeError: no kernel image is available \("
    with pytest.raises(tuning.UnusableGPU, match=expected):
        tuning.tune(convolve(SMALL, LARGE), "cpu")
    assert len(gpu.rows()) == 2


def test_cudnn_is_timed_with_and_without_its_own_trial(gpu, monkeypatch):
    flags = []

    def replay(run, device, benchmark=False):
        flags.append(benchmark)
        return run

    monkeypatch.setattr(tuning, "_replay", replay)
    tuning.tune(convolve(SMALL), "cpu")
    assert flags == [False, False, False, True]  # two kernels, and cuDNN twice


def test_recorded_calls_run_on_the_reference(gpu):
    """Whatever was measured, and without the race that cudnn.benchmark allows."""
    gpu.times = small_is_fast
    tuning.tune(convolve(SMALL), "cpu")
    assert chosen(SMALL) == ["cuda/sm90"]
    with registry.trace() as ran:
        calls.record(convolve(SMALL))
    assert ran == [("dilated_conv2d", "reference")]


def test_recorded_calls_have_the_layout_of_the_tensors():
    x = LARGE.to(memory_format=torch.channels_last)[:, :, 1:, ::2]
    recorded = calls.record(convolve(x, LARGE.new_empty(0, 8, 5, 5)))
    (call,) = recorded  # none on the empty tensor
    assert (call.op, call.shape) == ("dilated_conv2d", "1x8x23x12 16x8x3x3 None 2 2 1")
    input, weight, bias, dilation, groups = call.arguments
    assert input.is_meta and weight.is_meta  # the data are not kept
    assert input.stride() == x.stride() and input.dtype == x.dtype
    assert call.shape_bucket == registry.shape_buckets["dilated_conv2d"](
        registry.arguments("dilated_conv2d", x, WEIGHT, None, [2, 2], 1)
    )


def test_recorded_calls_of_training():
    model = DeepLabV3("mobilenet_v2", 3, 16, (2,), head_conv=False).train()
    images = torch.randn(2, 3, 33, 33)
    recorded = calls.record(lambda: model(images)["out"].sum().backward(), model)
    assert [(call.op, call.layer) for call in recorded] == [
        ("parallel_dilated_conv2d_and_mean", "classifier.0"),
        ("parallel_dilated_conv2d_backward", ""),
    ]


def test_recording_does_not_change_how_a_model_runs():
    """ASPP calls its submodules one by one if they are hooked."""
    aspp = ASPP(8, (2,)).eval()
    (call,) = calls.record(lambda: aspp(SMALL), aspp)
    assert call.op == "parallel_dilated_conv2d_and_mean"
    assert calls.record(lambda: None) == []
    for hooks in (
        nn.modules.module._global_forward_hooks,
        nn.modules.module._global_forward_pre_hooks,
    ):
        assert not hooks


def test_layers_after_an_exception():
    """A module that raises an exception is no longer the one that runs."""

    class Fails(nn.Module):
        def forward(self):
            raise ValueError

    def run():
        with pytest.raises(ValueError):
            failing()
        convolve(SMALL)()

    failing = Fails()
    model = nn.ModuleDict({"failing": failing})
    assert [call.layer for call in calls.record(run, model)] == [""]


@pytest.mark.parametrize(
    "like",
    [
        torch.empty(2, 3, 4, 5).to(memory_format=torch.channels_last),
        torch.empty(2, 3, 8, 5)[:, :, ::2],
        torch.empty(()).expand(2, 3, 4, 5),
        torch.empty(2, 1, 4, 1, dtype=torch.bfloat16).expand(2, 3, 4, 5),
        torch.empty(0, 3),
        torch.empty(7, dtype=torch.float16),
    ],
    ids=lambda like: f"{tuple(like.shape)} {like.stride()}",
)
def test_scratch_arguments(like):
    call = calls.Call("an op", ([calls._without_data(like), None, 3], "relu"))
    ([tensor, none, three], relu) = call.scratch_arguments(CPU)
    assert (none, three, relu) == (None, 3, "relu")
    assert (tensor.shape, tensor.stride(), tensor.dtype) == (like.shape, like.stride(), like.dtype)
    assert tensor.device == CPU and (tensor.abs() < 1).all() and tensor.isfinite().all()
    assert tensor.numel() < 2 or tensor.float().std() > 0 or like.stride() == (0, 0, 0, 0)
