"""Variants: compiled, and on a preferred backend."""

from __future__ import annotations

import importlib

import pytest
import torch

import deeplab_fast
from deeplab_fast.backends import registry


@pytest.fixture
def variants():
    return importlib.import_module("common.variants")


# Cases with a compiled baseline, by script.
COMPILED_CASES = {
    "bench_aspp": lambda script, report, shape: script.inference(report, shape, "fp32", 1, True),
    "bench_upsample_argmax": lambda script, report, shape: script.measure(
        report, shape, "fp32", "random logits", torch.randn(1, shape.classes, *shape.feature)
    ),
    "bench_upsample_cross_entropy": lambda script, report, shape: script.step(
        report, shape, "fp32", 1, True
    ),
}


@pytest.fixture
def graphs(monkeypatch):
    """Input sizes of every graph that torch.compile captures; the graphs run eagerly."""
    sizes = []

    def record(graph, inputs):
        sizes.append([size for input in inputs for size in getattr(input, "shape", [input])])
        return graph

    def compile(function, options, compile=torch.compile, **rest):
        return compile(function, backend=record, **rest)

    monkeypatch.setattr(torch, "compile", compile)
    return sizes


def test_preferred_kernel_runs_the_calls_that_it_supports(variants, ran):
    x, weight = torch.randn(1, 8, 5, 5), torch.randn(8, 8, 3, 3)
    run = variants.preferring(lambda: deeplab_fast.dilated_conv2d(x, weight), "emulated")
    run()  # the emulated kernel does not support fp32
    x, weight = x.bfloat16(), weight.bfloat16()
    run()
    deeplab_fast.dilated_conv2d(x, weight)
    assert [name for _, name in ran] == ["cpu", "emulated", "cpu"]


def test_a_preferred_kernel_keeps_its_plans(variants, monkeypatch):
    """A plan that is made at each call would count as time of the kernel."""
    made = []
    make_plan = registry._make_plan
    monkeypatch.setattr(registry, "_make_plan", lambda *call: made.append(call) or make_plan(*call))
    x, weight = torch.randn(1, 8, 5, 5), torch.randn(8, 8, 3, 3)
    run = variants.preferring(lambda: deeplab_fast.dilated_conv2d(x, weight), "reference")
    for _ in range(2):
        run()
        deeplab_fast.dilated_conv2d(x, weight)
    assert len(made) == 2


@pytest.mark.slow
def test_compiled_baseline_matches_eager():
    peers = importlib.import_module("common.peers")
    module = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8)).eval()
    x = torch.randn(2, 3, 9, 9).contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        torch.testing.assert_close(peers.applied(module, x, compile=True)(), module(x))


@pytest.mark.parametrize("script", COMPILED_CASES)
def test_baselines_are_compiled_with_static_sizes(script, report, graphs):
    report.args.full = True
    tiny = importlib.import_module("common.cases").TINY
    with torch._dynamo.config.patch(cache_size_limit=1):  # more shapes than torch would allow
        for image in (tiny.image, (41, 49), (57, 65)):
            shape = tiny._replace(image=image)
            COMPILED_CASES[script](importlib.import_module(script), report, shape)
    compiled = [row for row in report.rows if row["variant"].endswith(" compiled")]
    assert len(compiled) == len(graphs) == 3
    assert all(type(size) is int for sizes in graphs for size in sizes), graphs


@pytest.mark.slow
def test_prepared_and_torchvision_models_are_compiled(report, graphs, monkeypatch):
    bench_model, cases, peers = (
        importlib.import_module(name) for name in ("bench_model", "common.cases", "common.peers")
    )
    monkeypatch.setattr(peers, "engines", lambda *args: {})
    model = bench_model.trained_like("mobilenet_v2", cases.TINY)
    for full in (False, True):
        report.args.full = full
        bench_model.inference(report, cases.TINY, "fp32", 1, model)
        compiled = [row["variant"] for row in report.rows if "compiled" in row["variant"]]
        assert len(compiled) == len(graphs) == (2 if full else 0)
    assert compiled == ["deeplab_fast prepared, compiled", "PyTorch compiled"]


def test_compiled_function_has_static_sizes_after_other_shapes(variants, graphs):
    double = variants.compiled(lambda x: 2 * x, torch.device("cpu"))
    for size in (3, 5, 7):
        assert torch.equal(double(torch.ones(size, 2)), torch.full((size, 2), 2.0))
    assert graphs == [[3, 2], [5, 2], [7, 2]]
    assert all(type(size) is int for sizes in graphs for size in sizes)
