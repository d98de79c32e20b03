"""Convolutions of a network fused with the batch norms, activations and sums that follow them.

torch.fx turns the network into graphs of calls. In each graph, calls that a fused convolution can
do are replaced; all others stay as they are. "Pure" calls read their operands and return new
memory. Only about these the pass knows that they neither change nor keep a tensor.
"""

from __future__ import annotations

import copy
import functools
import inspect
import operator
import sys
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterator, Mapping
from types import FrameType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.fx.proxy import Attribute, TraceError
from torch.nn.utils import parametrize

from .. import ops
from ..nn import ASPP, Conv2d
from ..ops.fused_conv2d import fused_conv2d, fused_conv2d_add_
from ..ops.upsample import upsample
from .backbones.mobilenet_v2 import SameConv2d, pad_same

_CONVOLUTIONS = (nn.Conv2d, Conv2d, SameConv2d)
_NORMS = (nn.BatchNorm2d, nn.SyncBatchNorm)
_NO_OPS = (nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout)
_RELUS = {F.relu, F.relu_, torch.relu, torch.relu_, "relu", "relu_"}
_ADDS = {operator.add, operator.iadd, torch.add, "add", "add_"}
_DROPOUTS = {F.dropout, F.dropout2d, F.alpha_dropout}
# Functions that are nodes of a graph. Tracing into upsample would keep one of its branches.
_OWN_FUNCTIONS: tuple[Any, ...] = (
    upsample,
    pad_same,
    *(function for function in map(ops.__dict__.get, ops.__all__) if inspect.isfunction(function)),
)  # fmt: skip


class FusedConv2d(nn.Module):
    """``activation(conv2d(input, weight, bias) + residual)``.

    Args:
        weight: [K, C / groups, R, S].
        bias: [K].
        stride, padding, dilation: (vertical, horizontal).
        activation: "none", "relu" or "relu6".
    """

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor,
        stride: tuple[int, int],
        padding: tuple[int, int],
        dilation: tuple[int, int],
        groups: int,
        activation: str = "none",
    ) -> None:
        super().__init__()
        self.weight, self.bias = _frozen(weight), _frozen(bias)
        self.geometry = stride, padding, dilation, groups  # one attribute is faster than four
        self.activation = activation
        spans = (d * (k - 1) + 1 - 2 * p for d, k, p in zip(dilation, weight.shape[2:], padding))
        self._extents = weight.size(0), *spans

    def forward(
        self, input: Tensor, residual: Tensor | None = None, overwrite: bool = False
    ) -> Tensor:
        """Input [N, C, H, W] or [C, H, W]; ``overwrite`` allows to write to ``residual``."""
        parameters: Any = self._parameters  # attributes of a module take longer
        operands = input, parameters["weight"], parameters["bias"], *self.geometry
        if input.dim() == 3:
            output = fused_conv2d(input[None], *operands[1:], "none")[0]
            return self._activated(output if residual is None else output + residual)
        if residual is None:
            return fused_conv2d(*operands, self.activation)
        if not self._is_output_like(residual, input):  # the sum broadcasts or changes the dtype
            return self._activated(fused_conv2d(*operands, "none") + residual)
        if not overwrite:
            residual = residual.clone()
        return fused_conv2d_add_(residual, *operands, self.activation)

    def _is_output_like(self, residual: Tensor, input: Tensor) -> bool:
        """True if ``residual`` has the shape, dtype and device of the convolution's output."""
        batch, _, height, width = input.shape
        channels, vertical_span, horizontal_span = self._extents
        (vertical, horizontal), *_ = self.geometry
        return (
            isinstance(residual, Tensor)
            and residual.shape
            == (
                batch,
                channels,
                (height - vertical_span) // vertical + 1,
                (width - horizontal_span) // horizontal + 1,
            )
            and residual.dtype == input.dtype
            and residual.device == input.device
        )

    def _activated(self, output: Tensor) -> Tensor:
        if self.activation == "none":
            return output
        return output.relu_() if self.activation == "relu" else F.relu6(output, inplace=True)

    def extra_repr(self) -> str:
        channels, per_group, *kernel = self.weight.shape
        stride, padding, dilation, groups = self.geometry
        return (
            f"{per_group * groups}, {channels}, kernel_size={tuple(kernel)}, stride={stride}, "
            f"padding={padding}, dilation={dilation}, groups={groups}, "
            f"activation={self.activation}"
        )


class FoldedASPP(nn.Module):
    """:class:`deeplab_fast.ASPP` in evaluation mode as one :func:`deeplab_fast.aspp`.

    Raises:
        ValueError: the module is not one for which :func:`can_fold` is true.
    """

    def __init__(self, module: ASPP) -> None:
        super().__init__()
        if not can_fold(module):
            raise ValueError("module: expected an ASPP whose batch norms can be folded")
        branches: list[Any] = list(module.convs)
        pool = branches.pop()
        weights, biases = zip(*(folded(branch[0], branch[1]) for branch in branches))
        pool_weight, pool_bias = folded(pool[1], pool[2])
        project_weight, project_bias = folded(module.project[0], module.project[1])
        self.weights = nn.ParameterList(map(_frozen, weights))
        self.biases = nn.ParameterList(map(_frozen, biases))
        self.dilations = [branch[0].dilation[0] for branch in branches]
        self.pool_weight, self.pool_bias = _frozen(pool_weight), _frozen(pool_bias)
        self.project_weight, self.project_bias = _frozen(project_weight), _frozen(project_bias)

    def operands(self) -> tuple[Any, ...]:
        """Arguments of the op after the input."""
        return (
            list(self.weights),
            list(self.biases),
            self.dilations,
            self.pool_weight,
            self.pool_bias,
            self.project_weight,
            self.project_bias,
        )

    def forward(self, input: Tensor) -> Tensor:
        return ops.aspp(input, *self.operands())


def can_fold(module: nn.Module) -> bool:
    """True if ``module`` is an ASPP in evaluation mode that the op ``aspp`` computes."""
    if type(module) is not ASPP or not module._is_unmodified():
        return False
    *branches, pool = module.convs
    activations = [pool[-1], *(layer[2] for layer in (*branches, module.project))]
    pairs = [(pool[1], pool[2]), *((layer[0], layer[1]) for layer in (*branches, module.project))]
    return (
        len(pool) == 4
        and all(map(_is_plain, module.modules()))
        and all(type(activation) is nn.ReLU for activation in activations)
        and type(pool[1]) in _CONVOLUTIONS
        and pool[1].kernel_size == (1, 1)
        and all(_can_fold_norm(norm, conv) for conv, norm in pairs)
    )


class _Steps(NamedTuple):
    """Source of a function ``run(modules, *inputs)`` and the objects that it names."""

    source: str
    names: dict[str, Any]


class FusedModule(nn.Module):
    """A module whose ``forward`` is a fused graph.

    :func:`_fused_copy` makes objects of a subclass of this and of the original class, so that other
    methods and attributes stay. Submodules have the names that their convolutions have in the
    original module.
    """

    _steps: _Steps
    _run: Callable[..., Any]

    def forward(self, *inputs: Any, **named_inputs: Any) -> Any:
        return self._run(self, *inputs, **named_inputs)

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return _restored, (type(self).__bases__[1], vars(self) | {"_run": None})

    def __deepcopy__(self, memo: dict[int, Any]) -> FusedModule:
        other: FusedModule = type(self).__new__(type(self))
        memo[id(self)] = other
        vars(other).update(copy.deepcopy(vars(self) | {"_run": None}, memo))
        vars(other)["_run"] = self._run
        return other


@functools.cache
def _fused_class(original: type[nn.Module]) -> type[FusedModule]:
    return type(f"Fused{original.__name__}", (FusedModule, original), {})


def _fused_copy(original: nn.Module, steps: _Steps) -> FusedModule:
    """``original`` without parameters and submodules, and with another ``forward``."""
    members = vars(nn.Module())
    kept = {name: value for name, value in vars(original).items() if name not in members}
    return _restored(type(original), members | kept | {"_steps": steps, "training": False})


def _restored(original: type[nn.Module], members: dict[str, Any]) -> FusedModule:
    fused_class = _fused_class(original)  # type: ignore[arg-type]
    fused: FusedModule = fused_class.__new__(fused_class)
    vars(fused).update(members)
    vars(fused)["_run"] = _compiled(members["_steps"])
    return fused


def _compiled(steps: _Steps) -> Callable[..., Any]:
    names = dict(steps.names)
    exec(steps.source, names)
    run: Callable[..., Any] = names["run"]
    return run


class Report(NamedTuple):
    """What :func:`fuse_with_report` did.

    Attributes:
        fused: what each fused layer does, by its name in the result, such as {"layer1.0.conv1":
            "Conv2d + BatchNorm2d + ReLU"}.
        kept: the convolutions that run as before, by name, and why.
    """

    fused: dict[str, str]
    kept: dict[str, str]


def fuse(module: nn.Module, outputs: Collection[str] | None = None) -> nn.Module:
    """A copy of ``module`` in evaluation mode with fused convolutions, for inference.

    Convolutions run as one kernel together with batch norm, ReLU or ReLU6 and the addition of a
    residual after them. :class:`deeplab_fast.ASPP` runs as :func:`deeplab_fast.aspp`. Weights are
    folded in float64 and rounded once. What cannot be fused stays as it is. The copy is the fastest
    for images in channels_last. It cannot be differentiated, and its submodules and intermediate
    results are not those of ``module``.

    Args:
        module: any module. It is not changed.
        outputs: the needed entries of the dict that ``module`` returns; others are not computed
            where torch.fx can trace ``module``. None for all.

    >>> fused = fuse(torchvision.models.resnet18().eval())
    """
    return fuse_with_report(module, outputs)[0]


def fuse_with_report(
    module: nn.Module, outputs: Collection[str] | None = None
) -> tuple[nn.Module, Report]:
    """:func:`fuse`, and a report of what was fused."""
    module = copy.deepcopy(module).eval().requires_grad_(False)
    with torch.no_grad():
        fused = _fused_module(module, outputs)
    return fused, _report(fused)


def _report(module: nn.Module) -> Report:
    report = Report({}, {})
    for name, layer in module.named_modules():
        if isinstance(layer, FusedConv2d):
            report.fused[name] = layer.extra_repr()
        elif isinstance(layer, FoldedASPP):
            report.fused[name] = "ASPP"
        elif isinstance(layer, nn.Conv2d):
            report.kept[name] = _unsupported_reason(layer) or "a module that torch.fx cannot trace"
    return report


def _fused_module(module: nn.Module, outputs: Collection[str] | None = None) -> nn.Module:
    if can_fold(module):
        return FoldedASPP(module)  # type: ignore[arg-type]
    if _is_kept(module) and not (type(module) is ASPP and not module._is_unmodified()):
        return module
    traced = _traced(module)
    if traced is None:
        _fuse_children(module)
        return module
    return _Pass(module, traced).run(outputs)


def _fuse_children(module: nn.Module) -> None:
    """Fuse within the modules that a module which stays as it is calls.

    Its convolutions stay, because its code may read their attributes.
    """
    for name, child in list(module.named_children()):
        if isinstance(child, (nn.Sequential, nn.ModuleList, nn.ModuleDict)):
            _fuse_children(child)
        else:
            module._modules[name] = _fused_module(child)


# --- tracing


class _Value(fx.Proxy):
    """Value of a graph.

    fx.Proxy takes ``x += y`` for ``x + y``, and is no tensor in ``isinstance``.
    """

    def __getattr__(self, name: str) -> Attribute:
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
        super().__init__(autowrap_functions=_OWN_FUNCTIONS)
        self.modules, self.leaves = modules, leaves
        self.failed: nn.Module | None = None  # the innermost module whose code cannot be traced

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Value(node, self)

    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        return module in self.leaves or _is_torchs(module)

    def is_tensor(self, node: Any) -> bool:
        """True if the value of ``node`` is certainly a tensor."""
        if not isinstance(node, fx.Node):
            return False
        if node.op == "call_module":
            module = self.modules[str(node.target)]
            if type(module) in _NO_OPS:
                return self.is_tensor(node.args[0])
            return type(module) in _PURE_MODULES or isinstance(module, (nn.Conv2d, nn.BatchNorm2d))
        if _is_call_of(node, _TENSOR_FUNCTIONS):
            return True
        return _is_call_of(node, _OPERATORS) and any(map(self.is_tensor, node.args))

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
            return super().call_module(module, forward, args, kwargs)
        except Exception:
            if self.failed is None and not is_leaf:
                self.failed = module
            raise

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


def _traced(module: nn.Module) -> fx.Graph | None:
    """The graph of a module, in which submodules that cannot be traced are single calls.

    None if the code of the module itself cannot be traced.
    """
    parameters = list(inspect.signature(type(module).forward).parameters.values())[1:]
    # A graph would always take the branch for an argument that is given.
    if not _is_plain(module) or any(
        parameter.default is not parameter.empty
        or parameter.kind is not parameter.POSITIONAL_OR_KEYWORD
        for parameter in parameters
    ):
        return None
    leaves = {
        submodule
        for submodule in module.modules()
        if isinstance(submodule, (nn.Conv2d, nn.BatchNorm2d))
        or not _is_plain(submodule)
        or can_fold(submodule)
    }
    while True:
        tracer = _Tracer(dict(module.named_modules()), leaves)
        try:
            return tracer.trace(module)
        except Exception:
            if tracer.failed is None:
                return None
            leaves.add(tracer.failed)


def _is_torchs(module: nn.Module) -> bool:
    is_script = isinstance(module, torch.jit.ScriptModule)
    return is_script or (
        type(module).__module__.startswith("torch.nn") and not isinstance(module, nn.Sequential)
    )


def _is_kept(module: nn.Module) -> bool:
    """True if nothing within ``module`` is fused, because its code reads its submodules."""
    return _is_torchs(module) or isinstance(module, (nn.Conv2d, nn.BatchNorm2d, ASPP))


def _is_plain(module: nn.Module) -> bool:
    """True if a call of ``module`` runs the ``forward`` of its class and nothing else."""
    return not (
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in vars(module)
        or parametrize.is_parametrized(module)
    )


# --- folding


def _unsupported_reason(conv: nn.Module) -> str | None:
    """Why a convolution cannot be fused; None if it can."""
    if type(conv) not in _CONVOLUTIONS:
        return f"unknown kind of convolution: {type(conv).__name__}"
    assert isinstance(conv, nn.Conv2d)
    if not _is_plain(conv):
        return "it has hooks or parametrizations"
    if conv.padding_mode != "zeros" or isinstance(conv.padding, str):
        return f"padding: {conv.padding_mode}, {conv.padding}"
    if not conv.weight.is_floating_point() or not isinstance(conv.weight, nn.Parameter):
        return f"weights: {conv.weight.dtype}, {type(conv.weight).__name__}"
    return None


def _is_timms(norm: nn.Module) -> bool:
    """True for timm's batch norm with activation, which holds both."""
    kind = type(norm)
    return kind.__name__ == "BatchNormAct2d" and kind.__module__.startswith("timm.")


def _can_fold_norm(norm: Any, conv: Any) -> bool:
    return (
        (type(norm) in _NORMS or _is_timms(norm))
        and _is_plain(norm)
        and not norm.training
        and norm.running_mean is not None
        and norm.running_var is not None
        and norm.num_features == conv.out_channels
        and norm.running_mean.device == conv.weight.device
        and (not _is_timms(norm) or type(norm.drop) in _NO_OPS and _is_plain(norm.drop))
    )


def folded(conv: Any, norm: Any = None) -> tuple[Tensor, Tensor]:
    """Weight and bias of the convolution that equals ``norm(conv(x))`` in evaluation mode.

    They are computed in float64 and rounded once, at the end.
    """
    weight = conv.weight.detach().double()
    bias = weight.new_zeros(weight.size(0)) if conv.bias is None else conv.bias.detach().double()
    if norm is not None:
        scale = (norm.running_var.double() + norm.eps).rsqrt()
        if norm.weight is not None:
            scale = norm.weight.detach().double() / (norm.running_var.double() + norm.eps).sqrt()
        weight = weight * scale[:, None, None, None]
        bias = scale * (bias - norm.running_mean.double())
        if norm.bias is not None:
            bias = norm.bias.detach().double() + bias
    return weight.to(conv.weight.dtype), bias.to(conv.weight.dtype)


def fused_layer(conv: Any, norm: Any = None) -> FusedConv2d:
    """The fused convolution for a convolution and the batch norm after it."""
    weight, bias = folded(conv, norm)
    weight = weight.contiguous(memory_format=torch.channels_last)
    return FusedConv2d(weight, bias, conv.stride, conv.padding, conv.dilation, conv.groups)


def _frozen(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)


# --- rewriting a graph

# Modules and functions that read their operands and return new memory, unless they work in place.
_PURE_MODULES = (
    FusedConv2d, FoldedASPP, *_CONVOLUTIONS, *_NORMS, nn.ConvTranspose2d, nn.Linear, nn.MaxPool2d,
    nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.Upsample, nn.UpsamplingBilinear2d, nn.ReLU, nn.ReLU6,
    nn.Hardtanh, nn.SiLU, nn.Hardswish, nn.Hardsigmoid, nn.GELU, nn.Sigmoid, nn.LeakyReLU, nn.ELU,
    nn.LayerNorm, nn.GroupNorm,
)  # fmt: skip
_TENSOR_FUNCTIONS = {
    torch.cat, torch.relu, torch.sigmoid, torch.mean, F.relu, F.relu6, F.silu, F.hardswish,
    F.hardsigmoid, F.gelu, F.interpolate, F.max_pool2d, F.avg_pool2d, F.adaptive_avg_pool2d,
    F.batch_norm, F.conv2d, F.linear, upsample, pad_same, "relu", "sigmoid", "mean", "clone",
}  # fmt: skip
_OPERATORS = {
    operator.add, operator.sub, operator.mul, operator.truediv, operator.floordiv, torch.add,
    torch.mul, "add", "mul", "sub",
}  # fmt: skip
_PURE_FUNCTIONS = _TENSOR_FUNCTIONS | _OPERATORS | {"size", "dim"}
# Names of the operands after the first of functions that may work in place.
_OPTIONS: dict[Any, tuple[str, ...]] = {
    F.batch_norm: ("running_mean", "running_var", "weight", "bias", "training"),
    **dict.fromkeys((F.relu, F.relu6, F.silu, F.hardswish, F.hardsigmoid), ("inplace",)),
}
# Calls that return a view or a container of their operands and change nothing.
_VIEWS = {
    operator.getitem, getattr, OrderedDict, torch.flatten, torch.split, torch.chunk, torch.permute,
    torch.reshape, torch.transpose, torch.unsqueeze, torch.squeeze,
    "view", "reshape", "flatten", "permute", "transpose", "chunk", "split", "expand", "unsqueeze",
    "squeeze", "contiguous", "to",
}  # fmt: skip


class _Pass:
    """The rewriting of the graph of one module.

    The calls of fused layers hold them in ``node.meta["layer"]``, until :meth:`module` names them.
    """

    def __init__(self, root: nn.Module, graph: fx.Graph) -> None:
        self.root, self.graph = root, graph
        self.modules: dict[str, Any] = dict(root.named_modules())
        # Other code reads the parameters of these modules.
        self.read = {
            str(node.target).rpartition(".")[0] for node in graph.nodes if node.op == "get_attr"
        }
        self.folded: dict[tuple[nn.Module, ...], nn.Module] = {}  # by original modules

    def run(self, outputs: Collection[str] | None) -> FusedModule:
        if outputs is not None:
            self.drop_outputs(outputs)
        self.drop_no_ops()
        self.drop_dead_code()
        for step in (self.fold_aspp, self.fuse_chain, self.fuse_sum):
            for node in list(self.graph.nodes):
                step(node)
        self.drop_dead_code()
        for node in self.graph.nodes:
            self.allow_overwriting(node)
        return self.module()

    def module_of(self, node: fx.Node) -> Any:
        """The module that ``node`` calls, or None."""
        return node.meta.get("layer") or (
            self.modules[str(node.target)] if node.op == "call_module" else None
        )

    def plain_call(self, node: fx.Node | None) -> Any:
        """The plain module that ``node`` calls with one positional argument, or None."""
        if node is None or node.kwargs or [type(arg) for arg in node.args] != [fx.Node]:
            return None
        module = self.module_of(node)
        is_usable = module is not None and _is_plain(module) and str(node.target) not in self.read
        return module if is_usable else None

    def drop_outputs(self, names: Collection[str]) -> None:
        *_, output = self.graph.nodes
        (value,) = output.args
        if isinstance(value, fx.Node) and value.target is OrderedDict:
            value.args = ([pair for pair in value.args[0] if pair[0] in names],)  # type: ignore
        elif isinstance(value, dict):
            output.args = ({name: value[name] for name in value if name in names},)

    def drop_no_ops(self) -> None:
        for node in self.graph.nodes:
            module = self.plain_call(node)
            if (type(module) in _NO_OPS and not module.training) or _is_no_dropout(node):
                self.replace(node, node.args[0])

    def drop_dead_code(self) -> None:
        for node in reversed(self.graph.nodes):
            if not node.users and (self.is_pure(node) or _is_view(node)):
                self.graph.erase_node(node)

    def replace(self, node: fx.Node, other: Any) -> None:
        node.replace_all_uses_with(other)
        self.graph.erase_node(node)

    def call(self, name: str, layer: nn.Module, *args: Any) -> fx.Node:
        """A call of a new layer, named after the original module ``name``."""
        node = self.graph.create_node("call_module", name, args)
        node.meta["layer"] = layer
        return node

    def is_pure(self, node: fx.Node) -> bool:
        """True if a call reads its operands, changes none, and returns new memory."""
        module = self.module_of(node)
        if module is not None:
            return (
                type(module) in _PURE_MODULES
                and _is_plain(module)
                and not getattr(module, "inplace", False)
                and not (isinstance(module, nn.BatchNorm2d) and module.training)
            )
        if not _is_call_of(node, _PURE_FUNCTIONS):
            return node.target is getattr and node.args[1] in ("shape", "dtype", "device", "ndim")
        options = dict(zip(_OPTIONS.get(node.target, ()), node.args[1:])) | node.kwargs
        joins_lists = node.target in _OPERATORS and any(isinstance(arg, list) for arg in node.args)
        works_in_place = options.get("inplace") or options.get("training") or "out" in options
        return not works_in_place and not joins_lists

    # --- convolution, batch norm and activation

    def fold_aspp(self, node: fx.Node) -> None:
        module = self.plain_call(node)
        if module is not None and can_fold(module):
            if (module,) not in self.folded:
                self.folded[module,] = FoldedASPP(module)
            with self.graph.inserting_before(node):
                self.replace(node, self.call(node.target, self.folded[module,], *node.args))  # type: ignore

    def fuse_chain(self, node: fx.Node) -> None:
        conv = self.plain_call(node)
        if not isinstance(conv, nn.Conv2d) or _unsupported_reason(conv):
            return
        user = _only_user(node)
        norm = self.plain_call(user)
        if not _can_fold_norm(norm, conv):
            norm = None
        layer = self.fused_layer(conv, norm)
        (input,) = node.args
        with self.graph.inserting_before(node):
            if isinstance(conv, SameConv2d):
                input = self.graph.call_function(pad_same, (input,))
            fused = end = self.call(node.target, layer, input)  # type: ignore[arg-type]
            if norm is not None and _is_timms(norm) and type(norm.act) is not nn.Identity:
                end = self.graph.call_module(f"{user.target}.act", (fused,))  # type: ignore
        self.replace(node, fused)
        if norm is not None:
            self.replace(user, end)  # type: ignore
            end.args = (fused,) if end is not fused else end.args
        self.fuse_activation(fused, layer)

    def fused_layer(self, conv: Any, norm: Any) -> FusedConv2d:
        """A fused convolution. Calls of the same convolution and norm share the weights."""
        layer = fused_layer(conv, norm)
        first: Any = self.folded.setdefault((conv, norm), layer)
        layer.weight, layer.bias = first.weight, first.bias
        return layer

    def fuse_activation(self, node: fx.Node, layer: FusedConv2d) -> None:
        """Fuse the activation after ``node``, a call of ``layer``."""
        user = _only_user(node)
        activation = None if user is None else self.activation(user)
        if user is not None and activation:
            layer.activation = activation
            self.replace(user, node)

    def activation(self, node: fx.Node) -> str | None:
        """The activation that ``node`` applies to its only operand, if it can be fused."""
        if node.op == "call_module":
            module = self.plain_call(node)
            if type(module) is nn.Hardtanh:
                return "relu6" if (module.min_val, module.max_val) == (0, 6) else None
            return {nn.ReLU: "relu", nn.ReLU6: "relu6"}.get(type(module))
        if len(node.args) > 2 or not set(node.kwargs) <= {"inplace"}:
            return None
        return "relu" if node.target in _RELUS else "relu6" if node.target is F.relu6 else None

    # --- residuals

    def fuse_sum(self, node: fx.Node) -> None:
        """Fuse a sum into one of the convolutions that it adds."""
        if not _is_call_of(node, _ADDS) or node.kwargs or len(node.args) != 2:
            return
        left, right = node.args
        candidates = [
            (self.module_of(conv), conv, residual)  # type: ignore[arg-type]
            for conv, residual in ((left, right), (right, left))
            if self.can_add(conv, residual, node)
        ]
        if not candidates:
            return
        # Kernels on a GPU add a residual to convolutions of stride 1 only.
        layer, conv, residual = min(candidates, key=lambda found: max(found[0].geometry[0]))
        with self.graph.inserting_before(node):
            fused = self.call(conv.target, layer, *conv.args, residual, False)  # type: ignore
        self.replace(node, fused)
        self.graph.erase_node(conv)  # type: ignore[arg-type]
        self.fuse_activation(fused, layer)

    def can_add(self, conv: Any, residual: Any, node: fx.Node) -> bool:
        """True if the call ``conv`` may run where its sum with ``residual`` is computed."""
        if not (isinstance(conv, fx.Node) and isinstance(residual, fx.Node)) or conv is residual:
            return False
        layer = self.module_of(conv)
        if type(layer) is not FusedConv2d or layer.activation != "none" or len(conv.args) != 1:
            return False
        changes_residual = node.target in (operator.iadd, "add_") and node.args[0] is residual
        return (
            _only_user(conv) is node
            and not (changes_residual and not self.is_free(residual, node))
            and all(self.is_pure(other) or _is_view(other) for other in _between(conv, node))
        )

    def is_free(self, value: fx.Node, last: fx.Node) -> bool:
        """True if nothing can read the memory of ``value`` after the call ``last``."""
        earlier = set(_between(value, last))
        return self.is_pure(value) and all(
            user is last or (user in earlier and self.is_pure(user)) for user in value.users
        )

    def allow_overwriting(self, node: fx.Node) -> None:
        if type(self.module_of(node)) is FusedConv2d and len(node.args) == 3:
            input, residual, _ = node.args
            if input is not residual and self.is_free(residual, node):  # type: ignore[arg-type]
                node.args = input, residual, True

    # --- the result

    def module(self) -> FusedModule:
        calls = [node for node in self.graph.nodes if node.op == "call_module"]
        kept = {str(node.target) for node in calls if "layer" not in node.meta}
        named: dict[str, nn.Module] = {}
        for node in calls:
            if layer := node.meta.get("layer"):
                node.target = _free_name(str(node.target), layer, kept, named)
                named[node.target] = layer
            elif node.target not in named:
                module = named[str(node.target)] = self.modules[str(node.target)]
                if not _is_kept(module):
                    _fuse_children(module)
        fused = _fused_copy(self.root, _steps(self.graph))
        for name, module in named.items():
            *path, last = name.split(".")
            _container(fused, path).add_module(last, module)
        for node in self.graph.nodes:
            if node.op == "get_attr":
                *path, name = str(node.target).split(".")
                members = vars(self.modules[".".join(path)])
                owner = _container(fused, path)
                for kind in ("_parameters", "_buffers"):
                    if name in members[kind]:
                        vars(owner)[kind][name] = members[kind][name]
        return fused


def _free_name(name: str, layer: nn.Module, kept: set[str], named: dict[str, nn.Module]) -> str:
    """``name`` or a similar one that no other layer has, outside of the modules ``kept``."""
    if any(f"{name}.".startswith(f"{other}.") for other in kept):
        name = name.replace(".", "_") + "_fused"
    while named.get(name, layer) is not layer or name in kept:
        name += "_"
    return name


def _only_user(node: fx.Node) -> fx.Node | None:
    """The call that uses ``node`` as its operand once, if it is the only use."""
    if len(node.users) != 1:
        return None
    (user,) = node.users
    uses = [other for other in user.all_input_nodes if other is node]
    return user if len(uses) == 1 and user.op != "output" else None


def _between(first: fx.Node, last: fx.Node) -> Iterator[fx.Node]:
    node = first.next
    while node is not last and node.op != "root":
        yield node
        node = node.next


def _is_view(node: fx.Node) -> bool:
    return node.op == "get_attr" or _is_call_of(node, _VIEWS)


def _is_call_of(node: fx.Node, functions: Collection[Any]) -> bool:
    return node.op in ("call_function", "call_method") and node.target in functions


def _is_no_dropout(node: fx.Node) -> bool:
    """True for a functional dropout that returns its input."""
    if not _is_call_of(node, _DROPOUTS) or not node.args:
        return False
    training = node.args[2] if len(node.args) > 2 else node.kwargs.get("training", True)
    return training is False


def _container(root: nn.Module, path: list[str]) -> nn.Module:
    for name in path:
        if name not in root._modules:
            root.add_module(name, nn.Module())
        root = root._modules[name]  # type: ignore[assignment]
    return root


# --- code


def _steps(graph: fx.Graph) -> _Steps:
    """Python code of a graph.

    Modules are looked up in dicts, because their attributes take longer. A value is forgotten after
    its last use.
    """
    names: dict[str, Any] = {}

    def text(value: Any) -> str:
        if isinstance(value, fx.Node):
            return value.name
        if isinstance(value, (tuple, list)):
            inner = "".join(f"{text(item)}, " for item in value)
            return f"({inner})" if isinstance(value, tuple) else f"[{inner}]"
        if type(value) is slice:
            return f"slice({text(value.start)}, {text(value.stop)}, {text(value.step)})"
        if isinstance(value, dict):
            return "{" + "".join(f"{text(k)}: {text(v)}, " for k, v in value.items()) + "}"
        if type(value) in (int, str, bool, type(None)):
            return repr(value)
        for name, other in names.items():
            if other is value:
                return name
        name = f"constant_{len(names)}_"
        names[name] = value
        return name

    last_uses: dict[fx.Node, list[str]] = {}
    seen: set[fx.Node] = set()
    for node in reversed(graph.nodes):
        dead = [operand.name for operand in node.all_input_nodes if operand not in seen]
        last_uses[node] = dead + ([] if node.users or node.op == "output" else [node.name])
        seen.update(node.all_input_nodes)

    inputs, lines = ["self"], []
    for node in graph.nodes:
        if node.op == "placeholder":
            inputs.append(node.target)
            if node.name != node.target:
                lines.append(f"{node.name} = {node.target}")
            continue
        if node.op == "output":
            lines.append(f"return {text(node.args[0])}")
            continue
        operands = [text(value) for value in node.args]
        operands += [f"{name}={text(value)}" for name, value in node.kwargs.items()]
        if node.op == "call_module":
            call = f"{_member(node.target, is_module=True)}({', '.join(operands)})"
        elif node.op == "get_attr":
            call = _member(node.target, is_module=False)
        elif node.op == "call_method":
            call = f"{operands[0]}.{node.target}({', '.join(operands[1:])})"
        else:
            call = f"{text(node.target)}({', '.join(operands)})"
        lines.append(f"{node.name} = {call}")
        if last_uses[node]:
            lines.append(" = ".join([*last_uses[node], "None"]))
    body = "\n".join(f"    {line}" for line in lines)
    return _Steps(f"def run({', '.join(inputs)}):\n{body}\n", names)


def _member(target: Any, is_module: bool) -> str:
    *path, last = target.split(".")
    owner = "self" + "".join(f'._modules["{name}"]' for name in path)
    return f'{owner}._modules["{last}"]' if is_module else f"{owner}.{last}"
