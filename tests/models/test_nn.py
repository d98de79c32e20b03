"""ASPP against torchvision's: parameters, outputs, gradients, hooks and replaced submodules."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from deeplab_fast.nn import ASPP

deeplabv3 = pytest.importorskip("torchvision.models.segmentation.deeplabv3")

RATES = (6, 12, 18)
SHAPES = ((2, 8, 33, 33), (3, 8, 5, 7), (2, 8, 1, 1))  # the last two are smaller than all rates


def pair(rates=RATES, dtype=torch.float64) -> tuple[ASPP, nn.Module]:
    """Our and torchvision's module from the same seed, with random running statistics."""
    torch.manual_seed(1)
    ours = ASPP(8, rates, 4)
    torch.manual_seed(1)
    theirs = deeplabv3.ASPP(8, rates, 4)
    for name, buffer in ours.named_buffers():
        if buffer.is_floating_point():
            buffer.uniform_(0.5, 1.5)
            theirs.get_buffer(name).copy_(buffer)
    return ours.to(dtype), theirs.to(dtype)


def run(module: nn.Module, input: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """The output, and the gradients of input and parameters, with a fixed dropout seed."""
    input = input.clone().requires_grad_()
    torch.manual_seed(2)
    output = module(input)
    output.square().sum().backward()
    return output.detach(), {"input": input.grad} | {
        name: parameter.grad for name, parameter in module.named_parameters()
    }


def test_same_seed_gives_torchvisions_state_dict():
    ours, theirs = (module.state_dict() for module in pair())
    assert list(ours) == list(theirs)
    assert_close(ours, theirs, rtol=0, atol=0)


def test_vmap():
    """Over images, and over gradients of each image."""
    aspp = pair()[0].eval()
    images = torch.randn(3, 8, 5, 7, dtype=torch.float64)
    outputs = torch.func.vmap(lambda image: aspp(image[None])[0])(images)
    assert_close(outputs, aspp(images))

    def loss(parameters: dict[str, Tensor], image: Tensor) -> Tensor:
        return torch.func.functional_call(aspp, parameters, image[None]).square().sum()

    parameters = dict(aspp.named_parameters())
    gradients = torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, images)
    for i, image in enumerate(images):
        expected = torch.autograd.grad(loss(parameters, image), list(parameters.values()))
        assert_close([gradient[i] for gradient in gradients.values()], list(expected))


@pytest.mark.parametrize("rates", [RATES, (), (1,)], ids=str)
@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_outputs_gradients_and_statistics_match_torchvision(rates, train, shape, ran):
    ours, theirs = (module.train(train) for module in pair(rates))
    input = torch.randn(shape, dtype=torch.float64)
    assert_close(run(ours, input), run(theirs, input))
    assert_close(dict(ours.named_buffers()), dict(theirs.named_buffers()))
    ops = ["parallel_dilated_conv2d_and_mean", "parallel_dilated_conv2d_backward"]
    assert [op for op, _ in ran] == ops


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_float32_in_both_memory_formats(memory_format):
    ours, theirs = (module.eval() for module in pair(dtype=torch.float32))
    input = torch.randn(2, 8, 33, 33).contiguous(memory_format=memory_format)
    output = ours(input)
    assert_close(output, theirs(input))
    assert output.is_contiguous(memory_format=memory_format)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_bfloat16_is_as_accurate_as_torchvisions(memory_format):
    """Relative errors against float64 in the L2 norm, summed over several inputs and weights."""

    def error(module: nn.Module) -> float:
        output = copy.deepcopy(module).bfloat16()(input.bfloat16())
        return ((output.double() - exact).norm() / exact.norm()).item()

    ours_error = theirs_error = 0.0
    for seed in range(3):
        torch.manual_seed(seed)
        ours, theirs = ASPP(64, RATES, 64).eval(), deeplabv3.ASPP(64, RATES, 64).eval()
        ours.load_state_dict({k: v.bfloat16().to(v.dtype) for k, v in ours.state_dict().items()})
        theirs.load_state_dict(ours.state_dict())
        input = torch.randn(2, 64, 17, 19).bfloat16().relu().contiguous(memory_format=memory_format)
        exact = copy.deepcopy(theirs).double()(input.double())
        ours_error += error(ours)
        theirs_error += error(theirs)
    assert ours_error <= 1.05 * theirs_error


def test_pooled_branch_is_neither_broadcast_nor_concatenated():
    class Channels(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            output = function(*args, **(kwargs or {}))
            if isinstance(output, Tensor) and output.shape[2:] == (9, 9):
                seen.add(output.size(1))
            return output

    input = torch.randn(2, 8, 9, 9, dtype=torch.float64)
    seen: set[int] = set()
    ours, theirs = pair()
    with Channels():
        ours(input)
    assert seen == {16, 4}  # four branches; the projection
    with Channels():
        theirs(input)
    assert 20 in seen


def test_batch_of_one_in_training_mode_is_an_error_with_advice():
    aspp = ASPP(8, RATES, 4).train()
    input = torch.randn(1, 8, 9, 9)
    with pytest.raises(ValueError, match=r"batch of 1.*convs\[-1\].eval\(\)"):
        aspp(input)
    aspp.convs[-1].eval()
    assert aspp(input).shape == (1, 4, 9, 9)


def test_gradient_of_the_input_is_written_once():
    """The kernel of the convolutions adds the gradient of the mean."""

    def makers_of_maps(module: nn.Module) -> list[str]:
        class Makers(TorchDispatchMode):
            def __torch_dispatch__(self, function, types, args=(), kwargs=None):
                outputs = function(*args, **(kwargs or {}))
                shapes = [t.shape for t in tree_leaves(outputs) if isinstance(t, Tensor)]
                if input.shape in shapes:
                    names.append(function._schema.name)
                return outputs

        names: list[str] = []
        input = torch.randn(2, 8, 9, 9, dtype=torch.float64, requires_grad=True)
        output = module(input)
        with Makers():
            torch.autograd.grad(output.sum(), input)
        return names

    ours, theirs = pair()
    assert makers_of_maps(ours) == ["deeplab_fast::parallel_dilated_conv2d_backward"]
    assert makers_of_maps(theirs).count("aten::add") == 4


@pytest.mark.parametrize(
    "hooked",
    ["convs.1", "convs.2.0", "convs.0.1", "project.0", "convs.4", "convs.4.0", "convs.4.1"],
)
def test_hooks_of_submodules_are_called(hooked):
    ours, theirs = pair()
    calls = []
    ours.get_submodule(hooked).register_forward_hook(lambda *args: calls.append(args))
    input = torch.randn(2, 8, 9, 9, dtype=torch.float64)
    assert_close(run(ours, input), run(theirs, input))
    assert len(calls) == 1


@pytest.mark.parametrize(
    "name, replacement",
    [
        ("convs.1.0", nn.Conv2d(8, 4, 3, padding=6, dilation=6)),  # with bias
        (
            "convs.1.0",
            nn.Conv2d(8, 4, 3, padding=6, dilation=6, bias=False, padding_mode="reflect"),
        ),
        ("convs.1.0", nn.Sequential(nn.Conv2d(8, 4, 1))),
        ("convs.1.2", nn.ELU()),
        ("convs.1.1", nn.GroupNorm(2, 4)),
        ("convs.1.1", nn.BatchNorm2d(4, momentum=None)),
        ("convs.1.1", nn.BatchNorm2d(4, affine=False)),
        ("convs.4.2", nn.Identity()),
        ("convs.4.0", nn.AdaptiveMaxPool2d(1)),
        ("convs.4.0", nn.AdaptiveAvgPool2d((1, 1))),
        ("convs.4.1", nn.Sequential(nn.Conv2d(8, 4, 1), nn.ELU())),
        ("project.0", nn.Conv2d(20, 4, 1)),
        ("project.3", nn.Identity()),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_replaced_submodules_are_used(name, replacement):
    modules = pair()
    for module in modules:
        parent, _, child = name.rpartition(".")
        module.get_submodule(parent)[int(child)] = copy.deepcopy(replacement).double()
    ours, theirs = modules
    input = torch.randn(2, 8, 9, 9, dtype=torch.float64)
    assert_close(run(ours, input), run(theirs, input))
    assert_close(dict(ours.named_buffers()), dict(theirs.named_buffers()))


def test_one_frozen_batch_norm():
    ours, theirs = pair()
    for module in (ours, theirs):
        module.convs[2][1].eval()
    input = torch.randn(2, 8, 9, 9, dtype=torch.float64)
    assert_close(run(ours, input), run(theirs, input))
    assert_close(dict(ours.named_buffers()), dict(theirs.named_buffers()))


def test_sync_batch_norm_keeps_the_branches_together(ran):
    ours, theirs = (module.eval() for module in pair())
    ours = nn.SyncBatchNorm.convert_sync_batchnorm(ours)
    assert isinstance(ours.convs[0][1], nn.SyncBatchNorm)
    input = torch.randn(2, 8, 9, 9, dtype=torch.float64)
    assert_close(ours(input), theirs(input))
    assert len(ran) == 1


def test_gradcheck():
    aspp = pair((2,))[0].eval()
    input = torch.randn(1, 8, 3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(aspp, (input,), fast_mode=True)


@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
def test_compiles_to_one_graph(train):
    aspp = pair()[0].train(train)
    compiled = copy.deepcopy(aspp)
    input = torch.randn(2, 8, 9, 9, dtype=torch.float64)
    actual = run(torch.compile(compiled, fullgraph=True, backend="aot_eager"), input)[0]
    assert_close(actual, run(aspp, input)[0])
    assert_close(dict(compiled.named_buffers()), dict(aspp.named_buffers()))


def test_autocast():
    ours, theirs = (module.eval() for module in pair(dtype=torch.float32))
    input = torch.randn(2, 8, 9, 9)
    with torch.autocast("cpu", torch.bfloat16):
        actual, expected = ours(input), theirs(input)
    assert actual.dtype == expected.dtype == torch.bfloat16
    assert_close(actual, expected, rtol=0.05, atol=0.05)
