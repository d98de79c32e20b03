"""Contracts on the machine code of the CUDA kernels: instructions, registers and loops.

They catch what no result shows: spilled registers, scalar loads, a pipeline that the compiler
serialised. Each needs a build with CUDA kernels and cuobjdump.
"""

from __future__ import annotations

import functools
import os
import re
import shutil
import subprocess
from collections import Counter
from importlib.util import find_spec
from pathlib import Path

import pytest

from deeplab_fast import _C

from ..support.sass import Block, basic_blocks, longest_path
from ..support.toolchain import ROOT

MODULE = Path(_C.__file__)


def run(*command: str | Path) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


@pytest.fixture
def cuobjdump() -> str:
    if _C.build_info()["cuda"] is None:
        pytest.skip("built for the CPU only")
    found = shutil.which("cuobjdump")
    if triton := find_spec("triton"):
        found = str(Path(triton.origin).parent / "backends/nvidia/bin/cuobjdump")
    if not found or not os.access(found, os.X_OK):
        pytest.skip("needs cuobjdump, from a CUDA toolkit or from triton's package")
    return found


def test_every_architecture_is_compiled(cuobjdump):
    """`80` means machine code and PTX, `80-real` machine code only, `80-virtual` PTX only."""
    compiled = run(cuobjdump, "--list-elf", "--list-ptx", MODULE)
    for architecture in _C.build_info()["architectures"]:
        number, _, kind = architecture.partition("-")
        chip = rf"\.sm_{number.rstrip('af')}[af]?"  # an older cuobjdump prints 90 for 90a
        assert bool(re.search(rf"{chip}\.cubin", compiled)) == (kind != "virtual")
        assert bool(re.search(rf"{chip}\.ptx", compiled)) == (kind != "real")


def test_kernels_are_in_the_module(cuobjdump):
    kernels = re.compile(r"__global__\s+void\s+(?:__launch_bounds__\([^)]*\)\s*)?(\w+)\(")
    sources = [path.read_text() for path in (ROOT / "csrc" / "cuda").rglob("*.cu*")]
    names = {name for source in sources for name in kernels.findall(source)}
    assert names
    symbols = run(cuobjdump, "--dump-elf-symbols", MODULE)
    assert [name for name in names if name not in symbols] == []


@pytest.mark.parametrize("chip", ["sm_80", "sm_90a"])
def test_upsample_argmax_stores_vectors_and_spills_nothing(cuobjdump, chip):
    usage = dump(cuobjdump, chip, "resource-usage")
    usages = re.findall(r"Function (\S*upsample_argmax_fwd\S*):\n(.*)", usage)
    assert len(usages) == 2 * 3 * 3  # kernels, label dtypes, logit dtypes
    for _, line in usages:
        numbers = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", line)}
        assert numbers["STACK"] == numbers["LOCAL"] == 0, line
        assert numbers["REG"] <= 64, line  # or fewer than half of the SM's warps would fit

    pruned = machine_code(cuobjdump, chip, "upsample_argmax_fwd_pruned")
    assert len(pruned) == 3 * 3
    assert all(re.search(r"STG\.E\.(EF\.)?128", code) for code in pruned.values())


@functools.cache
def dump(cuobjdump: str, chip: str, what: str) -> str:
    """Output of cuobjdump for one architecture, which takes seconds."""
    if chip not in run(cuobjdump, "--list-elf", MODULE):
        pytest.skip(f"not built for {chip}")
    return run(cuobjdump, f"--dump-{what}", "--gpu-architecture", chip, MODULE)


def machine_code(cuobjdump: str, chip: str, pattern: str) -> dict[str, str]:
    """SASS of each kernel whose name matches the pattern."""
    code = dump(cuobjdump, chip, "sass")
    bodies = re.findall(r"Function : (\S+)(.*?)(?=Function : |\Z)", code, re.S)
    return {name: body for name, body in bodies if re.search(pattern, name)}


def functions(cuobjdump: str, chip: str, part_of_name: str) -> dict[str, tuple[Counter[str], str]]:
    """Instruction counts and resource usage of each kernel of that name.

    Fails if a kernel spills registers or uses a stack.
    """
    bodies = machine_code(cuobjdump, chip, part_of_name)
    resources = dump(cuobjdump, chip, "resource-usage")
    usage = dict(re.findall(r"Function (\S+):\s+(.*)", resources))
    result = {}
    for name, body in bodies.items():
        instructions = Counter(re.findall(r"\b[A-Z][A-Z0-9_.x]+", body))
        assert not instructions.keys() & {"LDL", "STL"}
        assert "STACK:0" in usage[name] and "LOCAL:0" in usage[name]
        result[name] = instructions, usage[name]
    return result


def test_dilated_conv2d_is_tensor_core_code(cuobjdump):
    """cp.async of 16 bytes, ldmatrix and mma; no spills, two CTAs per SM."""
    kernels = functions(cuobjdump, "sm_80", "dilated_conv2d_fwd_kernel")
    assert len(kernels) == 3
    for name, (instructions, usage) in kernels.items():
        halves = "16816.F32.BF16" if "bfloat16" in name else "16816.F32"
        is_fp32 = "kernelIf" in name
        product = "1688.F32.TF32" if is_fp32 else halves
        assert instructions["HMMA." + product] == 64  # 4 x 8 tiles, 2 halves of 32 bytes
        assert instructions["LDSM.16.M88.4"] == 8 + 16  # before the loop and in it
        # Copies of 3 prologue stages, of the loop, and of the loop of warps without work.
        assert instructions["LDGSTS.E.BYPASS.LTC128B.128"] == 5 * 8
        assert instructions["STG.E.128" if is_fp32 else "STG.E.64"] >= 4  # 4 rows at once
        assert int(re.search(r"REG:(\d+)", usage)[1]) <= 65536 // (2 * 128) - 1
    # 128 x 128 tiles in three dtypes, and the 256 x 256 tiles of sm_90 in two.
    assert len(functions(cuobjdump, "sm_80", "dilated_conv2d_fwd_reduce_kernel")) == 3 + 2


def loop_of_products(body: str) -> list[str]:
    """Instructions of the innermost loop that contains all HMMA of a kernel, in order."""
    lines = re.findall(r"/\*([0-9a-f]{4,})\*/ +(?:@\S+ )?([A-Z]\S*)(.*?);", body)
    code = [(int(address, 16), name, operands) for address, name, operands in lines]
    products = [address for address, name, _ in code if name.startswith("HMMA")]
    loops = []
    for end, name, operands in code:
        target = re.search(r"0x([0-9a-f]+)", operands) if name.startswith("BRA") else None
        if target and int(target[1], 16) <= products[0] and products[-1] < end:
            loops.append((end - int(target[1], 16), int(target[1], 16), end))
    _, begin, end = min(loops)
    return [name for address, name, _ in code if begin <= address <= end]


@pytest.mark.parametrize("chip", ["sm_80", "sm_90a"])
def test_convolutions_copy_and_load_between_their_products(cuobjdump, chip):
    """Warps issue in order: a tensor core idles during long runs of other instructions."""
    # kernel -> most instructions per k-iteration: 16 bits, TF32 (which rounds 64 registers)
    most = {"dilated_conv2d_fwd_kernel": (240, 370), "dilated_conv2d_wgrad_kernel": (250, 440)}
    for kernel, limits in most.items():
        kernels = machine_code(cuobjdump, chip, kernel)
        assert len(kernels) == 3
        for name, body in kernels.items():
            is_fp32 = "kernelIf" in name
            loop = loop_of_products(body)
            assert len(loop) <= limits[is_fp32], name
            kinds = "".join("P" if i.startswith("HMMA") else "." for i in loop)
            assert kinds.count("P") == 64
            gap = max(map(len, (2 * kinds).split("P")))  # across the end of the loop, too
            assert gap <= (100 if is_fp32 else 32), name


def test_dilated_conv2d_fits_twice_on_an_sm_of_sm_90(cuobjdump):
    kernels = functions(cuobjdump, "sm_90a", "dilated_conv2d_fwd_kernel")
    assert len(kernels) == 3
    for _, usage in kernels.values():
        assert int(re.search(r"REG:(\d+)", usage)[1]) <= 65536 // (2 * 128) - 1


def test_dilated_conv2d_sm90_is_warpgroup_code(cuobjdump):
    """wgmma, weights by bulk copy to both CTAs, pixels by cp.async of 16 bytes."""
    kernels = functions(cuobjdump, "sm_90a", "dilated_conv2d_fwd_sm90_kernel")
    assert len(kernels) == 2 * 2  # dtypes, forms of arrival
    for name, (instructions, usage) in kernels.items():
        dtype = ".BF16" if "bfloat16" in name else ""
        assert instructions[f"HGMMA.64x256x16.F32{dtype}"] == 4  # 64 channels of a stage
        assert instructions["UTMALDG.3D.MULTICAST"] == 1
        assert instructions["LDGSTS.E.BYPASS.LTC128B.128"] == 8  # 128 rows, 16 at a time
        # Both roles wait for the previous kernel, after loading their first work item.
        assert instructions["ACQBULK"] == 2 and instructions["PREEXIT"] == 1
        assert instructions["MEMBAR.ALL.GPU"] == 0
        # The proxy fence is the producers', or the consumers' if copies arrive by themselves.
        copies_arrive = instructions["ARRIVES.LDGSTSBAR.64.ARVCNT"]
        assert copies_arrive == ("ArrivalE1" in name) and instructions["MEMBAR.ALL.CTA"] == 1
        # 168 registers at launch, then 104 for producers and 200 for consumers.
        assert instructions["USETMAXREG.DEALLOC.CTAPOOL"] == 1
        assert instructions["USETMAXREG.TRY_ALLOC.CTAPOOL"] == 1
        assert int(re.search(r"REG:(\d+)", usage)[1]) == 168


def roles(code: str) -> tuple[dict[int, Block], dict[int, Block]]:
    """Basic blocks of the consumers, which run wgmma, and of the producers."""
    blocks = basic_blocks(code)
    first = {
        name: next(address for address, block in blocks.items() if block.has(name))
        for name in ("TRY_ALLOC", "DEALLOC")
    }
    assert first["TRY_ALLOC"] < first["DEALLOC"]
    consumers = {
        address: block
        for address, block in blocks.items()
        if first["TRY_ALLOC"] <= address < first["DEALLOC"]
    }
    producers = {a: block for a, block in blocks.items() if a >= first["DEALLOC"]}
    return consumers, producers


def test_dilated_conv2d_sm90_starts_a_work_item_with_independent_loads(cuobjdump):
    """The producers load the work item, then all pixels and the first tap at once; no division."""
    for code in machine_code(cuobjdump, "sm_90a", "dilated_conv2d_fwd_sm90_kernel").values():
        _, producers = roles(code)
        assert re.search(r"DEALLOC\.CTAPOOL 0x68\b", code)  # 104
        assert re.search(r"TRY_ALLOC\.CTAPOOL U?P\d, 0xc8\b", code)  # 200
        assert not any(block.has(r"MUFU|I2F|CALL") for block in producers.values())
        (header,) = [block for block in producers.values() if block.has(r"LDG\.E\.64")]
        loads = [text.split()[0] for text in header.instructions if "LDG" in text]
        assert loads[:3] == ["LDG.E.128"] * 3  # the work item
        assert Counter(loads[3:]) == {"LDG.E.64": 8, "LDG.E.128": 1}  # pixels; tap


def test_dilated_conv2d_sm90_reads_only_its_work_list_before_it_waits(cuobjdump):
    """The emulator runs launches one after another, so it cannot detect a bias loaded too early."""
    for code in machine_code(cuobjdump, "sm_90a", "dilated_conv2d_fwd_sm90_kernel").values():
        # Consumers load a work item and a pixel; producers a work item, 8 pixels and a tap.
        for role, num_loads in zip(roles(code), (3, 3 + 9)):
            instructions = [text for block in role.values() for text in block.instructions]
            before = instructions[: instructions.index("ACQBULK")]
            accesses = [text for text in before if re.search(r"LDG|STG|UTMALDG|RED|ATOM", text)]
            assert all(re.search(r"LDG\.E(\.64|\.128)? ", text) for text in accesses), accesses
            assert len(accesses) == num_loads, accesses


def instructions_after_products(code: str, avoids: str) -> Counter[str]:
    """Instructions on the consumers' longest path from the last wgmma to the next work item."""
    consumers, _ = roles(code)
    loop = max(address for address, block in consumers.items() if block.has("HGMMA"))
    (after,) = [address for address in consumers[loop].successors if address > loop]
    path = longest_path(consumers, after, avoids)
    return Counter(re.sub(r"^@\S+ ", "", text).split()[0] for text in path)


def test_epilogue_of_dilated_conv2d_sm90_is_short(cuobjdump):
    """Instructions of a warp for 16 x 256 sums, in whole vectors, without residual or image bias.

    There were 3300 when sums were staged as fp32.
    """
    for code in machine_code(cuobjdump, "sm_90a", "dilated_conv2d_fwd_sm90_kernel").values():
        whole = instructions_after_products(code, r"LDG|MUFU|\.U16|STG\.E\.64")
        assert whole["STSM.16.M88.4"] == 16 and whole["STG.E.128"] == whole["LDS.128"] == 16
        assert sum(whole.values()) <= 900
        # Partial sums: 64 stores of 8 bytes from registers, four lanes per sector.
        partial = instructions_after_products(code, "STSM")
        assert partial["STG.E.64"] == 64 and sum(partial.values()) <= 120


def test_epilogue_of_weight_gradient_sm90_is_short(cuobjdump):
    for code in machine_code(cuobjdump, "sm_90a", "dilated_conv2d_wgrad_sm90_kernel").values():
        whole = instructions_after_products(code, r"STG\.E\.64")
        assert whole["STSM.16.M88.4"] == whole["STG.E.128"] == 16
        assert sum(whole.values()) <= 500
        _, producers = roles(code)
        assert not any(block.has(r"MUFU|I2F|CALL") for block in producers.values())


def test_overlapping_kernels_wait_before_they_load(cuobjdump):
    """Loads come after griddepcontrol.wait and do not use the read-only cache.

    CUDA Programming Guide, "Programmatic Dependent Launch".
    """
    for name in ("dilated_conv2d_fwd_reduce", "pixel_means_fwd", "aspp_fwd_linear"):
        kernels = functions(cuobjdump, "sm_90a", f"{name}_kernel")
        assert kernels
        for instructions, _ in kernels.values():
            in_order = list(instructions)
            loads = [i for i in in_order if i.startswith("LDG")]
            assert in_order.index("ACQBULK") < in_order.index("PREEXIT")
            assert in_order.index("ACQBULK") < in_order.index(loads[0])
            assert not any("CONSTANT" in load for load in loads)


@pytest.mark.parametrize("chip", ["sm_80", "sm_90a"])
def test_weight_gradient_is_tensor_core_code(cuobjdump, chip):
    """cp.async of 16 bytes, transposing ldmatrix and mma; no spills."""
    kernels = functions(cuobjdump, chip, "dilated_conv2d_wgrad_kernel")
    assert len(kernels) == 3
    for name, (instructions, usage) in kernels.items():
        halves = "16816.F32.BF16" if "bfloat16" in name else "16816.F32"
        is_fp32 = "kernelIf" in name
        assert instructions["HMMA." + ("1688.F32.TF32" if is_fp32 else halves)] == 64
        assert instructions["LDSM.16.MT88.4"] == (0 if is_fp32 else 8 + 16)
        assert instructions["LDGSTS.E.BYPASS.LTC128B.128"] == 5 * 8  # as in the forward kernel
        assert int(re.search(r"REG:(\d+)", usage)[1]) <= 65536 // (2 * 128) - 1
    # 128 x 128 tiles in three dtypes, and the 256 x 256 tiles of sm_90 in two.
    assert len(functions(cuobjdump, chip, "dilated_conv2d_wgrad_reduce_kernel")) == 3 + 2


def test_weight_gradient_of_sm90_is_warpgroup_code(cuobjdump):
    """wgmma of two transposed operands, all by bulk copy, half of the input to both CTAs."""
    kernels = functions(cuobjdump, "sm_90a", "dilated_conv2d_wgrad_sm90_kernel")
    assert len(kernels) == 2
    for name, (instructions, usage) in kernels.items():
        dtype = ".BF16" if "bfloat16" in name else ""
        assert instructions[f"HGMMA.64x256x16.F32{dtype}"] == 4  # 64 pixels of a stage
        assert instructions["UTMALDG.4D"] == 2 * 2  # two boxes, two chunks of channels
        assert instructions["UTMALDG.4D.MULTICAST"] == 2 * 2
        assert instructions["MEMBAR.ALL.GPU"] == 0
        # 168 registers at launch, then 40 for producers and 232 for consumers.
        assert instructions["USETMAXREG.DEALLOC.CTAPOOL"] == 1
        assert instructions["USETMAXREG.TRY_ALLOC.CTAPOOL"] == 1
        assert int(re.search(r"REG:(\d+)", usage)[1]) == 168


def test_bias_gradient_loads_vectors(cuobjdump):
    kernels = functions(cuobjdump, "sm_80", "dilated_conv2d_bias_grad_kernel")
    assert len(kernels) == 3
    for instructions, _ in kernels.values():
        assert instructions["LDG.E.128.CONSTANT"] >= 4  # several in flight
    assert len(functions(cuobjdump, "sm_80", "dilated_conv2d_bias_grad_reduce_kernel")) == 3


@pytest.mark.parametrize("chip", ["sm_80", "sm_90a"])
def test_aspp_loads_vectors_and_spills_nothing(cuobjdump, chip):
    assert len(functions(cuobjdump, chip, "pixel_means_fwd_")) == 1
    kernels = functions(cuobjdump, chip, "aspp_fwd_linear_")
    kernels |= functions(cuobjdump, chip, "pixel_sums_fwd_")
    assert len(kernels) == 2 * 3
    for name, (instructions, usage) in kernels.items():
        load = "LDG.E.128" if "linear" in name else "LDG.E.128.CONSTANT"
        assert instructions[load] >= 4  # several in flight
        assert int(re.search(r"REG:(\d+)", usage)[1]) <= 40


@pytest.mark.parametrize("chip", ["sm_80", "sm_90a"])
def test_depthwise_conv2d_moves_vectors_and_spills_nothing(cuobjdump, chip):
    """The thread blocks per SM are those the kernels state: three for 3x3, two for 5x5."""
    usage = dump(cuobjdump, chip, "resource-usage")
    usages = dict(re.findall(r"Function (\S*depthwise_conv2d\S*):\n(.*)", usage))
    assert len(usages) == 3 * (2 + 2 + 4 + 1)  # kernels per dtype
    sass = re.split(r"Function : (\S+)", dump(cuobjdump, chip, "sass"))
    code = dict(zip(sass[1::2], sass[2::2]))
    for name, line in usages.items():
        numbers = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", line)}
        assert numbers["STACK"] == numbers["LOCAL"] == 0, line
        vector, *kernel = [int(n) for n in re.findall(r"Li(\d+)", name)] or [0]
        blocks = {(3, 3): 3, (5, 5): 2}.get(tuple(kernel), 4)
        assert numbers["REG"] <= 65536 // (blocks * 128) // 8 * 8, line
        bits = vector * (32 if "IfLi" in name else 16)
        if bits >= 64:
            assert re.search(rf"LDG\.E\.{bits}", code[name])
            assert "wgrad" in name or re.search(rf"STG\.E\.{bits}", code[name])
            assert bits == 128 or kernel == [5, 5]  # its weights need the registers


def loops(cuobjdump: str, chip: str, kernel: str) -> dict[str, list[list[str]]]:
    """Instructions of each loop of the matching kernels, including those that are jumped over."""
    result = {}
    for name, body in machine_code(cuobjdump, chip, kernel).items():
        code = re.findall(r"/\*([0-9a-f]{4,5})\*/\s+(.*?);", body)
        places = {int(address, 16): i for i, (address, _) in enumerate(code)}
        result[name] = []
        for end, (address, instruction) in enumerate(code):
            jump = re.search(r"\bBRA\b.*0x([0-9a-f]+)", instruction)
            if jump and int(jump[1], 16) < int(address, 16):
                begin = places[int(jump[1], 16)]
                result[name].append([text for _, text in code[begin : end + 1]])
    return result


def count(instructions: list[str], pattern: str) -> int:
    return sum(bool(re.search(pattern, instruction)) for instruction in instructions)


@pytest.mark.parametrize("chip", ["sm_80", "sm_90a"])
def test_depthwise_conv2d_clamps_pairs_and_loads_two_rows_ahead(cuobjdump, chip):
    """The loop over six rows of a 16-bit 3x3 kernel has 975 to 990 instructions.

    About 20 per row belong to the residual and are jumped over if there is none.
    """
    kernels = loops(cuobjdump, chip, "depthwise_conv2d_fwd_kernel.*Li8ELi3ELi3")
    assert len(kernels) == 2  # fp16 and bf16
    for name, of_kernel in kernels.items():
        (rows,) = [loop for loop in of_kernel if count(loop, r"\bSTG") == 6 and len(loop) < 1200]
        assert len(rows) <= 1010, name
        assert count(rows, r"\bHMNMX2\S*\.NAN") == 6 * 8
        assert count(rows, r"\bFSETP") == 0  # a clamp of single values would need it
        loads = [i for i, text in enumerate(rows) if "LDG.E.128.CONSTANT" in text]
        assert len(loads) == 6 * 3
        for i in loads:
            first = int(re.search(r"CONSTANT R(\d+)", rows[i])[1])
            loaded = "|".join(rf"\bR{register}\b" for register in range(first, first + 4))
            operands = [text.partition(",")[2] for text in (rows + rows)[i + 1 :]]
            distance = next(n for n, text in enumerate(operands) if re.search(loaded, text))
            assert distance > 150, (
                "less than the length of a row: it waits for the load of the previous row"
            )


@pytest.mark.parametrize("chip", ["sm_80", "sm_90a"])
def test_upsample_cross_entropy_needs_few_instructions_per_class(cuobjdump, chip):
    """Loop over classes for a column of eight rows, in which no exponential can underflow."""
    forward = loops(cuobjdump, chip, "upsample_cross_entropy_fwd_kernel")
    backward = loops(cuobjdump, chip, "upsample_cross_entropy_bwd_kernel")
    assert len(forward) == len(backward) == 3
    for name, of_kernel in forward.items():
        tame = [loop for loop in of_kernel if count(loop, r"MUFU\.EX2") == 3]
        assert min(map(len, tame)) <= 36, name
    for name, of_kernel in backward.items():
        tame = min((loop for loop in of_kernel if count(loop, r"MUFU\.EX2") == 3), key=len)
        # 53 of them are executed if a column of the cell has a single target.
        assert len(tame) <= 68, name
        assert count(tame, r"\bFFMA") >= 22 and count(tame, r"\bLDS\.128") <= 7


@pytest.mark.parametrize("chip", ["sm_80", "sm_90a"])
def test_upsample_cross_entropy_uses_hardware_exponentials(cuobjdump, chip):
    """Six thread blocks per SM and no spills.

    Only the log2 of a pixel is computed in software, with one hardware reciprocal.
    """
    resources = dump(cuobjdump, chip, "resource-usage")
    usage = re.findall(r"Function \S*upsample_cross_entropy_(\w+?)_kernel\S*:\n(.*)", resources)
    assert Counter(kernel for kernel, _ in usage) == {
        "prepare": 3, "fwd": 3, "reduce": 1, "bwd": 3, "gather": 3
    }  # fmt: skip
    for _, line in usage:
        numbers = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", line)}
        assert numbers["STACK"] == numbers["LOCAL"] == 0, line
        assert numbers["REG"] <= 80, line
    bodies = machine_code(cuobjdump, chip, "upsample_cross_entropy_(fwd|bwd)_kernel")
    assert len(bodies) == 2 * 3  # kernels, logit dtypes
    for body in bodies.values():
        assert "MUFU.EX2" in body and not re.search(r"\b(LDL|STL)\b", body)
        assert body.count("MUFU.RCP") >= 8
