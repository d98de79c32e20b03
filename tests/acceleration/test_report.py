"""The report: what is counted in a model, and the table."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

import deeplab_fast
from deeplab_fast._io.tables import aligned
from deeplab_fast.acceleration import Entry, Report
from deeplab_fast.acceleration.accelerating import accelerate_with_report
from deeplab_fast.acceleration.counting import Cost, channels_of_images, count
from deeplab_fast.acceleration.flops import conv_flops
from deeplab_fast.acceleration.module import Accelerated, replace
from deeplab_fast.models.fusion import fuse

SHAPE = 3, 17, 20


class Small(nn.Module):
    """Stride, dilation, groups, a residual, batch norm, activation, concatenation and resize."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU())
        self.atrous = nn.Conv2d(8, 8, 3, padding=4, dilation=4, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.depthwise = nn.Conv2d(8, 8, (3, 5), padding=(2, 4), dilation=2, groups=8)
        self.valid = nn.Conv2d(16, 5, 3, padding=1, dilation=2)

    def forward(self, images: Tensor) -> Tensor:
        features = self.stem(images)
        features = F.relu(self.norm(self.atrous(features)) + features)
        logits = self.valid(torch.cat([self.depthwise(features), features], 1))
        return F.interpolate(logits, images.shape[2:], mode="bilinear")


def products(conv: nn.Conv2d, size: tuple[int, int]) -> tuple[int, int]:
    """The operations of a convolution, and those on padding, from a convolution of ones."""
    ones = torch.ones(1, conv.in_channels // conv.groups, *size)
    weight = torch.ones(1, *conv.weight.shape[1:])
    inside = F.conv2d(ones, weight, None, conv.stride, conv.padding, conv.dilation)
    total = 2 * conv.out_channels * inside.numel() * weight.numel()
    return total, total - int(2 * conv.out_channels * inside.sum())


def test_operations_of_each_layer():
    model = Small()
    cost = count(model, SHAPE)
    expected = {
        "stem.0": products(model.stem[0], (17, 20)),
        "atrous": products(model.atrous, (9, 10)),
        "depthwise": products(model.depthwise, (9, 10)),
        "valid": products(model.valid, (9, 10)),
    }
    assert cost.flops == {name: flops for name, (flops, _) in expected.items()}
    # Products with padding count where the convolution is dilated, "same" or not.
    assert cost.padding == {name: expected[name][1] for name in ("atrous", "depthwise", "valid")}
    assert not cost.skipped  # by PyTorch


def test_fused_layers_compute_the_same_and_pass_over_memory_less_often():
    model = Small().eval()
    before, after = count(model, SHAPE), count(fuse(model), SHAPE)
    assert after.flops == before.flops
    assert after.padding == before.padding
    assert after.skipped == {**before.padding, "depthwise": 0}
    map_bytes = 4 * 8 * 9 * 10
    # Two batch norms read and write a map, and read a few vectors.
    assert 4 * map_bytes < before.traffic.pop("batch norm") < 4.2 * map_bytes
    assert before.traffic == {
        "activation": 4 * map_bytes,
        "sum": 3 * map_bytes,
        "concatenation": 4 * map_bytes,
        "upsampling": 4 * 5 * (7 * 8 + 17 * 20),
    }
    # The residual is needed once more, so that it is copied.
    assert after.traffic["concatenation"] == before.traffic["concatenation"]
    assert not after.traffic["batch norm"] + after.traffic["activation"] + after.traffic["sum"]


@pytest.mark.parametrize("op", ["dilated", "parallel", "aspp"])
def test_operations_of_our_ops(op):
    """The count of each op equals that of the PyTorch convolutions that it replaces."""
    weight = torch.randn(6, 4, 3, 3)
    pointwise, pool_weight, project = (
        torch.randn(n, c, 1, 1) for n, c in ((6, 4), (5, 4), (2, 17))
    )

    class Model(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            if op == "dilated":
                return deeplab_fast.dilated_conv2d(x, weight.to(x), dilation=(2, 5))
            weights = [pointwise.to(x), weight.to(x)]
            if op == "parallel":
                return deeplab_fast.parallel_dilated_conv2d(x, weights, None, [1, 6])
            biases = [torch.zeros(n).to(x) for n in (6, 6, 5, 2)]
            pool, last = pool_weight.to(x), project.to(x)
            return deeplab_fast.aspp(
                x, weights, biases[:2], [1, 6], pool, biases[2], last, biases[3]
            )

    cost = count(Model(), (4, 7, 9))
    size = 7, 9
    dense = conv_flops(1, 4, 6, size, kernel=1)
    full = 2 * 6 * 4 * 9 * 63
    if op == "dilated":
        conv = nn.Conv2d(4, 6, 3, padding=(2, 5), dilation=(2, 5))
        assert (cost.flops[""], cost.skipped[""]) == products(conv, size)
        return
    skipped = full - conv_flops(1, 4, 6, size, dilation=6)
    per_image = 2 * 4 * 5 + 2 * 5 * 2  # the pooled branch and its projection
    rest = per_image + conv_flops(1, 12, 2, size, kernel=1) if op == "aspp" else 0
    assert (cost.flops[""], cost.skipped[""]) == (dense + full + rest, skipped)


def test_pooled_branch_is_projected_once_per_image():
    size = 9, 10
    aspp = deeplab_fast.ASPP(4, (2, 6), 8).eval()

    class Plain(nn.Module):
        """The same convolutions, one by one."""

        def __init__(self) -> None:
            super().__init__()
            self.convs, self.project = aspp.convs, aspp.project

        def forward(self, x: Tensor) -> Tensor:
            *branches, pool = self.convs
            pooled = F.interpolate(pool(x), x.shape[2:], mode="bilinear")
            return self.project(torch.cat([*(branch(x) for branch in branches), pooled], 1))

    before, after = count(Plain(), (4, *size)), count(aspp, (4, *size))
    saved = 2 * 8 * 8 * (9 * 10 - 1)
    assert sum(before.flops.values()) - sum(after.flops.values()) == saved
    assert sum(before.padding.values()) == sum(after.skipped.values()) > 0


def test_counting_leaves_the_model_alone():
    model = Small()
    calls = []
    model.atrous.register_forward_hook(lambda *args: calls.append(args))
    model.atrous.register_forward_pre_hook(lambda *args: calls.append(args))
    tensors = model.state_dict(keep_vars=True)
    copies = {name: tensor.clone() for name, tensor in tensors.items()}
    before = torch.are_deterministic_algorithms_enabled()
    cost = count(model, SHAPE)
    assert sum(cost.flops.values()) > 0
    assert calls == []
    assert torch.are_deterministic_algorithms_enabled() == before
    assert model.training
    for name, value in model.state_dict(keep_vars=True).items():
        assert value is tensors[name]
        assert torch.equal(value, copies[name])


def test_half_precision_halves_the_traffic():
    full, half = (count(Small().to(dtype), SHAPE) for dtype in (torch.float32, torch.bfloat16))
    assert half.flops == full.flops
    assert half.traffic["activation"] == full.traffic["activation"] // 2


def test_channels_of_images():
    fused = deeplab_fast.accelerate(nn.Sequential(nn.Conv2d(6, 8, 1, groups=2)), inference=True)
    assert channels_of_images(fused) == 6
    assert channels_of_images(nn.Sequential(nn.ReLU(), nn.Conv2d(4, 8, 1), nn.Conv2d(8, 2, 1))) == 4
    assert channels_of_images(nn.Sequential(nn.ReLU())) is None


def test_accelerated_model_is_counted_as_it_runs(monkeypatch):
    """An accelerated ASPP runs its original code while there are global hooks."""

    class Nothing(Accelerated):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) if _has_any_global_hook() else x

    def replace_parts(model: nn.Module) -> Report:
        replace(model[0], Nothing)
        return Report([Entry("0", "convolution", "nothing")])

    monkeypatch.setattr("deeplab_fast.acceleration.accelerating.replace_parts", replace_parts)
    model = nn.Sequential(nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1))
    _, report = accelerate_with_report(model, size=(2, 3))
    assert report.before.flops == {"0": 2 * 9 * 6, "1": 2 * 9 * 6}
    assert report.after.flops == {"": 2 * 9 * 6}


def test_what_cannot_be_counted_has_a_line():
    class Decides(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            x = self.conv(x)
            return x if x.sum() > 0 else -x

    _, report = accelerate_with_report(Decides())
    assert report.before is None
    assert "on meta tensors for an image of 3x512x512: RuntimeError" in str(report)
    assert "GFLOP" not in str(report)

    _, report = accelerate_with_report(nn.Sequential(nn.ReLU()))
    assert str(report).endswith(
        "not counted: the model has no convolution that gives the channels of images"
    )
    _, report = accelerate_with_report(nn.Sequential(nn.ReLU()), size=(4, 5), channels=2)
    assert report.before.shape == (2, 4, 5)
    assert report.uncounted == ""
    assert "0.00 GFLOP in the original" in str(report)


def cost_of(flops: dict[str, float], padding=(), skipped=(), traffic=()) -> Cost:
    counters = (
        Counter({k: int(1e9 * v) for k, v in dict(x).items()}) for x in (flops, padding, skipped)
    )
    return Cost((3, 64, 96), *counters, Counter(dict(traffic)))


ENTRIES = [
    Entry("aspp", "ASPP", "AcceleratedASPP"),
    Entry("head.0", "depthwise convolution", None, "cuDNN is faster"),
    Entry("head.1.conv", "depthwise convolution", None, "cuDNN is faster"),
    Entry("headless", "depthwise convolution", None, "cuDNN is faster"),
]


def test_table():
    before = cost_of(
        {"aspp.convs.0": 2, "aspp.project": 1, "head.0": 0.25, "head.1.conv": 0.25, "stem": 0.5},
        padding={"aspp.convs.0": 1},
        traffic={"batch norm": 8_000_000, "sum": 5},
    )
    after = cost_of({"aspp": 2.5, "stem": 1}, skipped={"aspp": 0.75}, traffic={"sum": 5})
    assert str(Report(ENTRIES, before, after)).splitlines() == [
        "part             kind                   GFLOP  share  padding  what runs",
        "aspp             ASPP                    3.00  75.0%    33.3%  AcceleratedASPP",
        "head (2 parts)   depthwise convolution   0.50  12.5%           kept: cuDNN is faster",
        "headless         depthwise convolution                         kept: cuDNN is faster",
        "everything else                          0.50  12.5%           as before",
        "",
        "Forward pass of one image of 3x64x96, multiplications of zero padding included:",
        "  4.00 GFLOP in the original, of which 3.00 (75.0%) in replaced parts",
        "  0.50 GFLOP (12.5%) fewer now (ASPP projects its pooled branch once per image)",
        "  0.75 GFLOP (18.8%) now multiply zero padding; the CUDA kernels skip most of these, "
        "oneDNN none",
        "",
        "MB read and written by  original  now",
        "batch norm                   8.0  0.0",
    ]  # fmt: skip


def test_table_without_operations():
    assert str(Report([Entry("", "ASPP", "AcceleratedASPP"), *ENTRIES[1:2]])).splitlines() == [
        "part     kind                   what runs",
        "(model)  ASPP                   AcceleratedASPP",
        "head.0   depthwise convolution  kept: cuDNN is faster",
    ]
    assert str(Report([])) == "no part can be replaced"


def test_layers_count_for_the_innermost_part():
    entries = [
        Entry("", "final resize", "upsample_argmax"),
        Entry("head", "convolutions", "fused"),
        Entry("head.aspp", "ASPP", "aspp"),
        Entry("head.aspp.pool", "convolution", None, "hooked"),
        Entry("body.*", "dilated convolution", None, "cuDNN", ("body.1.conv", "body.3")),
    ]
    flops = {"head.0": 1, "head.aspp": 2, "head.aspp.0": 4, "head.aspp.pool.0": 8, "head2": 16}
    flops |= {"body.1.conv": 32, "body.1.conv2": 64, "body.3.0": 128, "": 256}
    text = str(Report(entries, cost_of(flops)))
    columns = [line[: text.index("share")].split()[-1] for line in text.splitlines()[2:7]]
    assert columns == ["1.00", "6.00", "8.00", "160.00", "336.00"]
    assert "511.00 GFLOP in the original, of which 7.00 (1.4%) in replaced parts" in text


def test_long_reasons_are_wrapped():
    reason = "its dilation differs between the two directions, which " * 4
    report = Report([Entry("backbone.layer4.2", "dilated convolution", None, reason.strip())])
    lines = str(report).splitlines()
    assert len(lines) > 3
    assert max(map(len, lines)) <= 100
    column = lines[0].index("what runs")
    assert all(line[:column].strip() == "" for line in lines[2:])
    assert " ".join(line[column:] for line in lines[1:]) == f"kept: {reason.strip()}"


def test_aligned_columns():
    assert aligned([("a", "1", "b"), ("ccc", "22", "")], right={1}) == "a     1  b\nccc  22"


def test_verbose_names_the_size(capsys):
    torch.manual_seed(0)
    model = Small().eval()
    deeplab_fast.accelerate(model, inference=True, verbose=True)
    out = capsys.readouterr().out
    assert "one image of 3x512x512" in out
    original = sum(count(model, (3, 512, 512)).flops.values())
    assert f"{original / 1e9:.2f} GFLOP in the original" in out
    assert "batch norm" in out


def test_nothing_is_printed_by_default(capsys):
    deeplab_fast.accelerate(Small().eval(), inference=True)
    assert capsys.readouterr().out == ""


def test_names_of_the_parts_are_those_of_the_layers():
    """All operations of a real model belong to a part of the report."""
    smp = pytest.importorskip("segmentation_models_pytorch", reason="a real model")
    model = smp.DeepLabV3Plus("resnet18", encoder_weights=None).eval()
    _, report = accelerate_with_report(model, inference=True, size=(64, 64))
    assert report.before.flops
    assert all(
        any(entry.contains(layer) for entry in report.entries) for layer in report.before.flops
    )
    assert report.after.traffic["batch norm"] == 0 < report.before.traffic["batch norm"]
    # predict reads small logits and writes labels, where forward writes large logits.
    assert 2 * report.after.traffic["upsampling"] < report.before.traffic["upsampling"]
