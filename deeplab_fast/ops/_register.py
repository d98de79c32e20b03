"""Registration shared by all ops: the torch.library namespace and how an op reaches a backend.

An op is opaque to autograd, torch.compile and export. The backend travels as its last argument,
because a global read inside the implementation would be invisible to a compiled graph.

torch.func transforms and forward mode are supported by the public functions only (_transforms.py):
a direct call of ``torch.ops.deeplab_fast.*`` inside one raises, or returns tangents of zero.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..backends import registry
from . import _transforms

lib = torch.library.Library("deeplab_fast", "DEF")
_rules: dict[str, _transforms.Rules] = {}


def define(
    name: str,
    signature: str,
    fake: Callable[..., Any],
    shape_class: Callable[..., str] | None = None,
) -> Callable[..., Any]:
    """Define ``deeplab_fast::name`` with ``signature`` ("(args) -> returns"); return what calls it.

    ``fake(*args)`` allocates the outputs: shapes, dtypes and strides of what every backend returns.
    ``shape_class(*args)`` names the class of shapes for which a kernel has to be measured faster
    than a library's; None where no library has the op.
    """
    if shape_class:
        registry.shape_classes[name] = shape_class
    arguments, returns = signature.removeprefix("(").split(") -> ")
    lib.define(f"{name}({arguments}, *, str backend='') -> {returns}")

    def run(*args: Any, backend: str = "") -> Any:
        device_type = args[0].device.type
        if torch.is_autocast_enabled(device_type):
            # The public function has cast already; the op itself must return what fake promised.
            with torch.autocast(device_type, enabled=False):
                return registry.run(name, backend, *args)
        return registry.run(name, backend, *args)

    def run_fake(*args: Any, backend: str = "") -> Any:
        return fake(*args)

    lib.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"deeplab_fast::{name}", run_fake, lib=lib)
    op = getattr(torch.ops.deeplab_fast, name)

    def call(*args: Any, backend: str) -> Any:
        if _transforms.active():
            return _transforms.call(op, _rules[name], args, backend)
        return op(*args, backend=backend)

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
    backend, on which ``backward(ctx, *grads)`` is to run too. ``jvp`` and ``image_arguments`` are
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


def not_differentiable(
    name: str, instead: str, image_arguments: Callable[..., Sequence[int]] = _none
) -> None:
    """Make differentiating ``deeplab_fast::name`` an error that says what to use instead."""

    def refuse(*args: Any) -> None:
        raise NotImplementedError(f"deeplab_fast::{name} cannot be differentiated: {instead}")

    differentiable(name, refuse, lambda ctx, inputs, output: None, refuse, image_arguments)


def autocast(*tensors: Tensor | None) -> tuple[Any, ...]:
    """The floating tensors cast to the autocast dtype of the first one's device, if autocast is on.

    ``torch.library.register_autocast`` pins one dtype per device, which would turn fp16 into bf16.
    """
    first = tensors[0]
    assert first is not None
    device_type = first.device.type
    # The meta device has no autocast, and asking whether it is enabled raises. torch 2.6 to 2.8 do
    # not compile torch.amp.is_autocast_available.
    if device_type == "meta" or not torch.is_autocast_enabled(device_type):
        return tensors
    dtype = torch.get_autocast_dtype(device_type)
    castable = (torch.float32, torch.float16, torch.bfloat16)
    return tuple(t.to(dtype) if t is not None and t.dtype in castable else t for t in tensors)


def empty_like_format(input: Tensor, shape: tuple[Any, ...]) -> Tensor:
    """Uninitialised ``shape`` in ``input``'s dtype, device and, if 4-D, memory format.

    The fake and every implementation allocate through this, so that their strides agree.
    """
    memory_format = _format(input)
    return torch.empty(shape, dtype=input.dtype, device=input.device, memory_format=memory_format)


def _format(tensor: Tensor) -> torch.memory_format:
    channels_last = tensor.dim() == 4 and tensor.stride(1) == 1 and tensor.size(1) > 1
    return torch.channels_last if channels_last else torch.contiguous_format


def in_format_of(result: Tensor, input: Tensor) -> Tensor:
    """``result`` with the strides that :func:`empty_like_format` promises for ``input``."""
    if result.stride() == _strides(result.shape, _format(input)):
        return result
    return empty_like_format(input, tuple(result.shape)).copy_(result)


def _strides(shape: Sequence[int], memory_format: torch.memory_format) -> tuple[int, ...]:
    """The strides of ``torch.empty(shape, memory_format=memory_format)``, without the tensor."""
    if memory_format == torch.channels_last:
        _, channels, height, width = shape
        return (height * width * channels, 1, width * channels, channels)
    strides = [1]
    for size in reversed(shape[1:]):
        strides.append(strides[-1] * max(size, 1))
    return tuple(reversed(strides)) if shape else ()
