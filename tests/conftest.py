"""Fixtures for all tests: a parameter for each available backend, and poisoned memory."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

# Without a GPU the Triton kernels run in Triton's interpreter, which Triton decides at its import.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

from deeplab_fast.backends import registry  # noqa: E402

from .support import emulator  # noqa: E402  registers the backend, and builds nothing yet
from .support.backends import device_of, is_interpreted, set_tf32  # noqa: E402

if "PYTEST_XDIST_WORKER_COUNT" in os.environ:  # workers share the cores
    torch.set_num_threads(
        max(1, torch.get_num_threads() // int(os.environ["PYTEST_XDIST_WORKER_COUNT"]))
    )


def pytest_report_header() -> str:
    """The CPU, which decides how PyTorch convolves, and where the emulator is compiled."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return ", ".join([
        f"cpu: {names[0] if names else 'unknown'}",
        torch.backends.cpu.get_cpu_capability(),
        f"oneDNN limited to {os.environ.get('ONEDNN_MAX_CPU_ISA', 'nothing')}",
        f"torch {torch.__version__}",
        f"emulator compiled on its first use, in {emulator.FOLDER.relative_to(emulator.ROOT)}",
    ])  # fmt: skip


SHARED_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run a test that has a ``backend`` argument on every available kernel of its module's ``OP``.

    "cuda/sm90" is left out: on a GPU that can run it, "cuda" is the same kernel.
    """
    if "backend" in metafunc.fixturenames:
        names = [
            name
            for name in registry.backends_of(metafunc.module.OP)
            if registry.unavailable_reason(name, device_of(name)) is None and name != "cuda/sm90"
        ]
        metafunc.parametrize("backend", names)


# One layout for each dtype, because Triton's interpreter is slow. That suffices: convolutions
# convert every layout to the same one, the other kernels do not depend on strides, and bf16 is fp32
# there.
INTERPRETED_LAYOUTS = {
    torch.float32: "contiguous",
    torch.bfloat16: "sliced",
    torch.float16: "channels_last",
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        values = item.callspec.params if hasattr(item, "callspec") else {}
        if not is_interpreted(values.get("backend", "")):
            continue
        layout = INTERPRETED_LAYOUTS.get(values.get("dtype"))
        if layout and values.get("layout", layout) != layout:
            reason = f"Triton's interpreter: {values['dtype']} is tested in {layout}"
            item.add_marker(pytest.mark.skip(reason=reason))
        elif values.get("dtype") == torch.bfloat16 and getattr(values.get("case"), "C", 8) != 8:
            reason = "Triton's interpreter: bf16, which is fp32 there, is tested with 8 channels"
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture
def device(backend: str) -> str:
    return device_of(backend)


@pytest.fixture(autouse=True)
def poisoned_memory():
    """Uninitialised tensors hold NaN (or the largest integer), so an unwritten output shows."""
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def new_plans():
    """Plans of another test, which may have replaced a kernel or changed the emulated device."""
    registry.forget_plans()


@pytest.fixture(autouse=True)
def full_fp32():
    """Forbid TF32, to which torch lets fp32 convolutions round by default."""
    before = set_tf32(False)
    yield
    set_tf32(before)


@pytest.fixture
def tf32(full_fp32):
    set_tf32(True)


@pytest.fixture
def opcheck():
    """torch.library.opcheck. Some versions of torch need the package expecttest for it."""
    try:
        import torch.testing._internal.optests  # noqa: F401
    except ModuleNotFoundError as error:
        if error.name != "expecttest":
            raise
        pytest.skip("torch.library.opcheck needs expecttest with this torch")
    return torch.library.opcheck


@pytest.fixture
def shared_data() -> Path:
    """The folder of real weights and images that is not part of the project."""
    if not SHARED_DATA.is_dir():
        pytest.skip(
            f"no real weights here: {SHARED_DATA.name} folder beside the checkout is absent"
        )
    return SHARED_DATA


@pytest.fixture(scope="module")
def one_thread():
    """Limit torch to one thread, for networks so small that a second thread slows them down."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def ran():
    """The (op, backend) pairs that ran during the test."""
    with registry.trace() as pairs:
        yield pairs
