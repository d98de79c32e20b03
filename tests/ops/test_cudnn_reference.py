"""Ops, ASPP and DeepLabV3, forward and backward, against PyTorch on cuDNN: the check of every GPU.

Outputs and gradients of ours and of PyTorch's, in one dtype on one device, are both compared with
PyTorch's in float64 on that device. Every comparison also runs on the CPU, in small, where backends
and peer are others, and once on a backend that is wrong: so it is known to pass and to fail without
a GPU.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

import deeplab_fast
from deeplab_fast import (
    ASPP,
    DeepLabV3,
    aspp,
    dilated_conv2d,
    parallel_dilated_conv2d,
    upsample_argmax,
    upsample_cross_entropy,
)
from deeplab_fast.backends import registry

from ..ops.test_aspp import definition as aspp_of_pytorch
from ..ops.test_upsample_argmax import assert_only_ties_differ, pytorch
from ..ops.test_upsample_cross_entropy import interpolate_and_cross_entropy
from ..support.backends import with_outputs
from ..support.batch_norm import with_statistics
from ..support.cases import DTYPES, Conv, assert_as_accurate_as, operands, to_tf32

torchvision = pytest.importorskip("torchvision")
segmentation = torchvision.models.segmentation


class Place(NamedTuple):
    device: str
    backend: str  # "" for the automatic choice

    def __str__(self) -> str:
        return f"{self.device}-{self.backend or 'automatic'}"

    @property
    def is_gpu(self) -> bool:
        return self.device != "cpu"


CPU = [Place("cpu", name) for name in ("", "cpu", "emulated")]
GPU = [Place("cuda", name) for name in ("", "cuda", "cuda/sm80", "triton", "reference")]
SECOND_GPU = Place("cuda:1", "")


def everywhere(name: str, small: Sequence, real: Sequence, cpu=CPU) -> pytest.MarkDecorator:
    """A test for small cases on the CPU and for real ones on GPUs."""
    cases = [(place, case) for place in cpu for case in small]
    cases += [(place, case) for place in GPU for case in real]
    cases += [(SECOND_GPU, case) for case in real[:1]]
    ids = [f"{place}-{str(case).replace(' ', '')}" for place, case in cases]
    return pytest.mark.parametrize(("place", name), cases, ids=ids)


@pytest.fixture(autouse=True)
def needs_its_device(request):
    place = request.node.callspec.params.get("place") if hasattr(request.node, "callspec") else None
    if place is not None and place.is_gpu:
        index = torch.device(place.device).index or 0
        if not torch.cuda.is_available() or torch.cuda.device_count() <= index:
            pytest.skip(f"needs {index + 1} GPU{'s' * index}")
    if place is not None and place.backend:
        if reason := registry.unavailable_reason(place.backend, torch.device(place.device).type):
            pytest.skip(f"{place.backend}: {reason}")


def on_backend(place: Place, function: Callable, *arguments: Any) -> Any:
    """Skip the test if a forced backend does not support this call."""
    if not place.backend:
        return function(*arguments)
    with deeplab_fast.backend(place.backend):
        try:
            return function(*arguments)
        except RuntimeError as error:
            if f"backend {place.backend!r} cannot run" in str(error):
                pytest.skip(str(error))
            raise


def forward(function: Callable[..., Tensor], tensors: Sequence[Tensor]) -> list[Tensor]:
    with torch.no_grad():
        return [function(*tensors)]


def backward(function: Callable[..., Tensor], tensors: Sequence[Tensor]) -> list[Tensor]:
    """The gradients of all tensors for the same gradient of the output in every dtype."""
    leaves = [t.detach().requires_grad_() for t in tensors]
    output = function(*leaves)
    generator = torch.Generator().manual_seed(1)
    grad_output = torch.randint(-8, 9, output.shape, generator=generator) / 8
    return list(torch.autograd.grad(output, leaves, grad_output.to(output)))


PASSES = [forward, backward]


def in_format(tensors: Sequence[Tensor], memory_format: torch.memory_format) -> list[Tensor]:
    return [
        t.contiguous(memory_format=memory_format if t.ndim == 4 else torch.contiguous_format)
        for t in tensors
    ]


def assert_as_accurate_in_norm(actual: list[Tensor], exact: list[Tensor], *peers: list) -> None:
    """The rule of ``assert_as_accurate_as`` for the norm of all gradients together.

    A ReLU whose input rounding moves across zero switches one gradient on or off. That happens to a
    share of some eps of them, and so to sqrt(eps) of the norm.
    """

    def flat(tensors: list[Tensor]) -> Tensor:
        return torch.cat([t.double().cpu().flatten() for t in tensors])

    def error(tensors: list[Tensor]) -> float:
        return ((flat(tensors) - flat(exact)).norm() / flat(exact).norm()).item()

    allowed = 2 * max(map(error, peers)) + torch.finfo(actual[0].dtype).eps ** 0.5
    assert error(actual) <= allowed, f"error {error(actual):.3g}, allowed {allowed:.3g}"


def compare(
    place: Place, run: Callable, ours: Callable, theirs: Callable, tensors, has_relu=False
) -> None:
    """Compare two functions, which run on any device, for CPU tensors in the tested dtype."""
    here = [t.to(place.device) for t in tensors]
    exact = run(theirs, [t.double() for t in here])
    layouts = [in_format(here, f) for f in (torch.contiguous_format, torch.channels_last)]
    peers = [run(theirs, layout) for layout in layouts]
    for layout in layouts:
        actual = on_backend(place, run, ours, layout)
        if has_relu and run is backward:
            assert_as_accurate_in_norm(actual, exact, *peers)
            continue
        for a, p, e, q in zip(actual, peers[0], exact, peers[1], strict=True):
            assert a.device == p.device
            assert_as_accurate_as(a, p, e, q)


# Ops.

DILATIONS = {33: (6, 12, 18), 65: (12, 24, 36)}
SMALL = [
    Conv(1, 8, 9, 7, 6, (3, 3), 2),
    Conv(2, 16, 8, 5, 4, (3, 3), 9),
    Conv(1, 8, 8, 6, 6, (1, 1)),
]
REAL = [
    *(
        Conv(2, 64, 48, size, size, (3, 3), dilation)
        for size in DILATIONS
        for dilation in DILATIONS[size]
    ),
    Conv(1, 2048, 256, 33, 33, (3, 3), 12),
    Conv(2, 256, 256, 33, 33, (1, 1)),
    Conv(2, 40, 21, 9, 13, (3, 3), (3, 2)),  # channels that fill no tile of a kernel
    Conv(1, 72, 133, 12, 11, (5, 5), 3),
    Conv(2, 64, 64, 33, 33, (3, 3), 2, 64),  # depthwise
    Conv(1, 32, 32, 17, 19, (3, 3), 4, 4),
]


@pytest.mark.parametrize("run", PASSES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@everywhere("case", SMALL, REAL)
def test_dilated_conv2d(place, case: Conv, dtype, run):
    dilation = (case.dilation, case.dilation) if isinstance(case.dilation, int) else case.dilation
    padding = tuple(d * (k // 2) for d, k in zip(dilation, case.kernel))

    def ours(input, weight, bias):
        return dilated_conv2d(input, weight, bias, dilation, case.groups)

    def theirs(input, weight, bias):
        return F.conv2d(input, weight, bias, 1, padding, dilation, case.groups)

    compare(place, run, ours, theirs, operands(case, dtype, "cpu"))


TF32_ON_CPU = [Place("cpu", "emulated"), Place("cpu", "triton")]
TF32_CASES = [Conv(2, 64, 48, 33, 33, (3, 3), 12), Conv(2, 40, 21, 9, 13, (3, 3), (3, 2))]


@pytest.mark.parametrize("differentiated", [None, "input", "weight"])
@pytest.mark.parametrize(
    ("place", "case"),
    [(place, SMALL[0]) for place in TF32_ON_CPU]
    + [(place, case) for place in GPU[1:4] for case in TF32_CASES],
    ids=str,
)
def test_tf32_convolution(place, case: Conv, differentiated, tf32, ran):
    """The output and each gradient are no further from fp32 than fp32 on rounded operands.

    Of cuDNN that cannot be asked, which may choose not to round. That the bias is zero leaves a sum
    of products, all of whose operands are rounded.
    """
    input, weight, _ = operands(case, torch.float32, "cpu")
    dilation = (case.dilation, case.dilation) if isinstance(case.dilation, int) else case.dilation

    def run(function, input, weight):
        tensors = {"input": input.detach(), "weight": weight.detach()}
        if differentiated is None:
            return forward(function, list(tensors.values()))[0]
        tensors[differentiated].requires_grad_()
        output = function(*tensors.values())
        generator = torch.Generator().manual_seed(1)
        grad = torch.randint(-8, 9, output.shape, generator=generator) / 8  # exact in tf32
        (gradient,) = torch.autograd.grad(output, tensors[differentiated], grad.to(output))
        return gradient

    def theirs(input, weight):
        return F.conv2d(input, weight, padding="same", dilation=dilation)

    exact = run(theirs, input.double(), weight.double())
    peer = run(theirs, to_tf32(input), to_tf32(weight))
    here = [t.to(place.device) for t in (input, weight)]
    ours = partial(dilated_conv2d, dilation=dilation)
    for memory_format in (torch.contiguous_format, torch.channels_last):
        ran.clear()
        with deeplab_fast.backend(place.backend):
            actual = run(ours, *in_format(here, memory_format))
        assert {name for _, name in ran} == {place.backend}
        assert_as_accurate_as(actual, peer, exact)
        # Not true fp32, which other tests see: then the rounding here would go unnoticed.
        error = (actual.double().cpu() - exact).abs().max() / exact.abs().max()
        assert error > 2**-15


class Branches(NamedTuple):
    N: int
    C: int
    K: int
    size: int
    dilations: tuple[int, ...]


def parallel_of_pytorch(dilations: Sequence[int]) -> Callable[..., Tensor]:
    def theirs(input, *parameters):
        half = len(parameters) // 2
        outputs = [
            F.conv2d(input, weight, bias, padding=weight.size(2) // 2 * dilation, dilation=dilation)
            for weight, bias, dilation in zip(parameters[:half], parameters[half:], dilations)
        ]
        return torch.cat(outputs, dim=1)

    return theirs


def branch_operands(case: Branches, dtype: torch.dtype) -> list[Tensor]:
    kernels = [1, *[3] * len(case.dilations)]
    scale = case.C**-0.5
    weights = [scale / k * torch.randn(case.K, case.C, k, k) for k in kernels]
    input = torch.randn(case.N, case.C, case.size, case.size)
    return [t.to(dtype) for t in (input, *weights, *(torch.randn(case.K) for _ in kernels))]


SMALL_BRANCHES = [Branches(1, 8, 8, 6, (2, 7))]
REAL_BRANCHES = [Branches(2, 64, 32, size, DILATIONS[size]) for size in DILATIONS]
REAL_BRANCHES += [Branches(1, 2048, 256, 65, DILATIONS[65])]


@pytest.mark.parametrize("run", PASSES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@everywhere("case", SMALL_BRANCHES, REAL_BRANCHES)
def test_parallel_dilated_conv2d(place, case: Branches, dtype, run):
    dilations = [1, *case.dilations]

    def ours(input, *parameters):
        half = len(parameters) // 2
        return parallel_dilated_conv2d(input, parameters[:half], parameters[half:], dilations)

    compare(place, run, ours, parallel_of_pytorch(dilations), branch_operands(case, dtype))


@pytest.mark.parametrize("run", PASSES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@everywhere("case", SMALL_BRANCHES, REAL_BRANCHES[:2])
def test_aspp(place, case: Branches, dtype, run):
    dilations = [1, *case.dilations]
    branches = len(dilations)

    def call(function):
        def of_tensors(input, *parameters):
            weights, biases = parameters[:branches], parameters[branches : 2 * branches]
            return function(input, weights, biases, dilations, *parameters[2 * branches :])

        return of_tensors

    K, concat = case.K, case.K * (branches + 1)
    shapes = [(K, case.C, 1, 1), (K,), (K, concat, 1, 1), (K,)]
    rest = [torch.randn(shape) / (shape[1] if len(shape) > 1 else 1) ** 0.5 for shape in shapes]
    tensors = branch_operands(case, dtype) + [t.to(dtype) for t in rest]
    compare(place, run, call(aspp), call(aspp_of_pytorch), tensors, has_relu=True)


UPSAMPLINGS = [((2, 5, 4, 6), (17, 23)), ((1, 21, 9, 3), (9, 31))]
REAL_UPSAMPLINGS = [((2, 21, 65, 65), (513, 513)), ((1, 19, 129, 257), (1024, 2048))]


@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@everywhere("case", UPSAMPLINGS, REAL_UPSAMPLINGS)
def test_upsample_argmax(place, case, dtype, align_corners):
    shape, size = case
    logits = torch.randn(shape).to(dtype)
    arguments = {"size": size, "align_corners": align_corners}
    here = logits.to(place.device)
    labels = on_backend(place, lambda: upsample_argmax(here, **arguments))
    expected = pytorch(here.float(), **arguments).argmax(1)
    assert_only_ties_differ(labels.cpu(), expected.cpu(), logits, **arguments)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("run", PASSES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@everywhere("case", UPSAMPLINGS, REAL_UPSAMPLINGS[:1])
def test_upsample_cross_entropy(place, case, dtype, run, reduction):
    shape, size = case
    target = torch.randint(shape[1], (shape[0], *size))
    target[torch.rand(target.shape) < 0.2] = 255
    weight = torch.rand(shape[1]) + 0.1

    def call(function):
        def of_logits(logits):
            arguments = target.to(logits.device), weight.to(logits.device)
            options = {"ignore_index": 255, "reduction": reduction, "label_smoothing": 0.1}
            return function(logits, *arguments, **options)

        return of_logits

    logits = (3 * torch.randn(shape)).to(dtype)
    theirs = call(interpolate_and_cross_entropy)
    compare(place, run, call(upsample_cross_entropy), theirs, [logits])


# Modules. Dropout draws other numbers on other devices; batch norm of the pooled branch would
# divide by the difference of two values.


def assert_like_theirs(
    place: Place, run: Callable, pair, input: Tensor, output=lambda y: y
) -> None:
    """Output, or gradients of input and parameters, of two modules with the same state dict."""
    names = [name for name, _ in pair[0].named_parameters()]

    def call(module):
        for dropout in module.modules():
            if isinstance(dropout, nn.Dropout):
                dropout.p = 0.0

        def of_tensors(input, *parameters):
            copied = copy.deepcopy(module).to(input.device, input.dtype)
            state = dict(zip(names, parameters, strict=True))
            return output(torch.func.functional_call(copied, state, (input,)))

        return of_tensors

    ours, theirs = pair
    tensors = [input, *(p.detach() for p in theirs.parameters())]
    compare(place, run, call(ours), call(theirs), tensors, has_relu=True)


class Pyramid(NamedTuple):
    N: int
    C: int
    K: int
    size: int
    dilations: tuple[int, ...]


SMALL_PYRAMIDS = [Pyramid(2, 16, 16, 9, (2, 10))]
REAL_PYRAMIDS = [Pyramid(2, 64, 32, size, DILATIONS[size]) for size in DILATIONS]
REAL_PYRAMIDS += [Pyramid(1, 2048, 256, 33, DILATIONS[33])]


def modules_of_pyramid(case: Pyramid, dtype: torch.dtype, train: bool) -> tuple[nn.Module, ...]:
    theirs = with_statistics(segmentation.deeplabv3.ASPP(case.C, case.dilations, case.K))
    ours = ASPP(case.C, case.dilations, case.K)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    for module in (ours, theirs):
        module.to(dtype).train(train)
        module.convs[-1].eval()
    return ours, theirs


@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("run", PASSES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@everywhere("case", SMALL_PYRAMIDS, REAL_PYRAMIDS)
def test_aspp_module(place, case: Pyramid, dtype, run, train):
    pair = modules_of_pyramid(case, dtype, train)
    input = torch.randn(case.N, case.C, case.size, case.size).to(dtype)
    assert_like_theirs(place, run, pair, input)


class Images(NamedTuple):
    N: int
    size: int
    output_stride: int


def models(images: Images) -> tuple[DeepLabV3, nn.Module]:
    ours = with_statistics(DeepLabV3("resnet50", 5, images.output_stride)).eval()
    strides = [False, images.output_stride == 8, True]
    resnet = torchvision.models.resnet50(weights=None, replace_stride_with_dilation=strides)
    features = torchvision.models._utils.IntermediateLayerGetter(resnet, {"layer4": "out"})
    dilations = (12, 24, 36) if images.output_stride == 8 else (6, 12, 18)
    head = segmentation.deeplabv3.DeepLabHead(2048, 5, dilations)
    theirs = segmentation.deeplabv3.DeepLabV3(features, head).eval()
    theirs.load_state_dict(ours.state_dict(), strict=True)
    return ours, theirs


SMALL_IMAGES = [Images(1, 17, 16)]
REAL_IMAGES = [Images(2, 257, 8), Images(1, 513, 16)]


@pytest.mark.parametrize("run", PASSES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@everywhere("images", SMALL_IMAGES, REAL_IMAGES, cpu=CPU[:1])
def test_deeplabv3(place, images: Images, dtype, run):
    if not place.is_gpu and (dtype != torch.float32 or run is backward):
        pytest.skip("takes half a minute on a CPU")
    pair = [model.to(dtype) for model in models(images)]
    input = torch.randn(images.N, 3, images.size, images.size).to(dtype)
    assert_like_theirs(place, run, pair, input, lambda outputs: outputs["out"])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@everywhere("images", SMALL_IMAGES, REAL_IMAGES, cpu=CPU[:1])
def test_prepared_for_inference(place, images: Images, dtype):
    ours, theirs = models(images)
    prepared = ours.prepare_for_inference(dtype).to(place.device)
    input = torch.randn(images.N, 3, images.size, images.size).to(dtype)
    here = input.to(place.device)
    with torch.no_grad():
        theirs.to(place.device)
        exact = theirs.double()(here.double())["out"]
        theirs = theirs.to(dtype)
        peers = [theirs(x)["out"] for x in (here, in_format([here], torch.channels_last)[0])]
        output = on_backend(place, lambda: prepared(here)["out"])
    assert_as_accurate_as(output, peers[0], exact, peers[1])


@contextlib.contextmanager
def preferring(backend: str):
    """Ops run on the backend if it supports the call, else on the automatic choice."""
    with pytest.MonkeyPatch.context() as patch:
        automatic = registry.automatic
        patch.setattr(registry, "automatic", lambda op, args: (backend, *automatic(op, args)))
        yield


@pytest.mark.parametrize(
    ("place", "backbone"),
    [
        (Place("cpu", "emulated"), "mobilenet_v2"),
        *itertools.product(GPU[1:4], ("mobilenet_v2", "resnet50")),
    ],
    ids=str,
)
def test_prepared_for_inference_on_our_kernels(place, backbone, ran):
    """All convolutions but the strided ones run on our kernels."""
    ours = with_statistics(DeepLabV3(backbone, 5, 16)).eval().to(place.device)
    size, dtype = (257 if place.is_gpu else 17), torch.bfloat16
    input = torch.randn(2, 3, size, size).to(place.device, dtype)
    with torch.no_grad():
        # Else the logits of a random network are their mean, and hide errors in what they vary by.
        ours.classifier[-1].bias -= ours(input.float())["out"].mean((0, 2, 3))
        prepared = ours.prepare_for_inference(dtype)
        with deeplab_fast.backend("reference"):
            exact = ours.double()(input.double())["out"]
            peers = [
                ours.to(dtype)(x)["out"]
                for x in (input, in_format([input], torch.channels_last)[0])
            ]
        ran.clear()
        with preferring(place.backend):
            output = prepared(input)["out"]
    assert_as_accurate_as(output, peers[0], exact, peers[1])
    elsewhere = [op for op, name in ran if name != place.backend]
    convolutions = [m for m in ours.modules() if isinstance(m, nn.Conv2d)]
    strided = sum(m.stride != (1, 1) for m in convolutions)
    assert elsewhere == ["fused_conv2d"] * strided and len(ran) > len(convolutions) - 8


# Streams and graphs. name -> function and the tensor that it is called with.


def calls(device: str) -> dict[str, tuple[Callable[[Tensor], Tensor], Tensor]]:
    def here(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.randn(shape).to(device, dtype)

    dilations = [1, 2]
    input, weight, bias = here(1, 16, 7, 9), here(8, 16, 3, 3), here(8)
    branches = [here(8, 16, 1, 1), here(8, 16, 3, 3)], [bias, bias], dilations
    project = here(8, 16, 1, 1), bias, here(8, 24, 1, 1), bias
    logits = here(1, 5, 7, 9, dtype=torch.float32)
    target = torch.randint(5, (1, 29, 33)).to(device)
    return {
        "dilated_conv2d": (lambda x: dilated_conv2d(x, weight, bias, 2), input),
        "parallel_dilated_conv2d": (lambda x: parallel_dilated_conv2d(x, *branches), input),
        "aspp": (lambda x: aspp(x, *branches, *project), input),
        "upsample_argmax": (lambda x: upsample_argmax(x, (29, 33)), logits),
        "upsample_cross_entropy": (lambda x: upsample_cross_entropy(x, target), logits),
    }


def captured(place: Place, function: Callable[[], Tensor]) -> tuple[Tensor, Callable[[], Any]]:
    """An output, and a function that computes it again in place: on a GPU, a captured graph."""
    if not place.is_gpu:
        output = function()
        return output, lambda: output.copy_(function())
    with torch.cuda.device(place.device):
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            function()  # allocates and uploads what later calls find
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            output = function()
    return output, graph.replay


@everywhere("name", list(calls("cpu")), list(calls("cpu")))
def test_graph_replay(place, name):
    function, buffer = calls(place.device)[name]
    output, replay = captured(place, lambda: on_backend(place, function, buffer))
    new = torch.randn(buffer.shape).to(buffer)
    expected = on_backend(place, function, new)
    assert not torch.equal(output, expected)
    buffer.copy_(new)
    replay()
    assert torch.equal(output, expected)


@everywhere("name", list(calls("cpu")), list(calls("cpu")))
def test_current_stream(place, name):
    """The input gets its values late on another stream than the default one."""
    function, input = calls(place.device)[name]
    expected = on_backend(place, function, input)
    late = torch.full_like(input, float("nan"))
    side = contextlib.nullcontext()
    if place.is_gpu:
        torch.cuda.synchronize(place.device)
        side = torch.cuda.stream(torch.cuda.Stream(place.device))
    with side:
        if place.is_gpu:
            torch.cuda._sleep(100_000_000)
        late.copy_(input)
        output = on_backend(place, function, late)
    if place.is_gpu:
        torch.cuda.synchronize(place.device)
    assert torch.equal(output, expected)


# The comparisons detect a wrong backend.

HERE = Place("cpu", "cpu")
COMPARISONS = {
    "dilated_conv2d": lambda: test_dilated_conv2d(HERE, SMALL[0], torch.float32, forward),
    "dilated_conv2d_backward": lambda: test_dilated_conv2d(HERE, SMALL[0], torch.float32, backward),
    "parallel_dilated_conv2d_and_mean": lambda: test_aspp_module(
        HERE, SMALL_PYRAMIDS[0], torch.float32, forward, True
    ),
    "parallel_dilated_conv2d_backward": lambda: test_parallel_dilated_conv2d(
        HERE, SMALL_BRANCHES[0], torch.float32, backward
    ),
    "aspp": lambda: test_aspp(HERE, SMALL_BRANCHES[0], torch.float32, forward),
    "upsample_argmax": lambda: test_upsample_argmax(HERE, UPSAMPLINGS[0], torch.float32, False),
    "upsample_cross_entropy": lambda: test_upsample_cross_entropy(
        HERE, UPSAMPLINGS[0], torch.float32, forward, "none"
    ),
    "upsample_cross_entropy_backward": lambda: test_upsample_cross_entropy(
        HERE, UPSAMPLINGS[0], torch.float32, backward, "mean"
    ),
}


@pytest.mark.parametrize("op", COMPARISONS)
def test_wrong_element_is_detected(monkeypatch, op):
    right = registry._kernels[op]["cpu"]

    def wrong(outputs):
        output = next(t for t in tree_leaves(outputs) if t.numel())
        first = output[(0,) * output.ndim]
        if output.is_floating_point():
            first += 1e-3 * output.abs().max()
        else:
            first.copy_((first + 1) % 5)  # of five classes
        return outputs

    COMPARISONS[op]()
    monkeypatch.setitem(registry._kernels[op], "cpu", with_outputs(right, wrong))
    registry.forget_plans()
    with pytest.raises(AssertionError):
        COMPARISONS[op]()


def test_wrong_module_gradient_is_detected(monkeypatch):
    op, case = "parallel_dilated_conv2d_backward", SMALL_PYRAMIDS[0]
    right = registry._kernels[op]["cpu"]

    def wrong(outputs):
        return tree_map_only(Tensor, lambda t: t * 1.01, outputs)

    monkeypatch.setitem(registry._kernels[op], "cpu", with_outputs(right, wrong))
    with pytest.raises(AssertionError, match="error"):
        test_aspp_module(HERE, case, torch.float32, backward, True)


def test_stale_graph_is_detected(monkeypatch):
    def stale(place: Place, function: Callable[[], Tensor]) -> tuple[Tensor, Callable[[], Any]]:
        return function(), lambda: None

    monkeypatch.setitem(globals(), "captured", stale)
    with pytest.raises(AssertionError):
        test_graph_replay(HERE, "dilated_conv2d")
