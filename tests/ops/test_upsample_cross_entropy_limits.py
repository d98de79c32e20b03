"""upsample_cross_entropy at its limits: block boundaries, bounds of memory, NaN and Inf, rules.

test_upsample_cross_entropy.py has the ordinary inputs.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import deeplab_fast
from deeplab_fast import _C, upsample_cross_entropy
from deeplab_fast._native.upsample_shape import source_scale
from deeplab_fast.backends import registry

from ..ops.test_upsample_cross_entropy import (
    OP,
    REDUCTIONS,
    assert_like_pytorch,
    interpolate_and_cross_entropy,
    loss_and_gradient,
    problem,
)
from ..support import bilinear_oracle, emulator
from ..support.backends import is_interpreted
from ..support.cases import DTYPES, upsampled, with_layout
from ..support.memory import GuardedAllocations, copy_beside_unreadable_page, sparse_zeros
from ..support.unsupported import unsupported_reason

BACKWARD = OP + "_backward"


@pytest.fixture
def gpu_blocks(backend, monkeypatch):
    """Use compiled block sizes in Triton's interpreter, whose own are larger."""
    if is_interpreted(backend):
        from deeplab_fast.backends.triton import block_sizes

        monkeypatch.setattr(block_sizes, "INTERPRETED", False)


def spare_the_interpreter(backend: str, when: bool) -> None:
    """Skip the test in Triton's interpreter, which is slow; other cases run the same kernel."""
    if when and is_interpreted(backend):
        pytest.skip("Triton's interpreter: other cases suffice")


# Sizes at which the kernels' blocks are full, one less and one more.


def around(size: int) -> range:
    return range(size - 1, size + 2)


Size = tuple[tuple[int, ...], tuple[int, int], bool]  # logits, output, align_corners


def sizes_around_blocks() -> list[Size]:
    """Blocks of the CUDA and CPU kernels. The other sizes are as small as possible."""
    cases: list[Size] = []

    def add(logits: tuple[int, ...], size: tuple[int, int], align_corners: bool = False) -> None:
        cases.append((logits, size, align_corners))

    # CUDA's blocks of 16 cells, 15 of them new in the backward; a CPU's vectors of 16 cells
    for cells in (15, 16, 17, 31, 32, 33):
        add((1, 2, 1, cells - 1), (1, 2 * cells - 1))
    # CUDA's preparing threads: 4 for each of 32 source pixels, then H + 2 rows and W + 2 columns
    for pixels in around(32):
        add((1, 2, 1, pixels), (2, pixels + 2))
    add((3, 2, 11, 1), (13, 1))
    for entries in range(127, 132):
        add((1, 2, 1, entries - 5), (1, entries - 3))
        add((1, 2, entries - 5, 1), (entries - 3, 1))
    add((1, 2, 63, 62), (64, 63))
    # CUDA's threads for columns, 128 at a time, and for the elements of a gradient
    for columns in (*around(128), *around(256)):
        add((1, 2, 1, 1), (1, columns))
    for width in (32, 64):
        add((1, 2, 1, width + 1), (1, width), True)
    add((1, 3, 1, 43), (1, 44))
    # Rows of a cell, of which CUDA and the CPU take 8 at a time, CUDA 4 from one exponential. With
    # aligned corners the first row and the last lie in cells of their own.
    for rows in (*range(1, 10), 12, 13, *around(16)):
        add((1, 2, 2, 2), (rows + 2, 3), True)
    # Classes: 4 threads find their range, 32 their total weight
    for classes in (*range(2, 6), *around(32)):
        add((1, classes, 2, 2), (3, 3))
    # CUDA's reduction of 512 blocks' sums at a time
    for images, height in ((256, 1), (171, 2)):
        add((images, 2, height, 1), (height, 1))
    add((1, 2, 40, 50), (1, 1))
    return list(dict.fromkeys(cases))


# Triton: 256 pixels, 128 cells of an axis, 32 lanes for cells and up to 8 of their columns, 32
# classes, 256 elements of a gradient. A bisection halves outputs of a power of two once more.
SIZES_AROUND_TRITONS_BLOCKS: list[Size] = [
    ((2, 2, 1, 4), (3, 86), False),
    ((1, 2, 2, 4), (2, 128), False),
    ((1, 2, 1, 127), (1, 2), False),
    ((1, 2, 1, 128), (1, 3), False),
    ((1, 2, 129, 1), (2, 1), False),
    ((1, 2, 3, 11), (2, 2), False),
    ((1, 2, 1, 3), (1, 24), False),
    ((1, 2, 1, 5), (1, 40), False),
    ((1, 2, 1, 2), (1, 18), False),
    ((1, 2, 1, 17), (1, 34), False),
    ((1, 31, 1, 1), (1, 2), False),
    ((1, 32, 1, 1), (1, 2), False),
    ((1, 33, 1, 1), (1, 2), False),
    ((1, 2, 3, 5), (8, 8), False),
    ((1, 2, 3, 5), (4, 4), True),
    ((1, 2, 3, 5), (1, 1), True),
]


def size_id(value: Any) -> str:
    return "x".join(map(str, value)) if isinstance(value, tuple) else "aligned" if value else ""


@pytest.mark.parametrize("logits_shape, size, align_corners", sizes_around_blocks(), ids=size_id)
def test_sizes_around_blocks(backend, device, logits_shape, size, align_corners):
    spare_the_interpreter(backend, True)
    assert_size_like_pytorch(backend, device, logits_shape, size, align_corners)


@pytest.mark.parametrize(
    "logits_shape, size, align_corners", SIZES_AROUND_TRITONS_BLOCKS, ids=size_id
)
def test_sizes_around_tritons_blocks(
    backend, device, gpu_blocks, logits_shape, size, align_corners
):
    assert_size_like_pytorch(backend, device, logits_shape, size, align_corners)


def assert_size_like_pytorch(backend, device, logits_shape, size, align_corners):
    logits, target, weight = problem(logits_shape, size, device)
    target[:, -1, -1] = logits_shape[1] - 1  # the last pixel counts
    arguments = dict(weight=weight, ignore_index=255, align_corners=align_corners)
    grad = torch.rand(target.shape, device=device) + 0.5
    # A gradient adds up pixels that nearly cancel.
    pixels = math.prod(max(out / n, 1) for out, n in zip(size, logits_shape[2:]))
    with deeplab_fast.backend(backend):
        assert_like_pytorch(
            logits,
            target,
            grad,
            (0.0, 2**-18 * pixels),
            reduction="none",
            label_smoothing=0.2,
            **arguments,
        )
        if not is_interpreted(backend):
            floor = 2**-18 * pixels / target.numel()
            assert_like_pytorch(logits, target, None, (0.0, floor), reduction="mean", **arguments)


@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize("compiled", [True, False], ids=["compiled", "interpreted"])
def test_triton_cells_begin_where_source_pixels_change(monkeypatch, compiled, align_corners):
    """Sizes around blocks of 128 or 1024 cells. An unwritten cell would cause an endless loop."""
    if not is_interpreted("triton"):
        pytest.skip("the kernel takes tensors of a GPU")
    from deeplab_fast.backends.triton import block_sizes
    from deeplab_fast.backends.triton.upsample_cross_entropy import _begins

    monkeypatch.setattr(block_sizes, "INTERPRETED", not compiled)
    block = 128 if compiled else 1024
    for size, out_size in (
        (1, 1),
        (1, 8),
        (2, 4),
        (3, 16),
        (7, 5),
        *((block + i, out) for i in (-2, -1, 0) for out in (64, block + 1)),
    ):
        scale = source_scale(size, out_size, None, align_corners)
        begins = _begins(size, out_size, scale, align_corners, torch.empty(0)).tolist()
        low, _, _, _ = bilinear_oracle.source_pairs(out_size, size, scale, align_corners)
        assert begins == [int((low < cell).sum()) for cell in range(size + 1)]


@pytest.mark.parametrize("scale", [1, 100])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("classes", [65, 128, 129])
def test_classes_around_blocks(backend, device, gpu_blocks, classes, layout, scale):
    """Classes around the blocks of CUDA's shared memory and around Triton's 32."""
    spare_the_interpreter(backend, scale > 1 or layout == "channels_last" or classes > 65)
    logits, target, weight = problem((1, classes, 1, 2), (2, 3), device)
    target[0, -1] = torch.tensor([0, 64, classes - 1])
    grad = torch.rand(target.shape, device=device) + 0.5
    with deeplab_fast.backend(backend):
        assert_like_pytorch(
            with_layout(logits * scale, layout),
            target,
            grad,
            weight=weight,
            label_smoothing=0.2,
            ignore_index=255,
            reduction="none",
        )


@pytest.mark.parametrize("scale", [3, 300])
@pytest.mark.parametrize("images, height, threads", [(1, 23, 5), (2, 23, 3), (9, 3, 2)])
def test_threads_share_rows_that_do_not_divide_evenly(images, height, threads, scale):
    """Bands have several rows, the last one fewer; there are more images than bands."""
    logits, target, weight = problem((images, 2, height, 5), (22000 // images // 50, 50), "cpu")
    logits = logits * scale
    shape = _shape(logits, target)
    terms = _C.CrossEntropyParams(weight.data_ptr(), 255, 0.1)
    results = []
    for count in (1, threads):
        loss, log_sum_exp = (torch.full(target.shape, math.nan) for _ in range(2))
        grad = torch.full(logits.shape, math.nan)
        pointers = logits.data_ptr(), target.data_ptr(), shape, terms, count
        sums = _C.cpu.upsample_cross_entropy_fwd(loss.data_ptr(), log_sum_exp.data_ptr(), *pointers)
        _C.cpu.upsample_cross_entropy_bwd(
            grad.data_ptr(), weight.data_ptr(), (0, 0, 0), log_sum_exp.data_ptr(), *pointers
        )
        assert sums[0] == pytest.approx(loss.double().sum().item(), rel=1e-12)
        results.append((loss, log_sum_exp, grad, torch.tensor(sums)))
    for shared, alone in zip(*results):
        assert not shared.isnan().any() and torch.equal(shared, alone)


def _shape(logits: Tensor, target: Tensor, align_corners: bool = False) -> _C.UpsampleShape:
    size = target.shape[1:]
    scales = [source_scale(i, o, None, align_corners) for i, o in zip(logits.shape[2:], size)]
    return _C.UpsampleShape(logits.shape, logits.stride(), size, scales, align_corners)


# Reads and writes outside the tensors.


BOUNDS = [  # logits, size
    ((1, 1, 1, 1), (1, 1)),
    ((2, 3, 1, 15), (9, 31)),  # one block of cells and less than it
    ((1, 5, 2, 16), (17, 16)),  # one more than a block of cells
    ((1, 2, 1, 31), (2, 129)),
    ((1, 33, 3, 2), (2, 1)),
    ((2, 2, 62, 1), (61, 3)),  # so many rows and columns as preparing threads
]


@pytest.mark.parametrize("at_end", [False, True], ids=["begin", "end"])
@pytest.mark.parametrize("scale", [1, 100])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("logits_shape, size", BOUNDS, ids=size_id)
def test_no_access_outside_the_tensors(
    backend, device, gpu_blocks, logits_shape, size, dtype, scale, at_end
):
    if device != "cpu" or backend == "reference":
        pytest.skip("for our kernels in a CPU's memory")
    if dtype == torch.float16 and scale > 1:
        pytest.skip("with fp32 suffices")
    other = logits_shape != BOUNDS[4][0]
    spare_the_interpreter(backend, other or scale > 1 or dtype == torch.float16)
    tensors = problem(logits_shape, size, device)
    tensors = tensors[0].to(dtype) * scale, *tensors[1:]
    inputs = [copy_beside_unreadable_page(tensor, at_end) for tensor in tensors]
    for reduction in ["none" if at_end else "mean"] if is_interpreted(backend) else REDUCTIONS:
        options = (255, reduction, 0.1, False)
        expected = registry.run(OP, *tensors, *options, backend=backend)
        grad = torch.rand(expected[0].shape)
        expected_grad = registry.run(
            BACKWARD, grad, *tensors, *expected[1:], *options, backend=backend
        )
        with GuardedAllocations() as guards:
            actual = registry.run(OP, *inputs, *options, backend=backend)
            saved = [copy_beside_unreadable_page(tensor, at_end) for tensor in (grad, *actual[1:])]
            actual_grad = registry.run(
                BACKWARD, saved[0], *inputs, *saved[1:], *options, backend=backend
            )
        guards.assert_intact()
        for a, e in zip((*actual, actual_grad), (*expected, expected_grad)):
            assert torch.equal(a, e)


def sparse(shape: tuple[int, ...], strides: tuple[int, ...]) -> Tensor:
    """fp32 of these strides in memory of which only the pages that are written exist."""
    span = sum((n - 1) * s for n, s in zip(shape, strides)) + 1
    return sparse_zeros(span, torch.float32).as_strided(shape, strides)


@pytest.mark.parametrize("dim", range(4))
def test_strides_beyond_32_bits(backend, device, dim):
    """Logits and gradients of pixels, each further from the next than an int32 counts."""
    if device != "cpu" or backend == "reference":
        pytest.skip("for our kernels in a CPU's memory")
    logits, target, weight = problem((2, 2, 2, 2), (3, 3), device)
    grad = torch.rand(target.shape)
    steps = [8, 4, 2, 1]
    steps[dim] = 2**31 + 64
    far = sparse(tuple(logits.shape), tuple(steps)).copy_(logits)
    far_grad = grad
    if dim != 1:
        steps = [9, 3, 1]
        steps[max(dim - 1, 0)] = 2**31 + 64
        far_grad = sparse(tuple(grad.shape), tuple(steps)).copy_(grad)
    options = (255, "none", 0.1, False)
    results = []
    for x, g in ((logits, grad), (far, far_grad)):
        loss, *saved = registry.run(OP, x, target, weight, *options, backend=backend)
        results.append(
            (loss, registry.run(BACKWARD, g, x, target, weight, *saved, *options, backend=backend))
        )
    for near, distant in zip(*results):
        assert torch.equal(near, distant)


@pytest.mark.parametrize(
    ("logits_shape", "size"),
    [
        ((1, 2**28, 1, 1), (1, 1)),
        ((1, 1, 2**28, 1), (1, 1)),
        ((1, 1, 1, 2**28), (1, 1)),
        ((1, 1, 1, 1), (2**28, 1)),
        ((1, 1, 1, 1), (1, 2**28)),
        ((2**26, 2**12, 1, 1), (1, 1)),  # 2^31 blocks of elements
        ((2**30, 1, 1, 1), (1, 1)),  # 2^31 blocks of cells
    ],
    ids=size_id,
)
def test_emulated_unsupported_sizes(logits_shape, size):
    shape = _C.UpsampleShape(logits_shape, [1] * 4, size, [1.0, 1.0], False)
    terms, dtype = _C.CrossEntropyParams(0, -100, 0.0), _C.DType.float32
    kernels = emulator.load().cuda
    with pytest.raises(RuntimeError, match="fwd_kernel: a size is too large"):
        kernels.upsample_cross_entropy_fwd(0, 0, 0, 0, 0, 0, 0, True, shape, terms, dtype, 0)
    with pytest.raises(RuntimeError, match="bwd_kernel: a size is too large"):
        kernels.upsample_cross_entropy_bwd(
            0, 0, 0, [0] * 3, 0, 0, 0, 0, False, shape, terms, dtype, 0
        )


def test_emulated_unsupported_number_of_classes():
    shape = _C.UpsampleShape([1, 64 << 16, 1, 1], [1] * 4, [1, 1], [1.0, 1.0], False)
    terms, dtype = _C.CrossEntropyParams(0, -100, 0.0), _C.DType.float32
    with pytest.raises(RuntimeError, match="bwd_kernel: a size is too large"):
        emulator.load().cuda.upsample_cross_entropy_bwd(
            0, 0, 0, [0] * 3, 0, 0, 0, 0, False, shape, terms, dtype, 0
        )


@pytest.mark.parametrize(
    ("logits_shape", "size", "limit"),
    [
        ((1, 1, 1, 1), (2**16, 2**15), "pixels of an image"),
        ((1, 2**31, 1, 1), (1, 1), "classes"),
        ((1, 1, 2**31, 1), (1, 1), "rows"),
        ((1, 1, 1, 2**31), (1, 1), "columns"),
    ],
    ids=size_id,
)
def test_triton_unsupported_sizes(logits_shape, size, limit):
    logits = torch.zeros(()).expand(logits_shape)
    target = torch.zeros((), dtype=torch.int64).expand(logits_shape[0], *size)
    if not is_interpreted("triton"):
        pytest.skip("the tensors are on a CPU")
    for op, arguments in ((OP, (logits, target)), (BACKWARD, (logits, logits, target))):
        reason = unsupported_reason("triton", op, *arguments, None)
        assert reason and "fewer than 2^31" in reason and limit in reason or "classes" in reason


def test_triton_unsupported_number_of_classes():
    if not is_interpreted("triton"):
        pytest.skip("the tensors are on a CPU")
    target = torch.zeros(1, 1, 1, dtype=torch.int64)
    for classes, refused in ((65535, False), (65536, True)):
        logits = torch.zeros(()).expand(1, classes, 1, 1)
        reason = unsupported_reason("triton", BACKWARD, logits, logits, target)
        assert reason == ("the kernel supports at most 65535 classes" if refused else None)


# NaN and infinity. If a side keeps its size, PyTorch's interpolation on a CPU multiplies each
# pixel by 1 and 0, that of a GPU its neighbour by 0, as ours: the oracle has our interpolation.


class Expected:
    """Loss and gradient by F.cross_entropy in float64 of the logits interpolated in fp32.

    ``must``: where a gradient that is not finite arrives with a weight that is not 0; ``may``:
    with any weight, as 0 * NaN is NaN.
    """

    def __init__(self, logits: Tensor, target: Tensor, grad_loss: Tensor | None, options) -> None:
        weight, align_corners = options.get("weight"), options.get("align_corners", False)
        others = {k: v for k, v in options.items() if k not in ("weight", "align_corners")}
        size = tuple(target.shape[1:])
        scales = [source_scale(i, o, None, align_corners) for i, o in zip(logits.shape[2:], size)]
        pixels = bilinear_oracle.upsample(logits, size, (scales[0], scales[1]), align_corners)
        pixels = pixels.double().requires_grad_()
        weight = None if weight is None else weight.cpu().double()
        loss = F.cross_entropy(pixels, target.cpu(), weight, **others)
        grad_loss = torch.ones(()) if grad_loss is None else grad_loss.cpu()
        (grad,) = torch.autograd.grad(loss, pixels, grad_loss.double().expand(loss.shape))
        self.pairs = [
            bilinear_oracle.source_pairs(out, n, scale, align_corners)
            for out, n, scale in zip(size, logits.shape[2:], scales)
        ]
        self.loss = loss.detach()
        self.grad = self._gather(grad, logits.shape, lambda w: w)
        self.must = self._gather(~grad.isfinite(), logits.shape, lambda w: w != 0) > 0
        self.may = ~self.grad.isfinite()

    def _gather(self, grad: Tensor, shape: torch.Size, weigh: Any) -> Tensor:
        grad = grad.double()
        for dim, (low, high, w0, w1) in zip((2, 3), self.pairs):
            result = grad.new_zeros([*grad.shape[:dim], shape[dim], *grad.shape[dim + 1 :]])
            for index, weights in ((low, w0), (high, w1)):
                part = grad * weigh(torch.from_numpy(weights)).double().unflatten(
                    0, [-1] + [1] * (3 - dim)
                )
                result.index_add_(dim, torch.from_numpy(index), part)
            grad = result
        return grad


def assert_not_finite_where_pytorch_is(
    backend: str,
    logits: Tensor,
    target: Tensor,
    grad_loss: Tensor | None = None,
    infinite_may_be_nan: bool = False,
    **options,
) -> None:
    """The loss has PyTorch's NaN and infinities, and is close to its values elsewhere."""
    expected = Expected(logits, target, grad_loss, options)
    assert not expected.loss.isfinite().all() or expected.must.any()
    with deeplab_fast.backend(backend):
        ours = partial(upsample_cross_entropy, target=target, **options)
        loss, grad = (t.cpu() for t in loss_and_gradient(ours, logits, grad_loss))
    if infinite_may_be_nan:
        assert torch.equal(loss.isfinite(), expected.loss.isfinite())
        loss, expected.loss = loss.nan_to_num(0, 0, 0), expected.loss.nan_to_num(0, 0, 0)
    torch.testing.assert_close(loss.double(), expected.loss, rtol=1e-4, atol=1e-5, equal_nan=True)
    assert not grad[expected.must].isfinite().any()
    assert grad[~expected.may].isfinite().all()
    near = {torch.float16: 2e-2, torch.bfloat16: 1e-1}.get(logits.dtype, 1e-3)
    torch.testing.assert_close(
        grad[~expected.may].double(), expected.grad[~expected.may], rtol=near, atol=near / 10
    )


SICK = [  # class, row and column of a [3, 3, 18] image: corners, sides, inside, ends of blocks
    (0, 0, 0), (2, 0, 17), (1, 2, 0), (2, 2, 17), (0, 1, 9), (1, 0, 14), (1, 1, 15), (2, 1, 16)
]  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf], ids=str)
def test_one_logit_that_is_not_finite(backend, device, value, dtype):
    """Each image has another one. Pixels of its class, of others, and ignored ones read it."""
    spare_the_interpreter(backend, dtype != torch.float32)
    for scale, size, align_corners in (
        (1, (7, 43), False),
        (100, (5, 40), True),
        (1, (2, 7), False),
    ):
        if is_interpreted(backend) and size != (2, 7):
            continue
        logits, target, weight = problem((len(SICK), 3, 3, 18), size, device)
        logits = (logits * scale).to(dtype)
        for image, position in zip(logits, SICK):
            image[position] = value
        assert_not_finite_where_pytorch_is(
            backend, logits, target, reduction="none", ignore_index=255, weight=weight,
            align_corners=align_corners, label_smoothing=0.0 if scale > 1 else 0.1,
        )  # fmt: skip


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf], ids=str)
@pytest.mark.parametrize("position", [(0, 0, 0), (2, 2, 17), (1, 1, 16)], ids=str)
def test_one_logit_that_is_not_finite_reaches_the_scalar(
    backend, device, position, value, reduction
):
    spare_the_interpreter(backend, position != (2, 2, 17) or reduction != "mean")
    logits, target, weight = problem((1, 3, 3, 18), (7, 40), device)
    target[target == 255] = position[0]
    logits[0][position] = value
    assert_not_finite_where_pytorch_is(
        backend, logits, target, reduction=reduction, ignore_index=255, weight=weight
    )


@pytest.mark.parametrize("scale", [1, 100])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf], ids=str)
def test_ignored_pixels_with_logits_that_are_not_finite(backend, device, value, scale):
    """The loss is finite. The gradient is not, as in PyTorch: 0 times a softmax that is NaN."""
    spare_the_interpreter(backend, scale > 1)
    logits, target, _ = problem((1, 3, 3, 18), (7, 40), device)
    logits *= scale
    logits[0, 1, 1, 9] = value
    target.fill_(2)[:, :, 15:26] = -100
    for reduction in ("none",) if is_interpreted(backend) else REDUCTIONS:
        options = dict(target=target, reduction=reduction, label_smoothing=0.1)
        with deeplab_fast.backend(backend):
            loss, grad = loss_and_gradient(partial(upsample_cross_entropy, **options), logits)
        assert loss.isfinite().all()
        if value == -math.inf:  # a class that no pixel there can have: its softmax is 0
            pixels = upsampled(logits, target.shape[1:])[:, :, :, 15:26]
            assert pixels.softmax(1).isnan().any() == grad.isnan().any()
        else:
            assert grad[0, :, 1, 9].isnan().all()
        assert_not_finite_where_pytorch_is(backend, logits, **options)


def test_every_pixel_nan(backend, device):
    for value in (math.nan, math.inf, -math.inf):
        logits, target, _ = problem((2, 3, 2, 3), (5, 7), device)
        for reduction in ("none",) if is_interpreted(backend) else REDUCTIONS:
            ours = partial(
                upsample_cross_entropy, target=target, ignore_index=255, reduction=reduction
            )
            with deeplab_fast.backend(backend):
                loss, grad = loss_and_gradient(ours, torch.full_like(logits, value))
            assert torch.equal(loss.isnan(), (target != 255) | (reduction != "none") if loss.dim()
                               else torch.tensor(True, device=device))  # fmt: skip
            assert grad.isnan().all()


@pytest.mark.parametrize("hit", [True, False], ids=["hit", "unused"])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("value", [0.0, math.nan, math.inf], ids=str)
def test_class_weights_of_zero_nan_and_infinity(backend, device, value, label_smoothing, hit):
    """Without smoothing the weight of a class that no pixel has does not matter, infinite or not.

    Weights of 1 / frequency are infinite there.
    """
    spare_the_interpreter(backend, label_smoothing == 1.0 or value != math.inf)
    logits, target, _ = problem((1, 3, 3, 4), (7, 9), device)
    logits[0, 2] -= 1
    if not hit:
        target[target == 1] = 2
    weight = torch.tensor([1.0, value, 2.0], device=device)
    for reduction in ("none",) if is_interpreted(backend) else REDUCTIONS:
        options = dict(
            weight=weight, reduction=reduction, label_smoothing=label_smoothing, ignore_index=255
        )
        if value == 0.0 or not (hit or label_smoothing):
            with deeplab_fast.backend(backend):
                options["weight"] = weight.nan_to_num(0.0, 0.0)
                expected = loss_and_gradient(
                    partial(upsample_cross_entropy, target=target, **options), logits
                )
                assert_like_pytorch(logits, target, **options)
                options["weight"] = weight
                actual = loss_and_gradient(
                    partial(upsample_cross_entropy, target=target, **options), logits
                )
            assert torch.equal(actual[0], expected[0]) and torch.equal(actual[1], expected[1])
            assert actual[0].isfinite().all() and actual[1].isfinite().all()
        else:
            assert_not_finite_where_pytorch_is(
                backend, logits, target, infinite_may_be_nan=label_smoothing > 0, **options
            )


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf], ids=str)
def test_incoming_gradients_that_are_not_finite(backend, device, value, label_smoothing):
    """The scalar's gradient reaches all logits, a pixel's those it is interpolated from."""
    spare_the_interpreter(backend, label_smoothing != 0.1)
    logits, target, weight = problem((1, 3, 3, 18), (7, 40), device)
    options = dict(weight=weight, label_smoothing=label_smoothing, ignore_index=255)
    for reduction in ("mean",) if is_interpreted(backend) else ("mean", "sum"):
        assert_not_finite_where_pytorch_is(
            backend, logits, target, torch.tensor(value, device=device), reduction=reduction,
            **options,
        )  # fmt: skip
    for y, x in ((3, 17),) if is_interpreted(backend) else ((0, 0), (3, 17), (6, 39)):
        grad = torch.rand(target.shape, device=device)
        grad[0, y, x] = value
        target[0, y, x] = 1
        with deeplab_fast.backend(backend):
            assert_not_finite_where_pytorch_is(
                backend, logits, target, grad, reduction="none", **options
            )
            target[0, y, x] = 255  # an ignored pixel's gradient is not looked at
            _, ours = loss_and_gradient(
                partial(upsample_cross_entropy, target=target, reduction="none", **options),
                logits,
                grad,
            )
        assert ours.isfinite().all()


# The rules, by hand.


def test_values_by_hand(backend, device):
    """Equal logits: log(2) for each pixel, whatever the class; the gradient is 1/2 less the hit."""
    logits = torch.zeros(1, 2, 1, 1, device=device)
    target = torch.tensor([[[0, 1], [9, 1]]], device=device)
    weight = torch.tensor([1.0, 3.0], device=device)
    log2 = torch.tensor(math.log(2.0))
    expected = {
        "none": (log2 * torch.tensor([[[1.0, 3.0], [0.0, 3.0]]]), [2.5, -2.5]),
        "sum": (7 * log2, [2.5, -2.5]),
        "mean": (log2, [2.5 / 7, -2.5 / 7]),
    }
    with deeplab_fast.backend(backend):
        for reduction, (loss, grad) in expected.items():
            actual = loss_and_gradient(
                partial(
                    upsample_cross_entropy, target=target, weight=weight, ignore_index=9,
                    reduction=reduction,
                ),
                logits,
            )  # fmt: skip
            torch.testing.assert_close(actual[0].cpu(), loss)
            torch.testing.assert_close(actual[1].cpu().flatten(), torch.tensor(grad))
        _, log_sum_exp, total_weight = torch.ops.deeplab_fast.upsample_cross_entropy(
            logits + 5, target, weight, 9, "sum", 0.0, False, backend=backend
        )
        _, _, count = torch.ops.deeplab_fast.upsample_cross_entropy(
            logits, target, None, 9, "none", 0.0, False, backend=backend
        )
    torch.testing.assert_close(log_sum_exp.cpu(), log2.expand(1, 2, 2))
    assert total_weight == 7 and count == 3 and total_weight.dtype == torch.float32


@pytest.mark.parametrize("ignore_index", [0, 2, -1, 3, 2**31, 2**32, 2**32 + 1, -(2**40), 2**62])
def test_ignore_index_of_any_int(backend, device, ignore_index):
    """ignore_index may be a class, or an int64 whose lower 32 bits are a class."""
    spare_the_interpreter(backend, ignore_index not in (2, 2**32))
    logits, target, weight = problem((2, 3, 2, 3), (5, 7), device, ignored=ignore_index)
    target[0, 0, 0] = target[1, 4, 6] = ignore_index
    with deeplab_fast.backend(backend):
        assert_like_pytorch(
            logits, target, ignore_index=ignore_index, weight=weight, label_smoothing=0.1,
            reduction="none",
        )  # fmt: skip
        if not is_interpreted(backend):
            assert_like_pytorch(logits, target, ignore_index=ignore_index, weight=weight)


@pytest.mark.parametrize("bad", [3, -1, 2**31, 2**32, 2**32 + 2, -(2**32), 2**63 - 1, -(2**63)])
@pytest.mark.parametrize("pixel", [(0, 0, 0), (1, 6, 8), (0, 6, 8), (1, 0, 0)], ids=str)
def test_target_out_of_range_in_the_first_and_the_last_pixel(backend, device, pixel, bad):
    """The error names the first invalid target, also if a later one is further out of range."""
    logits, target, _ = problem((2, 3, 2, 3), (7, 9), device, ignored=-100)
    target[pixel] = bad
    waits = device == "cpu" and backend != "emulated"
    with deeplab_fast.backend(backend):
        for reduction in ("none", "sum"):
            ours = partial(upsample_cross_entropy, logits, target, reduction=reduction)
            if waits:
                message = f"target: {bad} is not a class: expected 0 to 2, or ignore_index .-100"
                with pytest.raises(IndexError, match=message):
                    ours()
            elif reduction == "none":
                assert ours().isnan().nonzero().tolist() == [list(pixel)]
            else:
                assert ours().isnan()
        if waits:
            target[1, 6, 8] = 77 if pixel != (1, 6, 8) else bad
            with pytest.raises(IndexError, match=f"target: {bad} is not"):
                upsample_cross_entropy(logits, target)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_gradient_of_an_invalid_target_is_nan(backend, device, reduction):
    """The backward op called directly: only logits that the invalid pixel depends on have NaN."""
    if backend == "reference":
        pytest.skip("it clamps the target")
    spare_the_interpreter(backend, reduction != "mean")
    logits, target, _ = problem((2, 3, 4, 5), (8, 10), device, ignored=-100)
    ops, options = torch.ops.deeplab_fast, (-100, reduction, 0.1, False)
    loss, *saved = ops.upsample_cross_entropy(logits, target, None, *options, backend=backend)
    for bad in (3, -1, 2**32):
        wrong = target.clone()
        wrong[1, 3, 3] = bad  # between source rows 1 and 2, columns 1 and 2
        grad = ops.upsample_cross_entropy_backward(
            torch.ones_like(loss), logits, wrong, None, *saved, *options, backend=backend
        )
        touched = torch.zeros_like(grad, dtype=torch.bool)
        touched[1, :, 1:3, 1:3] = True
        assert torch.equal(grad.isnan(), touched)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
def test_backward_of_strided_tensors(backend, device, dtype, reduction):
    """A compiled graph may return the tensors that autograd saved in other strides."""
    spare_the_interpreter(backend, dtype != torch.float32)
    logits, target, weight = problem((2, 3, 4, 5), (8, 10), device, dtype, ignored=-100)
    ops, options = torch.ops.deeplab_fast, (-100, reduction, 0.1, False)
    loss, log_sum_exp, total = ops.upsample_cross_entropy(
        logits, target, weight, *options, backend=backend
    )
    grad = torch.rand(loss.shape, device=device)

    def spread(tensor: Tensor) -> Tensor:
        buffer = tensor.new_zeros([*tensor.shape, 2])
        view = buffer[..., 1]
        view.copy_(tensor)
        return view

    tensors = logits, target, weight, log_sum_exp, total
    expected, actual = (
        ops.upsample_cross_entropy_backward(*arguments, *options, backend=backend)
        for arguments in ((grad, *tensors), map(spread, (grad, *tensors)))
    )
    assert actual.dtype == dtype and torch.equal(actual, expected)


@pytest.mark.parametrize("weight_dtype", [torch.float64, torch.float16], ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_dtypes_are_those_of_their_fp32_values(backend, device, dtype, weight_dtype):
    """The loss is equal bit for bit, the gradient after rounding to the logits' dtype."""
    spare_the_interpreter(backend, dtype == torch.bfloat16 or weight_dtype == torch.float16)
    logits, target, weight = problem((2, 3, 4, 5), (8, 10), device, dtype, ignored=-100)
    weight = weight.to(weight_dtype)
    for align_corners in [False] if is_interpreted(backend) else [False, True]:
        ours = partial(
            upsample_cross_entropy, target=target, label_smoothing=0.1, align_corners=align_corners
        )
        with deeplab_fast.backend(backend):
            loss, grad = loss_and_gradient(partial(ours, weight=weight), logits)
            expected = loss_and_gradient(partial(ours, weight=weight.float()), logits.float())
        assert torch.equal(loss, expected[0]) and torch.equal(grad, expected[1].to(dtype))


# Sums, exponentials and logarithms.


def test_sums_keep_small_terms_beside_large_ones(backend, device):
    """Losses and class weights are summed in float64: fp32 would lose each 1 next to 2^25."""
    if backend == "reference" or is_interpreted(backend):
        pytest.skip("for the sums in float64 of the compiled kernels")
    logits = torch.zeros(1, 2, 1, 700, device=device)
    logits[0, 1, 0, 0] = 2**25
    target = torch.zeros(1, 1, 700, dtype=torch.int64, device=device)
    ours = partial(upsample_cross_entropy, logits, target, reduction="sum")
    with deeplab_fast.backend(backend):
        assert ours().item() == pytest.approx(2**25 + 699 * math.log(2.0), rel=2**-23)
        weight = torch.tensor([1.0, 2.0**25], device=device)
        target[0, 0, 5] = 1
        _, _, total = torch.ops.deeplab_fast.upsample_cross_entropy(
            logits, target, weight, -100, "mean", 0.0, False, backend=backend
        )
    assert total == 2**25 + 700  # representable, as 2^25 + 699 is not


def test_every_range_of_the_exponential(backend, device):
    """Softmax of [0, x] for x from 0 down to where it is 0, each to fp32's relative precision."""
    x = torch.cat([torch.linspace(0, -60, 1201), torch.linspace(-60, -200, 141)])
    logits = torch.stack([torch.zeros_like(x), x])[None, :, None]
    target = torch.zeros(1, 1, len(x), dtype=torch.int64)
    with deeplab_fast.backend(backend):
        loss, grad = loss_and_gradient(
            partial(upsample_cross_entropy, target=target.to(device), reduction="none"),
            logits.to(device),
        )
    x = x.double()
    softmax, actual = x.sigmoid(), grad.cpu()[0, 1, 0].double()
    # x rounds to fp32 in units of log 2. Below 2^-80, or 2^-126, the softmax may be 0.
    allowed = 2**-23 * (4 + 2 * x.abs()) * softmax + 2.0**-79
    assert ((actual - softmax).abs() <= allowed).all()
    assert (loss.cpu().flatten() - torch.log1p(x.exp())).abs().max() < 2**-22


def test_every_range_of_the_logarithm(backend, device):
    """Sums range from 2^-28, between pixels of different classes, to the number of classes."""
    gap = torch.linspace(0.0, 40.0, 81)
    pairs = torch.stack([torch.stack([0 * gap, -gap]), torch.stack([-gap, 0 * gap])], dim=2)
    pairs = pairs.permute(1, 0, 2)[:, :, None]  # [81, 2, 1, 2]
    many = torch.zeros(1, 1000, 1, 1)
    for logits, size in ((pairs, (1, 6)), (many, (1, 1))):
        if is_interpreted(backend):
            logits = logits[::20, :20]
        target = torch.ones(len(logits), *size, dtype=torch.int64)
        with deeplab_fast.backend(backend):
            loss = upsample_cross_entropy(logits.to(device), target.to(device), reduction="none")
        exact = interpolate_and_cross_entropy(logits.double(), target, reduction="none")
        allowed = 2**-22 * (1 + logits.abs().amax((1, 2, 3), keepdim=True).squeeze(1))
        assert ((loss.cpu() - exact).abs() <= allowed).all()


@pytest.mark.parametrize("gap", [30.0, 41.0, 43.0, 55.0, 57.0, 80.0, 95.0])
def test_cells_of_two_rows_between_distant_logits(backend, device, gap):
    """A progression that continued past the cell's last row could overflow."""
    spare_the_interpreter(backend, gap != 95.0)
    logits = torch.zeros(1, 2, 10, 2, device=device)
    logits[:, 0, ::2] = logits[:, 1, 1::2] = -gap
    target = torch.randint(2, (1, 11, 3), device=device)
    grad = torch.rand(target.shape, device=device)
    with deeplab_fast.backend(backend):
        assert_like_pytorch(logits, target, grad, reduction="none", label_smoothing=0.1)


# Triton's kernels with compiled block sizes.


@pytest.mark.parametrize(
    "reduction, label_smoothing", [("none", 0.3), ("mean", 0.0), ("mean", 0.3), ("sum", 0.0)]
)
def test_triton_with_compiled_block_sizes(monkeypatch, reduction, label_smoothing):
    """Several blocks of pixels, cells and classes; each option once."""
    if not is_interpreted("triton"):
        pytest.skip("they are what test_upsample_cross_entropy.py runs on a GPU")
    from deeplab_fast.backends.triton import block_sizes

    monkeypatch.setattr(block_sizes, "INTERPRETED", False)
    several_classes = reduction == "none"
    shape, size = ((1, 34, 1, 2), (2, 3)) if several_classes else ((2, 3, 2, 5), (3, 90))
    logits, target, weight = problem(shape, size, "cpu")
    if several_classes:
        target[0, 0] = torch.tensor([31, 32, 33])
    with deeplab_fast.backend("triton"):
        assert_like_pytorch(
            with_layout(logits, "contiguous" if several_classes else "sliced"),
            target,
            torch.rand(target.shape) if reduction == "none" else None,
            weight=weight if reduction != "sum" else None,
            reduction=reduction,
            label_smoothing=label_smoothing,
            ignore_index=255,
            align_corners=reduction == "sum",
        )
