"""Explanation of the choice of kernels: which kernel each layer uses, and on what evidence."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from .._io.tables import aligned
from . import dispatch_table, race, registry
from .arguments import shapes
from .calls import running_layers
from .dispatch_table import Row


class Line(NamedTuple):
    """A call that a layer makes."""

    layer: str  # qualified name of the module, "" for the model itself
    op: str
    shapes: str  # of the images and weights, and the dtype
    backend: str
    evidence: str


class Explanation(list[Line]):
    """The calls of a model in order. ``str()`` of it is a table."""

    def __str__(self) -> str:
        if not self:
            return "the model calls no op of deeplab_fast"
        rows = [Line._fields, *(line._replace(layer=line.layer or "(model)") for line in self)]
        return aligned(rows)


def explain(model: nn.Module, images: Tensor) -> Explanation:
    """Explain which kernel each layer of a model uses for ``images``, and on what evidence.

    The model runs once, in evaluation mode and without gradients: ``model.predict(images)`` if it
    has that method, otherwise ``model(images)``. Every op runs on PyTorch's kernels meanwhile, so
    that nothing is measured. Layers that call no op of deeplab_fast are not listed.

    Args:
        model: any module, such as a :class:`deeplab_fast.DeepLabV3`.
        images: its input, on the model's device.

    Raises:
        TypeError: ``model`` is not a module, or ``images`` is not a tensor.

    >>> print(explain(model.prepare_for_inference(torch.bfloat16), images))
    layer           op            shapes                           backend    evidence
    backbone.conv1  fused_conv2d  1x3x513x513, 64x3x7x7, bfloat16  reference  not supported ..
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected an nn.Module, got {type(model).__name__}")
    if not isinstance(images, Tensor):
        raise TypeError(f"images: expected a tensor, got {type(images).__name__}")
    model = getattr(model, "_orig_mod", model)  # the one that torch.compile was given
    run = getattr(model, "predict", model)
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad(), running_layers(model) as layers:
            explainer = _Explainer(layers)
            with explainer:
                run(images)
    finally:
        for module, training in modes.items():
            module.training = training
    return explainer.lines


class _Explainer(TorchDispatchMode):
    """Explains the calls of ops, and runs them on the reference."""

    def __init__(self, layers: list[str]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.lines = Explanation()
        self._layers = layers

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        namespace, _, op = function._schema.name.partition("::")
        kwargs = kwargs or {}
        if namespace == "deeplab_fast":
            arguments = registry.arguments(op, *args)
            backend, evidence = _choice(op, arguments, kwargs.get("backend", ""))
            self.lines.append(Line(self._layers[-1], op, shapes(arguments), backend, evidence))
            kwargs = kwargs | {"backend": "reference"}
        return function(*args, **kwargs)


def _choice(op: str, arguments: Any, forced: str) -> tuple[str, str]:
    """The backend of a call, and the evidence for it."""
    if forced:
        reason = registry.unsupported_reason(op, forced, arguments)
        return forced, "forced" + (f", but it cannot run: {reason}" if reason else "")
    order, basis = registry.preference(op, arguments)
    reasons = _unsupported_reasons(op, order, arguments)
    backend = next(name for name in order if name not in reasons)
    evidence = _evidence(op, arguments, basis, backend)
    return backend, "; ".join([evidence, *_listed(reasons)])


def _unsupported_reasons(op: str, names: tuple[str, ...], arguments: Any) -> dict[str, str]:
    """The backends among these that cannot run the call, and why."""
    reasons = ((name, registry.unsupported_reason(op, name, arguments)) for name in names)
    return {name: reason for name, reason in reasons if reason}


def _listed(reasons: dict[str, str]) -> list[str]:
    texts = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
    return [f"not supported by {texts}"] if texts else []


def _evidence(op: str, arguments: Any, basis: str, backend: str) -> str:
    """The basis of the order of preference, in words."""
    device = arguments[0].device
    order = registry.order(device.type)
    if basis == "device":
        kernels = [name for name in order if name in registry.backends_of(op)]
        return f"fixed order: {', '.join(kernels)}" if kernels[1:] else "the only kernel of this op"
    if basis == "dispatch table":
        rows = dispatch_table.rows_of(device)[op][registry.shape_buckets[op](arguments)]
        if not rows:
            return "dispatch table, which has changed since it was read"
        return f"dispatch table: {_table_times(dispatch_table.worst_rows(rows), backend)}"
    if basis == "race":
        times = race.remembered(op, arguments) or {}
        ranking = sorted(times.items(), key=lambda item: item[1])
        results = (f"{_title(name)} {ms:.3g} ms" for name, ms in ranking)
        return f"race: {', '.join(results) or 'none finished'}"
    if basis in ("no race yet", "none"):
        reasons = _unsupported_reasons(op, order, arguments)
        if set(order) - set(reasons) == {"reference"}:
            return _listed(reasons)[0]
    return {
        "none": "not measured, so cuDNN",
        "no race yet": "not measured yet: the first call will be a race",
    }.get(basis, basis)


def _title(kernel: str) -> str:
    return "cuDNN" if kernel == "reference" else kernel


def _table_times(rows: list[Row], backend: str) -> str:
    """The times of the kernel that was chosen, or of the best one that was not."""
    row = next((row for row in rows if row.kernel == backend), rows[0])
    if backend == "reference":
        time = "failed" if row.failed else f"{row.median_ms:.3g} ms"
        return f"cuDNN {row.cudnn_ms:.3g} ms, {row.kernel} {time}"
    return f"{row.median_ms:.3g} ms, cuDNN {row.cudnn_ms:.3g} ms"
