"""The build: what the source distribution holds, what the compiled module contains and needs."""

from __future__ import annotations

import os
import re
import runpy
import shutil
import subprocess
import sys
import tarfile
import types
from collections import Counter
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import pybind11
import pytest

import deeplab_fast
from deeplab_fast import _C

ROOT = Path(__file__).parent.parent
MODULE = Path(_C.__file__)
SOURCES = [path for path in (ROOT / "csrc").rglob("*") if path.is_file()]


def run(*command: str | Path, env: dict[str, str] | None = None) -> str:
    return subprocess.run(command, env=env, check=True, capture_output=True, text=True).stdout


def test_sdist_holds_all_that_a_build_needs(tmp_path):
    # A copy, because setuptools also packs whatever an earlier build listed in its egg-info.
    ignored = shutil.ignore_patterns(".git", "build", "*.egg-info", "__pycache__", "*.so")
    shutil.copytree(ROOT, tmp_path / "src", ignore=ignored)
    options = ["--sdist", "--no-isolation", "--skip-dependency-check", "--outdir", tmp_path]
    run(sys.executable, "-m", "build", *options, tmp_path / "src")

    (archive,) = tmp_path.glob("*.tar.gz")
    assert archive.name == f"deeplab_fast-{version('deeplab-fast')}.tar.gz"
    assert archive.stat().st_size < 2_000_000
    with tarfile.open(archive) as tar:
        names = {name.partition("/")[2] for name in tar.getnames()}
    assert {str(path.relative_to(ROOT)) for path in SOURCES} <= names
    assert {"CMakeLists.txt", "setup.py", "pyproject.toml", "LICENSE", "README.md"} <= names
    assert {"tests/test_build.py", "benchmarks/bench_aspp.py", "deeplab_fast/py.typed"} <= names
    assert "deeplab_fast/measured.csv" in names
    assert not [name for name in names if name.endswith((".so", ".pyc"))]


def test_kernels_know_no_framework():
    framework = re.compile(r"#\s*include\s*[<\"](torch|ATen|c10|caffe2)/")
    assert not [path for path in SOURCES if framework.search(path.read_text())]
    python = re.compile(r"#\s*include\s*[<\"](pybind11/|Python\.h)")
    assert [path.name for path in SOURCES if python.search(path.read_text())] == ["bindings.cpp"]


def test_version_is_the_same_everywhere():
    (stated,) = re.findall(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.M)
    assert deeplab_fast.__version__ == version("deeplab-fast") == stated
    assert _C.build_info()["version"] == stated


def test_module_imports_without_torch_and_without_a_driver():
    code = f"""
import importlib.util, sys
spec = importlib.util.spec_from_file_location("_C", {str(MODULE)!r})
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
if module.build_info()["cuda"]:
    info = module.cuda.device_info()
    assert info["runtime_version"] >= 12000, info
    assert len(info["devices"]) == 0 or info["driver_version"] > 0, info
assert "torch" not in sys.modules
"""
    run(sys.executable, "-I", "-c", code)


@pytest.mark.skipif(not shutil.which("ldd"), reason="needs ldd")
def test_module_needs_no_driver_and_no_torch():
    libraries = re.findall(r"^\s*(?:/\S*/)?(\S+?)\.so", run("ldd", MODULE), re.M)
    allowed = {"libstdc++", "libgomp", "libgcc_s", "libc", "libm", "linux-vdso", "libmvec"}
    allowed |= {"libpthread", "libdl", "librt", "ld-linux-x86-64", "ld-linux-aarch64"}
    assert set(libraries) - allowed == set()


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
    """`80` is machine code and PTX, `80-real` the code and `80-virtual` the PTX alone."""
    compiled = run(cuobjdump, "--list-elf", "--list-ptx", MODULE)
    for architecture in _C.build_info()["architectures"]:
        number, _, kind = architecture.partition("-")
        chip = rf"\.sm_{number.rstrip('af')}[af]?"  # an older cuobjdump prints 90 for 90a
        assert bool(re.search(rf"{chip}\.cubin", compiled)) == (kind != "virtual")
        assert bool(re.search(rf"{chip}\.ptx", compiled)) == (kind != "real")


def test_kernels_are_in_the_module(cuobjdump):
    kernels = re.compile(r"__global__\s+void\s+(?:__launch_bounds__\([^)]*\)\s*)?(\w+)\(")
    names = {name for path in SOURCES for name in kernels.findall(path.read_text())}
    assert names
    symbols = run(cuobjdump, "--dump-elf-symbols", MODULE)
    assert [name for name in names if name not in symbols] == []


@pytest.mark.parametrize("chip", ["sm_80", "sm_90a"])
def test_upsample_argmax_stores_vectors_and_spills_nothing(cuobjdump, chip):
    if chip not in run(cuobjdump, "--list-elf", MODULE):
        pytest.skip(f"not built for {chip}")
    usage = run(cuobjdump, "--dump-resource-usage", "-arch", chip, MODULE)
    usages = re.findall(r"Function (\S*upsample_argmax_fwd\S*):\n(.*)", usage)
    assert len(usages) == 2 * 3 * 3  # kernels, label dtypes, logit dtypes
    for _, line in usages:
        numbers = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", line)}
        assert numbers["STACK"] == numbers["LOCAL"] == 0, line
        assert numbers["REG"] <= 64, line  # half of the warps that the chip can hold

    sass = re.split(r"Function : (\S+)", run(cuobjdump, "--dump-sass", "-arch", chip, MODULE))
    pruned = [
        code for name, code in zip(sass[1::2], sass[2::2]) if "upsample_argmax_fwd_pruned" in name
    ]
    assert len(pruned) == 3 * 3
    assert all(re.search(r"STG\.E\.(EF\.)?128", code) for code in pruned)


def functions(cuobjdump: str, chip: str, part_of_name: str) -> dict[str, tuple[Counter[str], str]]:
    """Instructions and resources of each kernel of that name; a kernel of registers that spill or
    of a stack fails."""
    if chip not in run(cuobjdump, "--list-elf", MODULE):
        pytest.skip(f"not built for {chip}")
    code = run(cuobjdump, "--dump-sass", "--gpu-architecture", chip, MODULE)
    resources = run(cuobjdump, "--dump-resource-usage", "--gpu-architecture", chip, MODULE)
    usage = dict(re.findall(r"Function (\S+):\s+(.*)", resources))
    result = {}
    for name, body in re.findall(r"Function : (\S+)(.*?)(?=Function : |\Z)", code, re.S):
        if part_of_name in name:
            instructions = Counter(re.findall(r"\b[A-Z][A-Z0-9_.x]+", body))
            assert not instructions.keys() & {"LDL", "STL"}
            assert "STACK:0" in usage[name] and "LOCAL:0" in usage[name]
            result[name] = instructions, usage[name]
    return result


def test_dilated_conv2d_is_tensor_core_code(cuobjdump):
    """Asynchronous copies of 16 bytes, matrix loads and products; no spills, two blocks an SM."""
    kernels = functions(cuobjdump, "sm_80", "dilated_conv2d_fwd_kernel")
    assert len(kernels) == 3
    for name, (instructions, usage) in kernels.items():
        halves = "16816.F32.BF16" if "bfloat16" in name else "16816.F32"
        is_fp32 = "kernelIf" in name
        product = "1688.F32.TF32" if is_fp32 else halves
        assert instructions["HMMA." + product] == 64  # 4 x 8 tiles, 2 steps of 32 bytes
        assert instructions["LDSM.16.M88.4"] == 16
        assert instructions["LDGSTS.E.BYPASS.LTC128B.128"] == 4 * 8  # 3 stages ahead and the loop
        assert instructions["STG.E.128" if is_fp32 else "STG.E.64"] >= 4  # 4 rows at once
        # 238 in 16 bits, 224 in tf32
        assert int(re.search(r"REG:(\d+)", usage)[1]) <= 65536 // (2 * 128) - 1
    # Of 128 x 128 sums in three dtypes, of sm_90's 256 x 256 in two.
    assert len(functions(cuobjdump, "sm_80", "dilated_conv2d_fwd_reduce_kernel")) == 3 + 2


def test_dilated_conv2d_fits_twice_on_an_sm_of_sm_90(cuobjdump):
    kernels = functions(cuobjdump, "sm_90a", "dilated_conv2d_fwd_kernel")
    assert len(kernels) == 3
    for _, usage in kernels.values():
        assert int(re.search(r"REG:(\d+)", usage)[1]) <= 65536 // (2 * 128) - 1


def test_dilated_conv2d_sm90_is_warpgroup_code(cuobjdump):
    """wgmma, weights by bulk copy to both blocks, pixels by asynchronous copies of 16 bytes."""
    kernels = functions(cuobjdump, "sm_90a", "dilated_conv2d_fwd_sm90_kernel")
    assert len(kernels) == 2
    for name, (instructions, usage) in kernels.items():
        dtype = ".BF16" if "bfloat16" in name else ""
        assert instructions[f"HGMMA.64x256x16.F32{dtype}"] == 4  # 64 channels of a stage
        assert instructions["UTMALDG.3D.MULTICAST"] == 1
        assert instructions["LDGSTS.E.BYPASS.LTC128B.128"] == 8  # 128 rows, 16 at once
        assert instructions["STG.E.64"] >= 4 * 2  # four parts of the sums, two pixels at once
        assert instructions["ACQBULK"] == instructions["PREEXIT"] == 1  # overlaps others
        assert instructions["MEMBAR.ALL.GPU"] == 2  # at the barriers of the cluster, not in loops
        # 88 for the producers, 208 for the consumers, of 168 to begin with
        assert instructions["USETMAXREG.DEALLOC.CTAPOOL"] == 1
        assert instructions["USETMAXREG.TRY_ALLOC.CTAPOOL"] == 1
        assert int(re.search(r"REG:(\d+)", usage)[1]) == 168


def test_kernels_that_overlap_the_one_before_wait_for_what_it_writes(cuobjdump):
    """Before they load anything, and nothing of it as if it were constant; CUDA Programming Guide,
    "Programmatic Dependent Launch"."""
    for name in ("dilated_conv2d_fwd_reduce", "pixel_means_fwd", "aspp_fwd_linear"):
        kernels = functions(cuobjdump, "sm_90a", f"{name}_kernel")
        assert kernels
        for instructions, _ in kernels.values():
            in_order = list(instructions)
            loads = [i for i in in_order if i.startswith("LDG")]
            assert in_order.index("ACQBULK") < in_order.index("PREEXIT")
            assert in_order.index("ACQBULK") < in_order.index(loads[0])
            # Weights may be: the kernel before has not written them.
            assert name == "aspp_fwd_linear" or not any("CONSTANT" in load for load in loads)


@pytest.mark.parametrize("chip", ["sm_80", "sm_90a"])
def test_weight_gradient_is_tensor_core_code(cuobjdump, chip):
    """As above, but the matrix loads transpose; no spills."""
    kernels = functions(cuobjdump, chip, "dilated_conv2d_wgrad_kernel")
    assert len(kernels) == 3
    for name, (instructions, usage) in kernels.items():
        halves = "16816.F32.BF16" if "bfloat16" in name else "16816.F32"
        is_fp32 = "kernelIf" in name
        assert instructions["HMMA." + ("1688.F32.TF32" if is_fp32 else halves)] == 64
        assert instructions["LDSM.16.MT88.4"] == (0 if is_fp32 else 16)
        assert instructions["LDGSTS.E.BYPASS.LTC128B.128"] == 4 * 8  # 3 stages ahead and the loop
        # 224 to 228 in 16 bits, 204 to 208 in tf32
        assert int(re.search(r"REG:(\d+)", usage)[1]) <= 65536 // (2 * 128) - 1
    # Of 128 x 128 sums in three dtypes, of sm_90's 256 x 256 in two.
    assert len(functions(cuobjdump, chip, "dilated_conv2d_wgrad_reduce_kernel")) == 3 + 2


def test_weight_gradient_of_sm90_is_warpgroup_code(cuobjdump):
    """wgmma of two transposed matrices, all by bulk copy, half of the input to both blocks."""
    kernels = functions(cuobjdump, "sm_90a", "dilated_conv2d_wgrad_sm90_kernel")
    assert len(kernels) == 2
    for name, (instructions, usage) in kernels.items():
        dtype = ".BF16" if "bfloat16" in name else ""
        assert instructions[f"HGMMA.64x256x16.F32{dtype}"] == 4  # 64 pixels of a stage
        assert instructions["UTMALDG.4D"] == 2 * 2  # two boxes, two chunks of channels
        assert instructions["UTMALDG.4D.MULTICAST"] == 2 * 2
        assert instructions["MEMBAR.ALL.GPU"] == 2  # at the barriers of the cluster, not in loops
        # 40 for the producers, 232 for the consumers, of 168 to begin with
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
    for instructions, usage in kernels.values():
        assert instructions["LDG.E.128.CONSTANT"] >= 4  # several in flight
        assert int(re.search(r"REG:(\d+)", usage)[1]) <= 40


@pytest.mark.parametrize("chip", ["sm_80", "sm_90a"])
def test_depthwise_conv2d_moves_vectors_and_spills_nothing(cuobjdump, chip):
    """And as many blocks fit an SM as the kernels say: three for 3x3, two for 5x5."""
    if chip not in run(cuobjdump, "--list-elf", MODULE):
        pytest.skip(f"not built for {chip}")
    usage = run(cuobjdump, "--dump-resource-usage", "-arch", chip, MODULE)
    usages = dict(re.findall(r"Function (\S*depthwise_conv2d\S*):\n(.*)", usage))
    assert len(usages) == 3 * (2 + 2 + 4 + 1)  # kernels of each dtype
    sass = re.split(r"Function : (\S+)", run(cuobjdump, "--dump-sass", "-arch", chip, MODULE))
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
            assert bits == 128 or kernel == [5, 5]  # whose weights need the registers


@pytest.mark.parametrize("chip", ["sm_80", "sm_90a"])
def test_upsample_cross_entropy_takes_hardware_exponentials(cuobjdump, chip):
    """Six blocks an SM, no spills, and only the log2 of a pixel in software."""
    if chip not in run(cuobjdump, "--list-elf", MODULE):
        pytest.skip(f"not built for {chip}")
    resources = run(cuobjdump, "--dump-resource-usage", "-arch", chip, MODULE)
    usage = re.findall(r"Function \S*upsample_cross_entropy_(\w+?)_kernel\S*:\n(.*)", resources)
    assert Counter(kernel for kernel, _ in usage) == {
        "prepare": 3, "fwd": 3, "reduce": 1, "bwd": 3, "gather": 3
    }  # fmt: skip
    for _, line in usage:
        numbers = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", line)}
        assert numbers["STACK"] == numbers["LOCAL"] == 0, line
        assert numbers["REG"] <= 80, line
    code = run(cuobjdump, "--dump-sass", "-arch", chip, MODULE)
    bodies = dict(re.findall(r"Function : (\S+)(.*?)(?=Function : |\Z)", code, re.S))
    for name, body in bodies.items():
        if re.search("upsample_cross_entropy_(fwd|bwd)_kernel", name):
            assert "MUFU.EX2" in body and not re.search(r"\b(LDL|STL)\b", body)


@pytest.fixture
def configure(tmp_path):
    """Lets CMake decide about CUDA; compiles none of the sources."""

    def configure(
        wanted: str, compiler: str | None, *more: str
    ) -> subprocess.CompletedProcess[str]:
        environment = {k: v for k, v in os.environ.items() if k not in ("CUDACXX", "CUDAARCHS")}
        if compiler:
            environment["CUDACXX"] = compiler
        options = [
            f"-DDEEPLAB_FAST_CUDA={wanted}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            *more,
        ]
        return subprocess.run(
            ["cmake", "-S", ROOT, "-B", tmp_path, "-G", "Ninja", *options],
            env=environment,
            capture_output=True,
            text=True,
        )

    return configure


@pytest.mark.parametrize("wanted", ["AUTO", "TRY"])
def test_no_cuda_compiler_means_a_cpu_build(configure, wanted):
    done = configure(wanted, None)
    assert done.returncode == 0, done.stderr
    assert "no CUDA compiler found, building for the CPU only" in done.stdout


def test_a_cuda_compiler_that_is_tried_and_fails_means_a_cpu_build_with_its_log(configure):
    done = configure("TRY", "/bin/false")
    assert done.returncode == 0, done.stderr
    assert "/bin/false does not work, building for the CPU only" in done.stderr
    assert "is not able to compile a simple test program" in " ".join(done.stderr.split())


@pytest.mark.parametrize(
    "wanted, compiler", [("ON", "/nowhere/nvcc"), ("AUTO", "/nowhere/nvcc"), ("AUTO", "/bin/false")]
)
def test_a_cuda_compiler_that_was_named_must_work(configure, wanted, compiler):
    done = configure(wanted, compiler)
    assert done.returncode != 0
    assert compiler in done.stderr


@pytest.mark.parametrize("wanted", ["AUTO", "TRY"])
def test_a_cuda_compiler_that_cmake_was_told_must_work(configure, wanted):
    done = configure(wanted, None, "-DCMAKE_CUDA_COMPILER=/nowhere/nvcc")
    assert done.returncode != 0
    assert "/nowhere/nvcc" in done.stderr


@pytest.fixture
def cuda_compiler(monkeypatch, tmp_path):
    """setup.py's choice where the path has an nvcc that says it is of this release, or none."""
    monkeypatch.setattr("setuptools.setup", lambda **arguments: None)
    for name in ("CUDACXX", "CUDA_HOME"):
        monkeypatch.delenv(name, raising=False)

    def cuda_compiler(release: str | None = None) -> tuple[dict[str, str], str]:
        monkeypatch.setenv("PATH", str(tmp_path))
        if release:
            (tmp_path / "nvcc").write_text(
                f"#!/bin/sh\necho 'Cuda, release {release}, V{release}.1'"
            )
            (tmp_path / "nvcc").chmod(0o755)
        return runpy.run_path(str(ROOT / "setup.py"))["cuda_compiler"]()

    return cuda_compiler


def test_an_nvcc_on_the_path_or_named_must_work(cuda_compiler, monkeypatch, tmp_path):
    assert cuda_compiler("12.5") == ({"CUDACXX": str(tmp_path / "nvcc")}, "ON")
    monkeypatch.setenv("CUDA_HOME", "/opt/cuda")
    assert cuda_compiler("12.5") == ({"CUDACXX": "/opt/cuda/bin/nvcc"}, "ON")
    monkeypatch.setenv("CUDACXX", "/else/nvcc")
    assert cuda_compiler("12.5") == ({"CUDACXX": "/else/nvcc"}, "ON")


@pytest.mark.parametrize("release", ["12.4", None])
def test_an_nvcc_that_came_with_the_build_is_tried(cuda_compiler, monkeypatch, tmp_path, release):
    wheels = types.ModuleType("nvidia.cu13")
    wheels.__path__ = [str(tmp_path / "wheels")]
    monkeypatch.setitem(sys.modules, "nvidia", types.ModuleType("nvidia"))
    sys.modules["nvidia"].cu13 = wheels
    monkeypatch.setitem(sys.modules, "nvidia.cu13", wheels)
    assert cuda_compiler(release) == ({}, "AUTO")
    nvcc = tmp_path / "wheels" / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True)
    nvcc.touch()
    environment = {"CUDACXX": str(nvcc), "LIBRARY_PATH": str(tmp_path / "wheels" / "lib")}
    assert cuda_compiler(release) == (environment, "TRY")


def test_an_nvcc_that_is_too_old_is_named(cuda_compiler, tmp_path, capsys):
    cuda_compiler("12.4")
    assert f"{tmp_path / 'nvcc'} is of no use" in capsys.readouterr().out


def test_a_folder_without_the_compiled_modules_says_what_to_do(tmp_path):
    ignored = shutil.ignore_patterns("*.so", "__pycache__")
    shutil.copytree(ROOT / "deeplab_fast", tmp_path / "deeplab_fast", ignore=ignored)
    # Without the import hook of an editable installation, which would find the modules.
    code = (
        "import sys; sys.meta_path[:] = [f for f in sys.meta_path if 'ditable' not in str(f)]; "
        "import deeplab_fast"
    )
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 1
    last_line = result.stderr.strip().splitlines()[-1]
    assert last_line.startswith(f"ImportError: {tmp_path / 'deeplab_fast'} has no compiled kernels")
    assert last_line.endswith("pip install --editable .")
