"""Calls of the ops that a vendor library has too: recorded in a run of a model, and repeated."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from . import registry


class Call(NamedTuple):
    """A call of an op."""

    op: str
    arguments: tuple[Any, ...]  # in the order of the schema; tensors on the meta device, no data
    layer: str = ""  # qualified name of the module that made it

    @property
    def shape(self) -> str:
        """The arguments as text, with the shapes of tensors."""
        return _text(self.arguments)

    @property
    def shape_bucket(self) -> str:
        return registry.shape_buckets[self.op](registry.arguments(self.op, *self.arguments))

    def scratch_arguments(self, device: torch.device) -> tuple[Any, ...]:
        """The arguments with tensors of the same shapes, strides and dtypes on ``device``.

        They hold random numbers, small enough that no sum overflows in fp16.
        """
        generator = torch.Generator(device).manual_seed(0)  # leaves the user's random state alone

        def random(like: Tensor) -> Tensor:
            strides = zip(like.shape, like.stride())
            length = 1 + sum((size - 1) * stride for size, stride in strides) if like.numel() else 0
            memory = torch.empty(length, dtype=like.dtype, device=device)
            memory.normal_(0, 0.1, generator=generator)
            return memory.as_strided(like.shape, like.stride())  # which may repeat elements

        return tuple(tree_map_only(Tensor, random, self.arguments))


def _text(value: Any) -> str:
    if isinstance(value, Tensor):
        return "x".join(map(str, value.shape))
    if isinstance(value, (list, tuple)):
        return " ".join(filter(None, map(_text, value)))
    return str(value)


def record(run: Callable[[], object], model: nn.Module | None = None) -> list[Call]:
    """The calls that ``run()`` makes of ops that a vendor library has too, in order.

    Calls of a backward pass are recorded as well, calls on empty tensors are not. If ``model`` is
    given, its modules name the layers. The calls run on the reference, so that nothing depends on
    earlier measurements.

    >>> [call.op for call in record(lambda: ASPP(8, (2,)).eval()(torch.randn(1, 8, 9, 9)))]
    ['parallel_dilated_conv2d_and_mean']
    """
    with torch.compiler.set_stance("force_eager"), running_layers(model) as layers:
        recorder = _Recorder(layers)
        with recorder:
            run()
    return recorder.calls


class _Recorder(TorchDispatchMode):
    def __init__(self, layers: list[str]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls: list[Call] = []
        self._layers = layers

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        namespace, _, op = function._schema.name.partition("::")
        kwargs = kwargs or {}
        if namespace == "deeplab_fast" and op in registry.shape_buckets:
            kwargs = kwargs | {"backend": "reference"}
            if args[0].numel():
                arguments = tree_map_only(Tensor, _without_data, args)
                self.calls.append(Call(op, arguments, self._layers[-1]))
        return function(*args, **kwargs)


def _without_data(tensor: Tensor) -> Tensor:
    """``tensor`` on the meta device, because the data of all activations may not fit in memory."""
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")


@contextlib.contextmanager
def running_layers(model: nn.Module | None) -> Iterator[list[str]]:
    """The names of the modules of ``model`` whose forward is running, the innermost one last.

    The first name is "". The hooks are global, because ASPP computes its branches one by one if
    there are hooks on its own modules.
    """
    names = {} if model is None else {module: name for name, module in model.named_modules()}
    stack = [""]

    def enter(module: nn.Module, args: Any) -> None:
        stack.append(names.get(module, stack[-1]))

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        stack.pop()

    hooks = (
        register_module_forward_pre_hook(enter),
        register_module_forward_hook(leave, always_call=True),
    )
    try:
        yield stack
    finally:
        for hook in hooks:
            hook.remove()


def runner(op: str, arguments: tuple[Any, ...], backend: str) -> Callable[[], list[Tensor]]:
    """A function that calls ``op`` on ``backend`` and returns its non-empty outputs.

    An op that works in place is called with a copy of its first argument.
    """
    function = getattr(torch.ops.deeplab_fast, op)

    def run() -> list[Tensor]:
        outputs = function(*arguments, backend=backend)
        return [tensor for tensor in tree_leaves(outputs) if tensor.numel()]

    def run_in_place() -> list[Tensor]:
        output = arguments[0].clone()
        function(output, *arguments[1:], backend=backend)
        return [output]

    return run_in_place if op.endswith("_") else run
