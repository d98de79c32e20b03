"""The sm_90 convolution kernel, run by the emulator of such a device."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import deeplab_fast
from deeplab_fast import (
    _C,
    aspp,
    dilated_conv2d,
    parallel_dilated_conv2d,
)
from deeplab_fast._native import work_lists
from deeplab_fast._native.common import LaunchContext
from deeplab_fast._native.memory_format import empty_nhwc
from deeplab_fast.backends.cuda import dilated_conv2d as dilated_conv2d_calls

from ..ops.test_aspp import convert
from ..ops.test_aspp import definition as aspp_definition
from ..ops.test_aspp import operands as aspp_operands
from ..ops.test_dilated_conv2d import (
    PARALLEL,
    SEEDED,
    gradients,
    parallel_conv2d,
    parallel_operands,
    same_conv2d,
)
from ..support import emulator
from ..support.cases import CONVS, Conv, assert_as_accurate_as, operands
from ..support.convolution import convolve, convolve_slices, convolve_with_means, convolved
from ..support.emulator import machine
from ..support.memory import copy_beside_unreadable_page, in_child

DTYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
# One cluster computes whole output tiles; six clusters split them along k.
NUM_CTAS = pytest.mark.parametrize("num_ctas", [1, 24])
ON_SM90 = pytest.mark.usefixtures("on_sm90")


@pytest.fixture(params=[False, True], ids=["threads arrive", "copies arrive"])
def arrival(request) -> Iterator[None]:
    """Both forms of the kernel: threads or copies arrive at the full barrier of a stage."""
    outer = emulator.load().cuda.set_copies_arrive(request.param)
    yield
    emulator.load().cuda.set_copies_arrive(outer)


IN_BOTH_FORMS = pytest.mark.usefixtures("arrival")


@pytest.fixture
def on_sm90() -> Iterator[None]:
    """Fails unless the test launches the sm_90 kernel and not the sm_80 kernel."""

    def launches(kernel: str) -> int:
        return emulator.load().launch_counts().get(kernel, 0)

    names = "dilated_conv2d_fwd_sm90_kernel", "dilated_conv2d_fwd_kernel"
    before = [launches(name) for name in names]
    with deeplab_fast.backend("emulated"), machine(1, "sm_90"):
        yield
    assert launches(names[0]) > before[0] and launches(names[1]) == before[1]


def supported(case: Conv) -> bool:
    return case.groups == 1 and case.C % 8 == 0 and case.N > 0


@ON_SM90
@DTYPES
@pytest.mark.parametrize("case", list(filter(supported, CONVS)), ids=str)
def test_forward(case: Conv, dtype):
    input, weight, bias = operands(case, dtype, "cpu")
    output = dilated_conv2d(input, weight, bias, case.dilation)
    exact = same_conv2d(input.double(), weight.double(), bias.double(), case.dilation)
    peer = same_conv2d(input, weight, bias, case.dilation)
    assert_as_accurate_as(output, peer, exact)


@ON_SM90
@DTYPES
def test_parallel(dtype):
    input, weights, biases = parallel_operands("cpu", dtype, 40)
    output = parallel_dilated_conv2d(input, weights, biases, PARALLEL[1])
    peer = parallel_conv2d(input, weights, biases)
    input, *rest = (t.double() for t in (input, *weights, *biases))
    assert_as_accurate_as(output, peer, parallel_conv2d(input, rest[:4], rest[4:]))


@ON_SM90
def test_branches_that_begin_between_vectors():
    """The second branch has whole vectors of channels, but they are not aligned."""
    input = nhwc(1, 16, 3, 5, dtype=torch.bfloat16)
    weights = [(torch.randn(k, 16, 3, 3) / 12).bfloat16() for k in (20, 24, 20)]
    output = parallel_dilated_conv2d(input, weights, None, [1, 2, 1])
    expected = [same_conv2d(input, w, None, d) for w, d in zip(weights, (1, 2, 1), strict=True)]
    torch.testing.assert_close(output, torch.cat(expected, dim=1))


@ON_SM90
@IN_BOTH_FORMS
@NUM_CTAS
@DTYPES
@pytest.mark.parametrize(("shape", "kernels", "rates"), SEEDED)
def test_seeds_agree(monkeypatch, shape, kernels, rates, dtype, num_ctas):
    """Split tiles, several images in a tile, branches at odd channels: equal bits on every seed."""
    monkeypatch.setattr(emulator, "num_ctas", num_ctas)
    input = torch.randn(shape).to(dtype).contiguous(memory_format=torch.channels_last)
    scale = (9 * shape[1]) ** -0.5
    weights = [(torch.randn(k, shape[1], r, s) * scale).to(dtype) for k, r, s in kernels]
    biases = [torch.randn(k).to(dtype) for k, _, _ in kernels]
    outputs = []
    for seed in range(4):
        with machine(seed, "sm_90"):
            outputs.append(parallel_dilated_conv2d(input, weights, biases, rates))

    def definition(input, weights, biases):
        outputs = [same_conv2d(input, *args) for args in zip(weights, biases, rates, strict=True)]
        return torch.cat(outputs, dim=1)

    exact = definition(input.double(), [w.double() for w in weights], [b.double() for b in biases])
    assert_as_accurate_as(outputs[0], definition(input, weights, biases), exact)
    for output in outputs[1:]:
        assert torch.equal(output, outputs[0])


@ON_SM90
@IN_BOTH_FORMS
def test_pipeline_on_more_seeds():
    """Several work items per cluster, each with several rounds of the pipeline."""
    input, weight, bias = operands(Conv(2, 72, 264, 12, 13, (3, 3), 2), torch.bfloat16, "cpu")
    outputs = []
    for seed in range(8):
        with machine(seed, "sm_90"):
            outputs.append(dilated_conv2d(input, weight, bias, 2))
    assert all(torch.equal(output, outputs[0]) for output in outputs[1:])
    torch.testing.assert_close(outputs[0], same_conv2d(input, weight, bias, 2))


def kernels(num_ctas: int) -> LaunchContext:
    return LaunchContext(emulator.load().cuda, 0, num_ctas, is_sm90=True)


def nhwc(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(shape).to(dtype).contiguous(memory_format=torch.channels_last)


@ON_SM90
@IN_BOTH_FORMS
@NUM_CTAS
@DTYPES
@pytest.mark.parametrize("K", [21, 24, 280])  # partial vectors; whole vectors; two tiles
def test_epilogue(dtype, num_ctas, K):
    """Bias, per-image bias, residual in place and ReLU."""
    N, C, H, W = 3, 72, 5, 7
    input, residual = nhwc(N, C, H, W, dtype=dtype), nhwc(N, K, H, W, dtype=dtype)
    weight = (5 * torch.randn(K, C, 3, 3) / (9 * C) ** 0.5).to(dtype)
    bias, image_bias = torch.randn(K).to(dtype), torch.randn(N, K)

    def definition(input, weight, bias, residual, image_bias):
        sums = F.conv2d(input, weight, bias, padding=2, dilation=2) + residual
        return F.relu(sums + image_bias[:, :, None, None].to(sums))

    tensors = input, weight, bias, residual, image_bias
    output = residual.clone(memory_format=torch.preserve_format)
    convolve(
        kernels(num_ctas), output, input, [weight], [bias], [(2, 2)],
        activation="relu", residual=output, image_bias=image_bias,
    )  # fmt: skip
    exact = definition(*(t.double() for t in tensors))
    assert_as_accurate_as(output, definition(*tensors), exact)


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
def test_epilogue_reads_nothing_beside_its_operands(after):
    """Every operand lies beside an unreadable page. The maps have one pixel, so that rows past the
    end would belong to image -1, and 21 channels end within a vector."""
    N, C, K = 8, 72, 21

    def beside_page(tensor: Tensor) -> Tensor:
        return copy_beside_unreadable_page(tensor, after)

    def run() -> None:
        input = beside_page(nhwc(N, C, 1, 1, dtype=torch.bfloat16))
        weight = beside_page((torch.randn(K, C, 1, 1) / 8).bfloat16())
        bias, image_bias = beside_page(torch.randn(K).bfloat16()), beside_page(torch.randn(N, K))
        output = beside_page(torch.zeros(N, K, 1, 1).bfloat16())
        with machine(1, "sm_90"):
            convolve(
                kernels(1), output, input, [weight], [bias], [(1, 1)],
                activation="none", residual=output, image_bias=image_bias,
            )  # fmt: skip
        expected = F.conv2d(input.float(), weight.float(), bias.float())
        expected += image_bias[:, :, None, None]
        torch.testing.assert_close(output, expected.bfloat16())

    in_child(run)


@ON_SM90
@DTYPES
def test_backward(dtype):
    """The input gradient is computed by this kernel too."""
    input, weights, biases = parallel_operands("cpu", dtype, 40)
    grad_output = torch.randn(2, sum(w.size(0) for w in weights), 9, 13).to(dtype)

    def ours(input, *rest):
        return parallel_dilated_conv2d(input, rest[:4], rest[4:], PARALLEL[1])

    def theirs(input, *rest):
        return parallel_conv2d(input, rest[:4], rest[4:])

    tensors = [input, *weights, *biases]
    actual = gradients(ours, tensors, grad_output)
    exact = gradients(theirs, [t.double() for t in tensors], grad_output.double())
    for a, p, e in zip(actual, gradients(theirs, tensors, grad_output), exact, strict=True):
        assert_as_accurate_as(a, p, e)


@ON_SM90
@DTYPES
def test_aspp(dtype):
    """Branches and projection; the projection's weight is a slice of columns of a longer one."""
    arguments = aspp_operands((2, 72, 7, 6), dtype)
    output = aspp(*arguments)
    peer, exact = aspp_definition(*arguments), aspp_definition(*convert(arguments, Tensor.double))
    assert_as_accurate_as(output, peer, exact)


@ON_SM90
@IN_BOTH_FORMS
@pytest.mark.parametrize(
    ("shape", "channels", "num_ctas"),
    [
        ((3, 72, 11, 7), [24], 24),  # images smaller than a tile, a partial k-iteration
        ((5, 8, 1, 1), [8], 1),
        ((3, 16, 8, 16), [8, 8], 1),  # as many pixels as a CTA has
        (
            (2, 136, 10, 31),
            [264],
            1,
        ),  # two tiles of output channels, several work items per cluster
        ((1, 1032, 9, 5), [8], 24),  # split tiles
    ],
)
def test_means_of_the_pixels_of_a_1x1_branch(shape, channels, num_ctas):
    """The 1x1 branch sums the pixels once, whatever branches come before and after."""
    C, counts = shape[1], emulator.load().launch_counts()
    input = nhwc(*shape, dtype=torch.bfloat16) + 1
    weights = [torch.randn(8, C, *kernel).bfloat16() for kernel in ((3, 1), (1, 3))]
    weights += [(torch.randn(k, C, 1, 1) / C**0.5).bfloat16() for k in channels]
    weights += weights[:1]
    rates = [(2, 1), (1, 2), *[(1, 1)] * len(channels), (3, 1)]
    expected = torch.cat(
        [same_conv2d(input, w, None, r) for w, r in zip(weights, rates, strict=True)], dim=1
    )
    results = []
    for seed in range(3):
        output = empty_nhwc(input, expected.size(1))
        with machine(seed, "sm_90"):
            means = convolve_with_means(kernels(num_ctas), output, input, weights, rates)
        results.append((output, means))
    for output, means in results:
        assert torch.equal(means, results[0][1]) and torch.equal(output, results[0][0])
    torch.testing.assert_close(means, input.float().mean((2, 3)))
    torch.testing.assert_close(output, expected, rtol=2e-2, atol=2e-2)
    assert emulator.load().launch_counts().get("pixel_sums_fwd_kernel") == counts.get(
        "pixel_sums_fwd_kernel"
    )


@pytest.mark.parametrize(("channels", "k_iters"), [(8, 1), (64, 1), (72, 2), (136, 3)])
def test_a_k_iteration_is_64_channels(monkeypatch, channels, k_iters):
    """Counted in the sm_80 kernel's k-iterations, a launch would run twice as many, on zeros."""
    listed = []

    def conv_work_list(*args):
        listed.append(args[3])
        return work_lists.conv_work_list(*args)

    monkeypatch.setattr(dilated_conv2d_calls, "conv_work_list", conv_work_list)
    x, w = nhwc(1, channels, 3, 3, dtype=torch.bfloat16), torch.ones(8, channels, 3, 3).bfloat16()
    with machine(0, "sm_90"):
        convolved(kernels(4), x, [w], [None], [(1, 1)])
    assert listed == [k_iters]


def launch(
    num_ctas: int, tiles, plane, branches, channels: int, output, input, weight, sources
) -> None:
    """Convolve to the first channels of ``output``."""
    k_iters = work_lists.k_iters_per_tap(channels, input.dtype, work_lists.CONV_SM90)
    K = weight.size(0)
    work_list = work_lists.conv_work_list(
        tiles, plane, branches, k_iters, (K,), torch.device("cpu"), num_ctas, work_lists.CONV_SM90
    )
    convolve_slices(kernels(num_ctas), output, input, weight, sources, work_list)


@ON_SM90
@NUM_CTAS
def test_slices_of_larger_buffers(num_ctas):
    """Slices of input channels, of columns of a 1x1 weight and of output channels."""
    buffer, output = (
        nhwc(2, 104, 6, 5, dtype=torch.bfloat16),
        nhwc(2, 40, 6, 5, dtype=torch.bfloat16),
    )
    before = output.clone()
    weight = (torch.randn(24, 100, 1, 1) / 8).bfloat16()
    weight = torch.cat([weight, torch.full((24, 4, 1, 1), float("nan")).bfloat16()], dim=1)
    source = _C.ConvSource(24, 72, 8)
    launch(
        num_ctas, _C.schedule.forward_tiles, (2, 6, 5), ((1, 1, 1, 1),), 72, output, buffer,
        weight, [source],
    )  # fmt: skip
    expected = F.conv2d(buffer[:, 24:96], weight[:, 8:80])
    torch.testing.assert_close(output[:, :24], expected)
    assert torch.equal(output[:, 24:], before[:, 24:])


@pytest.mark.parametrize("device", ["sm_80", "sm_90"])
@pytest.mark.parametrize("size", [1, 3])
def test_a_single_output_channel_may_have_any_stride(device, size):
    """PyTorch keeps the stride of a dimension of size 1 as it was: here a column's."""
    input = nhwc(1, 8, 3, 4, dtype=torch.bfloat16)
    weight = torch.randn(size, size, 8, 1).bfloat16().permute(3, 2, 0, 1)
    assert weight.shape == (1, 8, size, size) and weight.stride(0) == 1
    with deeplab_fast.backend("emulated"), machine(1, device):
        output = dilated_conv2d(input, weight)
    torch.testing.assert_close(output, F.conv2d(input, weight, padding="same"))


@ON_SM90
def test_weights_at_the_same_address():
    """Cached tensor maps are not reused for weights with other rows or channels."""
    buffer = torch.randn(16, 24, 1, 1).bfloat16()
    input = nhwc(1, 24, 3, 4, dtype=torch.bfloat16)
    for weight, x in ((buffer[:8], input), (buffer, input), (buffer[:, :8], input[:, :8])):
        torch.testing.assert_close(dilated_conv2d(x, weight), F.conv2d(x, weight))
    shorter = buffer.flatten()[: 16 * 8].view(16, 8, 1, 1)
    x = input[:, :8].contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(dilated_conv2d(x, shorter), F.conv2d(x, shorter))


@ON_SM90
@IN_BOTH_FORMS
@NUM_CTAS
@DTYPES
def test_taps_of_several_sources(dtype, num_ctas):
    """Input gradient of parallel branches: one sum over the channels of all branches."""
    kernel_sizes, rates, channels = [(1, 1), (3, 3), (3, 5)], [1, 3, 2], [16, 72, 8]
    N, C, H, W = 2, 24, 7, 9
    weights = [
        (torch.randn(k, C, *size) / (k * size[0]) ** 0.5).to(dtype)
        for k, size in zip(channels, kernel_sizes, strict=True)
    ]
    grad = nhwc(N, sum(channels), H, W, dtype=dtype)
    rows = [w.permute(1, 2, 3, 0).reshape(C, -1) for w in weights]
    sources = [
        _C.ConvSource(sum(channels[:i]), k, sum(row.size(1) for row in rows[:i]))
        for i, k in enumerate(channels)
    ]
    branches = tuple((*size, r, r) for size, r in zip(kernel_sizes, rates, strict=True))
    grad_input = empty_nhwc(grad, C)
    launch(
        num_ctas, _C.schedule.input_grad_tiles, (N, H, W), branches, 72, grad_input, grad,
        torch.cat(rows, dim=1), sources,
    )  # fmt: skip

    def definition(grad, *weights):
        x = torch.zeros(N, C, H, W, dtype=grad.dtype, requires_grad=True)
        branches = zip(weights, rates, strict=True)
        y = torch.cat([F.conv2d(x, w, padding="same", dilation=r) for w, r in branches], dim=1)
        return torch.autograd.grad(y, x, grad)[0]

    exact = definition(grad.double(), *(w.double() for w in weights))
    assert_as_accurate_as(grad_input, definition(grad, *weights), exact)


def test_each_work_item_belongs_to_one_cluster():
    """Every work item is in the list of one cluster, longest first."""
    work_list = work_lists.conv_work_list(
        _C.schedule.forward_tiles, (2, 33, 33), ((3, 3, 12, 12),), 4, (256,), torch.device("cpu"),
        24, work_lists.CONV_SM90,
    )  # fmt: skip
    _, _, _, items, _, first_items, _, tile_items = work_list.tensors
    items = items.view(-1, 5)
    assert first_items[0] == 0 and first_items[-1] == len(items) and len(first_items) == 24 // 4 + 1
    for begin, end in first_items.unfold(0, 2, 1).tolist():
        lengths = items[begin:end, 3]
        assert len(lengths) > 0
        assert torch.equal(lengths, lengths.sort(descending=True).values)
    assert torch.equal(tile_items[:, 3], items[:, 3])


def test_no_cluster_is_idle():
    """A cluster without a work item would not wait for the previous kernel."""
    work_list = work_lists.conv_work_list(
        _C.schedule.forward_tiles, (1, 4, 4), ((1, 1, 1, 1),), 1, (8,), torch.device("cpu"), 24,
        work_lists.CONV_SM90,
    )  # fmt: skip
    first_items = work_list.tensors[5]
    assert first_items.tolist() == [0, 1]


@pytest.mark.parametrize("num_ctas", [4, 24])
def test_tile_items_match_work_items_and_tiles(num_ctas):
    """Rows that the kernel reads equal the work items, tiles and pixels they combine."""
    N, H, W = plane = 3, 9, 13
    pixels, taps, tiles, items, _, _, listed, tile_items = work_lists.conv_work_list(
        _C.schedule.forward_tiles, plane, ((3, 3, 2, 5), (1, 1, 1, 1)), 3, (264, 8),
        torch.device("cpu"), num_ctas, work_lists.CONV_SM90,
    ).tensors  # fmt: skip
    tiles, items = tiles.view(-1, 5).tolist(), items.view(-1, 5).tolist()
    for index, row in zip(pixels.tolist(), listed.tolist(), strict=True):
        y, x = index // W % H, index % W
        assert row == [index, y * 2**16 + x]
    assert len(tile_items) == len(items)
    for row, (tile, block, first_k_iter, num_k_iters, slot) in zip(
        tile_items.tolist(), items, strict=True
    ):
        output, first_pixel, num_pixels, first_tap, num_taps = tiles[tile]
        first_index = pixels[first_pixel].item()
        assert row == [
            block, output, slot, num_k_iters, first_pixel, num_pixels, first_tap, num_taps,
            first_k_iter % num_taps, first_k_iter // num_taps * 64,
            first_index, first_index // (H * W),
        ]  # fmt: skip
    assert any(row[8] > 0 for row in tile_items.tolist()) == (num_ctas == 24)


def test_fp32_uses_the_sm80_kernel():
    input = torch.empty(1, 8, 1, 2**15 - 1)
    assert work_lists.conv_kernel(kernels(1), input.dtype, input.shape[2:]) is work_lists.CONV_SM80
    assert work_lists.conv_kernel(kernels(1), torch.half, input.shape[2:]) is work_lists.CONV_SM90


@pytest.mark.parametrize("size", [(2**15, 1), (1, 2**15)])
def test_maps_beyond_16_bits_of_a_coordinate_use_the_sm80_kernel(size):
    input = torch.empty(1, 8, *size).half()
    assert work_lists.conv_kernel(kernels(1), input.dtype, input.shape[2:]) is work_lists.CONV_SM80
