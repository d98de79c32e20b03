"""Bilinear upsampling that waits until its result is needed."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only

_aten = torch.ops.aten


class Interpolation(NamedTuple):
    """Arguments of a bilinear F.interpolate: the size of its output, and how it is sampled."""

    size: tuple[int, int]
    scale_factors: tuple[float, float] | None  # if given, they and not the sizes set the scale
    align_corners: bool


class DeferredUpsampling(Tensor):
    """The result of a bilinear F.interpolate that has not run yet.

    It is a tensor with the shape and the gradient of the result. The first operation on it runs the
    interpolation. Code that knows this class takes :attr:`logits` and :attr:`interpolation`.

    Attributes:
        logits: input of the interpolation.
        interpolation: the other arguments of the interpolation.
        is_pending: False if the values may have been changed in place, so that they are no longer
            those of the interpolation.
    """

    logits: Tensor
    interpolation: Interpolation
    is_pending: bool
    _result: Tensor | None

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        changes = any(argument.alias_info for argument in func._schema.arguments)

        def result(tensor: DeferredUpsampling) -> Tensor:
            tensor.is_pending = tensor.is_pending and not changes
            return tensor.run()

        return func(*tree_map_only(cls, result, args), **tree_map_only(cls, result, kwargs or {}))

    def run(self) -> Tensor:
        """The values, without a gradient. Computed once."""
        if self._result is None:
            self._result = _interpolate(self.logits.detach(), self.interpolation)
        return self._result


class _Defer(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, interpolation: Interpolation) -> Tensor:
        ctx.shape, ctx.interpolation = tuple(logits.shape), interpolation
        tensor = Tensor._make_wrapper_subclass(
            DeferredUpsampling,
            (*logits.shape[:2], *interpolation.size),
            dtype=logits.dtype,
            device=logits.device,
        )
        tensor.interpolation, tensor.is_pending, tensor._result = interpolation, True, None
        return tensor

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None]:
        size, scale_factors, align_corners = ctx.interpolation
        scales = scale_factors or (None, None)
        grad = _aten.upsample_bilinear2d_backward(
            grad_output, list(size), list(ctx.shape), align_corners, *scales
        )
        return grad, None


class deferred_upsampling(TorchFunctionMode):
    """Context in which bilinear F.interpolate runs when its result is needed, if at all.

    The losses of this package take the logits before the upsampling, so that logits at full
    resolution are never computed; everything else sees the tensor it would see without the context.

    >>> with deferred_upsampling():
    ...     loss = UpsampleCrossEntropyLoss(ignore_index=255)(model(images), target)
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.interpolate and not torch.compiler.is_compiling():
            deferred = _deferred(*args, **kwargs)
            if deferred is not None:
                return deferred
        return func(*args, **kwargs)


def _deferred(
    input: Tensor,
    size: Any = None,
    scale_factor: Any = None,
    mode: str = "nearest",
    align_corners: bool | None = None,
    recompute_scale_factor: bool | None = None,
    antialias: bool = False,
) -> Tensor | None:
    if mode != "bilinear" or antialias or input.dim() != 4 or not input.is_floating_point():
        return None
    scale_factors = None
    if size is None:
        pair = scale_factor if isinstance(scale_factor, (tuple, list)) else (scale_factor,) * 2
        scale_factors = float(pair[0]), float(pair[1])
        size = [math.floor(n * s) for n, s in zip(input.shape[2:], scale_factors)]
        if recompute_scale_factor:
            scale_factors = None
    height, width = size if isinstance(size, (tuple, list, torch.Size)) else (size, size)
    interpolation = Interpolation((int(height), int(width)), scale_factors, bool(align_corners))
    tensor = _Defer.apply(input, interpolation)
    tensor.logits = input
    return tensor


def _interpolate(logits: Tensor, interpolation: Interpolation) -> Tensor:
    size, scale_factors, align_corners = interpolation
    return _aten.upsample_bilinear2d(
        logits, list(size), align_corners, *(scale_factors or (None, None))
    )
