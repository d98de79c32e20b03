"""The emulator's sm_90a: mbarriers, bulk tensor copies, wgmma and clusters, and faults with them."""

from __future__ import annotations

import ctypes
import re

import numpy as np
import pytest

from .test_emulator import build_folder, compile_emulated  # noqa: F401

SEEDS = range(12)
STEPS, TILE = 6, 64

# Integers that bf16 has, and sums of theirs that it need not have.
INPUT = np.random.default_rng(90).integers(1, 200, (STEPS, TILE)).astype(np.float32)


# Faults.


@pytest.fixture(scope="module")
def fault_library(build_folder) -> ctypes.CDLL:  # noqa: F811
    library = ctypes.CDLL(str(compile_emulated("hopper_faults", build_folder)))
    library.run_fault.restype = ctypes.c_char_p
    library.run_fault.argtypes = [ctypes.c_char_p, ctypes.c_bool, ctypes.c_uint64] + [
        ctypes.c_void_p
    ] * 2
    library.can_encode.restype = ctypes.c_bool
    return library


def run(library: ctypes.CDLL, name: str, fault: bool, seed: int) -> str | None:
    """What shows that the kernel is wrong: the emulator's message, or "wrong output"."""
    memory = np.zeros(INPUT.size + 4, np.float32)
    data = memory[-memory.ctypes.data % 16 // 4 :][: INPUT.size]
    data[:] = INPUT.ravel()
    output = np.full(TILE, np.nan, np.float32)
    message = library.run_fault(name.encode(), fault, seed, output.ctypes.data, data.ctypes.data)
    if message is not None:
        return message.decode()
    expected = (INPUT.sum(0) if name.startswith("sum_") else INPUT[0])[::-1]
    return None if np.array_equal(output, expected) else "wrong output"


# What the faulty kernels must be caught by: a message on every seed, on some seeds where a fault
# shows by chance, or wrong output on some.
MESSAGES = {
    "init_fence": r"cp_async_bulk_tensor at .+: no fence.mbarrier_init since",
    "expects_more": r"block \(0, 0, 0\) waits for ever; warp 0: lanes 0-31 in mbarrier_try_wait",
    "expects_less": r"cp_async_bulk_tensor at .+: brought more bytes than the mbarrier was told",
    "arrivals": r"mbarrier_arrive at .+: more arrivals than the mbarrier expects",
    "unaligned_copy": r"cp_async_bulk_tensor at .+: offset 16 in shared memory is no multiple of",
    "proxy_fence": r"wgmma at .+ was written since the last fence.proxy.async",
    "wgmma_fence": r"wgmma at .+: no wgmma.fence since the registers were last within reach",
    "wgmma_never_waited": r"exited with 1 asynchronous operations never waited for",
    "descriptor": r"wgmma at .+: the matrix does not start at a multiple of 1024 bytes",
    "registers": r"block \(0, 0, 0\) waits for ever; warp 0: .*setmaxnreg_inc at",
}
MESSAGES_ON_SOME = {
    "init_sync": r"mbarrier_try_wait_parity at .+: this is no mbarrier: it was not initialised",
    "copy_never_waited": r"block \(0, 0, 0\) exited with 1 asynchronous operations under way",
    "proxy_fence_order": r"wgmma at .+ was written since the last fence.proxy.async",
    "sum_refill": r"waits for ever",
    "cluster_init": r"cp_async_bulk_tensor_multicast at .+: this is no mbarrier",
    "cluster_exit": r"mbarrier_arrive_cluster at .+: block [01] of the cluster has exited",
}
WRONG_OUTPUT = [
    "copy_wait",
    "try_once",
    "parity",
    "wgmma_wait",
    "sum_wgmma_refill",
    "sum_cluster_refill",
]


@pytest.mark.parametrize("name", [*MESSAGES, *MESSAGES_ON_SOME, *WRONG_OUTPUT])
def test_correct_kernels_pass_on_every_seed(fault_library, name):
    for seed in SEEDS:
        assert run(fault_library, name, False, seed) is None, f"seed {seed}"


@pytest.mark.parametrize("name", MESSAGES)
def test_faults_that_fail_the_launch(fault_library, name):
    for seed in SEEDS:
        caught = run(fault_library, name, True, seed)
        assert caught is not None and re.search(MESSAGES[name], caught), (seed, caught)


@pytest.mark.parametrize("name", MESSAGES_ON_SOME)
def test_faults_that_fail_some_launches(fault_library, name):
    caught = [run(fault_library, name, True, seed) for seed in SEEDS]
    assert any(message and re.search(MESSAGES_ON_SOME[name], message) for message in caught[:6])


@pytest.mark.parametrize("name", WRONG_OUTPUT)
def test_faults_that_spoil_the_output(fault_library, name):
    caught = [run(fault_library, name, True, seed) for seed in SEEDS]
    assert "wrong output" in caught[:6], caught
