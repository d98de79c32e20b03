"""torch.func transforms and forward-mode differentiation of all ops, through one autograd.Function.

torch.library supports backward, but neither forward mode nor torch.func.grad: inside a transform
its autograd raises an error about setup_context, and in forward mode the tangent gets lost. While a
transform or forward mode is active, a call of an op therefore goes through :class:`_Transformed`.
It reuses the ``setup`` and ``backward`` that the op was registered with, and adds two rules,
``jvp`` and ``image_arguments``. Its forward calls the op itself.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

_TENSOR = object()  # stands for a tensor in _Call.template


class Rules(NamedTuple):
    """Derivative and batching rules of an op."""

    setup: Callable[[Any, tuple[Any, ...], Any], None]
    backward: Callable[..., Any]
    # jvp(arguments, tangents, output, backend) returns the tangents of the outputs. ``tangents``
    # holds None for a tensor without a tangent.
    jvp: Callable[..., Any]
    # image_arguments(*arguments) returns the positions of the tensors whose first dimension is the
    # image, or () if an output has no such dimension. If vmap maps these tensors only, it makes one
    # call with more images, otherwise one call per sample.
    image_arguments: Callable[..., Sequence[int]]


def active() -> bool:
    """True inside a torch.func transform or a forward_ad.dual_level().

    It is cheap, because every call of an op checks it, and torch.compile treats it as a constant.
    """
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def call(op: Callable[..., Any], rules: Rules, arguments: Sequence[Any], backend: str) -> Any:
    """``op(*arguments, backend=backend)`` under the active transforms."""
    if torch.compiler.is_compiling():
        # Without fullgraph=True, torch.compile falls back to the function as it is.
        raise NotImplementedError(
            f"{op}: torch.compile does not trace torch.func transforms and forward mode of this "
            "op: leave the transform out of the compiled function"
        )
    if _is_functionalized_only():
        return op(*arguments, backend=backend)
    template, tensors = _without_tensors(arguments)
    recorded = _Call(op, rules, backend, template)
    return recorded.outputs(_Transformed.apply(recorded, *tensors))


def _is_functionalized_only() -> bool:
    """True if functionalize() is the only active transform: ops support it, unlike Functions."""
    active = torch._C._functorch.get_interpreter_stack() or ()
    functionalize = torch._C._functorch.TransformType.Functionalize
    return (
        forward_ad._current_level < 0
        and bool(active)
        and all(transform.key() == functionalize for transform in active)
    )


@dataclasses.dataclass
class _Call:
    """A call of an op without its tensors, which autograd has to see as separate arguments."""

    op: Callable[..., Any]
    rules: Rules
    backend: str
    template: list[Any]  # the arguments, _TENSOR in the place of each tensor
    output_template: list[Any] | None = None  # known once the op has run

    def arguments(self, values: Iterable[Any]) -> tuple[Any, ...]:
        """The arguments with ``values`` in the places of the tensors."""
        return tuple(_filled(self.template, values))

    def outputs(self, tensors: Any) -> Any:
        """The outputs in the structure in which the op returns them."""
        assert self.output_template is not None
        outputs = _filled(self.output_template, _as_tuple(tensors))
        return outputs[0] if len(outputs) == 1 else tuple(outputs)


class _Transformed(torch.autograd.Function):
    @staticmethod
    def forward(call: _Call, *tensors: Tensor) -> Any:
        outputs = call.op(*call.arguments(tensors), backend=call.backend)
        call.output_template, flat = _without_tensors(_as_tuple(outputs))
        return flat[0] if len(flat) == 1 else tuple(flat)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        call, *tensors = inputs
        ctx.call, ctx.backend = call, call.backend
        call.rules.setup(ctx, call.arguments(tensors), call.outputs(output))
        ctx.save_for_forward(*tensors, *_as_tuple(output))
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        call, needed = ctx.call, ctx.needs_input_grad
        if all(grad is None for grad in grads):
            return None, *([None] * (len(needed) - 1))
        ctx.needs_input_grad = call.arguments(needed[1:])
        try:
            result = call.rules.backward(ctx, *grads)
        finally:
            ctx.needs_input_grad = needed
        return None, *_at_tensors(call.template, result)

    @staticmethod
    def jvp(ctx: Any, _: None, *tangents: Tensor | None) -> Any:
        call, saved = ctx.call, ctx.saved_tensors
        arguments = call.arguments(saved[: len(tangents)])
        output = call.outputs(saved[len(tangents) :])
        return call.rules.jvp(arguments, call.arguments(tangents), output, call.backend)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], call: _Call, *tensors: Tensor) -> Any:
        dims = call.arguments(in_dims[1:])
        arguments = call.arguments(tensors)
        images = call.rules.image_arguments(*arguments)
        mapped = [i for i, dim in enumerate(dims) if _is_mapped(call.template[i], dim)]
        if images and set(mapped) <= set(images):
            flat = _over_more_images(info.batch_size, call, arguments, dims, images)
        else:
            flat = _one_by_one(info.batch_size, call, tensors, in_dims[1:])
        return (flat[0], 0) if len(flat) == 1 else (tuple(flat), (0,) * len(flat))


def _over_more_images(
    batch_size: int,
    call: _Call,
    arguments: Sequence[Any],
    dims: Sequence[Any],
    images: Sequence[int],
) -> list[Tensor]:
    """One call over ``batch_size`` times as many images."""
    merged = list(arguments)
    for i in images:
        tensor, dim = arguments[i], dims[i]
        if tensor is None:
            continue
        if dim is None:
            tensor = tensor.expand(batch_size, *tensor.shape)
        else:
            tensor = tensor.movedim(dim, 0)
        num_images = tensor.size(1)
        merged[i] = tensor.flatten(0, 1)
    _, tensors = _without_tensors(merged)
    return [
        # A gradient that output_mask leaves out is one empty tensor.
        t.unflatten(0, (batch_size, num_images))
        if t.size(0) == batch_size * num_images
        else t.expand(batch_size, *t.shape)
        for t in _as_tuple(_Transformed.apply(call, *tensors))
    ]


def _one_by_one(
    batch_size: int, call: _Call, tensors: Sequence[Tensor], dims: Sequence[int | None]
) -> list[Tensor]:
    """One call for each sample."""
    if batch_size == 0:
        raise NotImplementedError(f"{call.op}: vmap over a dimension of size 0")

    def sample(i: int) -> Iterable[Tensor]:
        return (t if d is None else t.select(d, i) for t, d in zip(tensors, dims))

    samples = [_as_tuple(_Transformed.apply(call, *sample(i))) for i in range(batch_size)]
    return [torch.stack(outputs) for outputs in zip(*samples)]


def _is_mapped(template: Any, dim: Any) -> bool:
    """True if vmap maps this argument, or a tensor of this list."""
    if isinstance(template, list):
        return any(map(_is_mapped, template, dim))
    return template is _TENSOR and dim is not None


def _without_tensors(values: Iterable[Any]) -> tuple[list[Any], list[Tensor]]:
    """The values with each tensor, also those in lists, replaced by _TENSOR; and the tensors."""
    template: list[Any] = []
    tensors: list[Tensor] = []
    for value in values:
        if isinstance(value, Tensor):
            template.append(_TENSOR)
            tensors.append(value)
        elif isinstance(value, (list, tuple)):
            inner, more = _without_tensors(value)
            template.append(inner)
            tensors += more
        else:
            template.append(value)
    return template, tensors


def _filled(template: list[Any], values: Iterable[Any]) -> list[Any]:
    """The inverse of :func:`_without_tensors`."""
    rest = iter(values)

    def fill(template: list[Any]) -> list[Any]:
        return [
            fill(t) if isinstance(t, list) else next(rest) if t is _TENSOR else t for t in template
        ]

    return fill(template)


def _at_tensors(template: list[Any], values: Sequence[Any]) -> list[Any]:
    """The elements of ``values``, structured like ``template``, at the positions of tensors."""
    found: list[Any] = []
    for t, value in zip(template, values):
        if isinstance(t, list):
            found += _at_tensors(t, [None] * len(t) if value is None else value)
        elif t is _TENSOR:
            found.append(value)
    return found


def _as_tuple(outputs: Any) -> tuple[Any, ...]:
    return outputs if isinstance(outputs, tuple) else (outputs,)
