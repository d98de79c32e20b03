"""Backend ``emulated``: the CUDA kernels compiled for the CPU, to test them without a GPU.

The compiled module ``_emulated`` is built when a test first needs it, and again after an edit under
csrc/. Every launch runs its threads in a random order and lands asynchronous copies at random
moments, repeatably for a seed. A kernel that deadlocks, or that does what CUDA leaves undefined,
raises a RuntimeError that names the kernel, the block, and where each warp waits.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import importlib.machinery
import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from deeplab_fast._native.common import LaunchContext
from deeplab_fast.backends import registry

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "build" / f"emulator-{sys.implementation.cache_tag}"
SHARED_MEMORY = {"sm_80": 163 * 1024, "sm_86": 99 * 1024, "sm_90": 227 * 1024}
"""Bytes of shared memory that a block can have, CUDA C++ Programming Guide, compute capabilities"""

# cmake and ninja may be installed beside a Python that is not on the path.
_PATH = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
_INSTALL = 'pip install --editable ".[test]" in a checkout'

num_ctas = 8  # splits some convolutions of test size along k, and not others
_device = "sm_80"


class BuildError(Exception):
    """The emulator could not be built; the message says why."""


def load() -> Any:
    """Return the compiled module, after building it if it is out of date.

    A module ``_emulated`` on the Python path is used as it is: a build with a sanitizer, say.

    Raises:
        BuildError: the build failed, now or earlier in this process.
    """
    module, problem = _load_once()
    if problem:
        raise BuildError(problem)
    return module


@functools.cache
def _load_once() -> tuple[ModuleType | None, str]:
    """The module, or None and what went wrong: a failed build is not repeated for every test."""
    if importlib.util.find_spec("_emulated"):
        return importlib.import_module("_emulated"), ""
    try:
        path = str(build(FOLDER))
    except BuildError as error:
        return None, str(error)
    loader = importlib.machinery.ExtensionFileLoader("_emulated", path)
    module = importlib.util.module_from_spec(
        importlib.machinery.ModuleSpec("_emulated", loader, origin=path)
    )
    loader.exec_module(module)
    return module, ""


def build(folder: Path, *options: str) -> Path:
    """Compile what changed since the last build in ``folder``, and return the module's path.

    Args:
        folder: CMake's build folder, made if need be. One process at a time works in it.
        options: more options for CMake.
    """
    try:
        import pybind11
    except ImportError:
        raise BuildError(f"the emulator's build needs pybind11: {_INSTALL}") from None
    configure = [
        *("cmake", "-S", str(ROOT), "-B", str(folder), "-G", "Ninja"),
        *shlex.split(os.environ.get("CMAKE_ARGS", "")),
        f"-DPython_EXECUTABLE={sys.executable}",
        f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
        "-DDEEPLAB_FAST_CUDA=OFF",
        *options,
    ]
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        # The compilers inherit the lock. If this process is killed, it is held until they end.
        stamp = folder / "configured_with.txt"
        tools = repr((configure, shutil.which("ninja", path=_PATH), os.environ.get("CXX")))
        if not stamp.exists() or stamp.read_text() != tools:
            stamp.unlink(missing_ok=True)
            _run([*configure, "--fresh"], lock.fileno())
            stamp.write_text(tools)
        _run(["cmake", "--build", str(folder), "--target", "_emulated"], lock.fileno())
    return folder / "_emulated.so"


def _run(command: Sequence[str], lock: int) -> None:
    """Run a command of the build; raise BuildError with its log if it fails."""
    try:
        done = subprocess.run(
            command,
            env=os.environ | {"PATH": _PATH},
            pass_fds=[lock],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
    except FileNotFoundError:
        raise BuildError(f"the emulator's build needs {command[0]}: {_INSTALL}") from None
    if done.returncode != 0:
        raise BuildError(f"the emulator's build failed: {shlex.join(command)}\n{done.stdout}")


@contextlib.contextmanager
def machine(seed: int = 0, device: str = "sm_80") -> Iterator[None]:
    """Run the block's launches with another seed, or on another device.

    Args:
        seed: 0 lands every asynchronous copy when it is issued, 1 as late as its wait allows,
            the others at random moments between. Each seed has its own order of threads.
        device: "sm_80", "sm_86" (and 89) or "sm_90", which has kernels of its own.

    >>> with backend("emulated"), machine(seed=1):
    ...     labels = upsample_argmax(logits, size=(33, 33))
    """
    global _device
    module = load()
    registry.forget_plans()
    outer_device, _device = _device, device
    outer_limit = module.set_shared_memory_limit(SHARED_MEMORY[device])
    outer_seed = module.set_seed(seed)
    try:
        yield
    finally:
        module.set_seed(outer_seed)
        module.set_shared_memory_limit(outer_limit)
        _device = outer_device
        registry.forget_plans()


def _unavailable_reason(device_type: str) -> str | None:
    return None if device_type == "cpu" else f"does not run on {device_type} tensors"


def _target(device: torch.device) -> registry.Target:
    stream = 0  # launches return when they are done
    context = LaunchContext(load().cuda, stream, num_ctas, is_sm90=_device == "sm_90")
    return registry.Target(context, lambda: stream, lambda: None)


registry.register_backend("emulated", _unavailable_reason, _target)
for op, kernel in registry.kernels_of("cuda").items():
    registry.add_kernel(op, "emulated", kernel)
