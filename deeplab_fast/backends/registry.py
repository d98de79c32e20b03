"""Registry of kernels, and the choice of the one that runs a call.

A kernel is registered where it is defined, with :func:`register_kernel`. An op calls :func:`run`,
which picks the backend that the caller forced. If none is forced, it picks the first backend in the
automatic order that has the op, is available on this machine and supports the call. ``reference``
supports every call.

The choice, and everything else that depends on the shapes of a call but not on its numbers, is made
at the first call of these shapes and kept as a :class:`Plan`.

On a GPU the reference of a convolution is a kernel of a vendor library, cuDNN. A kernel of ours is
preferred only if it was measured to be faster: in the dispatch table, for the shape bucket of the
call, or in a race at the first call of these shapes. PyTorch's deterministic mode prefers ours.
"""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any, Literal, NamedTuple, TypeVar

import torch
from torch import Tensor

from .._native import _C
from .._native.device_cache import DeviceCache, is_capturing
from .._native.precision import tf32_is_allowed
from . import dispatch_table, race

NAMES = ("cuda", "cuda/sm90", "cuda/sm80", "triton", "cpu", "reference")

# Order of preference by device type, for ops that no vendor library has. Other devices (mps, xpu,
# ...) have the reference only.
_AUTOMATIC = {
    "cuda": ("cuda", "triton", "reference"),
    "cpu": ("cpu", "reference"),
}

Reason = str | None
_F = TypeVar("_F", bound=Callable[..., Any])


class Target(NamedTuple):
    """The device that kernels of a backend are launched on."""

    context: Any  # the first argument of its kernels
    stream: Callable[[], int]  # the current stream of the device
    # A context manager that makes the device the current one, or None if it is.
    guard: Callable[[], AbstractContextManager[Any] | None]


class Backend(NamedTuple):
    """Availability, launch target and loader of a backend; see :func:`register_backend`."""

    unavailable_reason: Callable[[str], Reason]  # device type -> why it cannot run there, or None
    target: Callable[[torch.device], Target] | None
    load: Callable[[], object] | None  # imports the modules that register its kernels


class Kernel(NamedTuple):
    """Implementation of an op on a backend."""

    run: Callable[..., Any]
    unsupported_reason: Callable[[Any], Reason]  # arguments -> why it cannot compute them, or None
    makes_plan: bool = False  # True if ``run`` is a function of :func:`register_planned_kernel`


class Plan(NamedTuple):
    """A kernel that is ready to run all calls of the same shapes."""

    backend: str
    call: Callable[..., Any]  # function of the stream, if there is a target, and of the arguments
    target: Target | None


class FixableReason(str):
    """Reason why a backend is unavailable, which the user can fix.

    If the automatic choice skips a backend for such a reason, a warning gives the reason once.
    """


_backends: dict[str, Backend] = {}
_kernels: dict[str, dict[str, Kernel]] = {}
_argument_types: dict[str, Callable[..., Any]] = {}
_checks: dict[str, Callable[[Any], None]] = {}
_plans: DeviceCache[Plan] = DeviceCache()
_plans_version = 0
shape_buckets: dict[str, Callable[[Any], str]] = {}
_forced = ""  # a plain global: torch.compile guards on it, unlike a ContextVar
_trace: list[tuple[str, str]] | None = None


def register_backend(
    name: str,
    unavailable_reason: Callable[[str], Reason],
    target: Callable[[torch.device], Target] | None = None,
    load: Callable[[], object] | None = None,
) -> None:
    """Register a backend.

    Args:
        name: the name that :class:`backend` takes.
        unavailable_reason: called with a device type; returns why the backend cannot run on such
            devices here, or None.
        target: called with a device; returns what kernels are launched on. None for kernels that
            take the op's arguments alone.
        load: imports the modules that register its kernels, before the first of them is used.
    """
    _backends[name] = Backend(unavailable_reason, target, load)


def _supports_everything(arguments: Any) -> Reason:
    return None


def register_kernel(
    op: str, *backends: str, unsupported_reason: Callable[[Any], Reason] = _supports_everything
) -> Callable[[_F], _F]:
    """Decorator that registers a function as the kernel of ``op`` on these backends.

    The function gets the op's arguments as one object of ``backends/arguments.py``, after the
    launch context if its backend has a target. ``unsupported_reason`` gets the same object.
    """
    return functools.partial(_register, op, backends, unsupported_reason, False)


def register_planned_kernel(
    op: str, *backends: str, unsupported_reason: Callable[[Any], Reason] = _supports_everything
) -> Callable[[_F], _F]:
    """Decorator like :func:`register_kernel`, for backends with a target.

    The function gets the launch context and the arguments of a first call. It returns the function
    of (stream, arguments) that computes this call and all others of the same shapes, strides,
    dtypes and options. Addresses may differ.
    """
    return functools.partial(_register, op, backends, unsupported_reason, True)


def _register(
    op: str,
    backends: Sequence[str],
    unsupported_reason: Callable[[Any], Reason],
    makes_plan: bool,
    function: _F,
) -> _F:
    for name in backends:
        add_kernel(op, name, Kernel(function, unsupported_reason, makes_plan))
    return function


def add_kernel(op: str, name: str, kernel: Kernel) -> None:
    """Add a kernel to a backend, such as one that another backend has already."""
    _kernels.setdefault(op, {})[name] = kernel


def register_op(
    op: str,
    arguments_type: Callable[..., Any],
    shape_bucket: Callable[[Any], str] | None = None,
    check: Callable[[Any], None] | None = None,
) -> None:
    """Register an op.

    Args:
        arguments_type: the op's class in ``backends/arguments.py``.
        shape_bucket: function of the arguments that returns their shape bucket. The automatic
            choice on a GPU depends on the measurements of that bucket. None for ops that no vendor
            library has.
        check: function of the arguments that raises an exception if they do not fit.
    """
    _argument_types[op] = arguments_type
    if check:
        _checks[op] = check
    if shape_bucket:
        shape_buckets[op] = shape_bucket


def arguments(op: str, *values: Any) -> Any:
    """The arguments of a call of ``op`` as one object."""
    return _argument_types[op](*values)


def _kernel(op: str, name: str) -> Kernel | None:
    if name in _backends and (load := _backends[name].load):
        load()
        _backends[name] = _backends[name]._replace(load=None)
    return _kernels[op].get(name)


def reference(op: str) -> Callable[[Any], Any]:
    """The function that states ``op`` in PyTorch's own operators."""
    return _kernels[op]["reference"].run


def unavailable_reason(name: str, device_type: str) -> Reason:
    """Why backend ``name`` cannot run on devices of this type on this machine; None if it can."""
    if name not in _backends:
        return "this installation has no such kernels"
    return _backends[name].unavailable_reason(device_type)


def is_available(name: str, device_type: str) -> bool:
    return unavailable_reason(name, device_type) is None


def available_backends(device: str | torch.device = "cpu") -> list[str]:
    """The backends that can run on ``device`` on this machine.

    >>> available_backends("cpu")
    ['cpu', 'reference']
    """
    device_type = torch.device(device).type
    return [name for name in NAMES if is_available(name, device_type)]


class backend(contextlib.ContextDecorator):
    """Force every op inside the ``with`` block onto one backend.

    The setting applies to all threads of the process, because torch.compile cannot guard on the
    state of a thread. Blocks can be nested. The same object can be entered several times, as in a
    recursive function that it decorates.

    Args:
        name: "cuda", "triton", "cpu" or "reference". "cuda/sm90" and "cuda/sm80" force the
            convolutions for that compute capability, where "cuda" picks the newest that the GPU
            runs.

    Raises:
        ValueError: ``name`` is not one of these.
        RuntimeError: an op in the block cannot run on the backend; the message gives the reason.

    >>> with backend("reference"):
    ...     labels = upsample_argmax(logits, size=(513, 513))
    """

    def __init__(self, name: str) -> None:
        if not isinstance(name, str):
            raise TypeError(f"name: expected one of {', '.join(NAMES)}, got {name!r}")
        if name not in _backends:
            raise ValueError(f"unknown backend {name!r}: expected one of {', '.join(NAMES)}")
        self.name = name
        self._outer: list[str] = []

    def __enter__(self) -> None:
        global _forced
        self._outer.append(_forced)
        _forced = self.name

    def __exit__(self, *exception: object) -> None:
        global _forced
        _forced = self._outer.pop()


def ops() -> list[str]:
    """The names of all ops, backward ops included."""
    return list(_argument_types)


def backends_of(op: str) -> list[str]:
    """The backends that have a kernel for ``op``, whether or not they are available here."""
    names = dict.fromkeys((*NAMES, *_backends))
    return [name for name in names if _kernel(op, name) is not None]


def kernels_of(name: str) -> dict[str, Kernel]:
    """The kernels that backend ``name`` has, by op."""
    return {op: kernel for op in _kernels if (kernel := _kernel(op, name)) is not None}


def current() -> str:
    """The forced backend, or "" if the choice is automatic. It is passed on as an op argument."""
    return _forced


def unsupported_reason(op: str, name: str, arguments: Any) -> Reason:
    """Why backend ``name`` cannot run this call of ``op``; None if it can."""
    if reason := unavailable_reason(name, arguments[0].device.type):
        return reason
    kernel = _kernel(op, name)
    return f"it has no {op} kernel" if kernel is None else kernel.unsupported_reason(arguments)


def order(device_type: str) -> tuple[str, ...]:
    """The automatic order of preference for ops that no vendor library has."""
    return _AUTOMATIC.get(device_type, ("reference",))


def depends_on_measurements(op: str, device_type: str) -> bool:
    """True if a vendor library has the op too, so that measurements decide which kernel is used."""
    return device_type == "cuda" and op in shape_buckets


class Preference(NamedTuple):
    """Backends in order of preference, and what the order is based on."""

    order: tuple[str, ...]
    basis: Literal["device", "deterministic mode", "dispatch table", "race", "no race yet", "none"]


def preference(op: str, arguments: Any) -> Preference:
    """The order of preference for this call of ``op``, from what is known without a race."""
    device = arguments[0].device
    if not depends_on_measurements(op, device.type):
        return Preference(order(device.type), "device")
    if torch.are_deterministic_algorithms_enabled():
        # Our kernels are deterministic, and which kernel runs must not depend on times.
        return Preference(order(device.type), "deterministic mode")
    buckets = dispatch_table.fastest_kernels(device).get(op)
    if buckets and (bucket := shape_buckets[op](arguments)) in buckets:
        return Preference((*buckets[bucket], "reference"), "dispatch table")
    if not torch.backends.cudnn.benchmark:
        return Preference(("reference",), "none")
    times = race.remembered(op, arguments)
    if times is None:
        return Preference(("reference",), "no race yet")
    ranking = sorted(times, key=times.__getitem__)
    faster = ranking[: ranking.index("reference")] if "reference" in times else ()
    return Preference((*faster, "reference"), "race")


def automatic(op: str, arguments: Any) -> tuple[str, ...]:
    """The order of preference for this call of ``op``. If a race is due, it takes place now."""
    known = preference(op, arguments)
    if known.basis == "no race yet" and _may_measure():
        race.run(op, arguments, {name: prepared(op, name) for name in _racing(op, arguments)})
        known = preference(op, arguments)
    return known.order


def supporting_kernels(op: str, arguments: Any) -> list[str]:
    """The kernels of the dispatch table that support a call."""
    return [
        name for name in dispatch_table.KERNELS if unsupported_reason(op, name, arguments) is None
    ]


def _racing(op: str, arguments: Any) -> list[str]:
    """The kernels that race: cuDNN, and the compiled kernels that support the call.

    Triton's races only if there is no compiled one, because its own compilation takes seconds.
    """
    names = supporting_kernels(op, arguments)
    if len(names) > 1 and "triton" in names:
        names.remove("triton")
    return [*names, "reference"]


def prepared(op: str, name: str) -> Callable[[Any], Any]:
    """A function that runs ``op`` on backend ``name``, always with arguments of the same shapes.

    It makes its own plan, at its first call.
    """
    plan: Plan | None = None

    def call(arguments: Any) -> Any:
        nonlocal plan
        plan = plan or _plan_on(name, _kernels[op][name], arguments)
        if plan.target is None:
            return plan.call(arguments)
        with plan.target.guard() or contextlib.nullcontext():
            return plan.call(plan.target.stream(), arguments)

    return call


def _may_measure() -> bool:
    """False while torch.compile compiles, or a CUDA graph is captured on the current stream."""
    return not (is_capturing() or torch.compiler.is_compiling())


def run(op: str, *values: Any, backend: str = "") -> Any:
    """Run ``op`` on ``backend``, or on the automatic choice if that is "".

    The op runs on the device of its first argument, which is a tensor. Autocast is off inside,
    because the public function has already cast the arguments, and the outputs must have the dtypes
    of the fake.

    Raises:
        RuntimeError: the backend cannot run this call; the message gives the reason.
    """
    arguments = _argument_types[op](*values)
    device = arguments[0].device
    # The first check is three times as fast as the second one.
    if torch._C._is_any_autocast_enabled() and torch.is_autocast_enabled(device.type):
        with torch.autocast(device.type, enabled=False):
            return run(op, *values, backend=backend)
    key = (op, backend, device, *_modes(arguments[0]), _C.call_signature(values, device))
    plan = _plans.find(key)
    if plan is None:
        plan = _make_plan(op, backend, arguments)
        # Where no race is possible, a later call may still race and choose another kernel.
        if _may_measure():
            _plans.add(key, plan, device)
    if _trace is not None:
        _trace.append((op, plan.backend))
    _, call, target = plan
    if target is None:
        return call(arguments)
    guard = target.guard()
    if guard is None:
        return call(target.stream(), arguments)
    with guard:
        return call(target.stream(), arguments)


def forget_plans() -> None:
    """Make plans anew, because what the choice of kernels depends on has changed."""
    global _plans_version
    _plans_version += 1
    _plans.clear()


def plans_version() -> int:
    """A number that grows with each :func:`forget_plans`. CUDA graphs contain the old choices."""
    return _plans_version


dispatch_table.changed.append(forget_plans)


def _modes(input: Tensor) -> tuple[bool, ...]:
    """The global settings of torch that plans depend on."""
    is_fp32 = input.dtype == torch.float32
    return (
        torch.are_deterministic_algorithms_enabled(),
        torch._C._get_cudnn_benchmark(),  # the property of torch.backends.cudnn takes longer
        is_fp32 and tf32_is_allowed(),
    )


def _make_plan(op: str, backend: str, arguments: Any) -> Plan:
    if check := _checks.get(op):
        check(arguments)
    for name in (backend,) if backend else automatic(op, arguments):
        reason = unsupported_reason(op, name, arguments)
        if reason is None:
            return _plan_on(name, _kernels[op][name], arguments)
        if isinstance(reason, FixableReason):
            _warn_once(name, reason)
    raise RuntimeError(f"backend {name!r} cannot run {op} on this input: {reason}")


def _plan_on(name: str, kernel: Kernel, arguments: Any) -> Plan:
    make_target = _backends[name].target
    if make_target is None:
        return Plan(name, kernel.run, None)
    target = make_target(arguments[0].device)
    if kernel.makes_plan:
        with target.guard() or contextlib.nullcontext():
            return Plan(name, kernel.run(target.context, arguments), target)

    def call(stream: int, arguments: Any) -> Any:
        return kernel.run(target.context._replace(stream=stream), arguments)

    return Plan(name, call, target)


@functools.cache
def _warn_once(name: str, reason: str) -> None:
    warnings.warn(f"deeplab_fast: backend {name!r} is not used: {reason}", stacklevel=2)


def is_tracing() -> bool:
    """True inside :func:`trace`."""
    return _trace is not None


@contextlib.contextmanager
def trace() -> Iterator[list[tuple[str, str]]]:
    """Collect the (op, backend) pairs that run inside the block, in order.

    >>> with trace() as ran:
    ...     labels = upsample_argmax(logits, size=(513, 513))
    >>> ran
    [('upsample_argmax', 'cpu')]
    """
    global _trace
    outer, _trace = _trace, []
    try:
        yield _trace
    finally:
        _trace = outer
