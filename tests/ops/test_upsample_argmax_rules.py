"""Rules of upsample_argmax as fixed cases, sizes around every constant of its kernels, and bounds.

The expected labels of the fixed cases are written out by hand: interpolation in fp32, the first NaN
wins, else the greatest value, else the lowest class, and a zero weight times Inf is NaN.
"""

from __future__ import annotations

import itertools
import math
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

import deeplab_fast
from deeplab_fast import _C, upsample_argmax
from deeplab_fast._native.common import DTYPES as DTYPES_OF_KERNELS
from deeplab_fast._native.upsample_shape import upsample_shape
from deeplab_fast.backends import registry

from ..ops.test_upsample_argmax import LABELS, blocks, canonical, near_ties, noise, non_finite
from ..support import bilinear_oracle
from ..support.backends import is_interpreted
from ..support.cases import DTYPES, LAYOUTS, with_layout
from ..support.emulator import machine
from ..support.memory import (
    GuardedMemory,
    allocations_from,
    copy_beside_unreadable_page,
    empty_beside_unreadable_page,
    guarded_allocations,
    in_child,
    sparse_zeros,
)

OP = "upsample_argmax"
LOGITS = (*DTYPES, torch.float64)
NAN, INF = math.nan, math.inf

# A patch is a map of two source pixels a side. Kernels with lists of candidates use them up to 0.3
# source pixels per output pixel.


class Upsampling(NamedTuple):
    name: str
    align_corners: bool
    size: int  # of a patch's output, both sides
    no_weight: tuple[int, ...]  # where one of the two source pixels has weight 0
    left: tuple[int, ...]  # where the first source pixel has more weight than the second
    middle: tuple[int, ...]  # where they have the same
    period: int  # output columns from a patch to the next, side by side
    own: tuple[int, ...]  # columns to which the next patches do not contribute, side by side

    def __str__(self) -> str:
        return f"{self.name}-{'aligned' if self.align_corners else 'centred'}"


UPSAMPLINGS = (
    # source coordinates 0, .25, .75, 1.25
    Upsampling("all_classes", False, 4, (0,), (0, 1), (), 4, (1, 2)),
    # 0, .5, 1
    Upsampling("all_classes", True, 3, (0, 2), (0,), (1,), 4, (0, 1)),
    # 0, 0, .125, .375, .625, .875, 1.125, 1.375
    Upsampling("candidates", False, 8, (0, 1), (0, 1, 2, 3), (), 8, (2, 3, 4, 5)),
    # 0, .125, .25, ... 1
    Upsampling("candidates", True, 9, (0, 8), (0, 1, 2, 3), (4,), 16, tuple(range(8))),
)
every_upsampling = pytest.mark.parametrize("upsampling", UPSAMPLINGS, ids=str)


def constant(values, dtype: torch.dtype) -> Tensor:
    """Patches [R, C, 2, 2] of [R, C] values."""
    values = torch.as_tensor(values, dtype=torch.float64).to(dtype)
    return values[..., None, None].expand(*values.shape, 2, 2)


def labels_of(backend: str, logits: Tensor, size, align_corners, dtypes=LABELS) -> Tensor:
    """Labels in guarded memory, equal in every dtype."""
    results = []
    with deeplab_fast.backend(backend), guarded_allocations() as memory:
        for dtype in dtypes:
            labels = upsample_argmax(logits, size, align_corners=align_corners, dtype=dtype)
            assert labels.dtype == dtype
            results.append(labels.long().cpu())
        assert backend == "reference" or len(memory) >= len(dtypes)
    for labels in results[1:]:
        assert torch.equal(labels, results[0])
    return results[0]


def assert_labels_of_patches(
    backend: str, patches: Tensor, expected: Tensor, upsampling: Upsampling
) -> None:
    """Check the labels [R, size, size] of patches [R, C, 2, 2], as images and in one image."""
    labels_dtypes = LABELS if patches.size(1) <= 256 else LABELS[:2]
    if not is_interpreted(backend):  # where an image takes a program, which takes long
        size = (upsampling.size, upsampling.size)
        labels = labels_of(
            backend, patches.contiguous(), size, upsampling.align_corners, labels_dtypes
        )
        assert torch.equal(labels, expected)

    count = patches.size(0)
    row = patches.permute(1, 2, 0, 3).reshape(1, patches.size(1), 2, 2 * count)
    half = upsampling.period // 2
    width = half * (2 * count - 1) + 1 if upsampling.align_corners else half * 2 * count
    dtypes = labels_dtypes[count % 2 :][:1] if is_interpreted(backend) else labels_dtypes
    labels = labels_of(backend, row, (upsampling.size, width), upsampling.align_corners, dtypes)
    columns = [r * upsampling.period + x for r in range(count) for x in upsampling.own]
    found = labels[0][:, columns].reshape(upsampling.size, count, -1).transpose(0, 1)
    assert torch.equal(found, expected[:, :, list(upsampling.own)])


def with_edges(upsampling: Upsampling, inside, edge) -> Tensor:
    """Labels [R, size, size]: ``edge`` where a source row or column has weight 0."""
    inside, edge = (torch.tensor(labels).reshape(-1, 1, 1) for labels in (inside, edge))
    on_edge = torch.zeros(upsampling.size, upsampling.size, dtype=torch.bool)
    for i in upsampling.no_weight:
        on_edge[i] = on_edge[:, i] = True
    return torch.where(on_edge, edge, inside)


# Classes of the same value at all four corners; the label; the label where a weight is 0.
RULES = [
    ([7], 0, 0),
    ([NAN], 0, 0),
    ([INF], 0, 0),
    ([-INF], 0, 0),
    ([2, 2, 2], 0, 0),
    ([1, 2, 2, 2], 1, 1),
    ([1, 2, 1, 2], 1, 1),
    ([2, 1, 2], 0, 0),
    ([1, 2, 3, 3, 2, 3, 1], 2, 2),
    ([-3, -2, -2], 1, 1),
    # -0 equals +0
    ([-0.0, 0.0], 0, 0),
    ([0.0, -0.0], 0, 0),
    ([-0.0, -0.0, 0.0], 0, 0),
    ([-1, -0.0, 0.0], 1, 1),
    ([-1, 0.0, -0.0], 1, 1),
    ([-1, -0.0, -0.0, 0.0, -0.0], 1, 1),
    ([-0.0, -1, 0.0, 0.0], 0, 0),
    ([0.0, -0.0, 1, -0.0], 2, 2),
    # the first NaN wins
    ([NAN, 1], 0, 0),
    ([1, NAN], 1, 1),
    ([NAN, NAN], 0, 0),
    ([1, NAN, NAN], 1, 1),
    ([1, NAN, 2, NAN, 3], 1, 1),
    ([-0.0, 0.0, 0.0, -0.0, NAN], 4, 4),
    ([5, NAN, INF, NAN], 1, 1),
    ([5, 6, -INF, 4, NAN, NAN, INF], 4, 2),
    ([NAN, INF], 0, 0),
    ([INF, NAN], 1, 0),
    ([-INF, NAN], 1, 0),
    ([NAN, -INF], 0, 0),
    ([INF, INF, NAN, INF], 2, 0),
    # infinities tie with one another
    ([INF, INF], 0, 0),
    ([1, INF, INF], 1, 1),
    ([INF, 1], 0, 0),
    ([1, 2, INF], 2, 2),
    ([-INF, -INF], 0, 0),
    ([-INF, -5], 1, 0),
    ([-5, -INF], 0, 1),
    ([-5, -6, -INF], 0, 2),
    ([-INF, INF], 1, 0),
    ([INF, -INF], 0, 0),
    ([-INF, -INF, -INF, -3], 3, 0),
    ([-INF, -INF, -3, -3, -INF], 2, 0),
    ([-1, -INF, 0.0, INF, -0.0, INF], 3, 1),
]


@every_upsampling
@pytest.mark.parametrize("dtype", LOGITS, ids=str)
def test_rules_of_the_order(backend, device, upsampling, dtype):
    if is_interpreted(backend) and dtype == torch.bfloat16:
        pytest.skip("Triton's interpreter: bf16 is fp32 there")
    by_classes: dict[int, list] = {}
    for values, inside, edge in RULES:
        if is_interpreted(backend):  # all in one image; a repeated last class never wins
            values = values + values[-1:] * (7 - len(values))
        by_classes.setdefault(len(values), []).append((values, inside, edge))
    for rules in by_classes.values():
        values, inside, edge = zip(*rules)
        patches = constant(values, dtype).to(device)
        assert_labels_of_patches(backend, patches, with_edges(upsampling, inside, edge), upsampling)


# Values are multiples of the least positive normal value (first rows) or of the greatest value of
# the dtype in which kernels compute, which is float32 for float64 logits.
DENORMAL_RULES = [
    ([0, 2**-4], 1),
    ([0.0, -(2**-4)], 0),
    ([-(2**-4), -0.0, 0.0], 1),
    ([-(2**-3), -(2**-4), -(2**-4)], 1),
    ([2**-4, 2**-3, 2**-3], 1),
    ([2**-3, 2**-4], 0),
    ([2**-4, 2**-4], 0),
    ([0, 2**-4, 1, 2**-4], 2),
]
GREATEST_RULES = [
    ([1, 1], 0),
    ([0.5, 1, 0.5], 1),
    ([-1, -1], 0),
    ([-1, -0.5, -0.5], 1),
    ([-1, 1, -1, 1], 1),
    ([-0.5, -1, 0], 2),
]
INFINITY_RULES = [  # with labels where a weight is 0
    ([-INF, -1], 1, 0),
    ([-1, -INF], 0, 1),
    ([1, INF], 1, 1),
    ([INF, 1], 0, 0),
]


@every_upsampling
@pytest.mark.parametrize("dtype", LOGITS, ids=str)
def test_smallest_and_greatest_values(backend, device, upsampling, dtype):
    finfo = torch.finfo(torch.float32 if dtype == torch.float64 else dtype)
    rules = [
        ([v * unit for v in values], inside, *edge)
        for unit, rules in (
            (finfo.tiny, DENORMAL_RULES),
            (finfo.max, GREATEST_RULES),
            (finfo.max, INFINITY_RULES),
        )
        for values, inside, *edge in rules
    ]
    values = [values + values[-1:] * (4 - len(values)) for values, *_ in rules]
    expected = with_edges(upsampling, [rule[1] for rule in rules], [rule[-1] for rule in rules])
    assert_labels_of_patches(backend, constant(values, dtype).to(device), expected, upsampling)


@every_upsampling
def test_float64_logits_are_compared_as_float32(backend, device, upsampling):
    values = [[1, 1 + 2**-30, 1], [1, 1 + 2**-22, 1], [1e200, 1e300, INF], [-1, 1e-60, 0]]
    patches = constant(values, torch.float64).to(device)
    expected = with_edges(upsampling, [0, 1, 0, 1], [0, 1, 0, 1])
    assert_labels_of_patches(backend, patches, expected, upsampling)


# NaN: positive, negative, signalling, with the least and with the greatest payload.
NAN_BITS = {
    torch.float32: (0x7FC00000, 0xFFC00000, 0x7F800001, 0xFF800001, 0x7FFFFFFF, 0xFFFFFFFF),
    torch.float16: (0x7E00, 0xFE00, 0x7C01, 0xFC01, 0x7FFF, 0xFFFF),
    torch.bfloat16: (0x7FC0, 0xFFC0, 0x7F81, 0xFF81, 0x7FFF, 0xFFFF),
}


@every_upsampling
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_first_nan_wins_whatever_its_bits(backend, device, upsampling, dtype):
    pairs = list(itertools.product(NAN_BITS[dtype], repeat=2))
    values = torch.tensor([[2, 0, 9, 0, 3]] * len(pairs), dtype=dtype)
    bits = values.view(torch.int32 if dtype.itemsize == 4 else torch.int16)
    modulus = 2 ** (8 * dtype.itemsize)
    for image, pair in enumerate(pairs):
        for c, nan in zip((1, 3), pair):
            bits[image, c] = nan - modulus if nan >= modulus // 2 else nan
    assert values[:, (1, 3)].isnan().all()
    patches = values.to(device)[..., None, None].expand(-1, -1, 2, 2)
    expected = torch.full((len(pairs), upsampling.size, upsampling.size), 1)
    assert_labels_of_patches(backend, patches, expected, upsampling)


# One less and one more than a vector, a warp, a block of classes, and the range of uint8.
CLASSES = (1, 2, 3, 4, 5, 8, 9, 16, 17, 31, 32, 33, 64, 65, 129, 256, 257)
FAR = (0, 1, 3, 4, 15, 16, 31, 32, 63, 64, 128, 255, 256)


def pairs_of_classes(backend: str, num_classes: int) -> list[tuple[int, int]]:
    """Pairs of classes, the lower one first, near to one another and far apart."""
    if backend == "emulated" and num_classes not in (1, 2, 3, 4, 5, 31, 32, 33, 65):
        pytest.skip("takes long: classes come in fours and in blocks of 32")
    if is_interpreted(backend) and num_classes not in (1, 2, 33):
        pytest.skip("Triton's interpreter: classes come in blocks of 32")
    if backend == "reference" and num_classes not in (1, 5, 33):
        pytest.skip("PyTorch's argmax needs no tests at every vector length")
    classes = sorted({c for c in FAR if c < num_classes} | {num_classes - 1})
    pairs = [*zip(classes, classes[1:]), *((0, c) for c in classes[1:])]
    return list(dict.fromkeys([*pairs, *((c, classes[-1]) for c in classes[:-1])]))


@every_upsampling
@pytest.mark.parametrize("num_classes", CLASSES)
def test_equal_maxima_go_to_the_lowest_class(backend, device, upsampling, num_classes):
    """The winning class is found at every index, also as the only class."""
    pairs = pairs_of_classes(backend, num_classes)
    pairs += [(c, c) for c in range(num_classes) if c in FAR]
    for index, value in enumerate((3.0, INF, NAN)):
        values = torch.full((len(pairs), num_classes), -2.0)
        for image, pair in enumerate(pairs):
            values[image, list(pair)] = value
        labels = [min(pair) for pair in pairs]
        dtype = DTYPES[(num_classes + index) % 3]
        assert_labels_of_patches(
            backend,
            constant(values, dtype).to(device),
            with_edges(upsampling, labels, labels),
            upsampling,
        )


@every_upsampling
@pytest.mark.parametrize("num_classes", CLASSES[1:])
def test_a_class_on_each_side(backend, device, upsampling, num_classes):
    """The nearer of two source rows or columns decides; halfway, the lower class wins."""
    pairs = pairs_of_classes(backend, num_classes)
    pairs += [(j, i) for i, j in pairs]
    patches = torch.zeros(2 * len(pairs), num_classes, 2, 2)
    expected = torch.empty(2 * len(pairs), upsampling.size, upsampling.size, dtype=torch.long)
    first, middle = list(upsampling.left), list(upsampling.middle)
    for image, (i, j) in enumerate(pairs):
        patches[image, i, :, 0] += 1
        patches[image, j, :, 1] += 1
        across = torch.full((upsampling.size,), j)
        across[first] = i
        across[middle] = min(i, j)
        expected[image] = across
        patches[len(pairs) + image] = patches[image].transpose(1, 2)
        expected[len(pairs) + image] = across[:, None]
    dtype = DTYPES[num_classes % 3]
    assert_labels_of_patches(backend, patches.to(device, dtype), expected, upsampling)


@pytest.mark.parametrize("num_classes", [300, 33000])
@pytest.mark.parametrize("size", [(8, 9), (2, 3)], ids=["candidates", "all_classes"])
def test_labels_that_need_more_than_a_byte(backend, device, size, num_classes):
    if is_interpreted(backend) and (num_classes > 300 or size == (2, 3)):
        pytest.skip("Triton's interpreter takes long for as many classes")
    logits = torch.zeros(1, num_classes, 2, 2)
    logits[0, 40] = 0.5
    logits[0, num_classes - 1, 0] = 2
    logits[0, num_classes - 2, 1] = 2
    labels = labels_of(backend, logits.to(device), size, False, LABELS[:2])
    half = size[0] // 2
    assert (labels[:, :half] == num_classes - 1).all()
    assert (labels[:, half:] == num_classes - 2).all()


def with_winners_on_a_grid(num_classes: int, height: int, width: int) -> Tensor:
    """Logits [1, C, height, width] whose pixels have different winners, if classes suffice."""
    pixels = torch.arange(height * width)
    logits = torch.zeros(1, num_classes, height * width)
    logits[0, (pixels * 7 + num_classes - 1) % num_classes, pixels] = 1
    return logits.reshape(1, num_classes, height, width)


def exact(logits: Tensor, size, align_corners) -> Tensor:
    """Labels from float64, exact for small integers and weights in eighths."""
    interpolate = torch.ops.aten.upsample_bilinear2d
    return interpolate(logits.double(), size, align_corners).argmax(1)


# Scales that are powers of two, so that weights are too.
EXACT = [  # height, width, size, align_corners
    (3, 5, (12, 20), False),
    (3, 5, (9, 17), True),
    (4, 3, (8, 6), False),
    (3, 4, (5, 7), True),
    (6, 8, (3, 4), False),
    (5, 9, (3, 5), True),
    (2, 3, (16, 24), False),
    (1, 3, (16, 9), True),
]


@pytest.mark.parametrize("num_classes", [2, 5, 6, 33, 34, 65])
@pytest.mark.parametrize(("height", "width", "size", "align_corners"), EXACT, ids=str)
def test_many_ties_and_many_winners(
    backend, device, height, width, size, align_corners, num_classes
):
    if is_interpreted(backend) and (num_classes != 34 or height in (2, 6)):
        pytest.skip("Triton's interpreter: less of the same")
    generator = torch.Generator().manual_seed(num_classes)
    shape = (1, num_classes, height, width)
    for dtype, logits in zip(
        DTYPES,
        (
            torch.randint(-2, 3, shape, generator=generator).float(),
            with_winners_on_a_grid(num_classes, height, width),
            1 - with_winners_on_a_grid(num_classes, height, width),
        ),
    ):
        labels = labels_of(
            backend, logits.to(device, dtype), size, align_corners, LABELS[num_classes % 3 :][:1]
        )
        assert torch.equal(labels, exact(logits, size, align_corners))


@every_upsampling
@pytest.mark.parametrize("num_classes", [31, 32, 33, 34])
def test_as_many_candidates_as_classes(backend, device, upsampling, num_classes):
    """All classes are equal but for one corner, where one or two are greater."""
    chosen = [(num_classes - 1,) * 2, (1, num_classes - 1), (30, num_classes - 2), (0, 30)]
    patches = torch.ones(4 * len(chosen), num_classes, 2, 2)
    corners = torch.zeros(4 * len(chosen), 1, 2, 2)
    labels = torch.empty(4 * len(chosen), dtype=torch.long)
    for i, (classes, corner) in enumerate(itertools.product(chosen, range(4))):
        patches[i, list(classes), corner // 2, corner % 2] = 2
        corners[i, 0, corner // 2, corner % 2] = 1
        labels[i] = min(classes)
    size = (upsampling.size, upsampling.size)
    weights = torch.ops.aten.upsample_bilinear2d(corners, size, upsampling.align_corners)
    expected = torch.where(weights[:, 0] > 0, labels[:, None, None], 0)
    dtype = DTYPES[num_classes % 3]
    assert_labels_of_patches(backend, patches.to(device, dtype), expected, upsampling)


@every_upsampling
def test_a_class_that_wins_near_one_corner(backend, device, upsampling):
    """A class that wins at one corner loses by far at the other three."""
    patches = torch.zeros(12, 3, 2, 2)
    for i, (corner, k) in enumerate(itertools.product(range(4), range(3))):
        patches[i, k] = -1
        patches[i, k, corner // 2, corner % 2] = 8
    size = (upsampling.size, upsampling.size)
    expected = exact(patches, size, upsampling.align_corners)
    assert all((labels == i % 3).any() for i, labels in enumerate(expected))
    assert_labels_of_patches(backend, patches.to(device), expected, upsampling)


@pytest.mark.parametrize("size", [(11, 13), (3, 3)], ids=["candidates", "all_classes"])
def test_neighbouring_floats_everywhere(backend, device, size):
    """The winner at all four corners ties where rounding removes its lead."""
    if backend == "reference":
        pytest.skip("PyTorch has an order of operations of its own")
    lead = torch.randn(8, 1, 2, 2)
    behind = torch.nextafter(lead, torch.tensor(-INF))
    far = lead - 1
    for order in ((behind, lead, far), (far, behind, lead), (behind, behind, far, far, far, lead)):
        logits = torch.cat(order, 1)
        expected = canonical(logits, size)
        assert len(expected.unique()) == 2
        labels = labels_of(backend, logits.to(device), size, False, LABELS[:1])
        assert torch.equal(labels, expected)


# Output rows (or columns) to which each of three source rows contributes, be it with weight 0.
SPOTS = [  # size, align_corners, contributions
    (6, False, ((0, 1, 2), (0, 1, 2, 3, 4), (3, 4, 5))),
    (5, True, ((0, 1), (0, 1, 2, 3), (2, 3, 4))),
    (12, False, (range(6), range(10), range(6, 12))),
    (9, True, (range(4), range(8), range(4, 9))),
]


@pytest.mark.parametrize("value", [NAN, INF])
@pytest.mark.parametrize(
    ("size", "align_corners", "contributions"), SPOTS, ids=["6", "5-aligned", "12", "9-aligned"]
)
def test_a_spot_of_nan_or_infinity(backend, device, size, align_corners, contributions, value):
    """NaN or infinity reaches exactly the pixels that it contributes to, also with weight 0."""
    spots = [(y, x) for y in range(3) for x in range(3)]
    if is_interpreted(backend):
        spots = [(0, 2), (2, 0), (1, 1), (2, 2)]
    logits = torch.zeros(len(spots), 6, 3, 3)
    logits[:, 2] = 1
    expected = torch.full((len(spots), size, size), 2)
    for i, (y, x) in enumerate(spots):
        spot = 5 if i % 2 else 1
        logits[i, spot, y, x] = value
        rows, columns = list(contributions[y]), list(contributions[x])
        expected[i, torch.tensor(rows)[:, None], torch.tensor(columns)] = spot
    labels = labels_of(backend, logits.to(device), (size, size), align_corners, LABELS[:1])
    assert torch.equal(labels, expected)


# Sizes one less than, equal to and one more than the blocks of a kernel.


CONTENTS = (blocks, noise, non_finite, near_ties)


def assert_canonical(backend, device, shape, size, align_corners, index) -> None:
    """Check one case; content, dtype, layout and dtype of the labels depend on ``index``."""
    generator = torch.Generator().manual_seed(index)
    content, dtype = CONTENTS[index % 4], DTYPES[index % 3]
    layout, labels_dtype = LAYOUTS[index // 3 % 3], LABELS[index // 2 % 3]
    logits = with_layout(content(generator, shape).to(device, dtype), layout)
    with machine(seed=index):  # what the emulator leaves in fresh memory depends on it
        labels = labels_of(backend, logits, size, align_corners, [labels_dtype])
    assert torch.equal(labels, canonical(logits, size, align_corners=align_corners)), (
        f"{content.__name__} {dtype} {layout} {shape} {size} {align_corners}"
    )


def assert_all_canonical(backend, device, cases) -> None:
    """Each case has four contents, three dtypes and two layouts."""
    for case, (shape, size, align_corners) in enumerate(cases):
        for index in range(5 * case, 5 * case + 4):
            assert_canonical(backend, device, shape, size, align_corners, index)


WIDTHS = (1, 7, 8, 9, 15, 16, 17, 63, 64, 65, 79, 80, 81, 127, 128, 129)
CPU_SIZES = [
    *(((2, 5, 2, 3), (5, width), width % 2 == 0) for width in WIDTHS),  # lanes, tiles of 64 columns
    *(((1, 5, 2, 1), (5, width), width % 2 == 0) for width in WIDTHS),  # a cell of every width
    *(((2, 6, 2, 2), (height, 21), height % 2 == 0) for height in (15, 16, 17, 31, 32, 33, 49)),
    *(((1, 5, 3, width), (7, 3 * width), False) for width in (1, 2, 3, 4, 5, 8, 9, 15, 16, 17, 33)),
    *(((2, 5, 9, width), (4, width // 2), False) for width in (8, 9, 32, 33, 34)),  # some columns
    *(((1, C, 3, 4), (9, 13), True) for C in (1, 2, 3, 4, 5, 7, 8, 9, 31, 32, 33, 36, 37, 64, 65)),
    *(((N, 2, 3, 2), (5, 4), False) for N in (1, 2, 3)),
]


def test_sizes_around_the_blocks_of_the_cpu_kernel():
    assert_all_canonical("cpu", "cpu", CPU_SIZES)


EMULATED_SIZES = [
    # A block of 256 pixels, each of them walking all classes
    *(((1, 3, 9, 9), size, False) for size in ((15, 17), (16, 16), (17, 15), (1, 1), (2, 3))),
    *(((3, 2, 1, 100), (1, width), True) for width in (85, 86, 255, 256, 257)),
    # Tiles of 32 x 128 pixels, and vectors of 2, 4 and 16 labels
    *(((1, 3, 3, 2), (height, 10), height % 2 == 0) for height in (31, 32, 33, 63, 64, 65)),
    *(((1, 3, 2, 3), (9, width), width % 2 == 0) for width in (126, 127, 128, 129, 130, 132)),
    *(((2, 3, 2, 3), (33, width), True) for width in (144, 255, 256, 257)),
    # A warp takes 8 x 8 pixels of a cell
    *(((1, 5, 2, 2), (height, 9), True) for height in (4, 5, 8, 9, 10, 12, 13, 16, 17, 18)),
    *(((1, 5, 2, 2), (9, width), True) for width in (4, 5, 8, 9, 10, 16, 17, 18)),
    # 4 lanes rank the classes of a source pixel, 64 source pixels at a time
    *(((1, C, 2, 3), (8, 12), False) for C in (1, 2, 3, 4, 5, 6, 7, 8, 9, 31, 32, 33, 64, 65)),
    *(((1, 3, 8, width), (28, 4 * width), False) for width in (7, 8, 9)),
    # The map has as many cells as fit in a tile, more than a block has threads.
    ((1, 2, 11, 42), (40, 140), False),
    ((1, 2, 20, 43), (64, 144), True),
    # The greatest scale at which cells are pruned, and a little more
    ((1, 3, 3, 3), (10, 10), False),
    ((1, 3, 31, 31), (101, 103), True),
    ((1, 3, 31, 31), (101, 101), True),
]


def test_sizes_around_the_blocks_of_the_gpu_kernels(backend, device):
    if backend in ("reference", "cpu") or is_interpreted(backend):
        pytest.skip("other kernels")
    assert_all_canonical(backend, device, EMULATED_SIZES)


TRITON_SIZES = [
    # 256 and 4096 pixels of an image
    *(((2, 3, 8, 8), size, False) for size in ((15, 17), (16, 16), (1, 257), (1, 1))),
    *(((2, 3, 2, 2), size, True) for size in ((15, 17), (16, 16), (257, 1))),
    ((1, 2, 2, 3), (64, 65), False),
    # 8 and 1024 cells, images included
    *(((N, 3, 1, W), (4, 4 * W), False) for N, W in ((1, 1), (1, 7), (2, 4), (3, 3))),
    # 32 classes
    *(((1, C, 2, 2), (8, 5), True) for C in (1, 2, 32, 33)),
    *(((1, C, 2, 2), (2, 3), True) for C in (1, 2, 32, 33)),
]


@pytest.fixture(params=["interpreted", "compiled"])
def triton_blocks(request, monkeypatch):
    """Interpreted and compiled block sizes in the interpreter."""
    if registry.unavailable_reason("triton", "cpu") is not None:
        pytest.skip("Triton's kernels are compiled here")
    from deeplab_fast.backends.triton import upsample_argmax as module

    if request.param == "compiled":
        monkeypatch.setattr(module, "block_for", lambda size, compiled, interpreted: compiled)


def test_sizes_around_the_blocks_of_the_triton_kernels(triton_blocks):
    for index, (shape, size, align_corners) in enumerate(TRITON_SIZES):
        assert_canonical("triton", "cpu", shape, size, align_corners, index)


@pytest.mark.skipif(not is_interpreted("triton"), reason="Triton's kernels are compiled here")
@pytest.mark.parametrize("height", [1023, 1024, 1025])
def test_cells_around_the_block_of_the_interpreter(height):
    assert_canonical("triton", "cpu", (1, 2, height, 1), (4 * height, 1), False, 0)


@pytest.mark.skipif(not is_interpreted("triton"), reason="Triton's kernels are compiled here")
def test_fma_of_the_interpreter_in_every_sign_and_range():
    """Some sums are almost halfway between two floats, where rounding twice is wrong."""
    from deeplab_fast.backends.triton.bilinear import fma_kernel

    steps = torch.arange(1024)
    ones, halves = 1 + steps * 2.0**-23, 2.0**-24 * (1 - steps * 2.0**-23)
    twice = (ones.double() * halves.double() + ones.double()).float()
    wide = torch.randn(3, 1024) * 10.0 ** torch.randint(-20, 20, (3, 1024))
    special = torch.tensor([INF, -INF, NAN, 0.0, -0.0, 1e30, -1e30, 1e-40]).repeat(128)
    cases = [
        (ones, halves, ones),
        (-ones, halves, -ones),
        (ones, -halves, ones),
        (ones, -halves, -ones),
        (wide[0], wide[1], wide[2]),
        (special, special.roll(1), special.roll(3)),
        (special, wide[0], special.roll(1)),
    ]
    for index, (a, b, c) in enumerate(cases):
        out = torch.empty(1024)
        fma_kernel[(1,)](out, a, b, c, EMULATE=True, BLOCK=1024)
        expected = torch.from_numpy(bilinear_oracle.fma(a.numpy(), b.numpy(), c.numpy()))
        torch.testing.assert_close(out, expected, rtol=0, atol=0, equal_nan=True)
        assert index > 0 or (expected != twice).sum() > 100


# Bounds


def fill_labels(labels: Tensor, logits: Tensor, align_corners: bool, threads: int) -> None:
    """The cpu kernel, writing to a given tensor."""
    _C.cpu.upsample_argmax_fwd(
        labels.data_ptr(),
        logits.data_ptr(),
        upsample_shape(logits, labels.shape[1:], None, align_corners),
        DTYPES_OF_KERNELS[labels.dtype],
        DTYPES_OF_KERNELS[logits.dtype],
        threads,
    )


@pytest.mark.parametrize("width", [1, 3, 7, 8, 9, 15, 17, 33, 63, 64, 65, 130])
@pytest.mark.parametrize("dtype", LABELS, ids=str)
def test_streamed_rows_of_any_width_and_alignment(dtype, width):
    """Outputs of at least a megabyte, with rows around the size of a cache line."""
    line = 64 // dtype.itemsize
    images = 8  # all the same, to have expected labels of one
    height = -(-(2**20) // (images * width * dtype.itemsize))
    logits = blocks(torch.Generator().manual_seed(width), (1, 2, 37, 3)).expand(images, -1, -1, -1)
    expected = canonical(logits[:1], (height, width)).to(dtype).repeat(images, 1, 1)
    memory = GuardedMemory()
    for misalignment, threads in ((0, 1), (1, 3), (line // 2 + 1, 2), (line - 1, 1)):
        labels = memory.empty(expected.shape, dtype, misalignment=misalignment)
        fill_labels(labels, logits, False, threads)
        assert torch.equal(labels, expected)
    memory.assert_intact()


@pytest.mark.parametrize("dtype", LABELS, ids=str)
def test_small_outputs_of_any_alignment(dtype):
    logits = noise(torch.Generator().manual_seed(0), (2, 3, 2, 3))
    memory = GuardedMemory()
    for width, misalignment in itertools.product((1, 2, 15, 16, 17, 65), (0, 1, 3, 7)):
        expected = canonical(logits, (7, width), align_corners=True).to(dtype)
        labels = memory.empty(expected.shape, dtype, misalignment=misalignment)
        fill_labels(labels, logits, True, 1)
        assert torch.equal(labels, expected)
    memory.assert_intact()


def test_guards_detect_a_byte_on_either_side():
    for index, side in ((-1, "before"), (12, "after")):
        with pytest.raises(AssertionError, match=f"1 bytes written {side} a tensor"):
            with guarded_allocations() as memory:
                tensor = torch.zeros(3).new_empty(3, 4, dtype=torch.uint8)
                assert tensor.shape == (3, 4) and len(memory) == 1
                tensor.as_strided((1,), (1,), tensor.storage_offset() + index).fill_(0)


UNREADABLE = [  # logits, size, align_corners
    ((1, 1, 1, 1), (1, 1), False),
    ((2, 5, 3, 7), (20, 30), False),
    ((1, 33, 2, 3), (9, 16), True),
    ((1, 3, 4, 17), (5, 20), False),
    ((2, 3, 9, 8), (4, 3), False),
    ((1, 4, 3, 16), (12, 64), True),
    ((1, 2, 5, 5), (1, 1), True),
    ((3, 6, 1, 2), (33, 7), False),
]


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
def test_no_access_outside_the_tensors(backend, device, after):
    """Unreadable memory on one side of logits, labels and workspaces."""
    if backend == "reference" or device != "cpu":
        pytest.skip("not a kernel of ours on a CPU")
    cases = []
    for i, (shape, size, align_corners) in enumerate(UNREADABLE):
        for layout in LAYOUTS[:2]:
            logits = with_layout(noise(torch.Generator().manual_seed(i), shape), layout)
            logits = logits.to(DTYPES[(i + (layout == "contiguous")) % 3])
            expected = canonical(logits, size, align_corners=align_corners)
            cases.append((logits, size, align_corners, expected))

    def run() -> None:
        def empty(*args) -> Tensor:
            return empty_beside_unreadable_page(*args, after=after)

        with deeplab_fast.backend(backend), allocations_from(empty):
            for i, (logits, size, align_corners, expected) in enumerate(cases):
                logits = copy_beside_unreadable_page(logits, after)
                labels = upsample_argmax(
                    logits, size, align_corners=align_corners, dtype=LABELS[i % 3]
                )
                assert torch.equal(labels.long(), expected), (logits.shape, size)

    in_child(run)


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.parametrize("dimension", range(4))
@pytest.mark.parametrize("size", [(9, 11), (3, 4)], ids=["candidates", "all_classes"])
def test_offsets_past_32_bits(backend, device, dimension, size):
    """The third image, class, row or column is 2^31 elements away, in memory hardly any of which
    is used."""
    if backend == "reference" or device != "cpu":
        pytest.skip("as much memory as there are elements")
    stride = 2**30 + 8
    shape = [2, 2, 2, 2]
    shape[dimension] = 3
    values = noise(torch.Generator().manual_seed(dimension), shape).half()
    buffer = sparse_zeros(2 * stride + 64, torch.float16)
    expected = canonical(values, size)
    shape[dimension] = 1
    layouts = [list(torch.empty(shape).stride()) for _ in range(3)]
    layouts[1] = [2 * s for s in layouts[1]]
    layouts[2] = list(torch.empty(shape, memory_format=torch.channels_last).stride())

    def run() -> None:
        for strides in layouts:
            strides[dimension] = stride
            logits = buffer.as_strided(values.shape, strides).copy_(values)
            assert torch.equal(labels_of(backend, logits, size, False, LABELS[:1]), expected)

    in_child(run)


def test_every_half_precision_number():
    """The cpu kernel converts every half-precision number itself."""
    patterns = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    others = patterns[torch.randperm(2**16, generator=torch.Generator().manual_seed(0))]
    for dtype in (torch.float16, torch.bfloat16):
        for second in (others, patterns.roll(1)):
            logits = torch.stack([patterns, second]).view(dtype).reshape(1, 2, 256, 256)
            labels = labels_of("cpu", logits, (256, 256), False, LABELS[:1])
            assert torch.equal(labels, canonical(logits, (256, 256)))
