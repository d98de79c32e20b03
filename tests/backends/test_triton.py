"""Triton kernels: generated code, arithmetic, requirements, and calls that they do not support."""

from __future__ import annotations

import contextlib
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
from deeplab_fast import dilated_conv2d, parallel_dilated_conv2d, upsample_argmax
from deeplab_fast.backends import registry

from ..support import bilinear_oracle
from ..support.backends import is_interpreted
from ..support.cases import Conv, assert_as_accurate_as, operands, to_tf32
from ..support.triton_splits import record_num_slots, set_blocks, set_num_programs
from ..support.unsupported import unsupported_reason

pytest.importorskip("triton", minversion="3.6")

SUPPORT = Path(__file__).resolve().parents[1] / "support"
TENSOR_CORES = {80: "mma.sync", 90: "wgmma.mma_async"}
SHARED_MEMORY = {80: 99, 90: 227}  # KiB; 8.6 and 8.9, which run code for 8.0, have less than 8.0
interpreted = pytest.mark.skipif(
    not is_interpreted("triton"),
    reason=f"no interpreter: {registry.unavailable_reason('triton', 'cpu')}",
)


def run_python(*arguments: str, **environment: str) -> str:
    """Output of a new Python process without Triton's interpreter."""
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
            script = str(SUPPORT / "triton_ahead_of_time.py")
            output = run_python(
                "-I", script, str(chip), HOME=str(cache), TRITON_CACHE_DIR=str(cache)
            )
            facts[chip] = json.loads(output)
        return facts[chip]

    return facts_of


@pytest.mark.slow
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


@pytest.mark.slow
def test_kernels_compile_for_amd(compiled):
    """Also if every size is 1: Triton makes constants of such arguments."""
    for name, variants in compiled("gfx942").items():
        assert all(facts["shared"] <= 64 * 1024 for facts in variants), name


@pytest.mark.slow
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
            # At least three stages of both operands are in shared memory.
            stage = (options["BLOCK_M"] + options["BLOCK_N"]) * options["BLOCK_K"] * 2
            assert facts["shared"] >= 3 * stage
            assert any(name.startswith("cp.async") for name in facts["instructions"])


@pytest.mark.slow
@pytest.mark.parametrize("capability", TENSOR_CORES)
def test_interpolation_is_not_fused_further(compiled, capability):
    """A value takes three fused multiply-adds, and the other products are not fused."""
    for facts in compiled(capability)["upsample_argmax_fwd_kernel"]:
        assert facts["instructions"] == ["fma.rn.f32", "mul.rn.f32"]


def test_importing_the_package_imports_no_triton():
    code = "import sys, deeplab_fast; print('triton' in sys.modules)"
    assert run_python("-I", "-c", code).strip() == "False"


def test_reason_without_triton():
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch, deeplab_fast\n"
        "from deeplab_fast.backends import registry\n"
        "print(registry.unavailable_reason('triton', 'cuda'))\n"
        "print(deeplab_fast.upsample_argmax(torch.ones(1, 2, 3, 3), 5).sum().item())"
    )
    assert run_python("-I", "-c", code).split("\n")[:2] == ["Triton is not installed", "0"]


def test_old_triton_is_unsupported(monkeypatch):
    from deeplab_fast.backends.triton import device

    monkeypatch.setattr(device, "version", lambda name: "3.5.1")
    assert device._installation_problem.__wrapped__() == "needs Triton 3.6, 3.5.1 is installed"


@pytest.mark.parametrize(
    ("found", "than", "expected"),
    [
        ("3.5.9", (3, 6), True),
        ("3.6.0", (3, 6), False),
        ("3.10.1", (3, 6), False),
        ("4.0.0", (3, 6), False),
        ("2.9.0", (3, 6), True),
        ("3.6.0+git1a2b", (3, 6), False),
        (None, (3, 6), False),
    ],
)
def test_versions_compare_as_numbers(found, than, expected):
    from deeplab_fast.backends.triton import device

    assert device._is_older(found, than) == expected


@pytest.mark.parametrize("installed", ["triton", "pytorch-triton", "pytorch-triton-rocm"])
def test_distributions_of_triton(monkeypatch, installed):
    from deeplab_fast.backends.triton import device

    def version(name: str) -> str:
        if name != installed:
            raise device.PackageNotFoundError(name)
        return "3.5.1"

    monkeypatch.setattr(device, "version", version)
    assert device._installation_problem.__wrapped__() == "needs Triton 3.6, 3.5.1 is installed"


@pytest.mark.parametrize(
    ("interpreted", "is_amd", "capabilities", "expected"),
    [
        (True, False, [(9, 0)], "TRITON_INTERPRET is set"),
        (False, False, [], "there is no GPU that torch can use"),
        (False, False, [(9, 0), (8, 0)], None),
        (False, False, [(9, 0), (7, 5)], "needs compute capability 8.0, a GPU here has 7.5"),
        (False, False, [(7, 5), (9, 0)], "needs compute capability 8.0, a GPU here has 7.5"),
        (False, True, [(7, 5)], None),
    ],
)
def test_unavailable_reason_on_gpus(monkeypatch, interpreted, is_amd, capabilities, expected):
    from deeplab_fast.backends.triton import device

    monkeypatch.setattr(device, "_INTERPRETED", interpreted)
    monkeypatch.setattr(device, "_problem", device._problem.__wrapped__)
    monkeypatch.setattr(torch.version, "hip", "7.0" if is_amd else None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(capabilities))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(capabilities))
    monkeypatch.setattr(torch.cuda, "get_device_capability", capabilities.__getitem__)
    reason = registry.unavailable_reason("triton", "cuda")
    assert reason is None if expected is None else reason.startswith(expected)


def test_order_of_unavailable_reasons(monkeypatch):
    """Problems of the installation, which all device types have, precede the interpreter's."""
    from deeplab_fast.backends.triton import device

    monkeypatch.setattr(device, "_INTERPRETED", True)
    monkeypatch.setattr(device, "_interpreter_problem", lambda: "numpy is too new")
    assert registry.unavailable_reason("triton", "cpu") == "numpy is too new"
    monkeypatch.setattr(device, "_installation_problem", lambda: "triton is too old")
    for device_type in ("cpu", "cuda", "xpu"):
        assert registry.unavailable_reason("triton", device_type) == "triton is too old"


@pytest.mark.parametrize("interpreted", [False, True])
def test_bf16_is_widened_for_the_interpreter_only(monkeypatch, interpreted):
    from deeplab_fast.backends.triton import device

    monkeypatch.setattr(device, "_INTERPRETED", interpreted)
    tensors = [torch.ones(1).to(d) for d in (torch.bfloat16, torch.float16, torch.int64)]
    first, (second, third), nothing, number = device.widened(tensors[0], tensors[1:], None, 3)
    expected = torch.float32 if interpreted else torch.bfloat16
    assert (first.dtype, second.dtype, third.dtype) == (expected, torch.float16, torch.int64)
    assert nothing is None and number == 3


@pytest.mark.parametrize(
    ("versions", "is_incompatible"),
    [
        ({"triton": "3.6.0", "numpy": "2.4.0"}, True),
        ({"triton": "3.6.0", "numpy": "2.3.5"}, False),
        ({"triton": "3.7.1", "numpy": "2.4.0"}, False),
    ],
)
def test_interpreter_with_an_incompatible_numpy(monkeypatch, versions, is_incompatible):
    from deeplab_fast.backends.triton import device

    monkeypatch.setattr(device, "version", versions.__getitem__)
    reason = device._interpreter_problem.__wrapped__()
    message = "the interpreter of Triton 3.6.0 needs NumPy before 2.4, 2.4.0 is installed"
    assert reason == (message if is_incompatible else None)


def test_unavailable_reason_on_the_cpu_without_the_interpreter():
    code = (
        "from deeplab_fast.backends import registry; "
        "print(registry.unavailable_reason('triton', 'cpu'))"
    )
    assert "interpreter is off" in run_python("-I", "-c", code)
    assert registry.unavailable_reason("triton", "xpu") == "does not run on xpu tensors"


def test_automatic_choice():
    """Ops that a vendor library has too run on Triton only if that was measured to be faster."""
    ops = {op for op in registry.ops() if "triton" in registry.backends_of(op)}
    assert {op for op in ops if not registry.depends_on_measurements(op, "cuda")} == {
        "upsample_argmax",
        "upsample_cross_entropy",
        "upsample_cross_entropy_backward",
    }
    assert registry.order("cuda").index("cuda") < registry.order("cuda").index("triton")
    assert "triton" not in registry.order("cpu")


@interpreted
def test_fma_rounds_once():
    """The emulated fma rounds once, and so does the interpreter's own unless it is detected."""
    from deeplab_fast.backends.triton import bilinear

    # The exact values are a little less than halfway between two floats, the lower of them odd.
    # float64 rounds them to halfway, and a second rounding would go to the even float above.
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
def test_tf32_is_rounded_to_nearest(tf32):
    """Tensor cores would truncate the last 13 bits. Infinities and NaN stay."""
    from deeplab_fast.backends.triton import tf32 as rounding

    operand = rounding.operand(
        torch.tensor([torch.inf, -torch.inf, torch.nan])[None, :, None, None], "tf32"
    )
    assert operand.flatten().tolist()[:2] == [torch.inf, -torch.inf] and operand[0, 2].isnan()
    # Rounding would turn CUDA's canonical NaN into -0
    bits = torch.tensor([0x7FFFFFFF, 0x3F801000, -0x407FF000], dtype=torch.int32)
    operand = rounding.operand(bits.view(torch.float32)[None, :, None, None], "tf32").flatten()
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
def test_image_bias_is_fp32():
    """The sum of the pooled branch and the bias is not rounded to fp16: 1000 + 1/3 - 1000."""
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
    """The sum of two of its coordinates exceeds int32."""
    from deeplab_fast.backends.triton import upsample_cross_entropy as kernels

    size = 2**31 - 8192
    begin = kernels._begins(3, size, 3 / size, False, torch.empty(0)).tolist()
    assert begin[0] == 0 and begin[3] == size
    assert all(abs(b - (i + 0.5) * size / 3) < 2**10 for i, b in enumerate(begin[1:3], 1))


@interpreted
@pytest.mark.parametrize("classes", [31, 32, 33])
def test_full_candidate_lists(classes):
    """A cell lists up to 32 candidates."""
    logits = torch.randn(1, 1, 3, 4) * (1 + torch.randint(-4, 5, (1, classes, 3, 4)) * 2**-23)
    with deeplab_fast.backend("triton"):
        labels = upsample_argmax(logits, (20, 30))
    assert torch.equal(labels, upsample_argmax(logits, (20, 30)))


@interpreted
@pytest.mark.parametrize("multiplier", [2, 3])
def test_depthwise_with_channel_multiplier(multiplier):
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
@pytest.mark.parametrize("num_programs", [1, 48])
def test_split_and_whole_sums(monkeypatch, num_programs):
    """Output and gradients of branches whose first channels are odd."""
    num_slots = record_num_slots(monkeypatch)
    set_num_programs(monkeypatch, num_programs)
    set_blocks(monkeypatch, 128, 32, 16)  # so small that sums have many k-iterations
    x = torch.randn(1, 40, 13, 13)
    weights = [torch.randn(k, 40, r, r) / 19 for k, r in ((5, 3), (3, 1), (21, 3))]
    grad, dilations = torch.randn(1, 29, 13, 13), [2, 1, 4]

    def theirs(x, *weights):
        return torch.cat(
            [F.conv2d(x, w, padding="same", dilation=d) for w, d in zip(weights, dilations)], dim=1
        )

    def results(function, tensors, grad):
        leaves = [t.detach().requires_grad_() for t in tensors]
        output = function(*leaves)
        return [output.detach(), *torch.autograd.grad(output, leaves, grad)]

    tensors = [x, *weights]
    with deeplab_fast.backend("triton"):
        actual = results(
            lambda x, *ws: parallel_dilated_conv2d(x, ws, None, dilations), tensors, grad
        )
    assert [n > 0 for n in num_slots] == [num_programs > 1] * 3
    exact = results(theirs, [t.double() for t in tensors], grad.double())
    for a, p, e in zip(actual, results(theirs, tensors, grad), exact):
        assert_as_accurate_as(a, p, e)


def huge(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """A tensor of this shape that has the memory of one element."""
    return torch.zeros(1, dtype=dtype).expand(shape)


def name(value: object) -> str:
    """Test id of a parameter: dtype and shape of a tensor."""
    if isinstance(value, torch.Tensor):
        return f"{value.dtype}-{'x'.join(map(str, value.shape))}"
    return str(value)


X, W = huge(2, 8, 5, 7), huge(4, 8, 3, 3)
POOL, PROJECT = huge(3, 8, 1, 1), huge(2, 7, 1, 1)
MOST = 2**31 - 4096  # most pixels of a kernel: int32 indices of its last block may run past them
EMPTY = "the input or a weight is empty"
MANY = "fewer than 2^31 pixels in all branches together"


@interpreted
@pytest.mark.parametrize(
    ("input", "weight", "groups", "reason"),
    [
        (X, W, 1, None),
        (X.half(), W.half(), 1, None),
        (X.bfloat16(), W.bfloat16(), 1, None),
        (X.double(), W.double(), 1, "float32, float16 and bfloat16, got torch.float64"),
        (X, huge(8, 1, 3, 3), 8, None),
        (X, huge(16, 1, 3, 3), 8, None),
        (X, huge(8, 2, 3, 3), 4, "one group or one group per input channel, got 4"),
        (X, huge(8, 4, 3, 3), 2, "one group or one group per input channel, got 2"),
        (huge(2, 1, 5, 7), huge(3, 1, 3, 3), 1, None),
        (huge(0, 8, 5, 7), W, 1, EMPTY),
        (huge(2, 8, 0, 7), W, 1, EMPTY),
        (X, huge(0, 8, 3, 3), 1, EMPTY),
        (huge(0, 8, 5, 7), huge(8, 1, 3, 3), 8, EMPTY),
        (X, huge(4, 8, 31, 33), 1, None),
        (X, huge(4, 8, 33, 33), 1, "at most 1024 taps"),
        (huge(1, 8, 1, MOST), W, 1, None),
        (huge(1, 8, 1, MOST + 1), W, 1, MANY),
        (huge(2, 8, MOST // 2 + 1, 1), W, 1, MANY),
        (huge(1, 8, 1, MOST + 1), huge(8, 1, 3, 3), 8, MANY),
    ],
    ids=name,
)
def test_unsupported_convolutions(input, weight, groups, reason):
    """Forward, backward, and fused with an activation and a residual."""
    K, (N, _, H, W) = weight.size(0), input.shape
    bias, output = huge(K), huge(N, K, H, W)
    kernel = weight.shape[2:]
    geometry = [1, 1], [kernel[0] // 2, kernel[1] // 2], [1, 1], groups, "relu"
    calls = {
        "dilated_conv2d": (input, weight, bias, [1, 1], groups),
        "dilated_conv2d_backward": (output, input, weight, [1, 1], groups, [True] * 3),
        "fused_conv2d": (input, weight, bias, *geometry),
        "fused_conv2d_add_": (output, input, weight, bias, *geometry),
    }
    if groups == 1:
        calls |= {
            "parallel_dilated_conv2d": (input, [weight], [bias], [1]),
            "parallel_dilated_conv2d_and_mean": (input, [weight], [1]),
            "parallel_dilated_conv2d_backward": (output, input, [weight], [1], [True] * 3),
        }
    for op, arguments in calls.items():
        found = unsupported_reason("triton", op, *arguments)
        assert found is None if reason is None else reason in found, op


@interpreted
def test_limits_of_all_branches_together():
    """Pixels and taps of all branches count, for ASPP also those of pooling and projection."""

    def reason(op: str, *arguments) -> str | None:
        return unsupported_reason("triton", op, *arguments)

    half = huge(1, 8, 1, MOST // 2 + 1)
    assert reason("parallel_dilated_conv2d", half, [W], [], [1]) is None
    assert MANY in reason("parallel_dilated_conv2d", half, [W, W], [], [1, 2])
    assert EMPTY in reason("parallel_dilated_conv2d", X, [W, W[:0]], [], [1, 2])
    taps = [huge(4, 8, 31, 33), huge(4, 8, 1, 1), huge(4, 8, 1, 1)]
    assert reason("parallel_dilated_conv2d", X, taps[:2], [], [1, 1]) is None
    assert "at most 1024 taps" in reason("parallel_dilated_conv2d", X, taps, [], [1, 1, 1])

    def aspp(weights=(W,), input=X, pool=POOL, project=PROJECT):
        biases = [huge(w.size(0)) for w in weights]
        dilations = [1] * len(weights)
        return reason("aspp", input, weights, biases, dilations, pool, huge(3), project, huge(2))

    assert aspp() is None
    assert EMPTY in aspp(pool=huge(0, 8, 1, 1))
    assert EMPTY in aspp(project=huge(0, 7, 1, 1))
    assert EMPTY in aspp(weights=(W, W[:0]))
    assert MANY in aspp(input=half)
    assert "at most 1024 taps" in aspp(weights=(taps[0],))
    assert "got torch.float64" in aspp(input=X.double())


@interpreted
@pytest.mark.parametrize(
    ("changed", "value", "reason"),
    [
        ("groups", 1, None),
        ("stride", [1, 2], "supports stride (1, 1), got (1, 2)"),
        ("padding", [1, 2], "supports padding to the same size"),
        ("dilation", [1, 2], "supports padding to the same size"),
        ("weight", huge(4, 8, 2, 3), "supports padding to the same size"),
        ("residual", huge(2, 4, 7, 5), "does not have the shape of the output"),
        ("residual", huge(2, 8, 5, 7), "does not have the shape of the output"),
        ("residual", huge(1, 4, 5, 7), "does not have the shape of the output"),
    ],
    ids=name,
)
def test_unsupported_fused_convolutions(changed, value, reason):
    arguments = {"residual": huge(2, 4, 5, 7), "input": X, "weight": W, "bias": huge(4)}
    arguments |= {"stride": [1, 1], "padding": [1, 1], "dilation": [1, 1], "groups": 1}
    residual, *others = (arguments | {changed: value}).values()
    for op, given in (("fused_conv2d", others), ("fused_conv2d_add_", [residual, *others])):
        expected = None if op == "fused_conv2d" and changed == "residual" else reason
        found = unsupported_reason("triton", op, *given, "relu")
        assert found is None if expected is None else expected in found


@interpreted
def test_unsupported_upsampling():
    """Sizes and numbers of classes beyond int32; for the gradient, classes beyond a CUDA grid."""

    def found(op: str, *arguments) -> str | None:
        return unsupported_reason("triton", op, *arguments)

    beyond = (MOST + 1, 1, 1), (1, MOST + 1, 1), (1, 1, MOST + 1)
    for shape, large in (((MOST, 1, 1), False), *[(shape, True) for shape in beyond]):
        logits, target = huge(1, *shape), huge(1, 2, 3)
        reasons = [
            found("upsample_argmax", logits, [2, 3]),
            found("upsample_cross_entropy", logits, target),
            found("upsample_cross_entropy_backward", huge(1), logits, target),
        ]
        assert [reason is not None for reason in reasons[:2]] == [large] * 2
        assert reasons[2] is not None  # all have many classes or are large
    small = huge(1, 65535, 2, 2)
    for rows, reason in ((MOST // 3, False), (MOST // 3 + 1, True)):
        target = huge(1, rows, 3)
        reasons = [
            found("upsample_argmax", small, [rows, 3]),
            found("upsample_cross_entropy", small, target),
            found("upsample_cross_entropy_backward", huge(1), small, target),
        ]
        assert [r is not None for r in reasons] == [reason] * 3
    many = found("upsample_cross_entropy_backward", huge(1), huge(1, 65536, 2, 2), huge(1, 2, 3))
    assert many == "the kernel supports at most 65535 classes"
    assert found("upsample_cross_entropy", huge(1, 65536, 2, 2), huge(1, 2, 3)) is None


@interpreted
@pytest.mark.parametrize("mask", [(1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 0), (0, 1, 1), (0, 0, 0)])
@pytest.mark.parametrize("kind", ["dense", "depthwise", "parallel"])
def test_only_needed_gradients_are_computed(monkeypatch, kind, mask):
    from deeplab_fast.backends.triton import depthwise_conv2d, dilated_conv2d_backward

    launched = []
    for module, name in (
        (dilated_conv2d_backward, "input_gradient"),
        (dilated_conv2d_backward, "weight_gradients"),
        (depthwise_conv2d, "input_gradient"),
        (depthwise_conv2d, "weight_gradient"),
    ):
        run = getattr(module, name)
        monkeypatch.setattr(
            module,
            name,
            lambda *a, run=run, name=name: launched.append(name.split("_")[-2]) or run(*a),
        )
    x, grad = torch.randn(2, 3, 4, 5).half(), torch.randn(2, 6, 4, 5).half()
    ops = torch.ops.deeplab_fast
    if kind == "parallel":
        weights = [torch.randn(2, 3, 1, 3).half(), torch.randn(4, 3, 1, 1).half()]
        op, arguments = ops.parallel_dilated_conv2d_backward, (grad, x, weights, [2, 1])
    else:
        groups = 3 if kind == "depthwise" else 1
        weight = torch.randn(6, 3 // groups, 1, 3).half()
        op, arguments = ops.dilated_conv2d_backward, (grad, x, weight, [1, 2], groups)

    def run(output_mask):
        results = op(*arguments, output_mask, backend="triton")
        return [r if isinstance(r, (list, tuple)) else [r] for r in results]

    expected = run([True] * 3)
    launched.clear()
    actual = run(list(map(bool, mask)))
    assert launched == [name for name, needed in zip(("input", "weight"), mask) if needed]
    for grads, others, needed in zip(actual, expected, mask):
        if needed:
            assert len(grads) == len(others) and all(map(torch.equal, grads, others))
        else:
            assert all(grad.numel() == 0 for grad in grads)


@interpreted
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["dense", "depthwise", "parallel"])
def test_gradients_have_the_dtype_of_their_operands(kind, dtype):
    """Gradients of the branches' biases share no memory."""
    ops, groups = torch.ops.deeplab_fast, 4 if kind == "depthwise" else 1
    x, weight = torch.ones(1, 4, 2, 3).to(dtype), torch.ones(4, 4 // groups, 1, 1).to(dtype)
    if kind == "parallel":
        arguments = (torch.ones(1, 8, 2, 3).to(dtype), x, [weight, weight], [1, 1], [True] * 3)
        results = ops.parallel_dilated_conv2d_backward(*arguments, backend="triton")
        biases = results[2]
        assert len({b.untyped_storage().data_ptr() for b in biases}) == 2
        results, expected = [results[0], *results[1], *biases], 8
    else:
        arguments = (x, x, weight, [1, 1], groups, [True] * 3)
        results = ops.dilated_conv2d_backward(*arguments, backend="triton")
        expected = 4 // groups
    assert {r.dtype for r in results} == {dtype}
    assert (results[0] == expected).all() and results[0].shape == x.shape
    for grad in results[1:]:
        assert (grad == 6).all() and grad.shape in (weight.shape, (4,))


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("place", ["channels_last", "contiguous", "input", "view of the input"])
def test_residual_is_updated_in_place(monkeypatch, place, groups, dtype):
    """Also a residual that is the input or shares its memory, which several programs read."""
    from deeplab_fast.backends.triton import depthwise_conv2d
    from deeplab_fast.ops.fused_conv2d import fused_conv2d_add_

    set_blocks(monkeypatch, 16, 16, 16)
    monkeypatch.setattr(depthwise_conv2d, "_blocks", lambda pixels, channels: (16, 4))
    residual = torch.randint(-9, 9, (2, 4, 5, 5)).to(dtype)
    x = torch.randint(-9, 9, (2, 4, 5, 5)).to(dtype)
    weight = torch.randint(-2, 3, (4, 4 // groups, 3, 3)).to(dtype)
    bias = torch.randint(-9, 9, (4,)).to(dtype)
    if place != "contiguous":
        residual = residual.contiguous(memory_format=torch.channels_last)
    if place == "input":
        x = residual
    elif place == "view of the input":  # the input has one more image, before it
        both = torch.cat([x[:1], residual]).contiguous(memory_format=torch.channels_last)
        residual, x = both[1:], both[:2]
    expected = F.conv2d(x.double(), weight.double(), bias.double(), padding=1, groups=groups)
    expected = F.relu6(expected + residual.double())
    with deeplab_fast.backend("triton"):
        output = fused_conv2d_add_(
            residual, x, weight, bias, (1, 1), (1, 1), (1, 1), groups, "relu6"
        )
    assert output is residual and torch.equal(residual.double(), expected)


@interpreted
@pytest.mark.parametrize("format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_aspp_of_different_images(format):
    """Each image has its own mean."""
    scales = torch.tensor([1.0, 10, 100])
    x = torch.randn(3, 5, 3, 4) * scales[:, None, None, None]
    x = x.contiguous(memory_format=format)
    weights = [torch.randn(k, 5, r, r) for k, r in ((3, 1), (2, 3), (4, 3))]
    biases = [torch.randn(w.size(0)) for w in weights]
    pool, pool_bias = torch.randn(6, 5, 1, 1), torch.randn(6)
    project, bias = torch.randn(7, 15, 1, 1), torch.randn(7)
    branches = [
        F.conv2d(x, w, b, padding="same", dilation=d) for w, b, d in zip(weights, biases, (1, 2, 3))
    ]
    pooled = F.conv2d(x.mean((2, 3), keepdim=True), pool, pool_bias).expand(-1, -1, 3, 4)
    expected = F.relu(F.conv2d(F.relu(torch.cat([*branches, pooled], 1)), project, bias))
    arguments = x, weights, biases, [1, 2, 3], pool, pool_bias, project, bias
    with deeplab_fast.backend("triton"):
        output = deeplab_fast.aspp(*arguments)
    assert output.is_contiguous(memory_format=format)
    for actual, right, scale in zip(output, expected, scales):
        torch.testing.assert_close(actual, right, rtol=1e-4, atol=1e-4 * scale.item())


@interpreted
def test_kernels_are_launched_on_the_device_of_their_tensors(monkeypatch):
    """The device of the tensors need not be the current one."""
    from triton.runtime.interpreter import GridExecutor

    entered, launches = [], []
    run = GridExecutor.__call__

    @contextlib.contextmanager
    def device_of(tensor):
        entered.append(tensor)
        yield
        entered.pop()

    def checked(*args, **kwargs):
        launches.append(len(entered))
        run(*args, **kwargs)

    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    monkeypatch.setattr(GridExecutor, "__call__", checked)
    x, weight, bias = torch.ones(1, 2, 3, 3), torch.ones(2, 2, 1, 1), torch.ones(2)
    depthwise, geometry = torch.ones(2, 1, 1, 1), ([1, 1], [0, 0], [1, 1], 1, "none")
    target, options = torch.zeros(1, 4, 4).long(), (255, "mean", 0.0, False)
    ops = torch.ops.deeplab_fast
    loss, *saved = ops.upsample_cross_entropy(x, target, None, *options, backend="triton")
    calls = [
        (ops.dilated_conv2d, x, weight, bias, [1, 1], 1),
        (ops.dilated_conv2d_backward, x, x, weight, [1, 1], 1, [True] * 3),
        (ops.dilated_conv2d_backward, x, x, depthwise, [1, 1], 2, [True] * 3),
        (ops.parallel_dilated_conv2d, x, [weight], [bias], [1]),
        (ops.parallel_dilated_conv2d_backward, x, x, [weight], [1], [True] * 3),
        (ops.fused_conv2d, x, weight, bias, *geometry),
        (ops.fused_conv2d_add_, x.clone(), x, weight, bias, *geometry),
        (ops.aspp, x, [weight], [bias], [1], weight, bias, torch.ones(2, 4, 1, 1), bias),
        (ops.upsample_argmax, x, [4, 4], None, False, torch.int64),
        (ops.upsample_cross_entropy, x, target, None, *options),
        (ops.upsample_cross_entropy_backward, loss, x, target, None, *saved, *options),
    ]
    for op, *arguments in calls:
        launches.clear()
        op(*arguments, backend="triton")
        assert launches and all(launches), op
