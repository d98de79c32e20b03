"""Tracing of modules by torch.fx, where the graph computes what the code does."""

from __future__ import annotations

import contextlib
import copy
import dis
import inspect
import operator
import random
import sys
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterator, Mapping
from types import FrameType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.fx.proxy import Attribute, TraceError
from torch.utils._mode_utils import no_dispatch
from torch.utils._pytree import tree_leaves

from ...nn import ASPP
from ..backbones.mobilenet_v2 import pad_same
from ..segmentation import SegmentationModel
from .calls import OPERATORS, OWN_FUNCTIONS, PURE_MODULES, TENSOR_FUNCTIONS, is_call_of
from .layers import NO_OPS, is_hooked, is_plain


class _Value(fx.Proxy):
    """Value of a graph, for code that fx.Proxy misleads.

    fx.Proxy turns ``x += y`` into ``x + y``, is not a Tensor in ``isinstance``, and has every
    attribute in ``hasattr``.
    """

    def __getattr__(self, name: str) -> Attribute:
        if not hasattr(Tensor, name):
            raise TraceError(f"the code depends on whether a value has the attribute {name}")
        return _AttributeOfValue(self, name)

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        return _class_for(self, sys._getframe(1))


class _AttributeOfValue(Attribute):
    @property  # type: ignore[misc]
    def __class__(self) -> type:
        return _class_for(self, sys._getframe(1))


def _class_for(value: fx.Proxy, asker: FrameType) -> type:
    """The class of a value, when a function other than torch's asks whether it is a tensor."""
    if asker.f_globals.get("__name__", "").startswith("torch."):
        return type(value)
    # Functions written in C ask as well, and would read the memory of a tensor.
    if "isinstance" not in asker.f_code.co_names:
        raise TraceError("the code depends on the class of a value")
    if isinstance(value.tracer, _Tracer) and value.tracer.is_tensor(value.node):
        return Tensor
    raise TraceError("the code depends on the type of a value")


def _in_place_operator(name: str) -> Callable[[fx.Proxy, Any], fx.Proxy]:
    function = getattr(operator, name)

    def operate(self: fx.Proxy, other: Any) -> fx.Proxy:
        return self.tracer.create_proxy("call_function", function, (self, other), {})

    return operate


for _name in ("iadd", "isub", "imul", "itruediv", "ifloordiv", "ipow", "iand", "ior", "ixor"):
    setattr(_Value, f"__{_name}__", _in_place_operator(_name))


class _Tracer(fx.Tracer):
    """Tracer of the modules that are not leaves."""

    proxy_buffer_attributes = True

    def __init__(self, modules: Mapping[str, nn.Module], leaves: Collection[nn.Module]) -> None:
        self.same_paddings = _same_paddings_of_transformers()
        super().__init__(autowrap_functions=(*OWN_FUNCTIONS, *self.same_paddings))
        self.modules, self.leaves = modules, leaves
        self.failed: nn.Module | None = None  # the innermost module whose code cannot be traced
        self.autocast = _autocast()
        self.records_gradient = torch.is_grad_enabled()
        self.random_states = _random_states()

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Value(node, self)

    def create_proxy(  # type: ignore[override]
        self, kind: str, target: Any, args: Any, kwargs: Any, **options: Any
    ) -> Any:
        if target not in self.same_paddings:
            return super().create_proxy(kind, target, args, kwargs, **options)
        input, conv = args
        return self.pad_as_transformers(input, conv)

    def pad_as_transformers(self, input: Any, conv: nn.Conv2d) -> Any:
        """A call of ``apply_tf_padding``, in functions that a graph may contain."""
        kernel, stride, dilation = conv.kernel_size, conv.stride, conv.dilation
        if any(d > 1 and (s > 1 or k % 2 == 0) for k, s, d in zip(kernel, stride, dilation)):
            raise TraceError("this padding is not TensorFlow's")
        if kernel == (1, 1):
            return input
        if stride == (1, 1) and all(k % 2 for k in kernel):
            top, left = (d * (k // 2) for k, d in zip(kernel, dilation))
            return self.create_proxy("call_function", F.pad, (input, (left, left, top, top)), {})
        options = kernel, stride, dilation
        return self.create_proxy("call_function", pad_same, (input, *options), {})

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        if _autocast() != self.autocast:
            raise TraceError("a graph does not contain changes of autocast")
        if self.records_gradient and (not torch.is_grad_enabled() or _in_checkpoint()):
            raise TraceError("a graph does not contain torch.no_grad() and checkpoints")
        return super().create_node(*args, **kwargs)

    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        return module in self.leaves or _is_torchs(module)

    def is_tensor(self, node: Any) -> bool:
        """True if the value of ``node`` is certainly a tensor."""
        if not isinstance(node, fx.Node):
            return False
        if node.op == "call_module":
            module = self.modules[str(node.target)]
            if type(module) in NO_OPS:
                return self.is_tensor(node.args[0])
            return type(module) in PURE_MODULES or isinstance(module, (nn.Conv2d, nn.BatchNorm2d))
        if is_call_of(node, TENSOR_FUNCTIONS):
            return True
        return is_call_of(node, OPERATORS) and any(map(self.is_tensor, node.args))

    def call_module(
        self,
        module: nn.Module,
        forward: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        is_leaf = self.is_leaf_module(module, "")
        is_registered = module in self.submodule_paths  # type: ignore[operator]
        if not (is_leaf or is_registered):  # such as a slice of a Sequential
            return forward(*args, **kwargs)
        try:
            if not is_leaf:
                _check_code(module)
            output = super().call_module(module, forward, args, kwargs)
            self.check_randomness()
            return output
        except Exception:
            if self.failed is None and not is_leaf:
                self.failed = module
            raise

    def check_randomness(self) -> None:
        """Raise an error if the code has drawn random numbers, on which branches may depend."""
        if _random_states() != self.random_states:
            raise TraceError("the code depends on random numbers")

    def create_arg(self, value: Any) -> Any:
        if issubclass(type(value), fx.Proxy):
            return value.node
        if type(value) is OrderedDict:
            pairs = [(name, item) for name, item in value.items()]
            return self.create_proxy("call_function", OrderedDict, (pairs,), {}).node
        if isinstance(value, dict) and type(value) is not dict:
            raise TraceError(f"a graph cannot contain a {type(value).__name__}")
        if isinstance(value, nn.Module):
            raise TraceError("a graph cannot contain a module")
        if isinstance(value, Tensor) and not any(
            value is member for member in (*self.root.parameters(), *self.root.buffers())
        ):
            raise TraceError("a tensor that forward makes may be another one in the next call")
        return super().create_arg(value)


def _same_paddings_of_transformers() -> list[Callable[..., Any]]:
    """Functions that pad as TensorFlow does, and whose code needs the size as an int."""
    names = (f"transformers.models.{m}.modeling_{m}" for m in ("mobilenet_v1", "mobilenet_v2"))
    functions = (getattr(sys.modules.get(name), "apply_tf_padding", None) for name in names)
    return [function for function in functions if function is not None]


def _check_code(module: nn.Module) -> None:
    """Raise an error if ``forward`` calls type(), for which a traced value has another answer."""
    code = getattr(type(module).forward, "__code__", None)
    if type(module).__module__.startswith("deeplab_fast."):  # it calls type() of modules only
        return
    for instruction in dis.get_instructions(code) if code else ():
        if instruction.opname in ("LOAD_GLOBAL", "LOAD_NAME") and instruction.argval == "type":
            raise TraceError("the code depends on type()")


def traced(module: nn.Module, untraced: Collection[nn.Module] = ()) -> fx.Graph | None:
    """The graph of a module, in which submodules that cannot be traced are single calls.

    So are the submodules ``untraced``, and networks and ASPPs of this package. None if the code of
    the module itself cannot be traced, or if it is such a network, whose other methods read its
    submodules. With gradients enabled, the graph has the gradients of the module.
    """
    if isinstance(module, SegmentationModel):
        return None
    parameters = list(inspect.signature(type(module).forward).parameters.values())[1:]
    # A graph would always take the branch for an argument that is given, and code may read what a
    # hook has stored.
    if any(map(is_hooked, module.modules())) or any(
        parameter.default is not parameter.empty
        or parameter.kind is not parameter.POSITIONAL_OR_KEYWORD
        for parameter in parameters
    ):
        return None
    leaves = {
        submodule
        for submodule in module.modules()
        if isinstance(submodule, (nn.Conv2d, nn.BatchNorm2d))
        or submodule in untraced
        or not is_plain(submodule)
        or isinstance(submodule, SegmentationModel)
        or (type(submodule) is ASPP and submodule._is_unmodified())
    }
    states = _states(module)
    while True:
        tracer, graph = _Tracer(dict(module.named_modules()), leaves), None
        with contextlib.suppress(Exception), _functions_fail():
            _check_code(module)
            candidate = tracer.trace(module)
            tracer.check_randomness()
            graph = candidate
        if _restore(states):
            return None
        if graph is not None or tracer.failed is None:
            return graph
        leaves.add(tracer.failed)


def _random_states() -> tuple[Any, ...]:
    with no_dispatch():
        of_torch = torch.get_rng_state().tolist()
    numpy = sys.modules.get("numpy")
    name, keys, *rest = ("", []) if numpy is None else numpy.random.get_state()
    return random.getstate(), of_torch, name, list(keys), rest


def _in_checkpoint() -> bool:
    """True within the function that torch.utils.checkpoint calls."""
    frame: FrameType | None = sys._getframe()
    while frame is not None and frame.f_globals.get("__name__") != "torch.utils.checkpoint":
        frame = frame.f_back
    return frame is not None


@contextlib.contextmanager
def _functions_fail() -> Iterator[None]:
    """Let autograd.Functions of traced values raise an error: a graph would lose their gradient."""
    apply = vars(torch.autograd.Function)["apply"]

    def checked(cls: Any, *args: Any, **kwargs: Any) -> Any:
        if any(issubclass(type(value), fx.Proxy) for value in tree_leaves((args, kwargs))):
            raise TraceError("a graph cannot contain an autograd.Function")
        return apply.__get__(None, cls)(*args, **kwargs)

    torch.autograd.Function.apply = classmethod(checked)
    try:
        yield
    finally:
        torch.autograd.Function.apply = apply


def _autocast() -> list[tuple[bool, torch.dtype]]:
    return [
        (torch.is_autocast_enabled(device), torch.get_autocast_dtype(device))
        for device in ("cpu", "cuda")
    ]


def _states(module: nn.Module) -> list[tuple[Any, Any]]:
    """The attributes of all modules, and the dicts, lists and sets in them, with copies."""
    attributes = [vars(submodule) for submodule in module.modules()]
    containers: dict[int, Any] = {}

    def collect(value: Any) -> None:
        if isinstance(value, (dict, list, set, tuple)) and id(value) not in containers:
            containers[id(value)] = value
            for item in value.values() if isinstance(value, dict) else value:
                collect(item)

    for members in attributes:
        collect(members)
    changeable = [value for value in containers.values() if not isinstance(value, tuple)]
    return [(container, copy.copy(container)) for container in changeable]


def _restore(states: list[tuple[Any, Any]]) -> bool:
    """Undo changes of attributes and containers. True if there were any."""
    has_changes = False
    for container, before in states:
        if _identities(container) != _identities(before):
            has_changes = True
            container.clear()
            if isinstance(container, list):
                container.extend(before)
            else:
                container.update(before)
    return has_changes


def _identities(container: Any) -> list[int]:
    return sorted(map(id, container.values() if isinstance(container, dict) else container))


def _is_torchs(module: nn.Module) -> bool:
    is_script = isinstance(module, torch.jit.ScriptModule)
    return is_script or (
        type(module).__module__.startswith("torch.nn") and not isinstance(module, nn.Sequential)
    )


def is_kept(module: nn.Module) -> bool:
    """True if nothing within ``module`` is fused, because its code reads its submodules."""
    return _is_torchs(module) or isinstance(module, (nn.Conv2d, nn.BatchNorm2d, ASPP))
