"""Automatic choice on a GPU: a kernel that was measured to be faster than cuDNN, else cuDNN."""

from __future__ import annotations

import itertools
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch

from deeplab_fast import DeepLabV3
from deeplab_fast.backends import dispatch_table, registry
from deeplab_fast.ops.shape_bucket import shape_bucket

from ..support.backends import GpuTensor, set_tf32

HOPPER = "sm_90 with 132 SMs"
GPU = GpuTensor()


class Call(NamedTuple):
    x: torch.Tensor
    shape: str


@pytest.fixture
def gpu(monkeypatch):
    """A simulated Hopper GPU and an op that has kernels on all backends and in cuDNN."""
    properties = SimpleNamespace(major=9, minor=0, multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch.version, "hip", None)
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
def table(gpu, monkeypatch, tmp_path):
    """A function that writes a table of rows "kernel median_ms cudnn_ms"."""

    def write(*rows: str, shape: str = "wide", device: str = HOPPER, op: str = "an_op") -> None:
        lines = [",".join(dispatch_table.Row._fields)]
        for row in rows:
            kernel, *times = row.split()
            lines.append(",".join([device, op, shape, kernel, *times, "", "", "", "", ""]))
        (tmp_path / "dispatch_table.csv").write_text("\n".join(lines))

    monkeypatch.setattr(dispatch_table, "PATH", tmp_path / "dispatch_table.csv")
    fastest_kernels = dispatch_table.fastest_kernels
    fastest_kernels.cache_clear()
    yield write
    fastest_kernels.cache_clear()


def chosen(shape: str = "wide", requested: str = "") -> str:
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
