"""The Triton kernels beyond what every backend is tested for: machine code, arithmetic, choices."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import deeplab_fast
from deeplab_fast import backends, dilated_conv2d, parallel_dilated_conv2d, upsample_argmax

from . import bilinear_oracle
from .cases import Conv, assert_as_accurate_as, operands
from .conftest import is_interpreted

pytest.importorskip("triton", minversion="3.6")

HERE = Path(__file__).resolve().parent
TENSOR_CORES = {80: "mma.sync", 90: "wgmma.mma_async"}
interpreted = pytest.mark.skipif(
    not is_interpreted("triton"), reason="the kernels are compiled here"
)


def run_python(*arguments: str, **environment: str) -> str:
    """In a new process without Triton's interpreter."""
    result = subprocess.run(
        [sys.executable, *arguments],
        env={"PATH": "", "TRITON_INTERPRET": "0", **environment},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """Facts about the kernels of each compute capability, compiled once."""
    cache, facts = tmp_path_factory.mktemp("triton"), {}

    def facts_of(capability: int) -> dict[str, list]:
        if capability not in facts:
            script = str(HERE / "triton_ahead_of_time.py")
            output = run_python(
                "-I", script, str(capability), HOME=str(cache), TRITON_CACHE_DIR=str(cache)
            )
            facts[capability] = json.loads(output)
        return facts[capability]

    return facts_of


@pytest.mark.parametrize("capability", TENSOR_CORES)
def test_kernels_compile_without_spills(compiled, capability):
    kernels = compiled(capability)
    assert {name.removesuffix("_kernel") for name in kernels} == {
        "upsample_argmax_candidates",
        "upsample_argmax_fwd",
        "upsample_cross_entropy_fwd",
        "upsample_cross_entropy_cells",
        "upsample_cross_entropy_bwd",
        "upsample_cross_entropy_gather",
        "dilated_conv2d",
        "dilated_conv2d_reduce",
        "dilated_conv2d_wgrad",
        "dilated_conv2d_wgrad_reduce",
        "depthwise_conv2d",
        "depthwise_conv2d_wgrad",
    }
    for name, variants in kernels.items():
        for facts in variants:
            assert facts["spills"] == 0, name
            assert facts["shared"] <= {80: 163, 90: 227}[capability] * 1024


@pytest.mark.parametrize("capability", TENSOR_CORES)
def test_convolutions_are_pipelined_tensor_core_code(compiled, capability):
    kernels = compiled(capability)
    for name in ("dilated_conv2d_kernel", "dilated_conv2d_wgrad_kernel"):
        for facts in kernels[name]:
            options = facts["options"]
            if options["PRECISION"] == "ieee":
                assert "fma.rn.f32" in facts["instructions"]
                continue
            assert TENSOR_CORES[capability] in facts["instructions"]
            # Three stages of both operands.
            stage = (options["BLOCK_M"] + options["BLOCK_N"]) * options["BLOCK_K"] * 2
            assert facts["shared"] >= 3 * stage
            assert any(name.startswith("cp.async") for name in facts["instructions"])


@pytest.mark.parametrize("capability", TENSOR_CORES)
def test_interpolation_is_not_fused_further(compiled, capability):
    """Three fused multiply-adds a value, and the products beside them stay products."""
    for facts in compiled(capability)["upsample_argmax_fwd_kernel"]:
        assert facts["instructions"] == ["fma.rn.f32", "mul.rn.f32"]


def test_importing_the_package_imports_no_triton():
    code = "import sys, deeplab_fast; print('triton' in sys.modules)"
    assert run_python("-I", "-c", code).strip() == "False"


def test_without_triton_the_reason_is_said():
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch, deeplab_fast\n"
        "print(deeplab_fast.backends.unavailable('triton', 'cuda'))\n"
        "print(deeplab_fast.upsample_argmax(torch.ones(1, 2, 3, 3), 5).sum().item())"
    )
    assert run_python("-I", "-c", code).split("\n")[:2] == ["Triton is not installed", "0"]


def test_an_old_triton_is_refused(monkeypatch):
    from deeplab_fast import triton

    monkeypatch.setattr(triton, "version", lambda name: "3.5.1")
    triton._installation_problem.cache_clear()
    try:
        assert backends.unavailable("triton", "cpu") == "needs Triton 3.6, 3.5.1 is installed"
    finally:
        triton._installation_problem.cache_clear()


def test_without_the_interpreter_it_takes_no_cpu_tensors():
    code = "import deeplab_fast; print(deeplab_fast.backends.unavailable('triton', 'cpu'))"
    assert "interpreter is off" in run_python("-I", "-c", code)
    assert backends.unavailable("triton", "xpu") == "the tensors are on xpu"


def test_automatic_where_no_library_has_a_rival(monkeypatch):
    """And where there is one, only when forced, until it was measured."""
    forced = {op for op in backends.ops() if backends.is_forced_only(op, "triton")}
    automatic = {op for op in backends.ops() if "triton" in backends.implementations(op)} - forced
    assert automatic == {
        "upsample_argmax",
        "upsample_cross_entropy",
        "upsample_cross_entropy_backward",
    }
    assert backends.order("cuda").index("cuda") < backends.order("cuda").index("triton")
    assert "triton" not in backends.order("cpu")


@interpreted
def test_fma_rounds_once():
    """In this interpreter and, emulated, in those that do not."""
    from deeplab_fast.triton_kernels import bilinear

    # A little less than halfway between two floats, the lower of them odd: where float64 rounds to
    # halfway, rounding again goes to the even one above.
    c = np.float32(1) + np.arange(1, 8192, 2, dtype=np.float32) * np.float32(2**-23)
    a, b = (np.full_like(c, 2**-12 * (1 + sign * 2**-15)) for sign in (1, -1))
    operands = [torch.from_numpy(x) for x in (a, b, c)]
    expected = torch.from_numpy(bilinear_oracle.fma(a, b, c))
    once = (operands[0].double() * operands[1].double() + operands[2].double()).float()
    assert not (once == expected).any()
    for emulate in (True,) if bilinear.fma_rounds_twice() else (True, False):
        out = torch.empty(4096)
        bilinear.fma_kernel[(1,)](out, *operands, EMULATE=emulate, BLOCK=4096)
        assert torch.equal(out, expected)


@interpreted
@pytest.mark.parametrize("classes", [31, 32, 33])
def test_full_candidate_lists(classes):
    """As many as a cell can list, and one more."""
    logits = torch.randn(1, 1, 3, 4) * (1 + torch.randint(-4, 5, (1, classes, 3, 4)) * 2**-23)
    with deeplab_fast.backend("triton"):
        labels = upsample_argmax(logits, (20, 30))
    assert torch.equal(labels, upsample_argmax(logits, (20, 30)))


@interpreted
@pytest.mark.parametrize("multiplier", [2, 3])
def test_depthwise_with_several_outputs_of_a_channel(multiplier):
    case = Conv(2, 5, 5 * multiplier, 11, 9, (3, 5), (2, 3), 5)
    tensors = operands(case, torch.float32, "cpu")
    grad = torch.randn(2, case.K, 11, 9)

    def results(function, tensors, grad):
        leaves = [t.detach().requires_grad_() for t in tensors]
        output = function(*leaves)
        return [output.detach(), *torch.autograd.grad(output, leaves, grad)]

    def theirs(x, w, b):
        return F.conv2d(x, w, b, padding="same", dilation=(2, 3), groups=5)

    with deeplab_fast.backend("triton"):
        actual = results(lambda x, w, b: dilated_conv2d(x, w, b, (2, 3), 5), tensors, grad)
    exact = results(theirs, [t.double() for t in tensors], grad.double())
    for a, p, e in zip(actual, results(theirs, tensors, grad), exact):
        assert_as_accurate_as(a, p, e)


@interpreted
@pytest.mark.parametrize("num_workers", [1, 48])
def test_sums_split_and_not(monkeypatch, num_workers):
    """Forward and both gradients, of branches that begin at odd channels."""
    from deeplab_fast.triton_kernels import dilated_conv2d as kernels

    slots = []
    for name in ("work_list", "weight_work_list"):
        make = getattr(kernels, name)
        monkeypatch.setattr(
            kernels, name, lambda *a, make=make: slots.append(make(*a).num_slots) or make(*a)
        )
    monkeypatch.setattr(kernels, "_num_workers", lambda device: num_workers)
    x = torch.randn(1, 70, 25, 25)
    weights = [torch.randn(k, 70, r, r) / 25 for k, r in ((5, 3), (3, 1), (21, 3))]
    grad, rates = torch.randn(1, 29, 25, 25), [2, 1, 4]

    def theirs(x, *weights):
        return torch.cat(
            [F.conv2d(x, w, padding="same", dilation=r) for w, r in zip(weights, rates)], dim=1
        )

    def results(function, tensors, grad):
        leaves = [t.detach().requires_grad_() for t in tensors]
        output = function(*leaves)
        return [output.detach(), *torch.autograd.grad(output, leaves, grad)]

    tensors = [x, *weights]
    with deeplab_fast.backend("triton"):
        actual = results(lambda x, *ws: parallel_dilated_conv2d(x, ws, rates), tensors, grad)
    assert [n > 0 for n in slots] == [num_workers > 1] * 3
    exact = results(theirs, [t.double() for t in tensors], grad.double())
    for a, p, e in zip(actual, results(theirs, tensors, grad), exact):
        assert_as_accurate_as(a, p, e)


@interpreted
def test_tuning_pins_the_fastest(monkeypatch):
    import triton

    from deeplab_fast.triton_kernels import dilated_conv2d as kernels

    x, w = torch.randn(1, 16, 9, 9), torch.randn(16, 16, 3, 3) / 12
    times = iter([3.0, 2.0, 1.0, 4.0, 5.0, 6.0, 7.0])
    outputs = []
    monkeypatch.setattr(kernels, "_tuned", {})
    monkeypatch.setattr(
        triton.testing, "do_bench", lambda run: outputs.append(run()) or next(times)
    )
    chosen = kernels.tune(x, [w], [(2, 2)])
    assert chosen == kernels._CANDIDATES[1]
    assert kernels.blocks_for(x.dtype, "ieee", 16, 16) == chosen
    expected = F.conv2d(x, w, padding=2, dilation=2)
    for output in outputs:
        torch.testing.assert_close(output, expected)
