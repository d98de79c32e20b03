"""Operations and memory traffic of a model, counted without computing anything."""

from __future__ import annotations

import contextlib
import copy
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..backends import registry
from ..backends.calls import running_layers
from ..models.fusion import FusedConv2d
from .flops import taps

# Operations that only pass over memory, by kind: fusion avoids some and may add copies.
PASSES = {
    "batch norm": ("native_batch_norm", "_native_batch_norm_legit_no_training"),
    "activation": (
        "relu", "relu_", "hardtanh", "hardtanh_", "silu", "silu_", "hardswish", "hardswish_",
        "hardsigmoid", "hardsigmoid_", "gelu", "leaky_relu", "leaky_relu_", "elu", "elu_",
    ),
    "sum": ("add", "add_"),
    "concatenation": ("cat",),
    "upsampling": ("upsample_bilinear2d", "upsample_argmax"),
    "copy": ("clone", "copy_", "_to_copy"),
}  # fmt: skip
_PASS_OF = {op: name for name, ops in PASSES.items() for op in ops}


class Cost(NamedTuple):
    """Operations and memory traffic of the forward pass of one image.

    Attributes:
        shape: channels, height and width of the image.
        flops: floating-point operations of convolutions and matrix products by qualified name of
            the module that computes them. A multiply-add counts as two.
        padding: those of the operations that multiply zero padding, in dilated convolutions.
        skipped: those of ``padding`` in dense convolutions that run in an op of this package, whose
            CUDA kernels skip most of them.
        traffic: bytes that other operations read and write, by the names in :data:`PASSES`.
    """

    shape: tuple[int, int, int]
    flops: Counter[str]
    padding: Counter[str]
    skipped: Counter[str]
    traffic: Counter[str]


def count(model: nn.Module, shape: tuple[int, int, int], by_layer: bool = True) -> Cost:
    """Count what ``model`` computes for one image [C, H, W] in evaluation mode.

    A copy of the model without data and hooks runs on the meta device. If the model has a method
    ``predict``, that is what runs.

    Args:
        shape: channels, height and width of the image.
        by_layer: False to count everything under the name "" without global hooks, which would make
            an accelerated ASPP run its original code.

    Raises:
        Exception: the model cannot run on meta tensors of that shape.
    """
    from torch.utils.flop_counter import flop_registry  # slow, because it imports Triton

    counted = without_data(model)
    image = torch.empty(1, *shape, device="meta", dtype=dtype_of(counted))
    run = getattr(counted, "predict", counted)
    with (
        torch.no_grad(),
        torch.compiler.set_stance("force_eager"),
        _nondeterministic(),
        running_layers(counted) if by_layer else contextlib.nullcontext([""]) as layers,
    ):
        cost = Cost(shape, Counter(), Counter(), Counter(), Counter())
        counter = _Counter(layers, cost, flop_registry)
        with counter:
            run(image)
    return cost


def channels_of_images(model: nn.Module) -> int | None:
    """The input channels of the first convolution, or None if there is none."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            return module.in_channels
        if isinstance(module, FusedConv2d):
            return module.weight.size(1) * module.geometry[-1]
    return None


def without_data(model: nn.Module) -> nn.Module:
    """A copy without hooks on the meta device, in evaluation mode. The data is never copied."""
    memo: dict[int, Any] = {}
    for tensor in (*model.parameters(), *model.buffers()):
        empty: Tensor = torch.empty_like(tensor, device="meta")
        is_parameter = isinstance(tensor, nn.Parameter)
        memo[id(tensor)] = nn.Parameter(empty, tensor.requires_grad) if is_parameter else empty
    counted = copy.deepcopy(model, memo).eval()
    for module in counted.modules():
        module._forward_hooks.clear()
        module._forward_pre_hooks.clear()
    return counted


@contextlib.contextmanager
def _nondeterministic() -> Iterator[None]:
    """Context without deterministic algorithms, which split F.interpolate on the meta device."""
    is_enabled = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(False)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(is_enabled, warn_only=warn_only)


def dtype_of(model: nn.Module) -> torch.dtype:
    floating = (tensor.dtype for tensor in model.parameters() if tensor.is_floating_point())
    return next(floating, torch.float32)


class _Convolution(NamedTuple):
    output: tuple[int, ...]  # [N, K, H, W]
    input: tuple[int, ...]  # [N, C, H, W]
    weight: tuple[int, ...]  # [K, C / groups, R, S]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]

    @property
    def is_dense(self) -> bool:
        return self.input[1] == self.weight[1]

    def flops(self) -> int:
        batch, _, height, width = self.output
        return 2 * batch * height * width * torch.Size(self.weight).numel()

    def flops_on_padding(self) -> int:
        """The operations that multiply zero padding, if the convolution is dilated, else 0."""
        if max(self.dilation) == 1:
            return 0
        kernel = self.weight[2:]
        geometry = zip(self.input[2:], self.dilation, kernel, self.stride, self.padding)
        inside = [taps(*sizes) for sizes in geometry]
        per_tap = 2 * self.output[0] * self.weight[0] * self.weight[1]
        return self.flops() - per_tap * inside[0] * inside[1]


class _Counter(TorchDispatchMode):
    """Counts the operations that run, under the name of the innermost module that runs."""

    def __init__(self, layers: list[str], cost: Cost, formulas: Mapping[Any, Any]) -> None:
        super().__init__()
        self.cost = cost
        self._layers = layers
        self._formulas = formulas  # for the operations of PyTorch

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        namespace, _, op = function._schema.name.partition("::")
        if op not in _PASS_OF and _is_composite(function):
            with self:
                return function.decompose(*args, **kwargs)
        output = function(*args, **kwargs)
        layer = self._layers[-1]
        if namespace == "deeplab_fast":
            for convolution in _own_convolutions(op, args, output):
                self.cost.flops[layer] += convolution.flops()
                if on_padding := convolution.flops_on_padding():
                    self.cost.padding[layer] += on_padding
                    self.cost.skipped[layer] += on_padding * convolution.is_dense
        elif formula := self._formulas.get(function._overloadpacket):
            self.cost.flops[layer] += formula(*args, **kwargs, out_val=output)
            if op == "convolution" and args[0].dim() == 4 and not args[6]:
                input, weight, _, stride, padding, dilation, *_ = args
                shapes = tuple(output.shape), tuple(input.shape), tuple(weight.shape)
                convolution = _Convolution(*shapes, *map(tuple, (stride, padding, dilation)))
                if on_padding := convolution.flops_on_padding():
                    self.cost.padding[layer] += on_padding
        if op in _PASS_OF:
            tensors = [x for x in tree_leaves((args, kwargs, output)) if isinstance(x, Tensor)]
            self.cost.traffic[_PASS_OF[op]] += sum(x.numel() * x.element_size() for x in tensors)
        return output


def _is_composite(function: Any) -> bool:
    """True for an operation like F.conv2d, which PyTorch writes as other operations."""
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    return has_kernel(function.name(), "CompositeImplicitAutograd")


def _own_convolutions(op: str, args: tuple[Any, ...], output: Any) -> Iterator[_Convolution]:
    """The convolutions that an op of this package computes."""
    if op in ("fused_conv2d", "fused_conv2d_add_"):
        call = registry.arguments(op, *args)
        result = call.residual if op == "fused_conv2d_add_" else output
        shapes = (tuple(tensor.shape) for tensor in (result, call.input, call.weight))
        yield _Convolution(*shapes, *map(tuple, (call.stride, call.padding, call.dilation)))
    elif op == "dilated_conv2d":
        call = registry.arguments(op, *args)
        yield _same_convolution(call.input, call.weight, tuple(call.dilation))
    elif op in ("parallel_dilated_conv2d", "parallel_dilated_conv2d_and_mean", "aspp"):
        call = registry.arguments(op, *args)
        for weight, dilation in zip(call.weights, call.dilations):
            yield _same_convolution(call.input, weight, (dilation, dilation))
        if op == "aspp":  # the pooled branch is computed once per image
            pixel, pooled = call.input[:, :, :1, :1], call.pool_weight.size(0)
            yield _same_convolution(pixel, call.pool_weight, (1, 1))
            yield _same_convolution(pixel, call.project_weight[:, -pooled:], (1, 1))
            yield _same_convolution(call.input, call.project_weight[:, :-pooled], (1, 1))


def _same_convolution(input: Tensor, weight: Tensor, dilation: tuple[int, ...]) -> _Convolution:
    N, _, H, W = input.shape
    kernel = weight.shape[2:] if weight.dim() == 4 else (1, 1)
    padding = tuple(d * (k // 2) for d, k in zip(dilation, kernel))
    shape = (*weight.shape[:2], *kernel)
    return _Convolution(
        (N, weight.size(0), H, W), tuple(input.shape), shape, (1, 1), padding, dilation
    )
