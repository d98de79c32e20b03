"""Automatic choice on a GPU: a kernel that was measured to be faster than cuDNN, else cuDNN."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch

from deeplab_fast import DeepLabV3
from deeplab_fast.backends import dispatch_table, race, registry
from deeplab_fast.ops import fused_conv2d
from deeplab_fast.ops.shape_bucket import shape_bucket

from ..support.backends import GpuTensor, set_tf32

HOPPER = "sm_90 with 132 SMs"
GPU = GpuTensor()


class Call(NamedTuple):
    x: torch.Tensor
    shape: str


@pytest.fixture
def gpu(monkeypatch, nondeterministic):
    """A simulated Hopper GPU and an op that has kernels on all backends and in cuDNN."""
    properties = SimpleNamespace(major=9, minor=0, multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(race, "_remembered", {})
    for name in dispatch_table.KERNELS:
        backend = registry.Backend(lambda device_type: None, target=None, load=None)
        monkeypatch.setitem(registry._backends, name, backend)
    kernels = {
        name: registry.Kernel(lambda arguments, name=name: name, registry._supports_everything)
        for name in (*dispatch_table.KERNELS, "reference")
    }
    monkeypatch.setitem(registry._kernels, "an_op", kernels)
    monkeypatch.setitem(registry._argument_types, "an_op", Call)
    monkeypatch.setitem(registry.shape_buckets, "an_op", lambda arguments: arguments.shape)
    dispatch_table.device_class.cache_clear()
    yield kernels
    dispatch_table.device_class.cache_clear()


@pytest.fixture
def table(gpu, user_table, monkeypatch, tmp_path):
    """A function that writes the shipped table, of rows "kernel median_ms cudnn_ms"."""

    def write(*rows: str, shape: str = "wide", device: str = HOPPER, op: str = "an_op") -> None:
        lines = [",".join(dispatch_table.Row._fields)]
        for number, row in enumerate(rows):
            kernel, *times = row.split()
            lines.append(f"{device},{op},{shape},{kernel},{','.join(times)},shape {number},,,,")
        (tmp_path / "dispatch_table.csv").write_text("\n".join(lines))

    monkeypatch.setattr(dispatch_table, "PATH", tmp_path / "dispatch_table.csv")
    return write


def chosen(shape: str = "wide", requested: str = "") -> str:
    registry.forget_plans()
    return registry.run("an_op", GPU, shape, backend=requested)


@pytest.mark.parametrize(
    "rows, expected",
    [
        (["cuda/sm90 0.9 1"], "cuda/sm90"),
        (["cuda/sm90 1.1 1"], "reference"),
        (["cuda/sm90 1 1"], "reference"),
        (["cuda/sm90 0.9 1", "cuda/sm80 0.8 1", "triton 0.85 1"], "cuda/sm80"),
        (["cuda/sm90 1.2 1", "cuda/sm80 1.3 1", "triton 0.99 1"], "triton"),
        (["cuda/sm90 2 3", "triton 1 1.2"], "cuda/sm90"),  # 0.67 and 0.83 of cuDNN's time
        ([], "reference"),
    ],
)
def test_fastest_kernel_that_beats_cudnn(table, rows, expected):
    table(*rows)
    assert chosen() == expected


@pytest.mark.parametrize("order", itertools.permutations(range(3)), ids=str)
def test_kernel_slower_for_one_shape_of_a_bucket(table, order):
    """The worst row of each kernel counts, in whatever order the rows are."""
    for rows in (
        ("cuda/sm90 0.5 1", "triton 0.9 1", "cuda/sm90 1.01 1"),
        ("cuda/sm90 0.5 1", "triton 0.6 1", "cuda/sm90 0.7 1"),  # at worst 0.6 against 0.7
    ):
        table(*(rows[i] for i in order))
        dispatch_table.fastest_kernels.cache_clear()
        assert chosen() == "triton"


@pytest.mark.parametrize(
    "elsewhere", [{"shape": "deep"}, {"device": "sm_80 with 108 SMs"}, {"op": "aspp"}]
)
def test_unmeasured_shapes_use_the_reference(table, elsewhere):
    table("cuda/sm90 0.5 1", **elsewhere)
    assert chosen() == "reference"


def test_unsupported_kernel_is_skipped(table, gpu, monkeypatch):
    table("cuda/sm90 0.5 1", "triton 0.9 1")
    unsupported = gpu["cuda/sm90"]._replace(unsupported_reason=lambda arguments: "odd channels")
    monkeypatch.setitem(registry._kernels["an_op"], "cuda/sm90", unsupported)
    assert chosen() == "triton"


def test_forced_backends_and_cpu_do_not_read_the_table(table, monkeypatch):
    table("cuda/sm90 2 1")
    assert chosen(requested="cuda/sm90") == "cuda/sm90"
    monkeypatch.setattr(dispatch_table, "fastest_kernels", None)
    assert chosen(requested="triton") == "triton"
    for op in registry.ops():
        assert registry.automatic(op, (torch.empty(0),)) == registry.order("cpu")
    assert registry.automatic("upsample_argmax", (GPU,)) == registry.order("cuda")


def test_table_is_read_once(table, monkeypatch):
    table("cuda/sm90 0.5 1", op="aspp")
    monkeypatch.setitem(registry.shape_buckets, "an_op", None)
    assert chosen() == "reference"
    dispatch_table.PATH.unlink()
    assert chosen() == "reference"


@pytest.mark.parametrize(
    "text, message",
    [
        ("", r"expected the columns device,op,shape_bucket,kernel,median_ms,cudnn_ms"),
        ("device,op\n", r"expected the columns device,op,"),
        ("{head}\na,b\n", r"line 2: expected 11 values, got 2"),
        (
            "{head}\na,b,c,cuda/sm90,1,2,,,,,\na,b,c,cuda/sm90,fast,2,,,,,\n",
            r"line 3: .*ms, got 'fast' and",
        ),
        (
            "{head}\na,b,c,cuda/sm90,1,-2,,,,,\n",
            r"line 2: expected two times in ms, got '1' and '-2'",
        ),
        ("{head}\na,b,c,cuda/sm90,nan,2,,,,,\n", r"line 2: expected two times in ms"),
        ("{head}\na,b,c,cudnn,1,2,,,,,\n", r"expected a kernel of cuda/sm90, .*, got 'cudnn'"),
    ],
)
def test_invalid_table(table, text, message):
    dispatch_table.PATH.write_text(text.format(head=",".join(dispatch_table.Row._fields)))
    with pytest.raises(ValueError, match=rf"dispatch_table\.csv.*{message}"):
        chosen()


# The user's own table.


def row(kernel="triton", median_ms=1.0, cudnn_ms=2.0, shape="shape 0", bucket="wide", **others):
    return dispatch_table.Row(
        HOPPER, "an_op", bucket, kernel, median_ms, cudnn_ms, shape, "H100",
        dispatch_table.versions(), "-", "2026-12-01",
    )._replace(**others)  # fmt: skip


def test_rows_of_the_user(table, user_table):
    table("triton 3 2", "cuda/sm80 1 2")
    assert chosen() == "cuda/sm80"
    dispatch_table.add([row()])  # replaces the shipped time of the same shape and kernel
    assert chosen() == "triton"
    assert dispatch_table.fastest_kernels(GPU.device)["an_op"]["wide"] == ("triton", "cuda/sm80")
    dispatch_table.add([row(shape="another", median_ms=2.1)])  # slower on a shape of the bucket
    assert dispatch_table.fastest_kernels(GPU.device)["an_op"]["wide"] == ("cuda/sm80",)
    dispatch_table.add([row("cuda/sm90", 0.25, bucket="deep"), row(median_ms=0.125)])
    assert chosen("deep") == "cuda/sm90"
    expected = [
        row("cuda/sm90", 0.25, bucket="deep"),
        row(shape="another", median_ms=2.1),
        row(median_ms=0.125),
    ]
    assert sorted(dispatch_table.read(user_table)) == sorted(expected)
    assert {path.name for path in user_table.parent.iterdir()} == {
        "dispatch_table.csv", "dispatch_table.csv.lock"
    }  # fmt: skip


def test_adding_rows_forgets_choices(table):
    table()
    assert registry.run("an_op", GPU, "wide") == "reference"
    dispatch_table.add([row()])
    assert registry.run("an_op", GPU, "wide") == "triton"


@pytest.mark.parametrize(
    "package",
    ["deeplab_fast 0.0.1, cuDNN {cudnn}, Triton {triton}", "", "{old}, cuDNN 8, Triton {triton}"],
)
def test_rows_of_other_versions_are_out_of_date(table, package):
    table("cuda/sm80 1 2")
    ours = dispatch_table.versions()
    assert ours.startswith("deeplab_fast ") and ", cuDNN " in ours and ", Triton " in ours
    cudnn, triton = (part.split()[1] for part in ours.split(", ")[1:])
    versions = package.format(old=ours.split(",")[0], cudnn=cudnn, triton=triton)
    dispatch_table.add([row(median_ms=0.1, versions=versions), row("cuda/sm80", 3, versions="-")])
    assert chosen() == "cuda/sm80"
    assert len(dispatch_table.user_rows()) == 2
    dispatch_table.add([row(median_ms=0.1)])
    assert chosen() == "triton" and len(dispatch_table.user_rows()) == 2


HEAD = ",".join(dispatch_table.Row._fields)
DAMAGED = {
    "other columns": b"device,op,kernel\na,b,c\n",
    "empty": b"",
    "garbage": b"hello",
    "half a line": f"{HEAD}\nsm_90,an_op,wi".encode(),
    "a field of a megabyte": f'{HEAD}\n"'.encode() + b"x" * 2**20,
    "binary": bytes(range(256)),
    "NUL": f"{HEAD}\n\0".encode(),
    "another encoding": f"{HEAD}\n\xe4".encode("latin-1"),
    "a folder": None,
}


@pytest.mark.parametrize("content", DAMAGED.values(), ids=DAMAGED)
def test_damaged_table_of_the_user_is_ignored(table, user_table, caplog, content):
    table("cuda/sm80 1 2")
    user_table.parent.mkdir()
    if content is None:
        user_table.mkdir()
    else:
        user_table.write_bytes(content)
    for _ in range(2):
        dispatch_table.fastest_kernels.cache_clear()
        assert chosen() == "cuda/sm80"
    (record,) = caplog.records
    assert record.name == "deeplab_fast" and record.levelname == "WARNING"
    assert str(user_table) in record.getMessage() and "\n" not in record.getMessage()
    if content is None:
        with pytest.raises(OSError, match=f"cannot write your dispatch table {user_table}: .*dir"):
            dispatch_table.add([row()])
    else:
        dispatch_table.add([row(median_ms=0.5)])
        assert dispatch_table.read(user_table) == [row(median_ms=0.5)]
        assert chosen() == "triton"


def test_no_folder_to_write_to(table, user_table):
    table("cuda/sm80 1 2")
    user_table.parent.write_text("a file where the folder should be")
    with pytest.raises(OSError, match=r"cannot write .*: .*\(expected a folder to write to\)$"):
        dispatch_table.add([row()])
    assert chosen() == "cuda/sm80"


@pytest.mark.parametrize(
    "change, message",
    [({"kernel": "cudnn"}, "expected a kernel"), ({"median_ms": 0.0}, "times in ms, got 0.0")],
)
def test_invalid_rows_are_not_added(table, user_table, change, message):
    dispatch_table.add([row()])
    with pytest.raises(ValueError, match=f"^row 1: .*{message}"):
        dispatch_table.add([row(median_ms=5), row()._replace(**change)])
    assert dispatch_table.read(user_table) == [row()]


ADD = """
import sys, time
from pathlib import Path
from deeplab_fast.backends import dispatch_table
me, path = sys.argv[1], Path(sys.argv[2])
dispatch_table.user_path = lambda: path
path.parent.joinpath(me).touch()
while len([*path.parent.glob("process *")]) < 2:
    time.sleep(0.001)
for i in range(50):
    row = dispatch_table.Row("gpu", "op", "bucket", "triton", 1.0, 2.0, f"{me} {i}", *4 * "-")
    dispatch_table.add([row])
"""


def test_two_processes_add_rows(user_table):
    user_table.parent.mkdir()
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", ADD, f"process {i}", str(user_table)],
            cwd=user_table.parent,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        for i in range(2)
    ]
    assert [process.wait(120) for process in processes] == [0, 0]
    shapes = {row.shape for row in dispatch_table.read(user_table)}
    assert shapes == {f"process {i} {j}" for i in range(2) for j in range(50)}


def test_path_of_the_users_table(monkeypatch, tmp_path):
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert dispatch_table.user_path() == tmp_path / "deeplab_fast" / "dispatch_table.csv"


# Deterministic mode and races.


def test_deterministic_mode_prefers_our_kernels(table, gpu, monkeypatch):
    table("triton 1 2")
    for name in ("cuda", "triton"):
        backend = registry.Backend(lambda device_type: None, target=None, load=None)
        monkeypatch.setitem(registry._backends, name, backend)
    gpu["cuda"] = gpu["triton"]._replace(run=lambda arguments: "cuda")
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    monkeypatch.setattr(race, "run", None)
    torch.use_deterministic_algorithms(True)
    assert chosen("a shape that nobody measured") == "cuda"
    gpu["cuda"] = gpu["cuda"]._replace(unsupported_reason=lambda arguments: "odd channels")
    assert chosen() == "triton"
    gpu["triton"] = gpu["triton"]._replace(unsupported_reason=lambda arguments: "odd channels")
    assert chosen() == "reference"


class Races:
    """Replaces race.milliseconds; notes who raced."""

    def __init__(self, **times: float) -> None:
        self.times, self.raced = times, []

    def __call__(self, calls, device, budget_ms, clock):
        assert device == GPU.device and budget_ms == race.BUDGET_MS
        assert [call() for call in calls.values()] == list(calls)
        self.raced.append(list(calls))
        return {name: self.times[name] for name in calls if name in self.times}


@pytest.mark.parametrize(
    "times, expected",
    [
        ({"cuda/sm90": 1, "cuda/sm80": 2, "reference": 3}, "cuda/sm90"),
        ({"cuda/sm90": 3, "cuda/sm80": 2, "reference": 3}, "cuda/sm80"),
        ({"cuda/sm90": 3, "cuda/sm80": 4, "reference": 2}, "reference"),
        ({"cuda/sm80": 1, "reference": 2}, "cuda/sm80"),  # the other raised an exception
        ({"cuda/sm90": 1}, "reference"),  # the reference raised one
        ({}, "reference"),
    ],
)
def test_winner_of_a_race(table, monkeypatch, times, expected):
    table("triton 1 2")
    races = Races(**times)
    monkeypatch.setattr(race, "milliseconds", races)
    assert chosen("deep") == "reference" and races.raced == []  # cudnn.benchmark is off
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    assert [chosen("deep") for _ in range(2)] == [expected] * 2
    assert races.raced == [["cuda/sm90", "cuda/sm80", "reference"]]  # Triton compiles for seconds
    assert chosen() == "triton" and len(races.raced) == 1  # the table decides where it has rows
    assert registry.preference("an_op", Call(GPU, "deep")).basis == "race"
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    assert chosen("deep") == "reference"


def test_triton_races_where_no_compiled_kernel_can(table, gpu, monkeypatch):
    table()
    for name in ("cuda/sm90", "cuda/sm80"):
        gpu[name] = gpu[name]._replace(unsupported_reason=lambda arguments: "odd channels")
    races = Races(triton=1, reference=2)
    monkeypatch.setattr(race, "milliseconds", races)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    assert chosen() == "triton" and races.raced == [["triton", "reference"]]


def test_no_race_during_capture_and_compilation(table, monkeypatch):
    table()
    monkeypatch.setattr(race, "milliseconds", Races(**{"cuda/sm80": 1, "reference": 2}))
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    for module, name in ((registry, "is_capturing"), (torch.compiler, "is_compiling")):
        with monkeypatch.context() as patch:
            patch.setattr(module, name, lambda: True)
            assert chosen() == "reference"
    assert chosen() == "cuda/sm80"  # races at the first call that can
    monkeypatch.setattr(registry, "is_capturing", lambda: True)
    assert chosen() == "cuda/sm80"


def test_installed_table():
    """The installed table is valid, and its rows name existing ops."""
    for row in dispatch_table.read(dispatch_table.PATH):
        assert row.op in registry.shape_buckets
        assert row.shape and row.gpu and row.versions and row.commit and row.date


def test_ops_with_a_vendor_library():
    ops = {op for op in registry.ops() if registry.depends_on_measurements(op, "cuda")}
    assert ops == {op for op in registry.ops() if not op.startswith("upsample_")}
    assert not any(registry.depends_on_measurements(op, "cpu") for op in registry.ops())


def bucket_of(*shape: int, dilations: tuple[int, ...], channels: int = 256, **options) -> str:
    """The shape bucket of ASPP's branches."""
    x = torch.empty(shape, device="meta", dtype=options.pop("dtype", torch.bfloat16))
    kernels = [1] * (dilations[0] == 1) + [3] * (len(dilations) - (dilations[0] == 1))
    weights = [torch.empty(channels, shape[1], k, k, device="meta") for k in kernels]
    x = x.to(memory_format=options.pop("memory_format", torch.channels_last))
    return shape_bucket(x, weights, [(dilation, dilation) for dilation in dilations], **options)


def test_buckets_of_deeplab_shapes():
    aspp = "bf16 channels_last 2048->1024 1x1,3x3,3x3,3x3"
    for shape, dilations, rest in (
        ((1, 2048, 33, 33), (1, 6, 12, 18), "inside 5/8 pixels 2^10"),
        ((8, 2048, 33, 33), (1, 6, 12, 18), "inside 5/8 pixels 2^13"),
        ((1, 2048, 65, 65), (1, 12, 24, 36), "inside 5/8 pixels 2^12"),
        ((8, 2048, 65, 65), (1, 12, 24, 36), "inside 5/8 pixels 2^15"),
        ((16, 2048, 65, 65), (1, 12, 24, 36), "inside 5/8 pixels 2^16"),
        ((1, 2048, 64, 128), (1, 6, 12, 18), "inside 7/8 pixels 2^13"),
        ((1, 2048, 128, 256), (1, 12, 24, 36), "inside 7/8 pixels 2^15"),
    ):
        assert bucket_of(*shape, dilations=dilations) == f"{aspp} {rest}"


def test_buckets_distinguish_properties_that_affect_speed():
    alike = bucket_of(8, 512, 65, 65, dilations=(2,))
    assert alike == "bf16 channels_last 512->256 3x3 inside 8/8 pixels 2^15"
    assert alike == bucket_of(8, 512, 68, 68, dilations=(3,))
    differing = [
        bucket_of(8, 512, 65, 65, dilations=(12,)),
        bucket_of(8, 512, 65, 65, dilations=(24,)),
        bucket_of(8, 512, 65, 65, dilations=(1,)),
        bucket_of(4, 512, 65, 65, dilations=(2,)),
        bucket_of(8, 256, 65, 65, dilations=(2,)),
        bucket_of(8, 512, 65, 65, dilations=(2,), channels=21),
        bucket_of(8, 512, 65, 65, dilations=(2,), groups=512),
        bucket_of(8, 512, 65, 65, dilations=(2,), dtype=torch.float16),
        bucket_of(8, 512, 65, 65, dilations=(2,), dtype=torch.float32),
        bucket_of(8, 512, 65, 65, dilations=(2,), memory_format=torch.contiguous_format),
        bucket_of(8, 512, 65, 65, dilations=(2,), output_mask=[True, False, False]),
        bucket_of(8, 512, 65, 65, dilations=(2,), output_mask=[False, True, True]),
    ]
    assert len({alike, *differing}) == 13
    assert differing[-1].endswith(" dweight dbias")
    set_tf32(True)
    assert bucket_of(8, 512, 65, 65, dilations=(2,), dtype=torch.float32).startswith("tf32 ")


def test_share_of_taps_inside_the_map():
    for size, kernel, dilation in (((7, 4), 3, 2), ((5, 5), 5, 3), ((6, 9), 3, 40), ((1, 1), 3, 1)):
        x, weight = torch.ones(1, 1, *size), torch.ones(1, 1, kernel, kernel)
        padding = dilation * (kernel // 2)
        products = torch.nn.functional.conv2d(x, weight, None, 1, padding, dilation).sum().item()
        eighths = -(-8 * products // (x.numel() * weight.numel()))
        assert f"inside {eighths:.0f}/8" in shape_bucket(x, [weight], [(dilation, dilation)])


def test_buckets_of_unusual_calls():
    """Empty tensors and geometries that only the reference supports have buckets, too."""
    assert "pixels 2^0" in bucket_of(0, 8, 5, 5, dilations=(1,))
    assert "2x2" in shape_bucket(torch.empty(1, 1, 0, 3), [torch.empty(0, 1, 2, 2)], [(1, 9)])


def test_buckets_of_all_convolutions_of_a_model(monkeypatch):
    """Training and prepared inference of a model name a bucket for each convolution."""
    named = []

    def automatic(op, arguments):
        if op in registry.shape_buckets:
            named.append((op, registry.shape_buckets[op](arguments)))
        return ("reference",)

    monkeypatch.setattr(registry, "automatic", automatic)
    monkeypatch.setattr(fused_conv2d, "_runs_on_onednn", lambda input, weight: False)
    model = DeepLabV3("mobilenet_v2", 3, 8, (2, 4))
    images = torch.randn(2, 3, 33, 33)
    model.train()(images)["out"].sum().backward()
    model.eval().prepare_for_inference().predict(images)
    buckets = dict(named)
    assert set(buckets) == set(registry.shape_buckets) - {
        "dilated_conv2d", "dilated_conv2d_backward", "parallel_dilated_conv2d"
    }  # fmt: skip
    assert buckets["aspp"] == "fp32 channels_last 320->768 1x1,3x3,3x3 inside 4/8 pixels 2^5"
    assert buckets["parallel_dilated_conv2d_backward"].endswith(" dinput dweight")
    assert any("groups 960 inside" in name for op, name in named if op == "fused_conv2d")
