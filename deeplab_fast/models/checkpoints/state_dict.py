"""The state dict in a checkpoint, without what training scripts put around it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeAlias

from torch import Tensor

from .torch_file import Inert, tensors_of_module

State: TypeAlias = dict[str, Tensor]

# Keys under which training scripts save the state dict: Lightning, jfzhang95, mmsegmentation and
# timm; torchvision; VainF; tutorials of PyTorch.
_WRAPPERS = ("state_dict", "model", "model_state", "model_state_dict")

# Prefixes of DataParallel, torch.compile and a model inside a LightningModule, stacked in any order
_PREFIXES = ("module.", "_orig_mod.", "model.", "net.")


def state_dict_of(content: Any) -> tuple[State, Mapping[str, Any]]:
    """The tensors in a file's content, and the outermost dict, which may describe them.

    Raises:
        ValueError: there are none; the message says what there is instead.
    """
    outermost = content if isinstance(content, Mapping) else {}
    while isinstance(content, Mapping):
        inner = (content.get(key) for key in _WRAPPERS)
        wrapped = next((item for item in inner if isinstance(item, (Mapping, Inert))), None)
        if wrapped is None:
            break
        content = wrapped
    if isinstance(content, Inert):
        content = tensors_of_module(content)
    state = _tensors(content) if isinstance(content, Mapping) else {}
    if not state:
        raise ValueError(
            f"expected the state dict of a network, got {_summary(outermost, content)}"
        )
    return _without_prefixes(state), outermost


def _tensors(content: Mapping[Any, Any]) -> State:
    return {
        key: value
        for key, value in content.items()
        if isinstance(key, str) and isinstance(value, Tensor)
    }


def _without_prefixes(state: State) -> State:
    """The state dict of the network inside its wrappers.

    A prefix is removed if most keys have it. Tensors without it, such as the buffers of a
    LightningModule's loss, are left out.
    """
    while state:
        for prefix in _PREFIXES:
            inner = {key[len(prefix) :]: state[key] for key in state if key.startswith(prefix)}
            if 2 * len(inner) > len(state):
                state = inner
                break
        else:
            break
    return state


def _summary(outermost: Mapping[Any, Any], content: Any) -> str:
    if not outermost:
        return f"a {type(content).__name__}" if content is not None else "a dict without tensors"
    first = ", ".join(str(key) for key in list(outermost)[:3])
    return f"a dict of {len(outermost)} entries ({first}, ...)"


def renamed(state: State, table: Mapping[str, str | None]) -> State:
    """The state dict with the prefixes of its keys replaced.

    Args:
        table: prefix -> what replaces it, or None to leave its tensors out. The first that fits is
            taken, and a key without any of them stays as it is.
    """
    result = {}
    for key, tensor in state.items():
        prefix = next((prefix for prefix in table if key.startswith(prefix)), "")
        replacement = table.get(prefix, "")
        if replacement is not None:
            result[replacement + key.removeprefix(prefix)] = tensor
    return result


def rotate_channels(state: State, key: str, count: int, dim: int = 1) -> None:
    """Move the first ``count`` channels of a weight behind the others, in place.

    Projects concatenate features in different orders.
    """
    if key in state:
        state[key] = state[key].roll(-count, dim)
