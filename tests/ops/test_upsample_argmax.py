"""upsample_argmax bit for bit against its canonical arithmetic, and within rounding of PyTorch."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

import deeplab_fast
from deeplab_fast import upsample_argmax

from ..support import bilinear_oracle
from ..support.backends import device_of, is_interpreted, needs_triton, triton_examples
from ..support.cases import DTYPES, LAYOUTS, upsampled, with_layout
from ..support.emulator import machine

OP = "upsample_argmax"
LABELS = (torch.int64, torch.int32, torch.uint8)


def arguments_of_interpolate(logits: Tensor, size, scale_factor) -> tuple:
    """Output size and source pixels per output pixel, without align_corners, like F.interpolate."""
    if size is not None:
        return size, tuple(
            float(np.float32(n) / np.float32(m)) for n, m in zip(logits.shape[2:], size)
        )
    size = tuple(math.floor(n * s) for n, s in zip(logits.shape[2:], scale_factor))
    return size, tuple(1 / s for s in scale_factor)


def canonical(logits: Tensor, size=None, scale_factor=None, align_corners=False) -> Tensor:
    """Labels that every kernel must return bit for bit."""
    size, scales = arguments_of_interpolate(logits, size, scale_factor)
    if align_corners:
        scales = tuple(
            float(np.float32(n - 1) / np.float32(m - 1)) if m > 1 else 0.0
            for n, m in zip(logits.shape[2:], size)
        )
    return bilinear_oracle.upsample(logits, size, scales, align_corners).argmax(1)


def pytorch(logits: Tensor, size=None, scale_factor=None, align_corners=False) -> Tensor:
    return upsampled(logits.contiguous(), size, scale_factor, align_corners)


def assert_only_ties_differ(labels: Tensor, expected: Tensor, logits: Tensor, **arguments) -> None:
    """Two labels differ only if their classes are as close as rounding can confuse.

    That is, the float64 gap between them is at most 2 ulp of the source index times the range of
    their difference over the corners, plus 2^-20 of the largest corner.
    """
    n, y, x = (labels != expected).nonzero(as_tuple=True)
    logits, align_corners = logits.double(), arguments.get("align_corners", False)
    size, scales = arguments_of_interpolate(
        logits, arguments.get("size"), arguments.get("scale_factor")
    )
    if align_corners:
        scales = tuple((i - 1) / max(o - 1, 1) for i, o in zip(logits.shape[2:], size))
    ulp, corners = torch.zeros(len(n)), []
    for dst, in_size, scale in zip((y, x), logits.shape[2:], scales):
        source = dst * scale if align_corners else ((dst + 0.5) * scale - 0.5).clamp_min(0)
        error = torch.from_numpy(np.spacing(source.float().numpy()))
        ulp = torch.maximum(ulp, error)
        # Next to a source pixel the index may round into the cell before or behind it.
        cells = [(source + 2 * side * error).clamp_min(0).long() for side in (-1, 1)]
        corners.append([(lo + i).clamp_max(in_size - 1) for lo in cells for i in (0, 1)])
    pairs = [(row, col) for row in corners[0] for col in corners[1]]
    ours, theirs = (
        torch.stack([logits[n, c[n, y, x], row, col] for row, col in pairs])
        for c in (labels, expected)
    )
    difference = ours - theirs
    corner_range = difference.amax(0) - difference.amin(0)
    largest = torch.maximum(ours.abs().amax(0), theirs.abs().amax(0))
    exact = pytorch(logits, **arguments)
    gap = (exact[n, labels[n, y, x], y, x] - exact[n, expected[n, y, x], y, x]).abs()
    allowed = 2 * ulp * corner_range + 2**-20 * largest
    assert (gap <= allowed).all(), f"gap {gap.max()}, at {n.tolist()[:3]} {y.tolist()[:3]}"


# Contents. Each makes [N, C, H, W] logits from a generator; with ``blocks`` neighbouring pixels
# share the winner, so that whole cells have one.


def noise(g, shape):
    return torch.randn(shape, generator=g)


def integers(g, shape):
    return torch.randint(-1, 2, shape, generator=g).float()


def near_ties(g, shape):
    """All classes are within a few ulp of one another."""
    ulps = torch.randint(-4, 5, shape, generator=g).double()
    return (torch.randn(shape[0], 1, *shape[2:], generator=g) * (1 + ulps * 2**-23)).float()


def blocks(g, shape):
    small = (*shape[:2], -(-shape[2] // 4), -(-shape[3] // 4))
    large = 5 * torch.randn(small, generator=g).repeat_interleave(4, 2).repeat_interleave(4, 3)
    return large[:, :, : shape[2], : shape[3]] + 0.1 * torch.randn(shape, generator=g)


def block_ties(g, shape):
    """Blocks in which two classes are equal or differ by one ulp."""
    logits = blocks(g, shape)
    last = logits.amax(1) * (1 + torch.randint(-1, 2, (), generator=g) * 2**-23)
    logits[:, -1] = last
    return logits


def wide_range(g, shape):
    return torch.randn(shape, generator=g) * 10.0 ** torch.randint(-6, 4, shape, generator=g)


def non_finite(g, shape):
    logits = blocks(g, shape)
    values = torch.tensor([math.inf, -math.inf, math.nan])
    chosen = values[torch.randint(0, 3, shape, generator=g)]
    return torch.where(torch.rand(shape, generator=g) < 0.05, chosen, logits)


def huge(g, shape):
    """Interpolated values may overflow."""
    largest = torch.finfo(torch.float32).max
    return torch.where(torch.rand(shape, generator=g) < 0.1, largest, -largest) * (
        1 - 2**-23 * torch.randint(0, 2, shape, generator=g)
    )


def tiny(g, shape):
    return blocks(g, shape) * 1e-40


CONTENTS = (
    noise, integers, near_ties, blocks, block_ties, wide_range, non_finite, huge, tiny
)  # fmt: skip


@st.composite
def upsamplings(draw, contents=CONTENTS):
    """Logits and the arguments size or scale_factor and align_corners."""
    content = draw(st.sampled_from(contents))
    side = st.sampled_from([1, 2, 3, 5, 8, 13, 17])
    shape = (
        draw(st.integers(1, 2)),
        draw(st.sampled_from([1, 2, 3, 7, 19, 37])),
        draw(side),
        draw(side),
    )
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    dtype = draw(st.sampled_from(DTYPES))
    logits = with_layout(content(generator, shape).to(dtype), draw(st.sampled_from(LAYOUTS)))
    arguments = {"align_corners": draw(st.booleans())}
    if draw(st.booleans()):
        out = st.sampled_from([1, 2, 7, 16, 31, 40, 67])
        arguments["size"] = (draw(out), draw(out))
    else:
        factor = st.sampled_from([0.3, 1.0, 1.7, 3.0, 3.99])
        arguments["scale_factor"] = tuple(max(draw(factor), 1 / n) for n in shape[2:])
    return logits, arguments


def test_oracle_fma_rounds_once():
    rng = np.random.default_rng(0)
    a, b, c = (rng.integers(0, 2**32, 20000, dtype=np.uint32).view(np.float32) for _ in range(3))
    keep = np.isfinite(a) & np.isfinite(b) & np.isfinite(c)
    a, b, c = a[keep], b[keep], c[keep]
    # Sums near halfway between two floats, where rounding twice goes wrong.
    one = np.float32(1) + np.arange(5000, dtype=np.float32) * np.float32(2**-23)
    small = rng.integers(-(2**23), 2**23, one.size).astype(np.float32) * np.float32(2**-47)
    a, b, c = (np.concatenate(t) for t in ((a, one, one), (b, one, small), (c, small, one)))
    results = bilinear_oracle.fma(a, b, c)
    for x, y, z, result in zip(a[::7], b[::7], c[::7], results[::7]):
        exact = Fraction(float(x)) * Fraction(float(y)) + Fraction(float(z))
        if abs(exact) >= Fraction(2) ** 128:
            continue
        neighbours = (np.nextafter(result, np.float32(s)) for s in (-np.inf, np.inf))
        if not np.isfinite(result):
            assert abs(exact) >= Fraction(2) ** 128 - Fraction(2) ** 103
            continue
        distance = abs(Fraction(float(result)) - exact)
        for neighbour in neighbours:
            if np.isfinite(neighbour):
                other = abs(Fraction(float(neighbour)) - exact)
                even = int(np.float32(result).view(np.uint32)) % 2 == 0
                assert distance < other or (distance == other and even)


# The fixtures are constants of the test.
FIXTURES = [HealthCheck.function_scoped_fixture]


@settings(max_examples=200, deadline=None, suppress_health_check=FIXTURES)
@given(case=upsamplings(), dtype=st.sampled_from(LABELS))
def test_kernels_compute_the_canonical_arithmetic(backend, device, case, dtype):
    if backend == "reference":
        pytest.skip("PyTorch has an order of operations of its own")
    if backend == "triton":
        pytest.skip("Triton: fewer examples in the next test")
    assert_canonical(backend, device, case, dtype)


@needs_triton()
@settings(max_examples=triton_examples(interpreted=40), deadline=None)
@given(case=upsamplings(), dtype=st.sampled_from(LABELS))
def test_triton_kernels_compute_the_canonical_arithmetic(case, dtype):
    assert_canonical("triton", device_of("triton"), case, dtype)


def assert_canonical(backend, device, case, dtype):
    logits, arguments = case
    with deeplab_fast.backend(backend), deeplab_fast.backends.registry.trace() as ran:
        labels = upsample_argmax(logits.to(device), dtype=dtype, **arguments)
    assert ran == [(OP, backend)]
    assert labels.dtype == dtype and labels.is_contiguous()
    assert torch.equal(labels.long().cpu(), canonical(logits, **arguments))


# Denormal logits are off by a fixed amount, not by a fraction.
NORMAL = [content for content in CONTENTS if content not in (non_finite, huge, tiny)]


@settings(max_examples=200, deadline=None, suppress_health_check=FIXTURES)
@given(case=upsamplings(NORMAL))
def test_only_ties_differ_from_pytorch_and_from_float64(backend, device, case):
    if backend == "triton":
        pytest.skip("Triton: the canonical arithmetic is compared with the cpu's")
    logits, arguments = case
    with deeplab_fast.backend(backend):
        labels = upsample_argmax(logits.to(device), **arguments).cpu()
    for dtype in (torch.float32, torch.float64):
        expected = pytorch(logits.to(dtype), **arguments).argmax(1)
        assert_only_ties_differ(labels, expected, logits, **arguments)


def test_tie_rule_rejects_wrong_labels():
    logits = torch.tensor([2.0, 2.0 - 1e-6, 1.99]).reshape(1, 3, 1, 1).expand(1, 3, 2, 2)
    best, close, wrong = (torch.full((1, 5, 5), c) for c in range(3))
    assert_only_ties_differ(close, best, logits, size=(5, 5))
    with pytest.raises(AssertionError, match="gap 0.00999"):
        assert_only_ties_differ(wrong, best, logits, size=(5, 5))


@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize("size", [(1, 1), (3, 2), (10, 8), (40, 61)])
def test_non_finite_like_pytorch(backend, device, size, align_corners):
    """PyTorch on the CPU copies along a side that keeps its size, so such sides are left out."""
    logits = torch.randn(8, 6, 9, 7)
    for value in (math.inf, -math.inf, math.nan):
        logits[torch.rand(logits.shape) < 0.02] = value
    with deeplab_fast.backend(backend):
        labels = upsample_argmax(logits.to(device), size, align_corners=align_corners)
    expected = pytorch(logits, size, align_corners=align_corners).argmax(1)
    assert torch.equal(labels.cpu(), expected)


SHAPES = [  # logits, size
    ((0, 3, 4, 5), (7, 9)),
    ((1, 1, 1, 1), (1, 1)),
    ((1, 5, 1, 1), (300, 3)),
    ((2, 4, 1, 9), (5, 150)),
    ((1, 256, 7, 5), (29, 31)),
    ((1, 21, 65, 65), (129, 129)),  # a little more than 64 output pixels to a row of tiles
    ((1, 3, 31, 37), (11, 13)),
    ((1, 3, 200, 300), (2, 3)),
    ((3, 2, 2, 2), (1, 1)),
    ((1, 70, 3, 2), (97, 101)),
]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("shape", "size"), SHAPES, ids=str)
def test_shapes(backend, device, ran, shape, size, dtype, layout):
    logits = with_layout(torch.randn(shape).to(device, dtype), layout)
    with deeplab_fast.backend(backend):
        labels = upsample_argmax(logits, size, dtype=torch.uint8).long().cpu()
    assert ran == [(OP, backend)]
    assert labels.shape == (shape[0], *size)
    expected = canonical(logits, size) if shape[0] else torch.empty(0, *size, dtype=torch.long)
    if backend == "reference":
        assert_only_ties_differ(labels, expected, logits.cpu(), size=size)
    else:
        assert torch.equal(labels, expected)


# Pruned kernels: cells of three pixels and more a side. A tile is 32 x 128 output pixels.
PRUNED = [  # logits, arguments
    ((1, 21, 9, 33), {"size": (65, 257), "align_corners": True}),  # several tiles, odd rows
    ((1, 21, 9, 33), {"size": (71, 261)}),
    ((2, 19, 5, 9), {"size": (40, 144)}),  # every label in a whole vector
    ((1, 5, 33, 3), {"scale_factor": (3.4, 7.7)}),  # the smallest cells
    ((1, 70, 4, 5), {"size": (50, 33)}),  # more classes than lanes
    ((1, 32, 3, 4), {"size": (20, 30)}),  # near ties: as many candidates as a cell can list
    ((1, 33, 3, 4), {"size": (20, 30)}),  # and one more
    ((1, 3, 2, 2), {"size": (130, 300), "align_corners": True}),  # a cell of many tiles
    ((1, 1, 3, 40), {"size": (10, 140)}),
]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("content", CONTENTS)
@pytest.mark.parametrize(("shape", "arguments"), PRUNED, ids=str)
def test_emulated_equals_cpu(shape, arguments, content, seed):
    generator = torch.Generator().manual_seed(seed)
    dtype, layout = DTYPES[seed], LAYOUTS[seed]
    logits = with_layout(content(generator, shape).to(dtype), layout)
    for labels in LABELS:
        with deeplab_fast.backend("cpu"):
            expected = upsample_argmax(logits, dtype=labels, **arguments)
        with deeplab_fast.backend("emulated"), machine(seed=seed):
            assert torch.equal(upsample_argmax(logits, dtype=labels, **arguments), expected)


@pytest.mark.parametrize("content", [noise, blocks, non_finite])
def test_any_strides(backend, device, content):
    """Transposed, expanded and offset views give the labels of their contiguous copies."""
    base = content(torch.Generator().manual_seed(0), (2, 9, 12, 15)).to(device)
    views = [
        base.transpose(2, 3),
        base.transpose(1, 3),
        base.flip(1)[:, 2:, 1:, 3:],
        base[:, :, :1, :1].expand(2, 9, 8, 6),
        base[:1].expand(3, 9, 12, 15),
        base[:, ::2, ::3, ::2],
    ]
    with deeplab_fast.backend(backend):
        for view in views:
            expected = upsample_argmax(view.contiguous(), (33, 41))
            assert torch.equal(upsample_argmax(view, (33, 41)), expected)


@pytest.mark.parametrize("content", [noise, blocks, non_finite])
def test_large_output_on_several_threads(content):
    """Several threads share the output, whose stores bypass the caches in every dtype."""
    logits = content(torch.Generator().manual_seed(0), (2, 3, 24, 40))
    expected = canonical(logits, (601, 907))
    threads = torch.get_num_threads()
    try:
        with deeplab_fast.backend("cpu"):
            for n in (1, 2, 3):
                torch.set_num_threads(n)
                for dtype in LABELS:
                    labels = upsample_argmax(logits, (601, 907), dtype=dtype)
                    assert torch.equal(labels.long(), expected)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("scale_factor", [1.6, 2.3, (3.7, 1.3)])
def test_scale_factor_is_the_scale(backend, device, scale_factor):
    """A factor that does not divide the size samples other pixels than size= does."""
    logits = torch.randn(1, 4, 13, 11, device=device)
    factors = scale_factor if isinstance(scale_factor, tuple) else (scale_factor, scale_factor)
    size = tuple(math.floor(n * s) for n, s in zip(logits.shape[2:], factors))
    with deeplab_fast.backend(backend):
        labels = upsample_argmax(logits, scale_factor=scale_factor).cpu()
        by_size = upsample_argmax(logits, size).cpu()
    expected = pytorch(logits.cpu(), scale_factor=factors).argmax(1)
    assert_only_ties_differ(labels, expected, logits.cpu(), scale_factor=factors)
    assert not torch.equal(labels, by_size)
    with deeplab_fast.backend(backend):
        assert torch.equal(
            upsample_argmax(logits, 30).cpu(), upsample_argmax(logits, (30, 30)).cpu()
        )


def test_source_index_that_rounds_past_the_end(backend, device):
    """2^24 + 3 is not a float: the last pixel's index rounds to 2^24 + 4, one past the map."""
    if backend == "reference":
        pytest.skip("PyTorch has an order of operations of its own")
    width = 2**24 + 4
    buffer = torch.zeros(1, 2, 1, width + 1, dtype=torch.float16, device=device)
    buffer[:, 1, :, width - 1] = 1
    buffer[:, 0, :, width] = 2  # what lies past the end
    with deeplab_fast.backend(backend):
        labels = upsample_argmax(buffer[..., :width], (1, 3), align_corners=True)
    assert labels.tolist() == [[[0, 0, 1]]]


def test_float64_logits(backend, device):
    logits = torch.randn(1, 4, 5, 6, dtype=torch.float64, device=device)
    with deeplab_fast.backend(backend):
        assert torch.equal(upsample_argmax(logits, 21), upsample_argmax(logits.float(), 21))


def test_automatic_choice(ran):
    upsample_argmax(torch.randn(1, 3, 4, 4), 9)
    assert ran == [(OP, "cpu")]


def test_real_logits(backend, device, shared_data):
    """Labels of a trained network equal those of its own implementation."""
    reference = np.load(shared_data / "deeplabv3_mobilenet_v2_voc" / "reference.npz")
    images = slice(1 if is_interpreted(backend) else None)
    logits = torch.from_numpy(reference["logits"])[images].to(device)
    for layout in ("contiguous", "channels_last"):
        with deeplab_fast.backend(backend):
            labels = upsample_argmax(
                with_layout(logits, layout), 513, align_corners=True, dtype=torch.uint8
            )
        assert np.array_equal(labels.cpu().numpy(), reference["labels"][images])


def test_labels_need_no_gradient(backend, device):
    logits = torch.randn(1, 4, 5, 6, device=device, requires_grad=True)
    with deeplab_fast.backend(backend):
        assert not upsample_argmax(logits, 9).requires_grad


def test_autocast(backend, device):
    logits = torch.randn(1, 4, 5, 6, device=device)
    with deeplab_fast.backend(backend):
        expected = upsample_argmax(logits, 21)
        with torch.autocast(device, torch.bfloat16):
            assert torch.equal(upsample_argmax(logits, 21), expected)


@pytest.mark.parametrize("dtype", LABELS, ids=str)
def test_opcheck(opcheck, backend, device, dtype):
    logits = torch.randn(2, 4, 5, 6, device=device, requires_grad=True)
    op = torch.ops.deeplab_fast.upsample_argmax
    opcheck(op, (logits, [9, 8], None, False, dtype), {"backend": backend})
    opcheck(op, (logits, [7, 9], [1.5, 1.5], True, dtype), {"backend": backend})


def test_compile_fullgraph(backend, device, ran):
    logits = torch.randn(2, 4, 5, 6, device=device)

    def inside(logits):
        with deeplab_fast.backend(backend):
            return upsample_argmax(logits * 2, scale_factor=2.5) + 1

    def outside(logits):
        return upsample_argmax(logits * 2, scale_factor=2.5) + 1

    for function in (inside, outside):
        torch._dynamo.reset()
        with deeplab_fast.backend(backend):
            expected = function(logits)
            ran.clear()
            labels = torch.compile(function, fullgraph=True, backend="aot_eager")(logits)
        assert ran == [(OP, backend)]
        assert torch.equal(labels, expected)


def test_export(backend, device):
    class Labels(torch.nn.Module):
        def forward(self, logits: Tensor) -> Tensor:
            return upsample_argmax(logits, (20, 31), dtype=torch.uint8)

    logits = torch.randn(2, 4, 5, 6, device=device)
    with deeplab_fast.backend(backend):
        program = torch.export.export(Labels(), (logits,))
        assert torch.equal(program.module()(logits), Labels()(logits))


LOGITS = torch.zeros(1, 4, 5, 6)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((LOGITS[0], 9), ValueError, r"logits: expected \[N, C, H, W\].*got shape \(4, 5, 6\)"),
        ((LOGITS[:, :0], 9), ValueError, "C, H, W >= 1"),
        ((LOGITS[:, :, :0], 9), ValueError, "C, H, W >= 1"),
        ((LOGITS.long(), 9), TypeError, "expected a floating dtype, got torch.int64"),
        ((LOGITS,), ValueError, "size and scale_factor: expected exactly one, got neither"),
        ((LOGITS, 9, 2.0), ValueError, "size and scale_factor: expected exactly one, got both"),
        ((LOGITS, 0), ValueError, "size: expected a positive number or two of them, got 0"),
        ((LOGITS, (9, -1)), ValueError, r"size: expected .* got \(9, -1\)"),
        ((LOGITS, (9, 9, 9)), ValueError, r"size: expected .* got \(9, 9, 9\)"),
        ((LOGITS, None, 0.0), ValueError, "scale_factor: expected a positive number"),
        ((LOGITS, None, 0.1), ValueError, "expected an output of at least 1x1, got 0x0"),
        ((LOGITS, 9, None, False, torch.int16), ValueError, "dtype: expected torch.int64"),
        (
            (torch.zeros(1, 257, 2, 2), 9, None, False, torch.uint8),
            ValueError,
            "expected one that holds 257 classes, got torch.uint8",
        ),
    ],
)
def test_bad_input(arguments, error, message):
    with pytest.raises(error, match=message):
        upsample_argmax(*arguments)


def test_out_of_memory():
    logits = torch.zeros(1).expand(1, 2**25, 1, 2**20)
    with pytest.raises(RuntimeError, match="upsample_argmax_fwd: out of memory"):
        upsample_argmax(logits, (1, 2**20))
