"""The emulator: results of its instructions, and faults in kernels that it must detect.

The kernels are in kernels/. They are compiled here, and called with addresses.
"""

from __future__ import annotations

import ctypes
import math
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import deeplab_fast
from deeplab_fast import aspp, dilated_conv2d, upsample_argmax
from deeplab_fast.backends import registry

from ..support import emulator
from ..support.emulator import SHARED_MEMORY, machine
from ..support.toolchain import CXX, NVCC, ROOT
from .kernels import faults

KERNELS = ROOT / "tests" / "emulator" / "kernels"
SEEDS = range(12)
WARP = np.arange(32)
GROUP, THREAD = WARP // 4, WARP % 4  # the PTX ISA's groupID and threadID_in_group


def compile_emulated(source: str, folder: Path, *options: str) -> Path:
    if not shutil.which(CXX):
        pytest.skip(f"needs a C++ compiler, {CXX} is not one")
    command = [CXX, "-std=c++17", "-O1", "-g1", "-fPIC", "-ffp-contract=off", "-Wall", "-Wextra"]
    command += ["-Werror", "-Wno-unknown-pragmas", "-Wno-psabi"]
    command += [f"-I{ROOT}/csrc/emulator", f"-I{ROOT}/csrc"]
    sources = [path for path in (ROOT / "csrc/emulator").glob("*.cpp") if path.name != "module.cpp"]
    scheduler = [folder / f"{path.stem}.o" for path in sources]
    if not all(path.exists() for path in scheduler):
        subprocess.run([*command, "-c", *sources], cwd=folder, check=True)
    module = folder / f"{source}.so"
    inputs = ["-x", "c++", KERNELS / f"{source}.cu", "-x", "none", *scheduler]
    subprocess.run([*command, *options, "-shared", *inputs, "-o", module], check=True)
    return module


@pytest.fixture(scope="module")
def build_folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("emulator")


# Faults.


@pytest.fixture(scope="module")
def fault_library(build_folder) -> ctypes.CDLL:
    return faults.load(str(compile_emulated("faults", build_folder)))


# How faulty kernels must fail: with a message on every seed, or with wrong output on some seeds.
MESSAGES = {
    "out_of_bounds_write": r"block \(0, 0, 0\) wrote outside its 256 bytes of shared memory",
    "out_of_bounds_copy": r"cp_async at faults.cu:\d+: offset 256 is not in the 256 bytes",
    "divergent_barrier": r"__syncthreads at faults.cu:\d+: other threads of the block are in",
    "divergent_shuffle": r"block \(0, 0, 0\) waits for ever; warp 0: lanes 0-15 in __shfl_xor_sync "
    r"at faults.cu:\d+, lanes 16-31 in __shfl_xor_sync at faults.cu:\d+; warp 1: lanes 0-15",
    "early_exit": r"block \(0, 0, 0\) waits for ever; warp 0: lanes 0-31 in __syncthreads at "
    r"faults.cu:\d+; warp 1: lanes 0-7 in __syncthreads at faults.cu:\d+, lanes 8-31 exited$",
    "deadlock": r"waits for ever; warp 0: lanes 0-31 in bar_sync at .+; warp 1: lanes 0-31 in bar",
    "producer": r"waits for ever; warp 0: lanes 0-31 exited; warp 1: lanes 0-31 in bar_sync",
    "never_waited": r"of block \(0, 0, 0\) exited with 1 asynchronous copies never waited for",
    "spin": r"atomicAdd at faults.cu:\d+: the block spins for ever",
}
WRONG_OUTPUT = ["barrier", "wait", "refill", "warp_sync", "out_of_bounds_read"]
# Faults that only a build with a sanitizer detects; the output may be right.
ONLY_SANITIZERS = ["out_of_bounds_global", "overlapping_blocks", "misaligned"]


@pytest.mark.parametrize("name", [*MESSAGES, *WRONG_OUTPUT, *ONLY_SANITIZERS])
def test_correct_kernels_pass_on_every_seed(fault_library, name):
    for seed in SEEDS:
        assert faults.run(fault_library, name, False, seed) is None, f"seed {seed}"


@pytest.mark.parametrize("name", MESSAGES)
def test_faulty_kernels_fail_the_launch(fault_library, name):
    for seed in SEEDS if name != "spin" else [0]:
        caught = faults.run(fault_library, name, True, seed)
        assert caught is not None and caught != "wrong output", f"seed {seed}"
        assert re.search(MESSAGES[name], caught), caught


@pytest.mark.parametrize("name", WRONG_OUTPUT)
def test_faulty_kernels_give_wrong_output(fault_library, name):
    caught = [faults.run(fault_library, name, True, seed) for seed in SEEDS]
    assert set(caught) <= {None, "wrong output"}
    assert "wrong output" in caught[:4], "the first few seeds must do"


def test_seeds_decide_when_copies_land(fault_library):
    """A missing wait does not show if copies land when issued; it shows if they land late."""
    assert faults.run(fault_library, "wait", True, seed=0) is None
    assert faults.run(fault_library, "wait", True, seed=1) == "wrong output"


def test_same_seed_gives_same_results(fault_library):
    runs = [[faults.run(fault_library, "refill", True, seed) for seed in SEEDS] for _ in range(2)]
    assert runs[0] == runs[1]


@pytest.mark.parametrize("device", SHARED_MEMORY)
def test_too_much_shared_memory_is_an_error(fault_library, device):
    limit = SHARED_MEMORY[device]
    fault_library.set_machine(0, limit)
    output = np.zeros(faults.THREADS, np.float32)
    pointers = output.ctypes.data, faults.INPUT.ctypes.data
    assert fault_library.run_with_shared_memory(limit, *pointers) is None
    message = fault_library.run_with_shared_memory(limit + 1, *pointers)
    assert message.decode() == f"needs {limit + 1} bytes of shared memory, the device has {limit}"


# Instructions: name -> input words, and the expected output words.


def words(array: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(array).view(np.uint32).ravel()


def pairs(matrix: np.ndarray) -> np.ndarray:
    """Words of two 16-bit elements each; the last dimension holds the pairs."""
    pair = matrix.astype(np.uint32)
    return pair[..., 0] | pair[..., 1] << 16


def random(*seed: int) -> np.random.Generator:
    return np.random.default_rng(seed)


def cp_async() -> tuple[np.ndarray, np.ndarray]:
    data = random(16).integers(1, 256, (2, 32, 16), np.uint8)
    copied = data.copy()
    for lane in range(32):
        copied[1, lane, lane % 17 :] = 0
    return words(data), words(copied)


def ldmatrix_x4(trans: bool) -> tuple[np.ndarray, np.ndarray]:
    data = random(4).integers(0, 2**16, (32, 8), np.uint16)
    matrices = data.reshape(4, 8, 8)
    if trans:
        matrices = matrices.swapaxes(1, 2)
    return words(data), pairs(matrices.reshape(4, 8, 4, 2)).reshape(4, 32).T.ravel()


def small_integers(*shape: int) -> np.ndarray:
    """Integers whose products and sums are exact in every dtype and order."""
    return random(*shape).integers(-8, 9, shape).astype(np.float32)


def bits_of(matrix: np.ndarray, dtype: torch.dtype) -> np.ndarray:
    tensor = torch.from_numpy(matrix).to(dtype)
    return tensor.view(torch.int16).numpy().view(np.uint16)


def mma(dtype: torch.dtype) -> tuple[np.ndarray, np.ndarray]:
    """Fragments by the formulas of the PTX ISA, section "Matrix Fragments for mma.m16n8k16"."""
    depth = 8 if dtype == torch.float32 else 16
    a, b, c = small_integers(16, depth), small_integers(depth, 8), small_integers(16, 8)
    fragments = np.zeros((32, 10), np.uint32)
    if dtype == torch.float32:
        # The low 13 bits, which TF32 does not have, must be ignored.
        for i in range(4):
            row = GROUP if i in (0, 2) else GROUP + 8
            col = THREAD if i in (0, 1) else THREAD + 4
            fragments[:, i] = words(a[row, col]) | 0x1FFF
        for i in range(2):
            fragments[:, 4 + i] = words(b[THREAD if i == 0 else THREAD + 4, GROUP]) | 0x1FFF
    else:
        a_bits, b_bits = bits_of(a, dtype), bits_of(b, dtype)
        for i in range(8):
            row = GROUP if i in (0, 1, 4, 5) else GROUP + 8
            col = THREAD * 2 + (i & 1) + (8 if i >= 4 else 0)
            fragments[:, i // 2] |= a_bits[row, col].astype(np.uint32) << 16 * (i % 2)
        for i in range(4):
            row = THREAD * 2 + (i & 1) + (8 if i >= 2 else 0)
            fragments[:, 4 + i // 2] |= b_bits[row, GROUP].astype(np.uint32) << 16 * (i % 2)
    outputs = np.zeros((32, 4), np.float32)
    for i in range(4):
        row, col = GROUP if i < 2 else GROUP + 8, THREAD * 2 + (i & 1)
        fragments[:, 6 + i] = words(c[row, col])
        outputs[:, i] = (c + a @ b)[row, col]
    return fragments.ravel(), words(outputs)


def gemm(dtype: torch.dtype) -> tuple[np.ndarray, np.ndarray]:
    a, b = small_integers(16, 16), small_integers(16, 8)
    inputs = np.concatenate([bits_of(a, dtype).ravel(), bits_of(b, dtype).ravel()])
    return words(inputs), words(a @ b)


def floats() -> np.ndarray:
    """1024 floats of all magnitudes, with ties, denormals, overflow, infinities and NaN."""
    rng = random(1024)
    ordinary = rng.standard_normal(256) * np.exp2(rng.integers(-30, 20, 256))
    odd = 2 * rng.integers(0, 2**10, 256) + 1
    ties = (1 + odd / 2.0**11) * np.exp2(rng.integers(-14, 15, 256))
    odd = 2 * rng.integers(0, 2**7, 128) + 1
    bfloat16_ties = (1 + odd / 2.0**8) * np.exp2(rng.integers(-100, 100, 128))
    denormals = (2 * rng.integers(0, 1024, 128) + 1) * 2.0**-25
    special = [0.0, -0.0, np.inf, -np.inf, np.nan, 65504, 65519.99, 65520, 65536, 3.3895e38]
    listed = np.concatenate([ordinary, ties, -bfloat16_ties, denormals, special])
    rest = rng.integers(0, 2**32, 1024 - len(listed), np.uint64).astype(np.uint32)
    return np.concatenate([listed.astype(np.float32), rest.view(np.float32)])


def cvt_rna_tf32() -> tuple[np.ndarray, np.ndarray]:
    x = floats()
    with np.errstate(all="ignore"):
        mantissa, exponent = np.frexp(x.astype(np.float64))
        rounded = np.sign(mantissa) * np.floor(np.abs(mantissa) * 2**11 + 0.5) / 2**11
        result = np.ldexp(rounded, exponent).astype(np.float32)
    tf32 = words(result)
    tiny = np.abs(x) < 2.0**-126  # denormals round at the same bit as the smallest normals
    tf32[tiny] = (words(x)[tiny] + 0x1000) & 0xFFFFE000
    # The code that ptxas generates for sm_80 and sm_90 rounds only if |x| < inf.
    tf32[np.isnan(x)] = words(x)[np.isnan(x)] & 0xFFFFE000
    return words(x), tf32


def half() -> tuple[np.ndarray, np.ndarray]:
    x = torch.from_numpy(floats())
    x = torch.where(x.isnan(), 1.0, x)  # torch gives NaN no one bit pattern
    rounded = [x.to(torch.float16), x.to(torch.bfloat16)]
    outputs = [words(y.float().numpy()) for y in rounded]
    for y in rounded:
        outputs.append(pairs(torch.stack([y, -y], 1).view(torch.int16).numpy().view(np.uint16)))
    outputs += [words((-y).float().numpy()) for y in rounded]
    return words(x.numpy()), np.concatenate(outputs)


def min_max(dtype: torch.dtype) -> tuple[np.ndarray, np.ndarray]:
    """Maxima and minima of any bits: NaN if either is NaN, and 0 is greater than -0."""
    bits = random(38).integers(0, 2**16, (2, 2048), np.uint16)
    infinity, nan = {torch.float16: (0x7C00, 0x7FFF), torch.bfloat16: (0x7F80, 0x7FFF)}[dtype]
    special = np.array([0, 0x8000, 1, 0x8001, infinity, infinity | 0x8000, nan, infinity + 1])
    bits[:, :64] = np.repeat(special, 8), np.tile(special, 8)
    a, b = (torch.from_numpy(row.view(np.int16)).view(dtype) for row in bits)
    negative_first = torch.where(a.signbit(), a, b), torch.where(a.signbit(), b, a)
    greater = torch.where(a == b, negative_first[1], a.maximum(b))
    smaller = torch.where(a == b, negative_first[0], a.minimum(b))
    results = []
    for result in (greater, smaller):
        patterns = result.view(torch.int16).numpy().view(np.uint16)
        results.append(np.where(result.isnan().numpy(), nan, patterns).astype(np.uint16))
    return bits.ravel().view(np.uint32), np.concatenate(results).view(np.uint32)


def bar() -> tuple[np.ndarray, np.ndarray]:
    data = random(32).integers(0, 2**32, 32, np.uint64).astype(np.uint32)
    return data, data[WARP ^ 5 ^ 3]


def shuffle() -> tuple[np.ndarray, np.ndarray]:
    data = random(33).integers(0, 2**32, 32, np.uint64).astype(np.uint32)
    rows = []
    for width in (1, 2, 4, 8, 16, 32):
        first = WARP // width * width
        for i in range(5):
            rows.append(first + (WARP * 7 + i) % width)
            rows.append(np.where(WARP - i >= first, WARP - i, WARP))
            rows.append(np.where(WARP + i < first + width, WARP + i, WARP))
            rows.append(np.where(WARP ^ 1 << i < first + width, WARP ^ 1 << i, WARP))
    rows.append(WARP // 16 * 16 + (WARP ^ 9) % 16)
    wide = (1.0 / (1 + (WARP ^ 17)) * 1e9).astype(np.uint32)
    return data, np.concatenate([data[np.stack(rows)].ravel(), wide])


def vote() -> tuple[np.ndarray, np.ndarray]:
    data = random(34).integers(0, 256, 32, np.uint32)
    data[:16] |= 3
    rows = []
    for bit in range(8):
        ballot = int(np.sum((data >> bit & 1).astype(np.uint64) << WARP.astype(np.uint64)))
        half = np.where(WARP < 16, ballot & 0xFFFF, ballot & 0xFFFF0000)
        at_bit = data[WARP // 16 * 16 + bit] >> bit & 1
        rows += [np.full(32, ballot), half, at_bit, at_bit]
    return data, np.stack(rows).astype(np.uint32).ravel()


def atomic() -> tuple[np.ndarray, np.ndarray]:
    data = random(37).integers(0, 2**32, 37, np.uint64).astype(np.uint32)
    lanes, cells = data[:32], data[32:]
    total = (int(cells[0]) + int(lanes.astype(np.uint64).sum())) % 2**32
    lowest = min(cells[2:3].view(np.int32)[0], lanes.view(np.int32).min())
    result = [total, max(cells[1], lanes.max()), int(lowest) % 2**32, lanes[7], 12345, cells[3]]
    return data, np.array(result, np.uint64).astype(np.uint32)


INSTRUCTIONS: dict[str, Callable[[], tuple[np.ndarray, np.ndarray]]] = {
    "cp_async": cp_async,
    "ldmatrix_x4": lambda: ldmatrix_x4(False),
    "ldmatrix_x4_trans": lambda: ldmatrix_x4(True),
    "mma_f16": lambda: mma(torch.float16),
    "mma_bf16": lambda: mma(torch.bfloat16),
    "mma_tf32": lambda: mma(torch.float32),
    "gemm_f16": lambda: gemm(torch.float16),
    "gemm_bf16": lambda: gemm(torch.bfloat16),
    "cvt_rna_tf32": cvt_rna_tf32,
    "bar": bar,
    "griddepcontrol": lambda: (WARP.astype(np.uint32), WARP.astype(np.uint32)),
    "shuffle": shuffle,
    "vote": vote,
    "atomic": atomic,
    "half": half,
    "min_max_f16": lambda: min_max(torch.float16),
    "min_max_bf16": lambda: min_max(torch.bfloat16),
}


def aligned(array: np.ndarray) -> np.ndarray:
    """A copy that is aligned to 16 bytes, as allocations on a GPU are."""
    memory = np.empty(array.nbytes + 16, np.uint8)
    start = -memory.ctypes.data % 16
    copy = memory[start : start + array.nbytes].view(array.dtype)
    copy[...] = array
    return copy


def load_instructions(module: Path) -> ctypes.CDLL:
    library = ctypes.CDLL(str(module))
    library.run_instruction.restype = ctypes.c_char_p
    library.run_instruction.argtypes = [ctypes.c_char_p, ctypes.c_void_p, ctypes.c_void_p]
    return library


@pytest.fixture(scope="module")
def instructions(build_folder) -> ctypes.CDLL:
    return load_instructions(compile_emulated("instructions", build_folder))


def emulate(library: ctypes.CDLL, name: str) -> np.ndarray:
    inputs, expected = (aligned(array) for array in INSTRUCTIONS[name]())
    output = aligned(np.full_like(expected, 0xFFFFFFFF))
    assert library.run_instruction(name.encode(), output.ctypes.data, inputs.ctypes.data) is None
    return output


@pytest.mark.parametrize("name", INSTRUCTIONS)
def test_instruction(instructions, name):
    np.testing.assert_array_equal(emulate(instructions, name), INSTRUCTIONS[name]()[1])


EXPONENTS = [0.0, -0.0, -1.0, -126.5, -1e9, -np.inf, 5.0, 128.0, np.inf, np.nan, 1e-40]


def exponents() -> np.ndarray:
    return np.concatenate([EXPONENTS, random(9).uniform(-125, 127, 1024 - len(EXPONENTS))]).astype(
        np.float32
    )


def assert_is_ex2(x: np.ndarray, result: np.ndarray) -> None:
    """Check 2^x to 2 ulp, denormal results flushed. 2^0 is exact: the softmax of one class is 1."""
    with np.errstate(over="ignore"):
        exact = np.exp2(x.astype(np.float64))
    exact[exact < 2.0**-126] = 0.0
    exact[exact >= 2.0**128] = np.inf
    special = ~np.isfinite(exact) | (exact == 0) | (np.abs(x) < 2.0**-126)
    np.testing.assert_array_equal(result[special], exact[special])
    ulp = np.exp2(np.floor(np.log2(exact[~special])) - 23)
    error = np.abs(result[~special] - exact[~special]) / ulp
    assert error.max() <= 2


def test_ex2_approx(instructions):
    x, output = aligned(exponents()), aligned(np.full(1024, np.nan, np.float32))
    assert instructions.run_instruction(b"ex2", output.ctypes.data, x.ctypes.data) is None
    assert_is_ex2(x, output)
    finite = x[len(EXPONENTS) :]
    off = np.mean(output[len(EXPONENTS) :] != np.exp2(finite.astype(np.float64)).astype(np.float32))
    assert off > 0.5, "an exact result would hide kernels that rely on exactness"


def test_ex2_approx_on_a_gpu(gpu_instructions):
    x = torch.from_numpy(exponents()).cuda()
    output = torch.full_like(x, math.nan)
    torch.cuda.synchronize()
    assert gpu_instructions.run_instruction(b"ex2", output.data_ptr(), x.data_ptr()) is None
    torch.cuda.synchronize()
    assert_is_ex2(x.cpu().numpy(), output.cpu().numpy())


def divisors() -> np.ndarray:
    special = [1.0, -2.0, 2.0**126, -(2.0**-126), 0.0, -0.0, 1e-40, np.inf, -np.inf, np.nan, 3e38]
    ordinary = 2.0 ** random(10).uniform(-125, 125, 1024 - len(special))
    return np.concatenate([special, ordinary * np.tile([1, -1], 507)[: len(ordinary)]]).astype(
        np.float32
    )


def assert_is_rcp(x: np.ndarray, result: np.ndarray) -> None:
    """Check 1 / x to a relative 2^-23, denormals flushed, powers of two exact."""
    with np.errstate(divide="ignore"):
        exact = 1 / np.where(np.abs(x) < 2.0**-126, np.copysign(0.0, x), x).astype(np.float64)
    exact = np.where(np.abs(exact) < 2.0**-126, np.copysign(0.0, exact), exact)
    special = ~np.isfinite(exact) | (exact == 0) | (np.frexp(x)[0] == 0.5)
    np.testing.assert_array_equal(result[special], exact[special].astype(np.float32))
    error = np.abs(result[~special] / exact[~special] - 1)
    assert error.max() <= 2.0**-23


def test_rcp_approx(instructions):
    x, output = aligned(divisors()), aligned(np.full(1024, np.nan, np.float32))
    assert instructions.run_instruction(b"rcp", output.ctypes.data, x.ctypes.data) is None
    assert_is_rcp(x, output)
    exact = (1 / x[11:].astype(np.float64)).astype(np.float32)
    assert np.mean(output[11:] != exact) > 0.3, "an approximation that is never off hides errors"


def test_rcp_approx_on_a_gpu(gpu_instructions):
    x = torch.from_numpy(divisors()).cuda()
    output = torch.full_like(x, math.nan)
    torch.cuda.synchronize()
    assert gpu_instructions.run_instruction(b"rcp", output.data_ptr(), x.data_ptr()) is None
    torch.cuda.synchronize()
    assert_is_rcp(x.cpu().numpy(), output.cpu().numpy())


def test_every_instruction_has_a_conformance_kernel():
    """Every function of ptx.cuh is called by a kernel of instructions.cu."""
    functions = re.findall(
        r"__device__ __forceinline__ \w+ (\w+)\(.*?\n}",
        (ROOT / "csrc/cuda/common/ptx.cuh").read_text(),
        re.S,
    )
    kernels = (KERNELS / "instructions.cu").read_text()
    functions.remove("shared_address")  # computes an operand; it is no instruction
    assert "mma_m16n8k16" in functions
    assert [name for name in functions if not re.search(rf"ptx::{name}\b", kernels)] == []
    assert re.findall(r'{"(\w+)", \w+_kernel', kernels) == [*INSTRUCTIONS, "ex2", "rcp"]


@pytest.mark.skipif(not NVCC, reason="needs nvcc")
@pytest.mark.parametrize("architecture", ["sm_80", "sm_90a"])
def test_instructions_compile_for_gpus(tmp_path, architecture):
    options = ["-std=c++17", f"-arch={architecture}", "-cubin", f"-I{ROOT}/csrc"]
    warnings = ["-Werror=all-warnings", "-Xcompiler=-Wall,-Wextra"]
    source = KERNELS / "instructions.cu"
    subprocess.run([NVCC, *options, *warnings, source, "-o", tmp_path / "cubin"], check=True)


@pytest.fixture(scope="module")
def gpu_instructions(build_folder) -> ctypes.CDLL:
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 0):
        pytest.skip("needs a GPU of compute capability 8.0 or later")
    if not NVCC:
        pytest.skip("needs nvcc")
    architecture = "-arch=sm_{}{}".format(*torch.cuda.get_device_capability())
    module = build_folder / "gpu_instructions.so"
    options = ["-std=c++17", architecture, f"-I{ROOT}/csrc", "-shared", "-Xcompiler=-fPIC"]
    subprocess.run([NVCC, *options, KERNELS / "instructions.cu", "-o", module], check=True)
    return load_instructions(module)


@pytest.mark.parametrize("name", INSTRUCTIONS)
def test_conformance(gpu_instructions, instructions, name):
    """A GPU gives the same bits as the emulator."""
    inputs, expected = (torch.from_numpy(x.view(np.int32)).cuda() for x in INSTRUCTIONS[name]())
    output = torch.full_like(expected, -1)
    torch.cuda.synchronize()
    message = gpu_instructions.run_instruction(name.encode(), output.data_ptr(), inputs.data_ptr())
    assert message is None
    torch.cuda.synchronize()
    emulated = emulate(instructions, name).view(np.int32)
    np.testing.assert_array_equal(emulated, output.cpu().numpy())


# The build.


def test_failed_build_is_an_error_with_its_log(tmp_path):
    with pytest.raises(emulator.BuildError, match="the emulator's build failed: cmake") as error:
        emulator.build(tmp_path, "-DCMAKE_CXX_COMPILER=/nowhere/c++")
    assert "/nowhere/c++" in str(error.value).partition("\n")[2]


@pytest.mark.slow
def test_second_build_compiles_nothing():
    module = emulator.build(emulator.FOLDER)
    before = module.stat().st_mtime_ns
    assert emulator.build(emulator.FOLDER) == module and module.stat().st_mtime_ns == before


# The backend.


def test_emulated_is_never_automatic(ran):
    logits = torch.randn(1, 3, 4, 5)
    upsample_argmax(logits, size=(7, 9))
    with deeplab_fast.backend("emulated"):
        upsample_argmax(logits, size=(7, 9))
    assert [name for _, name in ran] == ["cpu", "emulated"]
    assert "emulated" not in registry.order("cpu") + registry.order("cuda")
    assert "emulated" not in deeplab_fast.available_backends()


@pytest.mark.parametrize("seed", range(4))
def test_emulated_agrees_on_every_seed(seed):
    logits = torch.randn(2, 5, 7, 9, dtype=torch.bfloat16)
    expected = upsample_argmax(logits, size=(23, 31))
    with deeplab_fast.backend("emulated"), machine(seed, "sm_86"):
        assert torch.equal(upsample_argmax(logits, size=(23, 31)), expected)


@pytest.mark.parametrize("num_ctas", [1, 8])
@pytest.mark.parametrize("seed", range(2))
def test_emulated_convolution_agrees_on_every_seed(monkeypatch, seed, num_ctas):
    """The smallest convolution with several k-iterations; 8 CTAs split it and one does not."""
    monkeypatch.setattr(emulator, "num_ctas", num_ctas)
    x, weight = (torch.randint(-2, 3, s).bfloat16() for s in ((1, 40, 3, 3), (8, 40, 3, 3)))
    with deeplab_fast.backend("emulated"), machine(seed):
        output = dilated_conv2d(x, weight, dilation=2)
    exact = F.conv2d(x.float(), weight.float(), padding=2, dilation=2)
    assert torch.equal(output, exact.bfloat16())


@pytest.mark.parametrize("seed", range(2))
def test_emulated_aspp_agrees_on_every_seed(seed):
    def weight(*shape: int) -> torch.Tensor:
        return torch.randint(-1, 2, shape).bfloat16() / 4

    branches = [weight(8, 8, 1, 1), weight(8, 8, 3, 3)], [weight(8), weight(8)], [1, 2]
    rest = weight(8, 8, 1, 1), weight(8), weight(8, 24, 1, 1), weight(8)
    input, outputs = weight(1, 8, 3, 3), []
    for name in ("emulated", "reference"):
        with deeplab_fast.backend(name), machine(seed):
            outputs.append(aspp(input, *branches, *rest))
    torch.testing.assert_close(*outputs, rtol=0.02, atol=0.02)


# Sanitizers, which report the line of a fault. A process must load their library before all others.
# UndefinedBehaviorSanitizer detects misaligned vectors, which are an error on a GPU.
SANITIZERS = {"thread": "thread", "address": "address,undefined"}


def sanitizer_environment(sanitizer: str) -> dict[str, str]:
    # libstdc++ too: the sanitizer looks up the function that throws before torch loads libstdc++.
    libraries = {"thread": "libtsan.so", "address": "libasan.so"}[sanitizer], "libstdc++.so.6"
    paths = []
    for library in libraries:
        command = [CXX, f"-print-file-name={library}"]
        path = shutil.which(CXX) and subprocess.run(command, capture_output=True, text=True).stdout
        if not path or not os.path.isabs(path.strip()):
            pytest.skip(f"{CXX} has no {library}")
        paths.append(path.strip())
    return os.environ | {
        "LD_PRELOAD": " ".join(paths),
        "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
        # The sanitizer would otherwise suppress a second report of the same line.
        "TSAN_OPTIONS": "suppress_equal_addresses=0:suppress_equal_stacks=0",
        "ASAN_OPTIONS": "detect_leaks=0:halt_on_error=0:suppress_equal_pcs=0",
    }


# Lines of faults.cu that a report must name. With seed 0 a copy lands when it is issued, so before
# the barrier, which hides a missing wait. The misalignment of a line is reported only once.
HIDDEN = [("wait", "0"), ("misaligned", "1"), ("misaligned", "2")]
REPORTS = {
    "thread": {
        "barrier": "out[threadIdx.x] = tile[kThreads - 1 - threadIdx.x];",
        "wait": "out[threadIdx.x] = tile[kThreads - 1 - threadIdx.x];",
        "refill": "sum += stages[step % 2 * kThreads + kThreads - 1 - threadIdx.x];",
        "warp_sync": "out[threadIdx.x ^ 1] = tile[threadIdx.x ^ 1];",
        "overlapping_blocks": "if (kFault || threadIdx.x % 2 == 0) out[i] = *on_stack;",
        "deadlock": None,
        "producer": None,
        "never_waited": None,
    },
    "address": {
        "out_of_bounds_write": "tile[threadIdx.x + (kFault ? 1 : 0)] = in[threadIdx.x];",
        "out_of_bounds_read": "out[threadIdx.x] = tile[kThreads - (kFault ? 0 : 1) - threadIdx.x];",
        "out_of_bounds_global": "if (kFault && threadIdx.x == 0) out[kThreads] = 0.0f;",
        "misaligned": "*reinterpret_cast<float2*>(out + i) = pair;",
        "refill": None,
        "early_exit": None,
    },
}


@pytest.mark.slow
@pytest.mark.parametrize("sanitizer", REPORTS)
def test_sanitizers_name_the_line(tmp_path, sanitizer):
    environment = sanitizer_environment(sanitizer)
    recover = ["-fsanitize-recover=address"] if sanitizer == "address" else []
    options = [f"-fsanitize={SANITIZERS[sanitizer]}", *recover]
    module = compile_emulated("faults", tmp_path, *options)
    command = [sys.executable, KERNELS / "faults.py", module, *REPORTS[sanitizer]]
    log = subprocess.run(command, env=environment, capture_output=True, text=True).stderr

    lines = (KERNELS / "faults.cu").read_text().splitlines()
    runs = re.findall(r"^== (\w+) (\w+) (\d)\n(.*?)(?=^== |\Z)", log, re.M | re.S)
    assert len(runs) == len(REPORTS[sanitizer]) * 2 * 3, log
    for name, fault, seed, report in runs:
        expected = REPORTS[sanitizer][name]
        named = {lines[int(n) - 1].strip() for n in re.findall(r"faults\.cu:(\d+)", report)}
        if fault == "False" or expected is None or (name, seed) in HIDDEN:
            assert "SUMMARY" not in report and "runtime error" not in report, report
        else:
            assert expected in named, report


# ThreadSanitizer gets few tests: it is slow to start a thread, and a launch has thousands.
UNDER_SANITIZER = {
    # The last line selects both forms of the Hopper convolution, with the output as the residual.
    "thread": "races or emulated and (every_seed or canonical) "
    "or sm90 and epilogue and bfloat16-1 and not 280",
    "address": "(races or emulated or convolution_kernel or prepared_kernels) "
    "and not (compile or export or opcheck or real)",
}


@pytest.mark.slow
@pytest.mark.parametrize("sanitizer", UNDER_SANITIZER)
def test_kernels_under_a_sanitizer(tmp_path, sanitizer):
    """Run tests of the emulated backend with instrumented kernels."""
    environment = sanitizer_environment(sanitizer)
    flags = f"-O1 -g1 -fsanitize={SANITIZERS[sanitizer]} -fno-sanitize-recover=undefined"
    options = ["-DCMAKE_BUILD_TYPE=None", f"-DCMAKE_CXX_FLAGS={flags}"]
    module = emulator.build(tmp_path / "build", *options)
    site = tmp_path / "site"
    site.mkdir()
    (site / module.name).symlink_to(module)
    (site / "deeplab_fast").symlink_to(Path(deeplab_fast.__file__).parent)
    environment["PYTHONPATH"] = str(site)
    environment["ASAN_OPTIONS"] = "detect_leaks=0"
    options = [
        "-q",
        "-n0",
        "-k",
        UNDER_SANITIZER[sanitizer],
        "-p",
        "no:cacheprovider",
        "--capture=sys",  # shows the report of a sanitizer that ends the process
        str(ROOT / "tests"),
    ]
    script = f"""
import sys, pytest, _emulated
assert _emulated.__file__.startswith({str(tmp_path)!r}), _emulated.__file__
sys.exit(pytest.main({options}))
"""
    subprocess.run([sys.executable, "-c", script], env=environment, cwd=tmp_path, check=True)
