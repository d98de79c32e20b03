"""The emulator of sm_90a: mbarriers, bulk tensor copies, wgmma, clusters; faults in their use."""

from __future__ import annotations

import ctypes
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from ..emulator.test_emulator import (
    KERNELS,
    aligned,
    bits_of,
    build_folder,  # noqa: F401
    compile_emulated,
    load_instructions,
    random,
    sanitizer_environment,
    small_integers,
    words,
)
from ..support.toolchain import NVCC, ROOT
from .kernels.hopper_faults import load, run

SEEDS = range(12)


# Faults.


@pytest.fixture(scope="module")
def fault_library(build_folder) -> ctypes.CDLL:  # noqa: F811
    return load(str(compile_emulated("hopper_faults", build_folder)))


# How faulty kernels must fail: with a message on every seed; with a message on some seeds, if the
# fault shows only by chance; or with wrong output on some seeds.
NOT_FENCED = r"wgmma at .+ not every lane has seen a fence.proxy.async"
MESSAGES = {
    "init_fence": r"cp_async_bulk_tensor at .+: no fence.mbarrier_init since",
    "cluster_init_fence": r"mbarrier_arrive_cluster at .+: no fence.mbarrier_init since",
    "expects_more": r"block \(0, 0, 0\) waits for ever; warp 0: lanes 0-31 in mbarrier_try_wait",
    "expects_less": r"cp_async_bulk_tensor at .+: brought more bytes than the mbarrier was told",
    "arrivals": r"mbarrier_arrive at .+: more arrivals than the mbarrier expects",
    "unaligned_copy": r"cp_async_bulk_tensor at .+: offset 16 in shared memory is no multiple of",
    "proxy_fence": r"wgmma at .+ was written since the last fence.proxy.async",
    "wgmma_fence": r"wgmma at .+: no wgmma.fence since the registers were last within reach",
    "wgmma_written": r"wgmma at .+: sum 5 of lane 0 was written before the wait",
    "wgmma_never_waited": r"exited with 1 asynchronous operations never waited for",
    "descriptor": r"wgmma at .+: the matrix does not start at a multiple of 1024 bytes",
    "overlap_wait": r"thread \(64, 0, 0\) of block .+ exited without griddepcontrol_wait",
    "overlap_copy": r"cp_async_bulk_tensor at .+: no griddepcontrol_wait before this access",
    "proxy_fence_order": NOT_FENCED,
    "one_does_not_fence": r"wgmma at .+: after the copy by thread 133 .+ not every lane has",
    "nobody_fences": NOT_FENCED,
    "fence_before_wait": NOT_FENCED,
    "one_lane_fences": NOT_FENCED,
    "store_before_wait": r"wgmma at .+ was written since the last fence.proxy.async",
    "store_and_one_lane": r"wgmma at .+ since the last fence.proxy.async that every lane has seen",
    "relaxed_order": NOT_FENCED,
    "registers_of_launch": r"block \(0, 0, 0\) waits for ever; warp 0: .*setmaxnreg_inc at",
    "registers": r"block \(0, 0, 0\) waits for ever; warp 0: .*setmaxnreg_inc at",
}
MESSAGES_ON_SOME = {
    "init_sync": r"mbarrier_try_wait_parity at .+: this is no mbarrier: it was not initialised",
    "copy_never_waited": r"block \(0, 0, 0\) exited with 1 asynchronous operations in flight",
    "no_wait_for_arrival": NOT_FENCED,
    "copy_after_arrival": NOT_FENCED,
    "count_of_increments": r"waits for ever",
    "arrival_never_waited": r"exited with 1 asynchronous operations in flight",
    "sum_refill": r"waits for ever",
    "sum_wgmma_refill": r"wgmma at .+ since the last fence.proxy.async that every lane has seen",
    "cluster_init": r"cp_async_bulk_tensor_multicast at .+: this is no mbarrier",
    "cluster_exit_relaxed": r"exited with \d asynchronous operations in flight|has exited",
    "cluster_exit": r"mbarrier_arrive_cluster at .+: block [01] of the cluster has exited",
}
WRONG_OUTPUT = [
    "major_a_bit",
    "major_b_bit",
    "major_exchanged",
    "major_step",
    "copy_wait",
    "try_once",
    "parity",
    "wgmma_wait",
    "sum_cluster_refill",
]


@pytest.mark.parametrize("name", [*MESSAGES, *MESSAGES_ON_SOME, *WRONG_OUTPUT, "relaxed_data"])
def test_correct_kernels_pass_on_every_seed(fault_library, name):
    for seed in SEEDS:
        assert run(fault_library, name, False, seed) is None, f"seed {seed}"


@pytest.mark.parametrize("name", MESSAGES)
def test_faulty_kernels_fail_the_launch(fault_library, name):
    for seed in SEEDS:
        caught = run(fault_library, name, True, seed)
        assert caught is not None and re.search(MESSAGES[name], caught), (seed, caught)


@pytest.mark.parametrize("name", MESSAGES_ON_SOME)
def test_faulty_kernels_fail_some_launches(fault_library, name):
    caught = [run(fault_library, name, True, seed) for seed in SEEDS]
    assert any(message and re.search(MESSAGES_ON_SOME[name], message) for message in caught[:6])


@pytest.mark.parametrize("name", WRONG_OUTPUT)
def test_faulty_kernels_give_wrong_output(fault_library, name):
    caught = [run(fault_library, name, True, seed) for seed in SEEDS]
    assert "wrong output" in caught[:6], caught


# Kernels to run under ThreadSanitizer, and the line of hopper_faults.cu that its report must name.
RACES = {
    "relaxed_data:faulty": "out[threadIdx.x] = tile[kTile - 1 - threadIdx.x];",
    "relaxed_data:correct": None,
    "relaxed_order:correct": None,
    "one_does_not_fence:correct": None,
    "nobody_fences:correct": None,
    "fence_before_wait:correct": None,
    "store_before_wait:correct": None,
    "cluster_exit_relaxed:correct": None,
    "sum_cluster_refill:correct": None,
}


@pytest.mark.slow
def test_thread_sanitizer_names_the_line(tmp_path):
    module = compile_emulated("hopper_faults", tmp_path, "-fsanitize=thread")
    command = [sys.executable, KERNELS / "hopper_faults.py", module, *RACES]
    environment = sanitizer_environment("thread")
    log = subprocess.run(command, env=environment, capture_output=True, text=True).stderr

    lines = (KERNELS / "hopper_faults.cu").read_text().splitlines()
    runs = re.findall(r"^== (\S+) \d\n(.*?)(?=^== |\Z)", log, re.M | re.S)
    assert len(runs) == len(RACES) * 3, log
    for kernel, report in runs:
        named = {lines[int(n) - 1].strip() for n in re.findall(r"faults\.cu:(\d+)", report)}
        if RACES[kernel] is None:
            assert "SUMMARY" not in report, report
        else:
            assert RACES[kernel] in named, report


def test_invalid_tensor_maps_are_rejected(fault_library):
    """The rules of cuTensorMapEncodeTiled for 16-bit elements swizzled in 128 bytes."""

    def can_encode(address=1 << 20, dims=(64, 3, 5), strides=(128, 384), box=(64, 2, 1)) -> bool:
        arrays = (
            np.array(dims, np.uint64),
            np.array(strides, np.uint64),
            np.array(box, np.uint32),
        )
        pointers = (ctypes.c_void_p(array.ctypes.data) for array in arrays)
        return fault_library.can_encode(ctypes.c_size_t(address), *pointers)

    assert can_encode()
    assert not can_encode(address=8)
    assert not can_encode(dims=(64, 0, 5))
    assert not can_encode(strides=(128, 392))
    assert not can_encode(strides=(128, 2**40))
    assert not can_encode(box=(128, 1, 1))  # 256 bytes in a row
    assert not can_encode(box=(4, 1, 1))  # 8 bytes
    assert not can_encode(box=(64, 257, 1))


# Instructions: name -> input words, and the expected output words.


def boxes(tensor: np.ndarray, starts: list[tuple[int, ...]], *shape: int) -> np.ndarray:
    """Boxes of the tensor from each start on, innermost first, zeros outside, each row of 128
    bytes with its 16-byte chunks exchanged as PTX ISA's 128B swizzle says."""
    rows = []
    for start in starts:
        box = np.zeros(shape, np.uint16)
        wanted = [first + np.arange(n) for first, n in zip(reversed(start), shape, strict=True)]
        inside = [(at >= 0) & (at < n) for at, n in zip(wanted, tensor.shape, strict=True)]
        found = [at[mask] for at, mask in zip(wanted, inside, strict=True)]
        box[np.ix_(*inside)] = tensor[np.ix_(*found)]
        for row, line in enumerate(box.reshape(16, 8, 8)):
            rows.append(line[np.arange(8) ^ row % 8])
    return np.stack(rows)


TENSOR = random(20).integers(1, 2**16, (20, 3, 72), np.uint16)


def copy() -> tuple[np.ndarray, np.ndarray]:
    starts = [(0, 0, 0, 0), (8, 1, 1, 3), (64, 2, 2, 4), (-8, -1, 1, 0), (16, 0, 0, 5)]
    starts.append((0, 1, -3, -1))
    return words(TENSOR), words(boxes(TENSOR.reshape(5, 4, 3, 72), starts, 2, 4, 2, 64))


def multicast() -> tuple[np.ndarray, np.ndarray]:
    both = boxes(TENSOR, [(0, 1, 0), (8, 1, 10)], 8, 2, 64)
    return words(TENSOR), words(np.stack([both, both]))


def multicast_4d() -> tuple[np.ndarray, np.ndarray]:
    tensor = TENSOR.reshape(5, 4, 3, 72)
    both = boxes(tensor, [(0, 1, 2, 0), (8, 1, 2, 4)], 2, 4, 2, 64)
    return words(TENSOR), words(np.stack([both, both]))


def mbarrier() -> tuple[np.ndarray, np.ndarray]:
    rounds = random(9).integers(0, 2**32, (9, 32), np.uint64).astype(np.uint32)
    return padded(rounds), rounds[:, np.arange(32) ^ 13].ravel()


def copies_arrive() -> tuple[np.ndarray, np.ndarray]:
    rounds = random(5).integers(0, 2**32, (5, 512), np.uint64).astype(np.uint32)
    return padded(rounds), rounds[:, np.arange(512) ^ 0x155].ravel()


def stmatrix() -> tuple[np.ndarray, np.ndarray]:
    """stmatrix, the inverse of ldmatrix, to rows in another order."""
    values = random(4).integers(0, 2**32, (32, 4), np.uint64).astype(np.uint32)
    rows = values.T.reshape(32, 4)  # [matrix and row, pair]: lane 4 row + pair has it
    return padded(values), rows[np.arange(32) ^ 13].ravel()


def cluster() -> tuple[np.ndarray, np.ndarray]:
    return padded(), np.concatenate([np.arange(128), 1000 + np.arange(128)]).astype(np.uint32)


def elect() -> tuple[np.ndarray, np.ndarray]:
    return padded(), np.full(32, 3, np.uint32)


def registers() -> tuple[np.ndarray, np.ndarray]:
    data = random(384).integers(0, 2**31, 384, np.uint32)
    return padded(data), data + np.where(np.arange(384) < 128, 1, 2).astype(np.uint32)


def padded(*data: np.ndarray) -> np.ndarray:
    """Input words, padded to the size of the tensor that every kernel has a map of."""
    return np.concatenate([*(x.ravel() for x in data), np.zeros(20 * 3 * 72 // 2, np.uint32)])


def wgmma(dtype: torch.dtype, trans_a: bool, trans_b: bool) -> tuple[np.ndarray, np.ndarray]:
    """Fragments by the figure of the PTX ISA, "WGMMA .m64nNk16 register fragment layout for D"."""
    a, b = small_integers(64, 64), small_integers(64, 256)
    inputs = [bits_of(a.T if trans_a else a, dtype), bits_of(b if trans_b else b.T, dtype)]
    thread, i = np.arange(128)[:, None], np.arange(128)[None]
    row = thread // 32 * 16 + thread % 32 // 4 + i // 2 % 2 * 8
    col = i // 4 * 8 + thread % 4 * 2 + i % 2
    inputs = np.concatenate([matrix.ravel() for matrix in inputs])
    return words(inputs), words((2 * a @ b).astype(np.float32)[row, col])


INSTRUCTIONS = {
    "copy": copy,
    "multicast": multicast,
    "multicast_4d": multicast_4d,
    "mbarrier": mbarrier,
    "copies_arrive": copies_arrive,
    "stmatrix": stmatrix,
    "cluster": cluster,
    "elect": elect,
    "registers": registers,
    "wgmma_f16": lambda: wgmma(torch.float16, False, False),
    "wgmma_bf16": lambda: wgmma(torch.bfloat16, False, False),
    "wgmma_bf16_trans_a": lambda: wgmma(torch.bfloat16, True, False),
    "wgmma_f16_trans_b": lambda: wgmma(torch.float16, False, True),
    "wgmma_bf16_trans_ab": lambda: wgmma(torch.bfloat16, True, True),
}


@pytest.fixture(scope="module")
def instructions(build_folder) -> ctypes.CDLL:  # noqa: F811
    library = load_instructions(compile_emulated("hopper_instructions", build_folder))
    library.set_seed.argtypes = [ctypes.c_uint64]
    return library


def emulate(library: ctypes.CDLL, name: str, seed: int) -> np.ndarray:
    inputs, expected = (aligned(array) for array in INSTRUCTIONS[name]())
    output = aligned(np.full_like(expected, 0xFFFFFFFF))
    library.set_seed(seed)
    assert library.run_instruction(name.encode(), output.ctypes.data, inputs.ctypes.data) is None
    return output


@pytest.mark.parametrize("name", INSTRUCTIONS)
def test_instruction(instructions, name):
    for seed in range(4):
        np.testing.assert_array_equal(emulate(instructions, name, seed), INSTRUCTIONS[name]()[1])


def compile_for_gpu(architecture: str, output: Path, *options: str) -> None:
    if not NVCC:
        pytest.skip("needs nvcc")
    source = KERNELS / "hopper_instructions.cu"
    target = f"-gencode=arch=compute_{architecture},code=sm_{architecture}"
    command = [NVCC, "-std=c++17", target, f"-I{ROOT}/csrc", *options, source, "-o", output]
    subprocess.run(command, check=True)


@pytest.mark.parametrize("architecture", ["80", "90a"])
def test_instructions_compile_for_gpus(tmp_path, architecture):
    """The kernels compile for other architectures than sm_90a, for which they are empty."""
    warnings = ["-Werror=all-warnings", "-Xcompiler=-Wall,-Wextra"]
    compile_for_gpu(architecture, tmp_path / "cubin", "-cubin", *warnings)


@pytest.fixture(scope="module")
def gpu_instructions(build_folder) -> ctypes.CDLL:  # noqa: F811
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs a GPU of compute capability 9.0")
    module = build_folder / "gpu_hopper_instructions.so"
    compile_for_gpu("90a", module, "-shared", "-Xcompiler=-fPIC")
    return load_instructions(module)


@pytest.mark.parametrize("name", INSTRUCTIONS)
def test_conformance(gpu_instructions, name):
    """A GPU gives the same bits as the emulator."""
    inputs, expected = (torch.from_numpy(x.view(np.int32)).cuda() for x in INSTRUCTIONS[name]())
    output = torch.full_like(expected, -1)
    torch.cuda.synchronize()
    message = gpu_instructions.run_instruction(name.encode(), output.data_ptr(), inputs.data_ptr())
    assert message is None
    torch.cuda.synchronize()
    assert torch.equal(output, expected)
