"""Bilinear upsampling that waits until its result is needed."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._prims_common import suggest_memory_format
from torch.overrides import TorchFunctionMode
from torch.utils._mode_utils import no_dispatch
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from ..ops import _transforms

_aten = torch.ops.aten
_DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


class Interpolation(NamedTuple):
    """Arguments of a bilinear F.interpolate: the size of its output, and how it is sampled."""

    size: tuple[int, int]
    scale_factors: tuple[float, float] | None  # None if the ratio of the sizes sets the scale
    align_corners: bool

    @property
    def target(self) -> dict[str, Any]:
        """The argument ``size`` or ``scale_factor`` of F.interpolate."""
        if self.scale_factors is None:
            return {"size": self.size}
        return {"scale_factor": self.scale_factors}


class DeferredUpsampling(Tensor):
    """The result of a bilinear F.interpolate that has not run yet.

    It is a tensor with the shape, the strides and the gradient of the result. The first operation
    on it runs the interpolation. Code that knows this class takes :attr:`logits` and
    :attr:`interpolation` while :attr:`is_pending` is True.

    Attributes:
        logits: copy of the input of the interpolation that nobody else can change, [N, C, h, w].
        interpolation: the other arguments of the interpolation.
    """

    logits: Tensor
    interpolation: Interpolation
    _node: Any  # the grad_fn that the interpolation has
    _is_exposed: bool
    _result: Tensor  # set by run

    @property
    def is_pending(self) -> bool:
        """True if the values and the gradient are still those of the interpolation.

        It is False as soon as there is a view of this tensor, which could change the values; after
        an in-place operation or requires_grad_(); and if there is a hook or retain_grad(), which
        would not see the gradient of a loss that takes :attr:`logits`.
        """
        with torch._C.DisableTorchFunctionSubclass():
            has_own_gradient = self.grad_fn is self._node
            is_recorded = self.requires_grad == (self._node is not None)
        return has_own_gradient and is_recorded and not self._is_exposed

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _READS_MEMORY:
            args = tuple(_plain(arg) if isinstance(arg, cls) else arg for arg in args)
        elif func in _HOOKS:
            args[0]._is_exposed = True
        elif func == _SET_DATA and isinstance(args[0], cls):
            args[0]._result, args[0]._is_exposed = args[1].detach(), True
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **kwargs or {})

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        exposes, changes_shape = _effects(func)
        output = func(*_results(args, exposes), **_results(kwargs, exposes))
        if changes_shape:
            _change_shape(func, args, kwargs)
        return output

    def run(self) -> Tensor:
        """The values, without a gradient. Computed once."""
        if "_result" not in vars(self):
            with (
                torch.inference_mode(False),
                torch.no_grad(),
                torch.autocast("cuda" if self.is_cuda else "cpu", enabled=False),
            ):
                # Threads that get here at the same time agree on one result.
                vars(self).setdefault("_result", _interpolate(self.logits, self.interpolation))
        return self._result


@functools.cache
def _effects(func: Any) -> tuple[bool, bool]:
    """Whether an operation changes tensors or makes views of them, and whether it reshapes one."""
    aliases = any(argument.alias_info for argument in func._schema.arguments)
    return aliases, torch.Tag.inplace_view in func.tags


def _results(value: Any, exposes: bool) -> Any:
    """The arguments of an operation, with deferred tensors replaced by their results."""
    if isinstance(value, DeferredUpsampling):
        value._is_exposed |= exposes
        return value.run()
    if isinstance(value, (tuple, list)):
        return type(value)(_results(item, exposes) for item in value)
    if isinstance(value, dict):
        return {name: _results(item, exposes) for name, item in value.items()}
    return value


def _plain(tensor: DeferredUpsampling) -> Tensor:
    """A plain tensor over the same memory and with the same gradient."""
    with torch._C.DisableTorchFunctionSubclass(), torch.enable_grad():
        if not tensor.is_leaf:
            return tensor.view_as(tensor)
        return tensor.detach().requires_grad_(tensor.requires_grad)


# Methods of tensors that read memory directly, without going through __torch_dispatch__.
_READS_MEMORY = {
    *(Tensor.__array__, Tensor.__deepcopy__, Tensor.__dlpack__, Tensor.__format__),
    *(Tensor.__reduce_ex__, Tensor.__repr__, Tensor.apply_, Tensor.data_ptr, Tensor.is_shared),
    *(Tensor.map_, Tensor.numpy, Tensor.share_memory_, Tensor.storage, Tensor.tolist),
    *(Tensor._typed_storage, Tensor.untyped_storage),
    Tensor.__cuda_array_interface__.__get__,
}
# Methods that read or change the gradient that passes backward through the tensor.
_HOOKS = {
    Tensor.grad_fn.__get__,  # type: ignore[union-attr]
    *(Tensor.register_hook, Tensor.retain_grad),
}
_SET_DATA = Tensor.data.__set__  # type: ignore[attr-defined]


def _change_shape(func: Any, args: Any, kwargs: Any) -> None:
    """Give a deferred tensor the new shape after an operation such as ``transpose_``."""
    was_included = torch._C._meta_in_tls_dispatch_include()
    with no_dispatch():
        torch._C._set_meta_in_tls_dispatch_include(True)
        try:
            func(*args, **kwargs)
        finally:
            torch._C._set_meta_in_tls_dispatch_include(was_included)


class _Defer(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, interpolation: Interpolation, memory_format: torch.memory_format
    ) -> Tensor:
        ctx.shape, ctx.interpolation = tuple(logits.shape), interpolation
        shape = (*logits.shape[:2], *interpolation.size)
        tensor = Tensor._make_wrapper_subclass(
            DeferredUpsampling,
            shape,
            torch.empty(shape, device="meta", memory_format=memory_format).stride(),
            dtype=logits.dtype,
            device=logits.device,
        )
        tensor.logits, tensor.interpolation = logits, interpolation
        tensor._node, tensor._is_exposed = None, False
        return tensor

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None, None]:
        shape, interpolation = ctx.shape, ctx.interpolation
        if grad_output.device.type != "cpu" and torch.are_deterministic_algorithms_enabled():
            # F.interpolate runs as other, deterministic operations here. It is linear, so its
            # gradient does not depend on the logits.
            with torch.enable_grad():
                logits = grad_output.new_zeros(shape).requires_grad_()
                output = _interpolate(logits, interpolation)
            (grad,) = torch.autograd.grad(
                output, logits, grad_output, create_graph=torch.is_grad_enabled()
            )
            return grad, None, None
        size, scale_factors, align_corners = interpolation
        scales = scale_factors or (None, None)
        grad = _aten.upsample_bilinear2d_backward(
            grad_output, list(size), list(shape), align_corners, *scales
        )
        return grad, None, None


def _interpolate(logits: Tensor, interpolation: Interpolation) -> Tensor:
    with torch._C.DisableTorchFunction():  # otherwise deferred_upsampling defers this call, too
        return F.interpolate(
            logits,
            **interpolation.target,
            mode="bilinear",
            align_corners=interpolation.align_corners,
        )


class deferred_upsampling(TorchFunctionMode):
    """Context in which bilinear F.interpolate runs only when its result is needed.

    The losses of this package take the logits before the upsampling, so logits at full resolution
    are never computed. All other code sees the tensor that it would see without the context. The
    deferred tensor holds a copy of the low-resolution logits.

    Compute the loss before other results: after ``detach()`` or another view of the output, the
    loss uses logits at full resolution. The gradient of the loss goes to the logits before the
    upsampling, so ``torch.autograd.grad(loss, output)`` with the deferred ``output`` raises an
    error.

    Nothing is deferred by torch.compile, torch.export, torch.jit.trace, torch.func transforms,
    forward-mode differentiation and dispatch modes, on other devices than CPUs and CUDA GPUs, and
    for subclasses of Tensor. A compiled function runs uncompiled on a deferred tensor, or raises an
    error with ``fullgraph=True``. The context belongs to the thread that enters it.

    >>> with deferred_upsampling():
    ...     loss = UpsampleCrossEntropyLoss(ignore_index=255)(model(images), target)
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.interpolate and _can_be_deferred(*args, **kwargs):
            deferred = _deferred(*args, **kwargs)
            if deferred is not None:
                return deferred
        return func(*args, **kwargs)


def _can_be_deferred(
    input: Any, *args: Any, mode: str = "", antialias: bool = False, **kwargs: Any
) -> bool:
    return (
        not torch.compiler.is_compiling()
        and mode == "bilinear"
        and not antialias
        and type(input) in (Tensor, torch.nn.Parameter, DeferredUpsampling)
        and input.dim() == 4
        and input.dtype in _DTYPES
        and input.device.type in ("cpu", "cuda", "meta")
        and input.layout == torch.strided
        and torch._C._get_tracing_state() is None
        and not any(map(_replaces_tensors, _get_current_dispatch_mode_stack()))
        and not _transforms.active()
    )


def _replaces_tensors(mode: Any) -> bool:
    """True for a mode of PyTorch's own tracing, not for one that only watches."""
    return getattr(mode, "_mode_key", None) is not None


def _deferred(input: Tensor, **kwargs: Any) -> Tensor | None:
    """The deferred result, or None if PyTorch rejects the arguments."""
    try:
        with torch._C.DisableTorchFunction():
            # An empty batch gives the size of the result, its dtype under autocast, and errors.
            output = F.interpolate(input.new_empty(0, *input.shape[1:]), **kwargs)
    except Exception:
        return None
    size, align_corners = (output.size(2), output.size(3)), bool(kwargs["align_corners"])
    scale_factors = None
    if kwargs["size"] is None and not kwargs["recompute_scale_factor"] and not align_corners:
        factor = kwargs["scale_factor"]
        height, width = factor if isinstance(factor, (tuple, list)) else (factor, factor)
        scale_factors = float(height), float(width)
        # The kernel multiplies coordinates by the inverse of a factor.
        if all(1 / f == n / out for f, n, out in zip(scale_factors, input.shape[2:], size)):
            scale_factors = None
    interpolation = Interpolation(size, scale_factors, align_corners)
    memory_format = suggest_memory_format(input)  # as PyTorch does for the result
    logits = input.to(output.dtype, copy=True, memory_format=memory_format)
    tensor: DeferredUpsampling = _Defer.apply(logits, interpolation, memory_format)
    with torch._C.DisableTorchFunctionSubclass():
        tensor._node = tensor.grad_fn
    return tensor
