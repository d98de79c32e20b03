"""CUDA graphs of the calls of a model, so that a repeated call costs one launch on the host."""

from __future__ import annotations

import contextlib
import logging
import math
import operator
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from itertools import chain
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _global_forward_hooks, _global_forward_pre_hooks

from .._native.device_cache import kept_by_capture
from .._native.precision import tf32_is_allowed
from ..backends import registry
from ..ops import _transforms
from .segmentation import SegmentationModel

_T = TypeVar("_T", Tensor, OrderedDict[str, Tensor])

# Number of the call that is captured. The calls before it are the warm-up, which makes work lists
# and lets cuDNN search for its algorithms.
CAPTURED_CALL = 3
# Largest number of graphs, and of keys whose calls are counted. Inputs that alternate between more
# shapes are therefore never captured: each graph would be dropped before it is replayed.
MAX_GRAPHS = 8

_log = logging.getLogger("deeplab_fast")
_one_capture = threading.Lock()  # PyTorch supports one capture at a time in a process


class Gpu:
    """The CUDA calls that :class:`CudaGraphs` needs. Tests replace it by a stand-in."""

    device_type = "cuda"

    def __init__(self) -> None:
        self._stream: torch.cuda.Stream | None = None  # captures that share memory share a stream
        self._replayed: torch.cuda.Event | None = None

    def is_capturing(self) -> bool:
        return torch.cuda.is_current_stream_capturing()

    def capture(
        self, function: Callable[[], _T], device: torch.device, sharing: torch.cuda.CUDAGraph | None
    ) -> tuple[torch.cuda.CUDAGraph, _T]:
        """A graph of ``function``, and the result that its replays overwrite.

        ``sharing`` is a graph that was captured here before and still exists, or None. Both graphs
        use the same memory for temporary tensors.

        If the capture fails, the current stream and PyTorch's allocator are as before.
        """
        graph = torch.cuda.CUDAGraph()
        with _one_capture, torch.cuda.device(device):
            # The handle of a pool is invalid once the last graph that used it is gone.
            pool = sharing.pool() if sharing else torch.cuda.graph_pool_handle()
            stream = self._stream = self._stream or torch.cuda.Stream()
            current = torch.cuda.current_stream()
            stream.wait_stream(current)
            try:
                # The outer context restores the current stream. torch.cuda.graph does not if the
                # capture fails.
                with (
                    torch.cuda.stream(stream),
                    torch.cuda.graph(graph, pool, stream, capture_error_mode="thread_local"),
                ):
                    result = function()
            except BaseException:
                graph.reset()
                # Old versions of torch keep allocating from the pool after a failure. Newer ones
                # stop in reset(), and there this call raises an error.
                with contextlib.suppress(RuntimeError):
                    torch._C._cuda_endAllocateToPool(device.index, pool)
                raise
            finally:
                current.wait_stream(stream)
        return graph, result

    @contextlib.contextmanager
    def turn(self, device: torch.device) -> Iterator[None]:
        """Run the block's work on the current stream after that of earlier blocks on any stream."""
        stream = torch.cuda.current_stream(device)
        replayed = self._replayed = self._replayed or torch.cuda.Event()
        stream.wait_event(replayed)
        try:
            yield
        finally:
            replayed.record(stream)

    def wait(self) -> None:
        """Wait until the GPU has run all blocks of :meth:`turn`."""
        if self._replayed:
            self._replayed.synchronize()


class _Graph(NamedTuple):
    """A captured call.

    A graph contains addresses, and each has an owner: ``images`` and ``output`` are here, and
    ``kept`` holds the work lists. Temporary tensors are in the memory pool of the graph itself. The
    weights are owned by :class:`_Weights`.
    """

    graph: Any
    images: Tensor
    output: Any
    kept: list[object]


class _Weights:
    """The parameters and buffers of a module, whose addresses the graphs contain."""

    def __init__(self, module: nn.Module) -> None:
        # Every call checks these dicts. Walking the modules instead would take ten times as long.
        modules = list(module.modules())
        self._hooks = [h for m in modules for h in (m._forward_hooks, m._forward_pre_hooks)]
        dicts = [members for m in modules for members in (m._modules, m._parameters, m._buffers)]
        self._empty = [members for members in dicts if not members]
        self._full: list[dict[str, Any]] = [members for members in dicts if members]
        self._members = list(self._current_members())  # so that their ids stay unique
        self._ids = list(map(id, self._members))
        self._tensors = [member for member in self._members if isinstance(member, Tensor)]
        self._addresses = list(map(Tensor.data_ptr, self._tensors))

    def _current_members(self) -> Iterator[Any]:
        return chain.from_iterable(map(dict.values, self._full))

    def are_those_of(self, module: nn.Module) -> bool:
        """False if a submodule, a parameter or its memory was replaced. Values may have changed."""
        return (
            module._modules is self._full[0]
            and not any(self._empty)
            and list(map(id, self._current_members())) == self._ids
            and list(map(Tensor.data_ptr, self._tensors)) == self._addresses
        )

    def need_eager_calls(self) -> bool:
        """True if a replay would skip a hook, or a gradient or autocast's cached copy of a weight.

        Autocast caches copies of weights that require a gradient, and frees them when it ends.
        """
        return (
            any(self._hooks)
            or bool(_global_forward_hooks or _global_forward_pre_hooks)
            or any(map(operator.attrgetter("requires_grad"), self._tensors))
        )


class CudaGraphs:
    """CUDA graphs of the calls of a module, by method, shape of the images and global settings.

    A call is captured when its key comes the third time. It is replayed from then on, with the same
    results, until the key is the least recently used of more than 8. A replay copies the images
    into memory that the graph reads, and the results out of memory that the graph writes. The
    graphs share the memory of temporary tensors, so they must not run at the same time: a lock
    orders the threads, and an event orders the streams. The caller's current stream waits for the
    previous replay, the host never does.

    Calls run without a graph on devices other than GPUs, while another graph is being captured,
    where something has to see each op (gradients, forward hooks, torch.compile, export, tracing,
    torch.func, dispatch modes, :func:`registry.trace`), and where the capture failed.

    Copies and pickles of this object have no graphs.

    Args:
        make_gpu: returns an object with the methods of :class:`Gpu`.
    """

    def __init__(self, make_gpu: Callable[[], Gpu] = Gpu) -> None:
        self._make_gpu = make_gpu
        self._gpu = make_gpu()
        self._lock = threading.Lock()
        self._graphs: OrderedDict[Hashable, _Graph] = OrderedDict()
        self._calls: OrderedDict[Hashable, float] = OrderedDict()  # -inf: cannot be captured
        self._weights: _Weights | None = None
        self._enabled = True

    def __reduce__(self) -> tuple[Any, ...]:
        return CudaGraphs, (self._make_gpu,)

    def __call__(
        self, module: SegmentationModel, function: Callable[..., _T], images: Tensor, *options: Any
    ) -> _T:
        """``function(images, *options)``, a method of ``module`` that returns new tensors."""
        if not self._enabled or not self._is_plain_call(images):
            return function(images, *options)
        try:
            return self._replay_or_run(module, function, images, options)
        except torch.OutOfMemoryError:
            if not self._graphs:
                raise
            self.clear()
            self._enabled = False
            _log.debug("CUDA graphs are off, because the GPU is out of memory")
        return function(images, *options)

    def clear(self) -> None:
        """Drop all graphs and their memory, after the GPU has run them."""
        with self._lock:
            self._clear()

    def _clear(self) -> None:
        self._gpu.wait()
        self._gpu = self._make_gpu()
        self._graphs.clear()
        self._calls.clear()
        self._weights = None

    def _is_plain_call(self, images: Tensor) -> bool:
        """False if only PyTorch can run the ops of this call."""
        return (
            not torch.compiler.is_compiling()
            and not torch.jit.is_tracing()
            and type(images) is Tensor
            and images.device.type == self._gpu.device_type
            and images.numel() > 0
            and not (images.requires_grad and torch.is_grad_enabled())
            and not _transforms.active()
            and not torch._C._len_torch_dispatch_stack()
            and not registry.is_tracing()
            and not self._gpu.is_capturing()
        )

    def _replay_or_run(
        self,
        module: SegmentationModel,
        function: Callable[..., _T],
        images: Tensor,
        options: tuple[Any, ...],
    ) -> _T:
        key = (
            function.__name__,
            repr(options),  # they may be unhashable
            module.align_corners,
            (images.shape, images.stride(), images.dtype, images.device),
            *_settings(images.device.type),
        )
        with self._lock:
            if self._weights and not self._weights.are_those_of(module):
                self._clear()
            weights = self._weights = self._weights or _Weights(module)
            is_captured = key in self._graphs
            needs_eager_call = weights.need_eager_calls()
            if is_captured and not needs_eager_call:
                return self._replay(key, images)
        result = function(images, *options)
        if not is_captured and not needs_eager_call:
            with self._lock:
                # Another thread may have captured this call or replaced the weights.
                if weights is self._weights and key not in self._graphs:
                    self._count(key, function, images, options)
        return result

    def _replay(self, key: Hashable, images: Tensor) -> Any:
        self._graphs.move_to_end(key)
        captured = self._graphs[key]
        with self._gpu.turn(images.device):
            captured.images.copy_(images)
            captured.graph.replay()
            return _clone(captured.output)

    def _count(
        self,
        key: Hashable,
        function: Callable[..., Any],
        images: Tensor,
        options: tuple[Any, ...],
    ) -> None:
        """Count a call that has just run in this thread, and capture it if it is the third."""
        calls = self._calls.pop(key, 0) + 1
        if calls < CAPTURED_CALL:
            self._calls[key] = calls
            if len(self._calls) > MAX_GRAPHS:
                self._calls.popitem(last=False)
            return
        if len(self._graphs) == MAX_GRAPHS:
            self._gpu.wait()
            self._graphs.popitem(last=False)
        sharing = next(iter(self._graphs.values())).graph if self._graphs else None
        try:
            static = torch.empty_like(images)
            with kept_by_capture() as kept:
                graph, output = self._gpu.capture(
                    lambda: function(static, *options), images.device, sharing
                )
        except Exception as error:
            self._calls[key] = -math.inf
            reason = str(error).partition("\n")[0]
            _log.debug(
                "%s of images %s runs without a CUDA graph: %s: %s",
                function.__name__.lstrip("_"),
                tuple(images.shape),
                type(error).__name__,
                reason,
            )
        else:
            self._graphs[key] = _Graph(graph, static, output, kept)


def _settings(device_type: str) -> tuple[Hashable, ...]:
    """The global settings that results or the choice of kernels depend on."""
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    autocast = torch.is_autocast_enabled(device_type)
    return (
        registry.current(),
        registry.plans_version(),
        torch.are_deterministic_algorithms_enabled(),
        cudnn.enabled,
        cudnn.benchmark,
        cudnn.deterministic,
        tf32_is_allowed(),
        getattr(matmul, "fp32_precision", None) or matmul.allow_tf32,
        autocast and torch.get_autocast_dtype(device_type),
        # Tensors made in inference mode cannot be written outside of it.
        torch.is_inference_mode_enabled(),
    )


def _clone(output: Any) -> Any:
    if isinstance(output, Tensor):
        return output.clone()
    return type(output)((name, tensor.clone()) for name, tensor in output.items())
