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
from torch.utils._pytree import tree_map_only

import deeplab_fast
from deeplab_fast import backends, dilated_conv2d, parallel_dilated_conv2d, upsample_argmax

from . import bilinear_oracle
from .cases import Conv, assert_as_accurate_as, operands
from .conftest import is_interpreted

pytest.importorskip("triton", minversion="3.6")

HERE = Path(__file__).resolve().parent
TENSOR_CORES = {80: "mma.sync", 90: "wgmma.mma_async"}
SHARED_MEMORY = {80: 99, 90: 227}  # KiB; 8.6 and 8.9, which run what 8.0 does, have less than 8.0
interpreted = pytest.mark.skipif(
    not is_interpreted("triton"),
    reason=f"no interpreter: {backends.unavailable('triton', 'cpu')}",
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

    def facts_of(chip: int | str) -> dict[str, list]:
        if chip not in facts:
            script = str(HERE / "triton_ahead_of_time.py")
            output = run_python(
                "-I", script, str(chip), HOME=str(cache), TRITON_CACHE_DIR=str(cache)
            )
            facts[chip] = json.loads(output)
        return facts[chip]

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
        "round_to_tf32",
        "depthwise_conv2d",
        "depthwise_conv2d_wgrad",
    }
    for name, variants in kernels.items():
        for facts in variants:
            assert facts["spills"] == 0, name
            assert facts["shared"] <= SHARED_MEMORY[capability] * 1024
            assert "enable_fp_fusion" in facts["options"], name


def test_kernels_compile_for_amd(compiled):
    """And where every size is 1, which Triton makes constants."""
    for name, variants in compiled("gfx942").items():
        assert all(facts["shared"] <= 64 * 1024 for facts in variants), name


@pytest.mark.parametrize("capability", TENSOR_CORES)
def test_convolutions_are_pipelined_tensor_core_code(compiled, capability):
    kernels = compiled(capability)
    for name in ("dilated_conv2d_kernel", "dilated_conv2d_wgrad_kernel"):
        for facts in kernels[name]:
            options = facts["options"]
            if options["num_stages"] == 2:  # true fp32
                assert options["PRECISION"] == "ieee"
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
    assert triton._installation_problem.__wrapped__() == "needs Triton 3.6, 3.5.1 is installed"


@pytest.mark.parametrize(
    ("versions", "refused"),
    [
        ({"triton": "3.6.0", "numpy": "2.4.0"}, True),
        ({"triton": "3.6.0", "numpy": "2.3.5"}, False),
        ({"triton": "3.7.1", "numpy": "2.4.0"}, False),
    ],
)
def test_an_interpreter_that_numpy_breaks_is_refused(monkeypatch, versions, refused):
    from deeplab_fast import triton

    monkeypatch.setattr(triton, "version", versions.__getitem__)
    reason = triton._interpreter_problem.__wrapped__()
    message = "the interpreter of Triton 3.6.0 needs NumPy before 2.4, 2.4.0 is installed"
    assert reason == (message if refused else None)


def test_without_the_interpreter_it_takes_no_cpu_tensors():
    code = "import deeplab_fast; print(deeplab_fast.backends.unavailable('triton', 'cpu'))"
    assert "interpreter is off" in run_python("-I", "-c", code)
    assert backends.unavailable("triton", "xpu") == "the tensors are on xpu"


def test_automatic_where_no_library_has_a_rival():
    """And where there is one, only where it was measured faster."""
    ops = {op for op in backends.ops() if "triton" in backends.implementations(op)}
    assert {op for op in ops if not backends.rests_on_measurements(op, "cuda")} == {
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


def to_tf32(tensor: torch.Tensor) -> torch.Tensor:
    """Rounded to 10 bits of mantissa, ties away from zero."""
    return ((tensor.view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)


@interpreted
def test_tf32_is_rounded_to_nearest(tf32):
    """Where tensor cores would cut the last 13 bits off; what is not finite stays."""
    from deeplab_fast.triton_kernels import dilated_conv2d as kernels

    operand = kernels._operand(
        torch.tensor([torch.inf, -torch.inf, torch.nan])[None, :, None, None], "tf32"
    )
    assert operand.flatten().tolist()[:2] == [torch.inf, -torch.inf] and operand[0, 2].isnan()
    # CUDA's own NaN, which rounding would turn into -0
    bits = torch.tensor([0x7FFFFFFF, 0x3F801000, -0x407FF000], dtype=torch.int32)
    operand = kernels._operand(bits.view(torch.float32)[None, :, None, None], "tf32").flatten()
    assert operand[0].isnan() and operand[1:].tolist() == [1 + 2**-10, -1 - 2**-10]

    tensors = operands(Conv(2, 9, 7, 8, 5, (3, 3), 2), torch.float32, "cpu")[:2]
    grad = torch.randn(2, 7, 8, 5)

    def results(function, tensors, grad):
        leaves = [t.detach().requires_grad_() for t in tensors]
        output = function(*leaves)
        return [output.detach(), *torch.autograd.grad(output, leaves, grad)]

    def theirs(x, w):
        return F.conv2d(x, w, padding=2, dilation=2)

    with deeplab_fast.backend("triton"):
        actual = results(lambda x, w: dilated_conv2d(x, w, dilation=2), tensors, grad)
    rounded, rounded_grad = [to_tf32(t) for t in tensors], to_tf32(grad)
    exact = results(theirs, [t.double() for t in rounded], rounded_grad.double())
    for a, p, e in zip(actual, results(theirs, rounded, rounded_grad), exact):
        assert_as_accurate_as(a, p, e)


@interpreted
def test_a_bias_of_images_is_fp32():
    """What the pooled branch and the bias add is not rounded to fp16: 1000 + 1/3 - 1000."""
    x, ones, zeros = torch.ones(2, 1, 3, 4), torch.ones(1, 1, 1, 1), torch.zeros(1, 1, 1, 1)
    project = torch.tensor([-10.0, 1.0])[None, :, None, None]
    arguments = [x, [ones], [torch.tensor([99.0])], [1], zeros, torch.tensor([1 / 3])]
    arguments += [project, torch.tensor([1000.0])]
    arguments = tree_map_only(torch.Tensor, torch.Tensor.half, arguments)
    with deeplab_fast.backend("triton"):
        output = deeplab_fast.aspp(*arguments)
    assert (output - 1 / 3).abs().max() < 1e-3


@interpreted
def test_cells_of_the_longest_row():
    """Whose coordinates add up to more than an int32 holds."""
    from deeplab_fast.triton_kernels import upsample_cross_entropy as kernels

    size = 2**31 - 8192
    begin = kernels._begins(3, size, 3 / size, False, torch.empty(0)).tolist()
    assert begin[0] == 0 and begin[3] == size
    assert all(abs(b - (i + 0.5) * size / 3) < 2**10 for i, b in enumerate(begin[1:3], 1))


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
    blocks = kernels.Blocks(128, 32, 16, 4, 4)  # so that sums have many steps
    monkeypatch.setattr(kernels, "_SPLIT_STEPS", 1)
    monkeypatch.setattr(kernels, "blocks_for", lambda *shape: blocks)
    x = torch.randn(1, 40, 13, 13)
    weights = [torch.randn(k, 40, r, r) / 19 for k, r in ((5, 3), (3, 1), (21, 3))]
    grad, rates = torch.randn(1, 29, 13, 13), [2, 1, 4]

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
    assert kernels.blocks_for(x.dtype, "ieee", 81, 16, 16) == chosen
    expected = F.conv2d(x, w, padding=2, dilation=2)
    for output in outputs:
        torch.testing.assert_close(output, expected)
