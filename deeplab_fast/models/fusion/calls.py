"""Calls in a graph of torch.fx: what they do with the memory of their operands.

"Pure" calls read their operands and return new memory. The fusion may assume only of these that
they neither change nor keep a tensor.
"""

from __future__ import annotations

import inspect
import operator
from collections import OrderedDict
from collections.abc import Collection, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from ... import ops
from ...ops.upsample import upsample
from ..backbones.mobilenet_v2 import pad_same
from .layers import CONVOLUTIONS, NORMS, FoldedASPP, FusedConv2d

RELUS = {F.relu, F.relu_, torch.relu, torch.relu_, "relu", "relu_"}
ADDS = {operator.add, operator.iadd, torch.add, "add", "add_"}
DROPOUTS = {F.dropout, F.dropout2d, F.alpha_dropout}
# Functions that are nodes of a graph. Tracing into upsample would keep one of its branches.
OWN_FUNCTIONS: tuple[Any, ...] = (
    upsample,
    pad_same,
    *(function for function in map(ops.__dict__.get, ops.__all__) if inspect.isfunction(function)),
)  # fmt: skip
# Modules and functions that read their operands and return new memory, unless they work in place.
PURE_MODULES = (
    FusedConv2d, FoldedASPP, *CONVOLUTIONS, *NORMS, nn.ConvTranspose2d, nn.Linear, nn.MaxPool2d,
    nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.Upsample, nn.UpsamplingBilinear2d, nn.ReLU, nn.ReLU6,
    nn.Hardtanh, nn.SiLU, nn.Hardswish, nn.Hardsigmoid, nn.GELU, nn.Sigmoid, nn.LeakyReLU, nn.ELU,
    nn.LayerNorm, nn.GroupNorm,
)  # fmt: skip
TENSOR_FUNCTIONS = {
    torch.cat, torch.relu, torch.sigmoid, torch.mean, F.relu, F.relu6, F.silu, F.hardswish,
    F.hardsigmoid, F.gelu, F.interpolate, F.max_pool2d, F.avg_pool2d, F.adaptive_avg_pool2d,
    F.batch_norm, F.conv2d, F.linear, F.pad, upsample, pad_same, "relu", "sigmoid", "mean", "clone",
}  # fmt: skip
OPERATORS = {
    operator.add, operator.sub, operator.mul, operator.truediv, operator.floordiv, torch.add,
    torch.mul, "add", "mul", "sub",
}  # fmt: skip
PURE_FUNCTIONS = TENSOR_FUNCTIONS | OPERATORS | {"size", "dim"}
# Names of the operands after the first of functions that may work in place.
OPTIONS: dict[Any, tuple[str, ...]] = {
    F.batch_norm: ("running_mean", "running_var", "weight", "bias", "training"),
    **dict.fromkeys((F.relu, F.relu6, F.silu, F.hardswish, F.hardsigmoid), ("inplace",)),
}
# Calls that return a view or a container of their operands and change nothing.
VIEWS = {
    operator.getitem, getattr, OrderedDict, torch.flatten, torch.split, torch.chunk, torch.permute,
    torch.reshape, torch.transpose, torch.unsqueeze, torch.squeeze,
    "view", "reshape", "flatten", "permute", "transpose", "chunk", "split", "expand", "unsqueeze",
    "squeeze", "contiguous", "to",
}  # fmt: skip


def only_user(node: fx.Node) -> fx.Node | None:
    """The call that uses ``node`` as its operand once, if it is the only use."""
    if len(node.users) != 1:
        return None
    (user,) = node.users
    uses = [other for other in user.all_input_nodes if other is node]
    return user if len(uses) == 1 and user.op != "output" else None


def between(first: fx.Node, last: fx.Node) -> Iterator[fx.Node]:
    node = first.next
    while node is not last and node.op != "root":
        yield node
        node = node.next


def is_view(node: fx.Node) -> bool:
    return node.op == "get_attr" or is_call_of(node, VIEWS)


def is_call_of(node: fx.Node, functions: Collection[Any]) -> bool:
    return node.op in ("call_function", "call_method") and node.target in functions


def is_no_dropout(node: fx.Node) -> bool:
    """True for a functional dropout that returns its input."""
    if not is_call_of(node, DROPOUTS) or not node.args:
        return False
    training = node.args[2] if len(node.args) > 2 else node.kwargs.get("training", True)
    return training is False
