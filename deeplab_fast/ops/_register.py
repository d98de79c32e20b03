"""Registration of ops with torch.library, and how a call reaches a backend.

An op is opaque to autograd, torch.compile and export. The backend is passed as its last argument,
because a compiled graph would not see that the implementation reads a global.

Only the public functions support torch.func transforms and forward mode (_transforms.py). A direct
call of ``torch.ops.deeplab_fast.*`` inside a transform raises an error or returns zero tangents.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..backends import registry
from . import _decomposition, _transforms

lib = torch.library.Library("deeplab_fast", "DEF")

# torch.compile gives an op inputs of the same strides as eager mode. Without a tag torch 2.6 would
# convert channels_last inputs to NCHW; it has only the weaker tag, for the order of the strides.
_STRIDES = getattr(torch.Tag, "needs_exact_strides", torch.Tag.needs_fixed_stride_order)

_rules: dict[str, _transforms.Rules] = {}
_with_autograd: set[str] = set()


def define(
    name: str,
    arguments_type: Callable[..., Any],
    schema: str,
    fake: Callable[[Any], Any],
    shape_bucket: Callable[[Any], str] | None = None,
    check: Callable[[Any], None] | None = None,
) -> Callable[..., Any]:
    """Define ``deeplab_fast::name`` and return the function that calls it.

    Args:
        arguments_type: a class of backends/arguments.py, with the fields of the schema.
        schema: "(arguments) -> returns".
        fake: function of the arguments that allocates outputs with the shapes, dtypes and strides
            that every backend returns.
        shape_bucket: function of the arguments that returns their shape bucket, see
            :func:`registry.register_op`. None for ops that no vendor library has.
        check: function of the arguments that raises an exception if their shapes, dtypes or devices
            do not fit. It is called once for all calls of the same shapes.
    """
    arguments, returns = schema.removeprefix("(").split(") -> ")
    lib.define(f"{name}({arguments}, *, str backend='') -> {returns}", tags=_STRIDES)
    registry.register_op(name, arguments_type, shape_bucket, check)

    def run_fake(*values: Any, backend: str = "") -> Any:
        arguments = arguments_type(*values)
        if check:
            check(arguments)
        return fake(arguments)

    lib.impl(name, partial(registry.run, name), "CompositeExplicitAutograd")
    op = getattr(torch.ops.deeplab_fast, name)

    def decompose(*values: Any, backend: str = "") -> Any:
        return registry.reference(name)(arguments_type(*values))

    run_fake = _decomposition.register(op.default, decompose, run_fake)
    torch.library.register_fake(f"deeplab_fast::{name}", run_fake, lib=lib)

    def call(*values: Any, backend: str) -> Any:
        if _transforms.active():
            return _transforms.call(op, _rules[name], values, backend)
        if name not in _with_autograd or torch.is_grad_enabled() or torch.compiler.is_compiling():
            return op(*values, backend=backend)
        # torch.library's autograd kernel is written in Python and takes as long as the rest of the
        # dispatch. Without gradients it would only do the same as these lines.
        with torch._C._AutoDispatchBelowAutograd():
            return op(*values, backend=backend)

    return call


def _none(*args: Any) -> tuple[()]:
    return ()


def differentiable(
    name: str,
    backward: Callable[..., Any],
    setup: Callable[[Any, tuple[Any, ...], Any], None],
    jvp: Callable[..., Any],
    image_arguments: Callable[..., Sequence[int]] = _none,
) -> None:
    """Register the gradient of ``deeplab_fast::name``.

    ``setup(ctx, inputs, output)`` saves what backward needs; ``ctx.backend`` is the forward's
    backend, on which ``backward(ctx, *grads)`` has to run, too. ``jvp`` and ``image_arguments`` are
    the rules of forward mode and of vmap, see :class:`_transforms.Rules`.
    """

    def setup_context(
        ctx: Any, inputs: tuple[Any, ...], keyword_only_inputs: dict[str, Any], output: Any
    ) -> None:
        ctx.backend = keyword_only_inputs["backend"]
        setup(ctx, inputs, output)

    torch.library.register_autograd(
        f"deeplab_fast::{name}", backward, setup_context=setup_context, lib=lib
    )
    _rules[name] = _transforms.Rules(setup, backward, jvp, image_arguments)
    _with_autograd.add(name)


def not_differentiable(
    name: str, instead: str, image_arguments: Callable[..., Sequence[int]] = _none
) -> None:
    """Make differentiating ``deeplab_fast::name`` an error whose message names an alternative."""

    def not_implemented(*args: Any) -> None:
        raise NotImplementedError(f"deeplab_fast::{name} cannot be differentiated: {instead}")

    def setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        pass

    differentiable(name, not_implemented, setup, not_implemented, image_arguments)


def without_gradient(name: str, image_arguments: Callable[..., Sequence[int]]) -> None:
    """Let torch.func and forward mode accept ``deeplab_fast::name``, whose output holds integers.

    PyTorch itself never differentiates integers, so the op needs no gradient.
    """

    def setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.mark_non_differentiable(output)

    def no_tangent(*args: Any) -> None:
        return None

    _rules[name] = _transforms.Rules(setup, no_tangent, no_tangent, image_arguments)


def autocast_dtype(tensor: Tensor) -> torch.dtype | None:
    """The autocast dtype of the tensor's device, or None if autocast is off there."""
    device_type = tensor.device.type
    # torch.is_autocast_enabled("meta") raises an error. torch.compile of torch 2.6 to 2.8 does not
    # support torch.amp.is_autocast_available.
    if device_type == "meta" or not torch.is_autocast_enabled(device_type):
        return None
    return torch.get_autocast_dtype(device_type)


def autocast(first: Tensor, *others: Tensor | None) -> tuple[Any, ...]:
    """Cast floating tensors to the autocast dtype of the first tensor's device, if it is enabled.

    ``torch.library.register_autocast`` would fix one dtype per device and turn fp16 into bf16.
    """
    tensors = first, *others
    dtype = autocast_dtype(first)
    if dtype is None:
        return tensors
    castable = (torch.float32, torch.float16, torch.bfloat16)
    return tuple(t.to(dtype) if t is not None and t.dtype in castable else t for t in tensors)
